"""The demo: trains a neural-ODE image classifier with each gradient method; compares accuracy, time and memory."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aca_ext.errors import AcaError
from aca_ext.examples.command import can_be_written, report_missing
from aca_ext.gradients import GRADIENTS
from aca_ext.neural_ode import NeuralODE
from aca_ext.numerics.methods import ALIASES, METHODS
from aca_ext.tensor_memory import TensorMemory

_COMPARED = ("aca", "adjoint", "naive")
_BATCH = 64
_TOLERANCE = 1e-2  # as for the image classifiers of Zhuang et al., ICML 2020


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the demo to its command-line parser."""
    adaptive = [name for name, tableau in METHODS.items() if tableau.adaptive]
    parser.add_argument("--gradient", nargs="+", choices=list(GRADIENTS), default=list(_COMPARED), metavar="NAME",
                        help=f"gradient methods to compare, from {', '.join(GRADIENTS)}")  # fmt: skip
    parser.add_argument("--method", choices=[*adaptive, *ALIASES], default="heun_euler", metavar="NAME",
                        help=f"Runge-Kutta method, one of {', '.join([*adaptive, *ALIASES])}")  # fmt: skip
    parser.add_argument("--epochs", type=_positive, default=20, metavar="N", help="passes over the training images")
    parser.add_argument("--device", default="cpu", help='"cpu", "cuda" or "cuda:1"')
    parser.add_argument("--output", type=Path, default=Path("aca_demo.png"), metavar="FILE", help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and batches")


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo with parsed arguments; returns the exit status."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as missing:
        return report_missing("The demo", missing)
    try:
        device = torch.device(arguments.device)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"--device {arguments.device} is not available here: {error}", file=sys.stderr)
        return 1
    if not can_be_written(arguments.output):
        return 1
    images, labels, test_images, test_labels = _digits(device)
    print(
        f"{len(labels)} training and {len(test_labels)} test images of handwritten digits (UCI, via scikit-learn); "
        f"{arguments.method}, rtol = atol = {_TOLERANCE:g}, on {device}\n"
    )
    runs: list[Run] = []
    for name in dict.fromkeys(arguments.gradient):
        runs.append(_train(name, arguments, (images, labels), (test_images, test_labels)))
    print()
    print(_table(runs))
    _draw(runs, arguments)
    print(f"\nPicture written to {arguments.output}")
    return 0


@dataclass
class Run:
    """Result and cost of training with one gradient method.

    Attributes:
        accuracy: fraction of correct test images after the last epoch.
        seconds: time spent on training.
        n_f_evals: evaluations of func in all forward and backward passes.
        peak_memory: largest memory of tensors in one training step, in bytes.
        gradient_error: relative error of the gradient, see ``_gradient_error``.
        failure: message of the error that ended the training; empty without one.
        curve: pairs (seconds, accuracy), one per epoch.
    """

    gradient: str
    accuracy: float = 0.0
    seconds: float = 0.0
    n_f_evals: int = 0
    peak_memory: int = 0
    gradient_error: float = 0.0
    failure: str = ""
    curve: list[tuple[float, float]] = field(default_factory=lambda: list[tuple[float, float]]())


