"""csrc's CUDA kernels, emulated, against numpy.

The emulation observes every access to memory, so each test also shows that its kernels have no race, stay inside their
buffers and read nothing that was never written.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulated_checks import check_error_ratio, check_rows, check_solution_and_error, check_weighted_sum
from emulation import MAX_TERMS, Emulation, address_of

both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
THREADS = 256  # of a block
SIZES = [0, 1, 2, 3, 4, 5, 31, 33, 255, 257, 4 * THREADS, 4 * THREADS + 3, 2500]
PARTIAL_SUMS = 512  # of one reduction, at most


@both_dtypes
class TestWeightedSum:
    @pytest.mark.parametrize("n", SIZES)
    def test_sizes(self, cuda: Emulation, dtype: str, n: int) -> None:
        check_weighted_sum(cuda, dtype, n, 3, with_base=True)

    @pytest.mark.parametrize("count", range(1, MAX_TERMS + 1))
    def test_operand_counts(self, cuda: Emulation, dtype: str, count: int) -> None:
        check_weighted_sum(cuda, dtype, 37, count, with_base=True)
        check_weighted_sum(cuda, dtype, 37, count, with_base=False)

    @pytest.mark.parametrize("offset", [1, 2, 3])
    def test_misalignment(self, cuda: Emulation, dtype: str, offset: int) -> None:
        check_weighted_sum(cuda, dtype, 1029, 2, with_base=True, offset=offset)


@both_dtypes
class TestSolutionAndError:
    @pytest.mark.parametrize("n", SIZES)
    def test_sizes(self, cuda: Emulation, dtype: str, n: int) -> None:
        check_solution_and_error(cuda, dtype, n, 3)

    @pytest.mark.parametrize("count", range(1, MAX_TERMS + 1))
    def test_operand_counts(self, cuda: Emulation, dtype: str, count: int) -> None:
        check_solution_and_error(cuda, dtype, 37, count)

    def test_misalignment(self, cuda: Emulation, dtype: str) -> None:
        check_solution_and_error(cuda, dtype, 1029, 2, offset=1)


@both_dtypes
class TestRows:
    @pytest.mark.parametrize("rows", [1, 2, 7])
    @pytest.mark.parametrize("length", [1, 3, 4, 37, 128, 300])
    def test_sizes(self, cuda: Emulation, dtype: str, rows: int, length: int) -> None:
        check_rows(cuda, dtype, rows, length, 3)

    @pytest.mark.parametrize("count", range(1, MAX_TERMS + 1))
    def test_operand_counts(self, cuda: Emulation, dtype: str, count: int) -> None:
        check_rows(cuda, dtype, 3, 5, count)

    def test_misalignment(self, cuda: Emulation, dtype: str) -> None:
        check_rows(cuda, dtype, 3, 64, 2, offset=1)


@both_dtypes
class TestErrorRatio:
    @pytest.mark.parametrize("n", [*SIZES[1:], 4 * 4 * THREADS + 1])
    def test_sizes(self, cuda: Emulation, dtype: str, n: int) -> None:
        check_error_ratio(cuda, dtype, [0, n])

    @pytest.mark.parametrize("with_slope", [True, False])
    @pytest.mark.parametrize("with_tolerances", [True, False])
    def test_operands(self, cuda: Emulation, dtype: str, with_slope: bool, with_tolerances: bool) -> None:
        check_error_ratio(cuda, dtype, [0, 1500], with_slope=with_slope, with_tolerances=with_tolerances)

    @pytest.mark.parametrize("bounds", [[0, 5, 5, 700], [0, 3, 40, 41], [0, 4, 8, 1031]])
    def test_segments(self, cuda: Emulation, dtype: str, bounds: list[int]) -> None:
        check_error_ratio(cuda, dtype, bounds)
        check_error_ratio(cuda, dtype, bounds, rows=1)
        check_error_ratio(cuda, dtype, bounds, rows=5)

    @pytest.mark.parametrize("length", [1, 8, 9, 300, 1025])  # a thread, a warp or a block for each row
    @pytest.mark.parametrize("rows", [1, 3, 40])
    def test_rows(self, cuda: Emulation, dtype: str, rows: int, length: int) -> None:
        check_error_ratio(cuda, dtype, [0, length], rows=min(rows, 9000 // length))

    def test_misalignment(self, cuda: Emulation, dtype: str) -> None:
        check_error_ratio(cuda, dtype, [0, 1029], offset=1, with_tolerances=True)
        check_error_ratio(cuda, dtype, [0, 1029], rows=3, offset=1)

    def test_more_blocks_than_partial_sums(self, cuda: Emulation, dtype: str) -> None:
        width = 16 // np.dtype(dtype).itemsize
        check_error_ratio(cuda, dtype, [0, PARTIAL_SUMS * THREADS * width + 5])

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_solution_that_is_not_finite(self, cuda: Emulation, dtype: str, bad: float) -> None:
        zero = cuda.buffer(np.zeros(700, dtype))
        y1 = cuda.buffer(np.zeros(700, dtype))
        y1[699] = bad
        out = cuda.buffer(np.empty(1), is_written=False)
        operands = address_of(zero), 0, 0.0, address_of(zero), address_of(y1), 0.0, 0.0, 0, 0
        cuda.squared_error_ratio(cuda.target(dtype), [0, 700], address_of(out), *operands)
        assert np.isnan(out[0])


@both_dtypes
def test_scalars(cuda: Emulation, dtype: str) -> None:
    values = [0.1 * i for i in range(MAX_TERMS)]
    out = cuda.buffer(np.empty(MAX_TERMS, dtype), is_written=False)
    cuda.write_scalars(cuda.target(dtype), address_of(out), values)
    assert out.tolist() == np.array(values, dtype).tolist()
