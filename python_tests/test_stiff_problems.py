"""The stiff benchmark problems: their slopes in PyTorch and NumPy, and their published end values by SciPy."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import aca_ext
from benchmarks import stiff
from benchmarks.harness import Result, Settings, Table
from benchmarks.stiff_comparison import steps_at
from benchmarks.stiff_goals import goals
from benchmarks.stiff_problems import (
    BRUSSELATOR,
    E5,
    END_VALUES,
    HIRES,
    OREGONATOR,
    POLLUTION,
    PROBLEMS,
    ROBERTSON,
    StiffFunction,
    StiffProblem,
)

integrate = pytest.importorskip("scipy.integrate")
# LSODA's error at tolerance 1e-10 is up to 1e-7. All values but the Brusselator's agree with Radau, too, to 1e-11.
RTOL, ALLOWED = 1e-10, 1e-7
every = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def solve(slope: Any, t_end: float, y0: Any, atol: float, **options: Any) -> np.ndarray:
    found = integrate.solve_ivp(slope, (0, t_end), y0, method="LSODA", rtol=RTOL, atol=atol, **options)
    assert found.success
    return found.y[:, -1]


@every
def test_published_end_values(problem: StiffProblem) -> None:
    if problem is E5:
        return  # the next test: here rounding errors of y3 are larger than the end values' last digits
    bands = {"lband": problem.bandwidth, "uband": problem.bandwidth} if problem.bandwidth else {}
    y_end = solve(problem.for_numpy(), problem.t_end, problem.y0, problem.atol(RTOL), **bands)
    assert problem.error(y_end, RTOL) < ALLOWED
    assert problem.error(1.001 * y_end, RTOL) > ALLOWED


def test_published_end_values_of_e5_with_y3_eliminated() -> None:
    a, b, cm, c = E5.parameters

    def slope(t: float, y: np.ndarray) -> list[float]:
        y1, y2, y4 = y
        return [-a * y1 - b * y1 * (y2 - y4), a * y1 - cm * y2 * (y2 - y4), b * y1 * (y2 - y4) - c * y4]

    _, y2, y4 = solve(slope, E5.t_end, [1.76e-3, 0.0, 0.0], 1e-32)
    assert [y2, y2 - y4] == pytest.approx(list(E5.end[1:3]), rel=1e-7)
    full = solve(E5.for_numpy(), E5.t_end, E5.y0, E5.atol(RTOL))
    assert E5.error(full, RTOL) < ALLOWED
    assert full[1:3] == pytest.approx(E5.end[1:3], rel=1e-2)


@every
def test_slope_is_the_same_in_torch_and_numpy(problem: StiffProblem) -> None:
    y = np.array(problem.y0) + np.random.default_rng(0).uniform(0.1, 1.0, len(problem.y0))
    func = StiffFunction(problem)
    found = func(torch.zeros(()), torch.from_numpy(y))
    np.testing.assert_allclose(found.detach().numpy(), problem.for_numpy()(0.0, y), rtol=1e-12)
    assert func.p.numel() == len(problem.parameters)
    gradient = torch.autograd.grad(found.sum(), func.p)[0]
    assert gradient.abs().sum() > 0 or problem in (ROBERTSON, E5)  # their slopes add up to a constant


@every
def test_values_have_a_source_and_the_time_of_the_problem(problem: StiffProblem) -> None:
    (entry,) = [entry for entry in END_VALUES.values() if tuple(entry["values"]) == problem.end]
    assert entry["t"] == problem.t_end
    assert entry["source"]
    assert len(problem.end) == len(problem.measured or problem.y0)


def test_error_is_measured_in_tolerances() -> None:
    y_end = np.array(ROBERTSON.end)
    assert ROBERTSON.error(y_end, 1e-4) == 0
    y_end[2] *= 1 + 1e-4
    assert ROBERTSON.error(y_end, 1e-4) == pytest.approx(1e-4, rel=1e-3)


def test_brusselator_has_fixed_ends_and_three_point_diffusion() -> None:
    """A linear profile that meets both ends has no diffusion: the slope is that of the reaction alone."""
    cells = len(BRUSSELATOR.y0) // 2
    y = np.stack([np.ones(cells), np.full(cells, 3.0)], -1).reshape(-1)
    found = BRUSSELATOR.for_numpy()(0.0, y).reshape(-1, 2)
    np.testing.assert_allclose(found, np.zeros((cells, 2)), atol=1e-9)
    y[10] += 1e-3
    moved = BRUSSELATOR.for_numpy()(0.0, y)
    assert moved[8] == pytest.approx(0.02 * (cells + 1) ** 2 * 1e-3, rel=1e-6)
    assert moved[12] == pytest.approx(moved[8], rel=1e-6)


def sensitivity(problem: StiffProblem, index: int) -> np.ndarray:
    """dy(t_end)/dp_index by the variational equation, whose right side comes from complex steps."""
    n, tiny = len(problem.y0), 1e-30
    p = np.array(problem.parameters, dtype=complex)
    p[index] += 1j * tiny

    def slope(t: float, both: np.ndarray) -> np.ndarray:
        found = problem.slope(t, both[:n] + 1j * tiny * both[n:], p, np, *problem.constants)
        return np.concatenate([found.real, found.imag / tiny])

    start = np.concatenate([problem.y0, np.zeros(n)])
    atol = 1e-4 * problem.atol(1e-8)
    found = integrate.solve_ivp(slope, (0, problem.t_end), start, method="Radau", rtol=1e-8, atol=atol)
    assert found.success
    return found.y[n:, -1]


@pytest.mark.parametrize(("problem", "t_end", "index"), [(ROBERTSON, 40.0, 2), (HIRES, 2.0, 0)])
def test_gradient_by_a_rate(problem: StiffProblem, t_end: float, index: int) -> None:
    """Gradients of all end values, of all sizes, against the variational equation."""
    problem = replace(problem, t_end=t_end)
    func, y0 = StiffFunction(problem), torch.tensor(problem.y0, dtype=torch.float64)
    times = torch.tensor([0.0, problem.t_end], dtype=torch.float64)
    y_end = aca_ext.odeint(func, y0, times, rtol=1e-8, atol=1e-12, method="kvaerno5")[-1]
    exact = sensitivity(problem, index)
    weights = torch.tensor(1 / np.abs(exact))
    (gradient,) = torch.autograd.grad(y_end @ weights, func.p)
    assert gradient[index].item() == pytest.approx(np.sign(exact).sum(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "rtol"), [("radau5", 1e-4), ("kvaerno5", 1e-4), ("kvaerno5", 1e-6), ("kvaerno3", 1e-4)]
)
@pytest.mark.parametrize("problem", [OREGONATOR, HIRES], ids=lambda problem: problem.name)
def test_errors_at_the_end_are_within_ten_tolerances(problem: StiffProblem, method: str, rtol: float) -> None:
    func, y0 = StiffFunction(problem), torch.tensor(problem.y0, dtype=torch.float64)
    times = torch.tensor([0.0, problem.t_end], dtype=torch.float64)
    with torch.no_grad():
        y_end = aca_ext.odeint(func, y0, times, rtol=rtol, atol=problem.atol(rtol), method=method)[-1]
    assert problem.error(y_end.numpy(), rtol) <= 10 * rtol


def test_radau5_takes_about_the_steps_of_scipys_radau() -> None:
    y0, times = torch.tensor(HIRES.y0, dtype=torch.float64), torch.tensor([0.0, HIRES.t_end], dtype=torch.float64)
    how: dict[str, Any] = {"rtol": 1e-5, "atol": HIRES.atol(1e-5)}
    with torch.no_grad():
        found = aca_ext.solve(StiffFunction(HIRES), y0, times, method="radau5", **how)
    peer = integrate.solve_ivp(HIRES.for_numpy(), (0.0, HIRES.t_end), np.array(HIRES.y0), method="Radau", **how)
    assert found.stats.n_accepted == pytest.approx(len(peer.t) - 1, rel=0.25)


def test_benchmark_runs_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stiff, "QUICK", (POLLUTION,))
    monkeypatch.setitem(sys.modules, "diffrax", None)  # left out: it takes long to compile
    result = Result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy's LSODA does not solve this problem at this tolerance
        for part in stiff.run(Settings(quick=True)):
            (result.tables if isinstance(part, Table) else result.notes).append(part)
    assert not [note for note in result.notes if "aca_ext" in note or "gradient" in note]
    work, comparison, gradients, batch, reached = result.tables
    errors = {row["solver"]: row["error"] / row["tolerance"] for row in work.rows}
    own = {f"aca_ext {name}" for name in (*stiff.OWN_METHODS, *(f"{x}, compiled" for x in stiff.COMPILED_METHODS))}
    assert own | {"SciPy Radau", "SciPy BDF"} <= set(errors)
    assert errors["aca_ext kvaerno5, compiled"] == pytest.approx(errors["aca_ext kvaerno5"], rel=1e-6)
    assert max(errors.values()) < 10
    assert errors == {row["solver"]: row["in_tolerances"] for row in work.rows}
    assert {row["solver"] for row in comparison.rows} == own
    steps = {row["solver"]: row["steps"] for row in work.rows}
    assert all(row["steps"] == steps[row["solver"]] for row in comparison.rows)
    assert any("step_ratio" in row for row in comparison.rows)
    assert {row["solver"]: row["error"] < 1e-2 for row in gradients.rows} == dict.fromkeys(stiff.OWN_METHODS, True)
    assert any("aca_ext" in str(row) for row in batch.rows)
    worst = {(row["solver"], row["goal"]): row for row in reached.rows}
    of_errors = worst["kvaerno5", "error at the end, in tolerances"]
    assert of_errors["worst"] == errors["aca_ext kvaerno5"]
    assert (of_errors["met"], of_errors["at"]) == ("1 of 1", "Pollution, 1e-04")
    assert len(stiff.draw(result).axes) == 2


def test_goals_name_the_worst_and_count_those_that_are_met() -> None:
    rows = [{"solver": "aca_ext kvaerno5", "tolerance": 1e-4, "in_tolerances": x} for x in (3.0, 12.0)]
    rows.append({"solver": "aca_ext kvaerno5, compiled", "tolerance": 1e-4, "of_jit": 1.0})
    lanes, peer = "aca_ext kvaerno5, lanes, 1e-06", "diffrax Kvaerno5, vmap, jit, 1e-06"
    of_batch = [{"solver": lanes, "seconds": 0.4}, {"solver": peer, "seconds": 1.0}]
    table = goals({"A": rows[:1], "B": rows[1:]}, of_batch)
    found = [(row["solver"], row["worst"], row["at"], row["met"]) for row in table.rows]
    assert found == [
        ("kvaerno5", 12.0, "B, 1e-04", "1 of 2"),
        ("kvaerno5, compiled", 1.0, "B, 1e-04", "1 of 1"),
        ("kvaerno5, lanes", 0.4, "Robertson, 1e-06", "1 of 1"),
    ]


def test_steps_at_an_error_are_interpolated() -> None:
    curve = [(1e-2, 10), (1e-4, 1000), (1e-6, 4000)]
    assert steps_at(curve, 1e-3) == pytest.approx(100)
    assert steps_at(curve, 1e-5) == pytest.approx(2000)
    assert steps_at(curve, 1e-7) is None
    assert steps_at(curve, 0.0) is None
