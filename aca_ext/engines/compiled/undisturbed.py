"""Leaves a process as it was: what tracing, compiling and trial evaluations of func would move is put back."""

from __future__ import annotations

import functools
import inspect
import logging
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_LOGGERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx")
_MAX_OBJECTS = 20_000  # that func may reach; beyond, they are not restored
_MAX_BYTES = 1 << 26  # of a tensor that is copied to be restored; larger ones are data rather than state

# Private to torch; where a version has one no more, that part is not restored.
_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
_AUTOGRAD: Any = getattr(torch._C, "_autograd", None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restores torch's modes and the random generators, also after an error, and silences torch's compiler."""
    restorations = [_random_states(), _functorch_stack(), _hooks_of_saved_tensors(), _log_levels()]
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
    """Below errors, the compiler's remarks concern its own work and not what the user wrote."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        if logger.getEffectiveLevel() == logging.WARNING:  # unless the user asked for more by TORCH_LOGS
            logger.setLevel(logging.ERROR)

    def restore() -> None:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

    return restore


@contextmanager
def unchanged(func: Any, args: tuple[Any, ...] = ()) -> Iterator[None]:
    """Restores what evaluations of func may change: its attributes, containers, closures, globals, tensors."""
    states = _states_of(func, args)
    with undisturbed():
        try:
            yield
        finally:
            for restore in states:
                restore()


def _states_of(*roots: Any) -> list[Callable[[], None]]:
    states: list[Callable[[], None]] = []
    todo: list[Any] = list(roots)
    seen: dict[int, Any] = {}  # keeps what it has seen alive, so that an id stays that of one object
    while todo and len(seen) < _MAX_OBJECTS:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (int, float, str, bytes, type, types.ModuleType, torch.dtype, type(None))):
            continue
        seen[id(x)] = x
        todo += _note(x, states)
    return states


def _note(x: Any, states: list[Callable[[], None]]) -> list[Any]:
    """Adds what restores ``x``, and returns what it holds."""
    if isinstance(x, Tensor):
        is_plain = type(x) is Tensor and x.is_cpu and x.layout is torch.strided
        if is_plain and not x.requires_grad and x.nbytes <= _MAX_BYTES:
            states.append(functools.partial(_restore_tensor, x, x.detach().clone()))
        return []
    if isinstance(x, torch.Generator):
        states.append(functools.partial(_restore_generator, x, x.get_state()))
        return []
    if isinstance(x, (dict, list, set, deque)):
        states.append(functools.partial(_restore_container, x, x.copy()))
        return list(x.values()) if isinstance(x, dict) else list(x)
    if isinstance(x, (tuple, frozenset)):
        return list(x)
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, types.FunctionType):
        if _is_of_library(x):
            return []
        names = [name for name in _names_in(x.__code__) if name in x.__globals__]
        before = {name: x.__globals__[name] for name in names}
        states.append(functools.partial(x.__globals__.update, before))
        return [*(x.__closure__ or ()), x.__defaults__, x.__kwdefaults__, *before.values()]
    if isinstance(x, types.CellType):
        return _note_cell(x, states)
    held = getattr(x, "__dict__", None)
    if type(held) is dict and (isinstance(x, nn.Module) or not _is_of_library(type(x))):
        return [held, inspect.getattr_static(type(x), "forward" if isinstance(x, nn.Module) else "__call__", None)]
    return []


def _is_of_library(x: Any) -> bool:
    """Tells whether a class or function belongs to Python, torch, NumPy or this package, whose state is not func's."""
    package = str(x.__module__).partition(".")[0]
    return package in ("aca_ext", "numpy", "torch") or package in sys.stdlib_module_names


def _note_cell(cell: types.CellType, states: list[Callable[[], None]]) -> list[Any]:
    try:
        contents = cell.cell_contents
    except ValueError:  # empty
        return []
    states.append(lambda: setattr(cell, "cell_contents", contents))
    return [contents]


def _names_in(code: types.CodeType) -> set[str]:
    """The global names of code and of the functions in it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _restore_tensor(x: Tensor, value: Tensor) -> None:
    if x.shape != value.shape:
        x.data = value
    elif not torch.equal(x, value):
        x.data.copy_(value)  # no new version, for no graph that saved it is wrong


def _restore_generator(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _restore_container(x: Any, before: Any) -> None:
    values, others = (list(c.items()) if isinstance(c, dict) else list(c) for c in (x, before))
    if len(values) == len(others) and all(_same(a, b) for a, b in zip(values, others, strict=True)):
        return
    x.clear()
    (x.update if isinstance(x, (dict, set)) else x.extend)(before)


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, tuple) and len(a) == 2 and isinstance(b, tuple) and a[0] is b[0] and a[1] is b[1])
