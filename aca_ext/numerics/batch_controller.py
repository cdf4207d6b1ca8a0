"""Step-size control of many samples at once, each bit for bit as ``aca_ext.numerics.controller`` does it for one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from aca_ext.numerics.controller import Controller

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class RowController:
    """The decisions of a ``Controller`` on arrays with an entry for each sample."""

    def __init__(self, controller: Controller, count: int) -> None:
        self._one = controller
        # Ratios of the accepted steps before the last; 1 is the ratio that leaves a step as it is.
        self._before = np.ones((2, count))

    def grow(self, h: Array, ratio: Array, accepted: Mask) -> Array:
        """The steps after accepted ones of size ``h``; the other entries mean nothing."""
        one = self._one
        p, i, d, k = one.pcoeff, one.icoeff, one.dcoeff, one.order
        factor = np.full(len(h), one.safety)
        is_open = np.ones(len(h), dtype=np.bool_)
        exponents = (-(p + i + d) / k, (p + 2 * d) / k, -d / k)
        for past, exponent in zip((ratio, *self._before), exponents, strict=True):
            if exponent == 0:
                continue
            factor[is_open & (past == 0)] = one.ifactor
            is_open &= past != 0
            factor[is_open] *= power(past[is_open], exponent)
        lowest = one.dfactor if one.has_memory else 1.0
        self._before = np.where(accepted, np.stack([ratio, self._before[0]]), self._before)
        return self._limit(h * np.minimum(one.ifactor, np.maximum(lowest, to_single(factor))))

    def shrink(self, h: Array, ratio: Array, rejected: Mask) -> Array:
        """The next trials after rejected ones of size ``h``; the other entries mean nothing."""
        one = self._one
        factor = np.full(len(h), one.dfactor)
        known = rejected & (ratio < np.inf)
        factor[known] = np.maximum(one.dfactor, to_single(one.safety * power(ratio[known], -1 / one.order)))
        smaller = h * factor
        return np.where((smaller < one.min_step) & (one.min_step < h), one.min_step, smaller)

    def initial(self, length: Array, norm_y: Array, norm_f: Array, change_of_slope: Callable[[Array], Array]) -> Array:
        """The first steps by Hairer's rule; arguments as for one sample."""
        one = self._one
        with np.errstate(all="ignore"):
            finite = np.isfinite(norm_f)
            small = (norm_y < 1e-5) | (norm_f < 1e-5)
            h0 = np.minimum(np.where(small | ~finite, 1e-6, 0.01 * norm_y / norm_f), length)
            curvature = change_of_slope(h0) / h0
            largest = np.maximum(norm_f, curvature)
            usable = finite & np.isfinite(curvature)
            flat = largest <= 1e-15
            h1 = np.maximum(1e-6, h0 * 1e-3)
            curved = usable & ~flat
            h1[curved] = to_single(power(0.01 / largest[curved], 1 / one.order))
            return self._limit(np.where(usable, np.minimum(np.minimum(100 * h0, h1), length), h0))

    def _limit(self, h: Array) -> Array:
        return np.maximum(self._one.min_step, np.minimum(self._one.max_step, h))


def to_single(x: Array) -> Array:
    """Rounded to single precision, as for one sample."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(np.float64)


def power(base: Array, exponent: float) -> Array:
    """By the same library as for one sample: numpy's own power rounds otherwise in the last place."""

    def one(x: float) -> float:
        try:
            return x**exponent
        except OverflowError:  # an error of 1e-243, say: limited like any other
            return math.inf

    return np.array([one(x) for x in base.tolist()], dtype=np.float64)
