"""Which requested times fall inside a step, and at what theta; and how outputs become one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def stack_rows(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """torch.stack that keeps the memory format of ``like`` in every row; differentiable."""
    if like.numel() == 0:
        return torch.stack(list(rows))
    stride = like.stride()
    order = sorted(range(like.dim()), key=lambda d: (-stride[d], d))
    stacked = torch.stack([row.permute(order) for row in rows])
    inverse = [0] * len(order)
    for position, dimension in enumerate(order):
        inverse[dimension] = position + 1
    return stacked.permute(0, *inverse)
