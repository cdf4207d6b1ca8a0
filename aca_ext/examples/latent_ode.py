"""Latent ODE: a model of series that were observed at irregular times, each at its own."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from aca_ext import odeint
from aca_ext.examples.result import Result

SETTINGS = {"rtol": 1e-3, "atol": 1e-3, "options": {"batch": "independent"}}  # every series has times of its own
LATENT = 4


class LatentODE(nn.Module):
    """A recurrent encoder reads a series backward; an ODE carries the latent state forward; a line decodes it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(2, 32, batch_first=True)
        self.to_start = nn.Linear(32, 2 * LATENT)
        self.slope = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, LATENT))
        self.decoder = nn.Linear(LATENT, 1)

    def encode(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of the latent state at t = 0; t and x are (batch, T)."""
        gaps = torch.diff(t, dim=1, prepend=torch.zeros_like(t[:, :1]))
        _, hidden = self.encoder(torch.stack((x, gaps), -1).flip(1))
        mean, log_std = self.to_start(hidden[0]).chunk(2, -1)
        return mean, log_std

    def decode(self, z: Tensor, t: Tensor) -> Tensor:
        """Values at the times t (batch, T), from latent states z at t = 0."""
        from_zero = torch.cat((torch.zeros_like(t[:, :1]), t), 1)
        states = odeint(lambda _, y: self.slope(y), z, from_zero, **SETTINGS)  # (T + 1, batch, LATENT)
        return self.decoder(states[1:]).squeeze(-1).T


def series(n: int, points: int) -> tuple[Tensor, Tensor]:
    """Damped sine waves of random phase, with noise, at random times: t and x, both (n, points)."""
    t = torch.rand(n, points).mul(5.5).add(0.05).sort(1).values + 1e-3 * torch.arange(points)
    return t, wave(t, 6.28 * torch.rand(n, 1)) + 0.05 * torch.randn(n, points)


def wave(t: Tensor, phase: Tensor) -> Tensor:
    """A damped sine wave."""
    return torch.exp(-0.1 * t) * torch.sin(2 * t + phase)


def run(quick: bool = False) -> Result:
    """Trains on the evidence lower bound, then draws series that were not seen."""
    torch.manual_seed(0)
    iterations, n = (6, 16) if quick else (400, 64)
    model = LatentODE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for i in range(iterations):
        t, x = series(n, 12)
        mean, log_std = model.encode(t, x)
        found = model.decode(mean + log_std.exp() * torch.randn_like(mean), t)
        error = ((found - x) / 0.1).square().sum(1) / 2
        divergence = (mean.square() / 2 + (2 * log_std).exp() / 2 - log_std - 0.5).sum(1)
        loss = (error + min(1.0, i / 200) * divergence).mean()  # the divergence is switched on slowly
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((found - x).detach().square().mean().sqrt().item())
    return Result({"first error": losses[0], "last error": losses[-1]}, draw(model))


@torch.no_grad()
def draw(model: LatentODE) -> Figure:
    """Draws four new series with the curves that the model finds, which go on beyond the last observation."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    t, x = series(4, 12)
    dense = torch.linspace(0.01, 9.0, 150).expand(4, -1)
    mean, log_std = model.encode(t, x)
    for i, axes in enumerate(figure.subplots(2, 2, sharex=True, sharey=True).flat):
        for _ in range(8):
            curve = model.decode(mean + log_std.exp() * torch.randn_like(mean), dense)[i]
            axes.plot(dense[i], curve, color="C1", alpha=0.4)
        axes.plot(t[i], x[i], "o", color="C0", label="observed")
        axes.plot([], [], color="C1", label="drawn from the model")
        axes.axvspan(5.6, 9.0, color="0.93", zorder=0)
    axes.legend(loc="lower right", fontsize="small")
    figure.suptitle("Series at irregular times, continued (grey) by the model")
    return figure
