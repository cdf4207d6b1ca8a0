"""The kernels on rows (samples), each with its own step size, against the kernels on one row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from operands import CHUNK, THREADS_FROM, Operands, assert_near, both_dtypes, kernels, tolerance_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from aca_ext.kernels import reference
from aca_ext.kernels.fused import (
    DifferentiableRowKernels,
    KernelOperations,
    RowKernels,
    RowOperations,
    Tolerance,
    row_operations_for,
)

MANY_SEGMENTS = 70
ROWS = [(1, 1), (3, 2), (5, 7), (7, 64), (2, CHUNK + 5), (3, 2 * THREADS_FROM), (0, 4), (4, 0)]


@both_dtypes
@pytest.mark.parametrize("shape", ROWS, ids=str)
class TestRows:
    """Rows with their own step sizes: bitwise equal to single rows, and near the specification."""

    @staticmethod
    def of(shape: tuple[int, int], dtype: torch.dtype, device: str, **tolerances: Any) -> tuple[RowKernels, Tensor]:
        like = torch.zeros(shape, dtype=dtype, device=device)
        tolerance = Tolerance(tolerances.get("rtol", 1e-3), tolerances.get("atol", 1e-5), [0, shape[1]])
        ops = RowKernels(like, tolerance)
        return ops, ops.steps(np.linspace(-0.7, 1.3, shape[0]))

    @pytest.mark.parametrize("with_base", [True, False])
    def test_weighted_sum(self, device: str, dtype: torch.dtype, shape: tuple[int, int], with_base: bool) -> None:
        operands = Operands(shape, dtype, device)
        ops, h = self.of(shape, dtype, device)
        base, x, w = (operands.one() if with_base else None), operands.many(7), operands.weights(7)
        found = ops.weighted_sum(base, h, x, w)
        expected = reference.weighted_sum(base, h, x, w)
        magnitude = reference.weighted_sum(None if base is None else base.abs(), h.abs(), [k.abs() for k in x],
                                           [abs(w_j) for w_j in w])  # fmt: skip
        assert_near(found, expected, magnitude)
        for i in range(shape[0]):
            row = kernels(found[i]).weighted_sum(None if base is None else base[i], h[i].item(), [k[i] for k in x], w)
            assert torch.equal(found[i], row)

    def test_solution_and_error(self, device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        operands = Operands(shape, dtype, device)
        ops, h = self.of(shape, dtype, device)
        y, k, b, e = operands.one(), operands.many(6), operands.weights(6), operands.weights(6)
        y1, error = ops.solution_and_error(y, h, k, b, e)
        assert torch.equal(y1, ops.weighted_sum(y, h, k, b))
        assert torch.equal(error, ops.weighted_sum(None, h, k, e))
        out = torch.empty_like(y)
        assert ops.solution_and_error(y, h, k, b, e, out)[0] is out
        assert torch.equal(out, y1)

    @pytest.mark.parametrize("with_slope", [True, False])
    def test_error_norm(self, device: str, dtype: torch.dtype, shape: tuple[int, int], with_slope: bool) -> None:
        operands = Operands(shape, dtype, device)
        partial, k, y0, y1 = operands.many(4)
        slope = k if with_slope else None
        for each in (False, True):
            rtol = torch.rand(shape, dtype=dtype).to(device) if each else 1e-3
            ops, h = self.of(shape, dtype, device, rtol=rtol)
            norms = ops.error_norm(partial, slope, 0.3 * h, y0, y1)
            specification = RowOperations(y0, ops.tolerance).error_norm(partial, slope, 0.3 * h, y0, y1)
            assert norms.shape == (shape[0],)
            np.testing.assert_allclose(norms, specification, rtol=0 if 0 in shape else 64 * torch.finfo(dtype).eps)
            for i in range(shape[0]):
                one = kernels(y0[i], Tolerance(rtol[i] if each else rtol, 1e-5, [0, shape[1]]))
                row = one.error_norm(partial[i], None if slope is None else slope[i], 0.3 * h[i].item(), y0[i], y1[i])
                assert norms[i] == row or device == "cuda"


@both_dtypes
class TestRowsMore:
    def test_segments(self, device: str, dtype: torch.dtype) -> None:
        """Each row holds the components of a tuple side by side; its norm is the largest of theirs."""
        bounds = [0, 3, 3, 8]
        operands = Operands((4, 8), dtype, device)
        partial, k, y0, y1 = operands.many(4)
        partial[:, 5] *= 1e3
        found = RowKernels(y0, Tolerance(1e-3, 1e-5, bounds)).error_norm(partial, k, 0.5, y0, y1)
        for i in range(4):
            one = KernelOperations(y0[i], Tolerance(1e-3, 1e-5, bounds))
            assert found[i] == pytest.approx(one.error_norm(partial[i], k[i], 0.5, y0[i], y1[i]), rel=1e-6)
            tail = KernelOperations(y0[i, 3:], Tolerance(1e-3, 1e-5, [0, 5]))
            last = [x[i, 3:].clone() for x in (partial, k, y0, y1)]
            assert found[i] == pytest.approx(tail.error_norm(last[0], last[1], 0.5, last[2], last[3]), rel=1e-6)

    def test_more_segments_than_a_launch_takes(self, device: str, dtype: torch.dtype) -> None:
        bounds = list(range(MANY_SEGMENTS + 1))
        operands = Operands((3, MANY_SEGMENTS), dtype, device)
        partial, k, y0, y1 = operands.many(4)
        found = RowKernels(y0, Tolerance(1e-3, 1e-5, bounds)).error_norm(partial, k, 0.5, y0, y1)
        expected = RowOperations(y0, Tolerance(1e-3, 1e-5, bounds)).error_norm(partial, k, 0.5, y0, y1)
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_a_row_that_is_not_finite_is_that_row_alone(self, device: str, dtype: torch.dtype) -> None:
        operands = Operands((4, 5), dtype, device)
        partial, k, y0, y1 = operands.many(4)
        y1[2, 3] = math.inf
        norms = RowKernels(y0, Tolerance(1e-3, 1e-5, [0, 5])).error_norm(partial, k, 0.5, y0, y1)
        assert np.isnan(norms).tolist() == [False, False, True, False]

    def test_misaligned(self, device: str, dtype: torch.dtype) -> None:
        operands = Operands((3, 8), dtype, device, offset=1)
        y, x, w = operands.one(), operands.many(3), operands.weights(3)
        ops = RowKernels(y, Tolerance(1e-3, 1e-5, [0, 8]))
        h = ops.steps(np.array([0.1, -0.2, 0.0]))
        found = ops.weighted_sum(y, h, x, w)
        torch.testing.assert_close(found, reference.weighted_sum(y, h, x, w))
        assert torch.equal(found[2], y[2])

    def test_times_broadcast_to_the_rows(self, device: str, dtype: torch.dtype) -> None:
        like = torch.zeros(2, 3, 4, dtype=dtype, device=device)
        one, other = RowKernels(like, Tolerance(1e-3, 1e-5, [0, 12])).scalars(
            [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
        )
        assert one.shape == other.shape == (2, 1, 1)
        assert one.dtype == dtype
        assert other.flatten().tolist() == [3.0, 4.0]

    @pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
    def test_gradients(self, device: str, dtype: torch.dtype, check: Callable[..., bool]) -> None:
        if dtype is torch.float32:
            pytest.skip("finite differences take float64")
        operands = Operands((3, 2), dtype, device)
        ops = DifferentiableRowKernels(operands.one(), Tolerance(1e-3, 1e-5, [0, 2]))
        h = ops.steps(np.array([0.1, -0.2, 0.7]))
        inputs = [x.requires_grad_() for x in operands.many(3)]
        assert check(lambda y, *k: ops.weighted_sum(y, h, k, (0.3, -1.2)), inputs)
        assert check(lambda y, *k: ops.solution_and_error(y, h, k, (0.3, -1.2), (1.0, 2.0))[0], inputs)

    def test_float32_gradients_stay_float32(self, device: str, dtype: torch.dtype) -> None:
        y = torch.ones(3, 2, dtype=dtype, device=device, requires_grad=True)
        ops = row_operations_for(y.detach(), Tolerance(1e-3, 1e-5, [0, 2]), differentiable=True)
        h = ops.steps(np.array([0.1, -0.2, 0.7]))
        (grad,) = torch.autograd.grad(ops.weighted_sum(None, h, [y], (2.0,)).sum(), y)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad[:, 0], (2 * h.flatten()).to(dtype))

    def test_reference_where_there_are_no_kernels(self, device: str, dtype: torch.dtype) -> None:
        assert type(row_operations_for(torch.zeros(2, 2, dtype=torch.bfloat16), tolerance_of(2))) is RowOperations
        assert type(row_operations_for(torch.zeros(2, 2, dtype=dtype), tolerance_of(2))) is RowKernels
