"""Guards on the methods that a trace passed through, since TorchDynamo does not notice if one is replaced."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Iterator, Set
from typing import Any

from torch import nn
from torch._guards import TracingContext


def code_in_trace() -> set[types.CodeType]:
    """Code objects that the current trace has entered."""
    find = getattr(TracingContext, "get_traced_code", lambda: None)  # private to torch
    return set(find() or ())


class Methods:
    """Methods by class and name, except torch's own; held by weak references."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[weakref.ref[type], str, weakref.ref[Any], types.CodeType]] = {}

    def add(self, func: Any, traced: Set[types.CodeType]) -> None:
        """Adds the methods with this code that any class defines, or that a class of func's modules inherits."""
        names: set[str] = set()
        owners = {type(module) for module in func.modules()} if isinstance(func, nn.Module) else {type(func)}
        for owner in _classes():
            found = {name for name, value in list(vars(owner).items()) if _code(value) in traced}
            if found:
                owners.add(owner)
                names |= found
        for owner in owners:
            for name in names:
                function = _function(inspect.getattr_static(owner, name, None))
                if function is None or function.__code__ not in traced or _is_of_torch(owner):
                    continue
                self._known[id(owner), name] = weakref.ref(owner), name, weakref.ref(function), function.__code__

    def are_unchanged(self) -> bool:
        for owner, name, function, code in self._known.values():
            before, now = function(), getattr(owner(), name, None)
            if before is None or before.__code__ is not code or (now is not before and _function(now) is not before):
                return False
        return True


def _classes() -> Iterator[type]:
    """Yields every class except torch's."""
    todo, seen = [object], {object}
    while todo:
        for kind in type.__subclasses__(todo.pop()):
            if kind not in seen:
                seen.add(kind)
                todo.append(kind)
                if not _is_of_torch(kind):
                    yield kind


def _is_of_torch(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == "torch"


def _code(value: Any) -> types.CodeType | None:
    function = _function(value)
    return None if function is None else function.__code__


def _function(value: Any) -> types.FunctionType | None:
    """The function behind an attribute of a class, None if there is none."""
    if isinstance(value, (types.MethodType, classmethod, staticmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    return value if isinstance(value, types.FunctionType) else None
