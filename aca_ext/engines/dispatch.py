"""A solve from its arguments to its ``Solution``: the arguments checked together, and an engine chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines import ENGINES
from aca_ext.engines.base import Engine, Request
from aca_ext.engines.recorded import solve_recorded
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, OptionError
from aca_ext.gradients import GRADIENTS
from aca_ext.gradients.base import AdjointOptions, Result
from aca_ext.problem.arguments import lookup
from aca_ext.problem.batch import batch_problem_of, is_independent
from aca_ext.problem.options import DEFAULT_MAX_NUM_STEPS, max_num_steps_of
from aca_ext.problem.problem import Problem, known_problem, problem_of
from aca_ext.problem.recorders import recorder
from aca_ext.problem.resumption import SolverState
from aca_ext.problem.state import State
from aca_ext.problem.times import warn_where_time_stands_still
from aca_ext.problem.transforms import refuse_transforms
from aca_ext.progress import Callback
from aca_ext.solution import LazySolution, Solution, stopped
from aca_ext.solver.checkpoints import Policy, StepRecord


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
    problem = _problem_of(func, y0, t, resumed, **settings)
    learnt = t if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled() else None
    request = Request(problem, gradient, learnt, params, checkpoints, progress, callback, adjoint)
    _check_together(request)
    if problem.y0.dtype != torch.float64 and resumed is None and len(problem.times) > 1:
        warn_where_time_stands_still(*problem.span, len(problem.grid or problem.times) - 1, problem.y0.dtype)
    result = _result(ENGINES[lookup("engine", engine, ENGINES)], request)
    times = t if isinstance(t, Tensor) else torch.tensor(problem.times, dtype=torch.float64, device="cpu")
    again = partial(_resumed, func, gradient=gradient, checkpoints=checkpoints, params=params, progress=progress,
                    callback=callback, adjoint=adjoint, **settings)  # fmt: skip
    return _solution(times, result, problem, again)


def _result(engine: Engine, request: Request) -> Result:
    obstacle = engine.obstacle(request)
    if obstacle is not None:
        raise engine.error(obstacle)
    return engine.solve(request)


def _problem_of(func: Callable[..., State], y0: State, t: Any, resumed: SolverState | None, **settings: Any) -> Problem:
    """The problem, from its start or from where another solve stopped."""
    options = settings["options"]
    problem: Problem = (batch_problem_of if is_independent(options) else problem_of)(func, y0, t, **settings)
    if resumed is None:
        return problem
    return replace(problem, resumed=resumed, jumps=problem.jumps | _jump_at(resumed.t, options))


def _solution(times: Tensor, result: Result, problem: Problem, again: Callable[..., Solution]) -> Solution:
    """The solution as its caller sees it; ``again`` makes the rest of one that stopped."""
    y, record = problem.packing.unpack_rows(result.ys), result.record
    if result.is_on_device:
        return LazySolution.of(times, y, record, result.stats)
    solution = Solution(times, y, record.bounds(), result.stats)
    if not problem.stops_at_limit:
        return solution
    assert isinstance(record, StepRecord)
    return stopped(solution, problem, record, again)


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
    result = _result(ENGINES["compiled"], Request(problem))
    return LazySolution.of(t, result.ys, result.record, result.stats)


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


def _check_together(request: Request) -> None:
    """Arguments that depend on one another."""
    gradient, checkpoints, callback = request.gradient, request.checkpoints, request.callback
    lookup("gradient", gradient, GRADIENTS)
    if checkpoints is not None and gradient != "aca":
        raise ArgumentValueError(
            f'checkpoints is {checkpoints!r}, but gradient={gradient!r} keeps none; leave it out or use gradient="aca".'
        )
    if request.problem.stops_at_limit and (request.learnt is not None or gradient not in ("aca", "direct")):
        raise OptionError(
            'option on_step_limit="stop" takes gradient="aca" or "direct" and times that do not require grad.'
        )
    if callback is not None and not callable(callback):
        raise ArgumentTypeError(f"callback is of type {type(callback).__name__}; give a function of an aca_ext.Step.")
