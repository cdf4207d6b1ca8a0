"""The tensors, modules and random generators that func holds, found by a walk over what its code can reach.

The walk looks into closures, defaults, ``functools.partial``, bound objects, attributes, containers, hooks, and globals
that code names. It does not look into objects of libraries, nor beyond the first entries of a long container, and knows
when it left something out: what it missed is found when it is used (``aca_ext.vector_field.replay``).
"""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aca_ext.kernels.fused import module_walk

_MAX_OBJECTS = 5000  # besides modules, all of which count
_MAX_ENTRIES = 1024  # of one container
_MAX_CODES = 4096

_LIBRARIES = sys.stdlib_module_names | {"aca_ext", "numpy", "pytest", "scipy", "torch", "torchdiffeq", "torchvision"}
# Holds nothing of interest, and is sorted out before it is queued.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice, torch.dtype, torch.device,
     torch.Size, types.CodeType, types.GetSetDescriptorType, types.MemberDescriptorType}
)  # fmt: skip
_BY_NAME = frozenset({"__import__", "eval", "exec", "globals", "locals", "vars"})  # reach what code does not name
_MODULE_WALK = module_walk(_ATOMS, frozenset(vars(nn.Module())))


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

    Attributes:
        modules: every nn.Module, those inside others included.
        kinds: their classes.
        generators: random generators.
        is_complete: nothing that code can reach was left out.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.is_complete = not _hooks_of_all_modules()
        self.modules: list[nn.Module] = []
        self.kinds: set[type] = set()
        self._places: list[tuple[Tensor, Any, Any, bool]] = []  # a Place takes long to make, and is rarely needed
        self.generators: list[torch.Generator] = []
        self._seen: set[int] = set()
        self._todo: list[Any] = []
        self._left = _MAX_OBJECTS
        for i, root in enumerate(roots):
            self.look(root, (), i)
        self._walk()

    @property
    def tensors(self) -> list[Tensor]:
        """Those that require grad, parameters and others, each once."""
        return [place[0] for place in self._places]

    @property
    def places(self) -> list[Place]:
        """Places where they are held."""
        return [Place._make(place) for place in self._places]

    def let_go_of_histories(self) -> None:
        """Forgets tensors that were computed: whoever keeps the walk would keep their graphs, and what those hold."""
        self._places = [place for place in self._places if place[0].is_leaf]

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
                self._places.append((x, holder, key, is_attribute))
        elif kind is torch.Generator:
            if id(x) not in self._seen:
                self._seen.add(id(x))
                self.generators.append(x)
        elif kind is types.BuiltinFunctionType:
            if not isinstance(x.__self__, (type(None), type, types.ModuleType)):
                self._todo.append(x.__self__)
        elif kind is types.ModuleType:
            self.is_complete = self.is_complete and _is_library(x.__name__)
        else:
            self._todo.append(x)

    def _walk(self) -> None:
        while self._todo:
            self._visit(self._todo.pop())
            if not self._todo:
                for kind in self.kinds:
                    self._class(kind)

    def _visit(self, x: Any) -> None:
        if id(x) in self._seen:
            return
        if isinstance(x, nn.Module):
            self._module(x)
            return
        self._left -= 1
        visit = _VISITORS.get(type(x))
        if self._left < 0:
            self.is_complete = False
        elif isinstance(x, type):
            self._class(x)
        elif visit is not None:
            self._seen.add(id(x))
            visit(self, x)
        elif not _is_library(type(x).__module__):
            self._seen.add(id(x))
            self._object(x)
        else:
            self.is_complete = False

    def _module(self, module: nn.Module) -> None:
        others: list[tuple[Any, Any, str]] = []
        _MODULE_WALK.visit(module, self._seen, self.modules, self._places, self.kinds, others)
        for x, holder, name in others:
            if type(x).__module__ == "torch.jit._script" and hasattr(
                x, "values"
            ):  # what scripted modules have of dicts
                for value in x.values():
                    self.look(value, holder, name, True)
            else:
                self.look(x, holder, name, True)

    def _object(self, x: Any) -> None:
        kind = type(x)
        self._class(kind)
        self.is_complete = self.is_complete and not hasattr(kind, "__getattr__")
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
        is_plain = _plain_classes.get(kind)
        if is_plain is None:
            is_plain = _plain_classes[kind] = _is_plain(kind)
        if is_plain:
            return
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
                if name not in _OF_CLASSES:
                    self.look(value, base, name)


