"""Places where code finds its objects (dict entries, attributes, closure cells): their contents, read and restored."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

MISSING = object()  # stands for the contents of a place that does not exist


class Change(NamedTuple):
    """Contents of a place at two times. The key is None for a whole sequence or set, and for a closure cell."""

    holder: Any
    key: Any
    before: Any
    now: Any

    @property
    def place(self) -> tuple[int, Any]:
        return id(self.holder), self.key

    def put(self, value: Any) -> None:
        put(self.holder, self.key, value)


def get(holder: Any, key: Any, default: Any = MISSING) -> Any:
    """The contents of a place: ``holder[key]`` or all of a dict or sequence, of a closure cell, or an attribute."""
    try:
        if isinstance(holder, types.CellType):
            return holder.cell_contents
        if key is None and isinstance(holder, (list, deque, set)):
            return type(holder)(holder)
        return holder[key] if isinstance(holder, (dict, list, tuple, deque)) else getattr(holder, key)
    except (AttributeError, LookupError, ValueError):
        return default


def put(holder: Any, key: Any, value: Any) -> None:
    """Replaces the contents of a place, or removes it for MISSING; does nothing where neither is possible."""
    is_missing = value is MISSING
    if isinstance(holder, dict):
        holder.pop(key, None) if is_missing else holder.update({key: value})
    elif isinstance(holder, (list, deque, set)):
        if key is not None:
            holder[key] = value  # type: ignore[index]
        else:
            holder.clear()
            holder.update(value) if isinstance(holder, set) else holder.extend(value)
    elif isinstance(holder, types.CellType):
        if is_missing:
            del holder.cell_contents
        else:
            holder.cell_contents = value
    elif isinstance(holder, type):
        delattr(holder, key) if is_missing else setattr(holder, key, value)
    elif not isinstance(holder, tuple):
        object.__delattr__(holder, key) if is_missing else object.__setattr__(holder, key, value)


@contextmanager
def put_back(changes: Sequence[Change]) -> Iterator[None]:
    """Sets the places to their contents of before inside the context, and to those of now afterwards."""
    orders = {id(c.holder): (c.holder, list(c.holder)) for c in changes if isinstance(c.holder, dict)}
    try:
        for change in changes:
            change.put(change.before)
        yield
    finally:
        for change in changes:
            change.put(change.now)
        for holder, order in orders.values():
            _order(holder, order)


def restore(contents: Any) -> None:
    """Restores the contents of all places of a snapshot."""
    changes = [Change._make(change) for change in contents.changes()]
    for change in changes:
        change.put(change.before)
    for holder in {id(c.holder): c.holder for c in changes if isinstance(c.holder, dict)}.values():
        _order(holder, contents.order_of(holder))


def _order(holder: dict[Any, Any], order: Sequence[Any]) -> None:
    """Restores the order of a dict, on which the order of a module's parameters depends."""
    if list(holder)[: len(order)] == order:
        return
    contents = dict(holder)
    holder.clear()
    holder.update({key: contents.pop(key) for key in order if key in contents})
    holder.update(contents)
