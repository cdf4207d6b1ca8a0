"""engine="compiled", which runs independent samples in SIMD lanes and other solves as ``CompiledEngine`` does.

This file is imported with the package; run.py, which brings in torch's compiler, with the first solve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from aca_ext.engines.base import Request
from aca_ext.engines.compiled.engine import CompiledEngine, obstacle_to_programs, solve_by
from aca_ext.gradients.base import Result


class EnsembleEngine(CompiledEngine):
    def solve(self, request: Request) -> Result:
        """The solve by compiled lanes or programs if they can hold it, else by compiled evaluations of func.

        Raises:
            CompileError: no engine can solve with this func.
        """
        if not request.is_batch:
            return super().solve(request)
        return solve_by(_solve, request, obstacle_to_programs(request, takes_batches=True))


@cache
def _solve() -> Callable[..., Result]:
    from aca_ext.engines.ensemble.run import solve  # brings in the compiler, which takes seconds

    return solve
