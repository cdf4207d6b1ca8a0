"""Savings and cost of separate steps for every sample, on van der Pol oscillators of rising stiffness.

32 oscillators with stiffness from 1 on, dopri5, float64, one thread; gradients of the initial states and stiffnesses.
``steps`` are the trial steps of a sample, ``f rows`` the evaluations of f counted in samples, both in the forward pass.
``one by one`` solves each sample by itself.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import aca_ext
from benchmarks.harness import Parts, Settings, Table, interleave

COUNT, QUICK_COUNT = 32, 4
STIFFEST = (3.0, 100.0)
TOLERANCE = 1e-5
T_END = 5.0
COLUMNS = {
    "solver": ("solver", ""),
    "fewest steps": ("fewest_steps", "d"),
    "most steps": ("most_steps", "d"),
    "f calls": ("n_f_evals", "d"),
    "f rows": ("n_f_rows", "d"),
    "forward ms": ("forward_ms", ".1f"),
    "forward and backward ms": ("both_ms", ".1f"),
}


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y[:, :1], y[:, 1:]
    return torch.cat([v, mu * (1 - x * x) * v - x], 1)


def run(settings: Settings) -> Parts:
    for stiffest in STIFFEST[:1] if settings.quick else STIFFEST:
        yield _table(stiffest, settings)


def _table(stiffest: float, settings: Settings) -> Table:
    count = QUICK_COUNT if settings.quick else COUNT
    mu = torch.logspace(0, torch.tensor(stiffest).log10().item(), count, dtype=torch.float64, device=settings.device)
    mu = mu.view(-1, 1).requires_grad_()
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=settings.device).repeat(count, 1).requires_grad_()
    solvers: dict[str, Callable[[], list[aca_ext.Solution]]] = {
        "independent": partial(_solve, y0, mu, {"batch": "independent"}),
        "common steps": partial(_solve, y0, mu, {}),
        "one by one": lambda: [_solve(y0[i : i + 1], mu[i : i + 1], {})[0] for i in range(count)],
    }
    forward = interleave({name: partial(_forward, call) for name, call in solvers.items()}, settings, seconds=3)
    both = interleave({name: partial(_both, call, y0, mu) for name, call in solvers.items()}, settings, seconds=10)
    table = Table(f"{count} oscillators, stiffness 1 to {stiffest:g}, T = {T_END:g}, tolerance {TOLERANCE:g}", COLUMNS)
    for name, call in solvers.items():
        solutions = call()
        steps = torch.cat([torch.as_tensor(s.stats.n_steps).reshape(-1) for s in solutions])
        calls = sum(s.stats.n_f_evals for s in solutions)
        table.rows.append(
            {
                "solver": name,
                "fewest_steps": int(steps.min()),
                "most_steps": int(steps.max()),
                "n_f_evals": calls,
                "n_f_rows": sum(s.stats.n_f_evals * s.y.shape[1] for s in solutions),
                "forward_ms": 1e3 * forward.median(name),
                "both_ms": 1e3 * both.median(name),
            }
        )
    return table


def _solve(y0: Tensor, mu: Tensor, options: dict[str, str]) -> list[aca_ext.Solution]:
    t = torch.tensor([0.0, T_END], dtype=torch.float64)
    return [aca_ext.solve(van_der_pol, y0, t, args=(mu,), rtol=TOLERANCE, atol=TOLERANCE, options={**options})]


def _forward(call: Callable[[], list[aca_ext.Solution]]) -> None:
    with torch.no_grad():
        call()


def _both(call: Callable[[], list[aca_ext.Solution]], y0: Tensor, mu: Tensor) -> None:
    torch.autograd.grad(torch.cat([s.y[-1] for s in call()]).square().sum(), (y0, mu))
