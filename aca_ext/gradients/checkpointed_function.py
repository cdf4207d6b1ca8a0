"""``checkpointed``: a function whose derivatives come from another evaluation, inside every transform of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]


def checkpointed(function: Function, *x: Tensor) -> Tensors:
    """``function(*x)``, of which a reverse pass keeps the inputs alone and evaluates it again.

    The function must depend on no other tensor that carries a derivative or is batched. It is evaluated inside
    whatever transforms are active when its value or a derivative is needed.
    """
    return _Checkpointed.apply(function, *x)


class _Checkpointed(torch.autograd.Function):
    """The derivatives are checkpointed functions again: transforms ask for every reverse pass with its graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Function, *x: Tensor) -> Tensors:
        return _distinct(x, function(*x))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        x = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        grads: list[Tensor | None] = [None] * len(x)
        for i, grad in zip(wanted, checkpointed(_PullBack(ctx.function, len(x), wanted), *x, *g), strict=True):
            grads[i] = grad
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        x = ctx.saved_tensors
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        push = _PushForward(ctx.function, len(x), moving)
        return checkpointed(push, *x, *(tangent for tangent in tangents if tangent is not None))


class _Derivative:
    """Derivative of a function of ``n`` tensors with respect to those of ``indices``."""

    def __init__(self, function: Function, n: int, indices: Sequence[int]) -> None:
        self._function, self._n, self._indices = function, n, indices

    def _split(self, x: Tensors) -> tuple[Function, Tensors, Tensors]:
        """The function of the chosen inputs alone, these inputs, and the cotangents or tangents."""
        inputs, vectors = x[: self._n], x[self._n :]
        function = with_constants(self._function, inputs, self._indices)
        return function, tuple(inputs[i] for i in self._indices), vectors


class _PullBack(_Derivative):
    def __call__(self, *x: Tensor) -> Tensors:
        function, chosen, cotangents = self._split(x)
        pull_back = torch.func.vjp(function, *chosen)[1]
        return tuple(pull_back(cotangents))


class _PushForward(_Derivative):
    def __call__(self, *x: Tensor) -> Tensors:
        function, chosen, tangents = self._split(x)
        # PyTorch copies a tangent into the memory layout of its value, which fails for expanded values.
        dense = tuple(x.contiguous() for x in chosen)
        return tuple(torch.func.jvp(function, dense, tangents)[1])


def with_constants(function: Function, inputs: Sequence[Tensor], indices: Sequence[int]) -> Function:
    """``function`` of the inputs with these indices alone; the others are constants."""

    def of_chosen(*chosen: Tensor) -> Tensors:
        full = list(inputs)
        for i, value in zip(indices, chosen, strict=True):
            full[i] = value
        return function(*full)

    return of_chosen


def _distinct(inputs: Tensors, outputs: Tensors) -> Tensors:
    """Outputs of which none is the same object as another or as an input, which an autograd.Function mixes up."""
    seen = {id(x) for x in inputs}
    found: list[Tensor] = []
    for x in outputs:
        found.append(x.clone() if id(x) in seen else x)
        seen.add(id(found[-1]))
    return tuple(found)
