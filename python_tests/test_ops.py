"""The kernels against their specification, reference.py, on every device that has kernels here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from aca_ext import _C, reference
from aca_ext.ops import (
    DifferentiableKernels,
    DifferentiableRowKernels,
    KernelOperations,
    Norm,
    RowKernels,
    RowOperations,
    Tolerance,
    TorchOperations,
    has_kernels,
    operations_for,
    row_operations_for,
)

CHUNK = 4096  # elements that a CPU thread handles at a time
THREADS_FROM = 1 << 15  # elements from which the CPU kernels use threads
PARTIAL_SUMS = 1024  # of one reduction, at most
SIZES = (0, 1, 3, 255, CHUNK + 1, THREADS_FROM + 4321)
MANY_SEGMENTS = 70
VERY_LARGE = PARTIAL_SUMS * CHUNK + 77
NO_CUDA = (
    "the build has no CUDA kernels"
    if not _C.HAS_CUDA
    else "torch.cuda.is_available() is False"
    if not torch.cuda.is_available()
    else None
)

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
on_cuda = pytest.mark.skipif(NO_CUDA is not None, reason=NO_CUDA or "")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=on_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Operands:
    """Random tensors of one layout: dimensions in memory in this ``order``, ``offset`` elements into their storage."""

    def __init__(
        self,
        shape: Sequence[int] | int,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        order: Sequence[int] | None = None,
        offset: int = 0,
        seed: int = 0,
    ) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype, self.device, self.offset = dtype, device, offset
        self.order = tuple(range(len(self.shape)) if order is None else order)
        self.random = torch.Generator().manual_seed(seed)

    def one(self) -> Tensor:
        size = self.offset + math.prod(self.shape)
        storage = torch.randn(size, dtype=self.dtype, generator=self.random).to(self.device)
        in_memory = storage[self.offset :].view([self.shape[d] for d in self.order])
        return in_memory.permute(sorted(range(len(self.order)), key=self.order.__getitem__))

    def many(self, count: int) -> list[Tensor]:
        return [self.one() for _ in range(count)]

    def weights(self, count: int) -> tuple[float, ...]:
        return tuple(torch.randn(count, dtype=torch.float64, generator=self.random).tolist())


def tolerance_of(
    n: int, rtol: float | Tensor = 1e-3, atol: float | Tensor = 1e-5, norm: Norm | None = None
) -> Tolerance:
    return Tolerance(rtol, atol, [0, n], norm)


def kernels(like: Tensor, tolerance: Tolerance | None = None) -> KernelOperations:
    return KernelOperations(like, tolerance or tolerance_of(like.numel()))


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor, ulps: int = 4) -> None:
    """Equal but for rounding, which is proportional to the sum of the terms' magnitudes."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    excess = (actual - expected).abs() - ulps * torch.finfo(actual.dtype).eps * magnitude
    assert bool((excess <= 0).all()), f"beyond rounding by {excess.max().item():.3g}"


def magnitude_of(base: Tensor | None, h: float, x: Sequence[Tensor], w: Sequence[float]) -> Tensor:
    start = None if base is None else base.abs()
    return reference.weighted_sum(start, abs(h), [x_j.abs() for x_j in x], [abs(w_j) for w_j in w])


def check_weighted_sum(operands: Operands, count: int, with_base: bool, h: float = -0.37) -> None:
    base = operands.one() if with_base else None
    x, w = operands.many(count), operands.weights(count)
    result = kernels(x[0]).weighted_sum(base, h, x, w)
    assert result.stride() == x[0].stride()
    assert_near(result, reference.weighted_sum(base, h, x, w), magnitude_of(base, h, x, w))


def check_solution_and_error(operands: Operands, count: int, h: float = 0.61) -> None:
    y, k = operands.one(), operands.many(count)
    b, e = operands.weights(count), operands.weights(count)
    y1, error = kernels(y).solution_and_error(y, h, k, b, e)
    assert y1.stride() == error.stride() == y.stride()
    assert_near(y1, reference.weighted_sum(y, h, k, b), magnitude_of(y, h, k, b))
    assert_near(error, reference.weighted_sum(None, h, k, e), magnitude_of(None, h, k, e))


