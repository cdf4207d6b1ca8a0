"""Gradients of implicit methods with independent samples: those of each sample alone, finite differences, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

from aca_ext import odeint
from aca_ext.errors import ArgumentValueError, ReplayError
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS, ROSENBROCK_METHODS

ADAPTIVE = [name for name, tableau in {**IMPLICIT_METHODS, **ROSENBROCK_METHODS}.items() if tableau.adaptive]
INDEPENDENT = {"batch": "independent"}
T = torch.tensor([0.0, 0.2, 0.21, 2.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 1e3, -2.0], dtype=torch.float64)
HOW: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-8}


class Reaction(nn.Module):
    """Robertson's reaction with rates that all samples share and one that is an argument of each."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.04, 1e3], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        a, b, c = y.unbind(1)
        made, back, used = self.p[0] * a * (1 + 0.5 * torch.sin(t.reshape(-1))), self.p[1] * b * c, rate * b * b
        return torch.stack([back - made, made - back - used, used], 1)


def start() -> tuple[Reaction, Tensor, Tensor]:
    y0 = torch.tensor([[1.0, 1e-5, 0.1], [0.5, 1e-5, 0.6], [2.0, 0.0, 0.0]], dtype=torch.float64)
    rate = torch.tensor([1e5, 1e6, 1e3], dtype=torch.float64)
    return Reaction(), y0.requires_grad_(), rate.requires_grad_()


def loss_of(ys: Tensor) -> Tensor:
    """Of outputs inside steps and at the end."""
    return ((ys[1] + ys[2].square() - ys[3]) * WEIGHTS).sum()


