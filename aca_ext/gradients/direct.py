"""Backpropagation through the kept graph of all accepted steps: ACA's gradient with no replay and more memory."""

from __future__ import annotations

from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.dependencies import first_slope_with_graph
from aca_ext.kernels.fused import operations_for
from aca_ext.kernels.layout import stack_rows
from aca_ext.solver.loop import Solver


def solve(task: Task) -> Result:
    problem = task.problem
    ops = operations_for(problem.y0.detach(), problem.tolerance, differentiable=True)
    solver = Solver(problem, task.field, ops, k0=first_slope_with_graph(task))
    ys = stack_rows(solver.run(problem.y0), problem.y0)
    return Result(ys, solver.record, solver.stats)
