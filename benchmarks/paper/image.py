"""Fig. 7: NODE18 trained with ACA beats the adjoint and naive methods in accuracy and time, and ResNet18 in accuracy.

NODE18 is ResNet18 with every second block, relu(y + f(y)), replaced by the solution of dy/dt = relu(f(y)) at t = 1. It
has the same convolutions and norms, so as many parameters. ACA solves with Heun-Euler at 1e-2, the adjoint and naive
methods with Dormand-Prince at 1e-5, as in the paper. A trained net is then tested with other solvers, without
retraining.

With ``--data DIR`` the images are CIFAR-10 or CIFAR-100, otherwise scikit-learn's 8 x 8 digits. The digits need only
small nets: two stages of 8 and 16 channels, batches of 64, no crops. One row is not in the paper: the adjoint with
ACA's solver and tolerance. It separates the effect of the gradient from that of the tolerance.

On the digits the accuracies do not differ as in the paper. The adjoint's gradient is off by percents, but the task is
easy: every method gets all but a few of 360 images right, and the seed decides more than the gradient. The claim holds
for the cost alone: ACA can afford its loose tolerance, and so needs fewer evaluations of f.
"""

import copy
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aca_ext
from benchmarks import harness
from benchmarks.harness import new_figure
from benchmarks.paper.cifar import Images
from benchmarks.paper.common import (
    Progress,
    Report,
    Settings,
    Table,
    bar,
    save_figure,
    three_gradients,
)

PAPER_CIFAR10 = {"aca": (7.3, 10.1), "adjoint": (10.5, 17.7), "naive": (10.0, 33.9)}  # error %, hours of 90 epochs
PAPER_NOTE = (
    "The paper's: CIFAR-10, read off Fig. 7. Its ten-run medians of accuracy: CIFAR-10 94.16 (NODE18-ACA) and 92.21 "
    "(ResNet18), CIFAR-100 73.95 and 72.61."
)
FIXED_STEPS = dict.fromkeys(("euler", "midpoint", "rk4_classic"), (1.0, 0.5, 0.25, 0.1))
TOLERANCES = dict.fromkeys(("heun_euler", "bosh3", "dopri5"), (1e-1, 1e-2, 1e-3, 1e-4))
TEST_BATCH = 500


class Convolutions(nn.Module):
    """f(y), the term that a residual block adds to y."""

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, y: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(y)))))


class Residual(nn.Module):
    """y → relu(y + f(y)), with a projection of y if the shape changes."""

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.f = Convolutions(inputs, channels, stride)
        self.shortcut = nn.Identity()
        if inputs != channels or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, y: Tensor) -> Tensor:
        return F.relu(self.shortcut(y) + self.f(y))


