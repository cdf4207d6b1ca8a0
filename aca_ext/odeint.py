"""``odeint`` and ``solve``: dy/dt = func(t, y, \\*args) with the signature that torchdiffeq users know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from aca_ext.checkpoints import Policy, StepRecord, checked_policy
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, CompileError, OptionError
from aca_ext.gradients import GRADIENTS
from aca_ext.gradients.aca import solve_without_graph
from aca_ext.gradients.base import AdjointOptions, Result, Task
from aca_ext.gradients.parameters import checked_params
from aca_ext.independent import gradients as independent_gradients
from aca_ext.independent.problem import BatchProblem, RowField, batch_problem_of, is_independent
from aca_ext.ops import TorchOperations
from aca_ext.outputs import stack_rows
from aca_ext.problem import Problem, known_problem, lookup, problem_of
from aca_ext.progress import Callback, Step, progress_bar
from aca_ext.resumption import SolverState
from aca_ext.solution import Continuation, LazySolution, Solution
from aca_ext.solver import Stats
from aca_ext.state import State
from aca_ext.transforms import refuse_transforms
from aca_ext.vector_field import VectorField

ENGINES = ("eager", "compiled")

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _compiled_around(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keeps torch.compile out of a function, so that a model which holds a solve is compiled around it."""
    kept_out = torch.compiler.disable(function)

    @wraps(function)
    def either(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return (kept_out if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return either


def odeint(
    func: Callable[..., State],
    y0: State,
    t: Tensor | Sequence[float],
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: None = None,
    gradient: str = "aca",
    checkpoints: int | str | None = None,
    engine: str = "eager",
    args: Sequence[Any] = (),
    params: Sequence[Tensor] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> State:
    """Solves dy/dt = func(t, y, \\*args) from y(t[0]) = y0 and returns y at the times t.

    Args:
        func: callable or nn.Module. Receives t as a 0-d tensor of the state's real dtype and device, and y like y0;
            returns the derivative, of y's shape, dtype and device. Must not change y in place.
        y0: initial state, a tensor of any shape or a tuple of tensors; float32, float64, complex64 or complex128.
        t: (T,) strictly increasing or strictly decreasing times, T ≥ 1, on any device, in whatever unit func uses. With
            ``batch="independent"`` also (batch, T), times for every sample.
        rtol, atol: relative and absolute tolerance per step, a number or a tensor that broadcasts to y0 (for a tuple
            state also a tuple of one for each). A step is accepted if the norm of
            error / (atol + rtol·max(|y_before|, |y_after|)) is at most 1. Fixed steps do not use them.
        method: "dopri5" (default) or another key of ``aca_ext.METHODS``.
        options: of adaptive steps ``first_step, min_step, max_step, max_num_steps`` (100 000), ``safety`` (0.9),
            ``ifactor`` (10), ``dfactor`` (0.2), the PID coefficients ``pcoeff`` (0), ``icoeff`` (1), ``dcoeff`` (0),
            ``step_t`` and ``jump_t`` (times to land on, and where func jumps), ``norm`` (a function of a tensor like
            the state; default RMS, for a tuple the largest of its components') and ``on_step_limit`` ("raise"; with
            "stop", ``solve`` returns what it reached in max_num_steps steps, and its ``Solution.resume`` goes on; of
            gradients "aca" and "direct"). ``step_size`` or
            ``grid_constructor(func, y0, t)`` make the steps of any method fixed; every time in t is a grid point. A
            fixed-step solve on a GPU returns what it finds, NaN included: looking would stop the host.
            ``batch="independent"``: every sample of the first dimension (of all components of a tuple) has its own
            steps and takes those that it would take alone. func is then called on the whole batch with t of shape
            (batch, 1, ..., 1), of as many dimensions as y has (as its largest component has), so that what is
            written for a number t works; ``t.flatten()`` is (batch,). Samples must not depend on one another, and one
            that has reached its end is still evaluated, there, until all have. Adaptive steps, gradients "aca" and
            "direct", without ``norm``, ``step_t`` and ``jump_t``.
        event_fn: torchdiffeq's; None alone, as there are no events here.
        gradient: how the backward pass works. "aca" (default): exact gradient of the discrete solution, from
            checkpoints of the accepted steps. "direct": the same gradient from a stored graph. "naive": also
            differentiates the search for the step size. "adjoint": the continuous adjoint, approximate.
        checkpoints: which states gradient="aca" keeps for the backward pass, which computes the same gradient, bit for
            bit, from any choice. None: that of every accepted step. An int K: at most K, chosen while the solve runs,
            besides the two of the step at hand; the others are computed again, r times at most where the steps are no
            more than C(K + r, r) (with create_graph=True, the backward pass holds the graph of all steps anyway).
            "cpu": that of every step in the host's memory, pinned where the solve runs on a GPU.
        engine: "eager" (default) calls func at every stage. "compiled" traces a whole step, and its transpose, with
            torch's compiler and runs all steps in compiled code: the same steps and gradient up to rounding, many times
            faster where func is small. Compiling takes seconds, once for each func, shape and method
            (``stats.compile_seconds``); what is compiled is used again, whatever values parameters, times and
            tolerances have. For real float32 and float64 states on the CPU and gradient="aca", every state kept; second
            derivatives come from the eager engine. func must be one that ``torch.compile(fullgraph=True)`` can trace,
            out of pointwise operations, reductions and matrix products, without random numbers, state that it changes,
            or an autograd.Function of its own. Needs torch 2.13 or newer.
        args: further arguments of func; tensors among them receive gradients.
        params: tensors that func depends on by itself. Default: func.parameters() of a module, and whatever else
            its first evaluation uses. Name them where func uses some only later.
        progress: show a bar of the time that the solve has reached (needs tqdm).
        callback: called after every trial step with an ``aca_ext.Step``: times, step size, error, counts. What it
            raises ends the solve. The steps of a solve that is watched run in Python.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: how gradient="adjoint" solves backward; by default
            as forward; adjoint_options={"norm": "seminorm"} leaves the parameters out of its error norm. The other
            gradients solve nothing backward and have no use for them.
        adjoint_params: torchdiffeq's name for ``params``.

    Returns:
        (T, \\*y0.shape), or for a tuple state a tuple of such; the first row is y0. Differentiable with respect to y0,
        args, what func depends on, and t; in "aca", "direct" and "naive" to second order and beyond.

    Raises:
        aca_ext.errors.ArgumentTypeError, ArgumentValueError: an argument is not accepted (with TimeError,
            ToleranceError, OptionError and UnknownNameError among them).
        aca_ext.errors.SlopeError: func returned something that is no derivative of the state.
        aca_ext.errors.SolveError: the end could not be reached (NonFiniteError, StepSizeError, StepLimitError).
        aca_ext.errors.ReplayError: in the backward pass, where func did not repeat its forward pass.

    Adaptive steps follow Hairer, Nørsett & Wanner, Solving ODEs I, II.4; the gradient Zhuang et al., ICML 2020.
    """
    if event_fn is not None:
        raise ArgumentValueError(
            "event_fn is given, but events are not there. Solve to given times and look for the event between them."
        )
    return solve(
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        gradient=gradient,
        checkpoints=checkpoints,
        engine=engine,
        args=args,
        params=params,
        progress=progress,
        callback=callback,
        adjoint_rtol=adjoint_rtol,
        adjoint_atol=adjoint_atol,
        adjoint_method=adjoint_method,
        adjoint_options=adjoint_options,
        adjoint_params=adjoint_params,
    ).y


@_compiled_around
def solve(
    func: Callable[..., State],
    y0: State,
    t: Tensor | Sequence[float],
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    gradient: str = "aca",
    checkpoints: int | str | None = None,
    engine: str = "eager",
    args: Sequence[Any] = (),
    params: Sequence[Tensor] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Solution:
    """``odeint`` that also returns the accepted steps and the counts: a ``Solution``. Arguments as there."""
    is_plain = params is None and adjoint_params is None and checkpoints is None and callback is None and not progress
    if is_plain and engine == "compiled" and gradient == "aca":
        solution = _solved_again(func, y0, t, rtol, atol, method, options, args)
        if solution is not None:
            return solution
    return _solve(
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        gradient=gradient,
        checkpoints=checked_policy(checkpoints),
        engine=engine,
        args=args,
        params=checked_params(_one_of(params, adjoint_params)),
        progress=progress,
        callback=callback,
        adjoint=AdjointOptions(
            rtol=rtol if adjoint_rtol is None else adjoint_rtol,
            atol=atol if adjoint_atol is None else adjoint_atol,
            method=method if adjoint_method is None else adjoint_method,
            options=_adjoint_options(options, adjoint_options),
        ),
    )


def _one_of(params: Any, adjoint_params: Any) -> Any:
    if params is not None and adjoint_params is not None:
        raise ArgumentValueError("params and adjoint_params are two names of one argument; give one of them.")
    return adjoint_params if params is None else params


def _solve(
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
    is_batch = is_independent(settings["options"])
    problem = (batch_problem_of if is_batch else problem_of)(func, y0, t, **settings)
    lookup("gradient", gradient, GRADIENTS)
    if checkpoints is not None and gradient != "aca":
        raise ArgumentValueError(
            f'checkpoints is {checkpoints!r}, but gradient={gradient!r} keeps none; leave it out or use gradient="aca".'
        )
    learns_times = isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()
    if problem.stops_at_limit and (learns_times or gradient not in ("aca", "direct")):
        raise OptionError(
            'option on_step_limit="stop" takes gradient="aca" or "direct" and times that do not require grad.'
        )
    if callback is not None and not callable(callback):
        raise ArgumentTypeError(f"callback is of type {type(callback).__name__}; give a function of an aca_ext.Step.")
    if lookup("engine", engine, ENGINES) == "compiled":
        others = {"gradient": gradient != "aca", "checkpoints": checkpoints, "progress": progress, "callback": callback,
                  "options": is_batch or problem.stops_at_limit}  # fmt: skip
        for name, is_given in others.items():
            if is_given:
                raise CompileError(
                    f'engine="compiled" does not take what {name} asks for'
                    f'{f" ({gradient!r})" if name == "gradient" else ""}. Use engine="eager" for it.'
                )
        task_of = partial(_eager_task, problem, params, adjoint)
        if isinstance(t, Tensor) and learns_times:
            result = _with_time_gradient(task_of(), t=t, method_of_gradient=_compiled)
        else:
            result = _compiled_engine()(problem, params, task_of)
        times = t if isinstance(t, Tensor) else torch.tensor(problem.times, dtype=torch.float64)
        return Solution(times, problem.packing.unpack_rows(result.ys), result.record.bounds(), result.stats)
    method: Callable[[Task], Result] = GRADIENTS[gradient]
    if is_batch:
        method = partial(independent_gradients.solve, gradient=gradient)
    if not torch.is_grad_enabled():
        method = independent_gradients.solve_without_graph if is_batch else _without_graph
    elif isinstance(t, Tensor) and learns_times:
        method = partial(_with_time_gradient, t=t, method_of_gradient=method)
    with progress_bar(problem.length) if progress else nullcontext() as show:
        on_step = _both(callback, show)
        if on_step is not None:
            problem = replace(problem, on_step=on_step)
        if resumed is not None:
            jumps = problem.jumps | _jump_at(resumed.t, settings["options"])
            problem = replace(problem, resumed=resumed, jumps=jumps)
        task = Task(problem, _field(problem), params, adjoint, checkpoints)
        if torch.is_grad_enabled():
            task.field.prepare_replay()
        try:
            result = method(task)
        except TypeError:
            task.field.check_signature()
            raise

    times = t if isinstance(t, Tensor) else torch.tensor(problem.times, dtype=torch.float64)
    ys = problem.packing.unpack_rows(result.ys)
    solution = Solution(times, ys, result.record.bounds(), result.stats)
    if problem.stops_at_limit:
        assert isinstance(result.record, StepRecord)
        again = partial(_resumed, func, gradient=gradient, checkpoints=checkpoints, params=params, progress=progress,
                        callback=callback, adjoint=adjoint, **settings)  # fmt: skip
        return _stopped(solution, problem, result.record, again)
    return solution


def _solved_again(
    func: Callable[..., State],
    y0: State,
    t: Tensor | Sequence[float],
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: Mapping[str, Any] | None,
    args: Sequence[Any],
) -> Solution | None:
    """What ``_solve`` returns for engine="compiled" without the rest of its checks, where they were made before."""
    refuse_transforms("y0", y0)
    refuse_transforms("t", t)
    problem = known_problem(func, y0, t, rtol, atol, method, options, args)
    if problem is None or not isinstance(t, Tensor) or (t.requires_grad and torch.is_grad_enabled()):
        return None
    result = _compiled_engine()(problem, None, partial(_eager_task, problem, None, _NO_ADJOINT))
    assert isinstance(result.stats, Stats)
    return LazySolution.of(t, result.ys, result.record, result.stats)


_NO_ADJOINT = AdjointOptions(rtol=0.0, atol=0.0, method=None, options={})  # of gradients that solve nothing backward


def _eager_task(problem: Problem, params: Sequence[Tensor] | None, adjoint: AdjointOptions) -> Task:
    return Task(problem, _field(problem), params, adjoint, None)


@cache
def _compiled_engine() -> Callable[..., Result]:
    from aca_ext.compiled.engine import solve  # brings in the compiler, which takes seconds

    return solve


def _compiled(task: Task) -> Result:
    result = _compiled_engine()(task.problem, task.params, lambda: task)
    result.stats.n_f_evals += task.field.n_evals
    return result


def _without_graph(task: Task) -> Result:
    return solve_without_graph(task, task.first_slope(task.problem.y0.detach()))


def _jump_at(t: float, options: Mapping[str, Any]) -> frozenset[float]:
    """The time where a solve goes on, if func jumps there."""
    jumps = torch.as_tensor(() if options.get("jump_t") is None else options["jump_t"], dtype=torch.float64)
    return frozenset({t} & set(jumps.reshape(-1).tolist()))


def _both(one: Callback | None, other: Callback | None) -> Callback | None:
    if one is None or other is None:
        return one or other

    def both(step: Step) -> None:
        one(step)
        other(step)

    return both


def _stopped(solution: Solution, problem: Problem, record: StepRecord, again: Callable[..., Solution]) -> Solution:
    """The solution of a solve that may go on: without the state where it stopped among its outputs."""
    end = record.end
    if end is None:  # one time: nothing was solved
        return solution
    is_tuple = isinstance(solution.y, tuple)
    parts = solution.y if isinstance(solution.y, tuple) else (solution.y,)
    n_reached = len(parts[0]) - (not end.is_complete and len(record.steps) > 0)
    y_reached = tuple(part[-1] for part in parts)
    rows = tuple(part[:n_reached] for part in parts)
    continuation = Continuation(end, y_reached if is_tuple else y_reached[0], problem.times[n_reached:], again)
    return replace(
        solution,
        t=solution.t[:n_reached],
        y=rows if is_tuple else rows[0],
        is_complete=end.is_complete,
        continuation=continuation,
    )


def _resumed(
    func: Callable[..., State],
    y: State,
    t: Tensor,
    state: SolverState,
    max_num_steps: int | None,
    *,
    options: Mapping[str, Any],
    **settings: Any,
) -> Solution:
    limit = {} if max_num_steps is None else {"max_num_steps": max_num_steps}
    return _solve(func, y, t, state, options={**options, **limit}, **settings)


def _field(problem: Problem) -> VectorField:
    """func as the solver calls it."""
    ops = TorchOperations(problem.y0.detach(), problem.tolerance)
    if isinstance(problem, BatchProblem):
        return RowField(problem.func, problem.args, problem.packing, ops)
    return VectorField(problem.func, problem.args, problem.packing, ops)


def _with_time_gradient(task: Task, *, t: Tensor, method_of_gradient: Callable[[Task], Result]) -> Result:
    """The solve with a graph to every element of t, right to second order.

    A step of the midpoint rule, of a length that is zero and has the graph of t, moves each output from its time to its
    time, and the start back: it leaves the solution as it is and gives it the derivatives of moving along it.
    """
    problem, field = task.problem, task.field
    like = problem.y0
    times = problem.spread_times(t)
    now = times.detach()

    def move(time: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        with field.aside():
            k = field(time, field.admit(y))
            return y + delta * field(time + delta / 2, field.admit(y + delta / 2 * k))

    start = move(times[0], like, now[0] - times[0])
    result = method_of_gradient(replace(task, problem=replace(problem, y0=start)))
    solved = field.n_evals
    moved = [move(now[i], result.ys[i], times[i] - now[i]) for i in range(1, len(times))]
    result.stats.n_f_evals += field.n_evals - solved
    return replace(result, ys=stack_rows([like, *moved], like))


def _adjoint_options(options: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is not None:
        return dict(given)
    given_forward = options if isinstance(options, Mapping) else {}  # what it is otherwise is for problem_of to say
    # The norm and the grid of the forward solve speak of its state and its times, not of the augmented ones.
    return {name: value for name, value in given_forward.items() if name not in ("norm", "grid_constructor")}
