"""Every implicit method's order, by rooted trees in exact arithmetic, and its stability, by its stability function."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from rooted_trees import Residuals, Row
from stability import StabilityFunction

from aca_ext.numerics.implicit import ImplicitTableau, RosenbrockTableau
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS, ROSENBROCK_METHODS
from aca_ext.numerics.methods import METHODS

# The claims that the trees prove: order, embedded order, dense order.
CLAIMED = {
    "implicit_euler": (1, None, None),
    "implicit_midpoint": (2, None, None),
    "trapezoid": (2, None, None),
    "sdirk2": (2, None, None),
    "trbdf2": (2, 3, 2),
    "radauIIA3": (3, None, None),
    "radauIIA5": (5, None, None),
    "gl4": (4, None, None),
    "gl6": (6, None, None),
    "kvaerno3": (3, 2, 3),
    "kvaerno5": (5, 4, 3),
    "radau5": (5, 3, 4),
    "rodas5p": (5, 4, 4),
}
# Residuals are below 1e-39, or zero without roots. The coefficients of kvaerno5 have 17 decimals, and its largest
# residual is 2.2e-17. Those of rodas5p have 16 to 18 digits and are up to 147; its largest residuals are 5.5e-15, and
# 1.6e-13 for dense output.
ROOTS = Fraction(1, 10**38)
PRECISION = {
    "kvaerno5": Fraction(1, 10**16),
    "rodas5p": Fraction(1, 10**14),
    ("rodas5p", "dense"): Fraction(3, 10**13),
}
# R at infinity of the solution and of the embedded solution.
AT_INFINITY = {
    "implicit_euler": (0.0, None),
    "implicit_midpoint": (-1.0, None),
    "trapezoid": (-1.0, None),
    "sdirk2": (0.0, None),
    "trbdf2": (0.0, float("inf")),
    "radauIIA3": (0.0, None),
    "radauIIA5": (0.0, None),
    "gl4": (1.0, None),
    "gl6": (-1.0, None),
    "kvaerno3": (0.0, -0.956),
    "kvaerno5": (0.0, -0.748),
    "radau5": (0.0, float("inf")),
    "rodas5p": (0.0, 0.0),
}
STIFFLY_ACCURATE = set(IMPLICIT_METHODS) - {"implicit_midpoint", "gl4", "gl6"}
EXPLICIT_FIRST_STAGE = {"trapezoid", "trbdf2", "kvaerno3", "kvaerno5", "radau5"}
COUPLED_STAGES = {"radauIIA3", "radauIIA5", "gl4", "gl6", "radau5"}

ALL: dict[str, ImplicitTableau | RosenbrockTableau] = {**IMPLICIT_METHODS, **ROSENBROCK_METHODS}
RODAS5P = ROSENBROCK_METHODS["rodas5p"]

every = pytest.mark.parametrize("name", ALL)
runge_kutta = pytest.mark.parametrize("name", IMPLICIT_METHODS)


def precision(name: str, what: str = "b") -> Fraction:
    return PRECISION.get((name, what), PRECISION.get(name, ROOTS))


@cache
def residuals(name: str) -> Residuals:
    return Residuals(ALL[name])


def beta(method: RosenbrockTableau) -> tuple[Row, ...]:
    pairs = zip(method.alpha, method.gammas, strict=True)
    return tuple(tuple(x + y for x, y in zip(*rows, strict=True)) for rows in pairs)


@cache
def stability(name: str, what: str) -> StabilityFunction:
    method = ALL[name]
    matrix = beta(method) if isinstance(method, RosenbrockTableau) else method.a
    return StabilityFunction.of(matrix, residuals(name).weights[what], precision(name))


def holds_claimed_orders(method: ImplicitTableau | RosenbrockTableau) -> bool:
    proofs = Residuals(method)
    return all(
        proofs.within(precision(method.name, what), what, claimed)
        for what, claimed in zip(("b", "b_hat", "dense"), CLAIMED[method.name], strict=True)
        if claimed is not None
    )


@every
def test_registry_states_the_orders_proven_here(name: str) -> None:
    method = ALL[name]
    assert method.name == name
    assert (method.order, method.embedded_order, method.dense_order) == CLAIMED[name]
    assert method.adaptive == (CLAIMED[name][1] is not None)
    assert method.source


def test_no_explicit_method_has_the_name_of_an_implicit_one() -> None:
    assert not set(ALL) & set(METHODS)


@every
@pytest.mark.parametrize("what", ["b", "b_hat", "dense"])
def test_order_is_exactly_the_claimed_one(name: str, what: str) -> None:
    claimed = dict(zip(("b", "b_hat", "dense"), CLAIMED[name], strict=True))[what]
    method, proofs = ALL[name], residuals(name)
    if claimed is None:
        assert (method.dense if what == "dense" else method.error) is None
        return
    assert proofs.within(precision(name, what), what, claimed)
    if what == "dense" and len(proofs.powers) <= claimed:
        return  # polynomials of this degree have no theta^(claimed + 1)
    assert any(abs(residual) > Fraction(1, 10**4) for residual in proofs.of(what, claimed + 1))


@every
@pytest.mark.parametrize("what", ["b", "b_hat"])
def test_stability_on_the_left_half_plane(name: str, what: str) -> None:
    """A-stability of all solutions, except that the raw embedded ones of trbdf2 and radau5 are to be filtered."""
    limit = AT_INFINITY[name][what == "b_hat"]
    if limit is None:
        return
    r = stability(name, what)
    assert r.at_infinity == pytest.approx(limit, abs=1e-3 if limit else 0)
    assert all(pole.real > 1e-3 for pole in r.poles)
    is_stable = all(coefficient >= -precision(name) for coefficient in r.damping())
    assert is_stable == (limit != float("inf"))


@every
def test_stability_function_agrees_with_a_step_for_the_test_equation(name: str) -> None:
    """One step of y' = z y from 1 with h = 1, its linear equations solved stage by stage or all at once."""
    method, z = ALL[name], -2.0 + 3.0j
    if isinstance(method, RosenbrockTableau):
        increments: list[complex] = []
        for a, coupling in zip(method.a, method.coupling, strict=True):
            state = 1 + sum(float(x) * u for x, u in zip(a, increments, strict=True))
            added = sum(float(c) * u for c, u in zip(coupling, increments, strict=True))
            increments.append((z * state + added) / (1 / float(method.gamma) - z))
        new = 1 + sum(float(b) * u for b, u in zip(method.b, increments, strict=True))
    else:
        a = np.array(method.a, dtype=float)
        slopes = np.linalg.solve(np.eye(method.stages) - z * a, np.full(method.stages, z))
        new = 1 + np.array(method.b, dtype=float) @ slopes
    r = stability(name, "b")
    quotient = np.polyval([float(p) for p in reversed(r.numerator)], z) / np.polyval(
        [float(q) for q in reversed(r.denominator)], z
    )
    assert new == pytest.approx(quotient, abs=1e-12)