def check_error_norm(operands: Operands, tolerance: Tolerance, with_slope: bool = True, w: float = 0.2) -> None:
    partial, k, y0, y1 = operands.many(4)
    slope = k if with_slope else None
    norm = kernels(y0, tolerance).error_norm(partial, slope, w, y0, y1)
    specification = TorchOperations(y0, tolerance)
    expected = specification.error_norm(partial, slope, w, y0, y1)
    magnitude = specification.error_norm(partial.abs(), k.abs() if with_slope else None, w, y0, y1)
    assert isinstance(norm, float)
    # Rounding of the ratio enters its square twice.
    assert abs(norm**2 - expected**2) <= 8 * torch.finfo(operands.dtype).eps * magnitude**2


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


class TestAdmit:
    def test_returns_the_right_layout_as_it_is(self, device: str) -> None:
        for operands in (
            Operands((3, 4), device=device),
            Operands((2, 3, 5, 7), device=device, order=(0, 2, 3, 1)),
            Operands((3, 4), device=device, offset=1),
            Operands((), device=device),
        ):
            like, x = operands.many(2)
            assert kernels(like).admit(x) is x

    @pytest.mark.parametrize(
        "unlike",
        [
            lambda x: x[:, :1].expand(3, 4),
            lambda x: x.new_ones(()).expand(3, 4),
            lambda x: x.t().contiguous().t(),
            lambda x: x.repeat(1, 2)[:, ::2],
            lambda x: x.repeat(2, 1)[::2],
            lambda x: torch._neg_view(x),
        ],
        ids=[
            "expanded",
            "expanded 0-d",
            "transposed",
            "columns",
            "rows",
            "negative bit",
        ],
    )
    def test_copies_other_layouts(self, device: str, unlike: Callable[[Tensor], Tensor]) -> None:
        like = Operands((3, 4), device=device).one()
        x = unlike(like)
        admitted = kernels(like).admit(x)
        assert admitted.stride() == like.stride()
        assert not admitted.is_neg()
        assert admitted.data_ptr() != x.data_ptr()
        assert torch.equal(admitted, x)
        doubled = kernels(like).weighted_sum(None, 2.0, [admitted], (1.0,))
        assert torch.equal(doubled, 2 * x)

    def test_keeps_channels_last(self, device: str) -> None:
        like = Operands((2, 3, 5, 7), device=device, order=(0, 2, 3, 1)).one()
        admitted = kernels(like).admit(like.contiguous())
        assert admitted.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(admitted, like)

    def test_is_differentiable(self) -> None:
        like = torch.zeros(3, 4, dtype=torch.float64)
        x = Operands((4, 3)).one().requires_grad_()
        ops = kernels(like)
        assert gradcheck(lambda x: ops.admit(x.t()) ** 2, x)
        assert gradgradcheck(lambda x: ops.admit(x.t()) ** 2, x)
        with torch.no_grad():
            assert not ops.admit(x.t()).requires_grad


class TestDifferentiableKernels:
    @both_dtypes
    @pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
    def test_are_bitwise_the_kernels(self, device: str, dtype: torch.dtype, with_base: bool) -> None:
        operands = Operands((2, 3, 5, 7), dtype, device, order=(0, 2, 3, 1))
        y, k, b, e = operands.one(), operands.many(6), operands.weights(6), operands.weights(6)
        base = y if with_base else None
        plain, ops = kernels(y), DifferentiableKernels(y, tolerance_of(y.numel()))
        expected = (plain.weighted_sum(base, 0.3, k, b), *plain.solution_and_error(y, 0.3, k, b, e))
        for tensor in (y, *k):
            tensor.requires_grad_()
        result = (ops.weighted_sum(base, 0.3, k, b), *ops.solution_and_error(y, 0.3, k, b, e))
        assert [x.requires_grad for x in result] == [True, True, False]
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(result, expected, strict=True))
        with torch.no_grad():
            assert not ops.weighted_sum(base, 0.3, k, b).requires_grad
            assert not ops.solution_and_error(y, 0.3, k, b, e)[0].requires_grad

    @pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
    @pytest.mark.parametrize("count", [3, 18])
    @pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
    def test_gradients_of_weighted_sum(
        self, device: str, check: Callable[..., bool], count: int, with_base: bool
    ) -> None:
        x = [x.requires_grad_() for x in Operands(3, device=device).many(count + 1)]
        w = (0.0, *Operands(3).weights(count - 1))
        ops = DifferentiableKernels(x[0], tolerance_of(3))
        if with_base:
            assert check(lambda base, *x: ops.weighted_sum(base, -0.7, x, w).sin(), tuple(x))
        else:
            assert check(lambda *x: ops.weighted_sum(None, -0.7, x, w).sin(), tuple(x[1:]))

    @pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
    def test_gradients_of_solution_and_error(self, device: str, check: Callable[..., bool]) -> None:
        y, *k = (x.requires_grad_() for x in Operands((2, 2), device=device).many(5))
        b, e = (0.5, 0.0, -1.5, 0.25), (1.0, -1.0, 0.5, 0.0)
        ops = DifferentiableKernels(y, tolerance_of(4))
        assert check(lambda y, *k: ops.solution_and_error(y, 0.3, k, b, e)[0].sin(), (y, *k))

    def test_frozen_operands_receive_nothing(self) -> None:
        base, one, two = Operands(3).many(3)
        two.requires_grad_()
        ops = DifferentiableKernels(base, tolerance_of(3))
        ops.weighted_sum(base, 0.5, [one, two], (1.0, 4.0)).sum().backward()
        assert base.grad is None
        assert one.grad is None
        assert torch.equal(two.grad, torch.full_like(two, 2.0))


