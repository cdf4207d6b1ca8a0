"""Solution of tridiagonal systems by cyclic reduction, all rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_tridiagonal(lower: Tensor, diagonal: Tensor, upper: Tensor, right: Tensor) -> Tensor:
    """x of lower[i]·x[i-1] + diagonal[i]·x[i] + upper[i]·x[i+1] = right[i], along the last dimension.

    Each of log2(n) rounds takes from every row those ``stride`` before and behind it, which doubles the distance of the
    unknowns that it couples. Stable without pivots, since the diagonals here dominate. Elimination row by row needs
    fewer operations, but 2n dependent ones, each of which would be a call of PyTorch.

    Args:
        lower, diagonal, upper, right: (..., n), of shapes that broadcast; lower[..., 0] and upper[..., -1] are zero.

    Returns:
        (..., n), differentiable with respect to all four.

    Source: Hockney & Jesshope, Parallel Computers (parallel cyclic reduction).
    """
    lower, diagonal, upper, right = torch.broadcast_tensors(lower, diagonal, upper, right)
    n, stride = right.shape[-1], 1
    while stride < n:
        below = -lower / _moved(diagonal, stride, 1.0)
        above = -upper / _moved(diagonal, -stride, 1.0)
        diagonal = diagonal + below * _moved(upper, stride) + above * _moved(lower, -stride)
        right = right + below * _moved(right, stride) + above * _moved(right, -stride)
        lower, upper = below * _moved(lower, stride), above * _moved(upper, -stride)
        stride *= 2
    return right / diagonal


def _moved(x: Tensor, by: int, fill: float = 0.0) -> Tensor:
    """The elements moved by ``by`` places along the last dimension, with ``fill`` where none come from."""
    if by > 0:
        return torch.cat([torch.full_like(x[..., :by], fill), x[..., :-by]], dim=-1)
    return torch.cat([x[..., -by:], torch.full_like(x[..., by:], fill)], dim=-1)