@every
def test_filter_is_asked_for_where_the_raw_estimate_is_unbounded(name: str) -> None:
    method = ALL[name]
    unbounded = AT_INFINITY[name][1] == float("inf")
    assert (getattr(method, "error_filter", None) is not None) == unbounded
    if unbounded:  # the filter 1 / (1 - z error_filter) makes up for one degree
        r = stability(name, "b_hat")
        assert len(r.numerator) == len(r.denominator) + 1


def test_filter_of_trbdf2_is_the_matrix_of_newtons_method() -> None:
    assert IMPLICIT_METHODS["trbdf2"].error_filter == IMPLICIT_METHODS["trbdf2"].diagonal


def test_filter_of_radau5_is_the_real_eigenvalue_of_its_stages() -> None:
    method = IMPLICIT_METHODS["radau5"]
    x = method.error_filter
    assert x is not None
    assert method.error is not None
    eigenvalues = np.linalg.eigvals(np.array(method.a, dtype=float)[1:, 1:])
    assert float(x) == pytest.approx(next(e.real for e in eigenvalues if abs(e.imag) < 1e-9), abs=1e-12)
    assert abs(x**3 - Fraction(3, 5) * x**2 + Fraction(3, 20) * x - Fraction(1, 60)) < ROOTS
    assert method.error[0] == -x


