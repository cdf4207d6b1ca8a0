"""Gradients of the times and states of events, by the implicit function theorem.

An event is a root of g(t, y(t)) on the dense output y of an accepted step. Where y(t) changes by δy at fixed time and g
by δg = g_y·δy + (change of g's own parameters), the root moves by δt = -δg / (g_t + g_y·dy/dt), and the state at the
event by δy + dy/dt·δt. The derivative dy/dt is that of the dense output, so the gradient is exact for the discrete
solution.

Source: Chen, Amos & Nickel, Learning Neural Event Functions for Ordinary Differential Equations, ICLR 2021, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import EventError
from aca_ext.problem.events import Event
from aca_ext.problem.state import Packing
from aca_ext.solver.event_search import Occurrence, change_along

NO_SECOND_DERIVATIVES = (
    "second derivatives through event {} are not available: its time has first derivatives only. Leave out "
    "create_graph=True."
)
NO_RATE = (
    "the gradient of event {} does not exist: its function does not change along the solution at the event (a touch), "
    "or it has no gradient with respect to t and y (it compares or rounds)."
)


def at_event(event: Event, occurrence: Occurrence, ys: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Time, 0-d float64 on the CPU, and packed state of an occurrence, with their graph.

    ``ys`` are the outputs of the solve, with the graph of the solution at fixed times.
    """
    time = torch.as_tensor(occurrence.t, dtype=torch.float64, device="cpu")
    y = ys[occurrence.row]
    if not torch.is_grad_enabled():
        return time, y
    value = event.fn(time.to(y), packing.unpack(y)).reshape(-1)[occurrence.element]
    if not (value.requires_grad or y.requires_grad or time.requires_grad):
        return time, y
    rate, _ = change_along(event, occurrence.element, time.to(y), y, occurrence.derivative, packing)
    t_event, y_event = _AtEvent.apply(occurrence, rate, time, value, y)
    return t_event, y_event


class _AtEvent(torch.autograd.Function):
    """Moves the output at a fixed time to the root of the event function: nothing in value, all in derivative."""

    @staticmethod
    def forward(
        ctx: Any, occurrence: Occurrence, rate: float, time: Tensor, value: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.event, ctx.derivative, ctx.rate, ctx.value_like = occurrence.event, occurrence.derivative, rate, value
        return time.clone(), y.clone()

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor | None, grad_y: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise EventError(NO_SECOND_DERIVATIVES.format(ctx.event))
        if grad_t is None and grad_y is None:
            return None, None, None, None, None
        if ctx.rate == 0:
            raise EventError(NO_RATE.format(ctx.event))
        moved = 0.0 if grad_t is None else float(grad_t)
        if grad_y is not None:
            moved += float((grad_y * ctx.derivative).sum())
        return None, None, grad_t, torch.full_like(ctx.value_like, -moved / ctx.rate), grad_y
