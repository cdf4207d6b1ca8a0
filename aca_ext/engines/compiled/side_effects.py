"""Side effects of func on Python state: counters are supported, all others are refused.

TorchDynamo reports the side effects of a traced evaluation. Compiled programs have none. If each evaluation adds a
constant to a value on which func does not depend, a counter, the engine adds the sum for all evaluations.
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
    """A number or tensor to which each evaluation adds ``increment``; a tensor is replaced or changed in place."""

    place: Place
    increment: float
    is_number: bool = True
    is_in_place: bool = False


def counters_of(graph: fx.GraphModule, tracer: Any, scope: dict[str, Any]) -> list[Counter]:
    """Finds the counters of a traced evaluation and removes them from its traced graph.

    Args:
        tracer: TorchDynamo's InstructionTranslator.
        scope: values of ``L`` and ``G`` in the names of places.

    Raises:
        CompileError: the evaluation has another side effect.
    """
    found: list[Counter] = []
    chains = {chain.nodes[-1]: chain for chain in _chains(graph)}
    effects = tracer.output.side_effects
    for variable in effects._get_modified_vars():
        if getattr(variable, "source", None) is None:  # created by the evaluation itself
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
        f"func changes {place} in every evaluation. A compiled solve updates only counters, to which each evaluation "
        f"adds the same number; other changes would be lost. {_HINT}"
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
    except Exception:  # torch raises errors of several kinds if a variable is not in the graph
        return None


def name_of(source: Any) -> str:
    """TorchDynamo's name of a source or a guard; ``name`` is a method in some versions of torch."""
    name = source.name
    return str(name() if callable(name) else name)


def name_of_input(node: fx.Node) -> str:
    """TorchDynamo's name of the value that an input of a traced graph stands for."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return node.name if source is None else name_of(source)


def _changes_of(variable: Any, effects: Any, scope: dict[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Yields the places in a changed object, with TorchDynamo's variables for their new values."""
    name = name_of(variable.source)
    for attribute, value in effects.store_attr_mutations.get(variable, {}).items():
        is_global = type(variable).__name__ == "NewGlobalVariable"
        yield Place(name if is_global else f"{name}.{attribute}"), value
    items = getattr(variable, "items", None)
    if not isinstance(items, (list, dict)):
        if variable not in effects.store_attr_mutations:
            raise CompileError(f"func changes {shown(name)} in every evaluation, and the change would be lost. {_HINT}")
        return
    before = eval(name, scope)
    pairs = dict(enumerate(items)) if isinstance(items, list) else {_key(k): v for k, v in items.items()}
    if len(pairs) != len(before) or not all(_contains(before, key) for key in pairs):
        raise CompileError(
            f"func adds entries to {shown(name)} or removes some in every evaluation, and these changes would be lost. "
            f"{_HINT}"
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
    """Additions of constants to an input of a traced graph that has no other use."""

    name: str  # TorchDynamo's name of the input
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
    """The increment that a node adds to ``x``, and True if in place; None for another operation."""
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
    """Raised if func uses a counter other than by adding to it."""


def _used(*_: Any) -> NoReturn:
    raise _UsedError


class _Tally:
    """Stand-in for a counter that allows additions and raises on every other use."""

    def __init__(self, total: float = 0) -> None:
        self.total = total

    def __add__(self, x: Any) -> _Tally:
        return _Tally(self.total + x) if _is_number(x) else _used()

    def __sub__(self, x: Any) -> _Tally:
        return _Tally(self.total - x) if _is_number(x) else _used()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance reads it. In func that is a use of the counter; in nn.Module.__setattr__ it is not.
        return _Tally if str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.nn.") else _used()

    __radd__ = __add__
    __bool__ = __int__ = __float__ = __index__ = __hash__ = __str__ = __repr__ = __format__ = _used
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _used
    __getattr__ = _used


def dependence_of(counters: Sequence[Counter], scope: dict[str, Any], evaluate: Callable[[], Any]) -> str:
    """Evaluates func with stand-ins for its counters; returns an error message if it depends on one, else ""."""
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
        except Exception:  # func and torch may raise any error when they meet a _Tally
            is_right = False
        finally:
            place.set(owner, before)
        if not is_right:
            return (
                f"func does more with {place} than adding a constant to it in every evaluation. A compiled solve "
                f"supports only such counters. {_HINT}"
            )
    return ""


class Counting:
    """The counters of a solve with the objects that hold them.

    Attributes:
        names: TorchDynamo's names of the counters' places.
    """

    def __init__(self, counters: Sequence[Counter], scope: dict[str, Any]) -> None:
        self._places = [(counter, counter.place.owner(scope)) for counter in counters]
        self.names = {counter.place.name for counter in counters}

    def count(self, n: int) -> None:
        """Adds the increments of ``n`` evaluations to the counters."""
        for counter, owner in self._places:
            value, added = counter.place.get(owner), counter.increment * n
            if counter.is_in_place:
                value.detach().data.add_(added)
            else:
                counter.place.set(owner, value + added if counter.is_number else value.detach() + added)
