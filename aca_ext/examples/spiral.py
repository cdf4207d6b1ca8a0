"""Spiral: a neural ODE learns a vector field from noisy points of one trajectory."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from aca_ext import odeint
from aca_ext.examples.result import Result

TOLERANCES = {"rtol": 1e-4, "atol": 1e-5}


class Field(nn.Module):
    """dy/dt as a small network of y."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y**3)


def true_slope(t: Tensor, y: Tensor) -> Tensor:
    """The field that made the data."""
    return y**3 @ torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])


def run(quick: bool = False) -> Result:
    """Trains on short pieces of the trajectory, then draws it from its start to its end."""
    torch.manual_seed(0)
    iterations, points, piece = (15, 100, 5) if quick else (500, 400, 20)
    t, start = torch.linspace(0.0, 10.0, points), torch.tensor([[2.0, 0.0]])
    data = odeint(true_slope, start, t, **TOLERANCES)[:, 0]  # (points, 2)
    noisy = data + 0.02 * torch.randn_like(data)

    field = Field()
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses = []
    for _ in range(iterations):
        first = torch.randint(points - piece, (32,))  # where the pieces start
        target = torch.stack([noisy[first + i] for i in range(piece)])  # (piece, 32, 2)
        optimizer.zero_grad()
        found = odeint(field, noisy[first], t[:piece], **TOLERANCES)  # all pieces in one solve
        loss = (found - target).abs().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        learnt = odeint(field, start, t, **TOLERANCES)[:, 0]
    return Result({"first loss": losses[0], "last loss": losses[-1]}, draw(noisy, data, learnt, losses))


def draw(noisy: Tensor, data: Tensor, learnt: Tensor, losses: list[float]) -> Figure:
    """Draws the trajectory with the learnt one, and the loss."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    plane, progress = figure.subplots(1, 2)
    plane.plot(*noisy.T, ".", color="0.75", label="data")
    plane.plot(*data.T, color="C0", label="true")
    plane.plot(*learnt.T, "--", color="C1", label="learnt, one solve from the start")
    plane.set(aspect="equal", title="Trajectory", ylim=(-2, 3.1))
    plane.legend(loc="upper center", fontsize="small")
    progress.semilogy(losses)
    progress.set(xlabel="iteration", ylabel="mean absolute error of a piece", title="Training")
    return figure
