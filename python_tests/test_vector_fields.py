"""What func may be and do: callables of every kind, state of modules, random numbers, autocast, odd return values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from autograd_reference import relative_error, solve_over
from problems import Mlp, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
LOOSE = {"rtol": 1e-3, "atol": 1e-4}
DISCRETE = ("aca", "direct", "naive")  # gradients of the discrete solution

# first_step far too large: the first trials are rejected.
REJECTING = {"rtol": 1e-6, "atol": 1e-6, "options": {"first_step": 1.0}}


def precision(gradient: str) -> float:
    return {"aca": 1e-12, "direct": 1e-12}.get(gradient, 1e-5)


def check_against_steps(
    func: Callable[..., Any], wanted: Sequence[Tensor], gradient: str, args: Sequence[Any] = (), **settings: Any
) -> None:
    """Gradients of a solve equal those of autograd over the same accepted steps."""
    settings = {"rtol": 1e-8, "atol": 1e-8} | settings
    y0 = sample(2, 3).requires_grad_()
    sol = aca_ext.solve(func, y0, T, gradient=gradient, args=args, **settings)
    found = torch.autograd.grad(sol.y.square().sum(), [y0, *wanted], retain_graph=True)
    truth = solve_over(func, y0, T.tolist(), sol.steps.tolist(), "dopri5", args)
    expected = torch.autograd.grad(truth.square().sum(), [y0, *wanted])
    for grad, exact in zip(found, expected, strict=True):
        assert exact.any()
        assert relative_error(grad, exact) <= precision(gradient)


def leaf(*shape: int, seed: int = 1) -> Tensor:
    return sample(*shape, seed=seed).requires_grad_()


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
    else:  # the adjoint state of every parameter is integrated, and stays zero
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


class Normalised(nn.Module):
    """A slope with BatchNorm, which moves buffers in every evaluation in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, self.norm(y)) * 3

    def statistics(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self.named_buffers()}


def replayed_statistics(steps: Sequence[tuple[float, float]], y0: Tensor) -> dict[str, Tensor]:
    """Statistics after the stages of the accepted steps, each evaluated once, first same as last."""
    func = Normalised()
    tableau = aca_ext.METHODS["dopri5"]
    a = [[float(x) for x in row] for row in tableau.a]
    y, k = y0, []
    with torch.no_grad():
        for i, (t, t_next) in enumerate(steps):
            h = t_next - t
            k = [func(torch.tensor(t, dtype=torch.float64), y)] if i == 0 else [k[-1]]
            for row in a[1:]:
                stage = y + sum((h * w) * k_j for w, k_j in zip(row, k, strict=True))
                k.append(func(torch.tensor(t, dtype=torch.float64), stage))
            y = stage
    return func.statistics()


@pytest.mark.parametrize("first_step", [None, 1.0])
@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_batchnorm_statistics_move_on_accepted_stages_alone(gradient: str, first_step: float | None) -> None:
    y0 = sample(16, 3).requires_grad_()
    func = Normalised()
    options = {} if first_step is None else {"first_step": first_step}
    sol = aca_ext.solve(func, y0, T, gradient=gradient, rtol=1e-6, atol=1e-6, options=options)
    assert first_step is None or sol.stats.n_rejected > 0
    after_forward = func.statistics()
    assert int(after_forward["norm.num_batches_tracked"]) == 1 + 6 * sol.stats.n_accepted
    for name, expected in replayed_statistics(sol.steps.tolist(), y0).items():
        torch.testing.assert_close(after_forward[name], expected, rtol=1e-12, atol=1e-14)
    sol.y.sum().backward()
    for name, expected in after_forward.items():
        assert torch.equal(func.statistics()[name], expected)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_batchnorm_statistics_with_a_gradient_of_time(gradient: str) -> None:
    func = Normalised()
    t = T.clone().requires_grad_()
    sol = aca_ext.solve(func, sample(16, 3), t, gradient=gradient, rtol=1e-6, atol=1e-6)
    assert int(func.norm.num_batches_tracked) == 1 + 6 * sol.stats.n_accepted
    sol.y.square().sum().backward()
    assert int(func.norm.num_batches_tracked) == 1 + 6 * sol.stats.n_accepted


