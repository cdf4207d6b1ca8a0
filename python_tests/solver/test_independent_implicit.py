"""Implicit methods with independent samples: every sample against a solve of that sample alone, and failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aca_ext import Event, odeint, solve
from aca_ext.errors import ArgumentValueError, NonFiniteError, OptionError, StepSizeError
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS, ROSENBROCK_METHODS
from aca_ext.solution import Solution

ADAPTIVE = [name for name, tableau in {**IMPLICIT_METHODS, **ROSENBROCK_METHODS}.items() if tableau.adaptive]
INDEPENDENT = {"batch": "independent"}
COUNTS = ("n_steps", "n_accepted", "n_rejected")
OF_NEWTON = ("n_jacobians", "n_factorizations", "n_newton_iterations")
RATES = torch.tensor([0.002, 0.04, 0.5, 3.0], dtype=torch.float64)
T = torch.tensor([0.0, 0.3, 0.31, 4.0, 40.0], dtype=torch.float64)
HOW: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-8}


def robertson(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
    """Robertson's reaction, whose first rate belongs to the sample and depends on time."""
    a, b, c = y.unbind(1)
    made, back, used = rate * a * (1 + 0.5 * torch.sin(t.reshape(-1))), 1e4 * b * c, 3e7 * b * b
    return torch.stack([back - made, made - back - used, used], 1)


def start() -> Tensor:
    return torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(len(RATES), 1)


def alone(t: Tensor, options: dict[str, Any], **how: Any) -> list[Solution]:
    times = t if t.dim() == 2 else t.expand(len(RATES), -1)
    y0 = start()
    return [
        solve(robertson, y0[i : i + 1], times[i], args=(RATES[i : i + 1],), options=options, **HOW | how)
        for i in range(len(RATES))
    ]


