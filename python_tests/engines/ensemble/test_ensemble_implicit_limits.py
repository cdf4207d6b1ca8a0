"""Implicit methods on compiled lanes: arguments, solves that lanes do not take, and hostile funcs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import sample
from test_ensemble_implicit import BATCH, SYSTEMS, T, both, gradients, rates, robertson, solve, van_der_pol
from torch import Tensor

from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.ensemble import source

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")


class TestArguments:
    def test_times_backwards_and_padded(self) -> None:
        y0, p = SYSTEMS["robertson"].inputs(4)
        nan = math.nan
        t = torch.tensor([[0, 1, 30], [5, 6, nan], [0, nan, nan], [2, 1.9, 1.8]], dtype=torch.float64)
        lanes, eager = both(robertson, y0, t, (p,))
        assert relative_error(lanes.y.nan_to_num(), eager.y.nan_to_num()) <= 1e-9
        assert lanes.y[1:, 2].isnan().all()
        for found, expected in zip(gradients(lanes, (y0, p)), gradients(eager, (y0, p)), strict=True):
            assert relative_error(found, expected) <= 1e-8

    def test_tolerances_of_elements_and_float32(self) -> None:
        y0, p = (x.detach() for x in SYSTEMS["robertson"].inputs())
        atol = torch.tensor([1e-6, 1e-10, 1e-6], dtype=torch.float64)
        both(robertson, y0, T, (p,), atol=atol)
        single = solve("compiled", robertson, y0.float(), T, (p.float(),), rtol=1e-4, atol=1e-8)
        assert single.stats.compiled == "solve"
        exact = solve("eager", robertson, y0, T, (p,), rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(single.y.double(), exact.y, rtol=1e-2, atol=2e-6)

    def test_gradients_in_float32(self) -> None:
        y0, p = SYSTEMS["van_der_pol"].inputs()
        exact = gradients(solve("compiled", van_der_pol, y0, T[:3], (p,), rtol=1e-6), (y0, p))
        small = [x.detach().float().requires_grad_() for x in (y0, p)]
        found = gradients(solve("compiled", van_der_pol, small[0], T[:3], (small[1],), rtol=1e-3), tuple(small))
        assert relative_error(found[0].double(), exact[0]) <= 2e-2

    def test_tuples_and_first_steps(self) -> None:
        y0, p = SYSTEMS["robertson"].inputs()

        def of_tuple(t: Tensor, y: tuple[Tensor, Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
            slope = robertson(t, torch.cat([y[0][:, None], y[1]], 1), p)
            return slope[:, 0], slope[:, 1:]

        state = y0[:, 0], y0[:, 1:]
        options = {"first_step": 1e-3}
        lanes, eager = (solve(engine, of_tuple, state, T, (p,), options=options) for engine in ("compiled", "eager"))
        assert lanes.stats.compiled == "solve"
        assert lanes.stats.n_steps.tolist() == eager.stats.n_steps.tolist()
        for found, expected in zip(lanes.y, eager.y, strict=True):
            assert relative_error(found, expected) <= 1e-9

    def test_jumps_and_stops(self) -> None:
        """As two solves, from one jump to the next."""

        def switched(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
            one = torch.ones_like(y)
            return -p * (y - torch.where(t < 1.5, one, 3 * one))

        y0, p = sample(BATCH, 2).requires_grad_(), SYSTEMS["van_der_pol"].p.clone().requires_grad_()
        t = torch.tensor([0.0, 1.5, 3.0], dtype=torch.float64)
        lanes = solve("compiled", switched, y0, t, (p,), options={"jump_t": [1.5], "step_t": [0.7]})
        assert lanes.stats.compiled == "solve"
        first = solve("compiled", lambda t, y, p: -p * (y - 1.0), y0, t[:2], (p,), options={"step_t": [0.7]})
        second = solve("compiled", lambda t, y, p: -p * (y - 3.0), first.y[-1], t[1:], (p,))
        torch.testing.assert_close(lanes.y[-1], second.y[-1], rtol=1e-5, atol=1e-7)
        for steps in lanes.steps:
            assert {0.7, 1.5} <= set(steps[:, 1].tolist())
        exact = 3 + (1 + (y0 - 1) * torch.exp(-1.5 * p) - 3) * torch.exp(-1.5 * p)
        found, expected = (torch.autograd.grad(y[0].sum(), y0)[0] for y in (lanes.y[-1:], exact[None]))
        assert relative_error(found, expected) <= 1e-4


class TestFallbacks:
    def test_a_jacobian_of_the_users_and_large_samples_run_eagerly(self) -> None:
        y0, p = (x.detach() for x in SYSTEMS["van_der_pol"].inputs())

        def jacobian(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
            (x, v), mu, zero = y.unbind(-1), p[..., 0], torch.zeros_like(p[..., 0])
            rows = (zero, zero + 1), (mu * (-2 * x * v - 1), mu * (1 - x * x))
            return torch.stack([torch.stack(row, -1) for row in rows], -2)

        given = solve("compiled", van_der_pol, y0, T[:2], (p,), options={"jacobian": jacobian})
        assert given.stats.compiled == ""
        assert "option jacobian is a function" in given.stats.reason
        large = solve("compiled", lambda t, y: -y, sample(2, 33), T[:2])
        assert large.stats.compiled == ""
        assert "33 components" in large.stats.reason

    def test_checkpoints_are_refused(self) -> None:
        y0, p = SYSTEMS["van_der_pol"].inputs()
        with pytest.raises(errors.CompileError, match="'kvaerno5' has no checkpoints in lanes"):
            solve("compiled", van_der_pol, y0, T[:2], (p,), checkpoints=4)

    def test_other_methods_are_refused(self) -> None:
        y0, p = SYSTEMS["van_der_pol"].inputs()
        for options in ({}, {"batch": None}):
            with pytest.raises(errors.CompileError, match=r"does not support the given method \('rodas5p'\)"):
                solve("compiled", van_der_pol, y0, T[:2], (p,), method="rodas5p", options=options)

    def test_a_jacobian_that_is_not_that_of_func_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        jacobian = source.jacobian_text
        monkeypatch.setattr(
            source, "jacobian_text", lambda *code: [x.replace("K(1)", "K(1.001)") for x in jacobian(*code)]
        )
        y0, p = SYSTEMS["van_der_pol"].inputs(2)
        solution = solve("compiled", lambda t, y, p: van_der_pol(t, y, p), y0, T[:2] / 100, (p,))
        assert solution.stats.compiled == ""
        assert "does not compute what func does" in solution.stats.reason

    def test_an_explicit_method_still_takes_a_func_that_is_too_large(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y

        y0 = sample(2, 33)
        assert solve("compiled", func, y0, T[:2]).stats.compiled == ""
        assert solve("compiled", func, y0, T[:2], method="dopri5").stats.compiled == "solve"


class TestHostile:
    def test_slopes_that_do_not_depend_on_the_state(self) -> None:
        y0, p = sample(BATCH, 2).requires_grad_(), rates(0.1, 10.0).requires_grad_()
        lanes, eager = both(lambda t, y, p: p * torch.cos(t) + 0 * y, y0, T[:4], (p,))
        assert relative_error(lanes.y, eager.y) <= 1e-12
        for found, expected in zip(gradients(lanes, (y0, p)), gradients(eager, (y0, p)), strict=True):
            assert relative_error(found, expected) <= 1e-12

    def test_a_singular_matrix(self) -> None:
        """I - h·gamma·J is zero in some samples, and almost zero in others."""
        p = torch.tensor([1.0, 4.0, 8.0, 8.0 + 1e-9], dtype=torch.float64)[:, None].requires_grad_()
        y0 = torch.ones(4, 1, dtype=torch.float64)
        lanes, eager = both(
            lambda t, y, p: p * y / 0.26, y0, [0.0, 0.2], (p,), options={"first_step": 0.125}, rtol=1e-3
        )
        assert lanes.stats.n_rejected[2] > 0
        assert relative_error(lanes.y, eager.y) <= 1e-9
        for found, expected in zip(gradients(lanes, (p,)), gradients(eager, (p,)), strict=True):
            assert relative_error(found, expected) <= 1e-8

    def test_pivots(self) -> None:
        """Matrices whose largest elements are not on the diagonal, in some lanes only."""
        turn = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, -1, 0, 0]], dtype=torch.float64)
        y0, p = sample(BATCH, 4).requires_grad_(), rates(1e-2, 1e3).requires_grad_()
        lanes, eager = both(lambda t, y, p: (p * y) @ turn.T - 2 * p * y, y0, [0.0, 1.0], (p,), rtol=1e-3)
        assert relative_error(lanes.y, eager.y) <= 1e-9
        for found, expected in zip(gradients(lanes, (y0, p)), gradients(eager, (y0, p)), strict=True):
            assert relative_error(found, expected) <= 1e-8

    def test_nan_at_trials(self) -> None:
        y0, p = torch.ones(BATCH, 1, dtype=torch.float64).requires_grad_(), rates(0.1, 1.9).requires_grad_()
        lanes, eager = both(
            lambda t, y, p: -p * torch.log(y + 1).sqrt() * y, y0, [0.0, 3.0], (p,), options={"first_step": 3.0}
        )
        assert relative_error(lanes.y, eager.y) <= 1e-9
        assert relative_error(*(gradients(x, (p,))[0] for x in (lanes, eager))) <= 1e-8

    def test_failures_of_samples(self) -> None:
        """One blows up, one has no slopes from some time on, one none at its start, and the others go on."""

        def func(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
            slope = torch.where(p[:, :1] == 1, y * y, -y)
            slope = torch.where((p[:, :1] == 2) & (t > 0.5), torch.nan, slope)
            return torch.where(p[:, :1] == 3, torch.nan, slope) + 0 * p

        y0 = torch.ones(BATCH, 2, dtype=torch.float64).requires_grad_()
        p = torch.zeros(BATCH, 2, dtype=torch.float64)
        p[1], p[4], p[7] = 1.0, 2.0, 3.0
        call: dict[str, Any] = {"options": {"on_failure": "nan", "max_num_steps": 2000}, "rtol": 1e-4}
        lanes, eager = (solve(engine, func, y0, T[:4], (p,), **call) for engine in ("compiled", "eager"))
        assert lanes.stats.compiled == "solve"
        assert [error.sample for error in lanes.stats.failures] == [1, 4, 7]
        for found, expected in zip(lanes.stats.failures, eager.stats.failures, strict=True):
            assert type(found) is type(expected)
            assert found.t == pytest.approx(expected.t, rel=1e-6)
        assert "Newton's method did not solve the stages" in str(lanes.stats.failures[1])
        assert str(lanes.stats.failures[1])[:120] == str(eager.stats.failures[1])[:120]
        assert lanes.y[1:, [1, 4, 7]].isnan().all()
        assert relative_error(lanes.y.nan_to_num(), eager.y.nan_to_num()) <= 1e-9
        grad = torch.autograd.grad(lanes.y[-1, [0, 2, 3, 5]].sum(), y0)[0]
        assert (grad[[1, 4, 7]] == 0).all()
        assert relative_error(grad[[0, 2, 3, 5]], torch.full((4, 2), math.exp(-4.0)).double()) <= 1e-2
        with pytest.raises(errors.SolveError, match=r"sample 1 \(and 2 more\)"):
            solve("compiled", func, y0, T[:4], (p,), rtol=1e-4)

    def test_nothing_to_solve(self) -> None:
        y0, p = SYSTEMS["van_der_pol"].inputs()
        assert torch.equal(solve("compiled", van_der_pol, y0, [0.0], (p,)).y[0], y0)
        assert solve("compiled", van_der_pol, y0[:0], [0.0, 1.0], (p[:0],)).y.shape == (2, 0, 2)