def worst(found: Any, expected: Any) -> float:
    return max(relative_error(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_are_those_of_each_sample_alone(method: str, gradient: str) -> None:
    func, y0, rate = start()
    how = HOW | {"gradient": gradient}
    if (method, gradient) == ("rodas5p", "direct"):
        how |= {"rtol": 1e-2, "atol": 1e-5}  # few steps, since the graph of each has second derivatives of func
    together = odeint(func, y0, T, method=method, args=(rate,), options=INDEPENDENT, **how)
    found = torch.autograd.grad(loss_of(together), (y0, func.p, rate))
    alone = [odeint(func, y0[i : i + 1], T, method=method, args=(rate[i : i + 1],), **how) for i in range(3)]
    expected = torch.autograd.grad(loss_of(torch.cat(alone, 1)), (y0, func.p, rate))
    assert worst(found, expected) < 1e-9


def test_agree_with_finite_differences() -> None:
    func, y0, rate = start()
    how: dict[str, Any] = {"method": "kvaerno5", "options": INDEPENDENT, "rtol": 1e-8, "atol": 1e-12}
    (found,) = torch.autograd.grad(loss_of(odeint(func, y0, T, args=(rate,), **how)), rate)
    with torch.no_grad():
        ends = [
            torch.stack([loss_of(y[:, None]) for y in odeint(func, y0, T, args=(rate * f,), **how).unbind(1)])
            for f in (1.001, 0.999)
        ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (0.002 * rate.detach()), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("method", ["kvaerno3", "rodas5p"])
def test_of_second_order(method: str) -> None:
    func, y0, rate = start()
    how: dict[str, Any] = {"method": method, "rtol": 1e-3, "atol": 1e-6}
    if method != "rodas5p":
        how["options"] = {"newton_tol": 1e-8}

    def second(batch: bool) -> list[Tensor]:
        options = how.get("options", {})
        if batch:
            ys = odeint(func, y0, T, args=(rate,), **how | {"options": options | INDEPENDENT})
        else:
            ys = torch.cat([odeint(func, y0[i : i + 1], T, args=(rate[i : i + 1],), **how) for i in range(3)], 1)
        first = torch.autograd.grad(loss_of(ys), (y0, func.p, rate), create_graph=True)
        along = torch.stack([(g * x.detach()).sum() for g, x in zip(first, (y0, func.p, rate), strict=True)]).sum()
        return list(torch.autograd.grad(along, (y0, func.p, rate)))

    assert worst(second(True), second(False)) < 1e-8


def test_third_derivatives_are_refused() -> None:
    func, y0, rate = start()
    ys = odeint(func, y0, T[:2], method="kvaerno3", args=(rate,), options=INDEPENDENT, **HOW)
    (first,) = torch.autograd.grad(ys[-1].sum(), y0, create_graph=True)
    with pytest.raises(ArgumentValueError, match="third derivatives"):
        torch.autograd.grad(first.sum(), y0, create_graph=True)


def test_of_a_padded_compact_batch_and_its_times() -> None:
    """Gradients of an end time are slopes there."""
    func, y0, rate = start()
    nan = float("nan")
    t = torch.tensor([[0, 0.2, 2], [0, 1e-3, nan], [0, 1e-3, nan]], dtype=torch.float64, requires_grad=True)
    found = []
    for more in ({}, {"compact": True}):
        ys = odeint(func, y0, t, method="kvaerno5", args=(rate,), options=INDEPENDENT | more, **HOW)
        ends = torch.stack([ys[2, 0], ys[1, 1], ys[1, 2]])
        found.append(torch.autograd.grad((ends * WEIGHTS).sum(), (y0, func.p, rate, t)))
    assert worst(found[1], found[0]) < 1e-9
    slope = (func(torch.tensor([2.0, 1e-3, 1e-3], dtype=torch.float64), ends, rate) * WEIGHTS).sum(1)
    of_times = found[0][3]
    torch.testing.assert_close(of_times[[0, 1, 2], [2, 1, 1]], slope.detach(), rtol=1e-6, atol=1e-12)


def test_of_a_matrix_near_the_derivative_are_those_of_func() -> None:
    func, y0, rate = start()

    def nearly(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        def total(y: Tensor) -> Tensor:
            return func(t, y, rate).sum(0)

        return 1.1 * torch.func.jacrev(total)(y).transpose(0, 1)

    found = []
    for more in ({}, {"jacobian": nearly}):
        options = INDEPENDENT | {"newton_tol": 1e-7} | more
        ys = odeint(func, y0, T, method="kvaerno5", args=(rate,), options=options, **HOW)
        found.append(torch.autograd.grad(loss_of(ys), (y0, func.p, rate)))
    assert worst(found[1], found[0]) < 1e-7


@pytest.mark.parametrize("method", ["dopri5", "kvaerno3", "rodas5p"])
def test_do_not_depend_on_the_layout_of_the_state(method: str) -> None:
    """Also where samples end early and func no longer sees them."""
    rates = torch.linspace(0.5, 20, 24, dtype=torch.float64).view(2, 2, 3, 2)
    y0 = 1 + rates.sin().square()
    t = torch.tensor([[0, 0.02, 0.2], [0, 1e-3, 2e-3]], dtype=torch.float64)
    found = []
    for state in (y0, y0.to(memory_format=torch.channels_last)):
        leaf, of_rates = state.clone().requires_grad_(), rates.clone().requires_grad_()
        options = INDEPENDENT | {"compact": True}
        how: dict[str, Any] = {"method": method, "options": options, "rtol": 1e-5, "atol": 1e-7}
        ys = odeint(lambda t, y, r: -r * y * y, leaf, t, args=(of_rates,), **how)
        exact = 1 / (1 / y0 + rates * t[:, 2].view(2, 1, 1, 1))
        torch.testing.assert_close(ys[-1], exact, rtol=1e-3, atol=1e-3)
        found.append(torch.autograd.grad((ys * rates).sum(), (leaf, of_rates)))
    assert worst(found[1], found[0]) < 1e-12


def test_a_changed_func_is_noticed() -> None:
    func, y0, rate = start()
    ys = odeint(func, y0, T, method="kvaerno5", args=(rate,), options=INDEPENDENT, **HOW)
    func.p.data[0] *= 1.5
    with pytest.raises(ReplayError, match="did not repeat the forward pass"):
        torch.autograd.grad(loss_of(ys), y0)
