"""Backpropagation through all operations of the solver, including the step size control and rejected trials.

The baseline of the ACA paper (Zhuang et al., ICML 2020, section 3.3). Its gradient is ACA's plus a term that flows
through the controller. That term is noise of the size of the tolerance, and it needs the longest autograd graph of all
methods. Hairer's first step is a constant, as in the paper's code.
"""

from __future__ import annotations

from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.dependencies import first_slope_with_graph
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.layout import stack_rows
from aca_ext.solver.loop import Solver


def solve(task: Task) -> Result:
    problem = task.problem
    ops = TorchOperations(problem.y0.detach(), problem.tolerance)
    solver = Solver(problem, task.field, ops, k0=first_slope_with_graph(task), differentiable_steps=True)
    ys = stack_rows(solver.run(problem.y0), problem.y0)
    return Result(ys, solver.record, solver.stats)
