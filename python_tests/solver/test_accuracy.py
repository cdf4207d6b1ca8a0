"""Accuracy of a solve: orders of the methods, and errors relative to the tolerances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import LOOSE, RUNGE_KUTTA, check_chain, decay, oscillate, rotated
from torch import Tensor

import aca_ext

ADAPTIVE = [name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive]
T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


class TestAccuracy:
    @pytest.mark.parametrize("method", RUNGE_KUTTA)
    def test_order_of_fixed_steps(self, method: str) -> None:
        order = aca_ext.METHODS[method].order
        t = torch.tensor([0.0, 2.0], dtype=torch.float64)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return oscillate(t, y) * torch.cos(t)

        angle = math.sin(2.0)
        counts = (8, 16) if order < 8 else (4, 8)
        found = [
            aca_ext.odeint(func, rotated(0.0), t, method=method, options={"step_size": 2.0 / n})[-1] for n in counts
        ]
        one, other = (float((y - rotated(angle)).norm()) for y in found)
        assert order - 0.5 <= math.log2(one / other) <= order + 1.2

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_order_of_dense_output(self, method: str) -> None:
        order = aca_ext.METHODS[method].dense_order
        assert order is not None
        errors_at = []
        sizes = (0.4, 0.2) if order < 5 else (0.8, 0.4)
        for h in sizes:
            t = torch.tensor([0.0, *(h * theta for theta in (0.15, 0.4, 0.55, 0.85)), h], dtype=torch.float64)
            options = {"first_step": h, "max_step": h}
            sol = aca_ext.solve(oscillate, rotated(0.0), t, method=method, rtol=1.0, atol=1.0, options=options)
            assert sol.stats.n_accepted == 1
            exact = torch.stack([rotated(time) for time in t.tolist()])
            errors_at.append((sol.y - exact)[1:-1].abs().max().item())
        assert math.log2(errors_at[0] / errors_at[1]) == pytest.approx(order + 1, abs=0.5)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_outputs_do_not_move_the_steps(self, method: str) -> None:
        t = torch.linspace(0, 4, 3, dtype=torch.float64)
        many = torch.linspace(0, 4, 41, dtype=torch.float64)
        tolerance = 1e-6 if method == "fehlberg2" else 1e-3
        few, more = (
            aca_ext.solve(oscillate, rotated(0.0), x, method=method, rtol=tolerance, atol=tolerance) for x in (t, many)
        )
        assert torch.equal(few.steps, more.steps)
        assert torch.equal(few.y, more.y[::20])
        for time, row in zip(many.tolist(), more.y, strict=True):
            torch.testing.assert_close(row, rotated(time), rtol=0, atol=0.05)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_last_step_is_checked_too(self, method: str) -> None:
        """The slope is large near the end only, so the error of the last step, cut short, must be checked too."""

        def func(t: Tensor, y: Tensor) -> Tensor:
            return 50 * torch.exp(200 * (t - 1)) * torch.ones_like(y)

        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        sol = aca_ext.solve(func, torch.zeros(1).double(), t, method=method, rtol=1e-4, atol=1e-4)
        assert sol.y[-1].item() == pytest.approx(0.25, abs=0.02)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_stats_and_steps_agree(self, method: str) -> None:
        t = torch.tensor([0.0, 1.5, 3.0], dtype=torch.float64)
        calls = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            calls.append(float(t))
            return oscillate(t, y) * (1 + 5 * torch.exp(-50 * (t - 1) ** 2))

        sol = aca_ext.solve(func, rotated(0.0), t, method=method, options={"first_step": 1.0}, **LOOSE)
        stats = sol.stats
        check_chain(sol.steps, t)
        assert len(calls) == stats.n_f_evals
        assert len(sol.steps) == stats.n_accepted
        assert stats.n_steps == stats.n_accepted + stats.n_rejected
        assert stats.n_rejected > 0
        assert stats.backend == "cpu"
        assert min(calls) >= 0.0
        assert max(calls) <= 3.0

    def test_zero_slope(self) -> None:
        for y0 in (torch.ones(3), torch.zeros(3)):
            sol = aca_ext.solve(lambda t, y: torch.zeros_like(y), y0, torch.tensor([0.0, 1.0, 100.0]))
            assert torch.equal(sol.y, y0.expand(3, 3))
            assert sol.stats.n_steps < 20

    def test_slope_that_is_zero_only_at_the_start(self) -> None:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        y = aca_ext.odeint(lambda t, y: 3 * t**2 * torch.ones_like(y), torch.zeros(2).double(), t)
        assert y[-1, 0].item() == pytest.approx(1.0, rel=1e-6)

    def test_thread_count_does_not_change_a_bit(self) -> None:
        y0 = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
        found = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(aca_ext.solve(lambda t, y: -y * t, y0, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-5))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0].y, found[1].y)
        assert torch.equal(found[0].steps, found[1].steps)


class TestTolerances:
    Y0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def count(self, y0: Any = None, func: Any = None, **settings: Any) -> int:
        def rotate(t: Tensor, y: Tensor) -> Tensor:
            return 3 * torch.stack([y[1], -y[0]])

        return aca_ext.solve(func or rotate, self.Y0 if y0 is None else y0, T, **settings).stats.n_steps

    @pytest.mark.parametrize("name", ["rtol", "atol"])
    def test_tighter_tolerance_takes_more_steps(self, name: str) -> None:
        other = "atol" if name == "rtol" else "rtol"
        counts = [self.count(**{name: tolerance, other: 1e-12}) for tolerance in (1e-2, 1e-4, 1e-6, 1e-8)]
        assert counts == sorted(set(counts))

    @pytest.mark.parametrize("name", ["rtol", "atol"])
    def test_tensor_tolerances(self, name: str) -> None:
        other = {"atol": 1e-12} if name == "rtol" else {"rtol": 1e-12}
        number = self.count(**{name: 1e-5}, **other)
        for shape in ((), (1,), (2,), (2, 1), (2, 2)):
            assert self.count(**{name: torch.full(shape, 1e-5)}, **other) == number
        assert self.count(**{name: torch.tensor([1e-5, 1e-9])}, **other) > number
        assert self.count(**{name: torch.tensor([1e-5, 0.0])}, **other) > number

    def test_tolerances_per_element_hold_each_element(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(y[0]), 5 * torch.cos(20 * t) * y[1]])

        y0 = torch.ones(2, dtype=torch.float64)
        strict = self.count(y0, func, rtol=0.0, atol=torch.tensor([1.0, 1e-8]))
        loose = self.count(y0, func, rtol=0.0, atol=torch.tensor([1e-8, 1.0]))
        assert loose < strict / 3

    def test_tuple_tolerances(self) -> None:
        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return 3 * torch.stack([y[0][1], -y[0][0]]), torch.zeros_like(y[1])

        y0 = (self.Y0, torch.ones(5, dtype=torch.float64))
        number = self.count(y0, func, rtol=1e-6, atol=1e-6)
        assert self.count(y0, func, rtol=(1e-6, 1e-6), atol=1e-6) == number
        assert self.count(y0, func, rtol=(1e-6, 1e-12), atol=(1e-6, 1e-12)) == number
        assert self.count(y0, func, rtol=(1e-9, 1e-6), atol=(torch.full((2, 2), 1e-9), 1e-6)) > number

    def test_zero_tolerance_at_a_zero(self) -> None:
        """With y0 = 0 and atol = 0, the error of the second component has no scale before the first step."""
        y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
        y = aca_ext.odeint(lambda t, y: torch.stack([-y[0], y[0]]), y0, T, rtol=1e-6, atol=0.0)
        assert y[-1].tolist() == pytest.approx([math.exp(-1), 1 - math.exp(-1)], rel=1e-5)

    def test_one_tolerance_may_be_zero(self) -> None:
        assert self.count(rtol=0.0, atol=1e-5) > 0
        ones = torch.ones(2, dtype=torch.float64)
        assert self.count(ones, decay, rtol=1e-5, atol=0.0) > 0

    def test_fixed_steps_do_not_look_at_tolerances(self) -> None:
        found = [
            aca_ext.odeint(oscillate, rotated(0.0), T, options={"step_size": 0.1}, rtol=tol, atol=tol)
            for tol in (1e-2, 1e-9, 0.0)
        ]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
