"""Visits of Python's own objects in the walk over what func holds: functions, methods, containers, partials."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from aca_ext.vector_field.code_names import BY_NAME, globals_named_by, is_library

_MAX_ENTRIES = 1024  # of one container

# Types whose objects hold nothing of interest; they are never queued.
ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice, torch.dtype, torch.device,
     torch.Size, types.CodeType, types.GetSetDescriptorType, types.MemberDescriptorType}
)  # fmt: skip


class Walk(Protocol):
    """The walk, as the visits see it: ``Holdings``."""

    is_complete: bool
    entries_left: int
    contents: Any

    def look(self, x: Any, holder: Any, key: Any, is_attribute: bool = False) -> None: ...


def may_hold_more(x: Any) -> bool:
    """Tells whether an object may hold others, which a walk would visit."""
    return type(x) not in ATOMS and not is_a(x, Tensor)


def is_a(x: Any, kind: type) -> bool:
    """``isinstance`` by the type alone, since a weak proxy claims to be of the class of another object."""
    return issubclass(type(x), kind)


def _function(walk: Walk, f: types.FunctionType) -> None:
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=False):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            walk.is_complete = False
            continue
        walk.contents.add(cell)
        walk.look(value, cell, name)
    if f.__defaults__:
        _container(walk, f.__defaults__)
    if f.__kwdefaults__:
        _container(walk, f.__kwdefaults__)
    if f.__dict__:
        _namespace(walk, f)
    known = f.__globals__
    if is_library(known.get("__name__", "")):
        return
    names = globals_named_by(f.__code__)
    if names:
        walk.contents.add_named(known, names)
    for name in names:
        value = known.get(name)
        if type(value) is types.ModuleType and not is_library(value.__name__):
            _module_of_code(walk, value, f.__code__)
        elif type(value) not in ATOMS:
            walk.look(value, known, name, True)
        elif name in BY_NAME:
            walk.is_complete = False


def _module_of_code(walk: Walk, module: types.ModuleType, code: types.CodeType) -> None:
    """Visits the names that code uses from an imported module of the user's."""
    walk.is_complete = False  # code inside that module may name more than is visited here
    walk.contents.add(vars(module))
    for name in code.co_names:
        value = vars(module).get(name)
        if value is not None:
            walk.look(value, vars(module), name, True)


def entries_of(x: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a container, read by the methods of the built-in type, which a subclass cannot override."""
    if is_a(x, dict):
        return list(islice(dict.items(x), _MAX_ENTRIES))
    for kind in (list, tuple, deque, set, frozenset):
        if is_a(x, kind):
            return list(enumerate(islice(kind.__iter__(x), _MAX_ENTRIES)))
    return list(islice(x.items(), _MAX_ENTRIES))  # a mapping proxy


def _container(walk: Walk, x: Any) -> None:
    entries = entries_of(x) if walk.entries_left > 0 else []
    walk.entries_left -= len(entries)
    walk.is_complete = walk.is_complete and len(entries) < _MAX_ENTRIES and walk.entries_left >= 0
    walk.contents.add_container(x)
    for key, value in entries:
        walk.look(value, x, key)


def _unordered(walk: Walk, x: Any) -> None:
    entries = entries_of(x) if walk.entries_left > 0 else []
    walk.entries_left -= len(entries)
    walk.contents.add_container(x)
    for _, value in entries:
        walk.look(value, (), "")


def _partial(walk: Walk, x: Any) -> None:
    walk.look(x.func, (), "func")
    _container(walk, x.args)
    _container(walk, x.keywords)
    _container(walk, vars(x))


def _method(walk: Walk, x: types.MethodType) -> None:
    walk.look(x.__self__, (), "self")
    walk.look(x.__func__, (), "func")


def _namespace(walk: Walk, x: Any) -> None:
    if is_a(x, types.FunctionType):
        walk.contents.add(vars(x))
    else:
        walk.contents.add_container(vars(x))
    for name, value in vars(x).items():
        walk.look(value, vars(x), name, True)


VISITORS: dict[type, Callable[[Walk, Any], None]] = {
    types.FunctionType: _function,
    types.MethodType: _method,
    types.SimpleNamespace: _namespace,
    types.MappingProxyType: _container,
    functools.partial: _partial,
    list: _container,
    tuple: _container,
    deque: _container,
    set: _unordered,
    frozenset: _unordered,
    dict: _container,
    OrderedDict: _container,
    defaultdict: _container,
}
