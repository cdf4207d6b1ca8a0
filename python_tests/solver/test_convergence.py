"""Convergence of Newton's method: rows judged together against each row alone, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from aca_ext.solver.implicit.convergence import MOST_ITERATIONS, Convergence

WANTED = 1e-3
# Sizes of the changes of a row in successive iterations, and the number of iterations until it has converged, or None.
COURSES: dict[str, tuple[list[float], int | None]] = {
    "at once": ([0.0], 1),
    "with the rate of an old Jacobian": ([1e-4], 1),
    "fast": ([1.0, 1e-2], 2),
    "after a larger second change": ([1e-2, 2e-2, 1e-4, 1e-8], 3),
    "too slowly": ([1.0, 0.9, 0.8, 0.7], None),
    "with a growing change": ([1.0, 5.0, 25.0], None),
    "with an infinite change": ([1.0, np.inf], None),
    "with a change that is not a number": ([1.0, np.nan], None),
}


def iterations_of(course: list[float]) -> tuple[int | None, float, bool]:
    one = Convergence(True, WANTED, 1.0, False)
    for n, size in enumerate(course, start=1):
        one.judge(size)
        if not one.active:
            return (n if one.solved else None), one.rate, one.is_slow
    raise AssertionError("the course is too short")


@pytest.mark.parametrize("name", COURSES)
def test_of_one_row(name: str) -> None:
    course, expected = COURSES[name]
    assert iterations_of(course)[0] == expected


def test_of_rows_is_that_of_each_row_alone() -> None:
    courses = [course for course, _ in COURSES.values()]
    n = len(courses)
    every = Convergence(np.ones(n, dtype=np.bool_), np.full(n, WANTED), np.ones(n), np.zeros(n, dtype=np.bool_))
    for i in range(MOST_ITERATIONS):
        if not every.active.any():
            break
        every.judge(np.array([course[i] if i < len(course) else np.nan for course in courses]))
    alone = [iterations_of(course) for course in courses]
    assert every.solved.tolist() == [n is not None for n, _, _ in alone]
    assert every.rate.tolist() == [rate for _, rate, _ in alone]
    assert every.is_slow.tolist() == [is_slow for _, _, is_slow in alone]


def test_iterations_end() -> None:
    """A row that hovers above the tolerance is given up."""
    one, n = Convergence(True, 1e-6, 1.0, False), 0
    while one.active:
        n += 1
        one.judge(2e-6 * 0.99**n)
    assert n <= MOST_ITERATIONS
    assert not one.solved


def test_a_row_that_does_not_iterate_stays_as_it_is() -> None:
    every = Convergence(np.array([True, False]), np.full(2, WANTED), np.ones(2), np.array([False, True]))
    assert every.judge(np.array([0.0, 0.0])).tolist() == [True, False]
    assert every.solved.tolist() == [True, False]
    assert every.is_slow.tolist() == [False, True]