class Slope(nn.Module):
    """dy/dt = relu(f(y))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = Convolutions(channels, channels)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.f(y))


@dataclass(frozen=True)
class Model:
    """A row of the table: the ResNet (gradient None), or the NODE with a gradient method and a solver."""

    name: str
    gradient: str | None = None
    method: str = ""
    tolerance: float = 0.0

    def build(self, inputs: int, widths: tuple[int, ...], n_classes: int) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for stage, channels in enumerate(widths):
            before, stride = (widths[stage - 1], 2) if stage else (channels, 1)
            layers += [Residual(before, channels, stride), self._second_block(channels)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes))

    def _second_block(self, channels: int) -> nn.Module:
        if self.gradient is None:
            return Residual(channels, channels)
        solver = {"method": self.method, "rtol": self.tolerance, "atol": self.tolerance}
        return aca_ext.NeuralODE(Slope(channels), (0, 1), gradient=self.gradient, **solver)

    @property
    def solver(self) -> str:
        return "-" if self.gradient is None else f"{self.method} {self.tolerance:g}"


RESNET = Model("ResNet")
ACA, ADJOINT, NAIVE = (
    Model(f"NODE {gradient}", gradient, *(("heun_euler", 1e-2) if gradient == "aca" else ("dopri5", 1e-5)))
    for gradient in three_gradients()
)
ADJOINT_LOOSE = Model("NODE adjoint, ACA's solver", "adjoint", "heun_euler", 1e-2)


@dataclass(frozen=True)
class Training:
    """Stochastic gradient descent, momentum 0.9, weight decay 5e-4; the rate falls to a tenth at each third."""

    widths: tuple[int, ...]
    epochs: int
    rate: float
    batch: int
    naive_batch: int  # smaller, since the naive method keeps the autograd graph of every trial step

    @staticmethod
    def at(settings: Settings) -> "Training":
        return settings.pick(
            Training((4, 8), 2, 0.05, 64, 64),
            Training((8, 16), 9, 0.05, 64, 64),
            Training((64, 128, 256, 512), 90, 0.1, 128, 32),
        )

    def rate_in(self, epoch: int) -> float:
        return self.rate * 0.1 ** (3 * epoch // self.epochs)


def run(settings: Settings) -> Report:
    images, training = Images.at(settings), Training.at(settings)
    seeds = {model: settings.pick(1, 3, 10 if model in (RESNET, ACA) else 3) for model in (RESNET, ACA, ADJOINT, NAIVE)}
    seeds[ADJOINT_LOOSE] = settings.pick(1, 3, 3)
    progress = Progress(settings, "image", {"images": images.name, "training": str(training), "models": str(seeds)})
    results: dict[Model, list[dict[str, Any]]] = {model: [] for model in seeds}
    with bar(training.epochs * sum(seeds.values()), "image") as ticks, repeatable(settings):
        for i in range(max(seeds.values())):  # seed by seed: a slow phase of the machine hits all models alike
            for model in seeds:
                if i < seeds[model]:
                    results[model].append(
                        trained(model, seed_of(settings, i), images, training, settings, progress, ticks.update)
                    )
    tables = [_comparison(images, results), _target(settings, results), _swapped(results)]
    figure = _draw(settings, images, results)
    progress.done()
    kept = {model.name: [_without_images(run) for run in runs] for model, runs in results.items()}
    return Report("image", tables, [figure], {"training": str(training), "runs": kept})


def seed_of(settings: Settings, i: int) -> int:
    return 1000 * settings.seed + i


def repeatable(settings: Settings) -> AbstractContextManager[None]:
    """Deterministic CUDA convolutions in full float32, precise enough for a tolerance of 1e-5; one thread on a CPU.

    Nets this small gain little from a second thread, and their times are steadier without it.
    """
    if settings.device.type == "cuda":
        return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    return harness.torch_threads(1)


def trained(
    model: Model,
    seed: int,
    images: Images,
    training: Training,
    settings: Settings,
    progress: Progress,
    tick: Callable[[int], object],
) -> dict[str, Any]:
    """Result of one training, which continues after the last epoch of an interrupted run.

    Returns a dict:
        ``curve``, a dict per epoch: ``seconds`` and ``cpu_seconds`` of training so far, the test ``error`` in percent,
        and ``forward`` and ``backward``, the f evaluations per batch of all ODE blocks;
        ``probability`` of the true class, a float per test image, and ``correct``, a bool per test image;
        for a NODE, ``gradient_error`` (see ``_gradient_error``) and ``swapped``, the test error in percent by solver;
        ``failure``, the solver's message if it failed after the first epoch, else "".
    """
    key = f"{model.name}, seed {seed}"
    result = progress.get(key)
    if result is not None:
        tick(training.epochs)
        return result
    torch.manual_seed(seed)
    net = model.build(images.train[0].shape[1], training.widths, images.n_classes).to(settings.device)
    optimizer = torch.optim.SGD(net.parameters(), training.rate, momentum=0.9, weight_decay=5e-4)
    curve: list[dict[str, float]] = []
    unfinished = progress.get(f"{key}, unfinished")
    if unfinished is not None:
        net.load_state_dict(unfinished["net"])
        optimizer.load_state_dict(unfinished["optimizer"])
        curve = list(unfinished["curve"])
        tick(len(curve))
    failure = ""
    size = training.naive_batch if model.gradient == "naive" else training.batch
    for epoch in range(len(curve), training.epochs):
        for group in optimizer.param_groups:
            group["lr"] = training.rate_in(epoch)
        try:
            point = _train_epoch(net, optimizer, images.batches(size, 1000 * seed + epoch))
        except aca_ext.errors.SolveError as stop:
            if not curve:
                raise
            failure = f"epoch {epoch + 1}: {stop}"
            print(f"{key} stopped in {failure}", file=sys.stderr)
            break
        point["error"] = 100 - 100 * _predictions(net, images)[1].float().mean().item()
        for clock in ("seconds", "cpu_seconds"):
            point[clock] += curve[-1][clock] if curve else 0.0
        curve.append(point)
        progress.put(
            f"{key}, unfinished", {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
        )
        tick(1)
    probability, correct = _predictions(net, images)
    result = {"parameters": sum(p.numel() for p in net.parameters()), "curve": curve, "failure": failure}
    result |= {"probability": probability.cpu(), "correct": correct.cpu()}
    if model.gradient is not None:
        result["gradient_error"] = _gradient_error(net, images.batches(size, 0)[0])
        result["swapped"] = _test_errors_with_other_solvers(net, images)
    progress.put(f"{key}, unfinished", None)
    progress.put(key, result)
    return result


def _train_epoch(
    net: nn.Sequential, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Trains on each batch; returns seconds and evaluations under the keys of ``trained``'s curve."""
    net.train()
    forward = backward = 0
    start, cpu_start = _now(batches[0][0]), time.process_time()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        for block in _ode_blocks(net):
            forward += block.stats.n_f_evals
            backward += block.stats.n_f_evals_backward or 0
    return {
        "seconds": _now(batches[0][0]) - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "forward": forward / len(batches),
        "backward": backward / len(batches),
    }


