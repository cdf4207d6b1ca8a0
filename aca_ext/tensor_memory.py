"""Measurement of the peak memory of tensors on any device, by counting allocations and releases."""

from __future__ import annotations

import weakref
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from aca_ext.problem.state import tensors_in


class TensorMemory(TorchDispatchMode):
    """Context manager that counts the bytes of storages allocated inside it.

    Storages that existed before are not counted. Every operation becomes slower, so do not measure time inside.

    Attributes:
        current: bytes that are allocated now.
        peak: largest value of ``current`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for x in tensors_in(result):
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self._alive:  # new memory, not a view of an operand
                self._alive[key] = weakref.finalize(storage, self._free, key, storage.nbytes())
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
        return result

    def _free(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self.current -= size
