"""Ten thousand problems at once: a drug in as many patients, on compiled SIMD lanes, with gradients."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from aca_ext import solve
from aca_ext.examples.result import Result

T = torch.linspace(0.0, 24.0, 49)
SETTINGS = {"rtol": 1e-5, "atol": 1e-6, "options": {"batch": "independent"}, "engine": "compiled"}


def drug(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """Amount in the gut and concentration in blood; the liver breaks down no more than a largest rate.

    y is (patients, 2), t is (patients, 1), and rates are (patients, 3).
    """
    gut, blood = y.unbind(-1)
    uptake, fastest, half = rates.unbind(-1)
    return torch.stack((-uptake * gut, uptake * gut - fastest * blood / (half + blood)), -1)


def run(quick: bool = False) -> Result:
    """Solves all patients, each with steps of its own, and differentiates the exposure by every rate."""
    torch.manual_seed(0)
    n = 200 if quick else 10_000
    typical = torch.tensor([1.2, 1.0, 2.0])
    rates = (typical * (0.3 * torch.randn(n, 3)).exp()).requires_grad_()
    y0 = torch.tensor([10.0, 0.0]).expand(n, 2)
    solution = solve(drug, y0, T, args=(rates,), **SETTINGS)
    blood = solution.y[..., 1]
    exposure = torch.trapezoid(blood, T, dim=0)  # (n,): area under the curve of each patient
    exposure.sum().backward()  # one backward pass; row i of the gradient belongs to patient i
    elasticity = (rates.grad * rates.detach() / exposure.detach()[:, None]).mean(0)  # percent per percent
    steps = solution.stats.n_accepted  # (n,)
    numbers = {
        "patients": float(n), "fewest steps": float(steps.min()), "most steps": float(steps.max()),
        "elasticity of uptake": elasticity[0].item(), "elasticity of breakdown": elasticity[1].item(),
    }  # fmt: skip
    return Result(numbers, draw(blood.detach(), elasticity, steps))


def draw(blood: Tensor, elasticity: Tensor, steps: Tensor) -> Figure:
    """Draws the concentration of the population, the sensitivities, and the steps of the patients."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    curves, effects, counts = figure.subplots(1, 3)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    low, quarter, middle, three_quarters, high = torch.quantile(blood, levels, dim=1)
    curves.fill_between(T, low, high, alpha=0.25, label="90 % of patients")
    curves.fill_between(T, quarter, three_quarters, alpha=0.35, color="C0", label="50 %")
    curves.plot(T, middle, color="C0", label="median")
    curves.set(xlabel="t [h]", ylabel="concentration in blood", title=f"{blood.shape[1]} patients")
    curves.legend(fontsize="small")
    effects.bar(["uptake", "fastest\nbreakdown", "half\nsaturation"], elasticity.tolist())
    effects.axhline(0, color="0.6")
    effects.set(title="Change of exposure [%] by one percent")
    counts.hist(steps, bins=range(int(steps.min()), int(steps.max()) + 2))
    counts.set(xlabel="accepted steps", ylabel="patients", title="Every patient has its own steps")
    return figure
