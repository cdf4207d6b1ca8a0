"""The bracketing root finder."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from aca_ext.numerics.root import bracketed_root

TOLERANCE = 2.0**-52


@pytest.mark.parametrize(
    ("f", "root"),
    [
        (lambda x: x - 0.3, 0.3),
        (lambda x: math.cos(x) - x, 0.7390851332151607),
        (lambda x: x**9 - 1e-3, 1e-3 ** (1 / 9)),
        (lambda x: math.tanh(50 * (x - 0.9)), 0.9),
        (lambda x: (x - 0.4) ** 3, 0.4),
        (lambda x: -1.0 if x < 0.123 else 1.0, 0.123),
        (lambda x: 1e-9 - x, 1e-9),
        (lambda x: math.exp(-30 * x) - 1e-12, math.log(1e12) / 30),
    ],
)
def test_roots_to_the_last_bits(f: Callable[[float], float], root: float) -> None:
    calls: list[float] = []

    def counted(x: float) -> float:
        calls.append(x)
        return f(x)

    found = bracketed_root(counted, 0.0, f(0.0), 1.0, f(1.0), TOLERANCE)
    assert abs(found - root) <= 4 * TOLERANCE or f(found) == 0
    assert len(calls) <= 66  # bisection takes 52
    assert all(0 < x < 1 for x in calls)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: math.exp(-30 * x) - 1e-12,
        lambda x: -1e-300 if x > 0.45 else 7.3 - 500 * x * x,  # as where another condition ends the search
    ],
)
def test_recovers_from_a_bad_start(f: Callable[[float], float]) -> None:
    calls: list[float] = []

    def counted(x: float) -> float:
        calls.append(x)
        return f(x)

    bracketed_root(counted, 0.0, f(0.0), 1.0, f(1.0), TOLERANCE)
    assert len(calls) <= 20


def test_a_root_at_an_end() -> None:
    assert bracketed_root(lambda x: x, 0.0, 0.0, 1.0, 1.0, TOLERANCE) == 0.0
    assert bracketed_root(lambda x: x - 1, 0.0, -1.0, 1.0, 0.0, TOLERANCE) == 1.0
