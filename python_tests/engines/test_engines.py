"""The registry of engines: what each refuses, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import sample

from aca_ext import errors, odeint, solve
from aca_ext.engines import ENGINES, Request
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.batch import batch_problem_of
from aca_ext.problem.validation import problem_of

NEEDS_COMPILER = pytest.mark.skipif(
    compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch"
)
# Arguments that ask for what the eager engine alone does, by the name that a refusal gives them.
FOR_EAGER: dict[str, dict[str, Any]] = {
    "gradient ('naive')": {"gradient": "naive"},
    "checkpoints": {"checkpoints": 3},
    "progress": {"progress": True},
    "callback": {"callback": print},
}
NOT_EAGER = [name for name in ENGINES if name not in ("eager", "auto", "compiled")]  # these take all arguments


def decay(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


def problem(n_times: int = 2, **options: Any) -> Any:
    make = batch_problem_of if "batch" in options else problem_of
    times = torch.linspace(0.0, 1.0, n_times)
    return make(ProblemArguments(decay, sample(3, 2), times, rtol=1e-6, atol=1e-6, options=options))


@pytest.mark.parametrize("name", ["eager", "auto", pytest.param("compiled", marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("what", FOR_EAGER)
def test_some_take_all(name: str, what: str) -> None:
    assert ENGINES[name].obstacle(Request(problem(), **FOR_EAGER[what])) is None


@pytest.mark.parametrize("name", NOT_EAGER)
@pytest.mark.parametrize("what", FOR_EAGER)
def test_others_name_the_argument_that_they_do_not_take(name: str, what: str) -> None:
    engine, arguments = ENGINES[name], FOR_EAGER[what]
    obstacle = engine.obstacle(Request(problem(), **arguments))
    assert obstacle is not None
    assert f"does not support the given {what}" in obstacle
    assert 'engine="eager"' in obstacle
    with pytest.raises(errors.AcaError) as caught:
        odeint(decay, sample(3, 2), [0.0, 1.0], engine=name, **arguments)
    assert type(caught.value) is engine.error
    assert str(caught.value) == obstacle


@pytest.mark.parametrize(
    ("name", "options"),
    [("graph", {"batch": "independent"}), *((name, {"on_step_limit": "stop"}) for name in NOT_EAGER)],
)
def test_others_name_the_options(name: str, options: dict[str, Any]) -> None:
    obstacle = ENGINES[name].obstacle(Request(problem(**options)))
    assert obstacle is not None
    assert "does not support the given options" in obstacle
    with pytest.raises(ENGINES[name].error, match="does not support the given options"):
        solve(decay, sample(3, 2), [0.0, 1.0], engine=name, options=options)


def test_a_solve_without_a_step_needs_no_device() -> None:
    engine = ENGINES["graph"]
    assert engine.obstacle(Request(problem())) is not None
    assert engine.obstacle(Request(problem(n_times=1))) is None
    y0 = sample(3, 2)
    assert torch.equal(odeint(decay, y0, [0.0], engine="graph")[0], y0)


@pytest.mark.parametrize("name", ["eager", "auto", pytest.param("compiled", marks=NEEDS_COMPILER)])
def test_batched_backward_passes_are_refused(name: str) -> None:
    y0 = sample(3, 2).requires_grad_()
    y = odeint(decay, y0, [0.0, 1.0], engine=name, method="euler", options={"step_size": 0.5})[-1]
    with pytest.raises(errors.ArgumentTypeError, match="batched backward pass"):
        torch.autograd.grad(y, y0, torch.ones(4, 3, 2, dtype=y.dtype), is_grads_batched=True)
