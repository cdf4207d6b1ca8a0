"""Parameter estimation with uncertainty: predators and prey, by replay and Gauss-Newton."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import jacfwd

from aca_ext import Solution, replay, solve
from aca_ext.examples.result import Result

TRUE_RATES = torch.tensor([1.1, 0.4, 0.4, 0.1], dtype=torch.float64)
Y0 = torch.tensor([10.0, 5.0], dtype=torch.float64)
NOISE = 0.5


def predators(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """Growth of prey and predators."""
    prey, hunters = y.unbind()
    a, b, c, d = rates.unbind()
    return torch.stack((a * prey - b * prey * hunters, d * prey * hunters - c * hunters))


def fit(data: Tensor, t: Tensor, rates: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Rates by Gauss-Newton, and their covariance."""
    for _ in range(iterations):
        solution = solve(predators, Y0, t, args=(rates,), rtol=1e-6, atol=1e-8)
        jacobian = jacobian_of(solution, rates)
        residual = (data - solution.y).reshape(-1, 1)
        step = torch.linalg.lstsq(jacobian, residual).solution[:, 0]
        rates = rates + step.clamp(-0.2, 0.2)  # a full step far from the solution may leave the range of the model
    return rates, NOISE**2 * torch.linalg.inv(jacobian.T @ jacobian)


def jacobian_of(solution: Solution, rates: Tensor) -> Tensor:
    """Derivative of all outputs by the rates, (2T, 4): forward mode through the steps that the solver took."""
    return jacfwd(lambda r: replay(predators, solution, Y0, args=(r,)))(rates).reshape(-1, len(rates))


def run(quick: bool = False) -> Result:
    """Estimates four rates from noisy counts, and draws the solution with its uncertainty."""
    torch.manual_seed(0)
    t = torch.linspace(0.0, 15.0, 10 if quick else 40, dtype=torch.float64)
    truth = solve(predators, Y0, t, args=(TRUE_RATES,)).y
    data = truth + NOISE * torch.randn(len(t), 2, dtype=torch.float64)
    start = TRUE_RATES * torch.tensor([0.9, 1.1, 1.1, 0.9], dtype=torch.float64)
    rates, covariance = fit(data, t, start, 4 if quick else 10)
    deviations = (rates - TRUE_RATES) / covariance.diagonal().sqrt()
    numbers = {f"rate {name}": rate.item() for name, rate in zip("abcd", rates, strict=True)}
    numbers["largest error in standard deviations"] = deviations.abs().max().item()
    return Result(numbers, draw(t, data, rates, covariance))


def draw(t: Tensor, data: Tensor, rates: Tensor, covariance: Tensor) -> Figure:
    """Draws data, fit and two standard deviations of the fit, and the estimated rates with their errors."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    over_time, axes = figure.subplots(1, 2, width_ratios=(3, 1))
    dense = torch.linspace(0.0, 20.0, 120, dtype=torch.float64)
    solution = solve(predators, Y0, dense, args=(rates,), rtol=1e-6, atol=1e-8)
    jacobian = jacobian_of(solution, rates)
    spread = 2 * ((jacobian @ covariance) * jacobian).sum(1).sqrt().reshape(-1, 2)
    for i, name in enumerate(("prey", "predators")):
        y = solution.y[:, i]
        over_time.fill_between(dense, y - spread[:, i], y + spread[:, i], color=f"C{i}", alpha=0.3)
        over_time.plot(dense, y, color=f"C{i}", label=name)
        over_time.plot(t, data[:, i], ".", color=f"C{i}")
    over_time.set(xlabel="t", title="Fit with two standard deviations, and a forecast from t = 15")
    over_time.legend()
    errors = 2 * covariance.diagonal().sqrt()
    axes.errorbar(range(4), rates / TRUE_RATES, errors / TRUE_RATES, fmt="o", capsize=4)
    axes.axhline(1.0, color="0.6")
    axes.set_xticks(range(4), list("abcd"))
    axes.set(title="Rates over the true ones")
    return figure
