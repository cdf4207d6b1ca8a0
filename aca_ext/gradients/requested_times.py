"""Gradient with respect to the requested times, for every gradient method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aca_ext.gradients.base import Result, Task
from aca_ext.kernels.layout import stack_rows
from aca_ext.solver.batch_record import BatchRecord
from aca_ext.solver.checkpoints import StepRecord


def with_time_gradient(task: Task, *, t: Tensor, method_of_gradient: Callable[[Task], Result]) -> Result:
    """The solve with an autograd graph to every element of t; first and second derivatives are right.

    Each output takes one more step of the midpoint rule, of length t - t.detach(). The length is zero, so the output
    stays as it is. The length has the graph of t, so the output gets the derivatives of moving along the solution. The
    start takes such a step backward. One evaluation of func serves as both slopes, since their points are the same.
    """
    problem, field = task.problem, task.field
    like = problem.y0
    times = problem.spread_times(t)
    now = times.detach()

    def move(time: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        slope: list[Tensor] = []
        with field.aside():
            k = field(time + delta / 2, field.admit(_Midpoint.apply(y, delta, slope)))
        slope.append(k.detach())
        return y + delta * k

    start = move(times[0], like, now[0] - times[0])
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
            return move(now[i], result.ys[i], times[i] - now[i])
        # Missing outputs are NaN. Zero times NaN would spoil the gradients that all samples share.
        safe = torch.where(padding[i], like.detach(), result.ys[i])
        delta = (times[i] - now[i]).masked_fill(padding[i], 0.0)
        return move(torch.where(padding[i], now[0], now[i]), safe, delta).masked_fill(padding[i], math.nan)

    moved = [moved_to(i) for i in range(1, n_reached)]
    result.stats.n_f_evals += field.n_evals - solved
    return replace(result, ys=stack_rows([like, *moved, *result.ys[n_reached:].unbind(0)], like))


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
