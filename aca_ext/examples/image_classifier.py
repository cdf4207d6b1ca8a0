"""Image classifier: a neural ODE between convolutions, trained under autocast (AMP), by several processes (DDP)."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from aca_ext import NeuralODE
from aca_ext.examples.result import Result


class Slope(nn.Module):
    """Two convolutions with the time as an additional channel, and GroupNorm, which suits every time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv1 = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels + 1, channels, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        time = t.expand(len(y), 1, *y.shape[2:])
        y_next = torch.relu(self.conv1(torch.cat((self.norm(y), time), 1)))
        # Convolutions run in bfloat16 under autocast; the state, and so the slope, stays in float32.
        return self.conv2(torch.cat((y_next, time), 1)).to(y.dtype)


class Classifier(nn.Module):
    """Lifts an image to channels, moves them by an ODE, and reads the class."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.lift = nn.Conv2d(1, channels, 3, padding=1)
        self.ode = NeuralODE(Slope(channels), method="adaptive_heun", rtol=1e-2, atol=1e-2)
        self.read = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * channels, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.read(self.ode(self.lift(images).float()))


def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits of scikit-learn: images (1797, 1, 8, 8) and labels, shuffled."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = torch.randperm(len(found.target))
    images, labels = torch.tensor(found.images, dtype=torch.float32), torch.tensor(found.target)
    return images[order].unsqueeze(1) / 16, labels[order].long()


def shared_by_processes(model: nn.Module) -> tuple[nn.Module, slice]:
    """The model whose gradients are averaged over the processes that torchrun started, and this one's share of a batch.

    The model is wrapped and not the vector field, which the solver evaluates many times in each backward pass.
    """
    if not distributed.is_torchelastic_launched():
        return model, slice(None)
    distributed.init_process_group("gloo")
    return DistributedDataParallel(model), slice(distributed.get_rank(), None, distributed.get_world_size())


def run(quick: bool = False) -> Result:
    """Trains with the forward pass under autocast. On a GPU, give device_type="cuda"."""
    torch.manual_seed(0)
    epochs, training = (3, 512) if quick else (8, 1437)
    images, labels = digits()
    model = Classifier()
    trained, share = shared_by_processes(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    accuracies = []
    for _ in range(epochs):
        for chosen in torch.randperm(training).split(64):
            optimizer.zero_grad()
            with torch.autocast(device_type="cpu", dtype=torch.bfloat16):  # the backward pass replays under it, too
                loss = nn.functional.cross_entropy(trained(images[chosen[share]]), labels[chosen[share]])
            loss.backward()
            optimizer.step()
        with torch.no_grad(), torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            guesses = model(images[1437:]).argmax(1)
        accuracies.append((guesses == labels[1437:]).float().mean().item())
    if distributed.is_initialized():
        distributed.destroy_process_group()
    numbers = {"test accuracy": accuracies[-1], "evaluations per solve": float(model.ode.stats.n_f_evals)}
    return Result(numbers, draw(images[1437:], guesses, labels[1437:], accuracies))


def draw(images: Tensor, guesses: Tensor, labels: Tensor, accuracies: list[float]) -> Figure:
    """Draws the accuracy, and test images with their guesses: wrong ones first, in red."""
    figure: Any = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    axes = left.subplots()
    axes.plot(range(1, len(accuracies) + 1), accuracies, "o-")
    axes.set(xlabel="epoch", ylabel="accuracy on test images")
    order = (guesses == labels).int().argsort(stable=True)
    for i, panel in zip(order.tolist(), right.subplots(3, 6).flat, strict=False):
        panel.imshow(images[i, 0].numpy(), cmap="gray_r")
        panel.set_axis_off()
        panel.set_title(int(guesses[i]), color="C0" if guesses[i] == labels[i] else "C3", fontsize="small")
    return figure
