"""Step-size control on plain numbers: the first step and the next one. Knows neither tensors nor tableaus.

It uses only Python's operators, so that it accepts floats and 0-d tensors. With tensors, the naive gradient
differentiates the choice of the step size. The C++ counterpart is csrc/control/controller.h.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A float, or a 0-d float64 tensor if the choice of the step size is differentiated.
Number = Any


@dataclass(frozen=True)
class Controller:
    """PID control of the error per step (Söderlind, ACM Trans. Math. Softw. 29, 2003; Hairer, Nørsett & Wanner, II.4).

    E_n is the error ratio of accepted step n, k is ``order``. After an accepted step, the next size is h times
    safety · E_n^(-(p+i+d)/k) · E_{n-1}^((p+2d)/k) · E_{n-2}^(-d/k). This factor is at most ``ifactor``, and at least 1
    for p = d = 0 (the default), else at least ``dfactor``. After a rejected step, the factor is safety · E_n^(-1/k), at
    least ``dfactor``.

    Attributes:
        order: order of the error's leading term.
        safety: factor of at most 1 that makes the next step likely to be accepted.
        ifactor, dfactor: largest and smallest ratio of a step size to the one before it.
        pcoeff, icoeff, dcoeff: the coefficients p, i and d.
        min_step, max_step: bounds on the step size, in the unit of t.
        first_step: first step size; None for Hairer's rule.
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
        """The arguments of the C++ controller: every attribute except ``first_step``."""
        return {name: value for name, value in vars(self).items() if name != "first_step"}

    @property
    def has_memory(self) -> bool:
        return self.pcoeff != 0 or self.dcoeff != 0

    def grow(self, h: Number, ratios: list[Number]) -> Number:
        """Size of the step after an accepted one of size ``h``; ``ratios`` of the last accepted steps, newest first."""
        p, i, d, k = self.pcoeff, self.icoeff, self.dcoeff, self.order
        exponents = (-(p + i + d) / k, (p + 2 * d) / k, -d / k) if self.has_memory else (-i / k,)
        factor = self.safety
        for ratio, exponent in zip(ratios, exponents, strict=False):
            if exponent == 0:
                continue
            if ratio == 0:
                factor = self.ifactor  # no error: grow as much as is allowed
                break
            factor = factor * _power(ratio, exponent)
        # With I control alone, an accepted step never shrinks the next one: its error was within tolerance.
        lowest = self.dfactor if self.has_memory else 1.0
        return self.limit(h * min(self.ifactor, max(lowest, to_single(factor))))

    def shrink(self, h: Number, ratio: Number) -> Number:
        """Size of the trial after a rejected one of size ``h``; not below ``min_step`` if ``h`` is above it."""
        if not ratio < math.inf:  # NaN or infinite: the ratio says nothing about the right size
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
        """First step for an interval of this ``length``, by Hairer's rule (Solving ODEs I, II.4).

        Args:
            norm_y, norm_f: norms of y0 and f(t0, y0) in units of the tolerance.
            change_of_slope: h -> norm of f(t0+h, y0+h·f0) - f(t0, y0) in units of the tolerance.
        """
        if self.first_step is not None:
            return self.first_step
        if not math.isfinite(norm_f):  # an element has tolerance 0: start small and let the trial decide
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
    """``x`` rounded to single precision; the derivative of a tensor is that of the identity.

    Mathematical libraries disagree in the last bits of a power. After this rounding they agree, so a solve takes the
    same steps on every machine and on a GPU.
    """
    if isinstance(x, float):
        return ctypes.c_float(x).value
    near = x.item()
    return x + (ctypes.c_float(near).value - near)


def _power(base: Number, exponent: float) -> Number:
    try:
        return base**exponent
    except OverflowError:  # for example an error of 1e-320; the caller limits the factor
        return math.inf
