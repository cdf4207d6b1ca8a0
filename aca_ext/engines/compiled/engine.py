"""engine="compiled": the adaptive checkpoint adjoint, with one compiled program per step and per transposed step.

The loop over the steps is compiled too (csrc/compiled/loop.h). Checkpoints and replay are those of ``gradients.aca``.
If no program can hold the solve, evaluations of func are compiled (evaluations.py); what cannot be compiled runs
uncompiled. The package imports this file; the first solve imports run.py, since that imports torch's compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from aca_ext.engines.base import Request, argument_for_eager
from aca_ext.engines.compiled.uncompiled import shortened, solve_uncompiled
from aca_ext.errors import CompileError
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.requested_times import with_gradient_by_slopes
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Problem

_DTYPES = (torch.float32, torch.float64)
_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
_OLDEST_TORCH = (2, 13)
_HINT = 'Use engine="eager".'
AUTOCAST = "The steps run in Python under torch.autocast."


class CompiledEngine:
    error = CompileError

    def obstacle(self, request: Request) -> str | None:
        return obstacle_to_compiling(request.problem)

    def solve(self, request: Request) -> Result:
        """Solves by one compiled program if one can hold the solve, else by compiled evaluations of func.

        Raises:
            CompileError: no engine can solve with this func.
        """
        return solve_by(programs_of_common_steps, request, obstacle_to_programs(request))


def solve_by(programs: Callable[[], Callable[..., Result]], request: Request, obstacle: str | None) -> Result:
    """Solves by the compiled programs of ``programs()``, or by compiled evaluations if there is an obstacle to them."""
    is_traced = True
    if obstacle is None:
        try:
            result = by_programs(programs(), request)
            result.stats.compiled = "solve"
            request.problem.settings.has_program = True
            return result
        except CompileError as error:
            from aca_ext.engines.compiled.backend import TraceError, UnusableFuncError

            if isinstance(error, UnusableFuncError):
                raise
            obstacle, is_traced = shortened(error), not isinstance(error, TraceError)
    _check_lanes_are_not_needed(request, obstacle)
    whole = _obstacle_to_evaluations(request.problem)
    if whole is not None or not is_traced:
        return solve_uncompiled(request, obstacle if whole is None else f"{obstacle} {whole}")
    return _solve_by_evaluations()(request, obstacle)


def _check_lanes_are_not_needed(request: Request, obstacle: str) -> None:
    """Raises CompileError if an argument that the eager engine does not support needs compiled lanes."""
    problem = request.problem
    if not isinstance(problem, BatchProblem):
        return
    what = "checkpoints" if request.checkpoints is not None else None
    what = "options step_t and jump_t" if problem.stops_of_rows is not None else what
    if what is not None:
        raise CompileError(
            f"{what} of independent samples need compiled lanes, which cannot take this solve. {obstacle}"
        )


def _obstacle_to_evaluations(problem: Problem) -> str | None:
    """Reason why func must be evaluated uncompiled; None if there is none."""
    if type(problem.tableau) is not Tableau:
        return f"The evaluations of method {problem.tableau.name!r} are not compiled."
    if isinstance(problem, BatchProblem) and problem.is_compact:
        return "Evaluations for fewer and fewer samples (option compact) are not compiled."
    return None


@cache
def programs_of_common_steps() -> Callable[..., Result]:
    """The function that solves by compiled programs."""
    from aca_ext.engines.compiled.run import solve  # importing the compiler takes seconds

    return solve


@cache
def _solve_by_evaluations() -> Callable[..., Result]:
    from aca_ext.engines.compiled.evaluations import solve

    return solve


def by_programs(solve: Callable[..., Result], request: Request) -> Result:
    """Solves by compiled programs, with the gradient of the times if they are learnt."""
    if request.learnt is None:
        return solve(request.problem, request.params, request.task)

    def solve_task(task: Task) -> Result:
        n_evals = task.field.n_evals  # of the gradient of the times; verifying a program does not count
        result = solve(task.problem, task.params, lambda: task)
        result.stats.n_f_evals += n_evals
        return result

    return with_gradient_by_slopes(request.task(), request.learnt, solve_task)


def obstacle_to_compiling(problem: Problem, takes_gpu: bool = False, takes_implicit: bool = False) -> str | None:
    """Reason why nothing of the problem can be compiled; None if something can."""
    y0 = problem.y0
    if problem.newton is not None and not takes_implicit:  # the Jacobian differentiates func
        others = " Of the methods for stiff problems it takes kvaerno3, kvaerno5 and trbdf2." if y0.is_cpu else ""
        return f'engine="compiled" does not support the given method ({problem.tableau.name!r}). {_HINT}{others}'
    if _TORCH < _OLDEST_TORCH:
        return (
            f'engine="compiled" needs torch {".".join(map(str, _OLDEST_TORCH))} or newer; this is torch '
            f"{torch.__version__}. {_HINT}"
        )
    if not (y0.is_cpu or (takes_gpu and y0.is_cuda)):
        return f'engine="compiled" takes states on the CPU; y0 is on {y0.device}. {_HINT}'
    if type(y0) is not Tensor and not isinstance(y0, torch.nn.Parameter):
        return f'engine="compiled" takes plain tensors; y0 is of type {type(y0).__name__}. {_HINT}'
    return None


def obstacle_to_programs(request: Request, takes_batches: bool = False) -> str | None:
    """Reason why no compiled program can hold the whole solve, such as the dtype or a callback; None if one can."""
    problem, argument = request.problem, argument_for_eager(request, takes_batches)
    if argument is not None:
        return f"The steps run in Python because of the given {argument}."
    if problem.packing.is_complex or problem.y0.dtype not in _DTYPES:
        kind = "complex" if problem.packing.is_complex else problem.y0.dtype
        return f"The steps run in Python because the state is {kind}."
    if problem.tolerance.norm is not None:
        return 'The steps run in Python because of a norm of your own (options["norm"]).'
    if torch.is_autocast_enabled(problem.y0.device.type):
        return AUTOCAST
    return None
