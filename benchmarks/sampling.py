"""Overhead beyond f of a fixed-step solve without gradient, as in sampling from a trained flow.

One CPU thread, float32, 100 equal steps. One run returns the state after every step, another only the last state.
``/ f`` is time over n_f_evals calls of f.
"""

from functools import partial

import torch
from torch import Tensor

import aca_ext
from benchmarks.harness import Parts, Settings, Table, interleave
from benchmarks.workloads import Network, Problem, networks

STEPS = 100
EVALUATIONS = {"euler": 1, "rk4": 4}  # per step
COLUMNS = {
    "solver": ("solver", ""),
    "method": ("method", ""),
    "outputs": ("outputs", "d"),
    "ms": ("ms", ".2f"),
    "/ f": ("over_f", ".2f"),
}


def run(settings: Settings) -> Parts:
    odeints = {"aca_ext": aca_ext.odeint}
    try:
        import torchdiffeq
    except ImportError:
        yield "torchdiffeq is skipped: it cannot be imported."
    else:
        odeints["torchdiffeq"] = torchdiffeq.odeint
    for workload in networks(settings):
        yield _measure(workload, odeints, settings)


def _measure(workload: Network, odeints: dict, settings: Settings) -> Table:
    problem = workload.problem(torch.float32, settings.device)
    grid = torch.linspace(0, 1, STEPS + 1, device=settings.device)
    cases = {"f": partial(_f, problem)}
    for name, odeint in odeints.items():
        for method in EVALUATIONS:
            cases[f"{name} {method} {len(grid)}"] = partial(_solve, odeint, problem, grid, method, {})
            ends, options = grid[[0, -1]], {"step_size": 1 / STEPS}
            cases[f"{name} {method} 2"] = partial(_solve, odeint, problem, ends, method, options)
    timings = interleave(cases, settings, seconds=6)
    f_us = 1e6 * timings.median("f")
    table = Table(f"{workload.name}: {STEPS} steps (f {f_us:.1f} µs)", COLUMNS)
    for name in odeints:
        for method, evaluations in EVALUATIONS.items():
            for outputs in (len(grid), 2):
                case = f"{name} {method} {outputs}"
                row = {"solver": name, "method": method, "outputs": outputs, "ms": 1e3 * timings.median(case)}
                table.rows.append({**row, "over_f": timings.ratio(case, "f") / (STEPS * evaluations), "f_us": f_us})
    return table


@torch.no_grad()
def _f(problem: Problem) -> None:
    problem.func(problem.time, problem.y0)


@torch.no_grad()
def _solve(odeint, problem: Problem, t: Tensor, method: str, options: dict) -> None:
    odeint(problem.func, problem.y0, t, method=method, options=options)
