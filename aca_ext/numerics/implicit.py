"""Tableaus of implicit Runge-Kutta methods and of Rosenbrock methods: checked, evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import ClassVar

from aca_ext.numerics.weights import Row, Weights, hermite_rows, row_sum

Matrix = tuple[Row, ...]
_ZERO = Fraction(0)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ImplicitTableau(Weights):
    """An implicit Runge-Kutta method with s stages, in the notation of Hairer & Wanner, Solving ODEs II, IV.5.

    ``k_i = f(t + c_i h, y + h sum_j a_ij k_j)``; ``Weights`` has the rest.

    Attributes:
        c: s nodes.
        a: s rows of s entries.
        error_filter: the raw error estimate grows without bound with the stiffness, so it must be multiplied by
            ``(I - h error_filter J)^-1``, as the authors of the method do; None for any other method. That weakens the
            estimate where the stiffness is moderate: with trbdf2 on the problem HIRES the error at the end is 2 to 3
            times larger, at 90 % of the steps.

    Raises:
        ValueError: the parts do not fit together: a shape, an order, or a sum that every consistent method must have.
    """

    c: Row
    a: Matrix
    error_filter: Fraction | None = None

    def __post_init__(self) -> None:
        s = len(self.c)
        if s == 0 or [len(row) for row in self.a] != [s] * s:
            raise self._invalid("a has a row for each node, and each row an entry for each node", [*map(len, self.a)])
        self._check_lengths(s)
        self._check_orders()
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True), start=1):
            if self._differ(row_sum(row), node):
                raise self._invalid(f"row {i} of a sums to c_{i} = {node}", row_sum(row))
        self._check_weight_sums()
        self._check_dense_sums()
        if self.error_filter is not None and self.error is None:
            raise self._invalid("error_filter is None for a method without an error estimate", self.error_filter)

    @property
    def diagonally_implicit(self) -> bool:
        """Tells whether the stages can be solved one after the other."""
        return not any(any(row[i + 1 :]) for i, row in enumerate(self.a))

    @property
    def diagonal(self) -> Fraction | None:
        """The a_ii of all implicit stages if they are the same, so that one factorisation serves them; else None."""
        values = {row[i] for i, row in enumerate(self.a) if row[i]}
        return values.pop() if self.diagonally_implicit and len(values) == 1 else None

    @property
    def explicit_first_stage(self) -> bool:
        """Tells whether the first slope is f(t, y)."""
        return not any(self.a[0])

    @property
    def stiffly_accurate(self) -> bool:
        """Tells whether the value of the last stage is the new state, so that the last slope is f(t + h, y_new)."""
        return self.a[-1] == self.b

    @property
    def fsal(self) -> bool:
        """First same as last: the last slope is f(t + h, y_new), hence the first slope of the next step."""
        return self.explicit_first_stage and self.stiffly_accurate

    def with_hermite_output(self) -> ImplicitTableau:
        """The same method with cubic Hermite interpolation as dense output, of order 3 at most.

        The slopes at both ends become explicit stages where the method lacks them. The last one is the first of the
        next step, so the method needs at most one more evaluation per step, and no more solves.
        """
        method = self if self.explicit_first_stage else self._with_first_slope()
        method = method if method.stiffly_accurate else method._with_last_slope()
        return replace(method, dense=hermite_rows(method.b), dense_order=min(self.order, 3))

    def _with_first_slope(self) -> ImplicitTableau:
        a = ((_ZERO,) * (self.stages + 1), *((_ZERO, *row) for row in self.a))
        error = None if self.error is None else (_ZERO, *self.error)
        return replace(self, c=(_ZERO, *self.c), a=a, b=(_ZERO, *self.b), error=error, dense=None, dense_order=None)

    def _with_last_slope(self) -> ImplicitTableau:
        a = (*((*row, _ZERO) for row in self.a), (*self.b, _ZERO))
        error = None if self.error is None else (*self.error, _ZERO)
        c = (*self.c, Fraction(1))
        return replace(self, c=c, a=a, b=(*self.b, _ZERO), error=error, dense=None, dense_order=None)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RosenbrockTableau(Weights):
    """A Rosenbrock method with s stages, in the form without products by the Jacobian J = df/dy(t, y).

    Each stage solves a linear system with the same matrix, instead of a nonlinear one::

        (I / (h gamma) - J) u_i = f(t + c_i h, y + sum_{j<i} a_ij u_j) + sum_{j<i} (coupling_ij / h) u_j + h d_i df/dt

    The weights multiply the increments ``u_i``, in the units of y: ``y_new = y + sum_i b_i u_i``, the error estimate is
    ``sum_i error_i u_i``, and ``y(t + theta h) ~ y + sum_i b_i(theta) u_i``. The matrices ``alpha`` and ``gammas`` are
    those of the form of the theory, ``k_i = h f(y + sum_j alpha_ij k_j) + h J sum_j gammas_ij k_j``, with
    ``u_i = sum_j gammas_ij k_j``.

    Source: Hairer & Wanner, Solving ODEs II, IV.7, eq. (7.4) and (7.25).

    Attributes:
        gamma: the diagonal of ``gammas``.
        c: s nodes, the row sums of ``alpha``.
        d: s weights of the time derivative, the row sums of ``gammas``.
        a: s rows; row i has i entries.
        coupling: s rows; row i has i entries. The c_ij of Hairer & Wanner.

    Raises:
        ValueError: the parts do not fit together: a shape, an order, or a sum that every consistent method must have.
    """

    # The coefficients are published to 16 digits. Those of the coupling are up to 100 times larger than 1.
    rounding: ClassVar[Fraction] = Fraction(1, 10**14)

    gamma: Fraction
    c: Row
    d: Row
    a: Matrix
    coupling: Matrix

    def __post_init__(self) -> None:
        s = len(self.c)
        for what, rows in (("a", self.a), ("coupling", self.coupling)):
            if s == 0 or [len(row) for row in rows] != list(range(s)):
                raise self._invalid(f"{what} has {s} rows of 0 to {s - 1} entries", [len(row) for row in rows])
        if self.gamma <= 0:
            raise self._invalid("gamma is positive", self.gamma)
        if len(self.d) != s:
            raise self._invalid(f"d has one entry for each of the {s} nodes", len(self.d))
        self._check_lengths(s)
        self._check_orders()
        self._check_sums()

    def _check_sums(self) -> None:
        for what, rows, sums in (("alpha", self.alpha, self.c), ("gammas", self.gammas, self.d)):
            for i, (row, wanted) in enumerate(zip(rows, sums, strict=True), start=1):
                if self._differ(row_sum(row), wanted):
                    raise self._invalid(f"row {i} of {what} sums to {wanted}", row_sum(row))
        for what, weights, total in (("b", self.b, 1), ("error", self.error, 0)):
            if weights is not None and self._differ(row_sum(self.of_slopes(weights)), total):
                raise self._invalid(f"{what}, as weights of slopes, sums to {total}", row_sum(self.of_slopes(weights)))
        self._check_dense_sums()

    @cached_property
    def gammas(self) -> Matrix:
        """The matrix gamma_ij: the inverse of ``I / gamma - coupling``, by forward substitution."""
        rows: list[Row] = []
        for i, coupling in enumerate(self.coupling):
            unit = [Fraction(i == j) for j in range(self.stages)]
            below = _combine(coupling, tuple(rows), self.stages)
            rows.append(tuple(self.gamma * (one + other) for one, other in zip(unit, below, strict=True)))
        return tuple(rows)

    @cached_property
    def alpha(self) -> Matrix:
        """The matrix alpha_ij: ``a`` times ``gammas``."""
        return tuple(self.of_slopes(row) for row in self.a)

    def of_slopes(self, weights: Row) -> Row:
        """The weights of the slopes k_j that mean the same as ``weights`` of the increments u_i."""
        return _combine(weights, self.gammas[: len(weights)], self.stages)


def _combine(weights: Row, rows: Matrix, columns: int) -> Row:
    return tuple(sum((w * row[j] for w, row in zip(weights, rows, strict=True)), _ZERO) for j in range(columns))
