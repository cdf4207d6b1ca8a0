"""The nodes of a grid of fixed steps as functions of the requested times, for the gradient of these."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

import torch
from torch import Tensor


class NodesFollow(Enum):
    """What a node that is no requested time keeps when requested times move."""

    NOTHING = auto()  # its time: nodes of option grid_constructor
    TIME_BEFORE = auto()  # its distance from the last requested time before it (option step_size)
    BOTH_ENDS = auto()  # its share of the whole solve (option n_steps)


def shifts_of_nodes(
    grid: Sequence[float], times: Sequence[float], shifts: Tensor, follow: NodesFollow, lands: bool
) -> Tensor:
    """How far every node moves if the requested times move by ``shifts``; linear in these.

    ``lands`` tells whether all requested times are nodes; else only the first and the last one are.
    """
    first, last = times[0], times[-1]
    places = {time: i for i, time in enumerate(times)} if lands else {first: 0, last: len(times) - 1}
    before = 0
    origins: list[tuple[int, int]] = []
    weights: list[tuple[float, float]] = []
    for node in grid:
        at = places.get(node)
        if at is not None:
            before = at
            origin, weight = (at, at), (1.0, 0.0)
        elif follow is NodesFollow.TIME_BEFORE:
            origin, weight = (before, before), (1.0, 0.0)
        elif follow is NodesFollow.BOTH_ENDS:
            share = (node - first) / (last - first)
            origin, weight = (0, len(times) - 1), (1.0 - share, share)
        else:
            origin, weight = (0, 0), (0.0, 0.0)
        origins.append(origin)
        weights.append(weight)
    index = torch.tensor(origins, device=shifts.device)
    return (shifts[index] * torch.tensor(weights, dtype=shifts.dtype, device=shifts.device)).sum(-1)
