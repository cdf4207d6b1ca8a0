"""Reference for gradients: the accepted steps repeated in plain PyTorch operations under autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.numerics.methods import METHODS

State = Any  # a tensor or a tuple of tensors


def solve_over(
    func: Callable[..., State],
    y0: State,
    times: Sequence[float],
    steps: Sequence[tuple[float, float]],
    method: str,
    args: Sequence[Any] = (),
) -> State:
    """States at ``times`` with their autograd graph, by one explicit Runge-Kutta step over each of ``steps``."""
    tableau = METHODS[method]
    a = [[float(x) for x in row] for row in tableau.a]
    b, c = [float(x) for x in tableau.b], [float(x) for x in tableau.c]
    is_tuple = isinstance(y0, tuple)
    y: tuple[Tensor, ...] = y0 if is_tuple else (y0,)
    like = y[0].real if y[0].is_complex() else y[0]

    def slope(t: float, at: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        k = func(torch.tensor(t, dtype=like.dtype), at if is_tuple else at[0], *args)
        return k if is_tuple else (k,)

    outputs = [y]
    for t, t_next in steps:
        h = t_next - t
        k: list[tuple[Tensor, ...]] = []
        for c_i, row in zip(c, a, strict=True):
            k.append(slope(t_next if c_i == 1 else t + c_i * h, _advance(y, h, row, k)))
        y_next = _advance(y, h, b, k)
        while len(outputs) < len(times) and (times[len(outputs)] - t_next) * h <= 0:
            at = times[len(outputs)]
            inside = at != t_next
            outputs.append(_advance(y, h, tableau.dense_weights((at - t) / h), k) if inside else y_next)
        y = y_next
    stacked = tuple(torch.stack(rows) for rows in zip(*outputs, strict=True))
    return stacked if is_tuple else stacked[0]


def _advance(
    y: tuple[Tensor, ...], h: float, weights: Sequence[float], slopes: Sequence[tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    for w, k in zip(weights, slopes, strict=False):
        if w != 0:
            y = tuple(y_i + (h * w) * k_i for y_i, k_i in zip(y, k, strict=True))
    return y


def relative_error(given: Tensor | None, expected: Tensor) -> float:
    """Largest error over the largest entry of ``expected``; None counts as a gradient of zeros."""
    given = torch.zeros_like(expected) if given is None else given
    assert given.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.detach().abs().max()
    if scale == 0:
        return float(given.detach().abs().max())
    return float((given - expected).detach().abs().max() / scale)


def precision(gradient: str) -> float:
    return {"aca": 1e-12, "direct": 1e-12}.get(gradient, 1e-5)