class TestChoice:
    def test_kernels_where_there_are_any(self, device: str) -> None:
        like = torch.zeros(3, device=device)
        assert type(operations_for(like, tolerance_of(3))) is KernelOperations
        assert type(operations_for(like, tolerance_of(3), differentiable=True)) is DifferentiableKernels
        assert operations_for(like, tolerance_of(3)).backend == device

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_reference_elsewhere(self, dtype: torch.dtype) -> None:
        like = torch.ones(3, dtype=dtype)
        ops = operations_for(like, tolerance_of(3))
        assert type(ops) is TorchOperations
        assert ops.backend == "reference"
        assert not has_kernels(torch.ones(3, device="meta"))
        assert torch.equal(ops.weighted_sum(like, 0.5, [like], (2.0,)), 2 * like)

    def test_reference_for_subclasses(self) -> None:
        class Wrapped(Tensor):
            pass

        assert not has_kernels(torch.ones(3).as_subclass(Wrapped))
        assert has_kernels(torch.nn.Parameter(torch.ones(3)))

    def test_reference_writes_into_out(self) -> None:
        y, k, out = Operands(5).many(3)
        ops = TorchOperations(y, tolerance_of(5))
        assert ops.weighted_sum(y, 0.5, [k], (2.0,), out) is out
        assert torch.equal(out, y + k)


ROWS = [(1, 1), (3, 2), (5, 7), (7, 64), (2, CHUNK + 5), (3, 2 * THREADS_FROM), (0, 4), (4, 0)]


@both_dtypes
@pytest.mark.parametrize("shape", ROWS, ids=str)
class TestRows:
    """Rows with a step size each: bitwise the same rows one by one, and the specification."""

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
        """Components of a tuple lie side by side in every row; the largest of their norms counts."""
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


