"""Flow matching: a velocity is learnt without any solve, and sampled with fixed steps."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from aca_ext import odeint
from aca_ext.examples.result import Result

STEPS = (1, 4, 32)
SPREAD = 0.15


class Velocity(nn.Module):
    """Velocity of a particle at time t, which is a number for all or one for each particle."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat((y, t.expand(len(y), 1)), 1))


def centres() -> Tensor:
    """Centres of the eight clusters of the data, (8, 2)."""
    angles = torch.arange(8) * torch.pi / 4
    return 2 * torch.stack((angles.cos(), angles.sin()), 1)


def data(n: int) -> Tensor:
    """Points of the eight clusters, (n, 2)."""
    return centres()[torch.randint(8, (n,))] + SPREAD * torch.randn(n, 2)


def run(quick: bool = False) -> Result:
    """Learns the velocity of straight lines from noise to data, and samples with more and more Euler steps."""
    torch.manual_seed(0)
    iterations, n = (100, 256) if quick else (6000, 512)
    velocity = Velocity()
    optimizer = torch.optim.Adam(velocity.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        start, end, t = torch.randn(n, 2), data(n), torch.rand(n, 1)
        loss = (velocity(t, (1 - t) * start + t * end) - (end - start)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    noise = torch.randn(2000, 2)
    drawn = {}
    for steps in STEPS:
        with torch.no_grad():  # no graph and no checkpoints
            drawn[steps] = odeint(velocity, noise, [0.0, 1.0], method="euler", options={"n_steps": steps})[-1]
    numbers = {f"near a centre, {steps} steps": near_a_centre(y) for steps, y in drawn.items()}
    return Result({"loss": loss.item()} | numbers, draw(drawn))


def near_a_centre(y: Tensor) -> float:
    """Part of the samples that are closer than three standard deviations to a centre."""
    return (torch.cdist(y, centres()).amin(1) < 3 * SPREAD).float().mean().item()


def draw(drawn: dict[int, Tensor]) -> Figure:
    """Draws the samples beside the data."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = {"Data": data(2000)} | {f"Euler steps: {steps}": y for steps, y in drawn.items()}
    for axes, (title, y) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.plot(*y.T, ".", markersize=2)
        axes.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    return figure
