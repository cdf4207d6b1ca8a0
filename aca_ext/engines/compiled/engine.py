"""engine="compiled": the adaptive checkpoint adjoint, with one compiled program per step and per transposed step.

The loop over the steps is compiled too (csrc/compiled/loop.h). Checkpoints and replay are those of ``gradients.aca``.
The package imports this file; the first solve imports run.py, since that imports torch's compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from aca_ext.engines.base import Request, obstacle_but_to_eager
from aca_ext.errors import CompileError
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.requested_times import with_time_gradient
from aca_ext.problem.problem import Problem

_DTYPES = (torch.float32, torch.float64)
_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
_OLDEST_TORCH = (2, 13)
_HINT = 'Use engine="eager".'


class CompiledEngine:
    error = CompileError

    def obstacle(self, request: Request) -> str | None:
        return obstacle_but_to_eager("compiled", request) or obstacle_to_programs(request.problem)

    def solve(self, request: Request) -> Result:
        """Solves by compiled programs; second derivatives come from the eager engine.

        Raises:
            CompileError: func cannot be compiled.
        """
        return solve_by(_solve(), request)


@cache
def _solve() -> Callable[..., Result]:
    from aca_ext.engines.compiled.run import solve  # importing the compiler takes seconds

    return solve


def solve_by(solve: Callable[..., Result], request: Request) -> Result:
    """Solves by compiled programs, with the gradient of the times if they are learnt."""
    if request.learnt is None:
        return solve(request.problem, request.params, request.task)

    def solve_task(task: Task) -> Result:
        n_evals = task.field.n_evals  # of the gradient of the times; verifying a program does not count
        result = solve(task.problem, task.params, lambda: task)
        result.stats.n_f_evals += n_evals
        return result

    return with_time_gradient(request.task(), t=request.learnt, method_of_gradient=solve_task)


def obstacle_to_programs(problem: Problem) -> str | None:
    """Reason why the problem cannot be compiled, such as its dtype, device or norm; None if it can."""
    y0 = problem.y0
    if _TORCH < _OLDEST_TORCH:
        return (
            f'engine="compiled" needs torch {".".join(map(str, _OLDEST_TORCH))} or newer; this is torch '
            f"{torch.__version__}. {_HINT}"
        )
    if not y0.is_cpu or y0.dtype not in _DTYPES or problem.packing.is_complex:
        return (
            f'engine="compiled" takes real float32 and float64 states on the CPU; y0 is '
            f"{'complex' if problem.packing.is_complex else y0.dtype} on {y0.device}. {_HINT}"
        )
    if type(y0) is not Tensor and not isinstance(y0, torch.nn.Parameter):
        return f'engine="compiled" takes plain tensors; y0 is of type {type(y0).__name__}. {_HINT}'
    if problem.tolerance.norm is not None:
        return f'engine="compiled" does not take a norm of your own (options["norm"]). {_HINT}'
    if torch.is_autocast_enabled("cpu"):
        return f'engine="compiled" does not run under torch.autocast. {_HINT}'
    return None