class TestExtensionRefuses:
    """Only counts, names and bounds can be checked of a call on raw addresses."""

    X = torch.zeros(8, dtype=torch.float64)

    @staticmethod
    def target(backend: str = "cpu", dtype: str = "float64", threads: int = 1) -> _C.Target:
        return _C.Target(backend, dtype, threads, 0, 0, 0)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"dtype": "float16"},
            {"dtype": ""},
            {"backend": "tpu"},
            {"backend": ""},
            {"threads": 0},
            {"threads": -1},
        ],
        ids=str,
    )
    def test_targets(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"no kernels for dtype|no backend|threads"):
            self.target(**wrong)  # type: ignore[arg-type]

    @pytest.mark.skipif(_C.HAS_CUDA, reason="the build has CUDA kernels")
    def test_a_backend_that_was_not_built(self) -> None:
        with pytest.raises(ValueError, match="cuda"):
            self.target(backend="cuda")

    @pytest.mark.parametrize(("n_x", "n_w"), [(0, 0), (17, 17), (2, 3), (3, 2), (1, 0)])
    def test_weighted_sum_counts(self, n_x: int, n_w: int) -> None:
        out = torch.full((8,), 7.0, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"1 to 16 entries|differ in length"):
            _C.weighted_sum(self.target(), 8, out.data_ptr(), 0, 1.0, [self.X.data_ptr()] * n_x, (1.0,) * n_w)
        assert out.tolist() == [7.0] * 8

    @pytest.mark.parametrize(("n_x", "n_b", "n_e"), [(0, 0, 0), (17, 17, 17), (2, 3, 2), (2, 2, 3), (2, 2, 1)])
    def test_solution_and_error_counts(self, n_x: int, n_b: int, n_e: int) -> None:
        y1, error = torch.zeros(2, 8, dtype=torch.float64)
        x = self.X.data_ptr()
        with pytest.raises(ValueError, match=r"1 to 16 entries|differ in length"):
            _C.solution_and_error(
                self.target(),
                8,
                y1.data_ptr(),
                error.data_ptr(),
                x,
                1.0,
                [x] * n_x,
                (1.0,) * n_b,
                (1.0,) * n_e,
            )

    @pytest.mark.parametrize(
        ("n", "x", "w", "error"),
        [
            (-1, [0], (1.0,), ValueError),
            (0, {0}, (1.0,), TypeError),
            (0, [0], iter([1.0]), TypeError),
            (0, [0], ("one",), TypeError),
            (0, ["address"], (1.0,), TypeError),
            (0, [-8], (1.0,), OverflowError),
            (0.5, [0], (1.0,), TypeError),
        ],
        ids=[
            "negative size",
            "set",
            "iterator",
            "text as weight",
            "text as address",
            "negative address",
            "fraction",
        ],
    )
    def test_operands(self, n: int, x: list[int], w: tuple[float, ...], error: type[Exception]) -> None:
        with pytest.raises(error):
            _C.weighted_sum(self.target(), n, 0, 0, 1.0, x, w)

    @pytest.mark.parametrize(
        "bounds",
        [
            pytest.param([0, 4, 3], id="decreasing"),
            pytest.param((0, 5, 8, 7), id="decreasing at the end"),
            pytest.param([4, 0], id="backward"),
            pytest.param([-1, 4], id="negative"),
            pytest.param([], id="none"),
            pytest.param([0] * 66, id="65 segments"),
        ],
    )
    def test_bounds(self, bounds: Sequence[int]) -> None:
        out = torch.full((70,), 7.0, dtype=torch.float64)
        with pytest.raises(ValueError, match="bounds"):
            self.ratio(bounds, out)
        assert out.tolist() == [7.0] * 70

    @pytest.mark.parametrize(("count", "length"), [(-1, 2), (2, -1)])
    def test_rows(self, count: int, length: int) -> None:
        with pytest.raises(ValueError, match="must not be negative"):
            _C.weighted_sum_rows(_C.Target("cpu", "float64", 1, 0, 0, 0), count, length, 0, 0, 0, [0], (1.0,))

    def test_one_tolerance_per_element_without_the_other(self) -> None:
        out = torch.zeros(1, dtype=torch.float64)
        for each in ((self.X.data_ptr(), 0), (0, self.X.data_ptr())):
            with pytest.raises(ValueError, match="both or neither"):
                self.ratio([0, 8], out, each)

    @pytest.mark.parametrize("count", [0, 17])
    def test_scalar_counts(self, count: int) -> None:
        with pytest.raises(ValueError, match="1 to 16"):
            _C.write_scalars(self.target(), self.X.data_ptr(), [0.0] * count)

    def ratio(self, bounds: Sequence[int], out: Tensor, each: tuple[int, int] = (0, 0)) -> None:
        x = self.X.data_ptr()
        _C.squared_error_ratio(self.target(), bounds, out.data_ptr(), x, 0, 0.0, x, x, 1.0, 1.0, *each)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [3, 16, 32])
@pytest.mark.parametrize("extra", [-1, 1])
def test_weights_of_another_count_are_refused(count: int, extra: int) -> None:
    x = Operands(5).many(count)
    with pytest.raises(ValueError, match=r"differ in length|1 to 16"):
        kernels(x[0]).weighted_sum(None, 1.0, x, (1.0,) * (count + extra))


