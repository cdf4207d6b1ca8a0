"""A func that remembers its earlier evaluations where its slopes do not show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from aca_ext import odeint
from aca_ext.errors import ReplayError

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
Y0 = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).view(3, 2)
FIXED: dict[str, Any] = {"method": "rk4", "options": {"n_steps": 5}}
INDEPENDENT: dict[str, Any] = {"options": {"batch": "independent"}, "rtol": 1e-3, "atol": 1e-3}

Func = Callable[[Tensor, Tensor], Tensor]


def gate(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros((), dtype=dtype, requires_grad=True)


def running_mean(factor: Tensor) -> Func:
    mean = torch.zeros((), dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        mean.mul_(0.9).add_(0.1 * y.detach().mean())
        return -y + factor * (y - mean.clone())

    return func


def counter(factor: Tensor) -> Func:
    count = [0]

    def func(t: Tensor, y: Tensor) -> Tensor:
        count[0] += 1
        return -y + factor * y / count[0]

    return func


@pytest.mark.parametrize("how", [FIXED, {"rtol": 1e-3}, INDEPENDENT], ids=["fixed", "adaptive", "independent"])
@pytest.mark.parametrize("make", [running_mean, counter])
def test_memory_behind_a_factor_of_zero_is_refused(make: Callable[[Tensor], Func], how: dict[str, Any]) -> None:
    loss = odeint(make(gate()), Y0, T, **how)[-1].sum()
    with pytest.raises(ReplayError, match="different derivatives"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_memory_is_refused_in_second_derivatives(dtype: torch.dtype) -> None:
    factor = gate(dtype)
    loss = odeint(running_mean(factor), Y0, T, **FIXED)[-1].sum()
    with pytest.raises(ReplayError, match="different derivatives"):
        torch.autograd.grad(loss, factor, create_graph=True)


def test_a_derivative_that_only_some_evaluations_have_is_refused() -> None:
    factor, count = gate(), [0]

    def func(t: Tensor, y: Tensor) -> Tensor:
        count[0] += 1
        return -y.detach() + (factor * y if count[0] % 2 else 0)

    loss = odeint(func, Y0, T, **FIXED)[-1].sum()
    with pytest.raises(ReplayError, match="different derivatives"):
        loss.backward()


def test_spectral_norm_before_a_layer_of_zeros_is_refused() -> None:
    torch.manual_seed(0)
    last = nn.Linear(32, 2)
    nn.init.zeros_(last.weight)
    net = nn.Sequential(nn.Linear(2, 32), spectral_norm(nn.Linear(32, 32)), nn.Tanh(), last).double()
    loss = odeint(lambda t, y: net(y), Y0, T, **FIXED)[-1].sum()
    with pytest.raises(ReplayError, match="spectral_norm"):
        loss.backward()
    net.eval()
    odeint(lambda t, y: net(y), Y0, T, **FIXED)[-1].sum().backward()


def test_direct_gradients_take_what_func_remembers() -> None:
    """With what the slopes do not show, the gradient is the limit of finite differences."""

    def end(value: float) -> float:
        return float(odeint(running_mean(torch.tensor(value, dtype=torch.float64)), Y0, T, **FIXED)[-1].sum())

    factor = gate()
    odeint(running_mean(factor), Y0, T, gradient="direct", **FIXED)[-1].sum().backward()
    assert factor.grad is not None
    assert factor.grad.item() == pytest.approx((end(1e-5) - end(-1e-5)) / 2e-5, rel=1e-8)


class Harmless(nn.Module):
    """Counts its evaluations, trains a batch normalisation, and writes to memory that the same evaluation reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.count, self.scratch = 0, torch.zeros(3, 2, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        self.scratch.copy_(y.detach())
        return self.layers(y) - self.scratch * 0.1


@pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")
def test_what_no_later_evaluation_reads_is_no_memory() -> None:
    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(0)
        func = Harmless().double()
        odeint(func, Y0, T, gradient=gradient, **FIXED)[-1].square().sum().backward()
        found.append([p.grad for p in func.parameters()])
    for aca, direct in zip(*found, strict=True):
        torch.testing.assert_close(aca, direct, rtol=1e-12, atol=1e-13)
