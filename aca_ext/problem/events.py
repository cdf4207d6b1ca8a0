"""``Event``: a condition on time and state whose sign changes a solve looks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.problem.state import State


@dataclass(frozen=True)
class Event:
    """A condition whose sign changes are found during a solve.

    Attributes:
        fn: called as fn(t, y) with t a 0-d tensor and y like y0. Returns a real tensor of any shape; the event occurs
            where one of its elements changes its sign. Must be continuous in t and y between two occurrences.
        direction: 1 for changes from negative to positive only, -1 for the opposite, 0 for both. "From" and "to" follow
            the direction of the solve.
        terminal: the solve ends at the first occurrence.
        reset: called as reset(t, y) at every occurrence; the solve goes on from the state that it returns, like y0. Not
            together with ``terminal``.

    A touch without a change of sign does not count. A solve that starts on the surface fn = 0 waits for the next
    change. Signs are compared at the ends of accepted steps: two changes within one step go unseen, unless ``max_step``
    bounds the steps.
    """

    fn: Callable[[Tensor, Any], Tensor]
    direction: int = 0
    terminal: bool = False
    reset: Callable[[Tensor, Any], State] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ArgumentTypeError(f"Event.fn is of type {type(self.fn).__name__}; give a function of (t, y).")
        if self.direction not in (-1, 0, 1):
            raise ArgumentValueError(f"Event.direction is {self.direction!r}; it is -1, 0 or 1.")
        if not isinstance(self.terminal, bool):
            raise ArgumentTypeError(f"Event.terminal is {self.terminal!r}; it is True or False.")
        if self.reset is not None and not callable(self.reset):
            raise ArgumentTypeError(f"Event.reset is of type {type(self.reset).__name__}; give a function of (t, y).")
        if self.terminal and self.reset is not None:
            raise ArgumentValueError("an Event is either terminal, which ends the solve, or has a reset; give one.")

    @property
    def ends_segment(self) -> bool:
        """Tells whether the smooth part of the solution ends at an occurrence."""
        return self.terminal or self.reset is not None
