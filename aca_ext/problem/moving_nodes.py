"""The nodes of a grid of fixed steps as functions of the requested times, for the gradient of these."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum, auto

from torch import Tensor


class NodesFollow(Enum):
    """The property that a node between requested times keeps when these move."""

    TIMES = auto()  # there is no such node
    NOTHING = auto()  # its time: nodes of option grid_constructor
    TIME_BEFORE = auto()  # its distance from the last requested time before it (option step_size)
    BOTH_ENDS = auto()  # its share of the whole solve (option n_steps)


class MovingNodes:
    """The nodes of a grid, each of which moves with at most two of the requested times.

    Args:
        lands: all requested times are nodes; else only the first and the last one are.
    """

    def __init__(self, nodes: Sequence[float], times: Sequence[float], follow: NodesFollow, lands: bool) -> None:
        self.nodes = nodes
        self._sign = 1.0 if times[-1] >= times[0] else -1.0
        self._sorted = [self._sign * node for node in nodes]
        first, last, n = times[0], times[-1], len(times) - 1
        places = {time: i for i, time in enumerate(times)} if lands else {first: 0, last: n}
        before = 0
        self._origins: list[Sequence[tuple[int, float]]] = []  # for each node indices of times, with their weights
        for node in nodes:
            at = places.get(node)
            if at is not None:
                before = at
                origins: Sequence[tuple[int, float]] = ((at, 1.0),)
            elif follow is NodesFollow.TIME_BEFORE:
                origins = ((before, 1.0),)
            elif follow is NodesFollow.BOTH_ENDS:
                share = (node - first) / (last - first)
                origins = (0, 1.0 - share), (n, share)
            else:
                origins = ()
            self._origins.append(origins)

    def shift(self, n: int, shifts: Tensor) -> Tensor:
        """The shift of node ``n`` if the requested times move by ``shifts``."""
        terms = [shifts[i] if weight == 1.0 else weight * shifts[i] for i, weight in self._origins[n]]
        return sum(terms[1:], terms[0]) if terms else shifts.new_zeros(())

    def shift_with_step(self, time: float, shifts: Tensor) -> Tensor:
        """The shift of a point at ``time`` that keeps its position in its step."""
        n = min(bisect_right(self._sorted, self._sign * time), len(self.nodes) - 1) - 1
        start, end = self.nodes[n], self.nodes[n + 1]
        share = (time - start) / (end - start)
        return (1.0 - share) * self.shift(n, shifts) + share * self.shift(n + 1, shifts)
