"""Hopper: a latent ODE fills in irregularly observed states from few points, and ACA trains it in the least time.

Data and task are those of the latent ODE's code (Rubanova et al., NeurIPS 2019). The model is to predict 100 of a
rollout's 200 points and sees 10, 20 or 50 % of them, drawn again at each iteration. The measure is the MSE over all 100
points, on rollouts never trained on, in that code's units, (x - min) / max of each dimension.

Differences from that code: the encoder is a GRU over the shown points and the gaps between them, not an ODE-RNN;
networks see standardized states; Adam replaces Adamax. The RNNs predict a point from the shown points before it, as
there, but read their own prediction only at points that are not shown. The default size trains narrower networks on a
tenth of the rollouts for a hundredth of the iterations. Its loss takes 10 random ones of the 100 points at each
iteration, since the adjoint starts a new solve at every point; --full takes all.

The default size does not show the paper's order ACA ≤ naive ≤ adjoint. The three methods start from equal weights and
get equal batches, so they differ by their gradients alone. That makes a few percent, as much as another seed: noisy
batches hide the small gradient errors of naive and adjoint. Also, the latent ODE is not trained to the end; the RNNs,
which learn sooner, are better when more points are shown.
"""

import hashlib
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import new_figure, torch_threads
from benchmarks.paper.common import (
    MissingError,
    Progress,
    Report,
    Settings,
    Table,
    bar,
    save_figure,
    three_gradients,
)

CACHE = Path(__file__).resolve().parents[2] / "build" / "hopper"
DATA_SEED = 123
N_POINTS, WINDOW, N_DIMS = 200, 100, 14
TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}
NOISE = 1e-3  # standard deviation of an observation, in the ELBO
LEARNING_RATE, LR_DECAY = 0.01, 0.999  # decays to a tenth
OTHER_SEEDS = 2
SAVE_SECONDS = 10.0  # trainings shorter than this are not saved midway

PERCENT = (10, 20, 50)
PAPER = {  # MSE × 100, from memory of the paper
    "RNN": (2.45, 1.71, 0.79),
    "GRU": (1.97, 1.42, 0.75),
    "latent ODE, adjoint": (0.47, 0.44, 0.40),
    "latent ODE, naive": (0.36, 0.30, 0.29),
    "latent ODE, aca": (0.31, 0.27, 0.26),
}


WORST_FIRST = ("adjoint", "naive", "aca")  # in the paper


@dataclass(frozen=True)
class Size:
    n_rollouts: int  # four fifths of them for training
    iterations: int
    batch: int
    loss_points: int  # number of the 100 points in the loss of an iteration
    latent: int
    units: int  # of each layer of f
    layers: int
    recurrent: int  # units of the encoder and of the RNNs


QUICK = Size(50, 4, 10, 5, 4, 8, 1, 8)
DEFAULT = Size(1000, 500, 100, 10, 15, 50, 2, 50)
FULL = Size(10_000, 48_000, 50, WINDOW, 15, 300, 3, 100)


@dataclass(frozen=True)
class Batch:
    """Windows (n, 100, 14), and the sorted indices (n, n_shown) of their points that are shown."""

    x: Tensor
    shown: Tensor


class Model(nn.Module):
    """Base of the models; its networks work on states standardized by the training set's mean and deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, train: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", train.mean((0, 1)))
        self.register_buffer("std", train.std((0, 1)))

    def standardized(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def restored(self, x: Tensor) -> Tensor:
        return self.mean + self.std * x


class LatentODE(Model):
    """z(0) ~ N(mean, std²) from a GRU that reads the shown points backwards; z' = f(z); the state is linear in z."""

    def __init__(self, train: Tensor, size: Size, gradient: str) -> None:
        super().__init__(train)
        self.gradient = gradient
        self.read = nn.GRU(N_DIMS + 1, size.recurrent)
        self.start = nn.Sequential(nn.Linear(size.recurrent, 50), nn.Tanh(), nn.Linear(50, 2 * size.latent))
        widths = [size.latent, *[size.units] * (size.layers + 1), size.latent]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.f = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]
        self.decode = nn.Linear(size.latent, N_DIMS)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = self.standardized(batch.x).gather(1, batch.shown[..., None].expand(-1, -1, N_DIMS))
        gaps = times(batch.shown.diff(dim=1, prepend=torch.zeros_like(batch.shown[:, :1])))
        _, h = self.read(torch.cat([x, gaps[..., None]], -1).transpose(0, 1).flip(0))
        mean, std = self.start(h[0]).chunk(2, -1)
        return mean, std.abs()

    def decoded(self, z0: Tensor, points: Tensor) -> Tensor:
        """States (n, len(points), 14) at the increasing indices ``points``; z0 is at the point before index 0."""
        t = times(torch.cat([points.new_tensor([-1]), points]))
        z = aca_ext.odeint(lambda t, z: self.f(z), z0, t, gradient=self.gradient, **TOLERANCES)
        return self.restored(self.decode(z[1:])).transpose(0, 1)

    def loss(self, batch: Batch, points: Tensor, noise: Tensor) -> Tensor:
        """The ELBO with Gaussian observations, in units of the squared error."""
        mean, std = self.encode(batch)
        error = (self.decoded(mean + std * noise, points) - batch.x[:, points]).square().mean()
        divergence = 0.5 * (mean.square() + std.square() - 1) - (std + 1e-8).log()
        return error + 2 * NOISE**2 * divergence.mean()

    def forward(self, batch: Batch) -> Tensor:
        return self.decoded(self.encode(batch)[0], torch.arange(WINDOW, device=batch.x.device))


