"""Stiff chemistry: rates of Robertson's reaction over nine orders of magnitude, by an implicit method."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from aca_ext import Solution, solve
from aca_ext.examples.result import Result

TRUE_RATES = torch.tensor([0.04, 3e7, 1e4], dtype=torch.float64)
SCALE = torch.tensor([1.0, 3e-5, 1.0], dtype=torch.float64)  # typical size of each concentration


def robertson(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """A → B, B + B → B + C, B + C → A + C."""
    a, b, c = y.unbind()
    slow, fast, back = rates[0] * a, rates[1] * b * b, rates[2] * b * c
    return torch.stack((back - slow, slow - back - fast, fast))


def react(rates: Tensor, t: Tensor) -> Solution:
    """Solves with rodas5p, whose steps follow the slow reaction; it needs one Jacobian and no iterations per step."""
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    times = torch.cat((torch.zeros(1, dtype=torch.float64), t))
    return solve(robertson, y0, times, args=(rates,), method="rodas5p", rtol=1e-4, atol=1e-8)


def run(quick: bool = False) -> Result:
    """Finds the three rates from concentrations with small errors, by L-BFGS on their logarithms."""
    torch.manual_seed(0)
    t = torch.logspace(-2, 0 if quick else 5, 3 if quick else 12, dtype=torch.float64)
    with torch.no_grad():
        truth = react(TRUE_RATES, t)
        data = truth.y[1:] / SCALE * (1 + 0.005 * torch.randn(len(t), 3, dtype=torch.float64))
    start = TRUE_RATES * torch.tensor([1.5, 0.6, 1.6], dtype=torch.float64)
    log_rates = start.log().requires_grad_()
    optimizer = torch.optim.LBFGS([log_rates], max_eval=5 if quick else 25, line_search_fn="strong_wolfe")
    losses = []

    def loss() -> float:
        optimizer.zero_grad()
        found = react(log_rates.exp(), t).y[1:] / SCALE
        mismatch = (found.log() - data.log()).square().mean()  # small concentrations count as much as large ones
        mismatch.backward()  # through the linear systems of the implicit steps
        losses.append(mismatch.item())
        return losses[-1]

    optimizer.step(loss)
    rates = log_rates.detach().exp()
    numbers = {"first loss": losses[0], "last loss": min(losses), "accepted steps": float(truth.stats.n_accepted)}
    numbers |= {f"rate {i + 1} over the true one": ratio for i, ratio in enumerate((rates / TRUE_RATES).tolist())}
    return Result(numbers, draw(t, data, {"first guess": start, "found": rates}))


def draw(t: Tensor, data: Tensor, rates: dict[str, Tensor]) -> Figure:
    """Draws the concentrations over the logarithm of time."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    dense = torch.logspace(float(t[0].log10()), float(t[-1].log10()), 100, dtype=torch.float64)
    for (label, values), style in zip(rates.items(), (":", "-"), strict=True):
        with torch.no_grad():
            curves = react(values, dense).y[1:] / SCALE
        for i, curve in enumerate(curves.T):
            axes.semilogx(dense, curve, style, color=f"C{i}", label=f"{'ABC'[i]}, {label}")
    for i, values in enumerate(data.T):
        axes.plot(t, values, "o", color=f"C{i}")
    axes.set(xlabel="t [s]", ylabel="concentration (B: in 3e-5)", title="Robertson's reaction: data (dots) and fit")
    axes.legend(ncols=2, fontsize="small")
    return figure
