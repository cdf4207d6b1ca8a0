"""Stability functions R(z) = P(z) / Q(z) of one-step methods as polynomials, in exact arithmetic.

Source: Hairer & Wanner, Solving ODEs II, IV.3: R(z) = 1 + z w^T (I - zA)^-1 1 with Q(z) = det(I - zA), and stability
on the imaginary axis by the E-polynomial |Q(iy)|^2 - |P(iy)|^2. Polynomials are coefficients, the constant first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest

import numpy as np
from rooted_trees import Row, dot

Polynomial = list[Fraction]


@dataclass(frozen=True)
class StabilityFunction:
    """Numerator and denominator of R, without leading coefficients below the accuracy of the method's coefficients."""

    numerator: Polynomial
    denominator: Polynomial

    @classmethod
    def of(cls, matrix: Sequence[Row], weights: Row, accuracy: Fraction) -> StabilityFunction:
        denominator = _reversed_characteristic_polynomial(matrix)
        series, vector = [Fraction(1)], (Fraction(1),) * len(weights)  # 1 + z w^T 1 + z^2 w^T A 1 + ...
        for _ in weights:
            series.append(dot(weights, vector))
            vector = tuple(dot(row, vector) for row in matrix)
        numerator = [
            sum((q * r for q, r in zip(denominator, series[k::-1], strict=False)), Fraction(0))
            for k in range(len(series))
        ]
        return cls(_trim(numerator, accuracy), _trim(denominator, accuracy))

    @property
    def at_infinity(self) -> float:
        """The limit of R; infinite if R grows."""
        excess = len(self.numerator) - len(self.denominator)
        if excess:
            return float("inf") if excess > 0 else 0.0
        return float(self.numerator[-1] / self.denominator[-1])

    @property
    def poles(self) -> np.ndarray:
        return np.roots([float(q) for q in reversed(self.denominator)])

    def damping(self) -> Polynomial:
        """Coefficients of |Q(iy)|^2 - |P(iy)|^2 in powers of y^2. If none is negative, |R(iy)| <= 1 for every y."""
        squares = zip_longest(_square(self.denominator), _square(self.numerator), fillvalue=Fraction(0))
        return [q - p for q, p in squares]


def _reversed_characteristic_polynomial(matrix: Sequence[Row]) -> Polynomial:
    """det(I - zA), by Newton's identities for the traces of the powers of A."""
    traces, power = [], [tuple(Fraction(i == j) for j in range(len(matrix))) for i in range(len(matrix))]
    for _ in matrix:
        columns = list(zip(*power, strict=True))
        power = [tuple(dot(row, column) for column in columns) for row in matrix]
        traces.append(sum(row[i] for i, row in enumerate(power)))
    coefficients = [Fraction(1)]
    for k in range(1, len(matrix) + 1):
        coefficients.append(-sum(c * p for c, p in zip(reversed(coefficients), traces, strict=False)) / k)
    return coefficients


def _square(polynomial: Polynomial) -> Polynomial:
    """The coefficients of |p(iy)|^2 = p(iy) p(-iy) in powers of y^2."""
    product = [Fraction(0)] * (2 * len(polynomial) - 1)
    for i, x in enumerate(polynomial):
        for j, y in enumerate(polynomial):
            product[i + j] += x * y * (-1) ** j
    return [c * (-1) ** k for k, c in enumerate(product[::2])]


def _trim(polynomial: Polynomial, accuracy: Fraction) -> Polynomial:
    end = max(k for k, c in enumerate(polynomial) if abs(c) > accuracy)
    return polynomial[: end + 1]
