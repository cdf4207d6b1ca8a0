"""The gradient of the requested times, whatever the gradient method of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from aca_ext.gradients.base import Result, Task
from aca_ext.kernels.layout import stack_rows
from aca_ext.solver.checkpoints import StepRecord


def with_time_gradient(task: Task, *, t: Tensor, method_of_gradient: Callable[[Task], Result]) -> Result:
    """The solve with a graph to every element of t, right to second order.

    A step of the midpoint rule, of a length that is zero and has the graph of t, moves each output from its time to its
    time, and the start back: it leaves the solution as it is and gives it the derivatives of moving along it.
    """
    problem, field = task.problem, task.field
    like = problem.y0
    times = problem.spread_times(t)
    now = times.detach()

    def move(time: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        with field.aside():
            k = field(time, field.admit(y))
            return y + delta * field(time + delta / 2, field.admit(y + delta / 2 * k))

    start = move(times[0], like, now[0] - times[0])
    result = method_of_gradient(replace(task, problem=replace(problem, y0=start)))
    solved = field.n_evals
    n_events = len(result.record.events) if isinstance(result.record, StepRecord) else 0
    n_reached = len(result.ys) - n_events  # of the times; an event may have ended the solve before the others
    moved = [move(now[i], result.ys[i], times[i] - now[i]) for i in range(1, n_reached)]
    result.stats.n_f_evals += field.n_evals - solved
    return replace(result, ys=stack_rows([like, *moved, *result.ys[n_reached:].unbind(0)], like))
