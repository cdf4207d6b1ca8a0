"""Peak memory of a gradient by the number of accepted steps.

W2's network, float32, dopri5 with equal steps, which loose tolerances and a bound on the step size enforce. Memory is
the peak of tensors alive at once, over both passes; ``/ state`` is relative to the bytes of the state.
"""

from functools import partial

import torch
from torch import Tensor

import aca_ext
from aca_ext.tensor_memory import TensorMemory
from benchmarks.harness import Parts, Result, Settings, Table, new_figure
from benchmarks.workloads import W2, Problem

STEPS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
STEPS_QUICK = [1, 4]
LOOSE = 1e3  # every step meets this tolerance
COLUMNS = {
    "solver": ("solver", ""),
    "steps": ("steps", "d"),
    "MiB": ("mib", ".2f"),
    "/ state": ("over_state", ".0f"),
}


def run(settings: Settings) -> Parts:
    solvers = {f"aca_ext {name}": partial(_ours, name) for name in aca_ext.GRADIENTS}
    try:
        import torchdiffeq
    except ImportError:
        yield "torchdiffeq is skipped: it cannot be imported."
    else:
        solvers["torchdiffeq odeint"] = partial(_torchdiffeq, torchdiffeq.odeint)
        solvers["torchdiffeq odeint_adjoint"] = partial(_torchdiffeq, torchdiffeq.odeint_adjoint)
    problem = W2.problem(torch.float32, settings.device)
    table = Table(f"{W2.name}: peak memory by accepted steps", COLUMNS)
    for name, solve in solvers.items():
        for steps in STEPS_QUICK if settings.quick else STEPS:
            with TensorMemory() as memory:
                problem.gradient(solve(problem, steps))
            state = problem.y0.nbytes
            row = {"solver": name, "steps": steps, "mib": memory.peak / 2**20, "over_state": memory.peak / state}
            table.rows.append(row)
    yield table


def _ours(gradient: str, problem: Problem, steps: int) -> Tensor:
    options = {"first_step": 1 / steps, "max_step": 1 / steps}
    solution = aca_ext.solve(
        problem.func, problem.y0, (0.0, 1.0), rtol=LOOSE, atol=LOOSE, gradient=gradient, options=options
    )
    assert solution.stats.n_accepted == steps
    return solution.y[-1]


def _torchdiffeq(odeint, problem: Problem, steps: int) -> Tensor:
    options = {"first_step": 1 / steps, "max_step": 1 / steps}
    return odeint(problem.func, problem.y0, torch.tensor([0.0, 1.0]), rtol=LOOSE, atol=LOOSE, options=options)[-1]


def draw(result: Result):
    figure = new_figure(6.5, 4)
    axes = figure.subplots()
    rows = result.tables[0].rows
    for name in dict.fromkeys(row["solver"] for row in rows):
        own = [row for row in rows if row["solver"] == name]
        style = "o-" if name.startswith("aca_ext") else "x--"
        axes.loglog([row["steps"] for row in own], [row["mib"] for row in own], style, label=name)
    axes.set(xlabel="accepted steps", ylabel="peak memory [MiB]", title=f"Memory of a gradient, {W2.name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
