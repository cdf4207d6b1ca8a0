"""Nodes of fixed grids: rounding of coarse times adds no step, and no true step is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aca_ext
from aca_ext.errors import OptionError

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def lengths(t: Any, **options: Any) -> Tensor:
    sol = aca_ext.solve(lambda t, y: -y, torch.ones(1).double(), t, method="euler", options=options)
    return (sol.steps[:, 1] - sol.steps[:, 0]).abs()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (0.5, 2.5)])
@pytest.mark.parametrize("per_gap", [1, 2, 5])
def test_step_sizes_that_divide_the_times(start: float, end: float, per_gap: int, dtype: torch.dtype) -> None:
    gap = abs(end - start) / 10
    found = lengths(torch.linspace(start, end, 11, dtype=torch.float64).to(dtype), step_size=gap / per_gap)
    assert len(found) == 10 * per_gap
    rounding = 2 * torch.finfo(dtype).eps * max(abs(start), abs(end))
    assert (found - gap / per_gap).abs().max() <= rounding + 1e-12


@pytest.mark.parametrize(
    "t", [np.linspace(0, 1, 11, dtype=np.float32), list(np.linspace(0, 1, 11, dtype=np.float32)), torch.arange(2)]
)
def test_times_of_other_kinds(t: Any) -> None:
    assert len(lengths(t, step_size=0.1)) == 10


@pytest.mark.parametrize("step", [torch.tensor(0.7), np.float32(0.7), torch.tensor(0.1), torch.tensor(0.3)])
def test_a_coarse_step_size(step: Any) -> None:
    count = {0.7: 10, 0.1: 70, 0.3: 24}[round(float(step), 3)]  # 7 / 0.3 leaves a true remainder
    assert len(lengths(torch.tensor([0.0, 7.0]).double(), step_size=step)) == count


def test_what_is_no_rounding_is_a_step() -> None:
    assert len(lengths([0.0, 1.0000001], step_size=0.1)) == 11
    assert len(lengths(torch.tensor([0.0, 1.01]), step_size=0.1)) == 11
    assert len(lengths(torch.tensor([0.0, 1.0]).bfloat16(), step_size=0.03)) == 34


def test_the_dtype_of_t_is_no_part_of_what_is_remembered() -> None:
    """Two solves with times of equal values and different dtypes, in turn."""
    t = torch.linspace(0, 1, 11)
    for _ in range(2):
        assert len(lengths(t, step_size=0.1)) == 10
        assert len(lengths(t.double(), step_size=0.1)) > 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_grid", DTYPES)
def test_constructed_grids(of_grid: torch.dtype, dtype: torch.dtype) -> None:
    grid = torch.linspace(0, 1, 11, dtype=torch.float64).to(of_grid)
    t = torch.linspace(0, 1, 6, dtype=torch.float64).to(dtype)
    found = lengths(t, grid_constructor=lambda func, y0, t: grid)
    assert len(found) == 10
    assert found.min() > 0.09


def test_constructed_grids_keep_close_nodes() -> None:
    nodes = torch.tensor([0.0, 0.5, 0.5 + 1e-8, 1.0], dtype=torch.float64)
    assert len(lengths(torch.tensor([0.0, 0.5, 1.0]), grid_constructor=lambda func, y0, t: nodes)) == 3


class TestNumberOfSteps:
    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    @pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (2.0, -1.0)])
    def test_makes_equal_steps(self, start: float, end: float, method: str) -> None:
        options = {"n_steps": 7}
        sol = aca_ext.solve(lambda t, y: -y, torch.ones(1).double(), [start, end], method=method, options=options)
        expected = torch.linspace(start, end, 8, dtype=torch.float64)
        torch.testing.assert_close(sol.steps[:, 1], expected[1:], rtol=0, atol=1e-15)
        same = {"step_size": abs(end - start) / 7}
        by_size = aca_ext.odeint(lambda t, y: -y, torch.ones(1).double(), [start, end], method=method, options=same)
        torch.testing.assert_close(sol.y, by_size, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_requested_times_on_the_grid_add_no_step(self, dtype: torch.dtype) -> None:
        t = torch.linspace(0, 1, 6, dtype=torch.float64).to(dtype)
        assert len(lengths(t, n_steps=10)) == 10

    def test_other_requested_times_are_further_nodes(self) -> None:
        t = torch.tensor([0.0, 0.33, 1.0], dtype=torch.float64)
        assert lengths(t, n_steps=4).tolist() == pytest.approx([0.25, 0.08, 0.17, 0.25, 0.25])

    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    def test_with_interpolation_they_are_not(self, interp: str) -> None:
        t = torch.tensor([0.0, 0.33, 1.0], dtype=torch.float64)
        assert len(lengths(t, n_steps=4, interp=interp)) == 4

    def test_of_one_time(self) -> None:
        assert len(lengths([0.5], n_steps=4)) == 0

    @pytest.mark.parametrize("n", [0, -1, 2.5, "3", True, float("inf"), float("nan"), [4]])
    def test_must_be_a_positive_integer(self, n: Any) -> None:
        with pytest.raises(OptionError, match="n_steps"):
            lengths([0.0, 1.0], n_steps=n)

    @pytest.mark.parametrize("other", [{"step_size": 0.1}, {"grid_constructor": lambda func, y0, t: t}])
    def test_excludes_other_grids(self, other: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match="both given"):
            lengths([0.0, 1.0], n_steps=4, **other)

    def test_below_the_spacing_of_numbers(self) -> None:
        with pytest.raises(OptionError, match="fewer"):
            lengths([1e9, 1e9 + 1e-6], n_steps=100)

    def test_of_the_adjoint_is_refused_without_its_own_options(self) -> None:
        call = {"method": "rk4", "options": {"n_steps": 50}, "gradient": "adjoint"}
        y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
        with pytest.raises(OptionError, match="adjoint_options"):
            aca_ext.odeint(lambda t, y: -y, y0, [0.0, 1.0], **call)
        y = aca_ext.odeint(lambda t, y: -y, y0, [0.0, 1.0], adjoint_options={"step_size": 0.02}, **call)
        y[-1].sum().backward()
        assert y0.grad.item() == pytest.approx(0.36787944, rel=1e-6)

    def test_of_a_solve_with_resets_is_refused(self) -> None:
        bounce = aca_ext.Event(lambda t, y: y[0] - 0.5, reset=lambda t, y: y + 1)
        with pytest.raises(OptionError, match="step_size"):
            aca_ext.solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0], options={"n_steps": 4}, events=[bounce])
