"""Root of a function of one variable inside a bracket."""

from __future__ import annotations

from collections.abc import Callable


def bracketed_root(f: Callable[[float], float], a: float, fa: float, b: float, fb: float, tolerance: float) -> float:
    """The root of ``f`` between a < b, where its values ``fa`` and ``fb`` have opposite signs.

    The bracket shrinks to ``tolerance``; of its two ends, the one with the smaller value is returned.

    Source: the ITP method of Oliveira & Takahashi, ACM Trans. Math. Softw. 47 (2020), with κ1 = 0.2/(b - a), κ2 = 2 and
    n0 = 1: as fast as the secant method on smooth functions, and at most one evaluation more than bisection on any.
    """
    width, scale = b - a, 0.2 / (b - a)
    largest = width  # that bisection, one evaluation behind, would have left
    while b - a > tolerance and fa != 0 and fb != 0:
        middle = (a + b) / 2
        secant = (fb * a - fa * b) / (fb - fa)
        # Truncation: from the secant's root towards the middle, so that both ends of the bracket move.
        shift = min(scale * (b - a) ** 2, abs(middle - secant))
        x = secant + shift if secant < middle else secant - shift
        # Projection: never further from the middle than bisection allows.
        reach = largest - (b - a) / 2
        x = min(max(x, middle - reach), middle + reach)
        if not a < x < b:
            x = middle
        if not a < x < b:
            break
        fx = f(x)
        if (fx < 0) == (fa < 0) and fx != 0:
            a, fa = x, fx
        else:
            b, fb = x, fx
        largest /= 2
    return a if abs(fa) < abs(fb) else b
