"""Butcher tableau of an explicit Runge-Kutta method: parsed from rationals, checked, evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from aca_ext.numerics.weights import Row, Weights, hermite_rows, row_sum


def parse_row(what: str, text: str) -> Row:
    """The whitespace-separated rationals of ``text``: ``1/3``, ``-2``, ``0.161``."""
    try:
        return tuple(Fraction(entry) for entry in text.split())
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{what}: {error}; write each entry as 1/3, -2 or 0.161") from None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Tableau(Weights):
    """An explicit Runge-Kutta method with s stages, in the notation of Hairer, Nørsett & Wanner, vol. I.

    ``k_i = f(t + c_i h, y + h sum_{j<i} a_ij k_j)``; ``Weights`` has the rest.

    Attributes:
        c: s nodes; the first is 0.
        a: s rows; row i has i entries.

    Raises:
        ValueError: the parts do not fit together: a shape, an order, or a sum that every consistent method must have.
    """

    c: Row
    a: tuple[Row, ...]

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
        nodes = parse_row(f"{what} c", c)
        if not nodes:
            raise ValueError(f"{what} c is empty; give one node per stage, the first of them 0")
        rows = _below_diagonal(f"{what} a", parse_row(f"{what} a", a), len(nodes))
        weights = (*rows[-1], Fraction(0)) if b is None else parse_row(f"{what} b", b)
        error = None
        if b_hat is not None:
            embedded = parse_row(f"{what} b_hat", b_hat)
            if len(embedded) != len(weights):
                raise ValueError(f"{what} b_hat has as many entries as b; given {len(embedded)}")
            error = tuple(w - v for w, v in zip(weights, embedded, strict=True))
        polynomials = None
        if dense is not None:
            polynomials = _equal_rows(f"{what} dense", parse_row(f"{what} dense", dense), len(nodes))
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
        self._check_lengths(s)

    def _check_sums(self) -> None:
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True), start=1):
            if self._differ(row_sum(row), node):
                raise self._invalid(f"row {i} of a sums to c_{i} = {node}", row_sum(row))
        self._check_weight_sums()
        self._check_dense_sums()

    @property
    def fsal(self) -> bool:
        """First same as last: the last slope is f(t + h, y_new), hence the first slope of the next step."""
        return self.b[-1] == 0 and self.a[-1] == self.b[:-1]

    def with_hermite_output(self) -> Tableau:
        """The same method with cubic Hermite interpolation as dense output, of order 3 at most.

        The interpolant needs the slope at the end of the step. That slope becomes the last stage and is the first slope
        of the next step, so the method needs as many evaluations as before.
        """
        if self.fsal:
            c, a, b, error = self.c, self.a, self.b, self.error
        else:
            c, a, b = (*self.c, Fraction(1)), (*self.a, self.b), (*self.b, Fraction(0))
            error = None if self.error is None else (*self.error, Fraction(0))
        dense, order = hermite_rows(b), min(self.order, 3)
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
