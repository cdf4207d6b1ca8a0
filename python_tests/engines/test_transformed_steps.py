"""Checkpoints inside torch.func: memory of a reverse pass, and funcs whose steps cannot be evaluated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import aca_ext
from aca_ext import errors, odeint
from aca_ext.engines import transformed_steps
from aca_ext.tensor_memory import TensorMemory

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

T = torch.tensor([0.0, 0.35, 1.0], dtype=torch.float64)
KINDS: dict[str, dict[str, Any]] = {
    "adaptive": {"rtol": 1e-6, "atol": 1e-8},
    "fixed": {"method": "rk4", "options": {"step_size": 0.1}},
    "independent": {"rtol": 1e-6, "atol": 1e-8, "options": {"batch": "independent"}},
}
NET = Mlp()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts of the steps with a checkpoint, and of those that keep their graph."""
    counts = {"checkpoint": 0, "graph": 0}
    checkpointed, with_graph = transformed_steps.checkpointed, transformed_steps.CheckpointedSteps._with_graph

    def one(*args: Any) -> Any:
        found = checkpointed(*args)
        counts["checkpoint"] += 1
        return found

    def other(*args: Any) -> Any:
        counts["graph"] += 1
        return with_graph(*args)

    monkeypatch.setattr(transformed_steps, "checkpointed", one)
    monkeypatch.setattr(transformed_steps.CheckpointedSteps, "_with_graph", other)
    return counts


def states() -> Tensor:
    return sample(4, 3) * torch.linspace(0.1, 4, 4, dtype=torch.float64)[:, None]


def check_against_graphs(value: Callable[..., Any]) -> None:
    """``value(gradient=...)`` agrees with the derivative of the stored graph."""
    for found, expected in zip(tree_leaves(value(gradient="aca")), tree_leaves(value(gradient="direct")), strict=True):
        assert found.shape == expected.shape
        assert relative_error(found.detach(), expected.detach()) <= 1e-12


def loss(y: Tensor, params: Any = None, kind: str = "adaptive", **settings: Any) -> Tensor:
    func = NET if params is None else lambda t, y: functional_call(NET, params, (t, y))
    return odeint(func, y, T, **KINDS[kind] | settings).square().sum()


def loss_sum(y: Tensor) -> Tensor:
    return odeint(NET, y, T, gradient="direct", **KINDS["adaptive"]).sum()


@pytest.mark.parametrize("kind", KINDS)
class TestDerivatives:
    @property
    def params(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in NET.named_parameters()}

    def check(self, transform: Callable[[Any], Any], calls: dict[str, int], kind: str, *inputs: Any) -> None:
        check_against_graphs(lambda gradient: transform(lambda *x: loss(*x, kind=kind, gradient=gradient))(*inputs))
        assert calls["graph"] == 1
        assert calls["checkpoint"] > 4

    def test_of_states_and_parameters(self, calls: dict[str, int], kind: str) -> None:
        self.check(lambda f: grad(f, argnums=(0, 1)), calls, kind, states(), self.params)

    def test_vmap_of_grad(self, calls: dict[str, int], kind: str) -> None:
        many = torch.stack([states(), 2 * states()])
        self.check(lambda f: vmap(grad(f, argnums=(0, 1)), (0, None)), calls, kind, many, self.params)

    def test_grad_of_vmap(self, calls: dict[str, int], kind: str) -> None:
        many = torch.stack([states(), 2 * states()])
        self.check(
            lambda f: grad(lambda y, p: vmap(f, (0, None))(y, p).sum(), argnums=(0, 1)), calls, kind, many, self.params
        )

    def test_second(self, calls: dict[str, int], kind: str) -> None:
        y = states()[:2]
        self.check(hessian, calls, kind, y)
        calls.update(checkpoint=0, graph=0)
        self.check(lambda f: jacrev(jacrev(f)), calls, kind, y)
        calls.update(checkpoint=0, graph=0)
        self.check(lambda f: vmap(hessian(f)), calls, kind, torch.stack([y, 2 * y]))

    def test_of_second_order_in_parameters(self, calls: dict[str, int], kind: str) -> None:
        tangents = {name: torch.ones_like(p) for name, p in self.params.items()}
        self.check(
            lambda f: lambda y, p: jvp(grad(f, argnums=1), (y, p), (y, tangents)), calls, kind, states(), self.params
        )

    def test_a_pull_back_that_is_called_later(self, calls: dict[str, int], kind: str) -> None:
        self.check(lambda f: lambda y: vjp(f, y)[1](torch.ones((), dtype=y.dtype)), calls, kind, states())

    def test_of_a_layer(self, calls: dict[str, int], kind: str) -> None:
        """The module holds the parameters for as long as the call lasts, and not in the reverse pass."""

        def value(gradient: str) -> Any:
            layer = aca_ext.NeuralODE(NET, T, gradient=gradient, **KINDS[kind])
            params = {name: 1.1 * p.detach() for name, p in layer.named_parameters()}
            return grad(lambda p: functional_call(layer, p, (states(),)).square().sum())(params)

        check_against_graphs(value)
        assert calls["graph"] == 1
        assert calls["checkpoint"] > 4

    def test_of_parameters_outside_of_vmap(self, calls: dict[str, int], kind: str) -> None:
        many, params = torch.stack([states(), 2 * states()]), list(NET.parameters())
        check_against_graphs(
            lambda gradient: torch.autograd.grad(
                vmap(lambda y: loss(y, kind=kind, gradient=gradient))(many).sum(), params
            )
        )
        assert calls["graph"] == 1

    def test_forward_mode_keeps_no_checkpoints(self, calls: dict[str, int], kind: str) -> None:
        check_against_graphs(lambda gradient: jacfwd(lambda y: loss(y, kind=kind, gradient=gradient))(states()))
        assert calls["checkpoint"] == 0


