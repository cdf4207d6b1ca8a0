"""Places where code finds its objects (dict entries, attributes, closure cells): their contents, read and restored."""

from __future__ import annotations

import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
            return [*holder]
        return holder[key] if isinstance(holder, (dict, list, tuple, deque)) else getattr(holder, key)
    except (AttributeError, LookupError, TypeError, ValueError):
        return default


def put(holder: Any, key: Any, value: Any) -> None:
    """Replaces the contents of a place, or removes it for MISSING; does nothing where neither is possible.

    Uses the methods of the built-in types, so that subclasses which refuse or convert entries do not see it.
    """
    is_missing = value is MISSING
    if isinstance(holder, dict):
        kind = _kind_of(holder)
        kind.pop(holder, key, None) if is_missing else kind.__setitem__(holder, key, value)
    elif isinstance(holder, list):
        list.__setitem__(holder, slice(None) if key is None else key, value)
    elif isinstance(holder, (deque, set)):
        if isinstance(holder, deque) and key is not None:
            holder[key] = value
        else:
            _refill(holder, value)
    elif isinstance(holder, types.CellType):
        if is_missing:
            del holder.cell_contents
        else:
            holder.cell_contents = value
    elif isinstance(holder, type):
        type.__delattr__(holder, key) if is_missing else type.__setattr__(holder, key, value)
    elif not isinstance(holder, tuple):
        object.__delattr__(holder, key) if is_missing else object.__setattr__(holder, key, value)


def _kind_of(holder: dict[Any, Any]) -> Any:
    """The built-in type of a dict; an OrderedDict keeps its order in a list that methods of dict would not update."""
    return OrderedDict if isinstance(holder, OrderedDict) else dict


def _refill(holder: deque[Any] | set[Any], values: Iterable[Any]) -> None:
    holder.clear()
    holder.update(values) if isinstance(holder, set) else holder.extend(values)


# Held while places are changed for a replay. The replay of another thread would find the changed contents, and would
# take them for those to restore.
_lock = threading.RLock()


@contextmanager
def put_back(
    changes_now: Callable[[], Sequence[Change]], order_before: Callable[[Any], Sequence[Any]]
) -> Iterator[None]:
    """Sets places to their contents of before inside the context, and to those of now afterwards.

    Args:
        order_before: for a dict, the order of its keys before; empty if it is unknown.
    """
    with _lock:
        changes = changes_now()
        if changes:
            with _changed(changes, order_before):
                yield
            return
    yield


@contextmanager
def _changed(changes: Sequence[Change], order_before: Callable[[Any], Sequence[Any]]) -> Iterator[None]:
    orders = {id(c.holder): (c.holder, list(c.holder)) for c in changes if isinstance(c.holder, dict)}
    try:
        for change in changes:
            change.put(change.before)
        for holder, _ in orders.values():
            _order(holder, order_before(holder))
        yield
    finally:
        for change in changes:
            with suppress(Exception):  # one place that cannot be written is no reason to leave others changed
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
    contents, kind = dict(holder), _kind_of(holder)
    kind.clear(holder)
    for key in (*(key for key in order if key in contents), *contents):
        kind.__setitem__(holder, key, contents[key])
