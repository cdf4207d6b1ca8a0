"""Search for events: sign changes of the user's functions, located on the dense output of accepted steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import EventError
from aca_ext.numerics.root import bracketed_root
from aca_ext.problem.events import Event

Array = NDArray[np.float64]

_LAST_BIT = 2.0**-52  # of a position in a step
# Positions shortly after a start on the surface, where the sign is looked up. The first is far above rounding.
_DEPARTURES = (2.0**-20, 2.0**-10, 2.0**-5, 2.0**-2)


@dataclass
class Occurrence:
    """One occurrence of an event.

    Attributes:
        event: its index among the events of the solve.
        element: index of the element, of the flattened value of the event function, that changed its sign.
        t: its time, in float64.
        theta: its position in the accepted step that holds it, whose number is ``step``.
        derivative: dy/dt of the dense output there, packed.
        row: index of its state among the outputs of the solve.
    """

    event: int
    element: int
    t: float
    theta: float
    step: int
    derivative: Tensor
    row: int = -1


class Found(NamedTuple):
    """Position of an occurrence in a step, index of the event, and index of its element."""

    theta: float
    event: int
    element: int


class EventSearch:
    """Signs of the event functions along a solve.

    Args:
        call: evaluates an event function at a time and a packed state, both as the solver has them.
        touched: indices of the events that ended the part of the solve before this one, which starts on their surface.
    """

    def __init__(
        self, events: Sequence[Event], call: Callable[[Event, float, Tensor], Tensor], touched: Sequence[int] = ()
    ) -> None:
        self._events, self._call, self._touched = events, call, touched
        self._signs: list[Array] = []  # of each element of each event, as last seen; 0 where it is not known yet
        self._start: list[Array] = []

    def start(self, t: float, y: Tensor) -> None:
        """Looks up the signs at the start of the solve."""
        self._start = [self._values(i, t, y) for i in range(len(self._events))]
        self._signs = [np.sign(values) for values in self._start]
        for i in self._touched:
            self._signs[i][:] = 0.0

    def within(self, t: float, t_next: float, state_at: Callable[[float], Tensor]) -> tuple[list[Found], float]:
        """Occurrences within an accepted step, in their order.

        Args:
            state_at: the dense output at a position in the step, from 0 to 1.

        Returns:
            The occurrences, and the position where the smooth part of the solution ends: that of the first terminal
            event or reset, infinity if there is none.
        """
        found: list[Found] = []
        for i, event in enumerate(self._events):

            def values_at(theta: float, i: int = i) -> Array:
                return self._values(i, t_next if theta == 1.0 else t + theta * (t_next - t), state_at(theta))

            before, now = self._signs_before(i, values_at), values_at(1.0)
            for j in np.flatnonzero(before * np.sign(now) < 0):
                if event.direction * now[j] >= 0:
                    found.append(Found(self._root(values_at, int(j), before[j], now[j]), i, int(j)))
            self._signs[i] = np.where(now != 0, np.sign(now), before)
        self._start = []
        found.sort()
        end = min((one.theta for one in found if self._events[one.event].ends_segment), default=np.inf)
        return [one for one in found if one.theta <= end], end

    def _signs_before(self, i: int, values_at: Callable[[float], Array]) -> Array:
        """Signs at the start of a step. Where the solve started on the surface, those shortly after."""
        signs = self._signs[i]
        unknown = signs == 0
        if not unknown.any() or not self._start:
            return signs
        start = self._start[i]
        signs = signs.copy()
        for theta in _DEPARTURES:
            values = values_at(theta)
            is_clear = unknown & (np.abs(values) > 4 * np.abs(start))
            signs[is_clear] = np.sign(values[is_clear])
            unknown &= ~is_clear
            if not unknown.any():
                return signs
        signs[unknown] = np.sign(start[unknown])  # far from the surface after all
        return signs

    def _root(self, values_at: Callable[[float], Array], j: int, before: float, now: float) -> float:
        low, first = 0.0, float(values_at(0.0)[j])
        if first * before <= 0:  # the step starts on the surface: the change is there, or behind the first clear sign
            low = next((theta for theta in _DEPARTURES if values_at(theta)[j] * before > 0), 0.0)
            if low == 0:
                return 0.0
            first = float(values_at(low)[j])
        return bracketed_root(lambda theta: float(values_at(theta)[j]), low, first, 1.0, float(now), _LAST_BIT)

    def _values(self, i: int, t: float, y: Tensor) -> Array:
        with torch.no_grad():
            values: Any = self._call(self._events[i], t, y)
        if not isinstance(values, Tensor) or values.is_complex():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise EventError(f"the function of event {i} returned {kind}; it returns a real tensor.")
        found = values.detach().double().reshape(-1).cpu().numpy().copy()
        if not np.isfinite(found).all():
            raise EventError(f"the function of event {i} returned NaN or infinity at t={t:.17g}; look at it there.")
        return found
