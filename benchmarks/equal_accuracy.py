"""Time of each solver to reach the same error, of the solution forward and of the gradient backward.

One CPU thread, float64, dopri5. Each solver runs at several tolerances. Its time at a given error is interpolated
between the two nearest runs, on logarithmic axes. Errors are relative, against dopri8 at tolerance 1e-12.
"""

import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import torch

from benchmarks import peers
from benchmarks.harness import Parts, Result, Settings, Table, interleave, new_figure
from benchmarks.workloads import Network, flat, networks, reference, relative_error

TOLERANCES = [1e-3, 1e-5, 1e-7]
TOLERANCES_QUICK = [1e-4, 1e-6]
N_ERRORS = 3  # common errors per table
AT_EQUAL_ERROR = {
    "solver": ("solver", ""),
    "error": ("error", ".1e"),
    "ms": ("ms", ".2f"),
    "/ aca": ("over_aca", ".2f"),
}
SWEEP = {
    "solver": ("solver", ""),
    "tolerance": ("tolerance", ".0e"),
    "error": ("error", ".1e"),
    "forward ms": ("forward_ms", ".2f"),
    "gradient error": ("gradient_error", ".1e"),
    "both ms": ("both_ms", ".2f"),
}


def run(settings: Settings) -> Parts:
    solvers, notes = peers.installed("aca_ext", "torchdiffeq", "diffrax", device=settings.device)
    yield from notes
    for workload in networks(settings):
        sweep = _sweep(workload, solvers, settings)
        yield sweep
        yield _at_equal_error(f"{workload.name}: forward, at equal error", sweep, "error", "forward_ms")
        title = f"{workload.name}: forward and backward, at equal gradient error"
        yield _at_equal_error(title, sweep, "gradient_error", "both_ms")
        if find_spec("torchdiffeq") is not None:
            yield f"{workload.name}: the reference differs from torchdiffeq's by {_doubt(workload):.0e}."


def _sweep(workload: Network, solvers: list[peers.Solver], settings: Settings) -> Table:
    exact = reference(workload)
    table = Table(f"{workload.name}, T = {workload.t_end:g}: by tolerance", SWEEP)
    cases = {}
    base = workload.problem(torch.float64, settings.device)  # one func for all tolerances, so it is compiled once
    for solver in solvers:
        for tol in TOLERANCES_QUICK if settings.quick else TOLERANCES:
            problem = replace(base, tol=tol)
            run = solver.prepare(problem)
            y, g = peers.outcome(run, problem)
            errors = {"error": relative_error(y, exact[0]), "gradient_error": relative_error(g, exact[1])}
            table.rows.append({"solver": solver.name, "tolerance": tol, **errors})
            cases[f"{solver.name} {tol:g} both"] = partial(peers.forward_backward, run, problem)
            if solver.own_forward:
                cases[f"{solver.name} {tol:g} forward"] = partial(peers.forward, run)
    timings = interleave(cases, settings, seconds=10)
    for row in table.rows:
        for way in ("forward", "both"):
            case = f"{row['solver']} {row['tolerance']:g} {way}"
            row[f"{way}_ms"] = 1e3 * timings.median(case) if case in cases else None
    return table


def _at_equal_error(title: str, sweep: Table, error: str, ms: str) -> Table:
    """Times at errors that are spread evenly, on a logarithmic axis, over the range that every solver reached."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in sweep.rows:
        if row[ms] is not None:
            points.setdefault(row["solver"], []).append((row[error], row[ms]))
    curves = {name: _frontier(reached) for name, reached in points.items()}
    largest = math.log(min(curve[0][0] for curve in curves.values()))
    smallest = math.log(max(curve[-1][0] for curve in curves.values()))
    if smallest >= largest:
        return Table(f"{title}: no error was reached by every solver", AT_EQUAL_ERROR)
    table = Table(title, AT_EQUAL_ERROR)
    for i in range(N_ERRORS):
        common = math.exp(largest + (smallest - largest) * i / (N_ERRORS - 1))
        times = {name: _time_at(common, curve) for name, curve in curves.items()}
        for name, time in times.items():
            table.rows.append({"solver": name, "error": common, "ms": time, "over_aca": time / times["aca_ext aca"]})
    return table


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (error, time) points from the loosest tolerance on, without those that do not lower the error."""
    kept: list[tuple[float, float]] = []
    for error, time in points:
        if not kept or error < kept[-1][0]:
            kept.append((error, time))
    return kept


def _time_at(error: float, curve: list[tuple[float, float]]) -> float:
    for (e0, t0), (e1, t1) in pairwise(curve):
        if e1 <= error * (1 + 1e-9):
            theta = math.log(e0 / error) / math.log(e0 / e1)
            return t0 * (t1 / t0) ** theta
    return curve[-1][1]


def _doubt(workload: Network) -> float:
    """Distance of torchdiffeq's dopri8, stepping exactly to the end, from the reference: the larger of two errors."""
    from torchdiffeq import odeint

    problem = workload.problem(torch.float64, "cpu", tol=1e-12)
    t = torch.tensor([0.0, problem.t_end], dtype=torch.float64)
    options = {"step_t": t[1:]}
    y = odeint(problem.func, problem.y0, t, rtol=1e-12, atol=1e-12, method="dopri8", options=options)[-1]
    exact = reference(workload)
    return max(relative_error(flat((y,)), exact[0]), relative_error(flat(problem.gradient(y)), exact[1]))


def draw(result: Result):
    """Draws a work-precision diagram: error of the gradient against time, a line per solver over its tolerances."""
    sweeps = [table for table in result.tables if table.columns is SWEEP]
    figure = new_figure(4 * len(sweeps), 4.6)
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        for name in dict.fromkeys(row["solver"] for row in sweep.rows):
            own = [row for row in sweep.rows if row["solver"] == name]
            style = "o-" if name.startswith("aca_ext") else "x--"
            axes.loglog([row["both_ms"] for row in own], [row["gradient_error"] for row in own], style, label=name)
        axes.set(xlabel="forward and backward [ms]", title=sweep.title.partition(",")[0])
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative error of the gradient")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
