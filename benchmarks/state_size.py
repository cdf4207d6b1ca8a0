"""Overhead of a solver per evaluation of f, by the size of the state.

float32, forward, dopri5, f = -y, torch's default number of threads. The overhead is (time - n_f_evals × f) over
n_f_evals.
"""

from dataclasses import replace
from functools import partial

import torch

from benchmarks import peers
from benchmarks.harness import Parts, Result, Settings, Table, interleave, new_figure
from benchmarks.workloads import W4, Problem

SIZES = [1 << n for n in range(0, 23, 2)]
SIZES_QUICK = [1, 1 << 10]
COLUMNS = {
    "solver": ("solver", ""),
    "elements": ("elements", "d"),
    "f evals": ("n_f_evals", "d"),
    "f µs": ("f_us", ".1f"),
    "overhead µs": ("overhead_us", ".1f"),
}


def run(settings: Settings) -> Parts:
    solvers, skipped = peers.installed(device=settings.device)
    yield from skipped
    solvers = [solver for solver in solvers if solver.own_forward and not solver.is_compiled]
    table = Table("time that the solver adds to an evaluation of f", COLUMNS)
    for n in SIZES_QUICK if settings.quick else SIZES:
        problem = replace(W4, elements=n).problem(torch.float32, settings.device)
        runs = {solver.name: solver.prepare(problem) for solver in solvers}
        cases = {"f": partial(_f, problem)} | {name: partial(peers.forward, run) for name, run in runs.items()}
        timings = interleave(cases, settings, threads=torch.get_num_threads(), seconds=1.5)
        f = timings.median("f")
        for solver in solvers:
            evaluations = peers.count(solver, problem, backward=False).forward
            overhead = timings.median(solver.name) / evaluations - f
            row = {"solver": solver.name, "elements": n, "n_f_evals": evaluations, "f_us": 1e6 * f}
            table.rows.append({**row, "overhead_us": 1e6 * overhead})
    yield table


@torch.no_grad()
def _f(problem: Problem) -> None:
    problem.func(problem.time, problem.y0)


def draw(result: Result):
    figure = new_figure(6.5, 4)
    axes = figure.subplots()
    rows = result.tables[0].rows
    for name in dict.fromkeys(row["solver"] for row in rows):
        own = [row for row in rows if row["solver"] == name]
        axes.loglog([row["elements"] for row in own], [row["overhead_us"] for row in own], "o-", label=name)
    sizes = sorted({row["elements"] for row in rows})
    f_us = {row["elements"]: row["f_us"] for row in rows}
    axes.loglog(sizes, [f_us[n] for n in sizes], "k:", label="f itself (-y)")
    axes.set(
        xlabel="elements of the state", ylabel="µs per evaluation", title="What a solver adds to an evaluation of f"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
