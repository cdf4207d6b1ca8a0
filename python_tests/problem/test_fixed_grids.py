"""Nodes of fixed grids: rounding of coarse times adds no step, and no true step is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aca_ext

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
