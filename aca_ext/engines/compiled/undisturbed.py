"""Contexts that restore the state of the process after tracing, compiling and trial evaluations of func."""

from __future__ import annotations

import gc
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from aca_ext.vector_field.contents import restore
from aca_ext.vector_field.holdings import Holdings

_LOGGERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx")
_MAX_BYTES = 1 << 26  # largest tensor to copy and restore; larger ones are probably data, not state

# Private to torch; if a version lacks one, that part is not restored.
_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
_AUTOGRAD: Any = getattr(torch._C, "_autograd", None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restores torch's modes and random generators, also after an error, and silences torch's compiler.

    Garbage collection is off inside, since it would walk all objects of the compiler hundreds of times.
    """
    restorations = [_random_states(), _functorch_stack(), _hooks_of_saved_tensors(), _log_levels(), _collection()]
    has_graph, level = torch.is_grad_enabled(), getattr(forward_ad, "_current_level", -1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        while getattr(forward_ad, "_current_level", -1) > level:
            forward_ad.exit_dual_level()
        for restore in restorations:
            restore()
        torch._C._set_grad_enabled(has_graph)


def _random_states() -> Callable[[], None]:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = None if numpy_random is None else numpy_random.get_state()

    def restore() -> None:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)

    return restore


def _functorch_stack() -> Callable[[], None]:
    depth = getattr(_FUNCTORCH, "get_dynamic_layer_stack_depth", None)
    undo = getattr(_FUNCTORCH, "pop_dynamic_layer_stack_and_undo_to_depth", None)
    allow = getattr(_FUNCTORCH, "set_inplace_requires_grad_allowed", None)
    if depth is None or undo is None or allow is None:
        return lambda: None
    before, is_allowed = depth(), _FUNCTORCH.get_inplace_requires_grad_allowed()

    def restore() -> None:
        if depth() > before:
            undo(before)
        allow(is_allowed)

    return restore


def _hooks_of_saved_tensors() -> Callable[[], None]:
    message_of = getattr(_AUTOGRAD, "_saved_tensors_hooks_get_disabled_error_message", None)
    if message_of is None:
        return lambda: None
    before = message_of()

    def restore() -> None:
        if message_of() != before:
            if before is None:
                _AUTOGRAD._saved_tensors_hooks_enable()
            else:
                _AUTOGRAD._saved_tensors_hooks_disable(before)

    return restore


def _log_levels() -> Callable[[], None]:
    """Silences the compiler's warnings, which concern its own work and not the user's code."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        if logger.getEffectiveLevel() == logging.WARNING:  # not if the user set another level by TORCH_LOGS
            logger.setLevel(logging.ERROR)

    def restore() -> None:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

    return restore


def _collection() -> Callable[[], None]:
    was_enabled = gc.isenabled()
    gc.disable()
    return gc.enable if was_enabled else lambda: None


@contextmanager
def unchanged(func: Any, args: tuple[Any, ...] = ()) -> Iterator[None]:
    """Restores the objects that func may change: attributes, containers, closures, globals, tensors, generators."""
    found = Holdings((func, args))
    tensors = [(x, x.detach().clone()) for x in found.contents.tensors() if _may_be_state(x)]
    generators = [(generator, generator.get_state()) for generator in found.generators]
    with undisturbed():
        try:
            yield
        finally:
            restore(found.contents)
            for x, value in tensors:
                _restore_tensor(x, value)
            for generator, state in generators:
                generator.set_state(state)


def _may_be_state(x: Tensor) -> bool:
    is_plain = type(x) is Tensor and x.device.type in ("cpu", "cuda") and x.layout is torch.strided
    return is_plain and not x.requires_grad and x.nbytes <= _MAX_BYTES


def _restore_tensor(x: Tensor, value: Tensor) -> None:
    if x.shape != value.shape:
        x.data = value
    elif not torch.equal(x, value):
        x.data.copy_(value)  # .data keeps the version counter: autograd graphs that saved x remain valid
