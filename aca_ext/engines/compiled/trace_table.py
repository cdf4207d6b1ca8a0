"""The table of the graphs that were traced of a func, and the lookup of those whose guards hold."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from aca_ext.engines.compiled.backend import backend, keep_guard
from aca_ext.engines.compiled.changing_numbers import ChangingNumbers
from aca_ext.engines.compiled.method_guards import Methods
from aca_ext.problem.trees import parts_like
from aca_ext.vector_field.function_cache import PerOwner

# Private to torch; without it, TorchDynamo itself looks graphs up, which takes longer.
_eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_cache_entries: Any = getattr(_eval_frame, "_debug_get_cache_entry_list", None)

_ORIGINAL = "_torchdynamo_orig_callable"


def _call(func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> list[Tensor]:
    k = func(t, y, *args)
    # Clones, so that each component is a result of the graph, in order. TorchDynamo refuses results that depend on
    # intermediates made to require grad, hence detach(), which the backend removes from the graph.
    return [part.detach().clone() for part in parts_like(y, k)]


_numbers = itertools.count()


@dataclass(frozen=True)
class _Kept:
    """A traced graph in TorchDynamo's cache.

    Attributes:
        manager: manager of its guards; its ``cache_entry`` is None after TorchDynamo dropped the graph.
        holds: function of the arguments of ``_call`` by name; tells whether the guards hold.
        find: function of the same arguments; gathers the inputs of the graph and calls it.
    """

    manager: Any
    holds: Callable[[dict[str, Any]], bool]
    find: Callable[..., Any]


class TraceTable:
    """The traced graphs of one owner; TorchDynamo caches graphs by code object, so each table creates its own."""

    def __init__(self) -> None:
        code = _call.__code__.replace(co_name=f"_call_{next(_numbers)}")  # makes the code unequal to all others
        self._call = types.FunctionType(code, globals(), "_call")
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [keep_guard(guard) for guard in guards]}
        self.trace = torch.compile(self._call, backend=backend, fullgraph=True, dynamic=False, options=options)
        self.kept: list[_Kept] | None = []  # None if this version of torch does not show them
        self.methods = Methods()
        self.numbers = ChangingNumbers()

    def look_up(self, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> None:
        """Does the same as ``trace`` at a fifth of its overhead if the guards of a graph hold, else nothing."""
        if self.kept:
            values = {"func": func, "t": t, "y": y, "args": args}
            for graph in self.kept:
                if graph.manager.cache_entry is not None and graph.holds(values):
                    graph.find(func, t, y, args)
                    return

    def keep(self) -> None:
        """Updates ``kept`` after ``trace`` made a graph."""
        try:
            self.kept = [self._kept(entry) for entry in _cache_entries(self._call.__code__)]
        except (AttributeError, StopIteration, TypeError, ValueError):
            self.kept = None

    def _kept(self, entry: Any) -> _Kept:
        scope, manager = self._call.__globals__, entry.guard_manager
        if manager.cache_entry is None:
            raise ValueError("this version of torch does not show when TorchDynamo drops a graph")
        # The code calls the graph by a global name. Here the name stands for the graph without TorchDynamo's wrapper.
        name = next(name for name in entry.code.co_names if getattr(scope.get(name), _ORIGINAL, None) is not None)
        find = types.FunctionType(entry.code, {**scope, name: getattr(scope[name], _ORIGINAL)})
        return _Kept(manager, manager.root.check, find)


tables = PerOwner(TraceTable)


def table_of(func: Any) -> TraceTable:
    table = tables.of(func)
    return table if table.methods.are_unchanged() else tables.anew(func)


def specialise(func: Callable[..., Any]) -> None:
    """From now on traces of func take all numbers that func reads as constants, even if they change."""
    tables.anew(func).numbers.is_given_up = True


def scope_of(func: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Scope in which TorchDynamo's names of places are resolved; args are a list, so that entries can be replaced."""
    return {"L": {"func": func, "args": list(args)}, "G": globals()}