_OF_CLASSES = frozenset({"__annotations__", "__dataclass_fields__", "__dataclass_params__", "__match_args__"})


def _hooks_of_all_modules() -> bool:
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


@functools.lru_cache(maxsize=1024)
def _is_library(module: object) -> bool:
    return not isinstance(module, str) or module.partition(".")[0] in _LIBRARIES


# Whether the methods and attributes of a class lead nowhere. Mostly they do, and to find that out takes long.
_plain_classes: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_plain(kind: type) -> bool:
    values = [(name, x) for base in kind.__mro__ if not _is_library(base.__module__) for name, x in vars(base).items()]
    return all(
        isinstance(x, (str, type(None), types.GetSetDescriptorType))
        or name in _OF_CLASSES
        or (isinstance(x, types.FunctionType) and _leads_nowhere(x))
        for name, x in values
    )


def _leads_nowhere(f: types.FunctionType) -> bool:
    """Tells whether a method holds no object but its class, and names no globals but builtins and libraries."""
    names = _globals_named_by(f.__code__)
    if f.__defaults__ or f.__kwdefaults__ or set(f.__code__.co_freevars) - {"__class__"} or _BY_NAME & set(names):
        return False
    named = [f.__globals__[name] for name in names if name in f.__globals__]
    return all(
        _is_library(x.__name__ if isinstance(x, types.ModuleType) else x.__module__)
        if isinstance(x, (type, types.FunctionType, types.ModuleType))
        else False
        for x in named
    )


def _slots_of(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return [name for name in names if type(kind.__dict__.get(name)) is types.MemberDescriptorType]


def _function(walk: Holdings, f: types.FunctionType) -> None:
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=False):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            walk.is_complete = False
            continue
        walk.look(value, cell, name)
    if f.__defaults__:
        _sequence(walk, f.__defaults__)
    if f.__kwdefaults__:
        _mapping(walk, f.__kwdefaults__)
    known = f.__globals__
    if _is_library(known.get("__name__", "")):
        return
    for name in _globals_named_by(f.__code__):
        value = known.get(name)
        if type(value) is types.ModuleType and not _is_library(value.__name__):
            _module_of_code(walk, value, f.__code__)
        elif type(value) not in _ATOMS:
            walk.look(value, known, name, True)
        elif name in _BY_NAME:
            walk.is_complete = False


def _module_of_code(walk: Holdings, module: types.ModuleType, code: types.CodeType) -> None:
    """Names that code uses, of a module with other code."""
    walk.is_complete = False  # what that names there is more than is looked at
    for name in code.co_names:
        value = vars(module).get(name)
        if value is not None:
            walk.look(value, vars(module), name, True)


_names: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}  # by id, since hashing code looks at all of it


def _globals_named_by(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals in code and in the functions defined inside it."""
    known = _names.get(id(code))
    if known is None:
        instructions = list(dis.get_instructions(code))
        found = {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        found |= {"__import__" for i in instructions if i.opname == "IMPORT_NAME"}
        inner = (
            name for part in code.co_consts if isinstance(part, types.CodeType) for name in _globals_named_by(part)
        )
        if len(_names) >= _MAX_CODES:
            _names.clear()
        known = _names[id(code)] = code, tuple(sorted({*found, *inner}))
    return known[1]


def _sequence(walk: Holdings, x: Any) -> None:
    walk.is_complete = walk.is_complete and len(x) <= _MAX_ENTRIES
    for i, value in enumerate(islice(x, _MAX_ENTRIES)):
        walk.look(value, x, i)


def _unordered(walk: Holdings, x: Any) -> None:
    walk.is_complete = walk.is_complete and len(x) <= _MAX_ENTRIES
    for value in islice(x, _MAX_ENTRIES):
        walk.look(value, (), "")


def _mapping(walk: Holdings, x: Any) -> None:
    walk.is_complete = walk.is_complete and len(x) <= _MAX_ENTRIES
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
