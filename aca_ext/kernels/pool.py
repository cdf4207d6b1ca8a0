"""Pool of kernel operations, so that repeated solves reuse their buffers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from aca_ext.kernels.fused import KernelOperations, TorchOperations, has_kernels, operations_for
from aca_ext.problem.tolerance import Tolerance

_LARGEST = 1 << 12  # bytes of a state; for larger ones the time saved does not count, and the memory does


class OperationsPool:
    """The operations of solves without a graph that differ in func and in the values of the state alone."""

    def __init__(self) -> None:
        self._idle: list[KernelOperations] = []

    @contextmanager
    def lend(self, like: Tensor, tolerance: Tolerance) -> Iterator[TorchOperations]:
        """``operations_for``, which nobody else has meanwhile: not a solve inside func, nor one in another thread."""
        is_small = like.device.type == "cpu" and like.numel() * like.element_size() <= _LARGEST
        if not is_small or not has_kernels(like) or torch.is_inference_mode_enabled():
            yield operations_for(like, tolerance)
            return
        ops = self._taken(like, tolerance) or KernelOperations(torch.empty_like(like), tolerance)
        yield ops
        self._idle.append(ops)  # not where the solve failed

    def _taken(self, like: Tensor, tolerance: Tolerance) -> KernelOperations | None:
        try:
            ops = self._idle.pop()
        except IndexError:
            return None
        suits = ops.tolerance is tolerance and ops.like.dtype == like.dtype and ops.like.shape == like.shape
        return ops if suits and ops.stride == like.stride() else None


_pools: weakref.WeakKeyDictionary[object, OperationsPool] = weakref.WeakKeyDictionary()


def pool_for(settings: object) -> OperationsPool:
    """The pool of solves that share ``settings`` (``Problem.settings``); it lives as long as they do."""
    pool = _pools.get(settings)
    if pool is None:
        pool = _pools[settings] = OperationsPool()
    return pool
