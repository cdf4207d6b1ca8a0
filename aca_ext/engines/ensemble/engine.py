"""engine="compiled", which runs independent samples in SIMD lanes and other solves as ``CompiledEngine`` does.

This file is imported with the package; run.py, which brings in torch's compiler, with the first solve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from aca_ext.engines.base import Request, obstacle_but_to_eager
from aca_ext.engines.compiled.engine import CompiledEngine, obstacle_to_programs
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.requested_times import with_time_gradient
from aca_ext.problem.batch import BatchProblem


class EnsembleEngine(CompiledEngine):
    def obstacle(self, request: Request) -> str | None:
        if not request.is_batch:
            return super().obstacle(request)
        return obstacle_but_to_eager("compiled", request, takes_batches=True) or obstacle_to_programs(request.problem)

    def solve(self, request: Request) -> Result:
        """The solve by compiled programs.

        Raises:
            CompileError: func cannot be compiled.
        """
        if not request.is_batch:
            return super().solve(request)
        if request.learnt is not None:
            return with_time_gradient(request.task(), t=request.learnt, method_of_gradient=_solve_task)
        assert isinstance(request.problem, BatchProblem)
        return _solve()(request.problem, request.params, request.task)


@cache
def _solve() -> Callable[..., Result]:
    from aca_ext.engines.ensemble.run import solve  # brings in the compiler, which takes seconds

    return solve


def _solve_task(task: Task) -> Result:
    n_evals = task.field.n_evals  # those for the times; what checks a program when it is made does not count
    result = _solve()(task.problem, task.params, lambda: task)
    result.stats.n_f_evals += n_evals
    return result
