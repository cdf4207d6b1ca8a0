"""Weights with which a one-step method combines its stages, shared by explicit, implicit and Rosenbrock methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, TypeVar

Row = tuple[Fraction, ...]
WeightsType = TypeVar("WeightsType", bound="Weights")


def row_sum(row: Row) -> Fraction:
    return sum(row, Fraction(0))


def hermite_rows(b: Row) -> tuple[Row, ...]:
    """Cubic Hermite interpolation as dense output, for a method whose first and last slopes are those of the ends.

    Source: Hairer, Nørsett & Wanner, Solving ODEs I, II.6, eq. (6.7).
    """
    # Weight 3 theta^2 - 2 theta^3 for y1 - y = h Σ b_i k_i; then the weights of h k_1 and h k_s are added.
    rows = [[Fraction(0), 3 * weight, -2 * weight] for weight in b]
    for row, added in ((rows[0], (1, -2, 1)), (rows[-1], (0, -1, 1))):
        row[:] = [one + other for one, other in zip(row, added, strict=True)]
    return tuple(map(tuple, rows))


def integrated_rows(c: Row) -> tuple[Row, ...]:
    """Dense output whose slope is the polynomial through the slopes at the nodes ``c``, all of which differ."""
    rows = []
    for node in c:
        powers = [Fraction(1)]  # of the polynomial that is 1 at this node and 0 at the others, lowest first
        for other in c:
            if other != node:
                shifted, same = [Fraction(0), *powers], [*powers, Fraction(0)]
                powers = [(x - other * y) / (node - other) for x, y in zip(shifted, same, strict=True)]
        rows.append(tuple(p / i for i, p in enumerate(powers, start=1)))
    return tuple(rows)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)  # compared by identity: each method has one tableau
class Weights:
    """Solution, error and dense weights of a method with s stages.

    With a slope k_i per stage, ``y_new = y + h sum_i b_i k_i``, the error estimate is ``h sum_i error_i k_i`` and, for
    theta in [0, 1], ``y(t + theta h) ~ y + h sum_i b_i(theta) k_i``.

    Attributes:
        name: the key of the method in ``METHODS``.
        order: order of the solution weights ``b``.
        b: s solution weights.
        error: s weights ``b - b_hat``; None if the method has no error estimate (fixed steps only).
        embedded_order: order of ``b_hat``; None if ``error`` is None.
        dense: s rows; row i holds the coefficients of theta, theta^2, ... in b_i(theta). None if the method has no
            dense output (fixed steps only).
        dense_order: order of b(theta) for every theta; None if ``dense`` is None.
        source: publication of the coefficients.
    """

    # Published rationals may approximate irrational numbers: those of dopri8 miss their row sums by up to 1.04e-17.
    # The tests check the order conditions, which are stricter.
    rounding: ClassVar[Fraction] = Fraction(1, 10**16)

    name: str
    order: int
    b: Row
    error: Row | None = None
    embedded_order: int | None = None
    dense: tuple[Row, ...] | None = None
    dense_order: int | None = None
    source: str = ""

    def __repr__(self) -> str:
        order = f"{self.order}({self.embedded_order})" if self.embedded_order is not None else f"{self.order}"
        return f"{type(self).__name__}({self.name!r}, order {order}, {len(self.b)} stages)"

    def _check_lengths(self, stages: int) -> None:
        if len(self.b) != stages:
            raise self._invalid(f"b has one entry for each of the {stages} nodes", len(self.b))
        if self.error is not None and len(self.error) != stages:
            raise self._invalid(f"error has one entry for each of the {stages} nodes", len(self.error))
        if self.dense is not None:
            lengths = [len(row) for row in self.dense]
            if len(lengths) != stages or len(set(lengths)) != 1 or lengths[0] == 0:
                raise self._invalid(f"dense has {stages} rows of equal length", lengths)

    def _check_orders(self) -> None:
        if self.order < 1:
            raise self._invalid("order is at least 1", self.order)
        for what, weights, order in (
            ("embedded_order", self.error, self.embedded_order),
            ("dense_order", self.dense, self.dense_order),
        ):
            if weights is None and order is not None:
                raise self._invalid(f"{what} is None without the weights it describes", order)
            if weights is not None and (order is None or order < 1):
                raise self._invalid(f"{what} is at least 1", order)

    def _check_weight_sums(self) -> None:
        if self._differ(row_sum(self.b), 1):
            raise self._invalid("b sums to 1", row_sum(self.b))
        if self.error is not None and self._differ(row_sum(self.error), 0):
            raise self._invalid("error sums to 0", row_sum(self.error))

    def _check_dense_sums(self) -> None:
        for i, (row, weight) in enumerate(zip(self.dense or (), self.b, strict=False), start=1):
            if self._differ(row_sum(row), weight):
                raise self._invalid(f"row {i} of dense sums to b_{i} = {weight}", row_sum(row))

    def _differ(self, left: Fraction, right: Fraction | int) -> bool:
        return abs(left - right) > self.rounding

    def _invalid(self, rule: str, given: object) -> ValueError:
        return ValueError(f"tableau {self.name}: {rule}; given {given}")

    @property
    def stages(self) -> int:
        """Number of stages of a step."""
        return len(self.b)

    @property
    def adaptive(self) -> bool:
        """Tells whether the method estimates its error, so that a controller can choose the steps."""
        return self.error is not None

    @cached_property
    def dense_coefficients(self) -> tuple[tuple[float, ...], ...]:
        """Coefficients of each b_i(theta) as floats, highest power first; empty if they are all zero."""
        if self.dense is None:
            raise ValueError(f"{self.name} has no dense output: use fixed steps that end at each requested time")
        # Stages that dense output does not use get no coefficients, so that dense_weights skips them.
        return tuple(tuple(float(p) for p in reversed(row)) if any(row) else () for row in self.dense)

    def dense_weights(self, theta: Any) -> list[Any]:
        """The weights b_1(theta), ..., b_s(theta) at position ``theta`` in [0, 1] of a step: a number, array or tensor.

        A stage without a weight has 0.0, whatever theta is.

        Raises:
            ValueError: the method has no dense output.
        """
        weights: list[Any] = []
        for row in self.dense_coefficients:
            weight: Any = 0.0
            for coefficient in row:
                weight = (weight + coefficient) * theta
            weights.append(weight)
        return weights

    def dense_derivative_weights(self, theta: Any) -> list[Any]:
        """Derivatives of ``dense_weights`` with respect to theta: dy/dt of the dense output is Σ b_i'(theta)·k_i.

        Raises:
            ValueError: the method has no dense output.
        """
        weights: list[Any] = []
        for row in self.dense_coefficients:
            weight: Any = 0.0
            for power, coefficient in zip(range(len(row), 0, -1), row, strict=True):
                weight = weight * theta + power * coefficient
            weights.append(weight)
        return weights

    def with_linear_output(self: WeightsType) -> WeightsType:
        """The same method with the straight line between the ends of a step as dense output."""
        return replace(self, dense=tuple((weight,) for weight in self.b), dense_order=1)
