"""The kernels wrapped as autograd Functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.operations import Floats, Tensors, TorchOperations
from aca_ext.kernels.reference import Number


class DifferentiableOperations(TorchOperations):
    """Mixin that gives the results of the operations after it in the list of bases an autograd graph.

    The values stay the same, bit for bit. They are differentiable to any order with respect to states and slopes; the
    step size and the error estimate are constants. With gradients enabled, ``out`` is ignored: autograd needs results
    in tensors of their own.
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
    """base + h·Σ w·x by the kernel; the backward pass is plain PyTorch, so it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, h: float, w: Floats, base: Tensor | None, *x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.h, ctx.w, ctx.has_base = h, w, base is not None
        return kernel(base, h, x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        own = _own(g) if ctx.has_base else None
        return None, None, None, own, *_scaled(g, ctx.h, ctx.w, ctx.needs_input_grad[4:])


class _SolutionAndError(torch.autograd.Function):
    """Solution and error estimate by the kernel; the solution is differentiable, the error estimate is not."""

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
        return None, None, None, None, _own(g), *_scaled(g, ctx.h, ctx.b, ctx.needs_input_grad[5:])


def _own(g: Tensor) -> Tensor:
    """A copy of ``g``: it may be a buffer into which a backward pass inside func writes the gradient of every stage."""
    return g.clone()


def _scaled(g: Tensor, h: Number, w: Floats, needed: Sequence[bool]) -> list[Tensor | None]:
    if isinstance(h, Tensor):
        h = h.to(g.dtype)
    return [g * (h * w_j) if n and w_j != 0 else None for w_j, n in zip(w, needed, strict=True)]
