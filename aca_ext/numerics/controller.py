"""Step-size control on plain numbers: the first step and the next one. Knows neither tensors nor tableaus.

Written with Python's operators alone, so that 0-d tensors pass through it as well as floats: that is how the naive
gradient differentiates the search for the step size.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A float, or where the search itself is differentiated a 0-d float64 tensor.
Number = Any


@dataclass(frozen=True)
class Controller:
    """PID control of the error per step (Söderlind 2003; Hairer, Nørsett & Wanner, Solving ODEs I, II.4).

    With E_n the error ratio of step n and k the order of the error's leading term, an accepted step is followed by one
    larger by safety · E_n^(-(p+i+d)/k) · E_{n-1}^((p+2d)/k) · E_{n-2}^(-d/k), between 1 and ``ifactor`` for the default
    coefficients (i = 1, p = d = 0), and a rejected step by one smaller by safety · E_n^(-1/k), at least ``dfactor``.
    """

    order: int
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    min_step: float = 0.0
    max_step: float = math.inf
    first_step: float | None = None

    @property
    def coefficients(self) -> dict[str, float]:
        """The numbers that ``grow`` and ``shrink`` depend on."""
        return {name: value for name, value in vars(self).items() if name != "first_step"}

    @property
    def has_memory(self) -> bool:
        return self.pcoeff != 0 or self.dcoeff != 0

    def grow(self, h: Number, ratios: list[Number]) -> Number:
        """The step after an accepted one of size ``h``; ``ratios`` belong to the last ones, newest first."""
        p, i, d, k = self.pcoeff, self.icoeff, self.dcoeff, self.order
        exponents = (-(p + i + d) / k, (p + 2 * d) / k, -d / k) if self.has_memory else (-i / k,)
        factor = self.safety
        for ratio, exponent in zip(ratios, exponents, strict=False):
            if exponent == 0:
                continue
            if ratio == 0:
                factor = self.ifactor  # no error at all: nothing to learn from its size
                break
            factor = factor * _power(ratio, exponent)
        # Under I control alone, an error within tolerance is no reason to shrink.
        lowest = self.dfactor if self.has_memory else 1.0
        return self.limit(h * min(self.ifactor, max(lowest, to_single(factor))))

    def shrink(self, h: Number, ratio: Number) -> Number:
        """Size of the next trial after a rejected one of size ``h``, at least ``min_step`` where ``h`` is above it."""
        if not ratio < math.inf:  # NaN or infinite: the size of the error tells nothing
            smaller = h * self.dfactor
        else:
            smaller = h * max(self.dfactor, to_single(self.safety * _power(ratio, -1 / self.order)))
        return self.min_step if smaller < self.min_step < h else smaller

    def limit(self, h: Number) -> Number:
        return max(self.min_step, min(self.max_step, h))

    def initial(
        self,
        length: float,
        norm_y: float,
        norm_f: float,
        change_of_slope: Callable[[float], float],
    ) -> float:
        """The first step for an interval of this ``length``, by Hairer's rule (Solving ODEs I, II.4).

        ``norm_y`` and ``norm_f`` are the norms of y0 and f(t0, y0) over the tolerance; ``change_of_slope(h)`` returns
        that of f(t0+h, y0+h·f0) - f(t0, y0).
        """
        if self.first_step is not None:
            return self.first_step
        if not math.isfinite(norm_f):  # a tolerance of 0 somewhere: only the trial can tell
            return self.limit(min(1e-6, length))
        small = norm_y < 1e-5 or norm_f < 1e-5
        h0 = min(1e-6 if small else 0.01 * norm_y / norm_f, length)
        curvature = change_of_slope(h0) / h0
        if not math.isfinite(curvature):
            return self.limit(h0)  # the Euler step left the domain: start small and let the trial decide
        largest = max(norm_f, curvature)
        h1 = max(1e-6, h0 * 1e-3) if largest <= 1e-15 else to_single(_power(0.01 / largest, 1 / self.order))
        return self.limit(min(100 * h0, h1, length))


def to_single(x: Number) -> Number:
    """``x`` rounded to single precision; the derivative of a tensor passes unrounded.

    Powers differ in their last bits from one mathematical library to the next. Rounded like this they agree, and a
    solve takes the same steps on every machine and on a GPU.
    """
    if isinstance(x, float):
        return ctypes.c_float(x).value
    near = x.item()
    return x + (ctypes.c_float(near).value - near)


def _power(base: Number, exponent: float) -> Number:
    try:
        return base**exponent
    except OverflowError:  # an error of 1e-320, say: limited like any other
        return math.inf
