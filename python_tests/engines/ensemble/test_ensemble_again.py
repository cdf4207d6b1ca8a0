"""engine="compiled" for independent samples, solved again with known arguments: the same numbers and errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import sample
from test_ensemble import lotka_volterra, solve
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import library_cache
from aca_ext.engines.ensemble.library import task_of
from aca_ext.problem import validation
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.batch import BatchProblem, batch_problem_of

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

odeint_module = sys.modules["aca_ext.odeint"]  # whose name in the package is the function
T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_known", {})


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with each solve whose arguments are validated."""
    solves: list[object] = []
    run = odeint_module.run
    monkeypatch.setattr(odeint_module, "run", lambda *given, **how: solves.append(given) or run(*given, **how))
    return solves


def inputs(n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    y0, p = sample(n, 2, seed=seed).abs() + 0.3, sample(n, 4, seed=seed + 1).abs() + 0.3
    return y0.requires_grad_(), p.requires_grad_()


def gradients(solution: aca_ext.Solution, *x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(solution.y.square().sum(), x)


def test_validates_once(validated: list[object]) -> None:
    y0, p = inputs()
    first = solve("compiled", lotka_volterra, y0, T, (p,))
    again = solve("compiled", lotka_volterra, y0, T, (p,))
    assert len(validated) == 1
    assert torch.equal(first.y, again.y)
    assert again.stats.compiled == "solve"
    for count in ("n_steps", "n_accepted", "n_rejected", "n_f_rows", "n_f_evals"):
        assert torch.equal(*(torch.as_tensor(getattr(x.stats, count)) for x in (first, again)))
    for one, other in zip(first.steps, again.steps, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients(first, y0, p), gradients(again, y0, p), strict=True):
        assert torch.equal(one, other)


def test_takes_other_values(validated: list[object]) -> None:
    solve("compiled", lotka_volterra, inputs()[0], T, (inputs()[1],))
    y0, p = inputs(seed=7)
    again = solve("compiled", lotka_volterra, y0, T, (p,))
    assert len(validated) == 1
    validation._known.clear()
    afresh = solve("compiled", lotka_volterra, y0, T, (p,))
    assert len(validated) == 2
    assert torch.equal(again.y, afresh.y)


CHANGES: dict[str, dict[str, Any]] = {
    "times": {"t": T * 2},
    "rtol": {"rtol": 1e-8},
    "max_step": {"options": {"max_step": 0.01}},
    "method": {"method": "tsit5"},
    "times of samples": {"t": T * torch.linspace(0.5, 1.5, 5, dtype=torch.float64)[:, None]},
    "step_t": {"options": {"step_t": torch.tensor([0.123])}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_others(change: str) -> None:
    y0, p = inputs()
    call = {"t": T} | CHANGES[change]
    solve("compiled", lotka_volterra, y0, args=(p,), t=T)
    found = solve("compiled", lotka_volterra, y0, args=(p,), **call)
    solve("compiled", lotka_volterra, y0, args=(p,), t=T)
    again = solve("compiled", lotka_volterra, y0, args=(p,), **call)
    validation._known.clear()
    afresh = solve("compiled", lotka_volterra, y0, args=(p,), **call)
    for solution in (found, again):
        assert torch.equal(solution.y, afresh.y)
        assert torch.equal(solution.stats.n_steps, afresh.stats.n_steps)


def test_common_and_independent_steps_are_not_confused() -> None:
    y0, p = inputs()
    settings: dict[str, Any] = {"args": (p,), "rtol": 1e-5, "atol": 1e-6, "engine": "compiled"}
    for _ in range(3):
        common = aca_ext.solve(lotka_volterra, y0, T, **settings)
        independent = solve("compiled", lotka_volterra, y0, T, (p,))
        assert isinstance(common.stats.n_steps, int)
        assert independent.stats.n_steps.shape == (5,)
        assert common.stats.compiled == independent.stats.compiled == "solve"


def test_common_steps_validate_once_with_args(validated: list[object]) -> None:
    y0, p = inputs()
    settings: dict[str, Any] = {"args": (p,), "rtol": 1e-5, "atol": 1e-6, "engine": "compiled"}
    first, again = (aca_ext.solve(lotka_volterra, y0, T, **settings) for _ in range(2))
    assert len(validated) == 1
    assert torch.equal(first.y, again.y)
    for one, other in zip(gradients(first, y0, p), gradients(again, y0, p), strict=True):
        assert torch.equal(one, other)


def decay(t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return -y


WRONG: dict[str, Callable[[], dict[str, Any]]] = {
    "args is no tuple": lambda: {"args": torch.ones(3)},
    "an arg holds what requires grad": lambda: {"args": ([torch.ones(3, requires_grad=True)],)},
    "an arg was inside a transform": lambda: {"args": (_leaked(),)},
    "y0 was inside a transform": lambda: {"y0": _leaked()},
    "func is no function": lambda: {"func": 3},
    "func is swapped": lambda: {"func": lambda y, t: -y},
}


def _leaked() -> Tensor:
    leaked: list[Tensor] = []
    torch.func.vmap(lambda x: leaked.append(x) or x)(torch.ones(2, 4, 3))
    return leaked[0]


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("engine", ["compiled", "auto"])
def test_refuses_what_a_first_solve_refuses(what: str, engine: str) -> None:
    call = {"func": decay, "y0": torch.ones(4, 3), "t": T.float()}
    with pytest.raises(errors.AcaError) as first:
        solve(engine, **(call | WRONG[what]()))
    validation._known.clear()
    for _ in range(4):
        solve(engine, **call)
    with pytest.raises(type(first.value)) as again:
        solve(engine, **(call | WRONG[what]()))
    assert str(again.value) == str(first.value)


@pytest.mark.parametrize("engine", ["compiled", "auto"])
def test_common_steps_refuse_a_swapped_func_each_time(engine: str) -> None:
    y0 = torch.ones((), dtype=torch.float64)  # with a number as state, the swapped func returns a slope of its shape
    for _ in range(4):
        aca_ext.odeint(decay, y0, T, rtol=1e-5, atol=1e-6, engine=engine)
    with pytest.raises(errors.ArgumentTypeError, match="Swap its arguments"):
        aca_ext.odeint(lambda y, t: -y, y0, T, rtol=1e-5, atol=1e-6, engine=engine)


def test_autocast_is_no_program() -> None:
    y0, p = inputs()
    with torch.no_grad():
        assert solve("compiled", lotka_volterra, y0, T, (p,)).stats.compiled == "solve"
        with torch.autocast("cpu"):
            assert solve("compiled", lotka_volterra, y0, T, (p,)).stats.compiled != "solve"


def explodes(t: Tensor, y: Tensor) -> Tensor:
    return y * y


def test_failures_are_named_each_time(validated: list[object]) -> None:
    y0 = torch.tensor([[0.1], [5.0], [0.2]], dtype=torch.float64)
    call: dict[str, Any] = {"options": {"max_num_steps": 50, "on_failure": "nan"}}
    for _ in range(3):
        solution = solve("compiled", explodes, y0, T, **call)
        assert [error.sample for error in solution.stats.failures] == [1]
        assert solution.y[1:, 1].isnan().all()
        assert not solution.y[:, 0].isnan().any()
    assert len(validated) == 1
    for _ in range(2):
        with pytest.raises(errors.SolveError, match="sample 1 "):
            solve("compiled", explodes, y0, T, options={"max_num_steps": 50})


def test_a_task_is_kept_for_the_same_parts_alone() -> None:
    """``replace`` gives a problem other parts, but leaves it its settings."""
    y0 = torch.ones(4, 3, dtype=torch.float64)
    given = ProblemArguments(decay, y0, T, options={"batch": "independent"})
    problem, known = batch_problem_of(given), batch_problem_of(replace(given, y0=y0 + 1))
    assert type(known) is BatchProblem
    assert known.settings is problem.settings

    def made(problem: BatchProblem) -> Any:
        held: list[Tensor] = []
        task = task_of(problem, y0, y0, y0, y0, y0, held)
        return task, held[0].flatten().tolist()

    assert made(problem)[0].times == made(known)[0].times
    shorter = replace(problem, times_of_rows=problem.times_of_rows[:, :2], max_num_steps=7)
    task, times = made(shorter)
    assert (task.n_times, task.max_num_steps, times) == (2, 7, [0.0, 0.4])
    assert shorter.last_times.tolist() == [0.4] * 4
    task, times = made(problem)
    assert (task.n_times, task.max_num_steps, times) == (3, problem.max_num_steps, T.tolist())


def test_memory_of_records_serves_later_solves_of_any_func() -> None:
    """Records of one func take memory that those of another gave back, and hold the same numbers."""

    def decay(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        return -rates * y

    y0, p = inputs(300)
    expected = gradients(solve("compiled", lotka_volterra, y0, T, (p,)), y0, p)
    for _ in range(2):
        rates = p.detach()[:, :2].requires_grad_()
        of_decay = gradients(solve("compiled", decay, y0, T, (rates,)), y0, rates)
        assert relative_error(of_decay[1], decay_gradient(y0, rates)) <= 1e-4
        again = gradients(solve("compiled", lotka_volterra, y0, T, (p,)), y0, p)
        assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    lanes = [library for library in library_cache._libraries.values() if hasattr(library, "share_spare")]
    assert len(lanes) >= 2
    assert len({library.share_spare(None) for library in lanes}) == 1


def decay_gradient(y0: Tensor, rates: Tensor) -> Tensor:
    """Of the sum of the squares of the exact solution, with respect to the rates."""
    times = T[:, None, None]
    return (-2 * times * (y0 * torch.exp(-rates * times)).square()).sum(0).detach()
