"""Solutions that are functions of time, and outputs computed from states that are not kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor

import aca_ext
from aca_ext import errors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
INNER = torch.tensor([0.0, 0.93, 0.17, 0.4, 1.0, 0.171], dtype=torch.float64)  # in no order, ends and steps included
KINDS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "dopri8": {"method": "dopri8"},
    "heun, by Hermite": {"method": "heun2", "options": {"step_size": 0.21}},
    "rk4, by Hermite": {"method": "rk4", "options": {"step_size": 0.21}},
    "jumps": {"options": {"jump_t": [0.35]}},
    "linear": {"method": "rk4", "options": {"step_size": 0.3, "interp": "linear"}},
}
LOOSE = {"rtol": 1e-4, "atol": 1e-5}
NET = Mlp()


def dense(y0: Any, t: Tensor = T, func: Any = NET, **settings: Any) -> Any:
    return aca_ext.solve(func, y0, t, dense=True, **LOOSE | settings)


def test_of_a_number_at_a_time() -> None:
    y0 = torch.tensor(2.0, dtype=torch.float64)
    solution = dense(y0, func=lambda t, y: -y)
    assert solution(0.5).shape == solution.derivative(0.5).shape == ()
    assert torch.equal(solution(0.5), solution([0.5])[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_back", [False, True], ids=["forward", "backward"])
class TestOfAState:
    @pytest.fixture
    def setting(self, kind: str, is_back: bool) -> tuple[Any, Tensor, Tensor, dict[str, Any]]:
        y0 = sample(4, 3).requires_grad_()
        t = T.flip(0) if is_back else T
        return dense(y0, t, **KINDS[kind]), y0, t, KINDS[kind]

    def test_goes_through_the_outputs(self, setting: Any) -> None:
        solution, y0, t, settings = setting
        plain = aca_ext.solve(NET, y0, t, **LOOSE | settings)
        assert torch.equal(solution.y, plain.y)
        assert torch.equal(solution.steps, plain.steps)
        assert relative_error(solution(t).detach(), plain.y.detach()) <= 1e-13

    def test_gradients_are_those_of_the_steps(self, setting: Any) -> None:
        """Against replay with the same times as outputs, whose graph is plain PyTorch's."""
        solution, y0, _, _ = setting
        weight = sample(len(INNER), 4, 3, seed=3)
        wanted = [y0, *NET.parameters()]
        order = INNER[1:-2].sort(descending=bool(solution.t[0] > solution.t[-1])).values
        inner = torch.cat([solution.t[:1], order, solution.t[-1:]])
        plan = replace(solution.plan, times=tuple(inner.tolist()))
        again = aca_ext.replay(NET, replace(solution, plan=plan), y0)
        expected = torch.autograd.grad((again * weight[: len(inner)]).sum(), wanted)
        found = torch.autograd.grad((solution(inner) * weight[: len(inner)]).sum(), wanted)
        assert relative_error(solution(inner).detach(), again.detach()) <= 1e-12
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-11

    def test_shapes_and_order(self, setting: Any) -> None:
        solution, _, _, _ = setting
        one_by_one = torch.stack([solution(float(t)) for t in INNER])
        assert relative_error(solution(INNER).detach(), one_by_one.detach()) <= 1e-14
        assert torch.equal(solution(INNER.view(2, 3)), solution(INNER).view(2, 3, 4, 3))
        assert solution(INNER[:0]).shape == (0, 4, 3)

    def test_derivative_in_time(self, setting: Any) -> None:
        solution, _, _, _ = setting
        inner = torch.tensor([0.13, 0.55, 0.83], dtype=torch.float64, requires_grad=True)
        y = solution(inner)
        weight = sample(4, 3, seed=2)
        (found,) = torch.autograd.grad((y * weight).sum(), inner)
        derivative = solution.derivative(inner.detach())
        assert relative_error(found, (derivative * weight).sum((1, 2)).detach()) <= 1e-12
        step = 1e-5
        expected = (solution(inner.detach() + step) - solution(inner.detach() - step)) / (2 * step)
        assert relative_error(derivative.detach(), expected.detach()) <= 1e-7


def test_derivative_approximates_func() -> None:
    solution = dense(sample(4, 3), rtol=1e-9, atol=1e-10)
    for t in (0.0, 0.31, 1.0):
        expected = NET(torch.tensor(t, dtype=torch.float64), solution(t))
        assert relative_error(solution.derivative(t).detach(), expected.detach()) <= 1e-5


