"""IMPLICIT_METHODS and ROSENBROCK_METHODS: coefficients of the methods for stiff problems, with their sources.

Coefficients are exact, or correct to about 40 decimals where they contain a root; those of kvaerno5 and rodas5p are
the published ones, of about 16 digits. The tests prove the order and the stability of every entry.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import isqrt

from aca_ext.numerics.implicit import ImplicitTableau, Matrix, RosenbrockTableau
from aca_ext.numerics.tableau import parse_row
from aca_ext.numerics.weights import Row, hermite_rows, integrated_rows, row_sum

Entry = Fraction | int


def _root(number: int) -> Fraction:
    """The square root, rounded down to 40 decimals."""
    return Fraction(isqrt(number * 10**80), 10**40)


def _row(*entries: Entry) -> Row:
    return tuple(map(Fraction, entries))


def _difference(left: Row, right: Row) -> Row:
    return tuple(x - y for x, y in zip(left, right, strict=True))


def _one_step(
    name: str,
    order: int,
    a: Matrix,
    source: str,
    *,
    b: Row | None = None,
    b_hat: Row | None = None,
    embedded_order: int | None = None,
    error_filter: Fraction | None = None,
) -> ImplicitTableau:
    """Builds an entry: nodes are row sums, and b is the last row of ``a`` unless given.

    A method with an error estimate gets cubic Hermite interpolation as dense output: it has the slopes of both ends.
    Kvaerno publishes no other for his methods, and diffrax interpolates them so, too.
    """
    b = a[-1] if b is None else b
    return ImplicitTableau(
        name=name,
        order=order,
        c=tuple(map(row_sum, a)),
        a=a,
        b=b,
        error=None if b_hat is None else _difference(b, b_hat),
        embedded_order=embedded_order,
        dense=None if b_hat is None else hermite_rows(b),
        dense_order=None if b_hat is None else min(order, 3),
        source=source,
        error_filter=error_filter,
    )


def _sdirk2() -> ImplicitTableau:
    gamma = 1 - _root(2) / 2
    a = (_row(gamma, 0), _row(1 - gamma, gamma))
    return _one_step("sdirk2", 2, a, "Alexander, SIAM J. Numer. Anal. 14 (1977), with the smaller gamma")


def _trbdf2() -> ImplicitTableau:
    gamma, w = 1 - _root(2) / 2, _root(2) / 4
    a = (_row(0, 0, 0), _row(gamma, gamma, 0), _row(w, w, gamma))
    return _one_step(
        "trbdf2",
        2,
        a,
        "Hosea & Shampine, Appl. Numer. Math. 20 (1996), with its estimate of order 3; dense: cubic Hermite",
        b_hat=_row((1 - w) / 3, (1 + 3 * w) / 3, gamma / 3),
        embedded_order=3,
        error_filter=gamma,
    )


def _kvaerno3() -> ImplicitTableau:
    # The root of x^3 - 3 x^2 + 3/2 x - 1/6 in (0.4, 0.5), to 40 decimals: only with it is the method L-stable. With
    # 0.4358665215, as OrdinaryDiffEq.jl and diffrax have it, R(inf) is 6e-11 instead of 0.
    gamma = Fraction("0.4358665215084589994160194511935568425293")
    third = _row((-4 * gamma**2 + 6 * gamma - 1) / (4 * gamma), (1 - 2 * gamma) / (4 * gamma), gamma, 0)
    fourth = _row(
        (6 * gamma - 1) / (12 * gamma),
        -1 / ((24 * gamma - 12) * gamma),
        (-6 * gamma**2 + 6 * gamma - 1) / (6 * gamma - 3),
        gamma,
    )
    return _one_step(
        "kvaerno3",
        3,
        (_row(0, 0, 0, 0), _row(gamma, gamma, 0, 0), third, fourth),
        "ESDIRK 3/2 with both solutions stiffly accurate: Kvaerno, BIT 44 (2004); dense: cubic Hermite",
        b_hat=third,
        embedded_order=2,
    )


def _kvaerno5() -> ImplicitTableau:
    a = tuple(
        parse_row(f"tableau kvaerno5: row {i} of a", text)
        for i, text in enumerate(
            (
                "0  0  0  0  0  0  0",
                "0.26  0.26  0  0  0  0  0",
                "0.13  0.84033320996790809  0.26  0  0  0  0",
                "0.22371961478320505  0.47675532319799699  -0.06470895363112615  0.26  0  0  0",
                "0.16648564323248321  0.1045001884159172  0.03631482272098715  -0.13090704451073998  0.26  0  0",
                "0.13855640231268224  0  -0.04245337201752043  0.02446657898003141  0.61943039072480676  0.26  0",
                "0.13659751177640291  0  -0.05496908796538376  -0.04118626728321046  0.62993304899016403"
                "  0.06962479448202728  0.26",
            ),
            start=1,
        )
    )
    return _one_step(
        "kvaerno5",
        5,
        a,
        "ESDIRK 5/4 with both solutions stiffly accurate: Kvaerno, BIT 44 (2004); dense: cubic Hermite",
        b_hat=a[-2],
        embedded_order=4,
    )


def _gl4() -> ImplicitTableau:
    r = _root(3) / 6
    quarter = Fraction(1, 4)
    a = (_row(quarter, quarter - r), _row(quarter + r, quarter))
    half = Fraction(1, 2)
    return _one_step("gl4", 4, a, "Gauss: Hairer & Wanner, Solving ODEs II, table IV.5.1", b=_row(half, half))


def _gl6() -> ImplicitTableau:
    r = _root(15)
    first, middle = Fraction(5, 36), Fraction(2, 9)
    a = (
        _row(first, middle - r / 15, first - r / 30),
        _row(first + r / 24, middle, first - r / 24),
        _row(first + r / 30, middle + r / 15, first),
    )
    b = _row(2 * first, 2 * middle, 2 * first)
    return _one_step("gl6", 6, a, "Gauss: Hairer & Wanner, Solving ODEs II, table IV.5.2", b=b)


def _radau_iia3() -> ImplicitTableau:
    a = (_row(Fraction(5, 12), Fraction(-1, 12)), _row(Fraction(3, 4), Fraction(1, 4)))
    return _one_step("radauIIA3", 3, a, "Radau IIA: Hairer & Wanner, Solving ODEs II, table IV.5.5")


def _radau_iia5() -> ImplicitTableau:
    r = _root(6)
    a = (
        _row((88 - 7 * r) / 360, (296 - 169 * r) / 1800, (-2 + 3 * r) / 225),
        _row((296 + 169 * r) / 1800, (88 + 7 * r) / 360, (-2 - 3 * r) / 225),
        _row((16 - r) / 36, (16 + r) / 36, Fraction(1, 9)),
    )
    return _one_step("radauIIA5", 5, a, "Radau IIA: Hairer & Wanner, Solving ODEs II, table IV.5.6")


def _radau5() -> ImplicitTableau:
    """radauIIA5 with Hairer's error estimate, for which the slope at the start of the step is a stage."""
    stages = _radau_iia5().a
    # The root of x^3 - 3/5 x^2 + 3/20 x - 1/60, the real eigenvalue of the matrix of these stages, to 40 decimals.
    gamma = Fraction("0.2748888295956773677478286035994147792945")
    r = 7 * _root(6)
    of_stages = _row((-13 - r) / 3, (-13 + r) / 3, Fraction(-1, 3))  # weights of the states less the start
    of_slopes = (sum(weight * row[j] for weight, row in zip(of_stages, stages, strict=True)) for j in range(3))
    a = (_row(0, 0, 0, 0), *(_row(0, *row) for row in stages))
    method = _one_step(
        "radau5",
        5,
        a,
        "Radau IIA: Hairer & Wanner, Solving ODEs II, table IV.5.6, estimate: IV.8, eq. (8.19); dense: all slopes",
        b_hat=tuple(b + gamma * e for b, e in zip(a[-1], (1, *of_slopes), strict=True)),
        embedded_order=3,
        error_filter=gamma,
    )
    # As the stages are of order 3, the polynomial through all four slopes gives the state to order 4.
    return replace(method, dense=integrated_rows(method.c), dense_order=4)