def test_radau5_makes_the_steps_of_radau_iia5() -> None:
    adaptive, fixed = IMPLICIT_METHODS["radau5"], IMPLICIT_METHODS["radauIIA5"]
    assert adaptive.b[1:] == fixed.b
    assert tuple(row[1:] for row in adaptive.a[1:]) == fixed.a


@runge_kutta
def test_structure(name: str) -> None:
    method = IMPLICIT_METHODS[name]
    assert method.stiffly_accurate == (name in STIFFLY_ACCURATE)
    assert method.explicit_first_stage == (name in EXPLICIT_FIRST_STAGE)
    assert method.fsal == (name in STIFFLY_ACCURATE & EXPLICIT_FIRST_STAGE)
    assert method.diagonally_implicit == (name not in COUPLED_STAGES)
    assert (method.diagonal is None) == (name in COUPLED_STAGES)
    assert method.c == tuple(map(sum, method.a))


def test_rosenbrock_method_is_stiffly_accurate() -> None:
    """b_i = beta_si and alpha_s = 1, for the embedded solution with s - 1: Hairer & Wanner, IV.7 and VI.4."""
    rows, weights = beta(RODAS5P), residuals("rodas5p").weights
    for row, what in ((-1, "b"), (-2, "b_hat")):
        assert weights[what] == pytest.approx(rows[row], abs=1e-14)
        assert RODAS5P.c[row] == 1
        assert RODAS5P.d[row] == 0


def test_rosenbrock_error_estimate_is_the_last_increment() -> None:
    assert RODAS5P.error == (0,) * 7 + (1,)


def test_rosenbrock_sums_are_the_published_nodes() -> None:
    assert RODAS5P.c == pytest.approx(tuple(map(sum, RODAS5P.alpha)), abs=1e-14)
    assert RODAS5P.d == pytest.approx(tuple(map(sum, RODAS5P.gammas)), abs=1e-14)
    assert all(row[i] == RODAS5P.gamma for i, row in enumerate(RODAS5P.gammas))


def test_rosenbrock_matrices_are_the_inverse_ones() -> None:
    s = RODAS5P.stages
    for i, coupling in enumerate(RODAS5P.coupling):
        full = [-c for c in coupling] + [1 / RODAS5P.gamma] + [Fraction(0)] * (s - i - 1)
        product = [sum(full[k] * RODAS5P.gammas[k][j] for k in range(s)) for j in range(s)]
        assert product == [Fraction(i == j) for j in range(s)]


@pytest.mark.parametrize("name", ["trbdf2", "kvaerno3", "kvaerno5", "radau5"])
def test_dense_output_joins_the_steps(name: str) -> None:
    """b(1) = b makes the output continuous, b'(0) = e_1 and b'(1) = e_s (slope of the new state) smooth."""
    method = IMPLICIT_METHODS[name]
    assert method.dense is not None
    at_end = [sum(row) for row in method.dense]
    slope_at_start = [row[0] for row in method.dense]
    slope_at_end = [sum(power * p for power, p in enumerate(row, start=1)) for row in method.dense]
    others = [0] * (method.stages - 1)
    for found, expected in ((at_end, method.b), (slope_at_start, [1, *others]), (slope_at_end, [*others, 1])):
        assert all(abs(x - y) <= ROOTS for x, y in zip(found, expected, strict=True))


def test_rosenbrock_dense_output_ends_at_the_new_state() -> None:
    assert tuple(map(sum, RODAS5P.dense)) == RODAS5P.b
    assert RODAS5P.dense_weights(1.0) == pytest.approx([float(b) for b in RODAS5P.b], abs=1e-12)


@runge_kutta
def test_hermite_output_keeps_the_method(name: str) -> None:
    """The stages added for the slopes at both ends change neither the solution nor its stability."""
    method = IMPLICIT_METHODS[name].with_hermite_output()
    assert method.explicit_first_stage
    assert not any(method.a[0])
    assert method.c[-1] == 1
    assert method.a[-1] == method.b
    proofs = Residuals(method)
    assert proofs.within(precision(name), "b", method.order)
    assert proofs.within(precision(name), "dense", method.dense_order)
    assert method.dense_order == min(method.order, 3)
    added = StabilityFunction.of(method.a, method.b, precision(name))
    assert (added.numerator, added.denominator) == (stability(name, "b").numerator, stability(name, "b").denominator)


