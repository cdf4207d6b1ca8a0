"""The operations of a Runge-Kutta step in plain PyTorch.

They specify the kernels, replace them for dtypes and devices without kernels, and serve the naive gradient, since they
are differentiable in every operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# A float, or a 0-d tensor if the step size is differentiated.
Number = Any

_WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices


def widest_dtype(device: torch.device) -> torch.dtype:
    """The most accurate floating dtype of a device, for sums over many elements and for step sizes."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def as_float(x: Number) -> float:
    """A number without its graph."""
    return x.item() if isinstance(x, Tensor) else x


def weighted_sum(base: Tensor | None, h: Number, x: Sequence[Tensor], w: Sequence[float]) -> Tensor:
    """base + h·Σ_j w[j]·x[j], with 0 for a base of None; h is a number, or (batch, 1, ...), one per sample."""
    total: Tensor = x[0] * w[0]
    for x_j, w_j in zip(x[1:], w[1:], strict=True):
        total = total + x_j * w_j
    if isinstance(h, Tensor):
        h = h.to(total.dtype)
    return total * h if base is None else base + total * h


def squared_error_ratios(
    partial: Tensor,
    k: Tensor | None,
    w: Number,
    y0: Tensor,
    y1: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    segments: Sequence[int],
) -> Tensor:
    """The sum of ((partial + w·k) / (atol + rtol·max(|y0|, |y1|)))² over each segment, shape (segments,).

    In float64 where the device has it. An element without error adds 0 even if its tolerance is 0. An element of y1
    that is not finite makes the sum NaN.
    """
    squares = _squared_error_ratio(partial, k, w, y0, y1, rtol, atol)
    flat = squares.reshape(-1) if len(segments) == 2 else squares
    return torch.stack([flat[lo:hi].sum() for lo, hi in pairwise(segments)])


def squared_error_ratios_of_rows(
    partial: Tensor,
    k: Tensor | None,
    w: Number,
    y0: Tensor,
    y1: Tensor,
    rtol: float | Tensor,
    atol: float | Tensor,
    segments: Sequence[int],
) -> Tensor:
    """``squared_error_ratios`` per sample, (batch, segments); ``segments`` are bounds within one flattened sample."""
    rows = _squared_error_ratio(partial, k, w, y0, y1, rtol, atol).reshape(len(y0), segments[-1])
    return torch.stack([rows[:, lo:hi].sum(1) for lo, hi in pairwise(segments)], 1)


def relative_changes(change: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of the matrices, the largest change relative to its element, and to the largest element.

    Elements below rounding count as rounding. The first number is infinite if an element of the sum is not finite.
    """
    after, change = state + change, change.abs()
    size = torch.maximum(state.abs(), after.abs())
    lowest = torch.finfo(state.dtype).eps * size.amax(1, keepdim=True)
    ratio = (change / torch.maximum(size, lowest)).masked_fill_(change == 0, 0.0).amax(1)
    return ratio.masked_fill_(~torch.isfinite(after).all(1), torch.inf), change.amax(1) / after.abs().amax(1)


def _squared_error_ratio(
    partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor, rtol: float | Tensor, atol: float | Tensor
) -> Tensor:
    if isinstance(w, Tensor):
        w = w.to(partial.dtype)
    error = partial if k is None else partial + w * k
    ratio = error / (atol + rtol * torch.maximum(y0.abs(), y1.abs()))
    dtype = widest_dtype(y1.device)
    return torch.where(error == 0, torch.zeros_like(ratio), ratio).to(dtype).square() + (y1 - y1).detach().to(dtype)
