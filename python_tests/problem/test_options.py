"""Effects of each option of a solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import LOOSE, decay, oscillate, rotated
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS
from aca_ext.numerics.methods import METHODS
from aca_ext.problem.options import controller_of

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


class TestOptions:
    T = torch.tensor([0.0, 6.0], dtype=torch.float64)

    def solve(self, **options: Any) -> aca_ext.Solution:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return oscillate(t, y) * (1 + 4 * torch.exp(-20 * (t - 2) ** 2))

        return aca_ext.solve(func, rotated(0.0), self.T, rtol=1e-5, atol=1e-5, options=options)

    def lengths(self, **options: Any) -> Tensor:
        steps = self.solve(**options).steps
        return steps[:, 1] - steps[:, 0]

    def test_first_step(self) -> None:
        for size in (1e-3, torch.tensor(1e-3), 1):
            first = self.lengths(first_step=size)[0].item()
            assert first == pytest.approx(float(size)) or first < float(size) == 1.0
        assert self.solve(first_step=1e-3).stats.n_f_evals == 1 + 6 * self.solve(first_step=1e-3).stats.n_steps

    def test_first_step_beyond_the_end(self) -> None:
        sol = aca_ext.solve(decay, torch.ones(1), torch.tensor([0.0, 0.1]), options={"first_step": 50.0}, **LOOSE)
        assert sol.steps[-1, 1].item() == pytest.approx(0.1)

    def test_max_step(self) -> None:
        assert self.lengths().max() > 0.25
        assert self.lengths(max_step=0.1).max() <= 0.1 * (1 + 1e-12)

    def test_min_step(self) -> None:
        with pytest.raises(errors.StepSizeError):
            self.solve(min_step=1.0)
        assert torch.equal(self.solve(min_step=1e-9).steps, self.solve().steps)

    def test_min_step_holds_after_easy_steps_too(self) -> None:
        steps = aca_ext.solve(decay, torch.ones(1).double(), self.T, options={"min_step": 0.3}, rtol=1e-1, atol=1e-1)
        lengths = (steps.steps[:, 1] - steps.steps[:, 0])[:-1]
        assert (lengths >= 0.3 * (1 - 1e-12)).all()

    def test_max_num_steps(self) -> None:
        needed = self.solve().stats.n_steps
        assert self.solve(max_num_steps=needed).stats.n_steps == needed
        assert self.solve(max_num_steps=2**31 - 1).stats.n_steps == needed
        with pytest.raises(errors.StepLimitError):
            self.solve(max_num_steps=needed - 1)

    def test_safety(self) -> None:
        assert self.solve(safety=0.5).stats.n_accepted > self.solve().stats.n_accepted

    def test_ifactor(self) -> None:
        steps = self.lengths(first_step=1e-4, ifactor=2.0)
        growth = steps[1:] / steps[:-1]
        assert growth.max() <= 2 * (1 + 1e-9)
        assert (self.lengths(first_step=1e-4)[1:] / self.lengths(first_step=1e-4)[:-1]).max() > 5

    def test_dfactor(self) -> None:
        """From a first step that is far too large, a larger dfactor takes more trials to shrink it."""
        slow, fast = self.solve(first_step=6.0, dfactor=0.8), self.solve(first_step=6.0, dfactor=0.2)
        assert slow.stats.n_rejected > fast.stats.n_rejected

    @pytest.mark.parametrize("coefficients", [{"pcoeff": 0.4, "icoeff": 0.3}, {"dcoeff": 0.2}, {"icoeff": 0.6}])
    def test_pid_coefficients(self, coefficients: dict[str, float]) -> None:
        sol, default = self.solve(**coefficients), self.solve()
        assert not torch.equal(sol.steps[:5], default.steps[:5])
        torch.testing.assert_close(sol.y[-1], default.y[-1], rtol=0, atol=1e-3)

    def test_norm(self) -> None:
        seen = []

        def largest(ratio: Tensor) -> Tensor:
            seen.append(ratio)
            return ratio.abs().max()

        strict = self.solve(norm=lambda ratio: 100 * largest(ratio))
        assert strict.stats.n_accepted > 1.5 * self.solve().stats.n_accepted
        assert seen[0].shape == (2,)

    def test_norm_of_a_tuple_state_sees_the_tuple(self) -> None:
        def first_alone(ratio: tuple[Tensor, Tensor]) -> float:
            return ratio[0].square().mean().sqrt().item()

        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return -y[0], 10 * oscillate(t, y[1])

        y0 = (torch.ones(1, dtype=torch.float64), rotated(0.0))
        counts = [
            aca_ext.solve(func, y0, self.T, rtol=1e-5, atol=1e-5, options=options).stats.n_steps
            for options in ({}, {"norm": first_alone})
        ]
        assert counts[1] < counts[0] / 3

    def test_none_means_default(self) -> None:
        names = ("first_step", "min_step", "max_step", "max_num_steps", "safety", "norm", "step_t", "step_size")
        assert torch.equal(self.solve(**dict.fromkeys(names)).steps, self.solve().steps)

    def test_numbers_seen_before_let_no_other_value_pass(self) -> None:
        fewer = len(self.lengths(max_step=1.0))
        assert len(self.lengths(max_step=0.01)) > fewer
        assert len(self.lengths(max_step=1)) == fewer
        for other in (True, "1.0", [1.0]):  # True equals 1.0, but is no step size
            with pytest.raises(errors.OptionError):
                self.solve(max_step=other)
        with pytest.raises(errors.UnknownNameError):
            self.solve(max_steps=1.0)

    @pytest.mark.parametrize("batch", [{}, {"batch": "independent"}])
    @pytest.mark.parametrize("name", ["step_t", "jump_t"])
    def test_times_of_steps_that_are_learnt_are_refused(self, name: str, batch: dict[str, str]) -> None:
        jump = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        y0 = torch.ones(2, 1, dtype=torch.float64)
        how: dict[str, Any] = {"engine": "compiled"} if batch else {}
        with pytest.raises(errors.OptionError, match=f"option {name} holds a tensor that requires grad"):
            aca_ext.odeint(lambda t, y: -y, y0, [0.0, 1.0], options={name: [jump], **batch}, **how)
        with torch.no_grad():
            aca_ext.odeint(lambda t, y: -y, y0, [0.0, 1.0], options={name: jump[None]})

    def test_options_are_not_changed(self) -> None:
        options = {"first_step": 0.1, "max_step": 1.0}
        aca_ext.odeint(decay, torch.ones(2), self.T, options=options)
        assert options == {"first_step": 0.1, "max_step": 1.0}

    def test_aliases(self) -> None:
        found = [aca_ext.odeint(decay, torch.ones(2), T, method=m, **LOOSE) for m in ("heun_euler", "adaptive_heun")]
        assert torch.equal(*found)


def test_controller_has_the_order_of_the_error() -> None:
    """That is the order of the method, but for estimates of another order than one less."""
    adaptive = {name: m for name, m in (METHODS | IMPLICIT_METHODS).items() if m.adaptive}
    orders = {name: controller_of({}, m).order for name, m in adaptive.items()}
    assert orders == {name: m.order for name, m in adaptive.items()} | {"trbdf2": 3, "radau5": 4}