class _Slope(nn.Module):
    """f(t, y): two convolutions with the time as an additional channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        time_channel = t.expand(y.shape[0], 1, *y.shape[2:])
        y = torch.tanh(self.conv1(torch.cat([y, time_channel], 1)))
        return torch.tanh(self.conv2(torch.cat([y, time_channel], 1)))


def _classifier(gradient: str, method: str) -> nn.Sequential:
    channels = 16
    ode = NeuralODE(_Slope(channels), gradient=gradient, method=method, rtol=_TOLERANCE, atol=_TOLERANCE)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), ode, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(channels * 16, 10),
    )  # fmt: skip


def _digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    parts: Any = train_test_split(data.images / 16.0, data.target, test_size=0.2, random_state=0, stratify=data.target)
    images, test_images = (torch.tensor(x, dtype=torch.float32, device=device).unsqueeze(1) for x in parts[:2])
    labels, test_labels = (torch.tensor(x, dtype=torch.int64, device=device) for x in parts[2:])
    return images, labels, test_images, test_labels


def _train(
    gradient: str, arguments: argparse.Namespace, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> Run:
    from tqdm import tqdm

    torch.manual_seed(arguments.seed)
    result = Run(gradient)
    model = _classifier(gradient, arguments.method).to(train[0].device)
    ode = model[2]
    assert isinstance(ode, NeuralODE)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    batches = -(-len(train[1]) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=arguments.epochs * batches)
    generator = torch.Generator().manual_seed(arguments.seed)
    progress: Any = tqdm(total=arguments.epochs * batches, desc=f"{gradient:8}", unit="batch")
    try:
        for _ in range(arguments.epochs):
            start = time.perf_counter()
            for chosen in torch.randperm(len(train[1]), generator=generator).split(_BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
                optimizer.step()
                schedule.step()
                assert ode.stats is not None
                result.n_f_evals += ode.stats.n_f_evals + (ode.stats.n_f_evals_backward or 0)
                progress.update()
            result.seconds += time.perf_counter() - start
            result.accuracy = _accuracy(model, test)
            result.curve.append((result.seconds, result.accuracy))
            progress.set_postfix(test_accuracy=f"{result.accuracy:.1%}")
        batch = (train[0][: 2 * _BATCH], train[1][: 2 * _BATCH])
        result.gradient_error = _gradient_error(model, ode, batch)
        result.peak_memory = _peak_memory(model, batch)
    except AcaError as error:
        result.failure = f"{type(error).__name__}: {error}"
    progress.close()
    return result


@torch.no_grad()
def _accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    return (model(test[0]).argmax(1) == test[1]).float().mean().item()


def _gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def _gradient_error(model: nn.Module, ode: NeuralODE, batch: tuple[Tensor, Tensor]) -> float:
    """Relative error of the gradient; the reference is backpropagation through the accepted steps, which is exact.

    Computed in float64 with the trained weights, so that rounding does not hide the error of the method.
    """
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    own = ode.settings["gradient"]
    try:
        model.double()
        batch = (batch[0].double(), batch[1])
        found = _gradients(model, batch)
        ode.settings["gradient"] = "direct"
        exact = _gradients(model, batch)
    finally:
        ode.settings["gradient"] = own
        model.float().load_state_dict(weights)
    return ((found - exact).norm() / exact.norm()).item()


def _peak_memory(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    with TensorMemory() as memory:
        _gradients(model, batch)
    return memory.peak


def _table(runs: list[Run]) -> str:
    lines = ["gradient   test accuracy   seconds   f evaluations   peak memory   gradient error"]
    for r in runs:
        if r.failure:
            lines.append(f"{r.gradient:8}   failed: {r.failure}")
            continue
        lines.append(
            f"{r.gradient:8}   {r.accuracy:13.2%}   {r.seconds:7.1f}   {r.n_f_evals:13d}   "
            f"{r.peak_memory / 2**20:7.1f} MiB   {r.gradient_error:14.1e}"
        )
    lines.append(
        "f evaluations: forward and backward passes (naive has none in backward: it stores the autograd graph).\n"
        "Peak memory: tensors of one training step. Gradient error: relative to backpropagation through the accepted\n"
        "steps, in float64."
    )
    return "\n".join(lines)


def _draw(runs: list[Run], arguments: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure: Any = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over_time, errors = figure.subplots(1, 2, width_ratios=(3, 2))
    done = [r for r in runs if not r.failure]
    for r in done:
        over_time.plot(*zip(*r.curve, strict=True), marker="o", markersize=3, label=r.gradient)
    over_time.set(xlabel="training time [s]", ylabel="test accuracy", title=f"Handwritten digits, {arguments.method}")
    over_time.yaxis.set_major_formatter(PercentFormatter(1.0))  # chooses the number of digits by the ticks
    over_time.grid(alpha=0.3)
    if done:
        over_time.legend()
    for i, r in enumerate(done):
        errors.bar(i, max(r.gradient_error, 1e-17), color=f"C{i}")
        errors.annotate(f"{r.gradient_error:.0e}", (i, max(r.gradient_error, 1e-17)), ha="center", va="bottom")
    errors.set_yscale("log")
    errors.set_ylim(1e-17, 10)
    errors.set_xticks(range(len(done)), [r.gradient for r in done])
    errors.set(ylabel="relative to the exact discrete gradient", title="Gradient error, float64")
    figure.savefig(arguments.output, dpi=150, format="png")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1; give one, such as 20")
    return int(text)
