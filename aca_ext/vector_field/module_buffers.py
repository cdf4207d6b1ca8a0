"""Buffers of func's modules, which its evaluations use and may change (running statistics of BatchNorm)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from aca_ext.errors import BatchStatisticsWarning
from aca_ext.user_warnings import warn_user


@dataclass(frozen=True)
class Buffer:
    """A module's buffer, and its version and value before an evaluation."""

    owner: nn.Module
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

    If func is a module, its submodules are known. Modules that another callable uses are noticed by a forward hook
    while it runs, and passed to ``on_module``.
    """
    used: list[list[Buffer]] = []
    known: set[int] = set()
    thread = threading.get_ident()

    def note_buffers(module: nn.Module) -> None:
        if getattr(module, "training", False) and module._buffers:  # torch.jit.freeze leaves no such attribute
            buffers = [b for b in module.buffers(recurse=False) if not b.is_inference()]
            used.append([Buffer(module, b, b._version, b.detach().clone()) for b in buffers])

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


def holds_script(func: Any) -> bool:
    """Tells whether func holds TorchScript, whose code cannot be given other tensors in place of its own."""
    return isinstance(func, nn.Module) and any(isinstance(m, torch.jit.ScriptModule) for m in modules_of(func))


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_batch_statistics(moved: Sequence[Sequence[Buffer]]) -> None:
    """Warns, once per module, if buffers that func changes are running statistics of batch normalisation."""
    for owner in (buffers[0].owner for buffers in moved):
        if owner in _told or not _is_batch_normalisation(owner):
            continue
        _told.add(owner)
        warn_user(
            f"func holds a {_class_name(owner)} in training mode. It trains, but its running statistics are averages "
            "over all times and stages of the solve, so that the model is another one in evaluation mode. Use "
            "GroupNorm or LayerNorm, or track_running_stats=False, which uses the batch's statistics in both modes.",
            BatchStatisticsWarning,
        )


def _is_batch_normalisation(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or "BatchNorm" in _class_name(module)


def _class_name(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))  # of a scripted module, the class it had


def restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Gives buffers back their former values."""
    for buffer, value in zip(buffers, values, strict=True):
        # Through .data, as batch normalisation writes its statistics: graphs that saved them do not depend on them.
        buffer.data.copy_(value)


@lru_cache(maxsize=1024)
def is_distributed(kind: type[nn.Module]) -> bool:
    """Tells whether modules of this class average or gather gradients. By name, since importing the classes is slow."""
    names = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    return any(base.__name__ in names and base.__module__.startswith("torch.") for base in kind.__mro__)
