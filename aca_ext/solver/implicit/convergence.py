"""Convergence of simplified Newton iterations, judged by the sizes of their changes. See ``rows`` for the types.

Source: Hairer & Wanner, Solving ODEs II, IV.8.
"""

from __future__ import annotations

import numpy as np

from aca_ext.solver.implicit.rows import Mask, Numbers, is_any, larger, other_than, where

MOST_ITERATIONS = 10
_FAST = 0.02  # contraction above which the Jacobian is evaluated again for the next step
# Lowest rate that counts: the first iterations converge faster than the components that an old Jacobian leaves.
_LOWEST_RATE = 0.1
_LARGEST_AT_FIRST = 3.0  # contraction of the second change that may still be one of a convergent iteration
_INFINITE = 1e300


class Convergence:
    """The iterations of a group of stages, in each row.

    Args:
        active: rows that iterate.
        wanted: largest error of the solution, in the units of the changes.
        rate: error of an iterate in units of its last change, as known before; 1 if the matrix is new.
        is_slow: initial value of the attribute.

    Attributes:
        active: rows that need another iteration.
        solved: rows that have converged.
        rate: those of the solved rows at their end.
        is_slow: True if the last contraction was slow.
    """

    def __init__(self, active: Mask, wanted: Numbers, rate: Numbers, is_slow: Mask) -> None:
        self.active, self.rate, self.is_slow = active, rate, is_slow
        self.solved = active & other_than(active)
        self._wanted, self._rate = wanted, rate
        self._sizes: list[Numbers] = []

    def judge(self, size: Numbers) -> Mask:
        """Judges an iteration by the sizes of its changes; returns the rows that have not diverged in it."""
        if isinstance(size, float):
            return self._judge(size)
        with np.errstate(all="ignore"):  # rows that are not active may have any numbers
            return self._judge(size)

    def _judge(self, size: Numbers) -> Mask:
        sizes, n = self._sizes, len(self._sizes) + 1
        sizes.append(size)
        going, rate = self.active & (size < _INFINITE), self._rate
        if n > 1 and is_any(going):
            # Over two iterations if possible: the first change may be small in the components that converge last.
            contraction = size / sizes[-2] if n == 2 else (size / sizes[-3]) ** 0.5
            going = going & (contraction < (_LARGEST_AT_FIRST if n == 2 else 1.0))
            left = larger(1.0 - contraction, 1 / _INFINITE)
            rate = where(going, larger(_LOWEST_RATE, contraction / left), rate)
            if n > 2 and is_any(going):
                last = rate * size * where(going, contraction, 1.0) ** (MOST_ITERATIONS - n)
                going = going & (last <= self._wanted)
            self.is_slow = where(going, contraction > _FAST, self.is_slow)
            self._rate = rate
        done = going & ((size == 0) | (rate * size <= self._wanted))
        before = self.rate
        self.rate = where(done, where(before == 1.0, rate, larger(before, rate)), before)
        self.solved = self.solved | done
        self.active = going & other_than(done) & (n < MOST_ITERATIONS)
        return going