_RODAS5P_INTERPOLATION = (
    """25.948786856663858  -2.5579724845846235  10.433815404888879  -2.3679251022685204  0.524948541321073
       1.1241088310450404  0.4272876194431874  -0.17202221070155493""",
    """-9.91568850695171  -0.9689944594115154  3.0438037242978453  -24.495224566215796  20.176138334709044
       15.98066361424651  -6.789040303419874  -6.710236069923372""",
    """11.419903575922262  2.8879645146136994  72.92137995996029  80.12511834622643  -52.072871366152654
       -59.78993625266729  -0.15582684282751913  4.883087185713722""",
)


def _rodas5p() -> RosenbrockTableau:
    what = "tableau rodas5p"
    last = "-7.502846399306121  2.561846144803919  -11.627539656261098  -0.18268767659942256  0.030198172008377946"
    a = (
        "",
        "3",
        "2.849394379747939  0.45842242204463923",
        "-6.954028509809101  2.489845061869568  -10.358996098473584",
        "2.8029986275628964  0.5072464736228206  -0.3988312541770524  -0.04721187230404641",
        last,
        f"{last}  1",
        f"{last}  1  1",
    )
    coupling = (
        "",
        "-14.155112264123755",
        "-17.97296035885952  -2.859693295451294",
        "147.12150275711716  -1.41221402718213  71.68940251302358",
        "165.43517024871676  -0.4592823456491126  42.90938336958603  -5.961986721573306",
        "24.854864614690072  -3.0009227002832186  47.4931110020768  5.5814197821558125  -0.6610691825249471",
        """30.91273214028599  -3.1208243349937974  77.79954646070892  34.28646028294783  -19.097331116725623
           -28.087943162872662""",
        """37.80277123390563  -3.2571969029072276  112.26918849496327  66.9347231244047  -40.06618937091002
           -54.66780262877968  -9.48861652309627""",
    )
    b = parse_row(what, f"{last}  1  1  1")
    return RosenbrockTableau(
        name="rodas5p",
        order=5,
        gamma=Fraction("0.21193756319429014"),
        c=parse_row(what, "0  0.6358126895828704  0.4095798393397535  0.9769306725060716  0.4288403609558664  1  1  1"),
        d=parse_row(
            what,
            """0.21193756319429014  -0.42387512638858027  -0.3384627126235924  1.8046452872882734  2.325825639765069
               0  0  0""",
        ),
        a=tuple(parse_row(what, row) for row in a),
        coupling=tuple(parse_row(what, row) for row in coupling),
        b=b,
        error=_row(*[0] * 7, 1),
        embedded_order=4,
        dense=_polynomials(b, tuple(parse_row(what, row) for row in _RODAS5P_INTERPOLATION)),
        dense_order=4,
        source="Steinebach, BIT 63 (2023), article 27, with the numbers of OrdinaryDiffEq.jl",
    )


