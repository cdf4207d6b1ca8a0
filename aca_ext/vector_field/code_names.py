"""Globals that code names, and classes without state: the static part of the walk over the objects that func holds."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
import weakref

_STANDARD = sysconfig.get_paths()["stdlib"]
_LIBRARIES = {
    "IPython", "PIL", "_pytest", "aca_ext", "jax", "matplotlib", "networkx", "numpy", "pandas", "pluggy", "pytest",
    "scipy", "sklearn", "sympy", "torch", "torchdiffeq", "torchvision", "tqdm", "wandb",
}  # fmt: skip
BY_NAME = frozenset(
    {"__import__", "eval", "exec", "globals", "locals", "vars"}
)  # reach objects that code does not name
_MAX_CODES = 4096
OF_CLASSES = frozenset({"__annotations__", "__dataclass_fields__", "__dataclass_params__", "__match_args__"})


def is_library(module: object) -> bool:
    """Tells whether a module, named by ``__module__`` of what it defines, holds no state of a user's func."""
    return type(module) is not str or _is_library(module)


@functools.lru_cache(maxsize=1024)
def _is_library(module: str) -> bool:
    name = module.partition(".")[0]
    if name in sys.stdlib_module_names:
        # A file of the user's may have the name of a standard module that it hides.
        file = getattr(sys.modules.get(name), "__file__", None)
        return file is None or (file.startswith(_STANDARD) and "site-packages" not in file)
    return name in _LIBRARIES


# Results of ``leads_nowhere`` by class. Most classes hold no state, and finding out takes long.
_plain_classes: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def leads_nowhere(kind: type) -> bool:
    """Tells whether the attributes of a class and the globals that its methods name hold no state."""
    known = _plain_classes.get(kind)
    if known is None:
        bases = [base for base in kind.__mro__ if not is_library(base.__module__)]
        known = _plain_classes[kind] = all(_is_plain(name, x) for base in bases for name, x in vars(base).items())
    return known


def _is_plain(name: str, x: object) -> bool:
    """Tells whether a class attribute holds no state. A method holds none if it reaches no object but its class."""
    if name in OF_CLASSES:
        return True
    if not isinstance(x, types.FunctionType):
        return name.startswith("__") and isinstance(x, (str, type(None), types.GetSetDescriptorType))
    names = globals_named_by(x.__code__)
    if x.__defaults__ or x.__kwdefaults__ or set(x.__code__.co_freevars) - {"__class__"} or BY_NAME & set(names):
        return False
    named = [x.__globals__[name] for name in names if name in x.__globals__]
    return all(
        is_library(g.__name__ if isinstance(g, types.ModuleType) else g.__module__)
        if isinstance(g, (type, types.FunctionType, types.ModuleType))
        else False
        for g in named
    )


def slots_of(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    mangled = (f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name for name in names)
    return [name for name in mangled if type(kind.__dict__.get(name)) is types.MemberDescriptorType]


_names: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}  # by id, since hashing code looks at all of it


def globals_named_by(code: types.CodeType) -> tuple[str, ...]:
    """Names of globals in code and in the functions defined inside it."""
    known = _names.get(id(code))
    if known is None:
        instructions = list(dis.get_instructions(code))
        found = {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        found |= {"__import__" for i in instructions if i.opname == "IMPORT_NAME"}
        inner = (name for part in code.co_consts if isinstance(part, types.CodeType) for name in globals_named_by(part))
        if len(_names) >= _MAX_CODES:
            _names.clear()
        known = _names[id(code)] = code, tuple(sorted({*found, *inner}))
    return known[1]
