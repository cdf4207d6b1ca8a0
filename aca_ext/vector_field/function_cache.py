"""Per-function cache; an entry dies with its function."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

_T = TypeVar("_T")

_MAX_OWNERS = 64  # beyond these, the oldest entry is dropped


class PerOwner(Generic[_T]):
    """One object per module, or per code object of a function, so that a lambda defined anew finds its entry.

    A module that is made anew around a func names it by ``shares_cache_with``.
    """

    def __init__(self, make: Callable[[], _T]) -> None:
        self._make = make
        self._kept: weakref.WeakKeyDictionary[Any, _T] = weakref.WeakKeyDictionary()

    def of(self, func: Any) -> _T:
        """The entry of ``func``, created if there is none."""
        owner = _owner_of(func)
        kept = self._kept.get(owner)
        return self._made_for(owner) if kept is None else kept

    def anew(self, func: Any) -> _T:
        """A new entry of ``func`` in place of the old one."""
        return self._made_for(_owner_of(func))

    def _made_for(self, owner: Any) -> _T:
        self._kept.pop(owner, None)
        while len(self._kept) >= _MAX_OWNERS:
            del self._kept[next(iter(self._kept))]
        made = self._kept[owner] = self._make()
        return made

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()


def _owner_of(func: Any) -> Any:
    func = getattr(func, "shares_cache_with", func)
    if isinstance(func, nn.Module):
        return func
    func = getattr(func, "__func__", func)
    return getattr(func, "__code__", None) or type(func)
