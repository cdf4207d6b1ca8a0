"""Options step_t and jump_t on compiled lanes: each sample as it is solved alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import sample
from test_ensemble import CALL, INDEPENDENT, T, solve, weighted
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

BATCH = 11
JUMPS = [0.7, 1.9]


def switched(t: Tensor, y: Tensor, p: Tensor, at: Tensor) -> Tensor:
    """Jumps at each of ``at``, (2,) or (batch, 2)."""
    is_on = (t >= at[..., :1]) & (t < at[..., 1:])
    return torch.where(is_on, 5 * p, -p) * torch.cos(3 * t) - y * torch.tanh(y)


def inputs() -> tuple[Tensor, Tensor]:
    return sample(BATCH, 2).requires_grad_(), (sample(BATCH, 2, seed=1).abs() + 0.5).requires_grad_()


def own_times(*extra: float) -> Tensor:
    """Times of each sample, NaN where one has fewer."""
    times = torch.tensor(JUMPS, dtype=torch.float64) + torch.linspace(0, 0.6, BATCH, dtype=torch.float64)[:, None]
    return torch.cat([times, torch.tensor(extra, dtype=torch.float64).expand(BATCH, -1)], 1)


def check_like_alone(at: Tensor, options: dict[str, Any], t: Tensor = T, **call: Any) -> aca_ext.Solution:
    """Steps, outputs, gradients and evaluations of each sample are those of the eager engine with that sample alone."""
    y0, p = inputs()
    sol = solve("compiled", switched, y0, t, (p, at), options=options, **call)
    n_rows = 0
    for i in range(BATCH):
        own = {
            name: x[i][~x[i].isnan()] if isinstance(x, Tensor) and x.dim() == 2 else x for name, x in options.items()
        }
        alone = aca_ext.solve(
            switched, y0[i : i + 1], t if t.dim() == 1 else t[i], args=(p[i : i + 1], at if at.dim() == 1 else at[i]),
            options=own, **(CALL | call)
        )  # fmt: skip
        n_rows += alone.stats.n_f_evals
        assert sol.stats.n_steps[i] == alone.stats.n_steps
        torch.testing.assert_close(sol.steps[i], alone.steps, rtol=1e-6, atol=1e-9)  # of the float32 in step sizes
        assert relative_error(sol.y[:, i : i + 1], alone.y) <= 1e-7
        found, expected = (
            torch.autograd.grad(weighted(y), (y0, p), retain_graph=True) for y in (sol.y[:, i : i + 1], alone.y)
        )
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) <= 1e-6
    if aca_ext.METHODS[call.get("method", "dopri5")].fsal:  # others evaluate the first slope of a rejected trial again
        assert sol.stats.n_f_rows == n_rows
    return sol


class TestSteps:
    @pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "dopri8"])
    def test_jumps_of_all_samples(self, method: str) -> None:
        sol = check_like_alone(torch.tensor(JUMPS, dtype=torch.float64), {"jump_t": JUMPS}, method=method)
        for steps in sol.steps:
            assert set(JUMPS) <= set(steps[:, 1].tolist())

    @pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
    def test_jumps_of_each_sample_and_further_stops(self, method: str) -> None:
        jumps = own_times(7.0, math.nan)
        jumps[3, 1] = math.nan
        options = {"jump_t": jumps, "step_t": torch.tensor([0.7, 2.5, -1.0])}
        sol = check_like_alone(own_times(), options, method=method)
        for i, steps in enumerate(sol.steps):
            ends = steps[:, 1].tolist()
            assert {x for x in jumps[i].tolist() if 0 < x < 3} | {2.5} <= set(ends)

    def test_stops_of_each_sample_backwards(self) -> None:
        t = torch.stack([T, 3 - T])[torch.arange(BATCH) % 2]
        check_like_alone(own_times(), {"jump_t": own_times()}, t)
        check_like_alone(own_times(), {"step_t": [0.5, 1.5]}, t)

    def test_a_jump_costs_no_rejected_steps(self) -> None:
        y0, p = inputs()
        at = own_times()
        without, with_jumps = (
            solve("compiled", switched, y0, args=(p, at), options=options) for options in ({}, {"jump_t": at})
        )
        assert (with_jumps.stats.n_rejected < without.stats.n_rejected).all()

    def test_float32(self) -> None:
        y0, p = (x.detach().float().requires_grad_() for x in inputs())
        at = torch.tensor(JUMPS)
        jumps = [float(x) for x in at]  # numbers of float32, which func compares with
        lanes = solve("compiled", switched, y0, args=(p, at), options={"jump_t": jumps}, rtol=1e-3)
        exact = solve("compiled", switched, y0.double(), args=(p.double(), at.double()), options={"jump_t": jumps})
        assert relative_error(lanes.y, exact.y) <= 1e-2
        for steps in lanes.steps:
            assert set(jumps) <= set(steps[:, 1].tolist())


@pytest.mark.parametrize("name", ["step_t", "jump_t"])
class TestRefusals:
    @pytest.mark.parametrize(
        ("value", "match"),
        [
            (torch.zeros(3, 2), r"shape \(3, 2\)"),
            ([0.5, math.nan], "nan"),
            ([0.5, math.inf], "inf"),
            ([[0.5, math.inf]] * 2, "inf"),
            ("now", "times"),
            (torch.zeros(2, 1, 1), "shape"),
        ],
    )
    def test_values(self, name: str, value: Any, match: str) -> None:
        with pytest.raises(errors.OptionError, match=f"(?s)option {name} .*{match}"):
            solve("compiled", lambda t, y: -y, torch.ones(2, 1), options={name: value})

    def test_the_eager_engine(self, name: str) -> None:
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, pytest.raises(errors.OptionError, match='step_t and jump_t take engine="compiled"'):
                aca_ext.odeint(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0], options=INDEPENDENT | {name: [0.5]})
