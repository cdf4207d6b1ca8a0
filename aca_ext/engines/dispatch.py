"""Dispatch of a solve: validates the arguments, runs an engine and makes the ``Solution``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines import ENGINES
from aca_ext.engines.arguments import Arguments
from aca_ext.engines.base import Engine, Request
from aca_ext.engines.default import get_default_engine
from aca_ext.engines.dense_solves import check_dense, dense_problem, dense_solution
from aca_ext.engines.ensemble.engine import solve_as_before
from aca_ext.engines.recorded import solve_recorded
from aca_ext.engines.transformed import solve_transformed
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, OptionError
from aca_ext.gradients import GRADIENTS
from aca_ext.gradients.at_batch_events import at_batch_event
from aca_ext.gradients.at_events import at_event
from aca_ext.gradients.base import AdjointOptions, Result
from aca_ext.gradients.dependencies import checked_params
from aca_ext.problem.arguments import lookup
from aca_ext.problem.batch import BatchProblem, batch_problem_of, is_independent
from aca_ext.problem.options import DEFAULT_MAX_NUM_STEPS, max_num_steps_of
from aca_ext.problem.problem import Problem
from aca_ext.problem.recorders import recorder
from aca_ext.problem.resumption import SolverState
from aca_ext.problem.signature import refuse_swapped
from aca_ext.problem.state import State, tensors_in
from aca_ext.problem.times import as_float64, warn_where_time_stands_still
from aca_ext.problem.transforms import is_transformed, refuse_transforms
from aca_ext.problem.validation import known_problem, problem_of
from aca_ext.solution import LazySolution, Solution, batch_event_record, checked_plan, event_record, stopped
from aca_ext.solver.batch_record import BatchRecord
from aca_ext.solver.checkpoints import StepRecord, checked_policy
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.solver.step_plan import StepPlan


def run(arguments: Arguments, resumed: SolverState | None = None, *, may_stop: bool = False) -> Solution:
    """Runs a solve, or the part of one that continues from ``resumed``; a callback ends it if it ``may_stop``."""
    if is_transformed():
        return solve_transformed(arguments)
    policy, params = checked_policy(arguments.checkpoints), checked_params(_named_params(arguments))
    adjoint, y0, t = _adjoint_options(arguments), arguments.y0, arguments.t
    for what, x in (("y0", y0), ("t", t), ("args", arguments.args)):
        for part in (x,) if isinstance(x, Tensor) else tensors_in(x):
            refuse_transforms(what, part)
    recording = recorder()
    if recording is not None:
        _check_recorded(recording, arguments)
        return solve_recorded(recording, arguments)
    problem = _problem_of(arguments, resumed)
    learnt = t if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled() else None
    if may_stop and arguments.callback is not None:
        problem = replace(problem, callback_stops=_can_stop(arguments, learnt))
    keeps_ends = arguments.dense or arguments.output_fn is not None
    if keeps_ends:
        problem = dense_problem(arguments, problem)
    request = Request(
        problem, arguments.gradient, learnt, params, policy, arguments.progress, arguments.callback, adjoint, keeps_ends
    )
    _check_together(request)
    engine = engine_of(arguments)
    if keeps_ends:
        engine = "eager" if engine == "auto" else engine
        check_dense(request, engine)
    if problem.y0.dtype != torch.float64 and resumed is None and len(problem.times) > 1:
        warn_where_time_stands_still(*problem.span, len(problem.grid or problem.times) - 1, problem.y0.dtype)
    result = _result(ENGINES[lookup("engine", engine, ENGINES)], request)
    return _solution(arguments, request, result)


def _can_stop(arguments: Arguments, learnt: Tensor | None) -> bool:
    is_dense = arguments.dense or arguments.output_fn is not None
    is_simple = not (arguments.events or is_dense or is_independent(arguments.options)) and learnt is None
    return is_simple and arguments.gradient in ("aca", "direct")


def _named_params(arguments: Arguments) -> Any:
    params, adjoint_params = arguments.params, arguments.adjoint_params
    if params is not None and adjoint_params is not None:
        raise ArgumentValueError("params and adjoint_params are two names of one argument. Give only one of them.")
    return adjoint_params if params is None else params


def _adjoint_options(given: Arguments) -> AdjointOptions:
    """Settings of the backward solve, by default those of the forward solve."""
    if given.adjoint_options is not None:
        options = dict(given.adjoint_options)
    else:
        of_forward = given.options if isinstance(given.options, Mapping) else {}  # problem_of raises for other types
        # The forward norm and grid do not fit the augmented state and the reversed times.
        options = {name: value for name, value in of_forward.items() if name not in ("norm", "grid_constructor")}
        if given.gradient == "adjoint" and options.get("n_steps") is not None:
            raise OptionError(
                'gradient="adjoint" solves backward from each requested time to the one before, where option n_steps '
                "does not say how many steps to take. Give step_size, or adjoint_options."
            )
    return AdjointOptions(
        rtol=given.rtol if given.adjoint_rtol is None else given.adjoint_rtol,
        atol=given.atol if given.adjoint_atol is None else given.adjoint_atol,
        method=given.method if given.adjoint_method is None else given.adjoint_method,
        options=options,
    )


def _result(engine: Engine, request: Request) -> Result:
    obstacle = engine.obstacle(request)
    if obstacle is not None:
        raise engine.error(obstacle)
    return engine.solve(request)


def _problem_of(arguments: Arguments, resumed: SolverState | None) -> Problem:
    """The problem, with ``resumed`` as its start if an earlier part of the solve stopped there."""
    make: Callable[..., Problem] = batch_problem_of if is_independent(arguments.options) else problem_of
    problem = make(arguments)
    if arguments.events:
        return _with_events(problem, arguments)
    if resumed is None:
        return problem
    return replace(problem, resumed=resumed, jumps=problem.jumps | _jump_at(resumed.t, arguments.options or {}))


def _with_events(problem: Problem, arguments: Arguments) -> Problem:
    """The problem with its events and with a method that has dense output, on which events are located.

    Raises:
        ArgumentValueError: another argument excludes events.
    """
    obstacles = {
        f'gradient="{arguments.gradient}"': arguments.gradient not in ("aca", "direct", "naive"),
        'option on_failure="nan"': isinstance(problem, BatchProblem) and problem.nan_on_failure,
        'option on_step_limit="stop"': problem.stops_at_limit,
    }
    for what, is_given in obstacles.items():
        if is_given:
            raise ArgumentValueError(f"events are given, but {what} does not support them. Leave one of the two out.")
    tableau = problem.tableau if problem.tableau.dense is not None else problem.tableau.with_hermite_output()
    return replace(problem, events=tuple(arguments.events), tableau=tableau)


def _solution(arguments: Arguments, request: Request, result: Result) -> Solution:
    """The ``Solution`` for the user, from the result of an engine."""
    problem, t = request.problem, arguments.t
    if request.keeps_ends:
        return dense_solution(arguments, problem, result)
    times = t if isinstance(t, Tensor) else torch.from_numpy(as_float64(t))
    y, record = problem.packing.unpack_rows(result.ys), result.record
    if problem.events and isinstance(problem, BatchProblem):
        return _batch_solution_with_events(problem, times, result)
    if problem.events:
        assert isinstance(record, StepRecord)
        return _solution_with_events(problem, times, record, result)
    if not isinstance(record, StepRecord) or record.end is None:
        return LazySolution.of(times, y, record, result.stats, problem)
    solution = Solution(times, y, record.bounds(), result.stats, plan=_plan(problem, record, result.stats))
    # Without state and times, whose memory this would hold; with params of the request, as given ones may be iterators.
    kept = replace(arguments, y0=(), t=(), params=request.params, adjoint_params=None)
    return stopped(solution, problem, record, partial(_resumed, kept))


def _solution_with_events(problem: Problem, times: Tensor, record: StepRecord, result: Result) -> Solution:
    packing, ys = problem.packing, result.ys
    n_reached = len(ys) - len(record.events)
    found = [(one.event, *at_event(problem.events[one.event], one, ys, packing)) for one in record.events]
    records = tuple(
        event_record([(t, y) for event, t, y in found if event == i], ys, packing) for i in range(len(problem.events))
    )
    y, is_complete = packing.unpack_rows(ys[:n_reached]), n_reached == len(times)
    solution = Solution(times[:n_reached], y, record.bounds(), result.stats, is_complete)
    plan = _plan(problem, record, result.stats).reaching(n_reached)
    return replace(solution, events=records, ended_by=record.ended_by, plan=plan)


def _plan(problem: Problem, record: Any, stats: Stats | BatchStats) -> StepPlan:
    if problem.events:
        record = StepRecord(record.steps, formulas=record.formulas)  # without the events, whose tensors would stay
    return checked_plan(StepPlan(problem.tableau, record, problem.known_times, problem.jumps), stats)


def _batch_solution_with_events(problem: BatchProblem, times: Tensor, result: Result) -> Solution:
    record, packing, ys = result.record, problem.packing, result.ys
    assert isinstance(record, BatchRecord)
    n_times = problem.times_of_rows.shape[1]
    records = tuple(
        batch_event_record(*at_batch_event(i, problem, record, ys), packing, event.terminal)
        for i, event in enumerate(problem.events)
    )
    is_complete = not (record.ended_by >= 0).any()
    y, ended_by = packing.unpack_rows(ys[:n_times]), torch.from_numpy(record.ended_by)
    solution = Solution(times, y, record.bounds(), result.stats, is_complete)
    return replace(solution, events=records, ended_by=ended_by)


def _check_recorded(recording: str, arguments: Arguments) -> None:
    """Raises if an argument needs Python code or data-dependent steps, which a recording cannot contain."""
    lookup("gradient", arguments.gradient, GRADIENTS)
    lookup("engine", engine_of(arguments), ENGINES)
    is_batch = is_independent(arguments.options)
    what = {
        "callback": arguments.callback is not None,
        "progress": arguments.progress,
        'option batch="independent"': is_batch,
        "events": len(arguments.events) > 0,
        "dense": arguments.dense,
        "output_fn": arguments.output_fn is not None,
    }
    for name, is_given in what.items():
        if is_given:
            raise ArgumentValueError(f"{name} is given, but {recording} cannot record a solve with it. Leave it out.")


def engine_of(arguments: Arguments) -> str:
    """The name of the engine, by default that of ``set_default_engine``."""
    return get_default_engine() if arguments.engine is None else arguments.engine


def run_again(given: Arguments) -> tuple[Problem, Result] | None:
    """Runs a solve in compiled code without checks that an earlier solve made; None if there was no such solve."""
    engine = engine_of(given)
    if engine != "compiled" and engine != "auto":
        return None
    if given.gradient != "aca" or given.checkpoints is not None or given.params is not None or is_transformed():
        return None
    if (
        given.events
        or given.dense
        or given.output_fn is not None
        or given.adjoint_params is not None
        or given.callback is not None
        or given.progress
        or recorder() is not None
    ):
        return None
    problem, t = known_problem(given), given.t
    if problem is None or not isinstance(t, Tensor) or (t.requires_grad and torch.is_grad_enabled()):
        return None
    if given.args:
        for x in tensors_in(given.args):
            refuse_transforms("args", x)
    if engine == "compiled" and problem.settings.has_program:
        return problem, solve_as_before(Request(problem))  # it checks a func before it traces it
    refuse_swapped(given.func)
    return problem, _result(ENGINES[engine], Request(problem))


def solution_again(given: Arguments, problem: Problem, result: Result) -> Solution:
    """The ``Solution`` of ``run_again``."""
    return LazySolution.of(given.t, result.ys, result.record, result.stats, problem)  # type: ignore[arg-type]


def _resumed(
    arguments: Arguments, y: State, t: Tensor, state: SolverState, *, max_num_steps: int | None, is_beyond: bool
) -> Solution:
    """Continues a solve from where it stopped, or beyond its end.

    Raises:
        ArgumentValueError: its steps are fixed, so that others would follow.
    """
    options = arguments.options or {}
    if math.isnan(state.h):
        raise ArgumentValueError(
            "a solve with fixed steps cannot be resumed on its grid. Solve again, from y_reached at t_reached."
        )
    limit = options.get("max_num_steps") if max_num_steps is None else max_num_steps
    if is_beyond and max_num_steps is None:
        limit = max(max_num_steps_of(limit), DEFAULT_MAX_NUM_STEPS)
    return run(replace(arguments, y0=y, t=t, options={**options, "max_num_steps": limit}), state, may_stop=True)


def _jump_at(t: float, options: Mapping[str, Any]) -> frozenset[float]:
    """``{t}`` if ``jump_t`` contains the time t at which a solve continues, else the empty set."""
    given = () if options.get("jump_t") is None else options["jump_t"]
    jumps = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    return frozenset({t} & set(jumps.reshape(-1).tolist()))


def _check_together(request: Request) -> None:
    """Validates arguments that depend on one another."""
    gradient, checkpoints, callback = request.gradient, request.checkpoints, request.callback
    lookup("gradient", gradient, GRADIENTS)
    if checkpoints is not None and gradient != "aca":
        raise ArgumentValueError(
            f'checkpoints is {checkpoints!r}, but gradient={gradient!r} keeps none. Leave it out or use gradient="aca".'
        )
    if request.problem.stops_at_limit and (request.learnt is not None or gradient not in ("aca", "direct")):
        raise OptionError(
            f'gradient is {gradient!r}; option on_step_limit="stop" needs gradient="aca" or "direct", and times that '
            "do not require grad. Change these, or leave the option out."
        )
    if isinstance(request.problem, BatchProblem) and request.problem.nan_on_failure and request.learnt is not None:
        raise OptionError('option on_failure="nan" takes times that do not require grad.')
    if callback is not None and not callable(callback):
        raise ArgumentTypeError(f"callback is of type {type(callback).__name__}; give a function of an aca_ext.Step.")
