"""The tensors, modules and random generators that func holds, found by a walk over what its code can reach.

The walk looks into closures, defaults, ``functools.partial``, bound objects, attributes, containers, and globals that
code names. It does not look into objects of libraries, nor beyond the first entries of a long container: what it misses
is found when it is used (``aca_ext.gradients.dependencies``, ``aca_ext.vector_field.replay``).
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_MAX_OBJECTS = 5000  # besides modules, all of which count
_MAX_ENTRIES = 1024  # of one container
_MAX_CODES = 4096

_LIBRARIES = sys.stdlib_module_names | {"aca_ext", "numpy", "pytest", "scipy", "torch", "torchdiffeq", "torchvision"}
# Holds nothing of interest, and is sorted out before it is queued.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice, torch.dtype, torch.device,
     torch.Size, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.GetSetDescriptorType,
     types.MemberDescriptorType}
)  # fmt: skip
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Place(NamedTuple):
    """Place where a tensor is held: ``holder[key]`` of a dict or list, the contents of a cell, or an attribute.

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
        holder, key = self.holder, self.key
        try:
            if isinstance(holder, types.CellType):
                return holder.cell_contents
            return holder[key] if isinstance(holder, (dict, list, tuple, deque)) else getattr(holder, key)
        except (AttributeError, LookupError, ValueError):
            return None

    def put(self, value: Any) -> None:
        """Replaces it, where it can be replaced."""
        holder, key = self.holder, self.key
        if isinstance(holder, (dict, list, deque)):
            holder[key] = value
        elif isinstance(holder, types.CellType):
            holder.cell_contents = value
        elif isinstance(holder, type):
            setattr(holder, key, value)
        elif not isinstance(holder, tuple):
            object.__setattr__(holder, key, value)


class Holdings:
    """Findings of a walk from ``roots``.

    Args:
        is_thorough: look at what was set on layers of libraries too.

    Attributes:
        modules: every nn.Module, those inside others included.
        places: tensors that require grad, parameters and others, each once, with where they are held.
        generators: random generators.
    """

    def __init__(self, roots: Iterable[Any], *, is_thorough: bool = False) -> None:
        self._is_thorough = is_thorough
        self.modules: list[nn.Module] = []
        self.places: list[Place] = []
        self.generators: list[torch.Generator] = []
        self._seen: set[int] = set()
        self._todo: list[Any] = []
        self._left = _MAX_OBJECTS
        for i, root in enumerate(roots):
            self.look(root, (), i)
        self._walk()

    def has_seen(self, x: object) -> bool:
        return id(x) in self._seen

    def name_of(self, tensor: Tensor) -> str | None:
        """The name that a module has for a tensor, or that of the variable or attribute that holds it."""
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if parameter is tensor:
                    return name
        return next((str(place.key) for place in self.places if place.tensor is tensor), None)

    def look(self, x: Any, holder: Any, key: Any, is_attribute: bool = False) -> None:
        """Notes a tensor or a generator, and queues what may hold more."""
        kind = type(x)
        if kind in _ATOMS:
            return
        if isinstance(x, Tensor):
            if x.requires_grad and id(x) not in self._seen:
                self._seen.add(id(x))
                self.places.append(Place(x, holder, key, is_attribute))
        elif kind is torch.Generator:
            if id(x) not in self._seen:
                self._seen.add(id(x))
                self.generators.append(x)
        else:
            self._todo.append(x)

    def _walk(self) -> None:
        todo, seen = self._todo, self._seen
        while todo:
            x = todo.pop()
            if id(x) in seen:
                continue
            if isinstance(x, nn.Module):
                seen.add(id(x))
                self._module(x)
            elif self._left > 0:
                self._left -= 1
                if isinstance(x, type):
                    self._class(x)
                    continue
                seen.add(id(x))
                visit = _VISITORS.get(type(x))
                if visit is not None:
                    visit(self, x)
                elif not _is_library(type(x).__module__):
                    self._object(x)

    def _module(self, module: nn.Module) -> None:
        self.modules.append(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in self._seen:
                self._seen.add(id(parameter))
                self.places.append(Place(parameter, module._parameters, name, True))
        if module._modules:
            self._todo += [child for child in module._modules.values() if child is not None]
        kind = type(module)
        is_library = _is_library(kind.__module__)
        if not is_library:
            self._class(kind)
        elif not self._is_thorough:  # what users keep on a layer of a library is rare, and layers are many
            return
        attributes = vars(module)
        for name, x in attributes.items():
            if type(x) not in _ATOMS and name not in _MODULE_ATTRIBUTES:
                self.look(x, attributes, name, True)

    def _object(self, x: Any) -> None:
        kind = type(x)
        self._class(kind)
        for container in (list, tuple, dict, deque):
            if isinstance(x, container):
                _VISITORS[container](self, x)
        attributes = getattr(x, "__dict__", None)
        if type(attributes) is dict:
            for name, value in attributes.items():
                self.look(value, attributes, name, True)
        for base in kind.__mro__:
            for name in _slots_of(base):
                self.look(getattr(x, name, None), x, name)

    def _class(self, kind: type) -> None:
        """The methods and attributes of a class and of its bases."""
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        for base in kind.__mro__:
            if _is_library(base.__module__):
                continue
            for name, value in base.__dict__.items():
                if type(value) in _ATOMS:
                    continue
                if isinstance(value, property):
                    value = value.fget
                elif isinstance(value, (staticmethod, classmethod)):
                    value = value.__func__
                self.look(value, base, name)


@functools.lru_cache(maxsize=1024)
def _is_library(module: object) -> bool:
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES


def _slots_of(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [name for name in names if type(kind.__dict__.get(name)) is types.MemberDescriptorType]


def _function(walk: Holdings, f: types.FunctionType) -> None:
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=False):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        walk.look(value, cell, name)
    if f.__defaults__:
        _sequence(walk, f.__defaults__)
    if f.__kwdefaults__:
        _mapping(walk, f.__kwdefaults__)
    known = f.__globals__
    if not _is_library(known.get("__name__", "")):
        for name in _globals_named_by(f.__code__):
            value = known.get(name)
            if type(value) not in _ATOMS:
                walk.look(value, known, name, True)


_names: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}  # by id, since hashing code looks at all of it


