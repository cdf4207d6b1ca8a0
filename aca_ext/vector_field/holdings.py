"""The tensors, modules and random generators that func holds, found by a walk over what its code can reach.

The walk visits closures, defaults, ``functools.partial``, bound objects, attributes, containers, hooks, and globals
that code names. It skips objects of libraries and all but the first entries of a long container, and records that it
skipped something. A tensor that it missed is noticed when func uses it (``aca_ext.vector_field.replay``).
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from aca_ext.kernels.extension import contents, module_walk
from aca_ext.vector_field.code_names import OF_CLASSES, is_library, leads_nowhere, slots_of
from aca_ext.vector_field.contents import MISSING, get, put
from aca_ext.vector_field.visitors import ATOMS, VISITORS, entries_of, is_a

_MAX_OBJECTS = 2000  # in addition to modules, of which all are visited
_MAX_IN_ALL = 20_000  # entries of all containers

_HOOKS_OF_ALL_MODULES = [
    hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and type(hooks) is not bool
    and isinstance(hooks, dict)
]  # fmt: skip
_FOREIGN_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
_MODULE_WALK = module_walk(ATOMS, frozenset(vars(nn.Module())))


class Place(NamedTuple):
    """Place where a tensor is held: ``holder[key]`` of a dict or sequence, a closure cell, or an attribute.

    ``is_attribute`` tells that a dict is the namespace of an object, or of a module.
    """

    tensor: Tensor
    holder: Any
    key: Any
    is_attribute: bool = False

    def describe(self) -> str:
        if self.is_attribute or not isinstance(self.holder, (dict, list, tuple)):
            return f"as {self.key}"
        return f"in a {type(self.holder).__name__}"

    def get(self) -> Any:
        """The object that is there now; None for nothing."""
        return get(self.holder, self.key, None)

    def put(self, value: Any) -> None:
        """Replaces it, where it can be replaced."""
        put(self.holder, self.key, value)


class Holdings:
    """Findings of a walk from ``roots``.

    Attributes:
        modules: every nn.Module, those inside others included.
        kinds: their classes.
        generators: random generators of PyTorch.
        foreign_generators: random generators of NumPy and Python.
        is_complete: nothing that func's code can reach was skipped.
        contents: a snapshot of all visited places, for comparison with their later contents.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.is_complete = not any(_HOOKS_OF_ALL_MODULES)
        self._had_histories = False
        self.modules: list[nn.Module] = []
        self.kinds: set[type] = set()
        self._places: list[tuple[Tensor, Any, Any, bool]] = []  # plain tuples, since a Place is slow to create
        self.generators: list[torch.Generator] = []
        self.foreign_generators: list[Any] = []
        self.contents = contents(MISSING)
        self._seen: set[int] = set()
        self._todo: list[Any] = []
        self._left, self.entries_left = _MAX_OBJECTS, _MAX_IN_ALL
        self._roots = tuple(roots)
        for hooks in _HOOKS_OF_ALL_MODULES:
            self.contents.add(hooks)
        for i, root in enumerate(self._roots):
            self.look(root, (), i)
        self._walk()

    def again(self) -> Holdings:
        """The same walk over what there is now."""
        return Holdings(self._roots)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that require grad, each once."""
        return [place[0] for place in self._places]

    @property
    def places(self) -> list[Place]:
        """Places of the tensors that require grad."""
        return [Place._make(place) for place in self._places]

    def let_go_of_histories(self) -> None:
        """Drops tensors that were computed by operations, so that it does not keep their autograd graphs alive."""
        leaves = [place for place in self._places if place[0].is_leaf]
        self._had_histories |= len(leaves) < len(self._places)
        self._places = leaves

    def has_histories(self) -> bool:
        """Tells whether other operations computed some of the tensors, or of the buffers of modules."""
        buffers = (buffer for module in self.modules for buffer in module._buffers.values())
        return self._had_histories or any(buffer is not None and buffer.grad_fn is not None for buffer in buffers)

    def has_seen(self, x: object) -> bool:
        return id(x) in self._seen

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a tensor: a module's parameter name, or else the variable or attribute that holds it."""
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if parameter is tensor:
                    return name
        return next((str(place.key) for place in self.places if place.tensor is tensor), None)

    def look(self, x: Any, holder: Any, key: Any, is_attribute: bool = False) -> None:
        """Records a tensor or a generator; queues an object that may hold more of them."""
        kind = type(x)
        if kind in ATOMS:
            return
        if is_a(x, Tensor):
            if x.requires_grad and id(x) not in self._seen:
                self._seen.add(id(x))
                self._places.append((x, holder, key, is_attribute))
        elif kind is torch.Generator:
            if id(x) not in self._seen:
                self._seen.add(id(x))
                self.generators.append(x)
        elif kind is types.BuiltinFunctionType:
            if not isinstance(x.__self__, (type(None), type, types.ModuleType)):
                self._todo.append(x.__self__)
        elif kind is types.ModuleType:
            if not is_library(x.__name__):
                self.is_complete = False  # its code may name more
                self.contents.add(vars(x))
        else:
            self._todo.append(x)

    def _walk(self) -> None:
        while self._todo:
            try:
                self._visit(self._todo.pop())
            except Exception:  # of an object that fails when it is looked at, which func need not do
                self.is_complete = False
            if not self._todo:
                for kind in self.kinds:
                    self._class(kind)

    def _visit(self, x: Any) -> None:
        if id(x) in self._seen:
            return
        if is_a(x, nn.Module):
            self._module(x)
            return
        self._left -= 1
        visit = VISITORS.get(type(x))
        if self._left < 0:
            self.is_complete = False
        elif is_a(x, type):
            self._class(x)
        elif visit is not None:
            self._seen.add(id(x))
            visit(self, x)
        elif not is_library(type(x).__module__) or getattr(type(x), "wraps_func", False):
            self._seen.add(id(x))
            self._object(x)
        else:
            self._seen.add(id(x))
            if isinstance(x, _FOREIGN_GENERATORS):
                self.foreign_generators.append(x)
            self._library_object(x)

    def _module(self, module: nn.Module) -> None:
        others: list[tuple[Any, Any, str]] = []
        _MODULE_WALK.visit(module, self._seen, self.modules, self._places, self.kinds, others, self.contents)
        for x, holder, name in others:
            if type(x).__module__ == "torch.jit._script" and hasattr(
                x, "values"
            ):  # dict-like containers of scripted modules
                for value in x.values():
                    self.look(value, holder, name, True)
            else:
                self.look(x, holder, name, True)

    def _object(self, x: Any) -> None:
        kind = type(x)
        self._class(kind)
        self.is_complete = self.is_complete and not hasattr(kind, "__getattr__")
        for container in (list, tuple, dict, deque):
            if is_a(x, container):
                VISITORS[container](self, x)
        attributes = getattr(x, "__dict__", None)
        if type(attributes) is dict:
            self.contents.add(attributes)
            for name, value in attributes.items():
                self.look(value, attributes, name, True)
        slots = [name for base in kind.__mro__ for name in slots_of(base)]
        if slots:
            self.contents.add_named(x, slots)
        for name in slots:
            self.look(getattr(x, name, None), x, name)

    def _library_object(self, x: Any) -> None:
        """Visits the entries of a container and the attributes, without what these hold inside."""
        self.is_complete = False
        attributes = getattr(x, "__dict__", None)
        for holder in (x if is_a(x, dict) or is_a(x, list) else None, attributes):
            if holder is not None and is_a(holder, (dict, list)):  # type: ignore[arg-type]
                self.contents.add_container(holder)
                for key, value in entries_of(holder):
                    if is_a(value, Tensor) or type(value) in (dict, list, tuple, set, deque):
                        self.look(value, holder, key, holder is attributes)

    def _class(self, kind: type) -> None:
        """The methods and attributes of a class and of its bases."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        if leads_nowhere(kind):
            return
        for base in kind.__mro__:
            if is_library(base.__module__):
                continue
            self.contents.add_named(base, [name for name in base.__dict__ if name not in OF_CLASSES])
            for name, value in base.__dict__.items():
                if type(value) in ATOMS:
                    continue
                if isinstance(value, property):
                    value = value.fget
                elif isinstance(value, (staticmethod, classmethod)):
                    value = value.__func__
                if name not in OF_CLASSES:
                    self.look(value, base, name)
