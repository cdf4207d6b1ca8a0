"""End states and gradients of the standard problems against their values in quadruple precision."""

from __future__ import annotations

import pytest
import torch
from autograd_reference import relative_error
from problems import KNOWN_ENDS, KNOWN_GRADIENTS

import aca_ext

# Largest relative error of the end state at rtol 1e-12; by default 1e-10. A1 ends at 2e-9, where atol = 1e-14 limits
# the error; the Arenstorf orbit magnifies an error by about 1e5.
END_PRECISION = {"A1": 1e-4, "arenstorf": 1e-5}

# Two tolerances for each adaptive method, and the largest error in multiples of the tighter one. fehlberg2 weighs its
# error estimate by 1/512, so it underestimates the error.
TOLERANCES = {
    "adaptive_heun": (1e-3, 1e-5, 1000),
    "fehlberg2": (1e-5, 1e-7, 100_000),
    "bosh3": (1e-3, 1e-6, 1000),
    "tsit5": (1e-3, 1e-8, 1000),
    "dopri5": (1e-3, 1e-8, 1000),
    "dopri8": (1e-3, 1e-8, 1000),
}

# Relative error of gradients. "naive" also differentiates the search for the step size, which adds noise of the size of
# the tolerance; the error of "adjoint" is that of its own backward solve.
GRADIENT_PRECISION = {"aca": 1e-9, "direct": 1e-9, "naive": 1e-7, "adjoint": 1e-7}


@pytest.mark.parametrize("name", KNOWN_ENDS)
def test_end_state(name: str) -> None:
    problem = KNOWN_ENDS[name]
    with torch.no_grad():
        y = aca_ext.odeint(problem.func, problem.y0, problem.times, method="dopri8", rtol=1e-12, atol=1e-14)
    assert relative_error(y[-1], problem.y_end) <= END_PRECISION.get(name, 1e-10)


@pytest.mark.parametrize("method", TOLERANCES)
@pytest.mark.parametrize("name", ["A4", "B5", "E2", "lotka_volterra"])
def test_error_follows_tolerance(method: str, name: str) -> None:
    problem = KNOWN_ENDS[name]
    *tolerances, most = TOLERANCES[method]
    errors = []
    for tolerance in tolerances:
        with torch.no_grad():
            y = aca_ext.odeint(problem.func, problem.y0, problem.times, method=method, rtol=tolerance, atol=tolerance)
        errors.append(relative_error(y[-1], problem.y_end))
    assert errors[1] <= most * tolerances[1]
    assert errors[1] < errors[0] / 10


def test_every_adaptive_method_is_compared() -> None:
    assert set(TOLERANCES) == {name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive}


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("name", KNOWN_GRADIENTS)
def test_gradient(name: str, gradient: str) -> None:
    problem = KNOWN_GRADIENTS[name]
    func, y0 = problem.make(), problem.y0
    y = aca_ext.odeint(func, y0, problem.times, method="dopri8", rtol=1e-11, atol=1e-13, gradient=gradient)
    loss = y[-1, : problem.count].square().sum()
    loss.backward()
    assert relative_error(loss.reshape(1), problem.expected("L")) <= 1e-9
    assert relative_error(y0.grad, problem.expected("dy0")) <= GRADIENT_PRECISION[gradient]
    assert relative_error(func.p.grad, problem.expected("dp")) <= GRADIENT_PRECISION[gradient]