def _polynomials(b: Row, rows: Matrix) -> Matrix:
    """Coefficients of theta, theta^2, ... in ``theta b + theta (1 - theta) (rows_1 + theta rows_2 + ...)``."""
    zeros = (Fraction(0),) * len(b)
    first = tuple(x + y for x, y in zip(b, rows[0], strict=True))
    others = (_difference(new, old) for old, new in pairwise((*rows, zeros)))
    return tuple(zip(first, *others, strict=True))


_ENTRIES = (
    _one_step("implicit_euler", 1, (_row(1),), "Radau IIA: Hairer & Wanner, Solving ODEs II, table IV.5.5"),
    _one_step(
        "implicit_midpoint",
        2,
        (_row(Fraction(1, 2)),),
        "Gauss: Hairer & Wanner, Solving ODEs II, table IV.5.1",
        b=_row(1),
    ),
    _one_step(
        "trapezoid",
        2,
        (_row(0, 0), _row(Fraction(1, 2), Fraction(1, 2))),
        "Lobatto IIIA: Hairer & Wanner, Solving ODEs II, table IV.5.7",
    ),
    _sdirk2(),
    _trbdf2(),
    _radau_iia3(),
    _radau_iia5(),
    _gl4(),
    _gl6(),
    _kvaerno3(),
    _kvaerno5(),
    _radau5(),
)

# Implicit methods by the name that ``odeint`` takes as ``method``. Those of fixed steps have the names and coefficients
# of torchdiffeq (compared entry by entry with fixed_grid_implicit.py at 657943a), except for its gl4: there, both nodes
# are 1/2 - sqrt(3)/6, so that its order is lost if f depends on t.
IMPLICIT_METHODS: dict[str, ImplicitTableau] = {entry.name: entry for entry in _ENTRIES}

# Linearly implicit methods, which ``odeint`` takes by name too.
ROSENBROCK_METHODS: dict[str, RosenbrockTableau] = {"rodas5p": _rodas5p()}
