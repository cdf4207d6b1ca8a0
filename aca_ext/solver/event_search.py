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
from aca_ext.kernels.reference import Number
from aca_ext.numerics.root import bracketed_root
from aca_ext.problem.events import Event, time_of
from aca_ext.problem.state import Packing

Array = NDArray[np.float64]

LAST_BIT = 2.0**-52  # of a position in a step
ON_SURFACE = 64.0  # roundings of its terms within which the value of an event function counts as zero
OF_TIME = 8.0 / ON_SURFACE  # a time is rounded fewer times than a state, and another event may lie close behind it
STEPS_BEFORE = 16.0  # the step before a start on a surface, in first steps after it
# Positions shortly after a start on the surface, where the side is looked up, and behind which the next change lies.
DEPARTURES = (2.0**-5, 2.0**-10, 2.0**-20, 2.0**-30, 2.0**-40)


@dataclass
class Occurrence:
    """One occurrence of an event.

    Attributes:
        event: index of the event among those of the solve.
        element: index of the element that changed its sign, in the flattened value of the event function.
        t: time: a number, or a float64 tensor if step sizes have an autograd graph.
        theta: position in the accepted step.
        step: number of that step.
        derivative: dy/dt of the dense output at that time, packed.
        row: index of the state at that time among the outputs of the solve; -1 until it is one.
    """

    event: int
    element: int
    t: Number
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
        packing: converts a packed state into the user's form, which event functions take.
        scalar: converts a number into a 0-d tensor of the state's dtype and device.
    """

    def __init__(self, events: Sequence[Event], packing: Packing, scalar: Callable[[float], Tensor]) -> None:
        self._events, self._packing, self._scalar = events, packing, scalar
        self._signs: list[Array] = []  # last non-zero sign of each element of each event; 0 if unknown

    def start(self, t: float, y: Tensor, slope: Tensor | None, reach: float) -> None:
        """Computes the signs at the start of a solve; ``slope`` is dy/dt there.

        At a zero of an event function, up to rounding, the sign is that of the side to which the solution goes.
        ``reach`` is the time over which rounding may have moved the start off the zero, negative backward in time.
        """
        for i, event in enumerate(self._events):
            values = self._values(i, t, y)
            signs = np.sign(values)
            for j in range(len(values)):
                rate, scale = change_along(event, j, self._scalar(t), y, slope, self._packing)
                rounding = torch.finfo(y.dtype).eps * (scale + abs(rate * reach))
                if abs(values[j]) <= ON_SURFACE * rounding:
                    signs[j] = np.sign(rate * reach)
            self._signs.append(signs)

    def within(self, t: float, t_next: float, state_at: Callable[[float], Tensor]) -> tuple[list[Found], float]:
        """Occurrences within an accepted step, in the order of the solve.

        Args:
            state_at: dense output at a position in the step, from 0 to 1.

        Returns:
            The occurrences, and the position of the first terminal event or reset, which ends the smooth part of the
            solution; infinity if there is none.
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
        found.sort()
        end = min((one.theta for one in found if self._events[one.event].ends_segment), default=np.inf)
        return [one for one in found if one.theta <= end], end

    def _signs_before(self, i: int, values_at: Callable[[float], Array]) -> Array:
        """Signs at the start of a step; an unknown sign is taken from a position shortly after the start."""
        signs = self._signs[i]
        for theta in reversed(DEPARTURES):
            if signs.all():
                break
            signs = np.where(signs == 0, np.sign(values_at(theta)), signs)
        return signs

    def _root(self, values_at: Callable[[float], Array], j: int, before: float, now: float) -> float:
        low, first = 0.0, float(values_at(0.0)[j])
        if first * before <= 0:  # a zero at the start: the change is there, or after a position with the first sign
            low = next((theta for theta in DEPARTURES if values_at(theta)[j] * before > 0), 0.0)
            if low == 0:
                return 0.0
            first = float(values_at(low)[j])
        return bracketed_root(lambda theta: float(values_at(theta)[j]), low, first, 1.0, float(now), LAST_BIT)

    def _values(self, i: int, t: float, y: Tensor) -> Array:
        with torch.no_grad():
            values: Any = self._events[i].fn(self._scalar(t), self._packing.unpack(y.detach()))
        check_real(values, i)
        found = values.detach().reshape(-1).cpu().double().numpy().copy()
        if not np.isfinite(found).all():
            raise EventError(f"the function of event {i} returned NaN or infinity at t={t:.17g}; check it there.")
        return found


def check_real(values: object, event: int) -> None:
    """Raises EventError if the value of an event function is no tensor of real numbers."""
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        raise EventError(
            f"the function of event {event} returned a condition (torch.bool), which has no sign to change; return a "
            "number that changes its sign there, such as y[0] for y[0] < 0."
        )
    if not isinstance(values, Tensor) or values.is_complex():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise EventError(f"the function of event {event} returned {kind}; it must return a real tensor.")


def change_along(
    event: Event, element: int, t: Tensor, y: Tensor, slope: Tensor | None, packing: Packing
) -> tuple[float, float]:
    """Derivative of an event function along a solution with this slope, and the size of the function's terms.

    In the size, terms of the time count less: see ``OF_TIME``.

    Both are 0 for a function that has no gradient with respect to t and y.
    """
    with torch.enable_grad():
        t_leaf, y_leaf = t.detach().requires_grad_(), y.detach().requires_grad_()
        value = event.fn(t_leaf, packing.unpack(y_leaf)).reshape(-1)[element]
        if not value.requires_grad:
            return 0.0, 0.0
        of_t, of_y = torch.autograd.grad(value, (t_leaf, y_leaf), allow_unused=True)
    rate = scale = 0.0
    if of_t is not None:
        rate, scale = of_t.item(), OF_TIME * (of_t * time_of(event, t)).abs().item()
    if of_y is not None:
        scale += (of_y * y).abs().sum().item()
        rate += 0.0 if slope is None else (of_y * slope).sum().item()
    return rate, scale
