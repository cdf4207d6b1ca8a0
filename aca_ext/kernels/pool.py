"""Pool of kernel operations, so that repeated solves reuse their buffers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from aca_ext.kernels.fused import KernelOperations, TorchOperations, has_kernels, operations_for
from aca_ext.problem.tolerance import Tolerance

_LARGEST = 1 << 12  # bytes of a state; for larger states the pool saves little time and holds much memory


class OperationsPool:
    """Idle kernel operations for solves that differ only in func, args and the values of the state."""

    def __init__(self) -> None:
        self._idle: list[KernelOperations] = []

    @contextmanager
    def lend(self, like: Tensor, tolerance: Tolerance) -> Iterator[TorchOperations]:
        """Lends operations to one solve; nested solves and solves in other threads get operations of their own."""
        is_small = like.device.type == "cpu" and like.numel() * like.element_size() <= _LARGEST
        if not is_small or not has_kernels(like) or torch.is_inference_mode_enabled():
            yield operations_for(like, tolerance)
            return
        ops = self._taken(like, tolerance) or KernelOperations(torch.empty_like(like), tolerance)
        yield ops
        self._idle.append(ops)  # skipped if the solve raised

    def _taken(self, like: Tensor, tolerance: Tolerance) -> KernelOperations | None:
        try:
            ops = self._idle.pop()
        except IndexError:
            return None
        suits = ops.tolerance is tolerance and ops.like.dtype == like.dtype and ops.like.shape == like.shape
        return ops if suits and ops.stride == like.stride() else None


_pools: weakref.WeakKeyDictionary[object, OperationsPool] = weakref.WeakKeyDictionary()


def pool_for(settings: object) -> OperationsPool:
    """The pool of all solves with these ``settings`` (``Problem.settings``); it dies with them."""
    pool = _pools.get(settings)
    if pool is None:
        pool = _pools[settings] = OperationsPool()
    return pool
