"""Three-body problem with unknown physics: NODE and LSTM learn the orbits of t in [0, 1] and predict those of [1, 2].

NODE is r' = v, v' = a network of the augmented positions: r, and d, d/|d|, d/|d|², d/|d|³ of each pair. The paper calls
the network FC and, where we could read, not its depth. We train both readings: one hidden layer, and a single linear
layer, of which Newton's law is one setting. LSTM predicts the next displacement, from positions or augmented ones.

A NODE that starts its training with solves over [0, 1] stays far from the orbits, which meet at a distance of 0.05. So
its training has two parts. First its force is fitted to the accelerations of a spline through the seen points. Then
solves over growing windows are fitted to the points, by L-BFGS with a line search. LSTM is given as many gradients, by
the same optimizers. Both see the same 1000 points without noise; LSTM reads them as ten sequences of 100.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

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
from benchmarks.paper.orbit_models import Orbits, Size, fit_lstm, fit_node
from benchmarks.paper.three_body import PER_UNIT

FOLLOWED = 1e-3  # RMS error on [0, 1] of a model that follows the seen orbits
USEFUL = 0.1  # RMS error up to which a prediction is useful; the bodies are about 1 apart

QUICK = Size(8, 10, 10, 2, 1e-3, 1, "eager")
DEFAULT = Size(50, 300, 2000, 100, 1e-7, 5, "compiled")
FULL = Size(50, 1000, 10_000, 500, 1e-7, 10, "compiled")


@torch_threads(1)  # more threads do not speed up operations this small
def run(settings: Settings) -> Report:
    size = settings.pick(QUICK, DEFAULT, FULL)
    orbits = Orbits(settings.device)
    models: dict[str, Callable] = {f"NODE, {name}": partial(fit_node, name, True) for name in three_gradients()}
    models["NODE of one layer, aca"] = partial(fit_node, "aca", False)
    models["LSTM"] = partial(fit_lstm, False)
    models["LSTM, augmented"] = partial(fit_lstm, True)
    progress = Progress(settings, "three_body_unknown", {"size": vars(size), "models": list(models)})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    with bar(len(models) * size.seeds, "three_body_unknown") as ticks:
        for seed in range(settings.seed, settings.seed + size.seeds):
            for name, fit in models.items():
                result = progress.get((name, seed))
                if result is None and settings.goes_on_with(f"{name}, seed {seed}"):
                    result = _result(fit, orbits, size, seed)
                    progress.put((name, seed), result)
                if result is not None:
                    found[name].append(result)
                ticks.update()
    is_complete = all(len(results) == size.seeds for results in found.values())
    found = {name: results for name, results in found.items() if results}
    check_any_finished(found)
    tables = [_table(found)]
    figure = _draw(settings, orbits, found)
    if is_complete:
        progress.done()
    runs = [{"model": name, **_without_paths(result)} for name, results in found.items() for result in results]
    return Report(
        "three_body_unknown", tables, [figure], {"size": vars(size), "is_complete": is_complete, "runs": runs}
    )


def _result(fit: Callable, orbits: Orbits, size: Size, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    start, cpu_start = time.perf_counter(), time.process_time()
    predicted, losses = fit(orbits, size)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    return {"seed": seed, **measures(predicted, orbits), **spent, "losses": losses, "predicted": predicted.cpu()}


def measures(predicted: Tensor, orbits: Orbits) -> dict[str, float]:
    """RMS error on [0, 1], MSE on [1, 2] and [0, 2], and the time t up to which the RMS error is below 0.1.

    Errors are infinite if the prediction failed.
    """
    squared = (predicted - orbits.r).square().mean(-1).nan_to_num(nan=torch.inf)
    late = (squared.sqrt() >= USEFUL).nonzero()
    return {
        "rms_seen": squared[1 : PER_UNIT + 1].mean().sqrt().item(),
        "mse_future": squared[PER_UNIT + 1 :].mean().item(),
        "mse": squared[1:].mean().item(),
        "useful_until": orbits.t[late[0, 0]].item() if len(late) else orbits.t[-1].item(),
    }


def _without_paths(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("predicted", "losses")}


def _table(found: dict[str, list[dict[str, Any]]]) -> Table:
    rows = []
    for name, results in found.items():
        follows = sum(result["rms_seen"] < FOLLOWED for result in results)
        cells = [
            _spread(result[key] for result in results) for key in ("rms_seen", "mse_future", "mse", "useful_until")
        ]
        rows.append((name, len(results), f"{follows} of {len(results)}", *cells, _cpu(results)))
    return Table(
        "positions predicted without physics; medians (least to largest) over the seeds",
        ("", "seeds", "follow [0, 1]", "RMS of [0, 1]", "MSE of [1, 2]", "MSE of [0, 2]", "useful until t =", "CPU s"),
        rows,
        f"Follow: RMS below {FOLLOWED:g}. Useful: RMS below {USEFUL:g}. On [0, 1] NODE is a solve from the initial "
        "state, while LSTM\nis shown the orbits and predicts 0.01 ahead; then it continues from its own predictions.",
    )


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _cpu(results: list[dict[str, Any]]) -> str:
    return f"{median(result['cpu_seconds'] for result in results):.0f}"


def _draw(settings: Settings, orbits: Orbits, found: dict[str, list[dict[str, Any]]]):
    figure = new_figure(13, 9)
    above, below = figure.subfigures(2, 1, height_ratios=(5, 4))
    truth = orbits.r.cpu()
    low, high = truth.reshape(-1, 3).amin(0), truth.reshape(-1, 3).amax(0)
    box = torch.stack([low, high], 1).tolist()
    shown = [name for name in ("NODE, aca", "NODE of one layer, aca", "LSTM, augmented") if name in found]
    for n, name in enumerate(shown):
        axes = above.add_subplot(1, len(shown), n + 1, projection="3d")
        axes.set(title=name, **{f"{axis}lim": limits for axis, limits in zip("xyz", box, strict=True)})
        axes.tick_params(labelsize=7)
        axes.set_box_aspect(None, zoom=0.85)
        for body in range(3):
            where = slice(3 * body, 3 * body + 3)
            axes.plot(*truth[:, where].T.numpy(), color=f"C{body}", linewidth=3, alpha=0.3)
            predicted = found[name][0]["predicted"][:, where].clone()
            predicted[((predicted < low) | (predicted > high)).any(-1)] = torch.nan  # 3D axes do not clip
            axes.plot(*predicted[: PER_UNIT + 1].T.numpy(), color=f"C{body}", linewidth=1)
            axes.plot(*predicted[PER_UNIT:].T.numpy(), color=f"C{body}", linewidth=1, linestyle="--")
    above.suptitle("thick: true; thin: model, seen until t = 1; dashed: predicted until t = 2; only inside the box")
    axes = below.subplots()
    for n, (name, results) in enumerate(found.items()):
        errors = torch.stack([(r["predicted"] - truth).square().mean(-1).sqrt() for r in results])
        axes.semilogy(orbits.t[1:].cpu(), errors.median(0).values[1:].clamp(min=1e-9), color=f"C{n}", label=name)
    axes.axvline(1, color="black", linestyle=":")
    axes.set(xlabel="t", ylabel="RMS error of positions", title="median of the seeds", ylim=(1e-7, 1e2))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return save_figure(settings, figure, "three_body_unknown")
