"""Training of one net on images, which can be interrupted after any epoch, and tests of the trained net."""

import copy
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aca_ext
from benchmarks import harness
from benchmarks.paper.common import Progress, Settings
from benchmarks.paper.image_models import Model
from benchmarks.paper.images import Images

FIXED_STEPS = dict.fromkeys(("euler", "midpoint", "rk4_classic"), (1.0, 0.5, 0.25, 0.1))
TOLERANCES = dict.fromkeys(("heun_euler", "bosh3", "dopri5"), (1e-1, 1e-2, 1e-3, 1e-4))
TEST_BATCH = 500


@dataclass(frozen=True)
class Training:
    """Stochastic gradient descent, momentum 0.9, weight decay 5e-4; the rate falls to a tenth at each third."""

    widths: tuple[int, ...]
    stride: int  # of the first convolution
    epochs: int
    rate: float
    batch: int
    naive_batch: int  # smaller, since the naive method keeps the autograd graph of every trial step

    @staticmethod
    def at(settings: Settings) -> "Training":
        return settings.pick(
            Training((4, 8), 1, 2, 0.05, 64, 64),
            Training((8, 16), 2, 6, 0.05, 64, 64),
            Training((64, 128, 256, 512), 1, 12, 0.1, 128, 128),
        )

    def rate_in(self, epoch: int) -> float:
        return self.rate * 0.1 ** (3 * epoch // self.epochs)


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
) -> dict[str, Any] | None:
    """Result of one training, which continues after the last epoch of an interrupted run; None if time is up.

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
    net = model.build(images.train[0].shape[1], training.widths, images.n_classes, training.stride).to(settings.device)
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
        if not settings.goes_on_with(key):
            return None
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
        point["error"] = 100 - 100 * predictions(net, images)[1].float().mean().item()
        for clock in ("seconds", "cpu_seconds"):
            point[clock] += curve[-1][clock] if curve else 0.0
        curve.append(point)
        progress.put(
            f"{key}, unfinished", {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}
        )
        tick(1)
    result = {"curve": curve, "failure": failure, **_tested(net, images, size)}
    progress.put(f"{key}, unfinished", None)
    progress.put(key, result)
    return result


def _tested(net: nn.Sequential, images: Images, batch: int) -> dict[str, Any]:
    """The items of ``trained``'s result that depend on the trained net alone."""
    probability, correct = predictions(net, images)
    found = {"parameters": sum(p.numel() for p in net.parameters())}
    found |= {"probability": probability.cpu(), "correct": correct.cpu()}
    if ode_blocks(net):
        found["gradient_error"] = _gradient_error(net, images.batches(batch, 0)[0])
        found["swapped"] = _test_errors_with_other_solvers(net, images)
    return found


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
        for block in ode_blocks(net):
            forward += block.stats.n_f_evals
            backward += block.stats.n_f_evals_backward or 0
    return {
        "seconds": _now(batches[0][0]) - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "forward": forward / len(batches),
        "backward": backward / len(batches),
    }


@torch.no_grad()
def predictions(net: nn.Sequential, images: Images) -> tuple[Tensor, Tensor]:
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
    for block in ode_blocks(net):
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
        for block in ode_blocks(net):
            block.settings = {"method": method, **setting}
        errors[f"{method} {value:g}"] = 100 - 100 * predictions(net, images)[1].float().mean().item()
    return errors


def ode_blocks(net: nn.Sequential) -> list[aca_ext.NeuralODE]:
    return [layer for layer in net if isinstance(layer, aca_ext.NeuralODE)]


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def final_error(run: dict[str, Any]) -> float:
    """Test error in percent after the last epoch; 100 for a run that failed."""
    return 100.0 if run["failure"] else run["curve"][-1]["error"]
