"""The systems of implicit stages and the sizes of changes by the extension, against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aca_ext import _C
from aca_ext.kernels import reference
from aca_ext.kernels.fused import operations_for, row_operations_for
from aca_ext.kernels.small_systems import MOST_UNKNOWNS, SmallSystem
from aca_ext.problem.tolerance import Tolerance
from aca_ext.solver.implicit.systems import BlockSystem

DTYPES = {torch.float64: 1e-12, torch.float32: 2e-4}


def tolerance_for(n: int) -> Tolerance:
    return Tolerance(1e-6, 1e-6, (0, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stages", "m", "blocks", "is_batch"), [(1, 3, 1, False), (3, 4, 1, False), (2, 3, 5, True)])
def test_system_is_that_of_torch(dtype: torch.dtype, stages: int, m: int, blocks: int, is_batch: bool) -> None:
    torch.manual_seed(stages)
    like = torch.zeros(blocks, m, dtype=dtype) if is_batch else torch.zeros(m, dtype=dtype)
    ops = (row_operations_for if is_batch else operations_for)(like, tolerance_for(m))
    jacobians = [10 * torch.randn(blocks, m, m, dtype=dtype) for _ in range(stages)]
    a = torch.rand(stages, stages).tolist()
    h = 0.1 + torch.rand(blocks, 1, dtype=torch.float64) if is_batch else 0.3
    r, z = ([torch.randn_like(like) for _ in range(stages)] for _ in range(2))
    own, theirs = ops.small_system(jacobians, a, h), BlockSystem(jacobians, a, h)
    assert isinstance(own, SmallSystem)

    def agree(found: list[Tensor], expected: list[Tensor]) -> None:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=DTYPES[dtype], atol=DTYPES[dtype])

    agree(own.solve(r), theirs.solve(r))
    agree(own.solve(r, transposed=True), theirs.solve(r, transposed=True))
    for found, expected in zip(own.correct(r, z), theirs.correct(r, z), strict=True):
        agree(found, expected)


def test_rows_change_places_where_pivots_vanish() -> None:
    like = torch.zeros(3, dtype=torch.float64)
    permutation = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    system = operations_for(like, tolerance_for(3)).small_system(
        [torch.eye(3).double() - permutation[None]], [[1.0]], 1.0
    )
    r = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.equal(system.solve([r])[0], torch.linalg.solve(permutation, r))
    assert torch.equal(system.solve([r], transposed=True)[0], torch.linalg.solve(permutation.T, r))


def test_a_singular_matrix_gives_no_finite_solution() -> None:
    like = torch.zeros(2, dtype=torch.float64)
    ones = torch.ones(1, 2, 2, dtype=torch.float64)
    system = operations_for(like, tolerance_for(2)).small_system([torch.eye(2).double() - ones], [[1.0]], 1.0)
    assert not torch.isfinite(system.solve([torch.tensor([1.0, 2.0], dtype=torch.float64)])[0]).any()


def test_larger_and_transposed_states_are_left_to_torch() -> None:
    m = MOST_UNKNOWNS + 1
    large = torch.zeros(m, dtype=torch.float64)
    assert operations_for(large, tolerance_for(m)).small_system([torch.zeros(1, m, m).double()], [[1.0]], 1.0) is None
    turned = torch.zeros(2, 3, dtype=torch.float64).t()
    assert operations_for(turned, tolerance_for(6)).small_system([torch.zeros(1, 6, 6).double()], [[1.0]], 1.0) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_changes_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state, change = torch.randn(6, 4, dtype=dtype), 1e-3 * torch.randn(6, 4, dtype=dtype)
    change[1] = 0
    state[2, 0], change[2, 0] = 0, 1e-30
    change[3, 1], change[4, 2] = math.inf, math.nan
    state[5], change[5] = 0, 0
    expected = [x.double().numpy() for x in reference.relative_changes(change, state)]
    found = row_operations_for(state, tolerance_for(4)).relative_changes(change, state)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), equal_nan=True)
    alone = operations_for(state[0], tolerance_for(4)).relative_changes(change[0], state[0])
    assert alone == (found[0][0], found[1][0])


@pytest.mark.parametrize(
    ("blocks", "m", "jacobians", "a", "message"),
    [
        (1, 0, [8192], [[1.0]], "stages with elements"),
        (1, 2, [8192], [[1.0, 2.0]], "square"),
        (1, 2, [8192, 8192], [[1.0]], "for each stage"),
        (1, 2, [0], [[1.0]], "memory"),
    ],
)
def test_wrong_arguments_are_refused(
    blocks: int, m: int, jacobians: list[int], a: list[list[float]], message: str
) -> None:
    on = _C.Target("cpu", "float64", 1, 0, 0, 0)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        _C.StageSystem(on, blocks, m, jacobians, a, 1.0, 0)
