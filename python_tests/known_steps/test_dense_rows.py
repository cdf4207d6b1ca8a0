"""Dense solutions and outputs of independent samples, each with steps of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from autograd_reference import relative_error
from hypothesis import given
from hypothesis import strategies as st
from problems import Mlp, sample
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.known_steps.dense_rows import _rounds
from aca_ext.tensor_memory import TensorMemory

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
EACH = torch.tensor([[0.0, 0.4, 1.0], [0.2, 0.3, 2.0], [1.0, 0.5, -1.0], [0.0, 0.1, 0.2]], dtype=torch.float64)
LOOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
ROWS: dict[str, Any] = {"options": {"batch": "independent"}}
KINDS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "dopri8": {"method": "dopri8"},
    "heun, by Hermite": {"method": "adaptive_heun"},
    "compact": {"options": {"batch": "independent", "compact": True}},
}
NET = Mlp()


def spread(n: int = 4) -> Tensor:
    """A batch whose samples need different numbers of steps."""
    return sample(n, 3) * torch.linspace(0.1, 6, n, dtype=torch.float64)[:, None]


def dense(y0: Any, t: Any = T, func: Any = NET, **settings: Any) -> Any:
    return aca_ext.solve(func, y0, t, dense=True, **LOOSE | ROWS | settings)


def alone(y0: Tensor, t: Any, i: int, **settings: Any) -> Any:
    """The dense solution of sample ``i`` by itself, in a batch of one."""
    return dense(y0[i : i + 1], t[i : i + 1] if t.dim() == 2 else t, **settings)


@pytest.mark.parametrize("t", [T, EACH], ids=["common times", "own times"])
@pytest.mark.parametrize("kind", KINDS)
class TestOfSamples:
    def test_goes_through_the_outputs(self, kind: str, t: Tensor) -> None:
        solution = dense(spread(), t, **KINDS[kind])
        plain = aca_ext.solve(NET, spread(), t, **LOOSE | ROWS | KINDS[kind])
        assert len({len(steps) for steps in plain.steps}) > 1
        assert torch.equal(solution.y, plain.y)
        assert all(map(torch.equal, solution.steps, plain.steps))
        assert relative_error(solution(t).detach(), plain.y.detach()) <= 1e-13

    def test_each_sample_is_that_of_a_solve_alone(self, kind: str, t: Tensor) -> None:
        y0 = spread()
        solution = dense(y0, t, **KINDS[kind])
        inside = t[:, :1] + (t[:, -1:] - t[:, :1]) * torch.tensor([0.93, 0.0, 0.171, 1.0, 0.17]) if t.dim() == 2 else T
        each = [alone(y0, t, i, **KINDS[kind]) for i in range(4)]
        for values, of_each in ((solution, each), (solution.derivative, [one.derivative for one in each])):
            found = values(inside)
            assert found.shape == (inside.shape[-1], 4, 3)
            for i, of_one in enumerate(of_each):
                other = of_one(inside[i : i + 1] if t.dim() == 2 else inside)
                assert relative_error(found[:, i : i + 1].detach(), other.detach()) <= 1e-11

    def test_gradients_are_those_of_requested_times(self, kind: str, t: Tensor) -> None:
        """The steps do not depend on the times in between, so these may be requested or asked for later."""
        ends = t[..., [0, -1]]
        settings = LOOSE | ROWS | KINDS[kind]
        if kind == "heun, by Hermite":
            pytest.skip("without dense=True, the method ends its steps at the requested times")
        results = []
        for is_dense in (True, False):
            y0 = spread().requires_grad_()
            y = dense(y0, ends, **KINDS[kind])(t) if is_dense else aca_ext.odeint(NET, y0, t, **settings)
            results.append([y, *torch.autograd.grad((y * sample(*y.shape, seed=2)).sum(), [y0, *NET.parameters()])])
        for one, other in zip(*results, strict=True):
            assert relative_error(one.detach(), other.detach()) <= 1e-11


class TestTimes:
    def test_shapes(self) -> None:
        solution = dense(spread())
        assert solution(0.3).shape == (4, 3)
        assert solution(T[:0]).shape == (0, 4, 3)
        assert solution(T[:1]).shape == (1, 4, 3)
        assert torch.equal(solution(0.4), solution(T)[1])

    def test_gradient_of_times(self) -> None:
        solution = dense(spread(), EACH)
        t = torch.stack([EACH[:, 0].lerp(EACH[:, -1], w) for w in (0.13, 0.55, 0.9)], 1).requires_grad_()
        weight = sample(3, 4, 3, seed=2)
        (found,) = torch.autograd.grad((solution(t) * weight).sum(), t)
        expected = (solution.derivative(t.detach()) * weight).sum(-1).T
        assert relative_error(found, expected.detach()) <= 1e-12

    def test_second_derivatives(self) -> None:
        y0 = torch.tensor([[0.4], [1.1]], dtype=torch.float64, requires_grad=True)
        how = {"rtol": 1e-3, "atol": 1e-3, "options": {"batch": "independent", "first_step": 0.5}}

        def values(y0: Tensor) -> Tensor:
            return dense(y0, func=lambda t, y: y.sin() * t.cos(), **how)(torch.tensor([0.3, 0.8]))

        assert torch.autograd.gradgradcheck(values, y0, atol=1e-3, rtol=1e-2)

    def test_padded_times(self) -> None:
        t = torch.tensor([[0.0, 0.5, 1.0], [0.0, 2.0, torch.nan], [0.3, torch.nan, torch.nan]], dtype=torch.float64)
        solution = dense(spread(3), t)
        y = solution(torch.tensor([[0.5], [2.0], [0.3]], dtype=torch.float64))
        expected = torch.stack([solution.y[1, 0], solution.y[1, 1], solution.y[0, 2]])[None]
        assert relative_error(y.detach(), expected.detach()) <= 1e-13
        with pytest.raises(errors.ArgumentValueError, match="padded with NaN"):
            aca_ext.solve(NET, spread(3), t, output_fn=lambda t, y: y, **LOOSE | ROWS)

    @pytest.mark.parametrize(
        ("t", "words"),
        [
            ([0.0, 1.1], "beyond the solution of sample 0: it holds 1.10"),
            (torch.tensor([[0.5], [0.5], [-0.1], [0.5]]), "beyond the solution of sample 2"),
            (float("nan"), "beyond the solution of sample 0: it holds nan"),
            (torch.zeros(3, 1), r"t has shape \(3, 1\).* or for each of them, \(4, T\)"),
            (torch.zeros(4, 1, 1), r"t has shape \(4, 1, 1\)"),
        ],
        ids=["late", "early", "nan", "samples", "dimensions"],
    )
    def test_that_are_refused(self, t: Any, words: str) -> None:
        with pytest.raises(errors.TimeError, match=words):
            dense(spread())(t)

    def test_func_that_has_changed(self) -> None:
        p = torch.tensor(1.0, dtype=torch.float64)
        solution = dense(spread(), func=lambda t, y: -p * y)
        p.mul_(1.1)
        with pytest.raises(errors.ReplayError, match="from the state of sample"):
            solution(0.3)


class TestOutputFn:
    @pytest.mark.parametrize("t", [T, EACH], ids=["common times", "own times"])
    def test_values_and_gradients(self, t: Tensor) -> None:
        def energy(t: Tensor, y: Tensor) -> Any:
            assert t.shape == (4, 1)
            return {"energy": y.square().sum(-1), "scaled": (t * y,)}

        results = []
        for is_kept in (False, True):
            y0 = spread().requires_grad_()
            if is_kept:
                y = aca_ext.odeint(NET, y0, t, **LOOSE | ROWS)
                times = t.expand(4, -1).T[..., None]
                found = [y.square().sum(-1), times * y]
            else:
                y = aca_ext.odeint(NET, y0, t, output_fn=energy, **LOOSE | ROWS)
                found = [y["energy"], y["scaled"][0]]
            total = found[0].sum() + (found[1] * sample(3, 4, 3, seed=4)).sum()
            results.append([*found, *torch.autograd.grad(total, [y0, *NET.parameters()])])
        for one, other in zip(*results, strict=True):
            assert relative_error(one.detach(), other.detach()) <= 1e-11

    def test_memory_does_not_grow_with_the_times(self) -> None:
        def peak(n_times: int) -> int:
            times, y0 = torch.linspace(0, 1, n_times, dtype=torch.float64), sample(50, 30).requires_grad_()
            with TensorMemory() as memory:
                y = aca_ext.odeint(lambda t, y: -y, y0, times, output_fn=lambda t, y: y.sum(), **LOOSE | ROWS)
                y.sum().backward()
            return memory.peak

        state = 50 * 30 * 8
        assert peak(63) - peak(3) < 20 * state  # for 60 states more

    def test_without_a_graph(self) -> None:
        with torch.no_grad():
            y = aca_ext.odeint(NET, spread(), T, output_fn=lambda t, y: y.sum(-1), **LOOSE | ROWS)
            assert relative_error(y, aca_ext.odeint(NET, spread(), T, **LOOSE | ROWS).sum(-1)) <= 1e-12


@pytest.mark.parametrize(
    "settings",
    [{"options": {"batch": "independent", "on_failure": "nan"}}, {"engine": "compiled"}, {"gradient": "direct"}],
    ids=["on_failure", "engine", "gradient"],
)
def test_what_is_not_supported(settings: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentValueError, match="dense or output_fn is given, but does not support"):
        dense(spread(), **settings)


def test_the_solution_can_be_replayed() -> None:
    solution = dense(spread(), EACH)
    assert relative_error(aca_ext.replay(NET, solution, spread()).detach(), solution.y.detach()) <= 1e-12


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=6))
def test_rounds_hold_every_step_that_is_needed(index: list[list[int]]) -> None:
    steps = np.array(index)
    needed, position = _rounds(steps)
    assert np.array_equal(np.take_along_axis(needed, position, 1), steps)
    assert needed.shape[1] == max(len(set(of_row)) for of_row in index)
