"""A solve with events: one smooth segment after another, each from a reset to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.arguments import Arguments
from aca_ext.engines.batch_event_segments import solve_batch_with_events, to_batch_event
from aca_ext.engines.dispatch import run
from aca_ext.engines.event_resets import (
    LAST_BIT,
    MAX_RESETS,
    NO_SIGN,
    Since,
    after_reset,
    in_absolute_time,
    moved,
    options_since,
)
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, EventError, OptionError, SolveError, TimeError
from aca_ext.problem.batch import is_independent
from aca_ext.problem.events import At, Event
from aca_ext.problem.state import State
from aca_ext.problem.times import times_of
from aca_ext.problem.transforms import is_transformed
from aca_ext.problem.trees import map_leaves
from aca_ext.solution import EventRecord, Solution, joined

_TIMES = ("step_t", "jump_t")


def solve_with_events(arguments: Arguments) -> Solution:
    """The solution, started anew at every reset.

    A segment after a reset is solved in the time since the reset, and the time of the reset is an argument of func, so
    that it has a gradient. Requested times have moved against it; for their part of this gradient, see
    ``gradients.requested_times``.

    Raises:
        EventError: resets follow one another without end, or a reset returned something that is no state.
        Those of ``run``.
    """
    if is_transformed():
        return run(arguments)  # raises: transforms exclude events
    events, given = _checked(arguments), arguments.t
    if is_independent(arguments.options):
        return solve_batch_with_events(replace(arguments, events=events))
    times = times_of(given)
    # Times of events are float64 between the parts, whatever dtype the given times have.
    if isinstance(given, Tensor):
        precise = given.cpu().double()
    else:
        precise = torch.tensor(times, dtype=torch.float64, device="cpu")
    arguments = replace(arguments, events=events, t=precise)
    solution = run(arguments)
    parts, start = [solution], torch.zeros((), dtype=torch.float64, device="cpu")
    while isinstance(index := solution.ended_by, int) and not events[index].terminal:
        time = solution.events[index].t[-1]
        _check_progress(index, len(parts), time.item(), start.item(), times)
        n_left = len(times) - sum(len(part.t) - 1 for part in parts) - 1
        if n_left == 0:
            solution = replace(solution, ended_by=None)
            parts[-1] = solution
            break
        together = [i for i, record in enumerate(solution.events) if len(record.t) and record.t[-1] == time]
        y, start = map_leaves(lambda part: part[-1], solution.events[index].y), time
        for i in (i for i in together if events[i].reset is not None):
            y = after_reset(events[i], i, time, y, arguments.y0)
        try:
            solution = _in_absolute_time(run(_segment(arguments, events, start, y, n_left)), start)
        except SolveError as error:
            raise in_absolute_time(error, start.item()) from None
        parts.append(solution)
    return joined(parts, given if isinstance(given, Tensor) else precise)


def _checked(arguments: Arguments) -> tuple[Event, ...]:
    events, options = arguments.events, arguments.options
    if isinstance(events, Event) or not isinstance(events, Sequence):
        raise ArgumentTypeError(f"events is of type {type(events).__name__}; give a list of aca_ext.Event.")
    for i, event in enumerate(events):
        if not isinstance(event, Event):
            raise ArgumentTypeError(f"events[{i}] is of type {type(event).__name__}; give an aca_ext.Event(fn).")
    for name in ("grid_constructor", "n_steps"):
        if options is not None and options.get(name) is not None and any(e.reset for e in events):
            raise OptionError(f"option {name} makes one grid, but a reset starts a new one. Use step_size.")
    return tuple(events)


def _check_progress(index: int, n: int, time: float, start: float, times: Sequence[float]) -> None:
    """Raises EventError for chattering: infinitely many resets in a finite time (Zeno's paradox)."""
    scale = max(abs(time), abs(times[-1] - times[0]) * LAST_BIT)
    is_stuck = n > 1 and abs(time - start) <= 4 * LAST_BIT * scale
    if is_stuck or n > MAX_RESETS:
        raise EventError(
            f"event {index} chatters: {n} resets up to t={time:.17g}, the last {abs(time - start):.3g} after the one "
            "before it. Such a solution does not go on in time. Let the reset move the state away from the surface, or "
            "end the solve by a terminal event when the resets follow too fast."
        )


def _segment(arguments: Arguments, events: tuple[Event, ...], start: Tensor, y: State, n_left: int) -> Arguments:
    """The solve from a reset at ``start`` on, in the time since then."""
    times = arguments.t
    assert isinstance(times, Tensor)
    sign = 1.0 if times[-1] > times[0] else -1.0
    since = times[-n_left:] - start
    # A requested time may be that of the event up to rounding; then it lies just behind it.
    least = (
        sign * LAST_BIT * max(1.0, abs(start.item())) * torch.arange(1, n_left + 1, dtype=torch.float64, device="cpu")
    )
    since = torch.where(sign * since < sign * least, least, since)
    options = options_since(arguments.options)
    for name in _TIMES:
        if options.get(name) is not None:
            options[name] = torch.as_tensor(options[name], dtype=torch.float64, device="cpu") - start.detach()
    callback = arguments.callback
    return replace(
        arguments,
        func=Since(arguments.func, _jumps(arguments)),
        y0=y,
        t=torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), since]),
        args=(start, *arguments.args),
        events=tuple(replace(e, fn=At(e.fn, start), reset=None if e.reset is None else e.reset) for e in events),
        options=options or None,
        callback=None if callback is None else lambda step: callback(moved(step, start.item())),
    )


def _jumps(arguments: Arguments) -> Tensor | None:
    """The times at which func jumps: those of option jump_t, or with option perturb the requested ones."""
    options, times = arguments.options or {}, arguments.t
    if options.get("jump_t") is not None:
        return torch.as_tensor(options["jump_t"], dtype=torch.float64, device="cpu").detach().reshape(-1)
    assert isinstance(times, Tensor)
    return times.detach() if options.get("perturb") else None


def _in_absolute_time(solution: Solution, start: Tensor) -> Solution:
    events = tuple(EventRecord(record.t + start, record.y) for record in solution.events)
    return replace(solution, steps=solution.steps + start.item(), events=events)  # type: ignore[operator]


def to_event(arguments: Arguments, event_fn: Callable[[Tensor, Any], Tensor]) -> Any:
    """``odeint`` with torchdiffeq's ``event_fn``: the time of the first event, and the states at the start and there.

    Raises:
        EventError: there is no event before the last of the times.
        Those of ``solve_with_events``.
    """
    if arguments.events:
        raise ArgumentValueError("event_fn and events are given; give one of them.")
    if is_independent(arguments.options):
        return to_batch_event(arguments, event_fn)
    t = arguments.t
    first, *others = times_of(t)
    start = t[:1] if isinstance(t, Tensor) else torch.tensor([first], dtype=torch.float64, device="cpu")
    if not others:
        raise TimeError("event_fn needs a second time in t, which gives the direction and the end of the search.")
    until = torch.cat([start, torch.full_like(start, others[-1], requires_grad=False)])
    solution = solve_with_events(replace(arguments, t=until, events=(Event(event_fn, terminal=True),)))
    if solution.ended_by is None:
        raise EventError(f"event_fn changed no sign up to t={others[-1]:.17g}. {NO_SIGN}")
    (event,) = solution.events
    return event.t[0], map_leaves(lambda one, other: torch.cat([one[:1], other]), solution.y, event.y)
