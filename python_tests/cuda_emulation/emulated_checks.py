"""Checks of the emulated kernels against numpy, on operands in checked memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from emulation import DTYPES, Emulation, address_of
from numpy.typing import NDArray

Array = NDArray[Any]


class Operands:
    """Random operands of one dtype and size, in memory that starts ``offset`` elements after an aligned address."""

    def __init__(self, cuda: Emulation, dtype: str, n: int, offset: int = 0) -> None:
        self.cuda, self.dtype, self.n, self.offset = cuda, DTYPES[dtype], n, offset
        self.on = cuda.target(dtype)
        self.random = np.random.default_rng(n)

    def one(self) -> Array:
        return self.cuda.buffer(self.random.standard_normal(self.n).astype(self.dtype), self.offset)

    def many(self, count: int) -> list[Array]:
        return [self.one() for _ in range(count)]

    def weights(self, count: int) -> Any:
        return self.random.standard_normal(count).tolist()

    def output(self) -> Array:
        return self.cuda.buffer(np.empty(self.n, self.dtype), self.offset, is_written=False)

    def steps(self, count: int) -> Array:
        return self.cuda.buffer(self.random.uniform(0.1, 1.0, count))

    def assert_near(self, found: Array, terms: Sequence[Array]) -> None:
        """Asserts that ``found`` is the sum of the terms up to rounding."""
        expected, magnitude = sum(terms), sum(map(np.abs, terms))
        assert self.cuda.findings() == []
        eps = np.finfo(self.dtype).eps
        assert np.all(np.abs(found - expected) <= 2 * len(terms) * eps * magnitude)


def check_weighted_sum(cuda: Emulation, dtype: str, n: int, count: int, *, with_base: bool, offset: int = 0) -> None:
    on = Operands(cuda, dtype, n, offset)
    x, w, h, base, out = on.many(count), on.weights(count), -0.37, on.one() if with_base else None, on.output()
    cuda.weighted_sum(on.on, n, address_of(out), address_of(base), h, [*map(address_of, x)], w)
    on.assert_near(out, _terms(base, h, x, w))


def check_solution_and_error(cuda: Emulation, dtype: str, n: int, count: int, offset: int = 0) -> None:
    on = Operands(cuda, dtype, n, offset)
    y, k, b, e, h = on.one(), on.many(count), on.weights(count), on.weights(count), 0.61
    y1, error = on.output(), on.output()
    slopes = [*map(address_of, k)]
    cuda.solution_and_error(on.on, n, address_of(y1), address_of(error), address_of(y), h, slopes, b, e)
    on.assert_near(y1, _terms(y, h, k, b))
    on.assert_near(error, _terms(None, h, k, e))


def check_rows(cuda: Emulation, dtype: str, rows: int, length: int, count: int, offset: int = 0) -> None:
    """Checks both sums with a step size for each row."""
    on = Operands(cuda, dtype, rows * length, offset)
    y, k, b, e, h = on.one(), on.many(count), on.weights(count), on.weights(count), on.steps(rows)
    each = np.repeat(h.astype(on.dtype), length)
    out, y1, error = on.output(), on.output(), on.output()
    slopes = [*map(address_of, k)]
    cuda.weighted_sum_rows(on.on, rows, length, address_of(h), address_of(out), address_of(y), slopes, b)
    on.assert_near(out, _terms(y, each, k, b))
    outputs = address_of(y1), address_of(error)
    cuda.solution_and_error_rows(on.on, rows, length, address_of(h), *outputs, address_of(y), slopes, b, e)
    on.assert_near(y1, _terms(y, each, k, b))
    on.assert_near(error, _terms(None, each, k, e))


def check_error_ratio(
    cuda: Emulation,
    dtype: str,
    bounds: Sequence[int],
    *,
    rows: int | None = None,
    with_slope: bool = True,
    with_tolerances: bool = False,
    offset: int = 0,
) -> None:
    """Checks the sums of squared error ratios over segments; twice, as they must repeat bit for bit.

    With ``rows``, each row has a weight of its own for its slope.
    """
    n, count = bounds[-1], len(bounds) - 1
    on = Operands(cuda, dtype, n * (rows or 1), offset)
    partial, k, y0, y1 = on.many(4)
    if not with_slope:
        k[:] = 0
    rtol, atol = (on.one(), on.one()) if with_tolerances else (None, None)
    if rtol is not None and atol is not None:
        rtol[:], atol[:] = np.abs(rtol) + 0.1, np.abs(atol) + 0.1
    w = on.steps(rows or 1)
    operands = address_of(partial), address_of(k) if with_slope else 0
    others = address_of(y0), address_of(y1), 1e-3, 1e-2, address_of(rtol), address_of(atol)
    found = []
    for _ in range(2):
        out = cuda.buffer(np.empty((rows or 1, count)), is_written=False)
        if rows is None:
            cuda.squared_error_ratio(on.on, bounds, address_of(out), *operands, float(w[0]), *others)
        else:
            cuda.squared_error_ratio_rows(on.on, rows, bounds, address_of(w), address_of(out), *operands, *others)
        assert cuda.findings() == []
        found.append(out.copy())
    assert np.array_equal(found[0], found[1])
    slopes = np.repeat(w.astype(on.dtype), n) * k
    scale = (1e-2 if atol is None else atol) + (1e-3 if rtol is None else rtol) * np.maximum(np.abs(y0), np.abs(y1))
    squares = _by_segment(((partial + slopes) / scale).astype(np.float64) ** 2, rows or 1, bounds)
    sizes = _by_segment(((np.abs(partial) + np.abs(slopes)) / scale).astype(np.float64) ** 2, rows or 1, bounds)
    assert np.all(np.abs(found[0] - squares) <= 16 * np.finfo(on.dtype).eps * sizes)


def _terms(base: Array | None, h: Any, x: Sequence[Array], w: Sequence[float]) -> list[Array]:
    terms = [(h * np.float64(w_j)) * x_j.astype(np.float64) for x_j, w_j in zip(x, w, strict=True)]
    return terms if base is None else [base.astype(np.float64), *terms]


def _by_segment(values: Array, rows: int, bounds: Sequence[int]) -> Array:
    of_rows = values.reshape(rows, bounds[-1])
    return np.stack([of_rows[:, lo:hi].sum(1) for lo, hi in pairwise(bounds)], 1)
