"""``Event``: a condition on time and state that a solve locates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.problem.state import State


@dataclass(frozen=True)
class Event:
    """A condition that a solve locates: a sign change of a function of time and state.

    Signs are compared at the ends of accepted steps. Two sign changes within one step therefore remain undetected; a
    small ``max_step`` avoids that. A zero without a sign change is no event. A solve that starts at a zero waits for
    the next sign change.

    Attributes:
        fn: function (t, y) with t a 0-d tensor and y like y0. Returns a real tensor of any shape, continuous in t and y
            between two events. The event occurs at a sign change of any element. With independent samples, fn receives
            t and y of the whole batch as func does, and returns a tensor whose first dimension is the batch, and whose
            entries depend on their own sample alone.
        direction: 1 for changes from negative to positive, -1 for the opposite, 0 for both; along the direction of the
            solve.
        terminal: True ends the solve at the first occurrence.
        reset: function (t, y) called at every occurrence. The solve continues from the state that it returns, which is
            like y0. Not together with ``terminal``. With independent samples it is called on the whole batch, with t of
            shape (batch, 1, ..., 1), whenever some samples have occurrences; of its result only their rows count. A
            reset that carries the state across the zero of another event's function is no occurrence of that event.

    Raises:
        ArgumentTypeError: fn or reset is not callable, or terminal is no bool.
        ArgumentValueError: direction is not -1, 0 or 1, or terminal and reset are both given.
    """

    fn: Callable[[Tensor, Any], Tensor]
    direction: int = 0
    terminal: bool = False
    reset: Callable[[Tensor, Any], State] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ArgumentTypeError(f"Event.fn is of type {type(self.fn).__name__}; give a function of (t, y).")
        if self.direction not in (-1, 0, 1):
            raise ArgumentValueError(f"Event.direction is {self.direction!r}; give -1, 0 or 1.")
        if not isinstance(self.terminal, bool):
            raise ArgumentTypeError(f"Event.terminal is {self.terminal!r}; give True or False.")
        if self.reset is not None and not callable(self.reset):
            raise ArgumentTypeError(f"Event.reset is of type {type(self.reset).__name__}; give a function of (t, y).")
        if self.terminal and self.reset is not None:
            raise ArgumentValueError(
                "the Event is terminal, which ends the solve, and has a reset, which continues it; give only one."
            )

    @property
    def ends_segment(self) -> bool:
        """Tells whether an occurrence ends the smooth part of the solution: the event is terminal or has a reset."""
        return self.terminal or self.reset is not None


class At:
    """An event function as a function of the time since ``start``, (1,) or one for each sample."""

    def __init__(self, fn: Callable[[Tensor, Any], Tensor], start: Tensor) -> None:
        self.fn, self.start = fn, start

    def __call__(self, t: Tensor, y: Any) -> Tensor:
        return self.fn(self.time(t), y)

    def time(self, since: Tensor) -> Tensor:
        return self.start.to(since).reshape(since.shape) + since


def time_of(event: Event, t: Tensor) -> Tensor:
    """The time that the user's event function is given at ``t``, without a graph."""
    return event.fn.time(t).detach() if isinstance(event.fn, At) else t.detach()


def refuse_terminal(caller: str, events: Sequence[object]) -> None:
    """Raises ArgumentValueError if an event may end a solve early and the caller returns the states alone."""
    for i, event in enumerate(events):
        if isinstance(event, Event) and event.terminal:
            raise ArgumentValueError(
                f"events[{i}] is terminal and may end the solve before its last time, which the result of {caller} "
                "could not show. Use aca_ext.solve."
            )
