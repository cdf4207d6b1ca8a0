"""What the modules of the user's f hold: parameters, and buffers that its evaluations use and may move."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

# Where a module keeps a parameter or buffer, its name, and the tensor.
Held = tuple[Mapping[str, Tensor | None], str, Tensor]


@dataclass(frozen=True)
class Buffer:
    """A module's buffer, and its version and value before an evaluation."""

    tensor: Tensor
    version: int
    value: Tensor


def modules_of(func: nn.Module) -> list[nn.Module]:
    """``func`` and all modules inside it: ``func.modules()``, in a third of its time."""
    found = [func]
    seen = {func}
    for module in found:
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


@contextmanager
def buffers_used_by(func: Any, on_module: Callable[[nn.Module], None] | None = None) -> Iterator[list[list[Buffer]]]:
    """The buffers of func's modules in training mode, module by module.

    Those of a module are known; what another callable uses is seen by a hook while it runs, and told ``on_module``.
    """
    used: list[list[Buffer]] = []
    known: set[int] = set()
    thread = threading.get_ident()

    def note_buffers(module: nn.Module) -> None:
        if module.training and module._buffers:
            buffers = [b for b in module.buffers(recurse=False) if not b.is_inference()]
            used.append([Buffer(b, b._version, b.detach().clone()) for b in buffers])

    def note(module: nn.Module, _: Any = None) -> None:
        if id(module) in known or threading.get_ident() != thread:
            return
        known.add(id(module))
        if on_module is not None:
            on_module(module)
        note_buffers(module)

    if isinstance(func, nn.Module):
        for module in modules_of(func):
            note_buffers(module)
        yield used
        return
    handle = register_module_forward_pre_hook(note)
    try:
        yield used
    finally:
        handle.remove()


def restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Gives buffers the values that they had."""
    for buffer, value in zip(buffers, values, strict=True):
        # Through .data, as batch normalisation writes its statistics: graphs that saved them do not depend on them.
        buffer.data.copy_(value)


@lru_cache(maxsize=1024)
def is_distributed(kind: type[nn.Module]) -> bool:
    """Whether modules of this class average or gather gradients (told by name: importing them takes long)."""
    names = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    return any(base.__name__ in names and base.__module__.startswith("torch.") for base in kind.__mro__)
