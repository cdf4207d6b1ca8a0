"""Allocation and copies of tensors with the memory layout (strides) of a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Bytes. torch chooses the kernel of a matrix product by the alignment of its operands, up to 256 on a GPU; rows aligned
# like the allocations of a capture get the same kernel, and so the same bits.
_ALIGNMENT, _ALIGNMENT_ON_GPU = 64, 256


def empty_rows(count: int, like: Tensor) -> Tensor:
    """An uninitialised tensor (count, \\*like.shape) whose rows have the strides of ``like``."""
    return torch.empty_strided(
        (count, *like.shape), (like.numel(), *like.stride()), dtype=like.dtype, device=like.device
    )


def rows_like(like: Tensor, rows: Tensor) -> Tensor:
    """``rows`` if they have the strides of ``like``, else a copy: hooks on saved tensors may change the strides."""
    if rows.stride()[1:] == like.stride() and rows.stride(0) == like.numel():
        return rows
    strides = like.numel(), *like.stride()
    return torch.empty_strided(rows.shape, strides, dtype=rows.dtype, device=rows.device).copy_(rows)


def aligned_rows(count: int, like: Tensor) -> Sequence[Tensor]:
    """``count`` uninitialised tensors with the strides of ``like``, each aligned like an allocation."""
    if count == 1:
        return (torch.empty_like(like),)
    pitch = aligned_length(like.numel(), like.element_size(), like.device.type)
    rows = torch.empty_strided((count, *like.shape), (pitch, *like.stride()), dtype=like.dtype, device=like.device)
    return rows.unbind(0)


def aligned_length(length: int, element_size: int, device_type: str) -> int:
    """The least number of elements, from ``length`` on, after which an address is aligned again."""
    alignment = (_ALIGNMENT if device_type == "cpu" else _ALIGNMENT_ON_GPU) // element_size
    return -(-length // alignment) * alignment


def scalars(count: int, like: Tensor) -> Sequence[Tensor]:
    """``count`` uninitialised 0-d tensors of the dtype and device of ``like``."""
    return torch.empty(count, dtype=like.dtype, device=like.device).unbind(0)


def stack_rows(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """``torch.stack`` whose rows keep the order of strides of ``like``; differentiable."""
    if like.numel() == 0:
        return torch.stack(list(rows))
    stride = like.stride()
    order = sorted(range(like.dim()), key=lambda d: (-stride[d], d))
    stacked = torch.stack([row.permute(order) for row in rows])
    inverse = [0] * len(order)
    for position, dimension in enumerate(order):
        inverse[dimension] = position + 1
    return stacked.permute(0, *inverse)


class Relayout(torch.autograd.Function):
    """A differentiable copy of ``x`` with the strides of ``like``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return torch.empty_like(like).copy_(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        return g, None
