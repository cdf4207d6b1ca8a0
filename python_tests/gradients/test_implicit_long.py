"""Second derivatives of Robertson's reaction to t = 1e11 at loose tolerances.

A step there is so long that iterations from the state before it find another solution of the equations.
"""

from __future__ import annotations

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor

from aca_ext import odeint

RATES = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64)
START = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
ATOL = torch.tensor([1.0, 1e-4, 1.0], dtype=torch.float64)


def robertson(t: Tensor, y: Tensor, logarithms: Tensor) -> Tensor:
    k = logarithms.exp()
    a, b, c = y.unbind()
    made, back, used = k[0] * a, k[1] * b * c, k[2] * b * b
    return torch.stack((back - made, made - back - used, used))


def of_batch(t: Tensor, y: Tensor, logarithms: Tensor) -> Tensor:
    return robertson(t, y[0], logarithms)[None]


@pytest.mark.parametrize(
    ("method", "rtol", "independent"),
    [
        ("kvaerno5", 1e-3, False),
        ("kvaerno5", 1e-4, False),
        ("kvaerno3", 1e-3, False),
        ("trbdf2", 1e-3, False),
        ("auto", 1e-3, False),
        ("kvaerno5", 1e-3, True),
    ],
)
def test_repeated_steps_are_those_of_the_forward_pass(method: str, rtol: float, independent: bool) -> None:
    """The end is a power of each rate, but for terms of 1e-8, so that all derivatives follow from the exponents."""
    logarithms = RATES.log().requires_grad_()
    func, y0, options = (of_batch, START[None], {"batch": "independent"}) if independent else (robertson, START, {})
    call = {"method": method, "rtol": rtol, "atol": 1e-6 * rtol * ATOL, "options": options}
    end = odeint(func, y0, [0.0, 1e11], args=(logarithms,), **call)[-1].view(3)
    relative = end / end.detach()
    exponents = torch.stack([torch.autograd.grad(x, logarithms, retain_graph=True)[0] for x in relative])
    assert relative_error(exponents[0], torch.tensor([-2.0, 2.0, -1.0], dtype=torch.float64)) <= 1e-3
    (first,) = torch.autograd.grad(relative.sum(), logarithms, create_graph=True)
    assert relative_error(first, exponents.sum(0)) <= 1e-3
    second = torch.stack([torch.autograd.grad(x, logarithms, retain_graph=True)[0] for x in first])
    assert relative_error(second, exponents.T @ exponents) <= 1e-3


def test_second_derivatives_with_checkpoints() -> None:
    """The steps between checkpoints are made again before they are repeated with a graph."""
    logarithms = RATES.log().requires_grad_()
    call = {"method": "kvaerno5", "rtol": 1e-3, "atol": 1e-9 * ATOL, "checkpoints": 8}
    end = odeint(robertson, START, [0.0, 1e11], args=(logarithms,), **call)[-1]
    (first,) = torch.autograd.grad((end / end.detach()).sum(), logarithms, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logarithms)
    exponents = torch.tensor([[-2.0, 2.0, -1.0], [-1.0, 1.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert relative_error(first, exponents.sum(0)) <= 1e-3
    assert relative_error(second, exponents.sum(1) @ exponents) <= 1e-3
