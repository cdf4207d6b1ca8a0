"""Operations on single numbers: their C++ on lanes, and the C++ of their derivatives.

In a text ``{0}``, ``{1}``, ... stand for the operands, ``{r}`` for the result and ``{g}`` for its cotangent. At kinks
and poles the derivatives are those of PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Operation:
    """An operation on numbers.

    Attributes:
        text: C++ of the result.
        pullbacks: C++ of the cotangent of each operand; None where the derivative is zero.
        is_mask: whether the result is true or false rather than a number.
    """

    text: str
    pullbacks: tuple[str | None, ...]
    is_mask: bool = False


def _mask(text: str, n: int = 2) -> Operation:
    return Operation(text, (None,) * n, is_mask=True)


ADD = Operation("{0} + {1}", ("{g}", "{g}"))
SUBTRACT = Operation("{0} - {1}", ("{g}", "-{g}"))
MULTIPLY = Operation("{0} * {1}", ("{g} * {1}", "{g} * {0}"))
DIVIDE = Operation("{0} / {1}", ("{g} / {1}", "-{g} * ({r} / {1})"))
MULTIPLY_ADD = Operation("fma({0}, {1}, {2})", ("{g} * {1}", "{g} * {0}", "{g}"))
ADD_PRODUCT = Operation("{0} + {3} * ({1} * {2})", ("{g}", "{g} * ({3} * {2})", "{g} * ({3} * {1})", None))
ADD_QUOTIENT = Operation(
    "{0} + {3} * ({1} / {2})", ("{g}", "{g} * ({3} / {2})", "-{g} * ({3} * {1} / ({2} * {2}))", None)
)
NEGATE = Operation("-{0}", ("-{g}",))
SELECT = Operation("select({0}, {1}, {2})", (None, "select({0}, {g}, K(0))", "select({0}, K(0), {g})"))
MAXIMUM = Operation(
    "maximum({0}, {1})",
    (
        "select({0} == {1}, {g} * K(0.5), select({0} < {1}, K(0), {g}))",
        "select({0} == {1}, {g} * K(0.5), select({1} < {0}, K(0), {g}))",
    ),
)
MINIMUM = Operation(
    "minimum({0}, {1})",
    (
        "select({0} == {1}, {g} * K(0.5), select({0} > {1}, K(0), {g}))",
        "select({0} == {1}, {g} * K(0.5), select({1} > {0}, K(0), {g}))",
    ),
)


@cache
def clamps(of_x: float, of_bound: float) -> tuple[Operation, Operation, Operation]:
    """``clamp`` with a lower bound, an upper bound, and both.

    ``of_x`` and ``of_bound`` are the derivatives at the bound, which differ between versions of PyTorch.
    """
    x, bound = f"{{g}} * K({of_x})", f"{{g}} * K({of_bound})"
    below = Operation(
        "maximum({0}, {1})",
        (
            f"select({{0}} > {{1}}, {{g}}, select({{0}} == {{1}}, {x}, K(0)))",
            f"select({{0}} < {{1}}, {{g}}, select({{0}} == {{1}}, {bound}, K(0)))",
        ),
    )
    above = Operation(
        "minimum({0}, {1})",
        (
            f"select({{0}} < {{1}}, {{g}}, select({{0}} == {{1}}, {x}, K(0)))",
            f"select({{0}} > {{1}}, {{g}}, select({{0}} == {{1}}, {bound}, K(0)))",
        ),
    )
    between = Operation(
        "minimum(maximum({0}, {1}), {2})",
        (
            f"select(({{0}} > {{1}}) & ({{0}} < {{2}}), {{g}}, select(({{0}} >= {{1}}) & ({{0}} <= {{2}}), {x}, K(0)))",
            f"select({{1}} < {{2}}, select({{0}} < {{1}}, {{g}}, select({{0}} == {{1}}, {bound}, K(0))), K(0))",
            f"select(({{0}} > {{2}}) | ({{2}} < {{1}}), {{g}}, select({{0}} == {{2}}, {bound}, K(0)))",
        ),
    )
    return below, above, between


REMAINDER = Operation("remainder({0}, {1})", ("{g}", "-{g} * floor({0} / {1})"))
FLOOR_DIVIDE = Operation("floor_divide({0}, {1})", (None, None))
FMOD = Operation("fmod({0}, {1})", ("{g}", "-{g} * trunc({0} / {1})"))
ATAN2 = Operation("atan2({0}, {1})", ("{g} * {1} / ({0} * {0} + {1} * {1})", "{g} * -{0} / ({0} * {0} + {1} * {1})"))
HYPOT = Operation("hypot({0}, {1})", ("{g} * ({0} / {r})", "{g} * ({1} / {r})"))
HELD = Operation("{0}", (None,))  # no gradient passes
LESS = _mask("({0} < {1})")
LESS_EQUAL = _mask("({0} <= {1})")
GREATER = _mask("({0} > {1})")
GREATER_EQUAL = _mask("({0} >= {1})")
EQUAL = _mask("({0} == {1})")
NOT_EQUAL = _mask("({0} != {1})")
AND = _mask("({0} & {1})")
OR = _mask("({0} | {1})")
XOR = _mask("({0} ^ {1})")
NOT = _mask("(~{0})", 1)
IS_NAN = _mask("({0} != {0})", 1)
IS_INFINITE = _mask("(magnitude({0}) == K(kInfinity))", 1)
TRUTH = _mask("({0} != K(0))", 1)
NUMBER = Operation("select({0}, K(1), K(0))", (None,))  # of what is true or false
POWER = Operation(
    "power({0}, {1})",
    (
        "select({1} == K(0), K(0), {g} * ({1} * power({0}, {1} - K(1))))",
        "{g} * select(({0} == K(0)) & ({1} >= K(0)), K(0), {r} * log({0}))",
    ),
)

# Functions of one number, by the names of aten's operations.
FUNCTIONS = {
    "abs": Operation("magnitude({0})", ("{g} * sign({0})",)),
    "sgn": Operation("sign({0})", (None,)),
    "sign": Operation("sign({0})", (None,)),
    "floor": Operation("floor({0})", (None,)),
    "ceil": Operation("ceil({0})", (None,)),
    "trunc": Operation("trunc({0})", (None,)),
    "round": Operation("round({0})", (None,)),
    "sqrt": Operation("sqrt({0})", ("{g} / (K(2) * {r})",)),
    "rsqrt": Operation("K(1) / sqrt({0})", ("K(-0.5) * {g} * ({r} * {r} * {r})",)),
    "reciprocal": Operation("K(1) / {0}", ("-{g} * ({r} * {r})",)),
    "exp": Operation("exp({0})", ("{g} * {r}",)),
    "exp2": Operation("exp2({0})", ("{g} * {r} * K(0.69314718055994530942)",)),
    "expm1": Operation("expm1({0})", ("{g} * ({r} + K(1))",)),
    "log": Operation("log({0})", ("{g} / {0}",)),
    "log2": Operation("log2({0})", ("{g} / ({0} * K(0.69314718055994530942))",)),
    "log10": Operation("log10({0})", ("{g} / ({0} * K(2.3025850929940456840))",)),
    "log1p": Operation("log1p({0})", ("{g} / ({0} + K(1))",)),
    "sin": Operation("sin({0})", ("{g} * cos({0})",)),
    "cos": Operation("cos({0})", ("-{g} * sin({0})",)),
    "tan": Operation("tan({0})", ("{g} * (K(1) + {r} * {r})",)),
    "asin": Operation("asin({0})", ("{g} / sqrt(K(1) - {0} * {0})",)),
    "acos": Operation("acos({0})", ("-{g} / sqrt(K(1) - {0} * {0})",)),
    "atan": Operation("atan({0})", ("{g} / ({0} * {0} + K(1))",)),
    "sinh": Operation("sinh({0})", ("{g} * cosh({0})",)),
    "cosh": Operation("cosh({0})", ("{g} * sinh({0})",)),
    "tanh": Operation("tanh({0})", ("{g} * (K(1) - {r} * {r})",)),
    "asinh": Operation("asinh({0})", ("{g} / sqrt({0} * {0} + K(1))",)),
    "acosh": Operation("acosh({0})", ("{g} / sqrt({0} * {0} - K(1))",)),
    "atanh": Operation("atanh({0})", ("{g} / (K(1) - {0} * {0})",)),
    "sigmoid": Operation("K(1) / (K(1) + exp(-{0}))", ("{g} * (K(1) - {r}) * {r}",)),
    "relu": Operation("maximum({0}, K(0))", ("select({r} > K(0), {g}, K(0))",)),
    "erf": Operation("erf({0})", ("K(1.1283791670955125739) * exp(-({0} * {0})) * {g}",)),
    "erfc": Operation("erfc({0})", ("K(-1.1283791670955125739) * exp(-({0} * {0})) * {g}",)),
}  # fmt: skip


@cache
def power_of(exponent: float) -> Operation:
    """x to the power of a constant."""
    if exponent == 0:
        return Operation("K(1)", (None,))
    derivative = f"{{g}} * (K({exponent!r}) * {_power_text(exponent - 1)})"
    return Operation(_power_text(exponent), (derivative,))


def _power_text(exponent: float) -> str:
    if exponent == 0:
        return "K(1)"
    if exponent == int(exponent) and abs(exponent) <= 8:
        product = f"multiplied<{abs(int(exponent))}>({{0}})"
        return product if exponent > 0 else f"(K(1) / {product})"
    if exponent == 0.5:
        return "sqrt({0})"
    return f"power({{0}}, K({exponent!r}))"


@cache
def softplus_of(beta: float, threshold: float) -> Operation:
    """log(1 + exp(beta·x)) / beta, and x itself where beta·x is above the threshold."""
    scaled = f"({{0}} * K({beta!r}))"
    above = f"({scaled} > K({threshold!r}))"
    value = f"select({above}, {{0}}, log1p(exp({scaled})) / K({beta!r}))"
    pulled = f"select({above}, {{g}}, {{g}} * (exp({scaled}) / (exp({scaled}) + K(1))))"
    return Operation(value, (pulled,))


@cache
def leaky_of(slope: float) -> Operation:
    """x where it is positive, else slope·x."""
    return Operation(
        f"select({{0}} > K(0), {{0}}, {{0}} * K({slope!r}))",
        (f"select({{0}} > K(0), {{g}}, {{g}} * K({slope!r}))",),
    )
