"""Hopper: a latent ODE fills in irregularly observed states from few points, and ACA trains it in the least time.

Data and task are those of the latent ODE's code (Rubanova et al., NeurIPS 2019). The model is to predict 100 of a
rollout's 200 points and sees 10, 20 or 50 % of them, drawn again at each iteration. The measure is the MSE over all 100
points, on rollouts never trained on, in that code's units, (x - min) / max of each dimension.

Differences from that code: the encoder is a GRU over the shown points and the gaps between them, not an ODE-RNN;
networks see standardized states; Adam replaces Adamax. The RNNs predict a point from the shown points before it, as
there, but read their own prediction only at points that are not shown. The default size trains narrower networks on a
tenth of the rollouts for a hundredth of the iterations. Its loss takes 10 random ones of the 100 points at each
iteration, since the adjoint starts a new solve at every point; --full takes all.

At the default size, the paper's order ACA ≤ naive ≤ adjoint is that of some runs and not of others. The three methods
start from equal weights and get equal batches, so they differ by their gradients alone. That makes a few percent, about
as much as another seed: noisy batches hide the small gradient errors of naive and adjoint. Also, the latent ODE is not
trained to the end; the RNNs, which learn sooner, are better when more points are shown. ``hopper_schedule`` trains it
to the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import new_figure, torch_threads
from benchmarks.paper.common import Progress, Report, Settings, Table, bar, save_figure, three_gradients
from benchmarks.paper.hopper_data import PERCENT, WINDOW, Batch, batch_of, load, windows
from benchmarks.paper.hopper_models import LatentODE, Recurrent, Size, Training

OTHER_SEEDS = 2
SAVE_SECONDS = 10.0  # trainings shorter than this are not saved midway

PAPER = {  # MSE × 100, from memory of the paper
    "RNN": (2.45, 1.71, 0.79),
    "GRU": (1.97, 1.42, 0.75),
    "latent ODE, adjoint": (0.47, 0.44, 0.40),
    "latent ODE, naive": (0.36, 0.30, 0.29),
    "latent ODE, aca": (0.31, 0.27, 0.26),
}


WORST_FIRST = ("adjoint", "naive", "aca")  # in the paper

QUICK = Size(50, 4, 10, 5, 4, 8, 1, 8)
DEFAULT = Size(1000, 500, 100, 10, 15, 50, 2, 50)
FULL = Size(10_000, 48_000, 50, WINDOW, 15, 300, 3, 100)


@torch_threads(1)  # more threads do not speed up operations this small
def run(settings: Settings) -> Report:
    size = settings.pick(QUICK, DEFAULT, FULL)
    rollouts, checksum = load(settings, size.n_rollouts)
    train, test = windows(rollouts.to(settings.device), settings.seed)
    models: dict[str, Callable[[], nn.Module]] = {
        "RNN": partial(Recurrent, train, size, nn.RNNCell),
        "GRU": partial(Recurrent, train, size, nn.GRUCell),
        **{f"latent ODE, {name}": partial(LatentODE, train, size, name) for name in WORST_FIRST},
    }
    progress = Progress(settings, "hopper", {"size": vars(size), "data": checksum})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    again: list[list[float]] = []  # ACA's MSE with other seeds
    with bar((len(models) + OTHER_SEEDS) * len(PERCENT) * size.iterations, "hopper") as ticks:

        def measured(name: str, percent: int, seed: int) -> dict[str, Any]:
            key = f"{name}, {percent} %, seed {seed}"
            ticks.set_postfix_str(key)
            training = Training(models[name], train, size, percent, seed)
            result = _trained(progress, key, training, ticks)
            training.model.load_state_dict(result["weights"])
            batch = batch_of(test, percent, settings.seed)
            with torch.no_grad():
                mse = (training.model(batch) - batch.x).square().mean().item()
            return {"percent": percent, "mse": mse, **result}

        for percent in PERCENT:
            for name in models:
                found[name].append(measured(name, percent, settings.seed))
            seeds = range(settings.seed + 1, settings.seed + 1 + OTHER_SEEDS)
            again.append([measured("latent ODE, aca", percent, seed)["mse"] for seed in seeds])
    errors = [
        gradient_errors(size, result["weights"], batch_of(test[: size.batch], percent, settings.seed))
        for result, percent in zip(found["latent ODE, aca"], PERCENT, strict=True)
    ]
    tables = [_mse_table(found, again), _cost_table(found), _gradient_table(errors)]
    figure = _draw(settings, size, found, test)
    progress.done()
    runs = [{"model": name, **_without_weights(r)} for name, results in found.items() for r in results]
    values = {
        "size": vars(size),
        "data_sha256": checksum,
        "runs": runs,
        "gradient_errors": errors,
        "aca_other_seeds": again,
    }
    return Report("hopper", tables, [figure], values)


def _without_weights(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "weights"}


def _trained(progress: Progress, key: str, training: Training, ticks: Any) -> dict[str, Any]:
    """Losses, seconds and weights of the finished training, which continues from what an interrupted run saved."""
    iterations = training.size.iterations
    if (result := progress.get(key)) is not None:
        ticks.update(iterations)
        return result
    if (state := progress.get(f"{key}, unfinished")) is not None:
        training.continue_from(state)
        ticks.update(len(training.losses))
    while len(training.losses) < iterations:
        training.step()
        ticks.update()
        if training.seconds > SAVE_SECONDS and len(training.losses) % max(iterations // 20, 1) == 0:
            progress.put(f"{key}, unfinished", training.state())
    weights = {name: value.cpu() for name, value in training.model.state_dict().items()}
    result = {"losses": training.losses, "seconds": training.seconds, "weights": weights}
    progress.put(f"{key}, unfinished", None)
    progress.put(key, result)
    return result


def gradient_errors(size: Size, weights: dict[str, Tensor], batch: Batch) -> dict[str, float]:
    """|gradient - direct| / |direct| of the latent ODE trained with ACA, with all 100 points in the loss."""

    def gradient(name: str) -> Tensor:
        model = LatentODE(batch.x, size, name).to(batch.x.device)
        model.load_state_dict(weights)
        noise = torch.zeros(len(batch.x), size.latent, device=batch.x.device)
        model.loss(batch, torch.arange(WINDOW, device=batch.x.device), noise).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    exact = gradient("direct")
    return {name: ((gradient(name) - exact).norm() / exact.norm()).item() for name in three_gradients()}


def _mse_table(found: dict, again: list[list[float]]) -> Table:
    rows = []
    for name, results in found.items():
        pairs = zip(results, PAPER[name], strict=True)
        rows.append((name, *(x for result, paper in pairs for x in (f"{100 * result['mse']:.3f}", paper))))
    columns = ("MSE × 100", *(x for percent in PERCENT for x in (f"{percent} %", "paper")))
    title = "test MSE × 100 over all 100 points, by the points shown"
    return Table(title, columns, rows, f"{_order(found, again)}\nThe paper's numbers are quoted from memory.")


def _order(found: dict, again: list[list[float]]) -> str:
    """Verdict on ACA ≤ naive ≤ adjoint, with the differences of the methods beside those of ACA's seeds."""
    lines = []
    for n, percent in enumerate(PERCENT):
        aca, naive, adjoint = mses = [found[f"latent ODE, {name}"][n]["mse"] for name in ("aca", "naive", "adjoint")]
        seeds = [aca, *again[n]]
        holds = "holds" if aca <= naive <= adjoint else "does not hold"
        lines.append(
            f"{percent} %: ACA ≤ naive ≤ adjoint {holds}; the three differ by {max(mses) / min(mses) - 1:.1%}, "
            f"{len(seeds)} seeds of ACA by {max(seeds) / min(seeds) - 1:.1%}."
        )
    return "\n".join(lines)


