"""Every method's order, proven in exact arithmetic: one condition per rooted tree, zero up to the order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import pytest
from rooted_trees import Residuals, Row, trees

from aca_ext.numerics.methods import ALIASES, METHODS
from aca_ext.numerics.tableau import Tableau

# Residuals are exactly zero except for two methods with irrational coefficients: tsit5, given to 36 decimals, and
# dopri8, published as rationals with an error of about 1e-17. The coefficients of their dense output (up to 118 in
# dopri8) magnify this. The largest residuals are 6.3e-36, 3.9e-36, 1.3e-34 and 6.5e-18, 6.4e-18, 1.3e-15. A
# coefficient wrong by 1e-12 breaks these bounds (see the tests of wrong digits).
PRECISION = {
    ("tsit5", "b"): Fraction(1, 10**35),
    ("tsit5", "b_hat"): Fraction(1, 10**35),
    ("tsit5", "dense"): Fraction(2, 10**34),
    ("dopri8", "b"): Fraction(1, 10**17),
    ("dopri8", "b_hat"): Fraction(1, 10**17),
    ("dopri8", "dense"): Fraction(2, 10**15),
}
ROW_SUM_PRECISION = {"dopri8": Fraction(2, 10**17)}
# The dense output of dopri8 is given to 30 decimals, so b(1) = b and b'(1) = e_s hold to about that many.
ENDPOINT_PRECISION = {"dopri8": Fraction(1, 10**28)}
# The claims that the trees prove: order, embedded order, dense order.
CLAIMED = {
    "euler": (1, None, None),
    "midpoint": (2, None, None),
    "heun2": (2, None, None),
    "heun3": (3, None, None),
    "rk4": (4, None, None),
    "rk4_classic": (4, None, None),
    "adaptive_heun": (2, 1, 2),
    "fehlberg2": (2, 1, 2),
    "bosh3": (3, 2, 3),
    "tsit5": (5, 4, 4),
    "dopri5": (5, 4, 4),
    "dopri8": (8, 7, 5),
}
FSAL = {"bosh3", "tsit5", "dopri5", "dopri8"}
# The weights b - b_hat as printed in the sources; order conditions leave free parameters in them.
PRINTED_ERROR = {
    "adaptive_heun": "-1/2 1/2",
    "fehlberg2": "-1/512 0 1/512",
    "bosh3": "-5/72 1/12 1/9 -1/8",
    "dopri5": "71/86400 0 -142/50085 71/2880 -5751/169600 44/1575 -1/60",
    "tsit5": """0.001780011052226 0.000816434459657 -0.007880878010262 0.144711007173263
                -0.582357165452555 0.458082105929187 -1/66""",
}
PRINTED_TSIT5 = """0.161 0.335480655492357 -6.359448489975075 4.362295432869581 -11.748883564062828
    7.495539342889836 -0.09249506636175525 -12.92096931784711 8.159367898576159 -0.071584973281401
    -0.02826905039406838 0.01 0.4798896504144996 1.379008574103742 -3.290069515436081 2.324710524099774"""

adaptive = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.adaptive])
every = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if type(method) is Tableau])


def holds_claimed_orders(method: Tableau, residuals: Residuals) -> bool:
    """Returns True if all conditions up to the claimed orders hold."""
    return all(
        residuals.within(PRECISION.get((method.name, what), 0), what, claimed)
        for what, claimed in zip(("b", "b_hat", "dense"), CLAIMED[method.name], strict=True)
        if claimed is not None
    )


@cache
def residuals(name: str) -> Residuals:
    return Residuals(METHODS[name])


def shift(row: Row, *places: int) -> Row:
    """``row`` with 1e-12 added at the first place and, if there is a second place, subtracted there."""
    moved = list(row)
    for place, sign in zip(places, (1, -1), strict=False):
        moved[place] += Fraction(sign, 10**12)
    return tuple(moved)


def test_tree_counts_are_the_known_ones() -> None:
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


@every
def test_registry_states_the_orders_proven_here(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert (method.order, method.embedded_order, method.dense_order) == CLAIMED[name]
    assert method.source


@every
@pytest.mark.parametrize("what", ["b", "b_hat", "dense"])
def test_order_is_exactly_the_claimed_one(name: str, what: str) -> None:
    claimed = dict(zip(("b", "b_hat", "dense"), CLAIMED[name], strict=True))[what]
    if claimed is None:
        assert (METHODS[name].dense if what == "dense" else METHODS[name].error) is None
        return
    assert residuals(name).within(PRECISION.get((name, what), 0), what, claimed)
    if what == "dense" and len(METHODS[name].dense[0]) <= claimed:
        return  # polynomials of this degree have no theta^(claimed + 1)
    assert any(abs(residual) > Fraction(1, 10**8) for residual in residuals(name).of(what, claimed + 1))


@every
def test_rows_sum_to_the_nodes(name: str) -> None:
    method = METHODS[name]
    tolerance = ROW_SUM_PRECISION.get(name, 0)
    assert all(abs(sum(row) - c) <= tolerance for row, c in zip(method.a, method.c, strict=True))


@adaptive
def test_dense_output_joins_the_steps(name: str) -> None:
    """b(1) = b makes the output continuous, b'(0) = e_1 and b'(1) = e_s (slope of the new state) smooth."""
    method, tolerance = METHODS[name], ENDPOINT_PRECISION.get(name, 0)
    slope_at_end = [sum(power * p for power, p in enumerate(row, start=1)) for row in method.dense]
    assert all(abs(sum(row) - b) <= tolerance for row, b in zip(method.dense, method.b, strict=True))
    assert [row[0] for row in method.dense] == [1] + [0] * (method.stages - 1)
    if method.fsal:
        assert all(abs(slope - (i == method.stages - 1)) <= tolerance for i, slope in enumerate(slope_at_end))


@adaptive
@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0])
def test_dense_weights_evaluate_the_polynomials(name: str, theta: float) -> None:
    method = METHODS[name]
    exact = [float(sum(p * Fraction(theta) ** m for m, p in enumerate(row, start=1))) for row in method.dense]
    assert method.dense_weights(theta) == pytest.approx(exact, rel=0, abs=1e-13)


@every
def test_derived_properties(name: str) -> None:
    method = METHODS[name]
    assert method.stages == len(method.c) == len(method.b)
    assert method.fsal == (name in FSAL)
    assert method.adaptive == (CLAIMED[name][1] is not None)


def test_aliases_name_methods() -> None:
    assert ALIASES == {"heun_euler": "adaptive_heun", "fixed_adams": "implicit_adams"}
    assert all(target in METHODS and alias not in METHODS for alias, target in ALIASES.items())


@pytest.mark.parametrize("name", PRINTED_ERROR)
def test_error_weights_are_the_printed_ones(name: str) -> None:
    tolerance = Fraction(1, 10**15) if name == "tsit5" else 0
    for ours, printed in zip(METHODS[name].error, PRINTED_ERROR[name].split(), strict=True):
        assert abs(ours - Fraction(printed)) <= tolerance


def test_coefficients_that_no_condition_fixes() -> None:
    fehlberg2, tsit5 = METHODS["fehlberg2"], METHODS["tsit5"]
    assert fehlberg2.a[-1] == (Fraction(1, 256), Fraction(255, 256))
    printed = [Fraction(entry) for entry in PRINTED_TSIT5.split()]
    ours = [tsit5.a[1][0], *(entry for row in tsit5.a[2:] for entry in row[1:])]
    assert all(abs(x - y) <= Fraction(1, 10**14) for x, y in zip(ours, printed, strict=True))


def every_entry(method: Tableau) -> Iterator[dict[str, object]]:
    """Changes of a single coefficient by 1e-12, for every coefficient."""
    for field in ("c", "b", "error"):
        row = getattr(method, field)
        for j in range(len(row or ())):
            yield {field: shift(row, j)}
    for field in ("a", "dense"):
        rows = getattr(method, field) or ()
        for i, row in enumerate(rows):
            for j in range(len(row)):
                yield {field: (*rows[:i], shift(row, j), *rows[i + 1 :])}


def every_neutral_pair(method: Tableau) -> Iterator[dict[str, object]]:
    """Changes of two neighbouring coefficients by 1e-12 that leave all sums in the tableau unchanged."""
    for i, row in enumerate(method.a):
        for j in range(1, len(row)):
            if (method.name, i) != ("fehlberg2", 2):  # a free parameter: its printed value is tested above
                yield {"a": (*method.a[:i], shift(row, j - 1, j), *method.a[i + 1 :])}
    for j in range(1, method.stages):
        yield wrong_solution_weights(method, j)
        if method.embedded_order is not None and method.embedded_order > 2:
            yield {"error": shift(method.error, j - 1, j)}
    for i, row in enumerate(method.dense or ()):
        for j in range(1, len(row)):
            yield {"dense": (*method.dense[:i], shift(row, j - 1, j), *method.dense[i + 1 :])}


def wrong_solution_weights(method: Tableau, j: int) -> dict[str, tuple]:
    wrong: dict[str, tuple] = {"b": shift(method.b, j - 1, j)}
    if method.dense is not None:
        last = shift(tuple(row[-1] for row in method.dense), j - 1, j)
        wrong["dense"] = tuple((*row[:-1], end) for row, end in zip(method.dense, last, strict=True))
    if method.fsal and j < method.stages - 1:
        wrong["a"] = (*method.a[:-1], wrong["b"][:-1])
    return wrong


@every
def test_a_wrong_digit_is_caught(name: str) -> None:
    for wrong in every_entry(METHODS[name]):
        with pytest.raises(ValueError, match=f"tableau {name}: "):
            dataclasses.replace(METHODS[name], **wrong)


@every
def test_wrong_digits_that_cancel_in_the_sums_are_caught(name: str) -> None:
    assert holds_claimed_orders(METHODS[name], residuals(name))
    for wrong in every_neutral_pair(METHODS[name]):
        method = dataclasses.replace(METHODS[name], **wrong)
        assert method.fsal != (name in FSAL) or not holds_claimed_orders(method, Residuals(method)), wrong


GOOD = {"order": 2, "c": "0 1", "a": "1", "b": "1/2 1/2", "source": "a test"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "one"}, "tableau new: a: .*'one'.*write each entry as"),
        ({"b": "1/0 1"}, "tableau new: b: "),
        ({"c": ""}, "c is empty"),
        ({"c": "1/2 1"}, "start with 0"),
        ({"a": "1 2"}, "a has 1 entries for 2 nodes; given 2"),
        ({"a": "1/2"}, "row 2 of a sums to c_2 = 1; given 1/2"),
        ({"b": "1"}, "b has one entry for each of the 2 nodes; given 1"),
        ({"b": "1/2 1/3"}, "b sums to 1; given 5/6"),
        ({"order": 0}, "order is at least 1; given 0"),
        ({"b_hat": "1", "embedded_order": 1}, "b_hat has as many entries as b; given 1"),
        ({"b_hat": "1 1", "embedded_order": 1}, "error sums to 0; given -1"),
        ({"b_hat": "1 0"}, "embedded_order is at least 1; given None"),
        ({"embedded_order": 1}, "embedded_order is None without the weights"),
        ({"dense": "1 -1/2 0", "dense_order": 2}, "equally many entries for each of 2 nodes; given 3"),
        ({"dense": "", "dense_order": 2}, "dense has equally many entries"),
        ({"dense": "1 0 0 1/2", "dense_order": 2}, "row 1 of dense sums to b_1 = 1/2; given 1"),
        ({"dense": "1 -1/2 0 1/2"}, "dense_order is at least 1; given None"),
    ],
)
def test_bad_tableaus_are_rejected(change: dict[str, object], message: str) -> None:
    Tableau.parse("new", **GOOD)
    with pytest.raises(ValueError, match=message):
        Tableau.parse("new", **(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": ((), (Fraction(1), Fraction(0)))}, "a has 2 rows of 0 to 1 entries"),
        ({"error": (Fraction(0),)}, "error has one entry for each of the 2 nodes; given 1"),
        ({"dense": ((Fraction(1, 2),), ())}, "dense has 2 rows of equal length"),
    ],
)
def test_bad_shapes_are_rejected_however_built(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(METHODS["adaptive_heun"], **change)


def test_dense_weights_need_dense_output() -> None:
    with pytest.raises(ValueError, match="euler has no dense output"):
        METHODS["euler"].dense_weights(0.5)
