"""The kernels against their specification, reference.py, on every device for which this build has kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from operands import (
    CHUNK,
    THREADS_FROM,
    VERY_LARGE,
    Operands,
    assert_near,
    both_dtypes,
    check_error_norm,
    check_solution_and_error,
    check_weighted_sum,
    kernels,
    magnitude_of,
    tolerance_of,
)
from torch import Tensor

from aca_ext.kernels import reference
from aca_ext.kernels.fused import Tolerance, TorchOperations

SIZES = (0, 1, 3, 255, CHUNK + 1, THREADS_FROM + 4321)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@both_dtypes
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
class TestWeightedSum:
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, device: str, dtype: torch.dtype, with_base: bool, size: int) -> None:
        check_weighted_sum(Operands(size, dtype, device), 3, with_base)

    @pytest.mark.parametrize("count", [*range(1, 17), 17, 32, 33, 50])
    def test_operand_counts(self, device: str, dtype: torch.dtype, with_base: bool, count: int) -> None:
        check_weighted_sum(Operands(67, dtype, device), count, with_base)

    @pytest.mark.parametrize("offset", [1, 2, 3])
    def test_misaligned(self, device: str, dtype: torch.dtype, with_base: bool, offset: int) -> None:
        check_weighted_sum(Operands(1031, dtype, device, offset=offset), 5, with_base)

    def test_one_misaligned_operand(self, device: str, dtype: torch.dtype, with_base: bool) -> None:
        aligned, misaligned = Operands(1031, dtype, device), Operands(1031, dtype, device, offset=1)
        base = aligned.one() if with_base else None
        x, w = [*aligned.many(2), misaligned.one()], (0.3, -0.7, 1.1)
        assert [x_j.data_ptr() % 16 != 0 for x_j in x] == [False, False, True]
        result = kernels(x[0]).weighted_sum(base, 0.5, x, w)
        assert_near(result, reference.weighted_sum(base, 0.5, x, w), magnitude_of(base, 0.5, x, w))

    @pytest.mark.parametrize("shape", [(), (0, 3), (1, 1), (5, 0, 2)], ids=str)
    def test_shapes_at_the_edge(self, device: str, dtype: torch.dtype, with_base: bool, shape: tuple[int, ...]) -> None:
        check_weighted_sum(Operands(shape, dtype, device), 4, with_base)

    def test_channels_last(self, device: str, dtype: torch.dtype, with_base: bool) -> None:
        operands = Operands((2, 3, 5, 7), dtype, device, order=(0, 2, 3, 1))
        assert operands.one().is_contiguous(memory_format=torch.channels_last)
        check_weighted_sum(operands, 6, with_base)

    def test_writes_into_out_and_nowhere_else(self, device: str, dtype: torch.dtype, with_base: bool) -> None:
        n = CHUNK + 3
        operands = Operands(n, dtype, device)
        base = operands.one() if with_base else None
        x, w = operands.many(2), (0.5, 2.0)
        before = [x_j.clone() for x_j in x]
        storage = torch.full((n + 16,), 7.0, dtype=dtype, device=device)
        out = storage[8 : 8 + n]
        assert kernels(out).weighted_sum(base, 0.1, x, w, out) is out
        assert torch.equal(out, kernels(out).weighted_sum(base, 0.1, x, w))
        assert torch.equal(storage[:8], torch.full_like(storage[:8], 7.0))
        assert torch.equal(storage[8 + n :], torch.full_like(storage[:8], 7.0))
        assert all(torch.equal(x_j, before_j) for x_j, before_j in zip(x, before, strict=True))

    def test_more_operands_than_one_launch_takes_into_out(
        self, device: str, dtype: torch.dtype, with_base: bool
    ) -> None:
        operands = Operands(99, dtype, device)
        base, x, w = operands.one() if with_base else None, operands.many(35), operands.weights(35)
        out = torch.full_like(x[0], math.nan)
        assert kernels(out).weighted_sum(base, 0.1, x, w, out) is out
        assert_near(out, reference.weighted_sum(base, 0.1, x, w), magnitude_of(base, 0.1, x, w))


@both_dtypes
class TestSolutionAndError:
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, device: str, dtype: torch.dtype, size: int) -> None:
        check_solution_and_error(Operands(size, dtype, device), 6)

    @pytest.mark.parametrize("count", range(1, 17))
    def test_operand_counts(self, device: str, dtype: torch.dtype, count: int) -> None:
        check_solution_and_error(Operands(67, dtype, device), count)

    @pytest.mark.parametrize("offset", [1, 2, 3])
    def test_misaligned(self, device: str, dtype: torch.dtype, offset: int) -> None:
        check_solution_and_error(Operands(1031, dtype, device, offset=offset), 6)

    @pytest.mark.parametrize("shape", [(), (0, 3), (1, 1)], ids=str)
    def test_shapes_at_the_edge(self, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        check_solution_and_error(Operands(shape, dtype, device), 4)

    def test_channels_last(self, device: str, dtype: torch.dtype) -> None:
        check_solution_and_error(Operands((2, 3, 5, 7), dtype, device, order=(0, 2, 3, 1)), 6)

    def test_is_bitwise_the_weighted_sum(self, device: str, dtype: torch.dtype) -> None:
        operands = Operands(1031, dtype, device)
        y, k, b, e = operands.one(), operands.many(6), operands.weights(6), operands.weights(6)
        ops = kernels(y)
        y1, error = ops.solution_and_error(y, 0.3, k, b, e)
        assert torch.equal(y1, ops.weighted_sum(y, 0.3, k, b))
        assert torch.equal(error, ops.weighted_sum(None, 0.3, k, e))

    def test_writes_the_solution_into_out(self, device: str, dtype: torch.dtype) -> None:
        operands = Operands(37, dtype, device)
        y, k, out = operands.one(), operands.many(2), operands.one()
        y1, _ = kernels(y).solution_and_error(y, 0.3, k, (0.5, 0.5), (1.0, -1.0), out)
        assert y1 is out
        assert_near(out, reference.weighted_sum(y, 0.3, k, (0.5, 0.5)), magnitude_of(y, 0.3, k, (0.5, 0.5)))


@both_dtypes
class TestErrorNorm:
    @pytest.mark.parametrize("with_slope", [True, False], ids=["slope", "no slope"])
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, device: str, dtype: torch.dtype, size: int, with_slope: bool) -> None:
        check_error_norm(Operands(size, dtype, device), tolerance_of(size), with_slope)

    @pytest.mark.parametrize("offset", [1, 2, 3])
    def test_misaligned(self, device: str, dtype: torch.dtype, offset: int) -> None:
        check_error_norm(Operands(1031, dtype, device, offset=offset), tolerance_of(1031))

    @pytest.mark.parametrize("shape", [(), (0, 3), (1, 1)], ids=str)
    def test_shapes_at_the_edge(self, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        check_error_norm(Operands(shape, dtype, device), tolerance_of(math.prod(shape)))

    @pytest.mark.parametrize("which", ["rtol", "atol", "both"])
    def test_tensor_tolerances(self, device: str, dtype: torch.dtype, which: str) -> None:
        operands = Operands((3, 4, 5, 7), dtype, device, order=(0, 2, 3, 1))
        each = operands.one().abs().contiguous().add(1e-4)
        rtol = each if which != "atol" else 1e-3
        atol = each[:1, :, :1].expand(3, 4, 5, 7) if which != "rtol" else 1e-5
        check_error_norm(operands, tolerance_of(math.prod(operands.shape), rtol, atol))

    @pytest.mark.parametrize(
        "sizes",
        [[5, 0, 7, 1], [0, 3], [3, 0], [0], [CHUNK, 1, CHUNK + 1], [1] * 64, [2] * 65, [1, 0, 3] * 50],
        ids=["some", "first empty", "last empty", "all empty", "chunks", "64", "65", "150"],
    )
    def test_segments(self, device: str, dtype: torch.dtype, sizes: list[int]) -> None:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        check_error_norm(Operands(bounds[-1], dtype, device), Tolerance(1e-3, 1e-5, bounds))

    @pytest.mark.parametrize("worst", [0, 1, 63, 64, 65])
    def test_takes_the_largest_segment(self, device: str, dtype: torch.dtype, worst: int) -> None:
        bounds = list(range(0, 2 * 66 + 1, 2))
        error = torch.full((bounds[-1],), 0.1, dtype=dtype, device=device)
        error[2 * worst] = 1.0
        zero = torch.zeros_like(error)
        norm = kernels(error, Tolerance(0.0, 1.0, bounds)).error_norm(error, None, 0.0, zero, zero)
        assert norm == pytest.approx(math.sqrt((1.0 + 0.01) / 2), rel=1e-6)

    def test_by_hand(self, device: str, dtype: torch.dtype) -> None:
        partial, k, y0, y1 = (
            torch.tensor(v, dtype=dtype, device=device) for v in ([1.0, 2.0], [2.0, -4.0], [-1.0, 0.0], [0.5, 3.0])
        )
        norm = kernels(y0, tolerance_of(2, rtol=1.0, atol=1.0)).error_norm(partial, k, 0.5, y0, y1)
        assert norm == math.sqrt((1.0**2 + 0.0**2) / 2)
        norm = kernels(y0, tolerance_of(2, rtol=1.0, atol=1.0)).error_norm(partial, None, 0.0, y0, y1)
        assert norm == math.sqrt((0.5**2 + 0.5**2) / 2)

    def test_no_error_counts_nothing_even_without_tolerance(self, device: str, dtype: torch.dtype) -> None:
        zero = torch.zeros(5, dtype=dtype, device=device)
        for tolerance in (tolerance_of(5, 1e-3, 0.0), tolerance_of(5, zero + 1e-3, zero)):
            assert kernels(zero, tolerance).error_norm(zero, zero, 1.0, zero, zero) == 0.0
            partial = zero.clone()
            partial[3] = 1e-9
            assert kernels(zero, tolerance).error_norm(partial, zero, 1.0, zero, zero) == math.inf

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, THREADS_FROM + 4320])
    @pytest.mark.parametrize("segments", [1, 2, 70])
    def test_a_solution_that_is_not_finite_is_never_accepted(
        self, device: str, dtype: torch.dtype, value: float, place: int, segments: int
    ) -> None:
        n = THREADS_FROM + 4321
        bounds = [n * s // segments for s in range(segments + 1)]
        y0, error = torch.ones(n, dtype=dtype, device=device), torch.zeros(n, dtype=dtype, device=device)
        y1 = y0.clone()
        y1[place] = value
        tolerance = Tolerance(1e-3, 1e-5, bounds)
        assert math.isnan(kernels(y0, tolerance).error_norm(error, None, 0.0, y0, y1))
        assert math.isnan(TorchOperations(y0, tolerance).error_norm(error, None, 0.0, y0, y1))
        assert math.isnan(kernels(y0, tolerance).error_norm(error, error, 1.0, y0, y1))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("operand", ["partial", "k", "y0"])
    @pytest.mark.parametrize("place", [0, 4, 8])
    def test_operands_that_are_not_finite_are_never_accepted(
        self, device: str, dtype: torch.dtype, value: float, operand: str, place: int
    ) -> None:
        operands = {name: torch.ones(9, dtype=dtype, device=device) for name in ("partial", "k", "y0", "y1")}
        operands[operand][place] = value
        if operand == "y0":
            operands["y1"] += operands["y0"]
        partial, k, y0, y1 = operands.values()
        for tolerance in (tolerance_of(9, 1e3, 1e3), Tolerance(1e3, 1e3, [0, 4, 5, 9])):
            norm = kernels(y0, tolerance).error_norm(partial, k, 1e-3, y0, y1)
            assert not norm <= 1
            assert not TorchOperations(y0, tolerance).error_norm(partial, k, 1e-3, y0, y1) <= 1
            assert math.isnan(norm) or not math.isnan(value)

    def test_own_norm(self, device: str, dtype: torch.dtype) -> None:
        partial, k, y0, y1 = Operands((3, 5), dtype, device).many(4)
        norm = kernels(y0, tolerance_of(15, norm=lambda ratio: ratio.abs().max())).error_norm(partial, k, 0.5, y0, y1)
        expected = ((partial + 0.5 * k) / (1e-5 + 1e-3 * torch.maximum(y0.abs(), y1.abs()))).abs().max().item()
        assert isinstance(norm, float)
        assert norm == pytest.approx(expected, rel=1e-6)

    def test_repeats_bitwise(self, device: str, dtype: torch.dtype) -> None:
        n = THREADS_FROM + 4321
        partial, k, y0, y1 = Operands(n, dtype, device).many(4)
        ops = kernels(y0)
        assert len({ops.error_norm(partial, k, 0.5, y0, y1) for _ in range(5)}) == 1


@both_dtypes
class TestVeryLarge:
    def test_sums(self, device: str, dtype: torch.dtype) -> None:
        check_weighted_sum(Operands(VERY_LARGE, dtype, device), 1, True)

    def test_norm(self, device: str, dtype: torch.dtype) -> None:
        check_error_norm(Operands(VERY_LARGE, dtype, device), tolerance_of(VERY_LARGE), with_slope=False)

    def test_norm_counts_every_element_once(self, device: str, dtype: torch.dtype) -> None:
        one = torch.ones(VERY_LARGE, dtype=dtype, device=device)
        zero = torch.zeros_like(one)
        assert kernels(one, tolerance_of(VERY_LARGE, 0.0, 1.0)).error_norm(one, None, 0.0, zero, zero) == 1.0


class TestScalars:
    @both_dtypes
    @pytest.mark.parametrize("count", [1, 7, 16])
    def test_are_0d_tensors_like_the_state(self, device: str, dtype: torch.dtype, count: int) -> None:
        like = torch.zeros(3, dtype=dtype, device=device)
        values = [0.1 + i for i in range(count)]
        scalars = kernels(like).scalars(values)
        assert [s.item() for s in scalars] == torch.tensor(values, dtype=dtype).tolist()
        assert all(s.shape == () and s.dtype == dtype and s.device == like.device for s in scalars)

    def test_of_the_reference_keep_their_graph(self) -> None:
        t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        one, two = TorchOperations(torch.zeros(3), tolerance_of(3)).scalars([t, 2.0])
        assert one.requires_grad
        assert (one.dtype, one.item(), two.item()) == (torch.float32, torch.tensor(0.3).item(), 2.0)


@both_dtypes
class TestThreads:
    COUNTS = (1, 2, 3, 5)

    @pytest.mark.parametrize("size", [THREADS_FROM - 1, THREADS_FROM, THREADS_FROM + 4321, 11 * CHUNK])
    def test_sums_are_bitwise_equal(self, dtype: torch.dtype, size: int, set_threads: Callable[[int], None]) -> None:
        operands = Operands(size, dtype)
        y, k, b, e = operands.one(), operands.many(6), operands.weights(6), operands.weights(6)
        results: list[tuple[Tensor, ...]] = []
        for threads in self.COUNTS:
            set_threads(threads)
            ops = kernels(y)
            results.append((ops.weighted_sum(y, 0.3, k, b), *ops.solution_and_error(y, 0.3, k, b, e)))
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))

    @pytest.mark.parametrize("size", [THREADS_FROM, THREADS_FROM + 4321, VERY_LARGE])
    def test_norms_are_bitwise_equal(self, dtype: torch.dtype, size: int, set_threads: Callable[[int], None]) -> None:
        partial, k, y0, y1 = Operands(size, dtype).many(4)
        norms: set[float] = set()
        for threads in self.COUNTS:
            set_threads(threads)
            norms.add(kernels(y0).error_norm(partial, k, 0.3, y0, y1))
        assert len(norms) == 1

    def test_norms_of_segments_are_bitwise_equal(self, dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
        n = 5 * THREADS_FROM
        partial, k, y0, y1 = Operands(n, dtype).many(4)
        norms: set[float] = set()
        for threads in self.COUNTS:
            set_threads(threads)
            tolerance = Tolerance(y0.abs() + 1e-3, 1e-5, [0, 3, THREADS_FROM + 1, n])
            norms.add(kernels(y0, tolerance).error_norm(partial, k, 0.3, y0, y1))
        assert len(norms) == 1
