"""Gradient with respect to the requested times, for every gradient method.

With adaptive steps it is the slope of the solution at each time. With fixed steps it is that of the discrete solution:
the steps between requested times change their sizes with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aca_ext.gradients.base import Result, Task
from aca_ext.kernels.layout import stack_rows
from aca_ext.kernels.reference import as_float
from aca_ext.problem.moving_nodes import MovingNodes, NodesFollow
from aca_ext.solver.batch_record import BatchRecord
from aca_ext.solver.checkpoints import StepRecord
from aca_ext.vector_field.field import VectorField
from aca_ext.vector_field.grid_field import GridField


def with_gradient_by_slopes(task: Task, t: Tensor, method_of_gradient: Callable[[Task], Result]) -> Result:
    """The solve with an autograd graph to every element of t; first and second derivatives are right.

    Each output takes one more step of the midpoint rule, of length t - t.detach(). The length is zero, so the output
    stays as it is. The length has the graph of t, so the output gets the derivatives of moving along the solution. The
    start takes such a step backward. One evaluation of func serves as both slopes, since their points are the same.
    """
    problem, field = task.problem, task.field
    like = problem.y0
    times = problem.spread_times(t)
    now = times.detach()
    start = _moved(field, times[0], like, now[0] - times[0])
    result = method_of_gradient(replace(task, problem=replace(problem, y0=start)))
    solved = field.n_evals
    record, padding, n_events = result.record, problem.padding(), 0
    if isinstance(record, StepRecord):
        n_events = len(record.events) if problem.events else 0
    elif isinstance(record, BatchRecord):
        n_events = len(result.ys) - len(times)
        if record.is_missing.any():
            padding = torch.from_numpy(record.is_missing).to(like.device).view(-1, *times.shape[1:])
    n_reached = len(result.ys) - n_events  # requested times; a terminal event may leave the last ones out

    def moved_to(i: int) -> Tensor:
        if padding is None:
            return _moved(field, now[i], result.ys[i], times[i] - now[i])
        # Missing outputs are NaN. Zero times NaN would spoil the gradients that all samples share.
        safe = torch.where(padding[i], like.detach(), result.ys[i])
        delta = (times[i] - now[i]).masked_fill(padding[i], 0.0)
        return _moved(field, torch.where(padding[i], now[0], now[i]), safe, delta).masked_fill(padding[i], math.nan)

    moved = [moved_to(i) for i in range(1, n_reached)]
    result.stats.n_f_evals += field.n_evals - solved
    return replace(result, ys=stack_rows([like, *moved, *result.ys[n_reached:].unbind(0)], like))


def with_gradient_by_grid(task: Task, t: Tensor, method_of_gradient: Callable[[Task], Result]) -> Result:
    """The solve with an autograd graph to every element of t through the sizes of its fixed steps.

    States inside a step (option interp, events) keep their position in it when it moves. From there they move to their
    time: along the slope, as above, or at an event along the dense output.
    """
    problem, like = task.problem, task.problem.y0
    assert problem.grid is not None
    lands = problem.interp is None or problem.nodes_follow is NodesFollow.TIMES
    grid = MovingNodes(problem.grid, problem.times, problem.nodes_follow, lands)
    shifts = (t - t.detach()).to(like)
    field = GridField.of(task.field, grid, shifts)
    result = method_of_gradient(replace(task, field=field))
    solved, record = field.n_evals, result.record
    assert isinstance(record, StepRecord)
    if lands and not record.events:
        return result
    field.begin_step(None)
    events = {one.row: one for one in record.events}

    def moved(i: int, y: Tensor) -> Tensor:
        if i in events:
            return y - grid.shift_with_step(as_float(events[i].t), shifts) * events[i].derivative
        if lands or i in (0, len(shifts) - 1):
            return y
        time = problem.times[i]
        delta = shifts[i] - grid.shift_with_step(time, shifts)
        return _moved(field, torch.full_like(delta, time, requires_grad=False), y, delta)

    ys = [moved(i, y) for i, y in enumerate(result.ys.unbind(0))]
    result.stats.n_f_evals += field.n_evals - solved
    return replace(result, ys=stack_rows(ys, like))


def _moved(field: VectorField, time: Tensor, y: Tensor, delta: Tensor) -> Tensor:
    """The state ``y`` at ``time``, moved along the slope there by ``delta``, which is zero and has a graph."""
    slope: list[Tensor] = []
    with field.aside():
        k = field(time + delta / 2, field.admit(_Midpoint.apply(y, delta, slope)))
    slope.append(k.detach())
    return y + delta * k


class _Midpoint(torch.autograd.Function):
    """The state y + delta/2·k for a delta of zero, with the one entry of ``slope`` as k, entered later.

    Its derivatives are those up to second ones of the midpoint rule, for which k counts by its value.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, delta: Tensor, slope: list[Tensor]) -> Tensor:
        ctx.slope, ctx.shape_of_delta = slope, delta.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return g, (g * (ctx.slope[0] / 2)).sum_to_size(ctx.shape_of_delta), None
