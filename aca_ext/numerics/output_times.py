"""Requested times that fall inside a step, and their positions in it."""

from __future__ import annotations

from collections.abc import Sequence


class OutputTimes:
    """Walks through the requested times once, in the direction of the solve."""

    def __init__(self, times: Sequence[float]) -> None:
        self._times = times
        self._sign = -1.0 if len(times) > 1 and times[1] < times[0] else 1.0
        self._next = 1  # the first time is the start

    @property
    def next(self) -> float:
        """The first time not passed yet, the end where all are."""
        return self._times[min(self._next, len(self._times) - 1)]

    def within(self, t: float, t_next: float) -> list[tuple[int, float]]:
        """(index, theta) of the requested times in (t, t_next]; theta is exactly 1 at t_next."""
        times, i, due = self._times, self._next, list[tuple[int, float]]()
        reached = self._sign * t_next
        while i < len(times) and self._sign * times[i] <= reached:
            due.append((i, 1.0 if times[i] == t_next else (times[i] - t) / (t_next - t)))
            i += 1
        self._next = i
        return due