def test_second_derivatives() -> None:
    def end(y0: Tensor, t: Tensor) -> Tensor:
        return dense(y0, func=lambda t, y: -y * y * t, options={"first_step": 0.4}, rtol=1e-2, atol=1e-2)(t)

    inputs = (sample(2).abs().requires_grad_(), INNER[1:3].clone().requires_grad_())
    assert torch.autograd.gradcheck(end, inputs)
    assert torch.autograd.gradgradcheck(end, inputs)


def test_args_receive_gradients() -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    tight = {"rtol": 1e-10, "atol": 1e-12}
    solution = dense(sample(3), func=lambda t, y, rate: -rate * y, args=(rate,), **tight)
    (found,) = torch.autograd.grad(solution(0.6).sum(), rate)
    assert relative_error(found, -0.6 * (sample(3) * torch.exp(-0.6 * rate)).sum().detach()) <= 1e-8


def test_tuple_and_complex_states() -> None:
    y0 = (torch.complex(sample(2), sample(2, seed=1)), torch.complex(sample(3), sample(3, seed=1)))
    solution = dense(y0, func=lambda t, y: (1j * y[0], -y[1]), rtol=1e-9, atol=1e-10)
    one, other = solution(INNER)
    assert relative_error(torch.view_as_real(one), torch.view_as_real(y0[0] * torch.exp(1j * INNER[:, None]))) <= 1e-7
    assert relative_error(torch.view_as_real(other), torch.view_as_real(y0[1] * torch.exp(-INNER[:, None]))) <= 1e-7


def test_without_gradients() -> None:
    with torch.no_grad():
        solution = dense(sample(4, 3))
        y = solution(INNER)
    assert not y.requires_grad
    assert relative_error(y, dense(sample(4, 3))(INNER).detach()) <= 1e-14


def test_a_changed_func_is_an_error() -> None:
    net = Mlp(seed=2)
    solution = dense(sample(4, 3), func=net)
    solution(0.5)
    with torch.no_grad():
        next(net.parameters()).mul_(1 + 1e-9)
    with pytest.raises(errors.ReplayError, match="optimizer step"):
        solution(0.5)


def test_transforms_of_the_time() -> None:
    solution, t = dense(sample(4, 3)), INNER[1:4]
    expected = torch.zeros(3, 4, 3, 3, dtype=torch.float64)
    for i in range(3):
        expected[i, :, :, i] = solution.derivative(t[i]).detach()
    assert relative_error(torch.func.jacrev(solution)(t).detach(), expected) <= 1e-12
    assert relative_error(torch.func.jacfwd(solution)(t).detach(), expected) <= 1e-12
    with pytest.raises(errors.ArgumentTypeError, match="vmap"):
        torch.func.vmap(solution)(t)


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, float("nan"), [0.5, 2.0]])
def test_times_outside(t: Any) -> None:
    with pytest.raises(errors.TimeError, match="beyond"):
        dense(sample(4, 3))(t)
    with pytest.raises(errors.TimeError, match="beyond"):
        dense(sample(4, 3)).derivative(t)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gradient": "direct"}, "gradient='direct'"),
    ({"checkpoints": 3}, "checkpoints=3"),
    ({"options": {"on_step_limit": "stop"}}, "on_step_limit"),
    ({"events": [aca_ext.Event(lambda t, y: t - 0.5)]}, "events"),
    ({"t": T.clone().requires_grad_()}, "t that requires grad"),
    ({"t": T[:1]}, "single time"),
    ({"engine": "compiled"}, "engine='compiled'"),
    ({"dense": 1}, "True or False"),
    ({"dense": False, "output_fn": 3}, "output_fn is of type int"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.AcaError, match=message):
        aca_ext.solve(NET, sample(4, 3), **{"t": T, "dense": True} | LOOSE | settings)


def test_odeint_and_layers_refuse() -> None:
    with pytest.raises(errors.ArgumentValueError, match="aca_ext"):
        aca_ext.odeint(NET, sample(4, 3), T, dense=True)
    with pytest.raises(errors.ArgumentValueError, match="aca_ext"):
        aca_ext.NeuralODE(NET, T, dense=True)


@pytest.mark.parametrize("settings", [{"dense": True}, {"dense": False, "output_fn": lambda t, y: y}], ids=["", "fn"])
def test_a_callback_that_ends_the_solve_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentValueError, match="callback"):
        aca_ext.solve(NET, sample(4, 3), T, callback=lambda step: True, **LOOSE | settings)
    seen: list[Any] = []
    aca_ext.solve(NET, sample(4, 3), T, callback=seen.append, **LOOSE | settings)
    assert len(seen) > 1


