"""A solve from its arguments to its ``Solution``: which engine runs it, and by which gradient method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.cuda_graph import engine as graph_engine
from aca_ext.engines.recorded import solve_recorded
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, CompileError, GraphError, OptionError, SlopeError
from aca_ext.gradients import GRADIENTS
from aca_ext.gradients import batch as independent_gradients
from aca_ext.gradients.aca import solve_without_graph
from aca_ext.gradients.base import AdjointOptions, Result, Task
from aca_ext.gradients.requested_times import with_time_gradient
from aca_ext.kernels.fused import TorchOperations
from aca_ext.problem.arguments import lookup
from aca_ext.problem.batch import BatchProblem, batch_problem_of, is_independent
from aca_ext.problem.options import DEFAULT_MAX_NUM_STEPS, max_num_steps_of
from aca_ext.problem.problem import Problem, known_problem, problem_of
from aca_ext.problem.recorders import recorder
from aca_ext.problem.resumption import SolverState
from aca_ext.problem.state import State
from aca_ext.problem.times import warn_where_time_stands_still
from aca_ext.problem.transforms import refuse_transforms
from aca_ext.progress import Callback, both, progress_bar
from aca_ext.solution import LazySolution, Solution, stopped
from aca_ext.solver.checkpoints import Policy, StepRecord
from aca_ext.solver.loop import Stats
from aca_ext.vector_field.batch_field import RowField
from aca_ext.vector_field.field import VectorField

ENGINES = ("eager", "compiled", "graph")


def run(
    func: Callable[..., State],
    y0: State,
    t: Tensor | Sequence[float],
    resumed: SolverState | None = None,
    *,
    gradient: str,
    checkpoints: Policy,
    engine: str = "eager",
    params: Sequence[Tensor] | None,
    progress: bool,
    callback: Callback | None,
    adjoint: AdjointOptions,
    **settings: Any,
) -> Solution:
    """``solve``, or the part of one from where another part stopped."""
    for what, x in (("y0", y0), ("t", t), ("args", settings["args"])):
        for part in x if isinstance(x, (tuple, list)) else (x,):
            refuse_transforms(what, part)
    recording = recorder()
    if recording is not None:
        lookup("gradient", gradient, GRADIENTS)
        lookup("engine", engine, ENGINES)
        _check_recorded(recording, callback, progress, settings["options"])
        return solve_recorded(recording, func, y0, t, **settings)
    is_batch = is_independent(settings["options"])
    problem = (batch_problem_of if is_batch else problem_of)(func, y0, t, **settings)
    learnt = t if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled() else None
    _check_together(problem, learnt, gradient, checkpoints, callback)
    if problem.y0.dtype != torch.float64 and resumed is None and len(problem.times) > 1:
        warn_where_time_stands_still(*problem.span, len(problem.grid or problem.times) - 1, problem.y0.dtype)
    if lookup("engine", engine, ENGINES) != "eager":
        _check_not_eager(engine, problem, gradient, checkpoints, progress, callback)
    if engine == "compiled":
        result = _by_compiled_engine(problem, learnt, params, adjoint)
    elif engine == "graph":
        result = _by_graph_engine(_eager_task(problem, params, adjoint), learnt)
    else:
        if resumed is not None:
            jumps = problem.jumps | _jump_at(resumed.t, settings["options"])
            problem = replace(problem, resumed=resumed, jumps=jumps)
        result = _by_eager_engine(problem, learnt, gradient, checkpoints, params, progress, callback, adjoint)
    times = t if isinstance(t, Tensor) else torch.tensor(problem.times, dtype=torch.float64, device="cpu")
    y = problem.packing.unpack_rows(result.ys)
    if engine == "graph" or (is_batch and engine == "compiled"):  # a look at the steps takes its time
        return LazySolution.of(times, y, result.record, result.stats)
    solution = Solution(times, y, result.record.bounds(), result.stats)
    if problem.stops_at_limit:
        assert isinstance(result.record, StepRecord)
        again = partial(_resumed, func, gradient=gradient, checkpoints=checkpoints, params=params, progress=progress,
                        callback=callback, adjoint=adjoint, **settings)  # fmt: skip
        return stopped(solution, problem, result.record, again)
    return solution


def _check_recorded(recording: str, callback: Callback | None, progress: bool, options: Any) -> None:
    """Raises where an argument asks for what happens in Python, or at steps of its own, while a recording is made."""
    is_batch = is_independent(options)
    what = {"callback": callback is not None, "progress": progress, 'option batch="independent"': is_batch}
    for name, is_given in what.items():
        if is_given:
            raise ArgumentValueError(f"{recording} records no solve with {name}; leave it out.")


def run_compiled_again(
    func: Callable[..., State],
    y0: State,
    t: Tensor | Sequence[float],
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: Mapping[str, Any] | None,
    args: Sequence[Any],
) -> Solution | None:
    """``run`` for engine="compiled" without most of its checks; None unless they were made before."""
    if recorder() is not None:
        return None
    refuse_transforms("y0", y0)
    refuse_transforms("t", t)
    problem = known_problem(func, y0, t, rtol, atol, method, options, args)
    if problem is None or not isinstance(t, Tensor) or (t.requires_grad and torch.is_grad_enabled()):
        return None
    result = _compiled_engine(False)(problem, None, partial(_eager_task, problem, None, _NO_ADJOINT))
    assert isinstance(result.stats, Stats)
    return LazySolution.of(t, result.ys, result.record, result.stats)


_NO_ADJOINT = AdjointOptions(rtol=0.0, atol=0.0, method=None, options={})  # of gradients that solve nothing backward


def _resumed(
    func: Callable[..., State],
    y: State,
    t: Tensor,
    state: SolverState,
    *,
    max_num_steps: int | None,
    is_beyond: bool,
    options: Mapping[str, Any],
    **settings: Any,
) -> Solution:
    """A part of a solve from where another stopped, or beyond its end."""
    limit = options.get("max_num_steps") if max_num_steps is None else max_num_steps
    if is_beyond and max_num_steps is None:
        limit = max(max_num_steps_of(limit), DEFAULT_MAX_NUM_STEPS)
    return run(func, y, t, state, options={**options, "max_num_steps": limit}, **settings)


def _jump_at(t: float, options: Mapping[str, Any]) -> frozenset[float]:
    """The time where a solve goes on, if func jumps there."""
    given = () if options.get("jump_t") is None else options["jump_t"]
    jumps = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    return frozenset({t} & set(jumps.reshape(-1).tolist()))


def _check_together(
    problem: Problem, learnt: Tensor | None, gradient: str, checkpoints: Policy, callback: Callback | None
) -> None:
    """Arguments that depend on one another."""
    lookup("gradient", gradient, GRADIENTS)
    if checkpoints is not None and gradient != "aca":
        raise ArgumentValueError(
            f'checkpoints is {checkpoints!r}, but gradient={gradient!r} keeps none; leave it out or use gradient="aca".'
        )
    if problem.stops_at_limit and (learnt is not None or gradient not in ("aca", "direct")):
        raise OptionError(
            'option on_step_limit="stop" takes gradient="aca" or "direct" and times that do not require grad.'
        )
    if isinstance(problem, BatchProblem) and problem.nan_on_failure and learnt is not None:
        raise OptionError('option on_failure="nan" takes times that do not require grad.')
    if callback is not None and not callable(callback):
        raise ArgumentTypeError(f"callback is of type {type(callback).__name__}; give a function of an aca_ext.Step.")


def _by_eager_engine(
    problem: Problem,
    learnt: Tensor | None,
    gradient: str,
    checkpoints: Policy,
    params: Sequence[Tensor] | None,
    progress: bool,
    callback: Callback | None,
    adjoint: AdjointOptions,
) -> Result:
    method = _method(problem, learnt, gradient)
    with progress_bar(problem.length) if progress else nullcontext() as show:
        on_step = both(callback, show)
        if on_step is not None:
            problem = replace(problem, on_step=on_step)
        task = Task(problem, _field(problem), params, adjoint, checkpoints)
        if torch.is_grad_enabled():
            task.field.prepare_replay()
        try:
            return method(task)
        except TypeError:
            task.field.check_signature()
            raise
        except (RuntimeError, ValueError) as error:
            if isinstance(problem, BatchProblem):
                _explain_times_of_samples(error)
            raise


def _explain_times_of_samples(error: Exception) -> None:
    """Raises SlopeError where func took the times of all samples for one number."""
    signs = ("Boolean value of Tensor", "cannot be converted to Scalar", "can be converted to Python scalars")
    if any(sign in str(error) for sign in signs):
        raise SlopeError(
            f'func failed ({error}): with option batch="independent" t holds the time of every sample, of shape '
            "(batch, 1, ..., 1), so that `if t > 1`, float(t) and t.item() have no answer. Use torch.where(t > 1, a, "
            "b)."
        ) from error


def _method(problem: Problem, learnt: Tensor | None, gradient: str) -> Callable[[Task], Result]:
    """The function that solves a task with the requested gradient."""
    is_batch = isinstance(problem, BatchProblem)
    if not torch.is_grad_enabled():
        return independent_gradients.solve_without_graph if is_batch else _without_graph
    method: Callable[[Task], Result] = GRADIENTS[gradient]
    if is_batch:
        method = partial(independent_gradients.solve, gradient=gradient)
    return method if learnt is None else partial(with_time_gradient, t=learnt, method_of_gradient=method)


def _without_graph(task: Task) -> Result:
    return solve_without_graph(task, task.first_slope(task.problem.y0.detach()))


def _field(problem: Problem) -> VectorField:
    """func as the solver calls it."""
    ops = TorchOperations(problem.y0.detach(), problem.tolerance)
    if isinstance(problem, BatchProblem):
        return RowField(problem.func, problem.args, problem.packing, ops)
    return VectorField(problem.func, problem.args, problem.packing, ops)


def _check_not_eager(
    engine: str, problem: Problem, gradient: str, checkpoints: Policy, progress: bool, callback: Callback | None
) -> None:
    """Raises where an argument asks for what the other engines do not do."""
    is_batch = isinstance(problem, BatchProblem) and engine != "compiled"
    others = {"gradient": gradient != "aca", "checkpoints": checkpoints, "progress": progress, "callback": callback,
              "options": is_batch or problem.stops_at_limit}  # fmt: skip
    for name, is_given in others.items():
        if is_given:
            raise (CompileError if engine == "compiled" else GraphError)(
                f'engine="{engine}" does not take what {name} asks for'
                f'{f" ({gradient!r})" if name == "gradient" else ""}. Use engine="eager" for it.'
            )


def _by_compiled_engine(
    problem: Problem, learnt: Tensor | None, params: Sequence[Tensor] | None, adjoint: AdjointOptions
) -> Result:
    task_of = partial(_eager_task, problem, params, adjoint)
    if learnt is not None:
        return with_time_gradient(task_of(), t=learnt, method_of_gradient=_compiled)
    return _compiled_engine(isinstance(problem, BatchProblem))(problem, params, task_of)


def _eager_task(problem: Problem, params: Sequence[Tensor] | None, adjoint: AdjointOptions) -> Task:
    return Task(problem, _field(problem), params, adjoint, None)


def _by_graph_engine(task: Task, learnt: Tensor | None) -> Result:
    method = graph_engine.solve if len(task.problem.times) > 1 else _method(task.problem, None, "aca")
    if torch.is_grad_enabled():
        task.field.prepare_replay()
    try:
        if learnt is not None:
            return with_time_gradient(task, t=learnt, method_of_gradient=method)
        return method(task)
    except TypeError:
        task.field.check_signature()
        raise


@cache
def _compiled_engine(is_batch: bool) -> Callable[..., Result]:
    if is_batch:
        from aca_ext.engines.ensemble.engine import solve as solve_batch

        return solve_batch
    from aca_ext.engines.compiled.engine import solve  # brings in the compiler, which takes seconds

    return solve


def _compiled(task: Task) -> Result:
    n_evals = task.field.n_evals  # those for the times; what checks a program when it is made does not count
    result = _compiled_engine(isinstance(task.problem, BatchProblem))(task.problem, task.params, lambda: task)
    result.stats.n_f_evals += n_evals
    return result
