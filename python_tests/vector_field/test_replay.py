"""Replay: random numbers, autocast and states are those of the forward pass; a func that does not repeat is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


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
        # The backward pass of bfloat16 products rounds each sum to 8 bits, in another order.
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


class Late(Mlp):
    """A func that does not repeat, but whose first evaluation does."""

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
    """The power iteration updates a buffer that the weight depends on: the gradient is right, or an error."""
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


class Times(torch.autograd.Function):
    """A product whose operands no TorchFunctionMode sees."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        return y * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        y, w = ctx.saved_tensors
        return g * w, (g * y).sum(0)


class TestCustomFunctions:
    """An autograd.Function of the user, which uses the original of a tensor that a replay replaces."""

    @staticmethod
    def gradient(kind: str, gradient: str, factor: float | None = None, is_named: bool = False) -> Tensor:
        leaf = sample(3).requires_grad_()
        w = 2 * leaf if kind == "computed" else leaf
        if kind == "hooked":
            w.register_hook(lambda g: g)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(Times.apply(y, w if factor is None else factor * w)) + 0.1 * w

        params = [w] if is_named else None
        y = aca_ext.odeint(func, sample(4, 3), torch.tensor([0.0, 1.0]), gradient=gradient, params=params)
        return torch.autograd.grad(y[-1].square().sum(), leaf)[0]

    @pytest.mark.parametrize(("kind", "is_named"), [("hooked", False), ("hooked", True), ("computed", False)])
    def test_are_refused_where_a_gradient_would_be_lost(self, kind: str, is_named: bool) -> None:
        with pytest.raises(errors.ReplayError, match="gradient would be lost"):
            self.gradient(kind, "aca", is_named=is_named)

    @pytest.mark.parametrize(
        ("kind", "factor", "is_named"),
        [("plain", None, False), ("hooked", 1.0, False), ("hooked", 1.0, True), ("computed", None, True)],
    )
    def test_receive_their_gradient(self, kind: str, factor: float | None, is_named: bool) -> None:
        found, expected = (self.gradient(kind, gradient, factor, is_named) for gradient in ("aca", "direct"))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
