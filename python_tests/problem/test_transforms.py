"""PyTorch's tools applied to a model that holds a solve: right numbers or a clear error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import aca_ext
from aca_ext import errors

pytestmark = pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
LOOSE = {"rtol": 1e-5, "atol": 1e-6}
REPLAYING = [{"gradient": "aca"}, {"gradient": "aca", "options": {"batch": "independent"}}]
EVERY = [*REPLAYING, {"gradient": "direct"}, {"gradient": "adjoint"}, {"gradient": "aca", "checkpoints": 2}]


class Normalised(Mlp):
    """A network with buffers that its slope depends on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.norm.running_mean.copy_(sample(3, seed=8))
        self.eval()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(self.norm(y)) * torch.cos(t)


def gradients(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    y = (call or model)(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("settings", EVERY, ids=str)
class TestFunctionalCall:
    """The forward pass uses other tensors than those that the module holds during the replay."""

    def test_of_a_layer(self, settings: dict[str, Any]) -> None:
        model, x = aca_ext.NeuralODE(Normalised(), T, **LOOSE | settings), sample(4, 3).requires_grad_()
        other = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.mul_(0.7) if tensor.is_floating_point() else None
        values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        y = functional_call(model, values, (x,))
        wanted = [x, *other.parameters()]
        found = torch.autograd.grad(y.square().sum(), wanted)
        assert torch.equal(y, other(x))
        for one, expected in zip(found, torch.autograd.grad(other(x).square().sum(), wanted), strict=True):
            assert torch.equal(one, expected)

    def test_of_computed_parameters_behind_a_closure(self, settings: dict[str, Any]) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.slope = Mlp()

            def forward(self, x: Tensor) -> Tensor:
                return aca_ext.odeint(lambda t, y: self.slope(t, y) * t, x, T, **tight | settings)

        tight = {"rtol": 1e-10, "atol": 1e-11}
        model, x, scale = Model(), sample(4, 3), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def loss(of: Tensor) -> Tensor:
            return functional_call(model, {n: p * of for n, p in model.named_parameters()}, (x,)).square().sum()

        (found,) = torch.autograd.grad(loss(scale), scale)
        with torch.no_grad():
            step = 1e-5
            expected = (loss(scale + step) - loss(scale - step)) / (2 * step)
        assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("settings", EVERY, ids=str)
class TestHooks:
    def test_fire_once_and_change_the_gradient_once(self, settings: dict[str, Any]) -> None:
        x = sample(4, 3)
        model = aca_ext.NeuralODE(Mlp(), T, **LOOSE | settings)
        expected = gradients(model, x.clone().requires_grad_())[2:]
        calls: dict[str, list[str]] = {"before": [], "after": []}
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name: calls["before"].append(name) or 2 * g)
            p.register_post_accumulate_grad_hook(lambda p, name=name: calls["after"].append(name))
        model(x).square().sum().backward()
        names = sorted(name for name, _ in model.named_parameters())
        assert sorted(calls["before"]) == sorted(calls["after"]) == names
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert relative_error(p.grad, 2 * grad) <= 1e-12

    def test_of_a_parameter_behind_a_closure(self, settings: dict[str, Any]) -> None:
        rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        calls: list[int] = []
        rate.register_hook(lambda g: calls.append(1))
        aca_ext.odeint(lambda t, y: -rate * y, sample(4, 3), T, **LOOSE | settings).sum().backward()
        assert calls == [1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_checkpointed_model(settings: dict[str, Any], reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3).double(), aca_ext.NeuralODE(Mlp(), (0.0, 1.0), **LOOSE | settings))
    found, expected = [], []
    for grads, wrapped in ((expected, False), (found, True)):
        x = sample(4, 3).requires_grad_()
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        y.square().sum().backward()
        grads += [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_copies_pickles_and_state_dicts(settings: dict[str, Any]) -> None:
    model = aca_ext.NeuralODE(Normalised(), T, **LOOSE | settings)
    x = sample(4, 3).requires_grad_()
    expected = gradients(model, x)
    loaded = aca_ext.NeuralODE(Normalised(seed=5), T, **LOOSE | settings)
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        for one, truth in zip(gradients(other, x), expected, strict=True):
            assert torch.equal(one, truth)


@pytest.mark.filterwarnings("default")  # torch's compiler warns
@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_compiled_model(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3).double(), aca_ext.NeuralODE(Mlp(), (0.0, 1.0), **LOOSE | settings))
    x = sample(4, 3).requires_grad_()
    for one, other in zip(gradients(model, x, torch.compile(model, backend="eager")), gradients(model, x), strict=True):
        assert relative_error(one, other) <= 1e-13


NET = Mlp()


def solve(y: Tensor, gradient: str = "aca", **settings: Any) -> Tensor:
    return aca_ext.odeint(NET, y, T, gradient=gradient, **LOOSE | settings)[-1]


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "batched backward": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


UNAVAILABLE = [{"gradient": "adjoint"}, {"gradient": "naive"}, {"gradient": "aca", "checkpoints": 2}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", UNAVAILABLE, ids=str)
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "batched backward"])
def test_transforms_of_other_gradients_are_refused(transform: str, settings: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentValueError, match="transform"):
        TRANSFORMS[transform](lambda y: solve(y, **settings), sample(4, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [s for s in EVERY if s["gradient"] != "direct"], ids=str)
def test_a_batched_backward_pass_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentTypeError, match="batched backward pass"):
        TRANSFORMS["batched backward"](lambda y: solve(y, **settings), sample(4, 3))


