"""Trees of tensors: states nested in dicts, lists, tuples and other nodes that PyTorch knows.

A node is any class that is registered with ``torch.utils._pytree``: the builtin containers, and dataclasses after
``torch.export.register_dataclass``.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from aca_ext.errors import AcaError, SlopeError

Structure = Any  # a TreeSpec of torch.utils._pytree

_SEQUENCES = (tuple, list)
_DICTS = (dict, OrderedDict, defaultdict)


def is_node(x: object) -> bool:
    """Tells whether ``x`` is a container of parts, not a leaf."""
    return type(x) in pytree.SUPPORTED_NODES or _is_namedtuple(x)


def labelled_leaves(x: Any, path: str) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, such as ``y0['pos'][1]``."""
    if not is_node(x):
        return [(path, x)]
    parts, _ = _flattened(x)
    names = _names(x, parts)
    return [leaf for part, name in zip(parts, names, strict=True) for leaf in labelled_leaves(part, path + name)]


def structure_of(x: Any) -> Structure:
    """The structure of a tree without its leaves; hashable."""
    return pytree.tree_structure(x)


def unflattened(structure: Structure, leaves: Iterable[Any]) -> Any:
    """The leaves in a structure."""
    return pytree.tree_unflatten(list(leaves), structure)


def leaves_of(y: Any) -> Sequence[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(y, Tensor):
        return (y,)
    return y if is_flat(y) else pytree.tree_leaves(y)


def like(y: Any, leaves: Iterable[Any]) -> Any:
    """The leaves in the structure of ``y``."""
    if isinstance(y, Tensor):
        return next(iter(leaves))
    return like_tuple(type(y), leaves) if is_flat(y) else unflattened(structure_of(y), leaves)


def map_leaves(fn: Callable[..., Any], y: Any, *others: Any) -> Any:
    """``fn`` of the tensors of states of the same structure, in that structure."""
    return like(y, [fn(*parts) for parts in zip(*map(leaves_of, (y, *others)), strict=True)])


def parts_like(y: Any, k: Any) -> Sequence[Any]:
    """The parts of ``k``, func's result for the state ``y``, in the order of the tensors of y.

    Raises:
        SlopeError: it has another structure than a nested state.
    """
    if isinstance(y, Tensor) or is_flat(y):
        return k if isinstance(k, (tuple, list)) else (k,)
    return leaves_like(structure_of(y), k, "func's output", SlopeError)


def like_tuple(kind: type[tuple[Any, ...]], parts: Iterable[Any]) -> tuple[Any, ...]:
    """The parts as a tuple or namedtuple of class ``kind``."""
    made: tuple[Any, ...] = getattr(kind, "_make", kind)(parts)
    return made


def leaves_like(structure: Structure, x: Any, what: str, error: type[AcaError]) -> Sequence[Any]:
    """The leaves of ``x`` in the order of ``structure``, whose keys may come in another order.

    Raises:
        error: x has another structure; the message names the first place, starting with ``what``.
    """
    leaves: list[Any] = []
    _collect(structure, x, what, error, leaves)
    return leaves


def is_flat(y: Any) -> bool:
    """Tells whether ``y`` is a tuple of tensors."""
    return isinstance(y, tuple) and all(isinstance(part, Tensor) for part in y)


def _collect(structure: Structure, x: Any, path: Any, error: type[AcaError], found: list[Any]) -> None:
    """Appends the leaves of ``x`` to ``found``.

    ``path`` is a text, or a place, (path of the node, node, its keys or parts, position), of which a text is made when
    it is needed.
    """
    if structure.is_leaf():
        if is_node(x):
            raise error(f"{_text(path)} is of type {type(x).__name__}; the state has a tensor there.")
        found.append(x)
        return
    keys = _keys(structure)
    if keys is not None and isinstance(x, Mapping):
        _check_keys(keys, x, path, error)
        parts: Sequence[Any] = [x[key] for key in keys]
    else:
        parts = _parts_like(structure, x, path, error)
    for i, (part, child) in enumerate(zip(parts, _children(structure), strict=True)):
        _collect(child, part, (path, x, parts if keys is None else keys, i), error, found)


def _check_keys(keys: Sequence[Any], x: Mapping[Any, Any], path: Any, error: type[AcaError]) -> None:
    if len(keys) == len(x) and all(key in x for key in keys):
        return
    missing, extra = [key for key in keys if key not in x], [key for key in x if key not in keys]
    wrong = f"no {missing[0]!r}" if missing else f"{extra[0]!r}, which the state does not have"
    raise error(f"{_text(path)} has {wrong}. The keys of the state are {list(keys)!r}.")


def _parts_like(structure: Structure, x: Any, path: Any, error: type[AcaError]) -> Sequence[Any]:
    """The parts of ``x``, a node of the kind that the structure has."""
    is_sequence = structure.type in _SEQUENCES and type(x) in _SEQUENCES
    parts, context = (x, None) if is_sequence else _flattened(x) if is_node(x) else ((), None)
    kind = namedtuple if _is_namedtuple(x) else type(x)
    if not is_sequence and not (kind is structure.type and context == structure.context):
        expected = structure.context if isinstance(structure.context, type) else structure.type
        raise error(
            f"{_text(path)} is of type {type(x).__name__}; the state has a {getattr(expected, '__name__', expected)} "
            "there."
        )
    if len(parts) != structure.num_children:
        raise error(f"{_text(path)} has {len(parts)} parts; the state has {structure.num_children} there.")
    return parts


def _flattened(x: Any) -> tuple[list[Any], Any]:
    """The parts of a node and what else its class needs; without ``tree_flatten``, whose cycles would keep tensors."""
    if _is_namedtuple(x):
        return list(x), type(x)
    parts, context = pytree.SUPPORTED_NODES[type(x)].flatten_fn(x)
    return list(parts), context


def _is_namedtuple(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields") and type(x) not in pytree.SUPPORTED_NODES


def _text(path: Any) -> str:
    if isinstance(path, str):
        return path
    before, x, keys, i = path
    return _text(before) + (f"[{keys[i]!r}]" if isinstance(x, Mapping) else _names(x, keys)[i])


def _names(x: Any, parts: Sequence[Any]) -> list[str]:
    """The names of the parts of a node as they stand in a path."""
    if isinstance(x, Mapping) and len(x) == len(parts):
        return [f"[{key!r}]" for key in x]
    fields = getattr(x, "_fields", None)
    if fields is None and dataclasses.is_dataclass(x):
        named = ((field.name, getattr(x, field.name, None)) for field in dataclasses.fields(x))
        fields = [name for name, value in named if any(value is part for part in parts)]
    if fields is not None and len(fields) == len(parts):
        return [f".{name}" for name in fields]
    return [f"[{i}]" for i in range(len(parts))]


def _keys(structure: Structure) -> Sequence[Any] | None:
    """The keys of a node that is a dict of some kind, else None."""
    if structure.type not in _DICTS:
        return None
    keys: Sequence[Any] = structure.context[1] if structure.type is defaultdict else structure.context
    return keys


def _children(structure: Structure) -> Sequence[Structure]:
    return structure.children() if hasattr(structure, "children") else structure.children_specs  # before torch 2.9