@pytest.mark.parametrize("transform", [grad, lambda f: vmap(grad(f))], ids=["grad", "vmap of grad"])
def test_memory_of_a_reverse_pass(transform: Callable[[Any], Any]) -> None:
    """The graph of one step, whatever their number; only the states between steps are added."""
    weight = torch.randn(2, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 64
    y = torch.ones(1, 8, 2, dtype=torch.float64)

    def peak(gradient: str, n_steps: int) -> int:
        def value(y: Tensor) -> Tensor:
            func = lambda t, y: torch.tanh(y @ weight).sin() @ weight.T  # noqa: E731
            return odeint(func, y, (0.0, 1.0), method="rk4", options={"n_steps": n_steps}, gradient=gradient)[-1].sum()

        memory = TensorMemory()
        with memory:
            transform(value)(y if transform is not grad else y[0])
        return memory.peak

    assert peak("direct", 32) > 3 * peak("direct", 8)
    assert peak("aca", 32) < 1.2 * peak("aca", 8)
    assert peak("aca", 32) < 0.2 * peak("direct", 32)


class TestOtherFuncs:
    """What cannot be evaluated again keeps its graph, and has the same derivative."""

    @staticmethod
    def check(value: Callable[..., Tensor], calls: dict[str, int], has_checkpoints: bool = False) -> None:
        """``value(x, **settings)`` for a vector x; derivatives by two ways of autograd, and by torch.func."""
        x = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
        settings = KINDS["adaptive"]
        expected = torch.autograd.functional.jacobian(lambda x: value(x, gradient="direct", **settings), x)
        assert relative_error(grad(lambda x: value(x, **settings))(x).detach(), expected) <= 1e-12
        assert (calls["checkpoint"] > 0) == has_checkpoints
        second = torch.autograd.functional.hessian(lambda x: value(x, gradient="direct", **settings), x)
        assert relative_error(hessian(lambda x: value(x, **settings))(x).detach(), second) <= 1e-11

    def test_a_cache(self, calls: dict[str, int]) -> None:
        def value(x: Tensor, **settings: Any) -> Tensor:
            cache: dict[str, Tensor] = {}

            def func(t: Tensor, y: Tensor) -> Tensor:
                if "rate" not in cache:
                    cache["rate"] = x.exp()
                return -cache["rate"] * y

            return odeint(func, 1 / x, T, **settings).sum()

        self.check(value, calls)

    def test_a_cache_out_of_sight(self, calls: dict[str, int]) -> None:
        """A generator holds it."""

        def value(x: Tensor, **settings: Any) -> Tensor:
            def rates() -> Any:
                rate = x.exp()
                while True:
                    yield rate

            source = rates()
            return odeint(lambda t, y: -next(source) * y, 1 / x, T, **settings).sum()

        self.check(value, calls, has_checkpoints=True)

    def test_a_cache_that_begins_late(self, calls: dict[str, int]) -> None:
        def value(x: Tensor, **settings: Any) -> Tensor:
            cache: list[Tensor] = []

            def func(t: Tensor, y: Tensor) -> Tensor:
                if t > 0.5 and not cache:
                    cache.append(x.exp())
                return -(cache[0] if cache and t > 0.5 else x) * y

            return odeint(func, 1 / x, T, **settings).sum()

        x = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
        expected = torch.autograd.functional.jacobian(lambda x: value(x, gradient="direct", **KINDS["adaptive"]), x)
        assert relative_error(grad(lambda x: value(x, **KINDS["adaptive"]))(x), expected) <= 1e-12

    def test_a_transform_inside_func(self, calls: dict[str, int]) -> None:
        def value(x: Tensor, **settings: Any) -> Tensor:
            return odeint(lambda t, y: -vmap(lambda rate, y: rate * y * y)(x, y), 1 / x, T, **settings).sum()

        self.check(value, calls)

    def test_a_transform_of_captured_tensors_alone(self, calls: dict[str, int]) -> None:
        def value(x: Tensor, **settings: Any) -> Tensor:
            return odeint(lambda t, y: -grad(lambda x: (x * x * x).sum())(x) * y, 1 / x, T, **settings).sum()

        self.check(value, calls)

    def test_an_autograd_function_inside_func(self, calls: dict[str, int]) -> None:
        class Cube(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return x**3

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                ctx.save_for_backward(*inputs)
                ctx.save_for_forward(*inputs)

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Tensor:
                return 3 * ctx.saved_tensors[0] ** 2 * g

            @staticmethod
            def jvp(ctx: Any, tangent: Tensor) -> Tensor:
                return 3 * ctx.saved_tensors[0] ** 2 * tangent

        def value(x: Tensor, **settings: Any) -> Tensor:
            return odeint(lambda t, y: -Cube.apply(x) * y, 1 / x, T, **settings).sum()

        self.check(value, calls, has_checkpoints=True)

    def test_slopes_without_an_operation(self, calls: dict[str, int]) -> None:
        """func returns a captured tensor, or its argument."""
        self.check(lambda x, **s: odeint(lambda t, y: x, 1 / x, T, **s).square().sum(), calls, has_checkpoints=True)
        calls.update(checkpoint=0)
        self.check(lambda x, **s: odeint(lambda t, y: y, 1 / x, T, **s).square().sum(), calls, has_checkpoints=True)
        calls.update(checkpoint=0)
        self.check(lambda x, **s: odeint(lambda t, y: x - y, x, T, **s).square().sum(), calls, has_checkpoints=True)

    def test_a_tensor_that_is_used_late(self, calls: dict[str, int]) -> None:
        def value(x: Tensor, **settings: Any) -> Tensor:
            return odeint(lambda t, y: -y * y * (x if t > 0.5 else 1.0), 1 / x, T, **settings).sum()

        self.check(value, calls, has_checkpoints=True)
        assert calls["graph"] >= 2

    def test_a_counter(self, calls: dict[str, int]) -> None:
        class Slope:
            n_evals = 0

            def __init__(self, x: Tensor) -> None:
                self.x = x

            def __call__(self, t: Tensor, y: Tensor) -> Tensor:
                self.n_evals += 1
                return -self.x * y

        self.check(lambda x, **s: odeint(Slope(x), 1 / x, T, **s).square().sum(), calls, has_checkpoints=True)

    def test_a_compiled_func(self, calls: dict[str, int]) -> None:
        net = torch.compile(Mlp(), backend="eager")
        value = lambda y, **s: odeint(lambda t, y: net(t, y), y, T, **KINDS["adaptive"], **s).sum()  # noqa: E731
        found = grad(value)(states())
        expected = grad(loss_sum)(states())
        assert relative_error(found.detach(), expected.detach()) <= 1e-12

    def test_tuples_complex_numbers_and_integers(self, calls: dict[str, int]) -> None:
        order = torch.tensor([2, 0, 1])

        def value(x: Tensor, **settings: Any) -> Tensor:
            held = order.clone()  # inside the transform
            y = odeint(
                lambda t, y: (1j * x * y[0][held], -y[1] * t),
                (torch.complex(x, 1 / x), torch.complex(x[:2], x[1:])),
                T,
                **settings,
            )
            return sum(torch.view_as_real(part).square().sum() for part in y)

        self.check(value, calls, has_checkpoints=True)


class TestErrors:
    x = torch.tensor([0.3, 0.7], dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)

    def test_func_that_uses_another_tensor_in_the_reverse_pass(self) -> None:
        passes = iter([False] * 100)

        def value(x: Tensor) -> Tensor:
            return odeint(
                lambda t, y: -(y.sin() if next(passes, True) else x) * y,
                1 / x,
                T,
                method="rk4",
                options={"n_steps": 10},
            ).sum()

        pull_back = vjp(value, self.x)[1]
        list(passes)
        with pytest.raises(errors.ReplayError, match="same tensors in the reverse pass"):
            pull_back(self.one)

    def test_places_that_change_before_the_reverse_pass(self) -> None:
        """The reverse pass finds what the solve found."""

        class Slope:
            def __init__(self, x: Tensor) -> None:
                self.x = x

            def __call__(self, t: Tensor, y: Tensor) -> Tensor:
                return -self.x * y

        slopes: list[Slope] = []

        def value(x: Tensor) -> Tensor:
            slopes.append(Slope(x))
            return odeint(slopes[-1], 1 / x, T, **KINDS["adaptive"]).sum()

        pull_back = vjp(value, self.x)[1]
        slopes[0].x = torch.zeros(2)
        assert relative_error(pull_back(self.one)[0], grad(value)(self.x)) <= 1e-12
        assert not slopes[0].x.any()

    def test_a_late_cache_that_nothing_shows(self) -> None:
        def value(x: Tensor) -> Tensor:
            def rates() -> Any:
                kept = None
                while True:
                    t = yield
                    kept = x.exp() if t > 0.5 and kept is None else kept
                    yield x if kept is None else kept

            source = rates()

            def func(t: Tensor, y: Tensor) -> Tensor:
                next(source)
                return -source.send(t) * y

            return odeint(func, 1 / x, T, **KINDS["fixed"]).sum()

        with pytest.raises(errors.ArgumentValueError, match="keeps a tensor"):
            grad(value)(self.x)
