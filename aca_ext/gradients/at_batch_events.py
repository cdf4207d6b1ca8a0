"""Times and states of the events of independent samples, with their gradients, as in ``at_events``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import EventError
from aca_ext.gradients.at_events import NO_RATE, NO_SECOND_DERIVATIVES
from aca_ext.problem.batch import BatchProblem
from aca_ext.solver.batch_event_search import changes_along, checked_values
from aca_ext.solver.batch_record import BatchRecord, index_of

Index = NDArray[np.int64]


def at_batch_event(i: int, problem: BatchProblem, record: BatchRecord, ys: Tensor) -> tuple[Tensor, Tensor]:
    """Times (n, batch), float64 on the CPU, and packed states (n, batch, ...) of event number ``i``.

    n is the largest number of occurrences in a sample; further ones are NaN. ``ys`` are the outputs of the solve, with
    the graph of the solution at fixed times.
    """
    found = record.occurrences
    chosen = np.zeros(0, dtype=np.int64) if found is None else np.flatnonzero(found.event == i)
    if found is None or len(chosen) == 0:
        return torch.empty(0, len(problem.y0), dtype=torch.float64, device="cpu"), ys[:0]
    rows = found.rows[chosen]
    number = np.arange(len(rows)) - np.searchsorted(rows, rows)  # the occurrence's number among those of its sample
    parts = [_at(i, problem, record, ys, chosen[number == n]) for n in range(int(number.max()) + 1)]
    times, states = zip(*parts, strict=True)
    return torch.stack(times), torch.stack(states)


def _at(i: int, problem: BatchProblem, record: BatchRecord, ys: Tensor, chosen: Index) -> tuple[Tensor, Tensor]:
    """Times (batch,) and states of occurrences of different samples, NaN for the other samples."""
    found, event, packing = record.occurrences, problem.events[i], problem.packing
    assert found is not None
    rows, element = found.rows[chosen], found.element[chosen]
    of_rows = index_of(rows, ys)
    time, y = torch.from_numpy(found.t[chosen]), ys[index_of(found.index[chosen], ys), of_rows]
    derivative = found.derivative[index_of(chosen, ys)]
    if torch.is_grad_enabled():
        # The event function takes a whole batch. Samples without such an occurrence get the first one of another.
        n = len(problem.y0)
        t = time[:1].expand(n).index_copy(0, torch.from_numpy(rows), time).to(problem.y0).view(packing.time_shape)
        states = y[:1].detach().expand_as(problem.y0).index_copy(0, of_rows, y)
        values = checked_values(event.fn(t, packing.unpack(states)), i, len(states))
        value = values[of_rows, index_of(element, values)]
        if value.requires_grad or y.requires_grad:
            slope = torch.zeros_like(states).index_copy(0, of_rows, derivative)
            rate, _ = changes_along(event, rows, element, t, states, slope, packing)
            time, y = _AtEvents.apply(i, torch.from_numpy(rate), derivative, rows, time, value, y)
    n = len(problem.y0)
    times = torch.full((n,), torch.nan, dtype=torch.float64, device="cpu").index_copy(0, torch.from_numpy(rows), time)
    return times, torch.full_like(ys[0].detach(), torch.nan).index_copy(0, of_rows, y)


class _AtEvents(torch.autograd.Function):
    """Moves the outputs at fixed times to the roots of the event function: nothing in value, all in derivative."""

    @staticmethod
    def forward(
        ctx: Any, event: int, rate: Tensor, derivative: Tensor, rows: Index, time: Tensor, value: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.event, ctx.rate, ctx.derivative, ctx.rows, ctx.value_like = event, rate, derivative, rows, value.detach()
        return time.clone(), y.clone()

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor | None, grad_y: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise EventError(NO_SECOND_DERIVATIVES.format(ctx.event))
        moved = torch.zeros_like(ctx.rate)
        if grad_t is not None:
            moved = moved + grad_t
        if grad_y is not None:
            moved = moved + (grad_y * ctx.derivative).reshape(len(grad_y), -1).sum(1).to(moved)
        still = (ctx.rate == 0) & (moved != 0)
        if still.any():
            sample = int(ctx.rows[int(still.nonzero()[0])])
            raise EventError(NO_RATE.format(f"{ctx.event} of sample {sample}"))
        grad_value = torch.where(ctx.rate == 0, 0.0, -moved / ctx.rate).to(ctx.value_like)
        return None, None, None, None, grad_t, grad_value, grad_y