class Holder:
    """An object that is no module and holds one, in a list."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [module]

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        return self.parts[0](t, y)

    __call__ = slope


def through_a_global(t: Tensor, y: Tensor) -> Tensor:
    return GLOBAL[0](t, y)


GLOBAL: list[nn.Module] = []

WRAPPINGS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "lambda": lambda module: lambda t, y: module(t, y),
    "lambda of a lambda": lambda module: (lambda inner: lambda t, y: inner(t, y))(lambda t, y: module(t, y)),
    "partial": lambda module: functools.partial(lambda module, t, y: module(t, y), module),
    "default value": lambda module: lambda t, y, module=module: module(t, y),
    "bound method of the module": lambda module: module.forward,
    "bound method of an object": lambda module: Holder(module).slope,
    "callable object": Holder,
    "global": lambda module: (GLOBAL.clear(), GLOBAL.append(module), through_a_global)[-1],
}


@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_batchnorm_behind_a_callable(name: str, gradient: str) -> None:
    module = Normalised()
    func = WRAPPINGS[name](module)
    sol = aca_ext.solve(func, sample(16, 3).requires_grad_(), T, gradient=gradient, **REJECTING)
    assert sol.stats.n_rejected > 0
    assert int(module.norm.num_batches_tracked) == 1 + 6 * sol.stats.n_accepted
    after_forward = module.statistics()
    sol.y.sum().backward()
    for buffer, expected in zip(module.buffers(), after_forward.values(), strict=True):
        assert torch.equal(buffer, expected)


def test_batchnorm_in_evaluation_mode() -> None:
    func = Normalised().eval()
    before = func.statistics()
    aca_ext.odeint(func, sample(16, 3), T, **LOOSE).sum().backward()
    for name, expected in before.items():
        assert torch.equal(func.statistics()[name], expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batchnorm_gradient(create_graph: bool) -> None:
    found = []
    for gradient in ("aca", "direct"):
        func, y0 = Normalised(), sample(16, 3).requires_grad_()
        y = aca_ext.odeint(func, y0, T, gradient=gradient, **REJECTING)
        found.append(torch.autograd.grad(y.square().sum(), [y0, *func.parameters()], create_graph=create_graph))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-11


class Dropping(Mlp):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(t, y), 0.3, training=True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "settings", [{"options": {"step_size": 0.1}}, {"rtol": 1.0, "atol": 1.0}, {"rtol": 0.3, "atol": 0.3}]
)
def test_dropout_draws_the_same_numbers_in_the_replay(settings: dict[str, Any], create_graph: bool) -> None:
    found, states = [], []
    for gradient in ("aca", "direct"):
        torch.manual_seed(7)
        func, y0 = Dropping(), sample(4, 3).requires_grad_()
        y = aca_ext.odeint(func, y0, T, gradient=gradient, **settings)
        before = torch.get_rng_state()
        grads = torch.autograd.grad(y.square().sum(), [y0, *func.parameters()], create_graph=create_graph)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(before)
        found.append((y.detach(), *grads))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(states[0], states[1])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_dropout_behind_a_function_and_with_rejected_steps() -> None:
    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(3)
        net, y0 = Mlp(), sample(4, 3).requires_grad_()

        def func(t: Tensor, y: Tensor, net: Mlp = net) -> Tensor:
            return net(t, y) + 0.1 * torch.rand_like(y) * y

        sol = aca_ext.solve(func, y0, T, gradient=gradient, rtol=2e-4, atol=2e-4, options={"first_step": 1.0})
        assert sol.stats.n_rejected > 0
        found.append((sol.y, *torch.autograd.grad(sol.y.square().sum(), [y0, *net.parameters()])))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


class Cast(Mlp):
    """Records the autocast state of its evaluations."""

    def __init__(self) -> None:
        super().__init__(3, 8, torch.float32)
        self.seen: list[tuple[bool, torch.dtype]] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k = super().forward(t, y)
        self.seen.append((torch.is_autocast_enabled("cpu"), k.dtype))
        return k


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize(("forward", "backward"), [(True, False), (False, True), (True, True)])
def test_replay_runs_under_the_autocast_state_of_the_forward_pass(gradient: str, forward: bool, backward: bool) -> None:
    found = []
    for kind in (gradient, "direct"):
        func, y0 = Cast(), sample(2, 3).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward):
            y = aca_ext.odeint(func, y0, T, gradient=kind, options={"step_size": 0.2})
        assert y.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward):
            found.append([y.detach(), *torch.autograd.grad(y.sum(), [y0, *func.parameters()])])
        expected = (True, torch.bfloat16) if forward else (False, torch.float32)
        assert set(func.seen) == {expected}
    for one, other in zip(*found, strict=True):
        # Backward through bfloat16 products rounds each sum to 8 bits, in an order of its own.
        assert relative_error(one, other) <= (0.05 if forward or backward else 1e-5)


def test_autocast_of_an_adaptive_solve() -> None:
    func, y0 = Cast(), sample(2, 3).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = aca_ext.odeint(func, y0, T, rtol=1e-1, atol=1e-1)
    y.sum().backward()
    exact = aca_ext.odeint(func, y0.detach(), T, rtol=1e-5, atol=1e-5)
    assert relative_error(y, exact) < 0.2
    assert y0.grad is not None
    assert y0.grad.isfinite().all()


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


class Late(Mlp):
    """Not repeatable in a way that its first evaluation does not show."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0
        self.register_buffer("power", torch.ones(3, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.how == "random numbers after half the time" and t > 0.5:
            y = y + torch.rand_like(y)
        elif self.how == "a buffer that it moves":
            self.power.mul_(0.9)
            y = y * self.power
        elif self.how == "a buffer that it moves later" and t > 0.5:
            self.power.mul_(0.9)
        elif self.how == "a count of its own":
            y = y * (1 + 0.1 * self.calls)
        if self.how == "a buffer that it moves later":
            y = y * self.power
        return super().forward(t, y)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("how", ["random numbers after half the time", "a buffer that it moves"])
def test_func_that_does_not_repeat_itself(how: str, create_graph: bool) -> None:
    func = Late(how)
    y = aca_ext.odeint(func, sample(2, 3), T, options={"step_size": 0.2})
    moved_under_a_graph = create_graph and how == "a buffer that it moves"
    expected, message = (
        (RuntimeError, "modified by an inplace|does not replay")
        if moved_under_a_graph
        else (errors.ReplayError, "does not replay")
    )
    with pytest.raises(expected, match=message) as raised:
        torch.autograd.grad(y[-1].sum(), list(func.parameters()), create_graph=create_graph)
    assert isinstance(raised.value, RuntimeError)


@pytest.mark.parametrize("how", ["random numbers after half the time", "a buffer that it moves"])
def test_direct_takes_a_func_that_does_not_repeat_itself(how: str) -> None:
    func = Late(how)
    found = []
    for gradient in ("direct", "naive"):
        torch.manual_seed(0)
        func.power.fill_(1.0)
        y = aca_ext.odeint(func, sample(2, 3), T, options={"step_size": 0.2}, gradient=gradient)
        if how == "a buffer that it moves":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y[-1].sum().backward()
            return
        found.append(torch.autograd.grad(y[-1].sum(), list(func.parameters())))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_spectral_norm_does_not_give_a_wrong_gradient_silently() -> None:
    """Its power iteration moves a buffer that the weight depends on: the same gradient, or an error."""
    func = Mlp()
    func.net[0] = nn.utils.parametrizations.spectral_norm(func.net[0])
    y0 = sample(2, 3).requires_grad_()
    sol = aca_ext.solve(func, y0, T, options={"step_size": 0.2})
    try:
        sol.y[-1].sum().backward()
    except errors.ReplayError:
        return
    twin = Mlp()
    twin.net[0] = nn.utils.parametrizations.spectral_norm(twin.net[0])
    twin.load_state_dict(func.state_dict())
    x = sample(2, 3).requires_grad_()
    aca_ext.odeint(twin, x, T, options={"step_size": 0.2}, gradient="direct")[-1].sum().backward()
    assert relative_error(y0.grad, x.grad) <= 1e-6


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_compiled_func(gradient: str) -> None:
    net = Mlp()
    check_against_steps(torch.compile(net, backend="eager"), list(net.parameters()), gradient)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "rk4"])
def test_replay_meets_bitwise_the_states_of_the_forward_pass(method: str) -> None:
    class Recording(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[float, Tensor]] = []

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            self.seen.append((float(t), y.detach().clone()))
            return super().forward(t, y)

    func = Recording()
    t = torch.tensor([0.0, 0.7], dtype=torch.float64)
    y = aca_ext.odeint(func, sample(2, 3), t, method=method, options={"step_size": 0.1})
    forward, func.seen = func.seen, []
    y[-1].sum().backward()
    met = {(time, tuple(state.flatten().tolist())) for time, state in forward}
    assert func.seen
    for time, state in func.seen:
        assert (time, tuple(state.flatten().tolist())) in met
