"""Times padded with NaN on compiled lanes: samples of one time, and samples that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import sample
from test_ensemble import solve
from test_ensemble_ragged import NAN, SETTINGS, check_padding
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")


class TestSingleTimes:
    @SETTINGS
    def test_a_sample_of_one_time_is_not_looked_at(self, settings: dict[str, Any]) -> None:
        """It may have a state, and a time, from which nothing can be solved."""
        y0 = torch.tensor([[NAN], [1.0], [-1.0], [2.0]], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([[1e300, NAN], [0.0, 0.5], [0.0, NAN], [0.0, 1.5]], dtype=torch.float64)
        rate = torch.ones(1, dtype=torch.float64, requires_grad=True)

        def solution(rows: list[int]) -> aca_ext.Solution:
            return solve("compiled", lambda t, y, r: -r * torch.sqrt(y), y0[rows], t[rows], (rate,), **settings)

        sol, alone = solution([0, 1, 2, 3]), solution([1, 3])
        assert sol.y[0, :, 0].tolist()[1:] == [1.0, -1.0, 2.0]
        assert sol.y[1, [0, 2]].isnan().all()
        assert torch.equal(sol.y[:, [1, 3]], alone.y)
        assert sol.stats.n_f_rows == alone.stats.n_f_rows
        assert [len(steps) > 0 for steps in sol.steps] == [False, True, False, True]
        grads = torch.autograd.grad(torch.nansum(sol.y * y0.detach().nan_to_num()), [y0, rate])
        exact = torch.autograd.grad(torch.nansum(alone.y * y0[[1, 3]].detach()), [y0, rate])
        assert torch.equal(grads[0][[1, 3]], exact[0][[1, 3]])
        assert torch.equal(grads[1], exact[1])
        assert grads[0][2].item() == -1.0  # of its only output

    def test_a_batch_of_them_takes_no_step(self) -> None:
        y0 = sample(2, 3).requires_grad_()
        t = torch.tensor([[0.0, NAN], [1.0, NAN]], dtype=torch.float64)
        sol = solve("compiled", lambda t, y: -y, y0, t)
        assert torch.equal(sol.y[0], y0)
        assert sol.y[1].isnan().all()
        assert sol.stats.n_f_evals == 0
        assert [len(steps) for steps in sol.steps] == [0, 0]
        (grad,) = torch.autograd.grad(sol.y.nansum(), y0)
        assert torch.equal(grad, torch.ones_like(grad))

    def test_code_that_is_wrong_is_found_out_beside_a_state_of_nan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from aca_ext.engines.ensemble import operations, rules

        operation = operations.Operation("maximum({0}, {1})", ("{g}", None))  # a wrong gradient
        monkeypatch.setitem(rules.RULES, torch.ops.aten.maximum, rules._each(operation))
        y0, t = torch.tensor([[NAN], [1.0]], dtype=torch.float64), torch.tensor([[0.0, NAN], [0.0, 1.0]])
        rate = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        stats = solve("compiled", lambda t, y, r: torch.maximum(y, r * y), y0, t, (rate,)).stats
        assert "does not compute what func does" in stats.reason


class TestFailures:
    def blow_up(self, engine: str, **call: Any) -> tuple[aca_ext.Solution, list[Tensor], Tensor]:
        y0 = torch.tensor([[0.1], [2.0], [2.0], [NAN], [2.0]], dtype=torch.float64, requires_grad=True)
        rate = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
        t = torch.tensor([[0.0, 0.2, 1.0], [0.0, 0.3, 1.0], [0.0, 0.3, NAN], [0.0, NAN, NAN], [0.0, 0.9, NAN]],
                         dtype=torch.float64)  # fmt: skip
        return solve(engine, lambda t, y, r: r * y * y, y0, t, (rate,), **call), [y0, rate], t

    @SETTINGS
    def test_samples_that_fail_as_nan(self, settings: dict[str, Any]) -> None:
        """A sample that ends before its blow-up has not failed."""
        found = []
        for engine, call in (("compiled", settings), ("eager", {})):
            sol, learnt, t = self.blow_up(engine, options={"on_failure": "nan"}, **call)
            assert [error.sample for error in sol.stats.failures] == [1, 4]
            assert "y0 holds" not in str(sol.stats.failures)
            assert sol.y[:, [1, 4]].isnan().all()
            check_padding(sol.y[:, [0, 2]], t[[0, 2]])
            found.append([sol.y, *torch.autograd.grad(sol.y.square().nansum(), learnt)])
        for lanes, eager in zip(*found, strict=True):
            torch.testing.assert_close(lanes, eager, rtol=1e-6, atol=1e-9, equal_nan=True)
            if lanes.dim() == 2:
                assert (lanes[[1, 4]] == 0).all()

    def test_the_error_names_the_end_of_the_sample(self) -> None:
        y0, t = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[0.0, 0.1, NAN], [0.0, 9.5, NAN]])
        messages = []
        for engine in ("compiled", "eager"):
            with pytest.raises(errors.StepLimitError) as raised:
                solve(engine, lambda t, y: torch.cos(30 * t) * y, y0, t, options={"max_num_steps": 20})
            messages.append(str(raised.value).partition(" (t=")[0])
        assert messages[0] == messages[1]
        assert "sample 1" in messages[0]
        assert "did not reach t=9.5" in messages[0]
