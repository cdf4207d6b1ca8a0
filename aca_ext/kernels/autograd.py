"""Operations whose results have a graph where what computes them makes none: the kernels inside autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.operations import Floats, Tensors, TorchOperations
from aca_ext.kernels.reference import Number


class DifferentiableOperations(TorchOperations):
    """The operations of the class beside it in a list of bases, bitwise their results, with a graph.

    Differentiable to any order in the states and slopes. The step size is a constant, and so is the error estimate.
    Results with a graph go into tensors of their own.
    """

    def weighted_sum(self, base: Tensor | None, h: Number, x: Tensors, w: Floats, out: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().weighted_sum(base, h, x, w, out)
        return _WeightedSum.apply(super().weighted_sum, h, w, base, *x)

    def solution_and_error(
        self, y: Tensor, h: Number, k: Tensors, b: Floats, error_weight: Floats, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return super().solution_and_error(y, h, k, b, error_weight, out)
        return _SolutionAndError.apply(super().solution_and_error, h, b, error_weight, y, *k)


class _WeightedSum(torch.autograd.Function):
    """base + h·Σ w·x with the kernel as its forward; the backward is plain torch, so it differentiates again."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, h: float, w: Floats, base: Tensor | None, *x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.h, ctx.w, ctx.has_base = h, w, base is not None
        return kernel(base, h, x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        own, scaled = _own_and_scaled(g, ctx.h, ctx.w, ctx.needs_input_grad[4:])
        return None, None, None, own if ctx.has_base else None, *scaled


class _SolutionAndError(torch.autograd.Function):
    """The solution like ``_WeightedSum``; the error estimate carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Any, h: float, b: Floats, error_weight: Floats, y: Tensor, *k: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.h, ctx.b = h, b
        y1, error = kernel(y, h, k, b, error_weight)
        ctx.mark_non_differentiable(error)
        return y1, error

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Any, ...]:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        own, scaled = _own_and_scaled(g, ctx.h, ctx.b, ctx.needs_input_grad[5:])
        return None, None, None, None, own, *scaled


def _own_and_scaled(
    g: Tensor, h: Number, w: Floats, needed: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """A copy of ``g``, and g·h·w[j] for each j that is needed.

    A copy, since a backward pass of func may write the gradients of all stages into one buffer, and ``g`` be that.
    """
    is_wanted = [n and w_j != 0 for w_j, n in zip(w, needed, strict=True)]
    if isinstance(h, Tensor):
        h = h.to(g.dtype)
        return g.clone(), [g * (h * w_j) if wanted else None for w_j, wanted in zip(w, is_wanted, strict=True)]
    factors = [1.0, *(h * w_j for w_j, wanted in zip(w, is_wanted, strict=True) if wanted)]
    own, *scaled = torch._foreach_mul([g] * len(factors), factors)
    following = iter(scaled)
    return own, [next(following) if wanted else None for wanted in is_wanted]
