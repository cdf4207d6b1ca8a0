"""The eigenvalue estimate on linear problems, its limits against the stability functions, and the count."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from stability import StabilityFunction

from aca_ext.numerics.methods import METHODS
from aca_ext.numerics.stiffness import EigenvalueEstimate, StiffnessCount
from aca_ext.numerics.tableau import Tableau

CAPABLE = ("tsit5", "dopri5", "dopri8")
capable = pytest.mark.parametrize("name", CAPABLE)


def estimate_of(name: str) -> EigenvalueEstimate:
    estimate = EigenvalueEstimate.of(METHODS[name])
    assert estimate is not None
    return estimate


def step(tableau: Tableau, matrix: np.ndarray, y: np.ndarray, h: float) -> tuple[list[np.ndarray], np.ndarray]:
    """The slopes and the new state of a step for y' = matrix y."""
    slopes: list[np.ndarray] = []
    for row in tableau.a:
        state = y + h * sum(float(a) * k for a, k in zip(row, slopes, strict=True))
        slopes.append(matrix @ state)
    return slopes, y + h * sum(float(b) * k for b, k in zip(tableau.b, slopes, strict=True))


def distances(estimate: EigenvalueEstimate, slopes: list[np.ndarray]) -> tuple[float, float]:
    state = sum(w * k for w, k in zip(estimate.weights, slopes, strict=True))
    return float(np.linalg.norm(slopes[-1] - slopes[-2])), float(np.linalg.norm(state))


def test_methods_without_two_stages_at_one_node_have_no_estimate() -> None:
    assert {name for name, method in METHODS.items() if EigenvalueEstimate.of(method) is not None} == set(CAPABLE)


@capable
def test_the_two_stages_have_the_same_node(name: str) -> None:
    assert METHODS[name].c[-2:] == (1, 1)


@capable
def test_estimate_is_exact_for_a_scalar_problem(name: str) -> None:
    h, rate = 0.3, -7.0
    slopes, _ = step(METHODS[name], np.array([[rate]]), np.ones(1), h)
    slope, state = distances(estimate_of(name), slopes)
    assert slope / state == pytest.approx(h * abs(rate), rel=1e-9)


@capable
def test_limit_is_nine_tenths_of_the_stability_interval(name: str) -> None:
    method, end = METHODS[name], estimate_of(name).limit / 0.9
    rows = tuple((*row, *[Fraction(0)] * (method.stages - len(row))) for row in method.a)
    r = StabilityFunction.of(rows, method.b, Fraction(1, 10**30))
    inside = np.linspace(1e-3, end - 2e-4, 5000)
    powers = [float(p) for p in reversed(r.numerator)]
    assert np.all(np.abs(np.polyval(powers, -inside)) <= 1)
    assert abs(np.polyval(powers, -(end + 2e-4))) > 1


@capable
@pytest.mark.parametrize(("size", "is_stiff"), [(0.5, False), (1.0, True)])
def test_count_at_a_share_of_the_stability_interval(name: str, size: float, is_stiff: bool) -> None:
    """A fast and a slow component, coupled, where the fast one has decayed and only the step keeps it alive."""
    estimate = estimate_of(name)
    rate = 1000.0
    matrix = np.array([[-rate, rate], [0.0, -1.0]])
    h, y, count = size * estimate.limit / 0.9 / rate, np.array([1.001, 1.0]), StiffnessCount(estimate.limit)
    for _ in range(40):
        slopes, y = step(METHODS[name], matrix, y, h)
        count.observe(*distances(estimate, slopes))
    assert count.is_stiff == is_stiff


def test_count_needs_fifteen_stiff_steps_and_six_others_end_it() -> None:
    count = StiffnessCount(limit=3.0)
    for expected in [False] * 14 + [True]:
        count.observe(4.0, 1.0)
        count.observe(1.0, 1.0)  # single steps of the other kind do not matter
        assert count.is_stiff == expected
    for expected in [True] * 4 + [False]:
        count.observe(2.9, 1.0)
        assert count.is_stiff == expected


def test_equal_slopes_are_not_stiff_and_nan_is() -> None:
    count = StiffnessCount(limit=3.0)
    count.observe(0.0, 0.0)
    assert count.stiff == 0
    count.observe(float("nan"), 1.0)
    assert count.stiff == 1
