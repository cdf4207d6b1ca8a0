"""Polynomials between the knots of a path, one function for each kind of interpolation, and their values.

Each kind takes the knots t (L,) and the path x (..., L), with NaN where a value is missing. It returns the coefficients
of the powers 0, 1, ... of the time since the knot before, a list of tensors (..., pieces).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aca_ext.controls.missing import filled_at_ends, filled_forward, filled_linearly
from aca_ext.controls.tridiagonal import solve_tridiagonal

Pieces = list[Tensor]


def constant(t: Tensor, x: Tensor) -> Pieces:
    """Each value until the next knot; the last one is a piece of its own."""
    return [filled_forward(x)]


def linear(t: Tensor, x: Tensor) -> Pieces:
    """Straight lines."""
    x = filled_linearly(t, x)
    return [x[..., :-1], x.diff() / t.diff()]


def hermite(t: Tensor, x: Tensor) -> Pieces:
    """Cubic pieces whose slope at a knot is that of the line before it, at the first knot that of the line behind it.

    Source: Morrill et al., Neural controlled differential equations for online prediction tasks, 2021.
    """
    x, slopes = linear(t, filled_linearly(t, x))
    return _cubic_between(t.diff(), x, slopes, torch.cat([slopes[..., :1], slopes[..., :-1]], dim=-1), slopes)


def natural_cubic(t: Tensor, x: Tensor) -> Pieces:
    """The cubic spline with two continuous derivatives and no curvature at the ends.

    The knots of a spline are its observations, which differ from path to path. They are moved to the front, so that
    all paths solve systems of the same size; the rows behind have ones on the diagonal.
    """
    x, is_known = filled_at_ends(x)
    order = torch.where(is_known, 0, 1).sort(dim=-1, stable=True).indices
    is_row = is_known.gather(-1, order)
    times, values = t[order], x.gather(-1, order)
    is_piece = is_row[..., 1:]
    lengths = torch.where(is_piece, times.diff(), 1.0)
    slopes = torch.where(is_piece, values.diff() / lengths, 0.0)
    at_knots = _knot_slopes(lengths, slopes, is_piece)
    pieces = _cubic_between(lengths, values[..., :-1], slopes, at_knots[..., :-1], at_knots[..., 1:])
    piece = is_known.cumsum(-1)[..., :-1] - 1  # between the knots at hand
    start = times.gather(-1, piece)
    return _moved([c.gather(-1, piece) for c in pieces], t[:-1] - start)


def _knot_slopes(lengths: Tensor, slopes: Tensor, is_piece: Tensor) -> Tensor:
    """The derivatives at the knots that make the second derivative continuous, and zero at the ends."""
    inverse = torch.where(is_piece, 1 / lengths, 0.0)
    zero = torch.zeros_like(inverse[..., :1])
    before, behind = torch.cat([zero, inverse], dim=-1), torch.cat([inverse, zero], dim=-1)
    steep = slopes * inverse
    right = 3 * (torch.cat([zero, steep], dim=-1) + torch.cat([steep, zero], dim=-1))
    diagonal = 2 * (before + behind)
    return solve_tridiagonal(before, torch.where(diagonal == 0, 1.0, diagonal), behind, right)


def _cubic_between(lengths: Tensor, x: Tensor, slopes: Tensor, first: Tensor, last: Tensor) -> Pieces:
    """Cubic Hermite pieces from x, with mean slopes ``slopes`` and derivatives ``first`` and ``last`` at their ends."""
    return [x, first, (3 * slopes - 2 * first - last) / lengths, (first + last - 2 * slopes) / lengths**2]


def _moved(pieces: Pieces, by: Tensor) -> Pieces:
    """The same cubic polynomials as functions of the time since ``by`` later."""
    a, b, c, d = pieces
    return [a + by * (b + by * (c + by * d)), b + by * (2 * c + 3 * by * d), c + 3 * by * d, d]


def polynomial(coefficients: Sequence[Tensor], u: Tensor) -> Tensor:
    """Σ c_j·u^j"""
    *lower, total = coefficients
    for c in reversed(lower):
        total = total * u + c
    return total


def derivative(coefficients: Sequence[Tensor]) -> list[Tensor]:
    """The coefficients of the polynomial's derivative."""
    if len(coefficients) == 1:
        return [torch.zeros_like(coefficients[0])]
    return [power * c for power, c in enumerate(coefficients[1:], start=1)]


KINDS: dict[str, Callable[[Tensor, Tensor], Pieces]] = {
    "linear": linear,
    "cubic": natural_cubic,
    "hermite": hermite,
    "constant": constant,
}
