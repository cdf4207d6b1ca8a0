"""Single problems with an implicit method and engine="compiled": solves that lanes do not take, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import sample
from test_single import START, T, solve
from torch import Tensor

from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")


class TestFallbacks:
    @pytest.mark.parametrize(
        ("size", "call", "reason"),
        [
            (33, {}, "The state has 33 components; implicit methods run in lanes for at most 32"),
            (3, {"options": {"jacobian": "krylov"}}, "option jacobian is 'krylov'"),
            (3, {"options": {"jacobian": lambda t, y: -torch.eye(3, dtype=y.dtype)}}, "option jacobian is a function"),
            (3, {"options": {"step_size": 0.1}}, "those of 'kvaerno5' are fixed"),
            (3, {"options": {"norm": torch.linalg.vector_norm}}, "a norm of your own"),
            (3, {"checkpoints": 4}, "because of the given checkpoints"),
            (3, {"gradient": "direct"}, "because of the given gradient"),
            (3, {"callback": lambda step: None}, "because of the given callback"),
        ],
    )
    def test_run_eagerly(self, size: int, call: dict[str, Any], reason: str) -> None:
        lane, eager = (solve(engine, lambda t, y: -y, sample(size), T[:2], **call) for engine in ("compiled", "eager"))
        assert lane.stats.compiled == ""
        assert reason in lane.stats.reason
        assert torch.equal(lane.y, eager.y)

    def test_a_func_that_lanes_do_not_hold(self) -> None:
        lane = solve("compiled", lambda t, y: -y.sort().values, sample(3), T[:2])
        assert lane.stats.compiled == ""
        assert "compiled lanes have one dtype" in lane.stats.reason

    @pytest.mark.parametrize("method", ["rodas5p", "implicit_euler", "auto"])
    def test_other_methods_are_refused(self, method: str) -> None:
        with pytest.raises(errors.CompileError, match=f"does not support the given method \\('{method}'\\)"):
            solve("compiled", lambda t, y: -y, START, T[:2], method=method, options={})


class TestErrors:
    @pytest.mark.parametrize(
        ("func", "call"),
        [
            (lambda t, y: y * y, {}),
            (lambda t, y: torch.where(t > 0.5, torch.nan, y), {}),
            (lambda t, y: y * torch.nan, {}),
            (lambda t, y: torch.cos(t) - 1e3 * y, {"options": {"max_num_steps": 3}}),
            (lambda t, y: -y, {"rtol": 0.0, "atol": torch.tensor([1e-6, 0.0])}),
        ],
    )
    def test_are_those_of_the_eager_engine(self, func: Callable[..., Tensor], call: dict[str, Any]) -> None:
        y0 = torch.ones(2, dtype=torch.float64)
        found = []
        for engine in ("compiled", "eager"):
            with pytest.raises(errors.SolveError) as caught:
                solve(engine, func, y0, **call)
            found.append(caught.value)
        lane, eager = found
        assert type(lane) is type(eager)
        assert str(lane).split("(t=")[0] == str(eager).split("(t=")[0]
        assert lane.t == pytest.approx(eager.t, rel=1e-9)
        assert (lane.n_accepted, lane.n_rejected) == (eager.n_accepted, eager.n_rejected)

    def test_of_funcs_are_theirs(self) -> None:
        with pytest.raises(errors.SlopeError, match=r"has shape \(2,\); the state has \(3,\)"):
            solve("compiled", lambda t, y: y[:2], START)
        with pytest.raises(errors.ArgumentTypeError, match="func takes"):
            solve("compiled", lambda t, y, z: y, START)
        with pytest.raises(ZeroDivisionError):
            solve("compiled", lambda t, y: y / (1 // 0), START)