@runge_kutta
def test_linear_output(name: str) -> None:
    method = IMPLICIT_METHODS[name].with_linear_output()
    assert method.dense_weights(0.25) == pytest.approx([0.25 * float(b) for b in method.b])
    assert method.dense_order == 1


def shift(row: Row, *places: int) -> Row:
    """``row`` with 1e-10 added at the first place and, if there is a second place, subtracted there."""
    moved = list(row)
    for place, sign in zip(places, (1, -1), strict=False):
        moved[place] += Fraction(sign, 10**10)
    return tuple(moved)


def every_entry(method: ImplicitTableau | RosenbrockTableau) -> Iterator[dict[str, object]]:
    """Changes of a single coefficient by 1e-10, for every coefficient."""
    for field in ("c", "d", "b", "error"):
        row = getattr(method, field, None)
        for j in range(len(row or ())):
            if (method.name, field, j) != ("rodas5p", "error", 7):  # a free factor: its published value is tested
                yield {field: shift(row, j)}
    for field in ("a", "coupling", "dense"):
        rows = getattr(method, field, None) or ()
        for i, row in enumerate(rows):
            for j in range(len(row)):
                yield {field: (*rows[:i], shift(row, j), *rows[i + 1 :])}


def is_caught(method: ImplicitTableau | RosenbrockTableau, wrong: dict[str, object]) -> bool:
    """Tells whether a changed method is rejected, of another structure, or fails its order conditions."""
    try:
        changed = dataclasses.replace(method, **wrong)
    except ValueError:
        return True
    if isinstance(method, ImplicitTableau):
        structure = [(m.fsal, m.stiffly_accurate, m.diagonal, m.diagonally_implicit) for m in (method, changed)]
        if structure[0] != structure[1]:
            return True
    return not holds_claimed_orders(changed)


@every
def test_a_wrong_digit_is_caught(name: str) -> None:
    method = ALL[name]
    assert holds_claimed_orders(method)
    assert all(is_caught(method, wrong) for wrong in every_entry(method))


@pytest.mark.parametrize("name", [name for name, claimed in CLAIMED.items() if claimed[0] > 2])
def test_wrong_digits_that_cancel_in_the_sums_are_caught(name: str) -> None:
    method = ALL[name]
    for field in ("a", "coupling"):
        rows = getattr(method, field, ())
        for i, row in enumerate(rows):
            for j in range(1, len(row)):
                assert is_caught(method, {field: (*rows[:i], shift(row, j - 1, j), *rows[i + 1 :])}), (field, i, j)


GOOD = {"name": "new", "order": 1, "c": (Fraction(1),), "a": ((Fraction(1),),), "b": (Fraction(1),), "source": "a test"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": ()}, "tableau new: a has a row for each node, and each row an entry for each node"),
        ({"a": ((Fraction(1), Fraction(0)),)}, "an entry for each node"),
        ({"c": (Fraction(1, 2),)}, "row 1 of a sums to c_1 = 1/2; given 1"),
        ({"b": (Fraction(1, 2),)}, "b sums to 1; given 1/2"),
        ({"error_filter": Fraction(1)}, "error_filter is None for a method without an error estimate"),
        ({"order": 0}, "order is at least 1; given 0"),
    ],
)
def test_bad_tableaus_are_rejected(change: dict[str, object], message: str) -> None:
    ImplicitTableau(**GOOD)
    with pytest.raises(ValueError, match=message):
        ImplicitTableau(**(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": Fraction(0)}, "tableau rodas5p: gamma is positive; given 0"),
        ({"d": ()}, "d has one entry for each of the 8 nodes; given 0"),
        ({"a": ((),)}, "a has 8 rows of 0 to 7 entries"),
        ({"coupling": ((),)}, "coupling has 8 rows of 0 to 7 entries"),
    ],
)
def test_bad_rosenbrock_tableaus_are_rejected(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RODAS5P, **change)
