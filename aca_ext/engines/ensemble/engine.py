"""engine="compiled", which runs independent samples in SIMD lanes and other solves as ``CompiledEngine`` does.

This file is imported with the package; run.py, which brings in torch's compiler, with the first solve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

from aca_ext.engines.base import Request, obstacle_but_to_eager
from aca_ext.engines.compiled.engine import CompiledEngine, obstacle_to_programs, solve_by
from aca_ext.gradients.base import Result
from aca_ext.problem.batch import BatchProblem
from aca_ext.progress import samples_bar


class EnsembleEngine(CompiledEngine):
    def obstacle(self, request: Request) -> str | None:
        if not request.is_batch:
            return super().obstacle(request)
        assert isinstance(request.problem, BatchProblem)
        if request.problem.is_ragged:
            return 'engine="compiled" does not take times padded with NaN. Use engine="eager".'
        others = request._replace(progress=False, checkpoints=None)  # which lanes have, too
        return obstacle_but_to_eager("compiled", others, takes_batches=True) or obstacle_to_programs(request.problem)

    def solve(self, request: Request) -> Result:
        """The solve by compiled programs.

        Raises:
            CompileError: func cannot be compiled.
            NotInstalledError: a progress bar is asked for, and tqdm is missing.
        """
        if not request.is_batch:
            return super().solve(request)
        with samples_bar(len(request.problem.y0)) if request.progress else nullcontext() as finished:
            return solve_by(partial(_solve(), checkpoints=request.checkpoints, finished=finished), request)


@cache
def _solve() -> Callable[..., Result]:
    from aca_ext.engines.ensemble.run import solve  # brings in the compiler, which takes seconds

    return solve
