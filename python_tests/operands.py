"""Operands of the kernels, and the checks of a kernel against its specification."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from aca_ext import _C
from aca_ext.kernels import reference
from aca_ext.kernels.fused import KernelOperations, Norm, Tolerance, TorchOperations

CHUNK = 4096  # elements that a CPU thread handles at a time
THREADS_FROM = 1 << 15  # elements from which the CPU kernels use threads
PARTIAL_SUMS = 512  # of one reduction, at most
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


class Operands:
    """Random tensors of one layout: ``order`` of the dimensions in memory, ``offset`` elements into the storage."""

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
    """Asserts equality up to rounding, which is proportional to the sum of the terms' magnitudes."""
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
    # The rounding of a ratio counts twice in its square. Compilers differ in which products they round.
    roundings = 16
    assert abs(norm**2 - expected**2) <= roundings * torch.finfo(operands.dtype).eps * magnitude**2
