"""Butcher tableau of an explicit Runge-Kutta method: parsed from rationals, checked, evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

Row = tuple[Fraction, ...]

# Published rationals may approximate irrational numbers: those of dopri8 miss their row sums by up to 1.04e-17. The
# tests check the order conditions, which are stricter.
_ROUNDING = Fraction(1, 10**16)


def _parse_row(what: str, text: str) -> Row:
    """The whitespace-separated rationals of ``text``: ``1/3``, ``-2``, ``0.161``."""
    try:
        return tuple(Fraction(entry) for entry in text.split())
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{what}: {error}; write each entry as 1/3, -2 or 0.161") from None


def _differ(left: Fraction, right: Fraction | int) -> bool:
    return abs(left - right) > _ROUNDING


@dataclass(frozen=True, eq=False, repr=False)  # compared and hashed by identity: each method has one tableau
class Tableau:
    """An explicit Runge-Kutta method with s stages, in the notation of Hairer, Nørsett & Wanner, vol. I.

    ``k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j)``, ``y_new = y + h sum_i b_i k_i``, error estimate
    ``h sum_i error_i k_i`` and, for theta in [0, 1], ``y(t + theta h) ~ y + h sum_i b_i(theta) k_i``.

    Attributes:
        name: the key of the method in ``METHODS``.
        order: order of the solution weights ``b``.
        c: s nodes; the first is 0.
        a: s rows; row i has i entries.
        b: s solution weights.
        error: s weights ``b - b_hat``; None if the method has no error estimate (fixed steps only).
        embedded_order: order of ``b_hat``; None if ``error`` is None.
        dense: s rows; row i holds the coefficients of theta, theta^2, ... in b_i(theta). None if the method has no
            dense output (fixed steps only).
        dense_order: order of b(theta) for every theta; None if ``dense`` is None.
        source: publication of the coefficients.

    Raises:
        ValueError: the parts do not fit together: a shape, an order, or a sum that every consistent method must have.
    """

    name: str
    order: int
    c: Row
    a: tuple[Row, ...]
    b: Row
    error: Row | None = None
    embedded_order: int | None = None
    dense: tuple[Row, ...] | None = None
    dense_order: int | None = None
    source: str = ""

    def __repr__(self) -> str:
        order = f"{self.order}({self.embedded_order})" if self.embedded_order is not None else f"{self.order}"
        return f"Tableau({self.name!r}, order {order}, {len(self.b)} stages)"

    @classmethod
    def parse(
        cls,
        name: str,
        *,
        order: int,
        c: str,
        a: str,
        source: str,
        b: str | None = None,
        b_hat: str | None = None,
        embedded_order: int | None = None,
        dense: str | None = None,
        dense_order: int | None = None,
    ) -> Tableau:
        """Builds a tableau from rationals separated by any whitespace.

        Args:
            a: rows 2 to s below the diagonal, one after the other: a_21, a_31, a_32, a_41, ...
            b: None for a method whose last stage is the first of the next step: b is the last row of ``a``, then 0.
            b_hat: weights of the embedded solution; stored as ``error = b - b_hat``.
            dense: the coefficients of theta, theta^2, ... in b_1(theta), then those in b_2(theta), and so on.

        Raises:
            ValueError: an entry is no rational, a count is wrong, or the parts do not fit together.
        """
        what = f"tableau {name}:"
        nodes = _parse_row(f"{what} c", c)
        if not nodes:
            raise ValueError(f"{what} c is empty; give one node per stage, the first of them 0")
        rows = _below_diagonal(f"{what} a", _parse_row(f"{what} a", a), len(nodes))
        weights = (*rows[-1], Fraction(0)) if b is None else _parse_row(f"{what} b", b)
        error = None
        if b_hat is not None:
            embedded = _parse_row(f"{what} b_hat", b_hat)
            if len(embedded) != len(weights):
                raise ValueError(f"{what} b_hat has as many entries as b; given {len(embedded)}")
            error = tuple(w - v for w, v in zip(weights, embedded, strict=True))
        polynomials = None
        if dense is not None:
            polynomials = _equal_rows(f"{what} dense", _parse_row(f"{what} dense", dense), len(nodes))
        return cls(
            name=name,
            order=order,
            c=nodes,
            a=rows,
            b=weights,
            error=error,
            embedded_order=embedded_order,
            dense=polynomials,
            dense_order=dense_order,
            source=source,
        )

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_orders()
        self._check_sums()

    def _check_shapes(self) -> None:
        s = len(self.c)
        if s == 0 or self.c[0] != 0:
            raise self._invalid("the nodes c of an explicit method start with 0", [str(c) for c in self.c])
        if [len(row) for row in self.a] != list(range(s)):
            raise self._invalid(f"a has {s} rows of 0 to {s - 1} entries", [len(row) for row in self.a])
        if len(self.b) != s:
            raise self._invalid(f"b has one entry for each of the {s} nodes", len(self.b))
        if self.error is not None and len(self.error) != s:
            raise self._invalid(f"error has one entry for each of the {s} nodes", len(self.error))
        if self.dense is not None:
            lengths = [len(row) for row in self.dense]
            if len(lengths) != s or len(set(lengths)) != 1 or lengths[0] == 0:
                raise self._invalid(f"dense has {s} rows of equal length", lengths)

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

    def _check_sums(self) -> None:
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True), start=1):
            if _differ(sum(row, Fraction(0)), node):
                raise self._invalid(f"row {i} of a sums to c_{i} = {node}", sum(row))
        if _differ(sum(self.b, Fraction(0)), 1):
            raise self._invalid("b sums to 1", sum(self.b))
        if self.error is not None and _differ(sum(self.error, Fraction(0)), 0):
            raise self._invalid("error sums to 0", sum(self.error))
        if self.dense is not None:
            for i, (row, weight) in enumerate(zip(self.dense, self.b, strict=True), start=1):
                if _differ(sum(row, Fraction(0)), weight):
                    raise self._invalid(f"row {i} of dense sums to b_{i} = {weight}", sum(row))

    def _invalid(self, rule: str, given: object) -> ValueError:
        return ValueError(f"tableau {self.name}: {rule}; given {given}")

    @property
    def stages(self) -> int:
        """Number of slopes k_i that a step uses."""
        return len(self.c)

    @property
    def fsal(self) -> bool:
        """First same as last: the last slope is f(t + h, y_new), hence the first slope of the next step."""
        return self.b[-1] == 0 and self.a[-1] == self.b[:-1]

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

    def dense_weights(self, theta: float) -> list[float]:
        """The weights b_1(theta), ..., b_s(theta) in float64, at position ``theta`` in [0, 1] of a step.

        Raises:
            ValueError: the method has no dense output.
        """
        weights: list[float] = []
        for row in self.dense_coefficients:
            weight = 0.0
            for coefficient in row:
                weight = (weight + coefficient) * theta
            weights.append(weight)
        return weights

    def dense_derivative_weights(self, theta: float) -> list[float]:
        """Derivatives of ``dense_weights`` with respect to theta: dy/dt of the dense output is Σ b_i'(theta)·k_i.

        Raises:
            ValueError: the method has no dense output.
        """
        weights: list[float] = []
        for row in self.dense_coefficients:
            weight = 0.0
            for power, coefficient in zip(range(len(row), 0, -1), row, strict=True):
                weight = weight * theta + power * coefficient
            weights.append(weight)
        return weights

    def with_linear_output(self) -> Tableau:
        """The same method with the straight line between the ends of a step as dense output."""
        return replace(self, dense=tuple((weight,) for weight in self.b), dense_order=1)

    def with_hermite_output(self) -> Tableau:
        """The same method with cubic Hermite interpolation as dense output, of order 3 at most.

        The interpolant needs the slope at the end of the step. That slope becomes the last stage and is the first slope
        of the next step, so the method needs as many evaluations as before.

        Source: Hairer, Nørsett & Wanner, Solving ODEs I, II.6, eq. (6.7).
        """
        if self.fsal:
            c, a, b, error = self.c, self.a, self.b, self.error
        else:
            c, a, b = (*self.c, Fraction(1)), (*self.a, self.b), (*self.b, Fraction(0))
            error = None if self.error is None else (*self.error, Fraction(0))
        # Weight 3 theta^2 - 2 theta^3 for y1 - y = h Σ b_i k_i; then the weights of h k_1 and h k_s are added.
        rows = [[Fraction(0), 3 * weight, -2 * weight] for weight in b]
        for row, added in ((rows[0], (1, -2, 1)), (rows[-1], (0, -1, 1))):
            row[:] = [one + other for one, other in zip(row, added, strict=True)]
        dense, order = tuple(map(tuple, rows)), min(self.order, 3)
        return replace(self, c=c, a=a, b=b, error=error, dense=dense, dense_order=order)


def _below_diagonal(what: str, entries: Row, stages: int) -> tuple[Row, ...]:
    wanted = stages * (stages - 1) // 2
    if len(entries) != wanted:
        raise ValueError(f"{what} has {wanted} entries for {stages} nodes; given {len(entries)}")
    return tuple(entries[i * (i - 1) // 2 : i * (i + 1) // 2] for i in range(stages))


def _equal_rows(what: str, entries: Row, stages: int) -> tuple[Row, ...]:
    degree, rest = divmod(len(entries), stages)
    if rest or not degree:
        raise ValueError(f"{what} has equally many entries for each of {stages} nodes; given {len(entries)}")
    return tuple(entries[i * degree : (i + 1) * degree] for i in range(stages))
