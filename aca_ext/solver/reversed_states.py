"""Traversal of the states of a solve from last to first, as a backward pass needs them.

States that ``checkpoints`` did not keep are recomputed from the last state kept before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import comb

import torch
from torch import Tensor

ReversedStates = Iterator[tuple[int, Tensor, Tensor | None]]


def reversed_states(
    held: Sequence[tuple[int, Tensor]],
    n_steps: int,
    capacity: float,
    advance: Callable[[int, Tensor, Tensor], Tensor],
) -> ReversedStates:
    """Yields (n, state n, state n + 1) for every step, last to first, and recomputes states that were not kept.

    State ``n_steps`` is None if it was not kept. A row is reused once its state has been yielded, so that at most
    ``capacity`` states exist besides those of the current step and the last one. The first and the last state are never
    overwritten, so that a replay can be repeated and compared.

    Args:
        held: pairs (number of a state, row that holds it), with number -1 for a free row.
        capacity: largest number of states kept besides those of the current step and the last one.
        advance: ``advance(n, y, out)`` computes state n + 1 from state n into ``out`` and returns it.
    """
    kept = sorted(((n, row) for n, row in held if n >= 0), key=lambda entry: entry[0])
    free = [row for n, row in held if n < 0]

    def run(y: Tensor, first: int, last: int) -> Tensor:
        for n in range(first, last):
            y_next = advance(n, y, free.pop() if free else torch.empty_like(y))
            if n > first:
                free.append(y)
            y = y_next
        return y

    y_next = kept.pop()[1] if kept and kept[-1][0] == n_steps else None
    for n in reversed(range(n_steps)):
        start, y = kept[-1]
        while start < n:
            room = capacity - len(kept)
            goal = start + revolve(n - start + 1, int(room) + 1) if room else n
            y = run(y, start, goal)
            start = goal
            if room:
                kept.append((start, y))
        if kept[-1][0] == n:
            kept.pop()
        yield n, y, y_next
        if y_next is not None and n + 1 < n_steps:
            free.append(y_next)
        y_next = y


def brought_to(device: torch.device, states: ReversedStates) -> ReversedStates:
    """Moves the states to ``device``; each is copied once, although it starts one step and ends another."""
    brought: Tensor | None = None
    for n, y, y_next in states:
        if y.device == device:
            yield n, y, y_next
            continue
        if brought is None and y_next is not None:
            brought = y_next.to(device, non_blocking=True)
        start = y.to(device, non_blocking=True)
        yield n, start, brought
        brought = start


def distances(numbers: Sequence[int]) -> dict[int, int]:
    """Number of steps from each kept state back to the one kept before it; ``numbers`` has -1 for free rows."""
    return {end: end - start for start, end in pairwise(sorted(n for n in numbers if n >= 0))}


def revolve(n_steps: int, capacity: int) -> int:
    """Number of steps to advance from the first of ``n_steps`` steps to be reversed before the next state is kept.

    ``capacity`` counts the states with room, the first one included. This choice recomputes the fewest steps possible:
    r·n - C(capacity + r, r - 1), for the smallest r with n ≤ C(capacity + r, r) (Griewank & Walther, ACM Trans. Math.
    Softw. 26, 2000, algorithm "revolve").
    """
    r = 1
    while comb(capacity + r, r) < n_steps:
        r += 1
    return min(comb(capacity + r - 1, r - 1), n_steps - comb(capacity + r - 2, r - 1))
