"""Continuous normalizing flow: a density of two moons, by exact log-likelihoods."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from aca_ext import flows
from aca_ext.examples.result import Result

TIMES = (0.0, 1.0)  # from the base distribution to the data
SETTINGS = {"rtol": 1e-3, "atol": 1e-3}


class Velocity(nn.Module):
    """Velocity of a particle at time t."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat((y, t.expand(len(y), 1)), 1))


def two_moons(n: int) -> Tensor:
    """Points of two interleaved half circles with noise, (n, 2)."""
    angle = torch.pi * torch.rand(n)
    upper = torch.stack((angle.cos(), angle.sin()), 1)
    lower = torch.stack((1 - angle.cos(), 0.5 - angle.sin()), 1)
    points = torch.where(torch.rand(n, 1) < 0.5, upper, lower) - torch.tensor([0.5, 0.25])
    return 1.5 * points + 0.1 * torch.randn(n, 2)


def run(quick: bool = False) -> Result:
    """Maximises the log-likelihood of the data."""
    torch.manual_seed(0)
    iterations, n = (5, 64) if quick else (400, 256)
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    field = flows.with_divergence(Velocity(8 if quick else 64), "exact")  # one field for all solves
    optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = -flows.log_prob(field, two_moons(n), TIMES, base, **SETTINGS).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        numbers = {"first loss": losses[0], "last loss": losses[-1], "mass on the plane": mass(field, base, quick)}
        return Result(numbers, draw(field, base, 200 if quick else 2000, quick))


def grid(quick: bool) -> tuple[Tensor, int, float]:
    """Points of a square of edge 8, (edge², 2), points per edge, and the area of one."""
    edge = 24 if quick else 80
    line = (torch.arange(edge) + 0.5) / edge * 8 - 4
    x, y = torch.meshgrid(line, line, indexing="xy")
    return torch.stack((x.reshape(-1), y.reshape(-1)), 1), edge, (8 / edge) ** 2


def mass(field: flows.DivergenceField, base: Independent, quick: bool) -> float:
    """Integral of the density over the square, which must be close to 1: the densities are normalised."""
    points, _, area = grid(quick)
    return flows.log_prob(field, points, TIMES, base, **SETTINGS).exp().sum().item() * area


def draw(field: flows.DivergenceField, base: Independent, n: int, quick: bool) -> Figure:
    """Draws the data, samples of the flow, and its density."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    points, edge, _ = grid(quick)
    density = flows.log_prob(field, points, TIMES, base, **SETTINGS).exp().reshape(edge, edge)
    data, samples, plane = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, title, values in (
        (data, "Data", two_moons(n)),
        (samples, "Samples of the flow", flows.sample(field, n, TIMES, base, **SETTINGS)),
    ):
        axes.plot(*values.T, ".", markersize=2)
        axes.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    plane.imshow(density.numpy(), origin="lower", extent=(-4, 4, -4, 4), cmap="viridis")
    plane.set(title="Density of the flow", xlim=(-3, 3), ylim=(-3, 3))
    return figure
