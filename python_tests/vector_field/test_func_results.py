"""Results that func may return, and tensors that are changed in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import precision, relative_error, solve_over
from problems import LOOSE, Mlp, leaf, sample
from torch import Tensor

import aca_ext
from aca_ext import errors

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def test_other_dtype_without_autocast() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(errors.SlopeError, match=rf"{dtype}.*float32"):
            aca_ext.odeint(lambda t, y, dtype=dtype: y.to(dtype), torch.ones(3), T)


RETURNS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "its input": lambda t, y, w: y,
    "a view of its input": lambda t, y, w: y.view(-1).view(y.shape),
    "a flipped input": lambda t, y, w: y.flip(0),
    "a transposed product": lambda t, y, w: (w @ y.T).T,
    "an expanded tensor": lambda t, y, w: w.sum(0).expand_as(y),
    "an expanded number": lambda t, y, w: (w.sum() * t).expand_as(y),
    "a tensor of itself": lambda t, y, w: w[:2],
    "a tensor of negated elements": lambda t, y, w: torch.complex(y, y @ w).conj().imag,
    "a slice": lambda t, y, w: torch.cat([y @ w, y], 1)[:, 1:4],
    "a constant": lambda t, y, w: torch.ones_like(y),
}


@pytest.mark.parametrize("name", RETURNS)
@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_what_func_returns(gradient: str, name: str) -> None:
    w, y0 = leaf(3, 3), sample(2, 3).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return RETURNS[name](t, y, w)

    sol = aca_ext.solve(func, y0, T, gradient=gradient, rtol=1e-8, atol=1e-8)
    truth = solve_over(func, y0, T.tolist(), sol.steps.tolist(), "dopri5")
    assert relative_error(sol.y, truth) <= 1e-13
    found = torch.autograd.grad(sol.y.square().sum(), [y0, w], allow_unused=True)
    expected = torch.autograd.grad(truth.square().sum(), [y0, w], allow_unused=True)
    for grad, exact in zip(found, expected, strict=True):
        if exact is None:
            assert grad is None or not grad.any()
        else:
            assert relative_error(grad, exact) <= precision(gradient)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_components_that_share_memory(gradient: str) -> None:
    y0 = (sample(2, 3).requires_grad_(), sample(2, 3, seed=1).requires_grad_())

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], y[1]

    sol = aca_ext.solve(func, y0, T, gradient=gradient, rtol=1e-8, atol=1e-8)
    truth = solve_over(func, y0, T.tolist(), sol.steps.tolist(), "dopri5")
    found, expected = (torch.autograd.grad(y[0].square().sum() + y[1].sum(), y0) for y in (sol.y, truth))
    for grad, exact in zip(found, expected, strict=True):
        assert relative_error(grad, exact) <= precision(gradient)


def test_a_list_as_slope_of_a_tuple_state() -> None:
    y = aca_ext.odeint(lambda t, y: [-y[0], -y[1]], (torch.ones(2), torch.ones(3)), T)
    assert isinstance(y, tuple)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("kind", ["tensor", "tuple", "complex"])
def test_func_that_changes_the_state_in_place(gradient: str, kind: str) -> None:
    def func(t: Tensor, y: Any) -> Any:
        part = y[0] if isinstance(y, tuple) else y
        with torch.no_grad():
            part.mul_(0.5)
        return y

    y0 = {
        "tensor": sample(2, 3),
        "tuple": (sample(2), sample(3)),
        "complex": torch.complex(sample(2), sample(2, seed=1)),
    }[kind]
    before = [x.clone() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    with pytest.raises(errors.SlopeError, match="in place"):
        aca_ext.odeint(func, y0, T, gradient=gradient)
    if kind == "tuple":
        assert all(torch.equal(x, b) for x, b in zip(y0, before, strict=True))


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_solution_edited_in_place_before_backward(gradient: str) -> None:
    found = []
    for edit in (False, True):
        func, y0 = Mlp(), sample(2, 3).requires_grad_()
        y = aca_ext.odeint(func, y0, T, gradient=gradient, **LOOSE)
        loss = y.sum()
        if edit:
            with torch.no_grad():
                y.zero_() if gradient == "aca" else y.data.zero_()
        if edit and gradient == "adjoint":
            continue
        found.append(torch.autograd.grad(loss, [y0, *func.parameters()]))
    for one, other in zip(found[0], found[-1], strict=True):
        assert torch.equal(one, other)


def test_edit_of_the_solution_is_part_of_the_graph() -> None:
    func, y0 = Mlp(), sample(2, 3).requires_grad_()
    y = aca_ext.odeint(func, y0, T, **LOOSE)
    y[-1].mul_(2.0)
    y[0].zero_()
    found = torch.autograd.grad(y.sum(), [y0, *func.parameters()])
    y = aca_ext.odeint(func, y0, T, **LOOSE)
    expected = torch.autograd.grad(y[1].sum() + 2 * y[2].sum(), [y0, *func.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_adjoint_refuses_a_solution_edited_in_place() -> None:
    func, y0 = Mlp(), sample(2, 3).requires_grad_()
    y = aca_ext.odeint(func, y0, T, gradient="adjoint", **LOOSE)
    loss = y.sum()
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_initial_state_edited_in_place_before_backward(gradient: str) -> None:
    found = []
    for edit in (False, True):
        func, y0 = Mlp(), sample(2, 3)
        y = aca_ext.odeint(func, y0, T, gradient=gradient, **LOOSE)
        if edit:
            y0.zero_()
        if edit and gradient in ("direct", "naive"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
            continue
        found.append(torch.autograd.grad(y.sum(), list(func.parameters())))
    for one, other in zip(found[0], found[-1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("what", ["parameter", "closure", "arg"])
def test_parameter_edited_in_place_before_backward(gradient: str, what: str) -> None:
    func, w, y0 = Mlp(), leaf(3), sample(2, 3).requires_grad_()
    x = torch.exp(w) if what == "arg" else w
    slope: Callable[..., Tensor] = func
    if what == "closure":
        slope = lambda t, y: torch.sin(func(t, y) * w)  # noqa: E731
    if what == "arg":
        slope = lambda t, y, u: torch.sin(func(t, y) * u)  # noqa: E731
    y = aca_ext.odeint(slope, y0, T, gradient=gradient, args=(x,) if what == "arg" else (), **LOOSE)
    with torch.no_grad():
        {"parameter": func.net[2].weight, "closure": w, "arg": x}[what].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
