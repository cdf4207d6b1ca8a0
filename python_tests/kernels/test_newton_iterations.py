"""Iterations of Newton's method in one call of the extension, against the calls of their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations, operations_for, row_operations_for
from aca_ext.kernels.operations import Slope
from aca_ext.kernels.small_systems import SmallSystem
from aca_ext.problem.tolerance import Tolerance

M = 3
A = {1: [[0.3]], 2: [[0.4, -0.1], [0.7, 0.2]]}
TIME = torch.tensor(0.5, dtype=torch.float64)


def operations(dtype: torch.dtype = torch.float64) -> TorchOperations:
    return operations_for(torch.zeros(M, dtype=dtype), Tolerance(1e-4, 1e-6, (0, 1, M)))


def system_for(ops: TorchOperations, stages: int) -> SmallSystem:
    dtype = ops.like.dtype
    system = ops.small_system([torch.randn(1, M, M, dtype=dtype) for _ in range(stages)], A[stages], 0.1)
    assert isinstance(system, SmallSystem)
    return system


def states(stages: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(M, dtype=dtype) for _ in range(stages)]


def iterate(ops: TorchOperations, system: SmallSystem, f: Slope, *how: Any) -> tuple[list[Tensor], Any]:
    found = ops.newton_iteration(system, f, *how)
    assert found is not None
    return found


def slope(t: Tensor, y: Tensor) -> Tensor:
    return t * y.sin()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stages", A)
def test_an_iteration_is_that_of_its_parts_bit_for_bit(stages: int, dtype: torch.dtype) -> None:
    torch.manual_seed(stages)
    ops, t = operations(dtype), [TIME.to(dtype)] * stages
    system, base, z, y = system_for(ops, stages), states(stages, dtype), states(stages, dtype), torch.randn(M).to(dtype)
    at = [b + x for b, x in zip(base, z, strict=True)]
    expected, change = system.correct([slope(*x) for x in zip(t, at, strict=True)], z)
    norms = [ops.error_norm(d, None, 0.0, y, x) for d, x in zip(change, at, strict=True)]
    relative = [ops.relative_changes(d, x) for d, x in zip(change, at, strict=True)]

    found, size = iterate(ops, system, slope, t, base, z, y)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert size == max(norms)
    _, sizes = iterate(ops, system, slope, t, base, z, None)
    assert sizes == tuple(map(max, zip(*relative, strict=True)))


def test_func_may_return_one_buffer_for_all_stages() -> None:
    ops, buffer = operations(), torch.empty(M, dtype=torch.float64)
    how = [TIME] * 2, states(2), states(2), None
    system = system_for(ops, 2)
    found, _ = iterate(ops, system, lambda t, y: buffer.copy_(slope(t, y)), *how)
    expected, _ = iterate(ops, system, slope, *how)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_states_that_func_keeps_do_not_change() -> None:
    ops, kept = operations(), []

    def f(t: Tensor, y: Tensor) -> Tensor:
        kept.append(y)
        return slope(t, y)

    system, base, z = system_for(ops, 1), states(1), states(1)
    expected = []
    for _ in range(20):
        expected.append(base[0] + z[0])
        z, _ = iterate(ops, system, f, [TIME], base, z, base[0])
    assert all(torch.equal(*pair) for pair in zip(kept, expected, strict=True))


def test_results_of_earlier_iterations_do_not_change() -> None:
    ops = operations()
    system, base, z = system_for(ops, 1), states(1), states(1)
    results, copies = [], []
    for _ in range(20):
        z, _ = iterate(ops, system, slope, [TIME], base, z, None)
        results.append(z)
        copies.append(z[0].clone())
    assert all(torch.equal(x, copy) for (x,), copy in zip(results, copies, strict=True))


def test_rows_and_norms_of_the_user_are_left_to_the_parts() -> None:
    own_norm = operations_for(torch.zeros(M).double(), Tolerance(1e-4, 1e-6, (0, M), lambda x: x.abs().max()))
    rows = row_operations_for(torch.zeros(2, M).double(), Tolerance(1e-4, 1e-6, (0, M)))
    for ops, blocks in (own_norm, 1), (rows, 2):
        h = 0.1 if blocks == 1 else torch.full((blocks, 1), 0.1, dtype=torch.float64)
        system = ops.small_system([torch.randn(blocks, M, M).double()], A[1], h)
        at = [torch.zeros_like(ops.like)]
        assert ops.newton_iteration(system, slope, [TIME], at, at, None) is None


def test_tensors_of_another_layout_are_refused() -> None:
    ops = operations()
    system, (x,), longer = system_for(ops, 1), states(1), torch.zeros(2 * M, dtype=torch.float64)
    for base, z, y in [(longer, x, x), (x, longer[::2], x), (x, x, x.float())]:
        with pytest.raises(ValueError, match="laid out like the state"):
            ops.newton_iteration(system, slope, [TIME], [base], [z], y)


def test_systems_of_other_states_are_refused() -> None:
    ops, like = operations(), torch.zeros(2, dtype=torch.float64)
    other = operations_for(like, Tolerance(1e-4, 1e-6, (0, 2)))
    system, (x,) = other.small_system([torch.zeros(1, 2, 2).double()], A[1], 0.1), states(1)
    with pytest.raises(ValueError, match="other states"):
        ops.newton_iteration(system, slope, [TIME], [x], [x], None)