def _cost_table(found: dict) -> Table:
    rows = [(name, *(f"{r['seconds']:.1f}" for r in results)) for name, results in found.items()]
    return Table("seconds of training", ("", *(f"{percent} %" for percent in PERCENT)), rows)


def _gradient_table(errors: list[dict[str, float]]) -> Table:
    rows = [(name, *(f"{e[name]:.2g}" for e in errors)) for name in three_gradients()]
    title = "relative error of the gradient against the discrete gradient, in float32, at ACA's trained weights"
    return Table(title, ("gradient", *(f"{percent} %" for percent in PERCENT)), rows)


def _draw(settings: Settings, size: Size, found: dict, test: Tensor):
    figure = new_figure(13, 4.5)
    bars, path = figure.subplots(1, 2, width_ratios=(3, 2))
    width = 1 / (len(found) + 1)
    for n, (name, results) in enumerate(found.items()):
        where = np.arange(len(PERCENT)) + (n - (len(found) - 1) / 2) * width
        bars.bar(where, [100 * r["mse"] for r in results], width, color=f"C{n}", label=name)
        bars.plot(where, PAPER[name], "k_", markersize=12, label=None if n else "paper")
    bars.set_yscale("log")
    bars.minorticks_off()
    low, high = bars.get_ylim()
    ticks = [y for y in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= y <= high]
    bars.set_yticks(ticks, list(map(str, ticks)))
    bars.set_xticks(range(len(PERCENT)), [f"{percent} % shown" for percent in PERCENT])
    bars.set(ylabel="test MSE × 100", title="Interpolation of the hopper's states")
    bars.legend(fontsize=8, loc="upper right")

    batch = batch_of(test[:1], PERCENT[0], settings.seed)
    model = LatentODE(test, size, "aca").to(test.device)
    model.load_state_dict(found["latent ODE, aca"][0]["weights"])
    with torch.no_grad():
        predicted = model(batch)[0].cpu()
    truth, shown = batch.x[0].cpu(), batch.shown[0].cpu()
    for n, (dim, label) in enumerate(((1, "height"), (2, "angle of the torso"), (4, "angle of the hip"))):
        path.plot(truth[:, dim], color=f"C{n}", alpha=0.4, linewidth=3, label=label)
        path.plot(predicted[:, dim], color=f"C{n}", linestyle="--")
        path.plot(shown, truth[shown, dim], "o", color=f"C{n}", markersize=5)
    path.set(
        xlabel="point", ylabel="normalized", title=f"latent ODE, ACA, {PERCENT[0]} % shown (dots); predicted dashed"
    )
    path.title.set_fontsize(10)
    path.legend(fontsize=8)
    return save_figure(settings, figure, "hopper")
