"""Python state that func changes while it is evaluated: counters, which are kept up, and the rest, which is refused.

TorchDynamo says what a traced evaluation would leave behind. A compiled solve leaves nothing behind by itself; where
each evaluation adds a constant to a value that func does not depend on, the engine adds it for all evaluations.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from aca_ext.engines.compiled.places import Place, shown
from aca_ext.errors import CompileError

_ADD = {operator.add, torch.add, "add"}
_ADD_IN_PLACE = {operator.iadd, "add_"}
_SUBTRACT = {operator.sub, torch.sub, "sub"}
_SUBTRACT_IN_PLACE = {operator.isub, "sub_"}

_NOTHING = object()

_HINT = 'Use engine="eager", or let func only compute the slope.'


@dataclass(frozen=True)
class Counter:
    """A value to which each evaluation adds ``increment``: a Python number, or a tensor, replaced or in place."""

    place: Place
    increment: float
    is_number: bool = True
    is_in_place: bool = False


def counters_of(graph: fx.GraphModule, tracer: Any, scope: dict[str, Any]) -> list[Counter]:
    """The counters of a traced evaluation, taken out of its graph.

    ``tracer`` is TorchDynamo's InstructionTranslator, and ``scope`` holds ``L`` and ``G`` for names of places.

    Raises:
        CompileError: the evaluation leaves something else behind.
    """
    found: list[Counter] = []
    chains = {chain.nodes[-1]: chain for chain in _chains(graph)}
    effects = tracer.output.side_effects
    for variable in effects._get_modified_vars():
        if getattr(variable, "source", None) is None:  # made by the evaluation itself
            continue
        for place, value in _changes_of(variable, effects, scope):
            owner = place.owner(scope)
            before: Any = place.get(owner) if _has(place, owner) else None
            after: Any = getattr(value, "value", _NOTHING)
            chain = chains.get(getattr(_proxy(value), "node", None))  # type: ignore[arg-type]
            if _is_number(before) and _is_number(after):
                if after != before:
                    found.append(Counter(place, after - before))
            elif isinstance(before, Tensor) and chain is not None and chain.name == place.name:
                if not chain.is_in_place:
                    found.append(Counter(place, chain.increment, is_number=False))
            elif not (after is before and _has(place, owner)):
                _refuse(place)
    found += [
        Counter(Place(chain.name), chain.increment, is_number=False, is_in_place=True)
        for chain in chains.values()
        if chain.is_in_place
    ]
    for chain in chains.values():
        for node in reversed(chain.nodes):
            graph.graph.erase_node(node)
    graph.recompile()
    return found


def _refuse(place: Place) -> NoReturn:
    raise CompileError(
        f"func changes {place} in every evaluation. Only counters, to which each evaluation adds the same number, are "
        f"kept up; what func records otherwise would be lost. {_HINT}"
    )


def _has(place: Place, owner: Any) -> bool:
    try:
        place.get(owner)
    except (AttributeError, LookupError, ValueError):
        return False
    return True


def _is_number(x: Any) -> bool:
    return type(x) in (int, float)


def _proxy(variable: Any) -> Any:
    try:
        return variable.as_proxy()
    except Exception:  # of whatever kind torch raises for a variable that is not in the graph
        return None


def name_of(source: Any) -> str:
    """TorchDynamo's name of a source or a guard, a method in some versions of torch."""
    name = source.name
    return str(name() if callable(name) else name)


def name_of_input(node: fx.Node) -> str:
    """TorchDynamo's name of what an input of a graph stands for."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return node.name if source is None else name_of(source)


def _changes_of(variable: Any, effects: Any, scope: dict[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Places in a changed object, and TorchDynamo's variables for what they hold afterwards."""
    name = name_of(variable.source)
    for attribute, value in effects.store_attr_mutations.get(variable, {}).items():
        is_global = type(variable).__name__ == "NewGlobalVariable"
        yield Place(name if is_global else f"{name}.{attribute}"), value
    items = getattr(variable, "items", None)
    if not isinstance(items, (list, dict)):
        if variable not in effects.store_attr_mutations:
            raise CompileError(f"func changes {shown(name)} in every evaluation, which would be lost. {_HINT}")
        return
    before = eval(name, scope)
    pairs = dict(enumerate(items)) if isinstance(items, list) else {_key(k): v for k, v in items.items()}
    if len(pairs) != len(before) or not all(_contains(before, key) for key in pairs):
        raise CompileError(
            f"func adds to {shown(name)} or removes from it in every evaluation, which would be lost. {_HINT}"
        )
    for key, value in pairs.items():
        place = Place(f"{name}[{key!r}]")
        source = getattr(value, "source", None)
        is_same = source is not None and name_of(source) == place.name and _proxy_is_input(value)
        if not is_same and getattr(value, "value", _NOTHING) is not before[key]:
            yield place, value