def test_a_batched_backward_pass_through_direct() -> None:
    x = sample(2, 3)
    found = torch.autograd.functional.jacobian(lambda y: solve(y, "direct"), x, vectorize=True)
    assert relative_error(found, torch.autograd.functional.jacobian(lambda y: solve(y, "direct"), x)) <= 1e-12


@pytest.mark.parametrize("where", ["y0", "args", "a closure"])
@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("options", [{}, {"batch": "independent"}], ids=str)
def test_forward_mode_derivatives(gradient: str, where: str, options: dict[str, Any]) -> None:
    """Against reverse mode, for a tangent of the state, of an argument or of a tensor in a closure."""
    primal, tangent = sample(3, 1), sample(3, 1, seed=1)

    def end(x: Tensor) -> Tensor:
        y0 = x if where == "y0" else sample(3, 1, seed=2)
        func = (lambda t, y, a: -y * a) if where == "args" else (lambda t, y: -y * (x if where == "a closure" else 1))
        args = (x,) if where == "args" else ()
        return aca_ext.odeint(func, y0, T, args=args, gradient=gradient, options=options)

    jacobian = torch.autograd.functional.jacobian(end, primal)
    with forward_ad.dual_level():
        value, found = forward_ad.unpack_dual(end(forward_ad.make_dual(primal, tangent)))
    assert relative_error(value, end(primal)) <= 1e-13
    assert relative_error(found, (jacobian * tangent).sum((-2, -1))) <= 1e-12


@pytest.mark.parametrize("gradient", ["naive", "adjoint"])
def test_forward_mode_derivatives_of_other_gradients_are_refused(gradient: str) -> None:
    with forward_ad.dual_level(), pytest.raises(errors.ArgumentValueError, match="forward_ad"):
        solve(forward_ad.make_dual(sample(4, 3), sample(4, 3)), gradient)


@pytest.mark.parametrize("settings", REPLAYING, ids=str)
def test_jacobians_and_their_products_by_reverse_mode(settings: dict[str, Any]) -> None:
    x, v = sample(2, 3), sample(2, 3, seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda y: solve(y, **settings), x)
    _, product = torch.autograd.functional.jvp(lambda y: solve(y, **settings), x, v)
    assert relative_error(product, (jacobian * v).sum((2, 3))) <= 1e-10
