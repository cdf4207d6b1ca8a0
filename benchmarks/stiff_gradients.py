"""Gradients of stiff solves by the rates, against finite differences of SciPy's Radau."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import aca_ext
from benchmarks.harness import Parts, Table, first_line
from benchmarks.stiff_problems import StiffFunction, StiffProblem

OWN_METHODS = ("kvaerno5", "radau5", "rodas5p", "kvaerno3", "trbdf2")
GRADIENT_COLUMNS = {
    "method": ("solver", ""),
    "tolerance": ("tolerance", ".0e"),
    "error of the gradient": ("error", ".1e"),
    "steps": ("steps", "d"),
    "ms": ("ms", ".1f"),
}


def times_of(problem: StiffProblem) -> torch.Tensor:
    return torch.tensor([0.0, problem.t_end], dtype=torch.float64)


def solution_by(
    func: Any, y0: torch.Tensor, t: torch.Tensor, problem: StiffProblem, method: str, rtol: float, engine: str = "eager"
) -> Any:
    # The Brusselator would get Krylov iterations, which are far slower there: they have no preconditioner.
    options = {} if problem.bandwidth is None else {"jacobian": "dense"}
    atol = problem.atol(rtol)
    return aca_ext.solve(func, y0, t, rtol=rtol, atol=atol, method=method, options=options, engine=engine)


def gradients(problem: StiffProblem, tolerances: tuple[float, ...]) -> Parts:
    title = f"{problem.name}: gradient of sum(y / end) by the logarithms of the rates, against finite differences"
    table = Table(title, GRADIENT_COLUMNS)
    exact = _finite_differences(problem)
    for method in OWN_METHODS:
        for rtol in tolerances if method == "kvaerno5" else tolerances[:2]:
            start = time.perf_counter()
            try:
                found, steps = _gradient(problem, method, rtol)
            except Exception as error:
                yield f"{problem.name}, gradient by {method}: {type(error).__name__}: {first_line(error)}"
                break
            ms = 1e3 * (time.perf_counter() - start)
            error_of = float(np.abs(found - exact).max() / np.abs(exact).max())
            table.rows.append({"solver": method, "tolerance": rtol, "error": error_of, "ms": ms, "steps": steps})
    yield table


def _gradient(problem: StiffProblem, method: str, rtol: float) -> tuple[np.ndarray, int]:
    func, y0 = StiffFunction(problem), torch.tensor(problem.y0, dtype=torch.float64)
    solution = solution_by(func, y0, times_of(problem), problem, method, rtol)
    loss = (solution.y[-1] / torch.tensor(problem.end, dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(loss, func.p)
    return (gradient * func.p).detach().numpy(), solution.stats.n_accepted


def _finite_differences(problem: StiffProblem, step: float = 1e-3) -> np.ndarray:
    """Central differences of order 4, of SciPy's Radau at a tight tolerance: correct to about 1e-8."""
    from scipy.integrate import solve_ivp

    def loss(index: int, change: float) -> float:
        p = tuple(rate * (1 + change) if i == index else rate for i, rate in enumerate(problem.parameters))
        slope, rtol = replace(problem, parameters=p).for_numpy(), 1e-10
        span, y0 = (0.0, problem.t_end), np.array(problem.y0)
        found = solve_ivp(slope, span, y0, method="Radau", rtol=rtol, atol=1e-4 * problem.atol(rtol))
        return float(np.sum(found.y[:, -1] / np.array(problem.end)))

    def derivative(index: int) -> float:
        near, far = (loss(index, h) - loss(index, -h) for h in (step, 2 * step))
        return (8 * near - far) / (12 * step)

    return np.array([derivative(i) for i in range(len(problem.parameters))])
