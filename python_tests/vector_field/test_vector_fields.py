"""Kinds of callables as func, and places where it may hold the tensors that it depends on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from autograd_reference import precision, relative_error, solve_over
from problems import LOOSE, Mlp, leaf, sample
from torch import Tensor, nn

import aca_ext

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
DISCRETE = ("aca", "direct", "naive")  # gradients of the discrete solution


def check_against_steps(
    func: Callable[..., Any], wanted: Sequence[Tensor], gradient: str, args: Sequence[Any] = (), **settings: Any
) -> None:
    """Asserts that gradients of a solve equal those of autograd over the same accepted steps."""
    settings = {"rtol": 1e-8, "atol": 1e-8} | settings
    y0 = sample(2, 3).requires_grad_()
    sol = aca_ext.solve(func, y0, T, gradient=gradient, args=args, **settings)
    found = torch.autograd.grad(sol.y.square().sum(), [y0, *wanted], retain_graph=True)
    truth = solve_over(func, y0, T.tolist(), sol.steps.tolist(), "dopri5", args)
    expected = torch.autograd.grad(truth.square().sum(), [y0, *wanted])
    for grad, exact in zip(found, expected, strict=True):
        assert exact.any()
        assert relative_error(grad, exact) <= precision(gradient)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
class TestWhereTensorsHide:
    def test_function_of_a_module(self, gradient: str) -> None:
        net = Mlp()
        check_against_steps(lambda t, y: net(t, y) * 2, list(net.parameters()), gradient)

    def test_bound_method(self, gradient: str) -> None:
        class Physics:
            def __init__(self) -> None:
                self.net = Mlp()
                self.scale = leaf(3)

            def slope(self, t: Tensor, y: Tensor) -> Tensor:
                return self.net(t, y) * self.scale

        physics = Physics()
        check_against_steps(physics.slope, [physics.scale, *physics.net.parameters()], gradient)

    def test_callable_object(self, gradient: str) -> None:
        class Physics:
            def __init__(self) -> None:
                self.net = Mlp()

            def __call__(self, t: Tensor, y: Tensor) -> Tensor:
                return self.net(t, y)

        physics = Physics()
        check_against_steps(physics, list(physics.net.parameters()), gradient)

    def test_partial(self, gradient: str) -> None:
        net, context = Mlp(), leaf(3)

        def func(t: Tensor, y: Tensor, *, context: Tensor) -> Tensor:
            return net(t, y) + context

        check_against_steps(functools.partial(func, context=context), [context, *net.parameters()], gradient)

    def test_leaf_in_a_closure(self, gradient: str) -> None:
        w = leaf(3, 3)
        check_against_steps(lambda t, y: torch.tanh(y @ w), [w], gradient)

    def test_non_leaf_in_a_closure(self, gradient: str) -> None:
        w = leaf(3)
        context = torch.exp(w)
        check_against_steps(lambda t, y: torch.sin(context * y), [w], gradient)

    def test_two_non_leaves_of_one_history(self, gradient: str) -> None:
        w = leaf(3)
        one = torch.exp(w)
        other = torch.tanh(one)
        check_against_steps(lambda t, y: torch.sin(one * y) + other * torch.exp(-one), [w], gradient)

    def test_non_leaf_as_attribute_of_a_module(self, gradient: str) -> None:
        net, encoder = Mlp(), nn.Linear(2, 3, dtype=torch.float64)

        class Conditioned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net
                self.context = torch.tanh(encoder(sample(2, seed=3)))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return self.net(t, y) * self.context

        check_against_steps(Conditioned(), [*encoder.parameters(), *net.parameters()], gradient)

    def test_non_leaf_made_by_the_module_itself(self, gradient: str) -> None:
        class Conditioned(Mlp):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) * self.context

        func = Conditioned()
        func.encoder = nn.Linear(2, 3, dtype=torch.float64)
        func.context = torch.tanh(func.encoder(sample(2, seed=3)))
        check_against_steps(func, list(func.parameters()), gradient)

    def test_shared_weight(self, gradient: str) -> None:
        w = nn.Parameter(sample(3, 3, seed=1))

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.other = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 3, dtype=torch.float64)
                self.one.weight = self.other.weight = w

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return self.other(torch.tanh(self.one(y)))

        func = Tied()
        check_against_steps(func, list(func.parameters()), gradient)

    def test_args(self, gradient: str) -> None:
        net, u = Mlp(), leaf(3)

        def func(t: Tensor, y: Tensor, u: Tensor, factor: float, name: str) -> Tensor:
            assert name == "x"
            return net(t, y) * u * factor

        check_against_steps(func, [u, *net.parameters()], gradient, args=(u, 0.5, "x"))

    def test_non_leaf_arg(self, gradient: str) -> None:
        w = leaf(3)
        check_against_steps(lambda t, y, u: torch.sin(u * y), [w], gradient, args=(torch.exp(w),))

    def test_one_tensor_as_two_args(self, gradient: str) -> None:
        u = leaf(3)
        check_against_steps(lambda t, y, a, b: torch.sin(a * y) * b, [u], gradient, args=(u, u))

    def test_arg_that_func_also_closes_over(self, gradient: str) -> None:
        w = leaf(3)
        check_against_steps(lambda t, y, u: torch.sin(u * y) + w, [w], gradient, args=(w,))

    def test_arg_made_of_a_parameter(self, gradient: str) -> None:
        net = Mlp()
        arg = torch.tanh(net.net[0].weight.sum(1)[:3])
        check_against_steps(lambda t, y, u: net(t, y) * u, list(net.parameters()), gradient, args=(arg,))

    def test_initial_state_that_is_also_a_parameter(self, gradient: str) -> None:
        found = {}
        for kind in ("direct", gradient):
            w = leaf(3)
            y = aca_ext.odeint(lambda t, y, w=w: torch.tanh(w * y), w, T, gradient=kind, rtol=1e-9, atol=1e-9)
            (found[kind],) = torch.autograd.grad(y[1:].square().sum(), w)
        assert relative_error(found[gradient], found["direct"]) <= precision(gradient)

    def test_initial_state_that_is_also_an_arg(self, gradient: str) -> None:
        found = {}
        for kind in ("direct", gradient):
            w = leaf(3)
            x = torch.exp(w)
            y = aca_ext.odeint(lambda t, y, u: torch.tanh(u * y), x, T, gradient=kind, args=(x,), rtol=1e-9, atol=1e-9)
            (found[kind],) = torch.autograd.grad(y[1:].square().sum(), w)
        assert relative_error(found[gradient], found["direct"]) <= precision(gradient)

    def test_custom_autograd_function(self, gradient: str) -> None:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
                ctx.save_for_backward(x, w)
                return x * w * w

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
                x, w = ctx.saved_tensors
                return g * w * w, 2 * (g * x * w).sum(0)

        w = leaf(3)
        check_against_steps(lambda t, y: -torch.tanh(Square.apply(y, w)), [w], gradient)

    def test_func_that_calls_autograd(self, gradient: str) -> None:
        """The slope of a continuous normalising flow holds the trace of its own Jacobian."""
        net = Mlp()

        def func(t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                z = y[:, :2]
                if not z.requires_grad:
                    z = z.detach().requires_grad_()
                padded = torch.cat([z, torch.zeros_like(z[:, :1])], 1)
                dz = net(t, padded)[:, :2]
                rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
            return torch.cat([dz, -sum(rows).unsqueeze(1)], 1)

        check_against_steps(func, list(net.parameters()), gradient)

    def test_energy_gradient_as_slope(self, gradient: str) -> None:
        net = Mlp()

        def func(t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                if not y.requires_grad:
                    y = y.detach().requires_grad_()
                return -torch.autograd.grad(net(t, y).square().sum(), y, create_graph=True)[0]

        check_against_steps(func, [net.net[0].weight, net.net[2].weight], gradient)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_unused_and_frozen_parameters(gradient: str) -> None:
    func = Mlp()
    func.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))
    func.net[0].weight.requires_grad_(False)
    aca_ext.odeint(func, sample(2, 3), T, gradient=gradient, **LOOSE)[-1].sum().backward()
    assert func.net[0].weight.grad is None
    assert func.net[2].weight.grad is not None
    if gradient in DISCRETE:
        assert func.unused.grad is None
    else:  # the adjoint integrates a gradient for every parameter; that of an unused one stays zero
        assert func.unused.grad is None or not func.unused.grad.any()


@pytest.mark.parametrize("gradient", DISCRETE)
def test_parameter_used_in_a_part_of_the_solve_only(gradient: str) -> None:
    func = Mlp()
    func.late = nn.Parameter(torch.ones(3, dtype=torch.float64))
    plain = func.forward
    func.forward = lambda t, y: plain(t, y) + (func.late if t > 0.5 else 0.0)
    aca_ext.odeint(func, sample(2, 3), T, gradient=gradient, options={"step_size": 0.1})[-1].sum().backward()
    assert func.late.grad is not None
    assert func.late.grad.any()


def test_params_names_what_receives_a_gradient() -> None:
    net, w = Mlp(), leaf(3)
    context = torch.exp(w)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return net(t, y) * context

    for params in ([context], (p for p in [context])):
        y = aca_ext.odeint(func, sample(2, 3), T, params=params, **LOOSE)
        found = torch.autograd.grad(y.sum(), [w, *net.parameters()], allow_unused=True, retain_graph=True)
        assert found[0].any()
        assert not any(g is not None and g.any() for g in found[1:])


@pytest.mark.parametrize("name", ["params", "adjoint_params"])
@pytest.mark.parametrize("gradient", ["aca", "adjoint"])
def test_generator_of_params_counts_in_every_step(gradient: str, name: str) -> None:
    net = Mlp()
    found = []
    for given in ({}, {name: net.parameters()}):
        y = aca_ext.odeint(lambda t, y: net(t, y), sample(2, 3), T, gradient=gradient, **given, **LOOSE)
        found.append(torch.autograd.grad(y.square().sum(), list(net.parameters())))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_compiled_func(gradient: str) -> None:
    net = Mlp()
    check_against_steps(torch.compile(net, backend="eager"), list(net.parameters()), gradient)