@st.composite
def layouts(draw: st.DrawFn) -> Operands:
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    return Operands(
        shape,
        draw(st.sampled_from([torch.float32, torch.float64])),
        order=draw(st.permutations(range(len(shape)))),
        offset=draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


any_h = st.floats(-10, 10, allow_subnormal=False).filter(lambda h: h == 0 or abs(h) > 1e-6)


class TestAnyLayout:
    @settings(deadline=None, max_examples=150)
    @given(operands=layouts(), count=st.integers(1, 40), with_base=st.booleans(), h=any_h)
    def test_weighted_sum(self, operands: Operands, count: int, with_base: bool, h: float) -> None:
        check_weighted_sum(operands, count, with_base, h)

    @settings(deadline=None, max_examples=100)
    @given(operands=layouts(), count=st.integers(1, 16), h=any_h)
    def test_solution_and_error(self, operands: Operands, count: int, h: float) -> None:
        check_solution_and_error(operands, count, h)

    @settings(deadline=None, max_examples=100)
    @given(
        operands=layouts(),
        with_slope=st.booleans(),
        each=st.booleans(),
        rtol=st.floats(0, 1),
        atol=st.floats(1e-6, 1),
    )
    def test_error_norm(self, operands: Operands, with_slope: bool, each: bool, rtol: float, atol: float) -> None:
        n = math.prod(operands.shape)
        tolerance_each = operands.one().abs() + 1e-3
        check_error_norm(operands, tolerance_of(n, tolerance_each if each else rtol, atol), with_slope)

    @settings(deadline=None, max_examples=100)
    @given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=140), seed=st.integers(0, 2**32 - 1))
    def test_segments(self, sizes: list[int], seed: int) -> None:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        check_error_norm(Operands(bounds[-1], seed=seed), Tolerance(1e-3, 1e-5, bounds))

    @settings(deadline=None, max_examples=100)
    @given(operands=layouts(), data=st.data())
    def test_admit(self, operands: Operands, data: st.DataObject) -> None:
        other_order = data.draw(st.permutations(range(len(operands.shape))))
        like, x = operands.one(), Operands(operands.shape, operands.dtype, order=other_order).one()
        admitted = kernels(like).admit(x)
        assert admitted.stride() == like.stride()
        assert torch.equal(admitted, x)
        assert (admitted is x) == (x.stride() == like.stride())


@on_cuda
class TestCuda:
    def test_runs_on_the_current_stream(self) -> None:
        x = torch.zeros(1 << 20, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            x.fill_(1.0)
            ops = kernels(x)
            y1, error = ops.solution_and_error(x, 2.0, [x], (1.0,), (3.0,))
            tripled = ops.weighted_sum(x, 2.0, [x], (1.0,))
            norm = ops.error_norm(x, None, 0.0, x, x)
            (scalar,) = ops.scalars([0.25])
        stream.synchronize()
        assert torch.equal(tripled, torch.full_like(x, 3.0))
        assert torch.equal(y1, tripled)
        assert torch.equal(error, torch.full_like(x, 6.0))
        assert norm == pytest.approx(1 / (1e-5 + 1e-3), rel=1e-5)
        assert scalar.item() == 0.25

    def test_neither_synchronises_nor_allocates_so_it_can_be_captured(self) -> None:
        x = torch.zeros(1031, device="cuda")
        out = torch.zeros_like(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kernels(x).weighted_sum(x, 2.0, [x, x], (1.0, 0.5), out)
        x.fill_(1.0)
        graph.replay()
        assert torch.equal(out, torch.full_like(x, 4.0))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
    def test_runs_on_the_device_of_the_tensors(self) -> None:
        with torch.cuda.device(0):
            operands = Operands(1031, torch.float32, "cuda:1")
            check_weighted_sum(operands, 3, True)
            check_solution_and_error(operands, 3)
            check_error_norm(operands, tolerance_of(1031))
            assert torch.cuda.current_device() == 0

    @both_dtypes
    def test_repeats_bitwise_whatever_the_alignment_of_other_calls(self, dtype: torch.dtype) -> None:
        n = VERY_LARGE
        partial, k, y0, y1 = Operands(n, dtype, "cuda").many(4)
        ops = kernels(y0)
        norms = set()
        for _ in range(10):
            norms.add(ops.error_norm(partial, k, 0.3, y0, y1))
            ops.error_norm(partial, None, 0.0, y0, y1)
        assert len(norms) == 1

    def test_a_failure_is_reported_once(self) -> None:
        target = _C.Target("cuda", "float32", 1, torch.cuda.device_count() + 7, 0, 0)
        with pytest.raises(RuntimeError, match="CUDA: cudaSetDevice"):
            _C.weighted_sum(target, 4, 0, 0, 1.0, [0], (1.0,))
        check_weighted_sum(Operands(37, torch.float32, "cuda"), 3, True)
