"""Samples of a flow: states whose components, one tensor or a tree, are one vector for each sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError, SlopeError
from aca_ext.problem.state import State
from aca_ext.problem.trees import labelled_leaves, leaves_of, like, parts_like


def check_samples(y: Any, batch_dims: int) -> None:
    """Raises ArgumentTypeError or ArgumentValueError if y holds no real tensors with a common batch."""
    leaves = labelled_leaves(y, "y")
    if not leaves:
        raise ArgumentValueError("y is an empty tree; give a tensor, or a tree of tensors.")
    first = leaves[0][1]
    for name, x in leaves:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentTypeError(f"{name} is {kind}; a flow carries real numbers. Give a float32 or float64 tensor.")
        if x.dim() < batch_dims:
            raise ArgumentValueError(
                f"{name} has shape {tuple(x.shape)}, but batch_dims={batch_dims} of its dimensions count samples. Give "
                "with_divergence(..., batch_dims=0) for a single sample."
            )
        if x.shape[:batch_dims] != first.shape[:batch_dims] or x.dtype != first.dtype:
            raise ArgumentValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} and {leaves[0][0]} is {first.dtype} of shape "
                f"{tuple(first.shape)}; the components of a sample share their dtype and the {batch_dims} leading "
                "dimensions, which count samples."
            )


def vectors_of(y: State, batch_dims: int) -> Tensor:
    """A tree of samples as one tensor, (\\*batch, elements); a tensor stays as it is."""
    if isinstance(y, Tensor):
        return y
    return torch.cat([x.reshape(*x.shape[:batch_dims], -1) for x in leaves_of(y)], -1)


def samples_like(y: State, vectors: Tensor, batch_dims: int) -> State:
    """The inverse of ``vectors_of`` for a tree of the shapes of ``y``."""
    if isinstance(y, Tensor):
        return vectors
    leaves = leaves_of(y)
    parts = vectors.split([math.prod(x.shape[batch_dims:]) for x in leaves], -1)
    result: State = like(y, [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)])
    return result


def checked_rates(k: Any, y: State) -> State:
    """The result of func; of lower precision under autocast, converted.

    Raises:
        SlopeError: it is not like y.
    """
    if isinstance(y, Tensor):
        return _checked("func's output", k, y)
    names = [name for name, _ in labelled_leaves(y, "func's output")]
    parts = parts_like(y, k)
    if len(parts) != len(names):
        raise SlopeError(f"func returned {len(parts)} components; y has {len(names)}. Return dy/dt, like y.")
    result: State = like(y, [_checked(*args) for args in zip(names, parts, leaves_of(y), strict=True)])
    return result


def _checked(name: str, k: object, y: Tensor) -> Tensor:
    if not isinstance(k, Tensor):
        raise SlopeError(f"{name} is of type {type(k).__name__}; it must be a tensor.")
    if k.shape != y.shape:
        raise SlopeError(f"{name} has shape {tuple(k.shape)}; y has {tuple(y.shape)}. Return dy/dt, like y.")
    if k.dtype != y.dtype:
        if not (k.is_floating_point() and torch.is_autocast_enabled(y.device.type)):
            raise SlopeError(f"{name} has dtype {k.dtype}; y has {y.dtype}. Convert one of them.")
        return k.to(y.dtype)
    return k