def _globals_named_by(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals in code and in the functions defined inside it."""
    known = _names.get(id(code))
    if known is None:
        found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        inner = (
            name for part in code.co_consts if isinstance(part, types.CodeType) for name in _globals_named_by(part)
        )
        if len(_names) >= _MAX_CODES:
            _names.clear()
        known = _names[id(code)] = code, tuple(sorted({*found, *inner}))
    return known[1]


def _sequence(walk: Holdings, x: Any) -> None:
    for i, value in enumerate(islice(x, _MAX_ENTRIES)):
        walk.look(value, x, i)


def _unordered(walk: Holdings, x: Any) -> None:
    for value in islice(x, _MAX_ENTRIES):
        walk.look(value, (), "")


def _mapping(walk: Holdings, x: Any) -> None:
    for key, value in islice(x.items(), _MAX_ENTRIES):
        walk.look(value, x, key)


def _partial(walk: Holdings, x: Any) -> None:
    walk.look(x.func, (), "func")
    _sequence(walk, x.args)
    _mapping(walk, x.keywords)
    _mapping(walk, vars(x))


def _method(walk: Holdings, x: types.MethodType) -> None:
    walk.look(x.__self__, (), "self")
    walk.look(x.__func__, (), "func")


def _namespace(walk: Holdings, x: Any) -> None:
    for name, value in vars(x).items():
        walk.look(value, vars(x), name, True)


_VISITORS: dict[type, Callable[[Holdings, Any], None]] = {
    types.FunctionType: _function,
    types.MethodType: _method,
    types.SimpleNamespace: _namespace,
    types.MappingProxyType: _mapping,
    functools.partial: _partial,
    list: _sequence,
    tuple: _sequence,
    deque: _sequence,
    set: _unordered,
    frozenset: _unordered,
    dict: _mapping,
    OrderedDict: _mapping,
    defaultdict: _mapping,
}
