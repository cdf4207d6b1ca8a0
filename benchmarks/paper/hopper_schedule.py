"""Hopper to the end of the paper's schedule: held-out error of the latent ODE over iterations, evaluations and time.

The nets, the number of rollouts, Adamax with its rates, and the 48 000 iterations are those of the latent ODE's code.
With Adam at these rates nets of this width do not learn. Two things differ. The encoder is a GRU (see ``hopper``). The
loss takes 10 random ones of the 100 points at each iteration, since the adjoint starts a new solve at every point: with
all 100, its schedule would take days on a CPU core.

It takes hours, and may be stopped at any time: it continues from the last measurement. ``--only "aca, 10 %"`` trains
one model alone. With ``--minutes 0`` it reports on what there is.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import new_figure, torch_threads
from benchmarks.paper.common import (
    Progress,
    Report,
    Settings,
    Table,
    bar,
    check_any_finished,
    save_figure,
    three_gradients,
)
from benchmarks.paper.hopper import PAPER
from benchmarks.paper.hopper_data import PERCENT, batch_of, load, windows
from benchmarks.paper.hopper_models import LatentODE, Size, Training

UNITS = (*(("aca", percent) for percent in PERCENT), ("naive", PERCENT[0]), ("adjoint", PERCENT[0]))
SIZE = Size(10_000, 48_000, 50, 10, 15, 300, 3, 100)
QUICK = Size(50, 4, 10, 5, 4, 8, 1, 8)
MEASUREMENTS = 96  # of the held-out error in a training


@torch_threads(1)
def run(settings: Settings) -> Report:
    size = settings.pick(QUICK, SIZE, replace(SIZE, loss_points=100))
    engine = settings.pick("eager", "compiled", "eager")  # compiling takes longer than the quick training
    rollouts, checksum = load(settings, size.n_rollouts)
    train, test = windows(rollouts.to(settings.device), settings.seed)
    curves: dict[tuple[str, int], dict[str, Any]] = {}
    progresses = []
    fingerprint = {"size": vars(size), "data": checksum, "optimizer": "Adamax"}
    for gradient, percent in UNITS:
        build = partial(LatentODE, train, size, gradient, engine)
        training = Training(build, train, size, percent, settings.seed, torch.optim.Adamax)
        name = f"{gradient}, {percent} %"
        progress = Progress(settings, f"hopper_schedule_{gradient}_{percent}", fingerprint)
        curves[gradient, percent] = _curve(settings, name, training, test, progress)
        progresses.append(progress)
    check_any_finished([unit for unit in curves.values() if unit["points"]])
    tables = [_errors(curves, size), _budgets(curves), _costs(curves, size)]
    figure = _draw(settings, curves)
    is_complete = all(_iterations(unit) == size.iterations for unit in curves.values())
    if is_complete:
        for progress in progresses:
            progress.done()
    units = [{"gradient": gradient, "percent": percent, **unit} for (gradient, percent), unit in curves.items()]
    values = {"size": vars(size), "data_sha256": checksum, "engine": engine, "is_complete": is_complete, "units": units}
    return Report("hopper_schedule", tables, [figure], values)


def _curve(settings: Settings, name: str, training: Training, test: Tensor, progress: Progress) -> dict[str, Any]:
    """Measurements of one training, which goes on as long as ``settings`` say; one that is saved continues."""
    found = progress.get("unit") or {"points": [], "commits": []}
    if (state := progress.get("training")) is not None:
        training.continue_from(state)
    total, interval = training.size.iterations, max(training.size.iterations // MEASUREMENTS, 1)
    commit = harness.commit()
    with bar(total, name) as ticks:
        ticks.update(len(training.losses))
        while len(training.losses) < total and settings.goes_on_with(name):
            for _ in range(min(interval, total - len(training.losses))):
                training.step()
                ticks.update()
            found["points"].append(_measured(training, test, interval))
            if commit not in found["commits"]:
                found["commits"].append(commit)
            progress.put("training", training.state())
            progress.put("unit", found)
    return found


def _measured(training: Training, test: Tensor, interval: int) -> dict[str, float]:
    """The error on all held-out windows at all 100 points, and the cost so far."""
    batch = batch_of(test, training.percent, 0)
    model = training.model
    engine, model.engine = model.engine, "eager"  # another batch size would be another program
    with torch.no_grad():
        mse = (model(batch) - batch.x).square().mean().item()
    model.engine = engine
    recent = training.losses[-interval:]
    return {
        "iteration": len(training.losses),
        "evaluations": training.evaluations,
        "seconds": training.seconds,
        "cpu_seconds": training.cpu_seconds,
        "loss": sum(recent) / len(recent),
        "mse": mse,
    }


def _iterations(unit: dict[str, Any]) -> int:
    return unit["points"][-1]["iteration"] if unit["points"] else 0


def _errors(curves: dict[tuple[str, int], dict[str, Any]], size: Size) -> Table:
    rows = []
    for (gradient, percent), unit in curves.items():
        if unit["points"]:
            rest = extrapolated(unit["points"], size.iterations)
            paper = PAPER[f"latent ODE, {gradient}"][PERCENT.index(percent)]
            last = 100 * unit["points"][-1]["mse"]
            rows.append((gradient, f"{percent} %", _iterations(unit), last, rest and 100 * rest, paper))
    return Table(
        "error on held-out rollouts, over all 100 points",
        ("gradient", "shown", "iterations", "MSE × 100", f"extrapolated to {size.iterations}", "paper"),
        rows,
        "Extrapolated: a power law of the iterations, fitted to the second half of an unfinished curve; a guess.\n"
        "The paper's numbers are quoted from memory.",
    )


def extrapolated(points: list[dict[str, float]], iterations: int) -> float | None:
    """MSE at ``iterations`` by a power law through the later half of ``points``; None if finished or too short."""
    later = points[len(points) // 2 :]
    if len(later) < 3 or points[-1]["iteration"] >= iterations:
        return None
    x = [math.log(point["iteration"]) for point in later]
    y = [math.log(point["mse"]) for point in later]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return math.exp(mean_y + slope * (math.log(iterations) - mean_x))


def _budgets(curves: dict[tuple[str, int], dict[str, Any]]) -> Table:
    """Errors of the three gradients after equal iterations, evaluations and CPU time: the most that all have spent."""
    percent = PERCENT[0]
    points = {gradient: curves[gradient, percent]["points"] for gradient in three_gradients()}
    rows = []
    if all(points.values()):
        for budget, label in (("iteration", "iterations"), ("evaluations", ""), ("cpu_seconds", "CPU seconds")):
            most = min(curve[-1][budget] for curve in points.values())
            at = [last_within(curve, budget, most) for curve in points.values()]
            rows.append((label or budget, f"{most:.0f}", *(point and 100 * point["mse"] for point in at)))
    return Table(
        f"held-out MSE × 100 at {percent} % shown, at equal budgets",
        ("budget", "amount", *three_gradients()),
        rows,
        "Amount: the most that all three have spent. Evaluations of f: forward and backward; naive keeps graphs, so "
        "it\nhas none backward. -: the first measurement came later.",
    )


def last_within(points: list[dict[str, float]], budget: str, amount: float) -> dict[str, float] | None:
    return next((point for point in reversed(points) if point[budget] <= amount), None)


def _costs(curves: dict[tuple[str, int], dict[str, Any]], size: Size) -> Table:
    rows = []
    for (gradient, percent), unit in curves.items():
        if unit["points"]:
            last = unit["points"][-1]
            each = last["cpu_seconds"] / last["iteration"]
            evaluations = last["evaluations"] / last["iteration"]
            rows.append((gradient, f"{percent} %", evaluations, 1000 * each, f"{size.iterations * each / 3600:.1f}"))
    return Table(
        "cost of an iteration, on one core",
        ("gradient", "shown", "evaluations of f", "CPU ms", "CPU hours of the schedule"),
        rows,
        "Means over the training so far. Other load stretches CPU time, too.",
    )


def _draw(settings: Settings, curves: dict[tuple[str, int], dict[str, Any]]):
    figure = new_figure(13, 4.2)
    panels = figure.subplots(1, 3, sharey=True)
    for n, ((gradient, percent), unit) in enumerate(curves.items()):
        if not unit["points"]:
            continue
        errors = [100 * point["mse"] for point in unit["points"]]
        for axes, key in zip(panels, ("iteration", "evaluations", "cpu_seconds"), strict=True):
            at = [point[key] for point in unit["points"]]
            axes.loglog(at, errors, ".-", color=f"C{n}", label=f"{gradient}, {percent} % shown")
    for axes, label in zip(panels, ("iterations", "evaluations of f", "CPU seconds"), strict=True):
        for n, error in enumerate(PAPER["latent ODE, aca"]):
            axes.axhline(error, color=f"C{n}", linestyle=":", linewidth=1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, which="both")
    panels[0].set(ylabel="held-out MSE × 100", title="dotted: the paper's, ACA")
    panels[0].legend(fontsize=8)
    return save_figure(settings, figure, "hopper_schedule")