def test_random_numbers_are_refused() -> None:
    with pytest.raises(errors.ArgumentValueError, match="random"):
        dense(sample(4, 3), func=lambda t, y: y * torch.rand(()))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.0, "the result of output_fn is of type float; output_fn must return a tensor"),
        (None, "the result of output_fn is of type NoneType"),
        ({"a": (torch.ones(1), 2)}, r"the result of output_fn\['a'\]\[1\] is of type int"),
        ({}, "the result of output_fn is an empty dict"),
    ],
    ids=["float", "none", "number in a tree", "empty"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_output_fn_returns_no_tensor(result: Any, words: str, grad: bool) -> None:
    with pytest.raises(errors.ArgumentTypeError, match=words), torch.set_grad_enabled(grad):
        aca_ext.solve(NET, sample(4, 3), T, output_fn=lambda t, y: result, **LOOSE)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda t, y: y[: 1 + int(t > 0.2)], r"\(1, 3\).* and .*\(2, 3\).* at different times"),
        (lambda t, y: y if t > 0.2 else y.float(), "float32.* and .*float64"),
        (lambda t, y: y if t > 0.2 else {"y": y}, "other structures"),
    ],
    ids=["shape", "dtype", "structure"],
)
def test_output_fn_returns_other_forms(fn: Any, words: str) -> None:
    with pytest.raises(errors.ArgumentValueError, match=words):
        aca_ext.solve(NET, sample(4, 3), T, output_fn=fn, **LOOSE)


@pytest.mark.parametrize("kind", ["dopri5", "rk4, by Hermite", "jumps"])
class TestOutputFn:
    def test_values_and_gradients(self, kind: str) -> None:
        times = torch.linspace(0, 1, 11, dtype=torch.float64)
        head = Mlp(seed=5)

        def energy(t: Tensor, y: Tensor) -> Tensor:
            return (head(t, y) * y).sum(-1)

        y0 = sample(4, 3).requires_grad_()
        wanted = [y0, *NET.parameters(), *head.parameters()]
        found = aca_ext.odeint(NET, y0, times, output_fn=energy, **LOOSE | KINDS[kind])
        plain = aca_ext.odeint(NET, y0, times, **LOOSE | KINDS[kind])
        expected = torch.stack([energy(t, y) for t, y in zip(times, plain, strict=True)])
        assert relative_error(found.detach(), expected.detach()) <= 1e-12
        weight = sample(11, 4)
        expected_grads = torch.autograd.grad((expected * weight).sum(), wanted)
        for one, other in zip(torch.autograd.grad((found * weight).sum(), wanted), expected_grads, strict=True):
            assert relative_error(one, other) <= 1e-11

    def test_keeps_no_states(self, kind: str) -> None:
        if kind == "rk4, by Hermite":
            pytest.skip("every requested time is a node of its grid, so every state is kept anyway")
        kept: list[int] = []

        def saved(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        def total(n_times: int) -> int:
            kept.clear()
            times = torch.linspace(0, 1, n_times, dtype=torch.float64)
            with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
                aca_ext.odeint(NET, sample(50, 3), times, output_fn=lambda t, y: y.sum(), **LOOSE | KINDS[kind])
            return sum(kept)

        assert total(200) <= total(3) + 1000  # 197 states have 29 550 elements


def test_output_fn_of_a_tuple_with_dense() -> None:
    solution = dense(sample(4, 3), output_fn=lambda t, y: (y.sum(), t * y[0]))
    total, scaled = solution.y
    assert relative_error(total.detach(), solution(T).sum((1, 2)).detach()) <= 1e-13
    assert relative_error(scaled.detach(), (T[:, None] * solution(T)[:, 0]).detach()) <= 1e-13
    assert torch.equal(solution.t, T)


def test_output_fn_of_a_layer() -> None:
    layer = aca_ext.NeuralODE(NET, T, output="all", output_fn=lambda t, y: y.square().sum(-1), **LOOSE)
    expected = aca_ext.odeint(NET, sample(4, 3), T, **LOOSE).square().sum(-1)
    assert relative_error(layer(sample(4, 3)).detach(), expected.detach()) <= 1e-13


def test_output_fn_that_changes_before_the_backward_pass() -> None:
    p = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = aca_ext.solve(NET, sample(4, 3).requires_grad_(), T, output_fn=lambda t, y: p * y * t, **LOOSE).y
    with torch.no_grad():
        p.mul_(2)
    with pytest.raises(errors.ReplayError, match="output_fn does not repeat"):
        y.sum().backward()


def test_a_solution_that_is_not_dense() -> None:
    solution = aca_ext.solve(lambda t, y: -y, torch.ones(2), (0.0, 1.0))
    for ask in (solution, solution.derivative):
        with pytest.raises(errors.ArgumentValueError, match="dense=True"):
            ask(0.5)
