"""The methods of Adams: linear multistep formulas for equal steps, computed as exact rationals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from aca_ext.numerics.tableau import Tableau

MIN_ORDER, MAX_ORDER = 4, 12
DEFAULT_MAX_ITERS = 4
_SOURCE = "Adams (1855); Bashforth (1883); Moulton (1926); Hairer, Norsett & Wanner, Solving ODEs I, III.1"


@dataclass(frozen=True, eq=False, repr=False)  # compared and hashed by identity, as every tableau
class Adams(Tableau):
    """A method of Adams; with f_n = f(t_n, y_n) and equal steps of size h,

        predictor  y* = y_n + h·Σ_j bashforth_j·f_{n-j}
        corrector  y_{n+1} = y_n + h·(moulton_0·f(t_{n+1}, y*) + Σ_j moulton_{j+1}·f_{n-j})

    The explicit method ends with the predictor. The implicit one repeats the corrector, with its result as the next y*,
    until that no longer changes.

    As a tableau it describes the step to the rest of the package: its "slopes" are f_n, (y_{n+1} - y_n) / h, and
    f_{n+1} if cubic interpolation needs it. ``solver/adams.py`` computes them; no Runge-Kutta step may.

    Attributes:
        implicit: True if the corrector follows the predictor.
        max_order: highest order of a formula, counting the corrector's; at most ``max_order`` - 1 slopes f_{n-j}.
        max_iters: largest number of evaluations of the corrector.
    """

    implicit: bool = False
    max_order: int = MAX_ORDER
    max_iters: int = DEFAULT_MAX_ITERS

    def with_limits(self, max_order: int, max_iters: int) -> Adams:
        """The method with other limits; its order is that of the whole solve, which its first steps bound."""
        order = min(max_order, 5) if self.implicit else min(max_order - 1, 4)
        return replace(self, order=order, max_order=max_order, max_iters=max_iters)


def _adams(name: str, implicit: bool) -> Adams:
    zero, one = Fraction(0), Fraction(1)
    method = Adams(name=name, order=1, c=(zero, one), a=((), (one,)), b=(zero, one), source=_SOURCE, implicit=implicit)
    return method.with_limits(MAX_ORDER, DEFAULT_MAX_ITERS)


EXPLICIT_ADAMS, IMPLICIT_ADAMS = _adams("explicit_adams", False), _adams("implicit_adams", True)


@lru_cache
def bashforth(n_slopes: int) -> tuple[Fraction, ...]:
    """Weights of f_n, f_{n-1}, ... in the predictor: integrals over the step of the polynomial through them."""
    return _weights(tuple(-j for j in range(n_slopes)))


@lru_cache
def moulton(n_slopes: int) -> tuple[Fraction, ...]:
    """Weights of f_{n+1}, f_n, f_{n-1}, ... in the corrector, of which ``n_slopes`` are known before."""
    return _weights(tuple(1 - j for j in range(n_slopes + 1)))


def _weights(nodes: tuple[int, ...]) -> tuple[Fraction, ...]:
    """The integral over [0, 1] of each Lagrange polynomial of the nodes."""
    found = []
    for node in nodes:
        polynomial = [Fraction(1)]  # coefficients, lowest power first
        for other in nodes:
            if other != node:
                shifted = [Fraction(0), *polynomial]
                scaled = [*(other * c for c in polynomial), Fraction(0)]
                polynomial = [(a - b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        found.append(sum((c / (power + 1) for power, c in enumerate(polynomial)), Fraction(0)))
    return tuple(found)
