"""Hamiltonian network: the energy of a pendulum is learnt, and derivatives inside func move the state."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from aca_ext import odeint
from aca_ext.examples.result import Result

TOLERANCES = {"rtol": 1e-4, "atol": 1e-5}


class HamiltonianField(nn.Module):
    """dq/dt = ∂H/∂p and dp/dt = -∂H/∂q for a network H(q, p)."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=True)
        return torch.stack((slope[..., 1], -slope[..., 0]), -1)


def energy(y: Tensor) -> Tensor:
    """Energy of the pendulum that made the data."""
    q, p = y.unbind(-1)
    return p * p / 2 - q.cos()


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    """Its equations of motion."""
    q, p = y.unbind(-1)
    return torch.stack((p, -q.sin()), -1)


def run(quick: bool = False) -> Result:
    """Learns from short noisy trajectories, then follows the learnt pendulum for a long time."""
    torch.manual_seed(0)
    iterations, n = (8, 32) if quick else (300, 128)
    t = torch.linspace(0.0, 2.0, 6)
    start = torch.stack((4 * torch.rand(n) - 2, 2 * torch.rand(n) - 1), 1)
    data = odeint(pendulum, start, t, **TOLERANCES)
    data = data + 0.01 * torch.randn_like(data)

    field = HamiltonianField()
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    losses = []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = (odeint(field, data[0], t, **TOLERANCES) - data).square().mean()
        loss.backward()  # through the derivative of the energy
        optimizer.step()
        losses.append(loss.item())

    long = torch.linspace(0.0, 10.0 if quick else 60.0, 400)
    with torch.no_grad():
        path = odeint(field, torch.tensor([1.5, 0.0]), long, **TOLERANCES)
        own = field.energy(path).squeeze(-1)
    drift = (own - own[0]).abs().max().item() / (own.max() - field.energy(torch.zeros(2))).abs().item()
    numbers = {"first loss": losses[0], "last loss": losses[-1], "relative drift of its energy": drift}
    return Result(numbers, draw(field, path, long))


@torch.no_grad()
def draw(field: HamiltonianField, path: Tensor, t: Tensor) -> Figure:
    """Draws the levels of both energies, and the energy along the learnt motion."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    q, p = torch.meshgrid(torch.linspace(-2.5, 2.5, 60), torch.linspace(-2, 2, 60), indexing="xy")
    states = torch.stack((q, p), -1)
    true, learnt, over_time = figure.subplots(1, 3)
    for axes, title, levels in (
        (true, "True energy", energy(states)),
        (learnt, "Learnt energy", field.energy(states)[..., 0]),
    ):
        axes.contour(q, p, levels, 12)
        axes.set(title=title, xlabel="q", ylabel="p")
    learnt.plot(*path.T, color="C3", linewidth=1)
    over_time.plot(t, energy(path))
    over_time.set(title="True energy of the learnt motion", xlabel="t", ylim=(-1.1, 1.1))
    return figure
