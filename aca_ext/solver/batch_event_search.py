"""Search for events of independent samples, as in ``event_search``, for all samples at once. A row is a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import EventError
from aca_ext.kernels.fused import Array
from aca_ext.numerics.root import bracketed_roots
from aca_ext.problem.batch import RowPacking
from aca_ext.problem.events import Event, time_of
from aca_ext.solver.event_search import DEPARTURES, LAST_BIT, OF_TIME, ON_SURFACE, check_real

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


class FoundRows(NamedTuple):
    """Occurrences: samples, positions in their steps, events, elements; ordered by sample, then along the solve."""

    rows: Index
    theta: Array
    event: Index
    element: Index

    def where(self, mask: Mask) -> FoundRows:
        return FoundRows(self.rows[mask], self.theta[mask], self.event[mask], self.element[mask])


class RowEventSearch:
    """Signs of the event functions along the solves of all samples.

    Args:
        times: converts the times of the samples into the tensor that func and event functions take.
    """

    def __init__(self, events: Sequence[Event], packing: RowPacking, times: Callable[[Array], Tensor]) -> None:
        self._events, self._packing, self._times = events, packing, times
        self._signs: list[Array] = []  # (batch, elements) of each event, as in EventSearch

    def start(self, t: Array, y: Tensor, slope: Tensor | None, reach: Array, rows: Mask) -> None:
        """Computes the signs of the samples ``rows`` at their start, as ``EventSearch.start``."""
        eps, everyone = torch.finfo(y.dtype).eps, np.arange(len(t))
        for i, event in enumerate(self._events):
            values = self._values(i, t, y, rows)
            _refuse_mixed_samples(event, i, self._times(t), y, self._packing)
            signs = np.sign(values)
            for j in range(values.shape[1]):
                element = np.full_like(everyone, j)
                rate, scale = changes_along(event, everyone, element, self._times(t), y, slope, self._packing)
                rounding = eps * (scale + np.abs(rate * reach))
                is_zero = np.abs(values[:, j]) <= ON_SURFACE * rounding
                signs[:, j] = np.where(is_zero, np.sign(rate * reach), signs[:, j])
            self._signs.append(signs)

    def within(
        self, t: Array, t_next: Array, state_at: Callable[[Array], Tensor], rows: Mask
    ) -> tuple[FoundRows, Array]:
        """Occurrences within the steps that the samples ``rows`` accepted.

        Args:
            state_at: dense output of all samples, each at a position in its step, from 0 to 1.

        Returns:
            The occurrences, and for each sample the position of the first terminal event or reset, or infinity.
        """
        found: list[FoundRows] = []
        for i, event in enumerate(self._events):

            def values_at(theta: Array, i: int = i) -> Array:
                return self._values(i, np.where(theta == 1.0, t_next, t + theta * (t_next - t)), state_at(theta), rows)

            before, now = self._signs_before(i, values_at, rows), values_at(np.ones_like(t))
            changed = rows[:, None] & (before * np.sign(now) < 0) & (event.direction * now >= 0)
            for j in np.flatnonzero(changed.any(0)):
                theta = self._roots(partial(_column, values_at, int(j)), changed[:, j], before[:, j], now[:, j])
                of_rows = np.flatnonzero(changed[:, j])
                ones = np.ones_like(of_rows)
                found.append(FoundRows(of_rows, theta[of_rows], i * ones, j * ones))
            self._signs[i] = np.where(rows[:, None] & (now != 0), np.sign(now), before)
        return self._in_order(found, len(t))

    def _in_order(self, found: Sequence[FoundRows], n_rows: int) -> tuple[FoundRows, Array]:
        end = np.full(n_rows, np.inf)
        if not found:
            empty = np.zeros(0, dtype=np.int64)
            return FoundRows(empty, np.zeros(0), empty, empty), end
        rows, theta = np.concatenate([f.rows for f in found]), np.concatenate([f.theta for f in found])
        event, element = np.concatenate([f.event for f in found]), np.concatenate([f.element for f in found])
        order = np.lexsort((element, event, theta, rows))
        every = FoundRows(rows[order], theta[order], event[order], element[order])
        ends = np.array([event.ends_segment for event in self._events])[every.event]
        np.minimum.at(end, every.rows[ends], every.theta[ends])
        return every.where(every.theta <= end[every.rows]), end

    def _signs_before(self, i: int, values_at: Callable[[Array], Array], rows: Mask) -> Array:
        """Signs at the start of a step; an unknown sign is taken from a position shortly after the start."""
        signs = self._signs[i]
        for theta in reversed(DEPARTURES):
            is_unknown = rows[:, None] & (signs == 0)
            if not is_unknown.any():
                break
            signs = np.where(is_unknown, np.sign(values_at(np.full(len(rows), theta))), signs)
        return signs

    def _roots(self, f: Callable[[Array], Array], rows: Mask, before: Array, now: Array) -> Array:
        """Positions of the sign changes of the samples ``rows``."""
        low, first = np.zeros_like(now), f(np.zeros_like(now))
        is_late = rows & (first * before <= 0)  # a zero at the start: the change is there, or further on
        is_there = is_late.copy()
        if is_late.any():
            for theta in DEPARTURES:
                value = f(np.full_like(now, theta))
                is_found = is_there & (value * before > 0)
                low, first = np.where(is_found, theta, low), np.where(is_found, value, first)
                is_there &= ~is_found
        first = np.where(rows & ~is_there, first, 0.0)  # a value of zero: the root is this end
        return bracketed_roots(f, low, first, np.ones_like(now), now, LAST_BIT)

    def _values(self, i: int, t: Array, y: Tensor, rows: Mask) -> Array:
        """Values (batch, elements) of an event function; those of the samples ``rows`` are finite."""
        with torch.no_grad():
            given = self._events[i].fn(self._times(t), self._packing.unpack(y.detach()))
        values = checked_values(given, i, len(t)).detach().cpu().double().numpy().copy()
        wrong = rows & ~np.isfinite(values).all(1)
        if wrong.any():
            row = int(wrong.argmax())
            raise EventError(
                f"the function of event {i} returned NaN or infinity for sample {row} at t={t[row]:.17g}; check it "
                "there."
            )
        return values


def _column(values_at: Callable[[Array], Array], j: int, theta: Array) -> Array:
    return values_at(theta)[:, j]


def checked_values(values: object, event: int, n_rows: int) -> Tensor:
    """The value of an event function as (batch, elements).

    Raises:
        EventError: it is no real tensor whose first dimension is the batch.
    """
    check_real(values, event)
    assert isinstance(values, Tensor)
    if values.dim() == 0 or len(values) != n_rows:
        raise EventError(
            f'the function of event {event} returned shape {tuple(values.shape)}; with batch="independent" it must '
            f"return a tensor whose first dimension is the batch, {n_rows}."
        )
    return values.reshape(n_rows, -1)


def _refuse_mixed_samples(event: Event, index: int, t: Tensor, y: Tensor, packing: RowPacking) -> None:
    """Raises EventError if the values of the first sample depend on others, as after an unwanted broadcast."""
    with torch.enable_grad():
        t_leaf, y_leaf = t.detach().requires_grad_(), y.detach().requires_grad_()
        values = event.fn(t_leaf, packing.unpack(y_leaf))
        if not values.requires_grad:
            return
        grads = torch.autograd.grad(values[0].sum(), (t_leaf, y_leaf), allow_unused=True)
    of_others = [grad[1:] for grad in grads if grad is not None]
    if any((torch.isfinite(grad) & (grad != 0)).any() for grad in of_others):
        raise EventError(
            f"the value of event {index} for sample 0 depends on other samples; it has shape {tuple(values.shape)}. "
            f"Often t, of shape {tuple(t.shape)}, is broadcast with a part of y by mistake: t.flatten() is (batch,)."
        )


def changes_along(
    event: Event, rows: Index, element: Index, t: Tensor, y: Tensor, slope: Tensor | None, packing: RowPacking
) -> tuple[Array, Array]:
    """``event_search.change_along`` for the given elements of the given samples; each sample at most once.

    ``t``, ``y`` and ``slope`` are those of all samples.
    """
    with torch.enable_grad():
        t_leaf, y_leaf = t.detach().requires_grad_(), y.detach().requires_grad_()
        values = event.fn(t_leaf, packing.unpack(y_leaf)).reshape(len(y), -1)
        chosen = values[torch.from_numpy(rows), torch.from_numpy(element)].sum()
        if not chosen.requires_grad:
            return np.zeros(len(rows)), np.zeros(len(rows))
        of_t, of_y = torch.autograd.grad(chosen, (t_leaf, y_leaf), allow_unused=True)

    def total(x: Tensor) -> Array:
        return x.detach().reshape(len(y), -1).sum(1).cpu().double().numpy()[rows]

    rate = scale = np.zeros(len(rows))
    if of_t is not None:
        rate, scale = total(of_t), OF_TIME * total((of_t * time_of(event, t)).abs())
    if of_y is not None:
        scale = scale + total((of_y * y).abs())
        rate = rate if slope is None else rate + total(of_y * slope)
    return rate, scale