class TestSteps:
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_are_those_of_a_batch_of_one_bit_for_bit(self, method: str) -> None:
        """On the CPU, also the iterations, Jacobians and factorisations that each sample needs."""
        together = solve(robertson, start(), T, method=method, args=(RATES,), options=INDEPENDENT, **HOW)
        single = alone(T, INDEPENDENT, method=method)
        for i, one in enumerate(single):
            assert torch.equal(together.steps[i], one.steps[0])
            assert torch.equal(together.y[:, i], one.y[:, 0])
            assert all(getattr(together.stats, count)[i] == getattr(one.stats, count)[0] for count in COUNTS)
        for count in OF_NEWTON:
            assert getattr(together.stats, count) == sum(getattr(one.stats, count) for one in single)
        n_steps = together.stats.n_steps
        assert n_steps.max() > 1.1 * n_steps.min()
        assert method == "rodas5p" or "n_newton_iterations=" in repr(together.stats)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_are_those_of_a_common_solve_of_the_sample_up_to_rounding(self, method: str) -> None:
        together = solve(robertson, start(), T, method=method, args=(RATES,), options=INDEPENDENT, **HOW)
        for i, one in enumerate(alone(T, {}, method=method)):
            assert together.stats.n_steps[i] == one.stats.n_steps
            torch.testing.assert_close(together.steps[i], one.steps, rtol=1e-6, atol=0)
            torch.testing.assert_close(together.y[:, i], one.y[:, 0], rtol=1e-8, atol=1e-12)

    def test_of_samples_with_times_of_their_own_and_padding(self) -> None:
        nan = float("nan")
        t = torch.tensor([[0, 1, 30], [5, 6, nan], [0, nan, nan], [2, 1.5, 1]], dtype=torch.float64)
        together = solve(robertson, start(), t, method="kvaerno3", args=(RATES,), options=INDEPENDENT, **HOW)
        for i in (0, 1, 3):
            own = t[i][~t[i].isnan()]
            one = solve(robertson, start()[:1], own, method="kvaerno3", args=(RATES[i : i + 1],), **HOW)
            torch.testing.assert_close(together.y[: len(own), i], one.y[:, 0], rtol=1e-8, atol=1e-12)
        assert together.y[1:, 2].isnan().all()
        assert together.y[2, 1].isnan().all()

    def test_of_a_compact_batch(self) -> None:
        """func no longer sees samples that have ended."""
        t = torch.tensor([[0, 40], [0, 1e-3], [0, 1e-3], [0, 1e-3]], dtype=torch.float64)
        found = [
            solve(robertson, start(), t, method="kvaerno5", args=(RATES,), options=INDEPENDENT | more, **HOW)
            for more in ({}, {"compact": True})
        ]
        torch.testing.assert_close(found[1].y, found[0].y, rtol=1e-10, atol=1e-14)
        assert found[1].stats.n_f_rows < 0.6 * found[0].stats.n_f_rows

    def test_of_tuple_complex_and_float32_states(self) -> None:
        expected = solve(robertson, start(), T, method="kvaerno3", args=(RATES,), options=INDEPENDENT, **HOW).y

        def of_tuple(t: Tensor, y: tuple[Tensor, Tensor], rate: Tensor) -> tuple[Tensor, Tensor]:
            slope = robertson(t, torch.cat([y[0][:, None], y[1]], 1), rate)
            return slope[:, 0], slope[:, 1:]

        y0 = start()
        parts = odeint(of_tuple, (y0[:, 0], y0[:, 1:]), T, method="kvaerno3", args=(RATES,), options=INDEPENDENT, **HOW)
        torch.testing.assert_close(torch.cat([parts[0][..., None], parts[1]], -1), expected, rtol=1e-3, atol=1e-7)
        single = odeint(robertson, y0.float(), T, method="kvaerno3", args=(RATES.float(),), options=INDEPENDENT, **HOW)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-2, atol=1e-6)
        turning = odeint(
            lambda t, y: (1j * RATES[:, None] - 1) * y, y0[:, :1] + 0j, T[:3], method="kvaerno5", options=INDEPENDENT
        )
        exact = torch.exp((1j * RATES - 1) * T[2])[:, None]
        torch.testing.assert_close(turning[-1], exact, rtol=1e-2, atol=1e-3)

    def test_of_events(self) -> None:
        event = Event(lambda t, y: y[:, 0] - 0.95, terminal=True)
        solution = solve(
            robertson, start(), T, method="kvaerno5", args=(RATES,), options=INDEPENDENT, events=[event], **HOW
        )
        found = solution.events[0].y[..., 0].flatten()
        assert found[0].isnan()
        torch.testing.assert_close(found[1:], torch.full_like(found[1:], 0.95), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("size", [0, 3])
    def test_of_empty_batches(self, size: int) -> None:
        y0 = torch.zeros(3 - size, size, dtype=torch.float64)
        assert odeint(lambda t, y: -y, y0, T, method="kvaerno5", options=INDEPENDENT).shape == (5, 3 - size, size)


class TestJacobians:
    def test_by_a_function_of_the_user(self) -> None:
        def jacobian(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
            return -rate[:, None, None] * torch.eye(2, dtype=torch.float64)

        def func(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
            return -rate[:, None] * y

        y0, rates, options = torch.ones(4, 2, dtype=torch.float64), 100 * RATES, INDEPENDENT | {"jacobian": jacobian}
        y = odeint(func, y0, [0.0, 0.1], method="kvaerno5", args=(rates,), options=options, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(y[-1], torch.exp(-0.1 * rates)[:, None].expand(4, 2), rtol=1e-4, atol=1e-8)

    @pytest.mark.parametrize(
        ("jacobian", "message"),
        [("krylov", "one step size for all samples"), (lambda t, y, rate: torch.eye(12), r"a tensor \(4, 3, 3\)")],
    )
    def test_that_cannot_be_had(self, jacobian: Any, message: str) -> None:
        with pytest.raises(OptionError, match=message):
            odeint(
                robertson, start(), T, method="kvaerno5", args=(RATES,), options=INDEPENDENT | {"jacobian": jacobian}
            )

    def test_too_large_for_matrices(self) -> None:
        with pytest.raises(OptionError, match="a sample has 3000 elements"):
            odeint(lambda t, y: -y, torch.ones(2, 3000), T, method="kvaerno5", options=INDEPENDENT)


class TestFailures:
    def explosive(self, t: Tensor, y: Tensor) -> Tensor:
        """Sample 1 has no slope beyond 0.5, and Newton's method no solution."""
        rate = torch.tensor([-1.0, 0.0, -2.0], dtype=torch.float64)[:, None]
        jump = torch.where(y > 0.5, -1.0, 1e9) + 0 * y
        return torch.where(rate == 0, jump, rate * y)

    def test_the_error_names_the_sample(self) -> None:
        y0, options = torch.ones(3, 1, dtype=torch.float64), INDEPENDENT | {"min_step": 1e-6}
        with pytest.raises(StepSizeError, match=r"sample 1 .*Newton's method did not solve") as caught:
            odeint(self.explosive, y0, [0.0, 1.0], method="kvaerno3", options=options)
        assert caught.value.sample == 1

    def test_the_others_go_on(self) -> None:
        y0 = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
        options = INDEPENDENT | {"min_step": 1e-6, "on_failure": "nan"}
        solution = solve(self.explosive, y0, [0.0, 1.0], method="kvaerno3", options=options, rtol=1e-6, atol=1e-9)
        assert solution.y[:, 1].isnan().all()
        assert [type(error) for error in solution.stats.failures] == [StepSizeError]
        exact = torch.exp(torch.tensor([[-1.0], [-2.0]], dtype=torch.float64))
        torch.testing.assert_close(solution.y[-1, [0, 2]], exact, rtol=1e-4, atol=1e-6)
        (found,) = torch.autograd.grad(solution.y[-1, [0, 2]].sum(), y0)
        torch.testing.assert_close(found[[0, 2]], exact, rtol=1e-4, atol=1e-6)
        assert found[1] == 0

    @pytest.mark.parametrize("method", ["kvaerno3", "rodas5p"])
    def test_of_a_slope_that_is_not_finite(self, method: str) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            is_lost = torch.tensor([False, True], dtype=torch.bool)[:, None] & (t > 0.5)
            return torch.where(is_lost, torch.nan, -y)

        with pytest.raises((NonFiniteError, StepSizeError), match="sample 1"):
            odeint(func, torch.ones(2, 1, dtype=torch.float64), [0.0, 1.0], method=method, options=INDEPENDENT)

    def test_of_a_func_that_is_not_repeatable(self) -> None:
        layer = torch.nn.Dropout(0.5)
        with pytest.raises(ArgumentValueError, match="have no solution"):
            odeint(lambda t, y: -layer(y), start(), T, method="kvaerno3", options=INDEPENDENT, gradient="direct")