@torch.no_grad()
def _predictions(net: nn.Sequential, images: Images) -> tuple[Tensor, Tensor]:
    """For each test image: the probability of its true class, and True if that class is the most probable."""
    net.eval()
    logits = torch.cat([net(part) for part in images.test[0].split(TEST_BATCH)])
    labels = images.test[1]
    return logits.softmax(1).gather(1, labels[:, None]).squeeze(1), logits.argmax(1) == labels


def _gradient_error(net: nn.Sequential, batch: tuple[Tensor, Tensor]) -> float:
    """Relative error of the parameters' gradient against the exact one of the same forward solve, in float64."""
    net = copy.deepcopy(net).double().train()

    def gradient() -> Tensor:
        loss = F.cross_entropy(net(batch[0].double()), batch[1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    found = gradient()
    for block in _ode_blocks(net):
        block.settings["gradient"] = "direct"
    exact = gradient()
    return ((found - exact).norm() / exact.norm()).item()


def _test_errors_with_other_solvers(net: nn.Sequential, images: Images) -> dict[str, float]:
    """Test errors in percent; keys are "solver step" or "solver tolerance"."""
    net = copy.deepcopy(net)
    errors = {}
    solvers = [(method, {"options": {"step_size": h}}, h) for method, steps in FIXED_STEPS.items() for h in steps]
    solvers += [(method, {"rtol": x, "atol": x}, x) for method, tolerances in TOLERANCES.items() for x in tolerances]
    for method, setting, value in solvers:
        for block in _ode_blocks(net):
            block.settings = {"method": method, **setting}
        errors[f"{method} {value:g}"] = 100 - 100 * _predictions(net, images)[1].float().mean().item()
    return errors


def _ode_blocks(net: nn.Sequential) -> list[aca_ext.NeuralODE]:
    return [layer for layer in net if isinstance(layer, aca_ext.NeuralODE)]


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _comparison(images: Images, results: dict[Model, list[dict[str, Any]]]) -> Table:
    rows, failures = [], []
    for model, runs in results.items():
        errors = [final_error(run) for run in runs]
        last = [run["curve"][-1] for run in runs]
        middle = {
            name: median(point[name] for point in last) for name in ("seconds", "cpu_seconds", "forward", "backward")
        }
        paper = PAPER_CIFAR10.get(model.gradient, (None, None)) if model is not ADJOINT_LOOSE else (None, None)
        ode = model.gradient is not None
        rows.append(
            (
                model.name,
                model.solver,
                runs[0]["parameters"],
                f"{median(errors):.2f}",
                f"{min(errors):.2f} to {max(errors):.2f}",
                f"{middle['seconds']:.1f}",
                f"{middle['cpu_seconds']:.1f}",
                f"{middle['forward']:.0f} + {middle['backward']:.0f}" if ode else None,
                f"{median(run['gradient_error'] for run in runs):.1e}" if ode else None,
                *paper,
            )
        )
        failures += [f"{model.name} stopped in {run['failure']}" for run in runs if run["failure"]]
    columns = (
        "model",
        "solver",
        "parameters",
        "error % (median)",
        "error % (all seeds)",
        "seconds",
        "CPU seconds",
        "f evaluations",
        "gradient error",
        "paper error %",
        "paper hours",
    )
    note = (
        f"{len(images.train[1])} training and {len(images.test[1])} test images; "
        f"medians of {len(results[ADJOINT])} seeds ({len(results[ACA])} of ResNet and ACA).\n"
        "Seconds of the whole training; CPU seconds are the process's, which other load does not stretch.\n"
        "f evaluations: forward + backward per batch, last epoch; naive keeps graphs, so none backward.\n"
        "Gradient error: relative to backpropagation through the accepted steps, in float64, of the trained net.\n"
    )
    return Table(f"{images.name}: NODE against ResNet", columns, rows, "\n".join([note + PAPER_NOTE, *failures]))


def final_error(run: dict[str, Any]) -> float:
    """Test error in percent after the last epoch; 100 for a run that failed."""
    return 100.0 if run["failure"] else run["curve"][-1]["error"]


def _target(settings: Settings, results: dict[Model, list[dict[str, Any]]]) -> Table:
    clock, clock_name = ("cpu_seconds", "CPU seconds") if settings.device.type == "cpu" else ("seconds", "seconds")
    rows = []
    for other in (ADJOINT, NAIVE, ADJOINT_LOOSE):
        pairs = list(zip(results[ACA], results[other], strict=False))
        error, error_other = (median(final_error(pair[i]) for pair in pairs) for i in (0, 1))
        time_, time_other = (median(pair[i]["curve"][-1][clock] for pair in pairs) for i in (0, 1))
        evaluations, evaluations_other = (
            median(pair[i]["curve"][-1]["forward"] + pair[i]["curve"][-1]["backward"] for pair in pairs) for i in (0, 1)
        )
        in_twice_the_time = median(_error_after(them, clock, 2 * us["curve"][-1][clock]) for us, them in pairs)
        errors, times = _ratio(error, error_other), _ratio(time_, time_other)
        rows.append(
            (
                other.name,
                f"{errors:.2f} ({_reached(errors)})",
                f"{times:.2f} ({_reached(times)})",
                f"{evaluations / evaluations_other:.2f}",
                f"{in_twice_the_time:.2f} ({_reached(_ratio(error, in_twice_the_time))})",
            )
        )
    return Table(
        "ACA over the others: at most half the error in at most half the time?",
        ("against", "error ratio", "time ratio", "f evaluations ratio", "its error % in twice ACA's time"),
        rows,
        f"Ratios of medians after equally many epochs; yes: at most 0.5. Time: {clock_name}. Last column: the other's "
        "error after\nthe last epoch that ended by then; yes: ACA's is at most half of it.",
    )


def _error_after(run: dict[str, Any], clock: str, seconds: float) -> float:
    """Test error of the last epoch that ended within ``seconds``; 100 if none did."""
    return next((point["error"] for point in reversed(run["curve"]) if point[clock] <= seconds), 100.0)


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("inf") if a else 1.0


def _reached(ratio: float) -> str:
    return "yes" if ratio <= 0.5 else "no"


def _swapped(results: dict[Model, list[dict[str, Any]]]) -> Table:
    nodes = [model for model in results if model.gradient is not None]
    rows = []
    for kind, solvers in (("step", FIXED_STEPS), ("tolerance", TOLERANCES)):
        for method, values in solvers.items():
            for x in values:
                changes = [_change(results[model], f"{method} {x:g}") for model in nodes]
                rows.append((method, f"{kind} {x:g}", *(f"{change:+.2f}" for change in changes)))
    return Table(
        "other solvers at test time: change of the error in percentage points",
        ("solver", "", *(model.name for model in nodes)),
        rows,
        "Medians over the seeds; each column against the solver that its net was trained with. midpoint is the paper's "
        "RK2,\nrk4_classic its RK4, bosh3 its RK23, dopri5 its RK45.",
    )


def _change(runs: list[dict[str, Any]], solver: str) -> float:
    return median(run["swapped"][solver] - 100 + 100 * run["correct"].float().mean().item() for run in runs)


def _draw(settings: Settings, images: Images, results: dict[Model, list[dict[str, Any]]]):
    figure = new_figure(12, 8)
    (over_epochs, over_time), (steps, tolerances) = figure.subplots(2, 2)
    for color, (model, runs) in enumerate(results.items()):
        curves = [run["curve"] for run in runs if len(run["curve"]) == max(len(run["curve"]) for run in runs)]
        epochs_of_runs = list(zip(*curves, strict=True))
        seconds = [median(point["seconds"] for point in epoch) for epoch in epochs_of_runs]
        errors = [[point["error"] for point in epoch] for epoch in epochs_of_runs]
        middle = [median(x) for x in errors]
        epochs = range(1, len(middle) + 1)
        style = {"color": f"C{color}", "label": model.name, "marker": "o", "markersize": 3}
        over_epochs.plot(epochs, middle, **style)
        over_epochs.fill_between(
            epochs, [min(x) for x in errors], [max(x) for x in errors], color=f"C{color}", alpha=0.12
        )
        over_time.plot(seconds, middle, **style)
    for axes, label in ((over_epochs, "epoch"), (over_time, "training time [s]")):
        axes.set(xlabel=label, ylabel="test error [%]", yscale="log", title=f"{images.name}, median of the seeds")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize=8)
    over_epochs.xaxis.get_major_locator().set_params(integer=True)
    for axes, solvers, label in ((steps, FIXED_STEPS, "step"), (tolerances, TOLERANCES, "tolerance")):
        for n, (method, values) in enumerate(solvers.items()):
            for model, line in ((ACA, "o-"), (ADJOINT, "x:")):
                changes = [_change(results[model], f"{method} {x:g}") for x in values]
                axes.semilogx(values, changes, line, color=f"C{n}", label=f"{method}, {model.name}")
        axes.set(xlabel=label, ylabel="change of the error [points]", title="solver swapped at test time")
        axes.legend(fontsize=8)
    for axes in (over_epochs, over_time, steps, tolerances):
        axes.grid(alpha=0.3)
    return save_figure(settings, figure, "image")


def _without_images(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in ("probability", "correct")}
