"""Funcs, and backward passes inside func, that return the same buffers again and again with new contents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aca_ext
from aca_ext import errors

T = [0.0, 0.4, 1.0]
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
SOLVES: dict[str, dict[str, Any]] = {
    **{gradient: {"gradient": gradient, **TIGHT} for gradient in aca_ext.GRADIENTS},
    "aca, fixed steps": {"method": "rk4", "options": {"step_size": 0.01}},
    "aca, few checkpoints": {"checkpoints": 2, **TIGHT},
    "independent": {"options": {"batch": "independent"}, **TIGHT},
    "independent, direct": {"options": {"batch": "independent"}, "gradient": "direct", **TIGHT},
}
SIZES = {"small": 3, "large": 700}  # small slopes are always copied, large ones only if they are shared


class Buffers:
    """Buffers that func writes into; each method stores the values of ``x`` and returns them in another way."""

    def __init__(self, n: int) -> None:
        self.x, *self.others = (torch.empty(n, dtype=torch.float64) for _ in range(3))
        self.array = self.x.numpy()

    def itself(self, x: Tensor) -> Tensor:
        return self.x.copy_(x)

    def view(self, x: Tensor) -> Tensor:
        return self.x.copy_(x).view(-1, 1)[:, 0]

    def detached(self, x: Tensor) -> Tensor:
        return self.x.copy_(x).detach()

    def numpy_array(self, x: Tensor) -> Tensor:
        np.copyto(self.array, x.numpy())
        return torch.from_numpy(self.array)

    def in_turn(self, x: Tensor) -> Tensor:
        self.others.reverse()
        return self.others[0].copy_(x)

    def new_one(self, x: Tensor) -> Tensor:
        self.x = x.clone()
        return self.x


WAYS = [name for name in vars(Buffers) if not name.startswith("_")]
each_way = pytest.mark.parametrize("way", WAYS)
each_solve = pytest.mark.parametrize("settings", SOLVES.values(), ids=SOLVES)
each_size = pytest.mark.parametrize("n", SIZES.values(), ids=SIZES)


class Half(torch.autograd.Function):
    """y / 2, whose backward pass returns its gradient through ``give``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, give: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.give = give
        return 0.5 * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.give(g), None


@each_way
@each_solve
@each_size
def test_backward_that_hands_out_buffers(way: str, settings: dict[str, Any], n: int) -> None:
    give, y0 = getattr(Buffers(n), way), torch.ones(n, dtype=torch.float64, requires_grad=True)
    y = aca_ext.odeint(lambda t, y: Half.apply(y, lambda g: give(0.5 * g)), y0, T, **settings)[-1]
    (grad,) = torch.autograd.grad(y.sum(), y0)
    assert torch.allclose(grad, torch.full_like(grad, math.exp(0.5)), rtol=1e-7)


@each_solve
@each_size
def test_backward_that_changes_the_gradient_it_is_given(settings: dict[str, Any], n: int) -> None:
    y0 = torch.ones(n, dtype=torch.float64, requires_grad=True)
    y = aca_ext.odeint(lambda t, y: Half.apply(y, lambda g: g.mul_(0.5)), y0, T, **settings)[-1]
    (grad,) = torch.autograd.grad(y.sum(), y0)
    assert torch.allclose(grad, torch.full_like(grad, math.exp(0.5)), rtol=1e-7)


@each_way
@each_solve
@each_size
def test_func_that_hands_out_buffers(way: str, settings: dict[str, Any], n: int) -> None:
    give, y0 = getattr(Buffers(n), way), torch.ones(n, dtype=torch.float64, requires_grad=True)
    y = aca_ext.odeint(lambda t, y: give(-y.detach()), y0, T, **settings)
    assert torch.allclose(y[-1], torch.full_like(y[-1], math.exp(-1.0)), rtol=1e-7)
    with torch.no_grad():
        again = aca_ext.odeint(lambda t, y: give(-y), y0, T, **settings)
    assert torch.allclose(y, again, rtol=1e-12)


@pytest.mark.filterwarnings("ignore::aca_ext.errors.KeptTensorWarning")
@each_solve
@each_size
def test_func_whose_buffer_has_a_new_graph_each_time(settings: dict[str, Any], n: int) -> None:
    held = {"k": torch.empty(n, dtype=torch.float64)}
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        held["k"] = held["k"].detach()
        return held["k"].copy_(-2 * w * y)

    y0 = torch.ones(n, dtype=torch.float64, requires_grad=True)
    y = aca_ext.odeint(func, y0, T, **settings)[-1]
    grad, grad_w = torch.autograd.grad(y.sum(), [y0, w])
    assert torch.allclose(grad, torch.full_like(grad, math.exp(-1.0)), rtol=1e-6)
    assert math.isclose(grad_w.item(), -2 * n * math.exp(-1.0), rel_tol=1e-6)


@each_size
def test_slope_with_a_graph_that_changes_later(n: int) -> None:
    alias: list[Tensor] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        for x in alias:
            x.mul_(2.0)
        k = -y
        alias[:] = [k.detach()]
        return k

    y0 = torch.ones(n, dtype=torch.float64, requires_grad=True)
    y = aca_ext.odeint(func, y0, T, method="rk4")[-1]
    with pytest.raises((errors.SlopeError, errors.ReplayError)):
        y.sum().backward()


@each_solve
@each_size
def test_func_that_frees_its_state(settings: dict[str, Any], n: int) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        k = -y.detach()
        if t.max() > 0.1:
            y.untyped_storage().resize_(0)
        return k

    with pytest.raises(errors.SlopeError, match="in place"):
        aca_ext.odeint(func, torch.ones(n, dtype=torch.float64), T, **settings)


def test_backward_that_frees_its_gradient() -> None:
    def free(g: Tensor) -> Tensor:
        v = 0.5 * g
        g.untyped_storage().resize_(0)
        return v

    y0 = torch.ones(3, requires_grad=True)
    y = aca_ext.odeint(lambda t, y: Half.apply(y, free), y0, T)
    with pytest.raises(errors.ArgumentTypeError, match="freed or resized"):
        y.sum().backward()
