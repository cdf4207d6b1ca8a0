"""Resets at events, and functions of the time since a reset; for samples that share their steps, and for others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError, EventError, SolveError
from aca_ext.problem.events import Event
from aca_ext.problem.state import Packing, State
from aca_ext.problem.trees import leaves_of, map_leaves
from aca_ext.progress import Step

NO_SIGN = (
    "Give a later last time, or return a number that changes its sign at the event: a condition such as y < 0 does "
    "not, and neither does a zero at the start."
)
MAX_RESETS = 10_000
LAST_BIT = 2.0**-52


def after_reset(event: Event, index: int, time: Tensor, y: State, y0: State) -> State:
    """The state from which the solve goes on after an event."""
    assert event.reset is not None
    copy = map_leaves(torch.clone, y)  # the reset may write into it
    new = event.reset(time.to(leaves_of(y0)[0].real), copy)
    try:
        found = Packing.of(new)
    except (ArgumentTypeError, ArgumentValueError) as error:
        raise EventError(f"the reset of event {index} returned something that is no state: {error}") from None
    expected = Packing.of(y0)
    is_like_state = found.is_tuple == expected.is_tuple and (found.tree is None) == (expected.tree is None)
    if is_like_state and found.is_tuple:
        parts = expected.components(new, f"the result of the reset of event {index}", EventError)
        new = expected.as_given(parts)
        found = Packing.of(new)
    if not is_like_state or (found.shapes, found.is_complex) != (expected.shapes, expected.is_complex):
        raise EventError(
            f"the reset of event {index} returned {found.describe()}; the state has {expected.describe()}."
        )
    # A network under autocast returns a lower precision; the solve goes on in that of the state.
    like = leaves_of(y0)[0]
    return map_leaves(lambda part: part.to(like), new)


def in_absolute_time(error: SolveError, start: float) -> SolveError:
    """The error of a segment that began with a reset at ``start``, from which the segment's times count."""
    error.t += start
    error.args = (f"{error} The times in this message count from the reset at t={start:.17g}.", *error.args[1:])
    return error


class Since:
    """func as a function of the time since ``start``, its first further argument; of each sample or of all.

    Args:
        jumps: (n,) float64 on the CPU, times at which func jumps. Steps end there, and evaluate func beside them.
    """

    wraps_func = True  # what func holds is found through it

    def __init__(self, func: Callable[..., State], jumps: Tensor | None = None) -> None:
        self.func, self.jumps = func, jumps

    def __call__(self, t: Tensor, y: Any, start: Tensor, *args: Any) -> State:
        time = start.to(t).reshape(t.shape) + t
        if self.jumps is not None:
            time = time + _towards_sides(time.detach(), t.detach(), start.detach(), self.jumps)
        return self.func(time, y, *args)


def options_since(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a segment after a reset: their functions get the time as func does, and not the start."""
    found = dict(options or {})
    jacobian, preconditioner = found.get("jacobian"), found.get("preconditioner")
    if callable(jacobian):
        found["jacobian"] = Since(jacobian)
    if callable(preconditioner):

        def since(t: Tensor, y: Any, c: Any, start: Tensor, *args: Any) -> Any:
            return preconditioner(start.to(t).reshape(t.shape) + t, y, c, *args)

        found["preconditioner"] = since
    return found


def _towards_sides(time: Tensor, since: Tensor, start: Tensor, jumps: Tensor) -> Tensor:
    """The change of ``time`` that puts it on that side of a jump where ``since`` lies; the sum's rounding hides it."""
    at = jumps.to(time)
    side = (since - (jumps - start).to(since)).sign()
    beside = torch.where(side == 0, at, torch.nextafter(at, side * math.inf))
    rounding = 2 * torch.finfo(time.dtype).eps * (at.abs() + since.abs() + start.to(time).abs())
    return torch.where((time - at).abs() <= rounding, beside - time, 0.0).sum()


def moved(step: Step, start: Any) -> Step:
    return step._replace(t=step.t + start, t_next=step.t_next + start)