def _key(key: Any) -> Any:
    return getattr(key, "vt", key).as_python_constant()


def _contains(before: Any, key: Any) -> bool:
    return key in before if isinstance(before, Mapping) else 0 <= key < len(before)


def _proxy_is_input(variable: Any) -> bool:
    node = getattr(_proxy(variable), "node", None)
    return node is None or node.op == "placeholder"


@dataclass
class _Chain:
    """Additions of constants to an input of a graph, which nothing else uses."""

    name: str  # TorchDynamo's, of the input
    nodes: list[fx.Node]
    increment: float = 0
    is_in_place: bool = False


def _chains(graph: fx.GraphModule) -> Iterator[_Chain]:
    for node in [node for node in graph.graph.nodes if node.op == "placeholder"]:
        chain = _Chain(name_of_input(node), [])
        while len(node.users) == 1:
            (user,) = node.users
            step = _step(user, node)
            if step is None:
                break
            if chain.nodes and chain.is_in_place != step[1]:
                break
            chain.nodes.append(user)
            chain.increment += step[0]
            chain.is_in_place = step[1]
            node = user
        if chain.nodes and not node.users and not chain.name.startswith(("L['t']", "L['y']")):
            yield chain


def _step(node: fx.Node, x: fx.Node) -> tuple[float, bool] | None:
    """The increment that a node adds to ``x``, and whether in place; None if it does something else."""
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if a is not x:
        a, b = (b, a) if node.target in _ADD else (a, b)
    if a is not x or not _is_number(b):
        return None
    assert isinstance(b, (int, float))
    for targets, sign, in_place in ((_ADD, 1, False), (_ADD_IN_PLACE, 1, True), (_SUBTRACT, -1, False),
                                    (_SUBTRACT_IN_PLACE, -1, True)):  # fmt: skip
        if node.target in targets:
            return sign * b, in_place
    return None


class _UsedError(Exception):
    """func did something else with a counter than adding to it."""


def _used(*_: Any) -> NoReturn:
    raise _UsedError


class _Tally:
    """Stands in for a counter: may be added to, and nothing else."""

    def __init__(self, total: float = 0) -> None:
        self.total = total

    def __add__(self, x: Any) -> _Tally:
        return _Tally(self.total + x) if _is_number(x) else _used()

    def __sub__(self, x: Any) -> _Tally:
        return _Tally(self.total - x) if _is_number(x) else _used()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance asks for it: that of func is a use of the counter, those of nn.Module.__setattr__ are not.
        return _Tally if str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.nn.") else _used()

    __radd__ = __add__
    __bool__ = __int__ = __float__ = __index__ = __hash__ = __str__ = __repr__ = __format__ = _used
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _used
    __getattr__ = _used


def dependence_of(counters: Sequence[Counter], scope: dict[str, Any], evaluate: Callable[[], Any]) -> str:
    """Evaluates func with stand-ins for its counters: what it does with one beyond adding to it, "" for nothing."""
    for counter in counters:
        if not counter.is_number:
            continue
        place = counter.place
        owner = place.owner(scope)
        before = place.get(owner)
        place.set(owner, _Tally())
        try:
            evaluate()
            total = place.get(owner)
            is_right = type(total) is _Tally and abs(total.total - counter.increment) <= 1e-9 * abs(counter.increment)
        except Exception:  # func, and torch, raise whatever they like where they are given a tally
            is_right = False
        finally:
            place.set(owner, before)
        if not is_right:
            return (
                f"func does more with {place} than adding a constant to it in every evaluation. A compiled solve keeps "
                f"up only such counters. {_HINT}"
            )
    return ""


class Counting:
    """The counters of a solve, and where they are.

    Attributes:
        names: TorchDynamo's names of their places.
    """

    def __init__(self, counters: Sequence[Counter], scope: dict[str, Any]) -> None:
        self._places = [(counter, counter.place.owner(scope)) for counter in counters]
        self.names = {counter.place.name for counter in counters}

    def count(self, n: int) -> None:
        """Adds ``n`` evaluations."""
        for counter, owner in self._places:
            value, added = counter.place.get(owner), counter.increment * n
            if counter.is_in_place:
                value.detach().data.add_(added)
            else:
                counter.place.set(owner, value + added if counter.is_number else value.detach() + added)