class Recurrent(Model):
    """Predicts each point from those before it, and reads its own prediction at points that are not shown."""

    def __init__(self, train: Tensor, size: Size, cell: Callable[[int, int], nn.RNNCellBase]) -> None:
        super().__init__(train)
        self.size = size
        self.cell = cell(N_DIMS + 1, size.recurrent)
        self.decode = nn.Sequential(nn.Linear(size.recurrent, size.units), nn.Tanh(), nn.Linear(size.units, N_DIMS))

    def forward(self, batch: Batch) -> Tensor:
        is_shown = torch.zeros_like(batch.x[..., :1]).scatter(1, batch.shown[..., None], 1.0)
        h, predictions = batch.x.new_zeros(len(batch.x), self.size.recurrent), []
        for x, seen in zip(self.standardized(batch.x).unbind(1), is_shown.unbind(1), strict=True):
            predictions.append(self.decode(h))
            h = self.cell(torch.cat([seen * x + (1 - seen) * predictions[-1], seen], -1), h)
        return self.restored(torch.stack(predictions, 1))

    def loss(self, batch: Batch, points: Tensor, noise: Tensor) -> Tensor:
        return (self(batch) - batch.x)[:, points].square().mean()


def times(points: Tensor) -> Tensor:
    """Times of a rollout's points; a whole rollout takes 1."""
    return points / N_POINTS


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


class Training:
    """A model with its optimizer and its stream of random batches, which can be saved midway."""

    def __init__(self, build: Callable[[], nn.Module], train: Tensor, size: Size, percent: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = build().to(train.device)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.random = torch.Generator().manual_seed(seed)
        self.train, self.size, self.percent = train, size, percent
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self) -> None:
        start = time.perf_counter()
        size, device = self.size, self.train.device
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * max(LR_DECAY ** len(self.losses), 0.1)
        which = torch.randint(len(self.train), (size.batch,), generator=self.random)
        shown = shown_points(size.batch, self.percent, self.random)
        points = torch.randperm(WINDOW, generator=self.random)[: size.loss_points].sort().values
        noise = torch.randn(size.batch, size.latent, generator=self.random)
        self.optimizer.zero_grad()
        batch = Batch(self.train[which.to(device)], shown.to(device))
        loss = self.model.loss(batch, points.to(device), noise.to(device))
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def continue_from(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        self.losses, self.seconds = state["losses"], state["seconds"]


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


def shown_points(n: int, percent: int, random: torch.Generator) -> Tensor:
    """Sorted indices (n, percent) of the shown points of n windows."""
    return torch.rand(n, WINDOW, generator=random).argsort(1)[:, : WINDOW * percent // 100].sort(1).values


def batch_of(x: Tensor, percent: int, seed: int) -> Batch:
    return Batch(x, shown_points(len(x), percent, torch.Generator().manual_seed(seed + 1)).to(x.device))


def windows(rollouts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """100 successive points of each rollout, from a random one on, normalized; split into training (4/5) and test."""
    flat = rollouts.flatten(0, 1)
    x = (rollouts - flat.amin(0)) / flat.amax(0)
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(N_POINTS - WINDOW + 1, (len(x), 1), generator=random)
    at = (first + torch.arange(WINDOW)).to(x.device)
    x = x.gather(1, at[..., None].expand(-1, -1, N_DIMS))
    n_train = len(x) * 4 // 5
    return x[:n_train], x[n_train:]


def load(settings: Settings, n: int) -> tuple[Tensor, str]:
    """The first ``n`` rollouts (n, 200, 14) and their SHA-256, read from a file, or simulated if there is none.

    Raises:
        MissingError: the physics engine is not installed, or the file is damaged.
    """
    path = (settings.data or CACHE) / f"hopper_{n}.npz"
    if not path.exists():
        rollouts = simulate(n)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial.npz")
        np.savez(partial_path, rollouts=rollouts, sha256=hashlib.sha256(rollouts.tobytes()).hexdigest())
        os.replace(partial_path, path)
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            rollouts, checksum = file["rollouts"], str(file["sha256"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise MissingError(f"{path} cannot be read ({error}). Delete it; the next run makes a new one.") from error
    if rollouts.shape != (n, N_POINTS, N_DIMS) or hashlib.sha256(rollouts.tobytes()).hexdigest() != checksum:
        raise MissingError(f"{path} is damaged: its checksum differs. Delete it; the next run makes a new one.")
    return torch.from_numpy(rollouts), checksum


def simulate(n: int) -> np.ndarray:
    """``n`` rollouts (n, 200, 14) float32 of dm_control's hopper, without control, from the published random states."""
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn
    try:
        from dm_control import suite
    except ImportError as error:
        raise MissingError(
            f"The physics engine is missing ({error}). Install it: pip install '.[paper]' in the repository's root."
        ) from error
    physics = suite.load("hopper", "stand").physics
    random = np.random.RandomState(DATA_SEED)
    rollouts = np.empty((n, N_POINTS, N_DIMS), np.float32)
    with bar(n, "hopper's rollouts") as ticks:
        for rollout in rollouts:
            with physics.reset_context():
                physics.data.qpos[:2] = random.uniform(0, 0.5, 2)
                physics.data.qpos[2:] = random.uniform(-2, 2, 5)
                physics.data.qvel[:] = random.uniform(-5, 5, 7)
            for state in rollout:
                state[:] = np.concatenate([physics.data.qpos, physics.data.qvel])
                physics.step()
            ticks.update()
    return rollouts


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
