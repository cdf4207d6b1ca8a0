"""Conversion between a user's state (tensor or tree of tensors, real or complex) and one packed real tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aca_ext.errors import AcaError, ArgumentTypeError, ArgumentValueError
from aca_ext.problem.admission import check_readable, looks_readable
from aca_ext.problem.trees import (
    Structure,
    is_node,
    labelled_leaves,
    leaves_like,
    like_tuple,
    structure_of,
    unflattened,
)

# A state as users give and receive it: a tensor, or a tree of tensors (``problem.trees``).
State = Any

_P = TypeVar("_P", bound="Packing")

_FLOATING = "float32, float64, complex64 or complex128 (float16 and bfloat16 run without fused kernels)"
_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128,
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Conversion between a user's state and the one dense real tensor that the solver works on.

    A real tensor is used as it is and keeps its memory format. A complex tensor becomes a real view with a last
    dimension of 2. The components of a tuple, or the leaves of another tree, are flattened and concatenated.

    Attributes:
        shapes: shape of each component as a real tensor, for complex components with the last 2.
        is_tuple: the state has components: it is a tuple, or another tree.
        kind: class of the tuple, for namedtuples.
        tree: structure of a tree other than a tuple of tensors; else None.
        paths: place of each leaf of such a tree, such as ``['pos'][1]``.
        sizes: number of elements of each component.
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    is_complex: bool
    kind: type[tuple[Tensor, ...]] = tuple
    tree: Structure | None = field(default=None, hash=False)  # whose hash older versions of torch do not have
    paths: tuple[str, ...] = ()
    sizes: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", [self._size(shape) for shape in self.shapes])

    @staticmethod
    def _size(shape: torch.Size) -> int:
        """Number of elements of a component in the packed tensor."""
        return math.prod(shape)  # torch.Size.numel would turn symbolic sizes into constants

    @classmethod
    def of(cls: type[_P], y0: object) -> _P:
        """Validates ``y0`` and returns its packing.

        Raises:
            ArgumentTypeError: y0 is no tensor or tree of tensors of one floating dtype on one device.
            ArgumentValueError: y0 is a tree without a tensor.
        """
        is_flat = isinstance(y0, tuple) and len(y0) > 0 and all(isinstance(part, Tensor) for part in y0)
        leaves = _leaves(y0, is_flat)
        for where, part in leaves:
            _check_part(where, part, leaves[0])
        parts = [part for _, part in leaves]
        is_complex = parts[0].is_complex()
        shapes = tuple(torch.Size((*p.shape, 2)) if is_complex else p.shape for p in parts)
        if isinstance(y0, Tensor):
            return cls(shapes, False, is_complex)
        if is_flat:
            return cls(shapes, True, is_complex, type(y0) if hasattr(y0, "_make") else tuple)  # type: ignore[arg-type]
        paths = tuple(where.removeprefix("y0") for where, _ in leaves)
        return cls(shapes, True, is_complex, tree=structure_of(y0), paths=paths)

    def with_shapes(self: _P, shapes: tuple[torch.Size, ...]) -> _P:
        """The packing of states of the same structure with components of other shapes."""
        return replace(self, shapes=shapes)

    @property
    def is_trivial(self) -> bool:
        """True if the user's state is the packed tensor itself."""
        return not self.is_tuple and not self.is_complex

    @property
    def segments(self) -> list[int]:
        """Bounds of the components in the packed tensor: the start of each one, and the end."""
        bounds = [0]
        for size in self.sizes:
            bounds.append(bounds[-1] + size)
        return bounds

    def pack(self, y: State) -> Tensor:
        """The user's state as one real tensor; differentiable."""
        return self.join(self.components(y, "y0", ArgumentTypeError)) if self.is_tuple else as_real(y)

    def components(self, y: State, what: str, error: type[AcaError]) -> Sequence[Any]:
        """The parts of something that is structured like a state with components.

        Raises:
            error: it has another structure; the message starts with ``what``.
        """
        if self.tree is not None:
            return leaves_like(self.tree, y, what, error)
        names, expected = getattr(y, "_fields", None), getattr(self.kind, "_fields", None)
        if names != expected and None not in (names, expected):
            raise error(f"{what} is a namedtuple of {names}; y0 has {expected}. Give the fields of y0.")
        return y

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The components of a state as one real tensor; differentiable."""
        if not self.is_tuple:
            return as_real(parts[0])
        return torch.cat([as_real(part).reshape(-1) for part in parts])

    def unpack(self, y: Tensor) -> State:
        """The user's form of a packed state, as views of it; differentiable."""
        if not self.is_tuple:
            return torch.view_as_complex(y) if self.is_complex else y
        parts = (part.view(shape) for part, shape in zip(y.split(self.sizes), self.shapes, strict=True))
        return self.as_given(torch.view_as_complex(p) if self.is_complex else p for p in parts)

    def as_given(self, parts: Iterable[Tensor]) -> State:
        """The components in the structure of y0."""
        if self.tree is not None:
            return unflattened(self.tree, parts)
        return tuple(parts) if self.kind is tuple else like_tuple(self.kind, parts)

    def unpack_rows(self, ys: Tensor) -> State:
        """The user's form of a stack of packed states, (T, \\*packed shape); each component gets the T in front."""
        if not self.is_tuple:
            return torch.view_as_complex(ys) if self.is_complex else ys
        count = ys.shape[0]
        parts = [p.reshape(count, *s) for p, s in zip(ys.split(self.sizes, dim=1), self.shapes, strict=True)]
        return self.as_given(torch.view_as_complex(p) if self.is_complex else p for p in parts)

    def describe(self) -> str:
        """The form of the state in words, for error messages."""
        kind = "complex " if self.is_complex else ""
        shapes = [tuple(s[:-1] if self.is_complex else s) for s in self.shapes]
        if self.tree is not None:
            named = ", ".join(f"{path}: {shape}" for path, shape in zip(self.paths, shapes, strict=True))
            return f"a tree of {len(shapes)} {kind}tensors of shapes {named}"
        return f"a tuple of {len(shapes)} {kind}tensors of shapes {shapes}" if self.is_tuple else f"shape {shapes[0]}"


def dense(y: Tensor) -> Tensor:
    """``y`` itself if its elements fill one block of memory, in any order of dimensions; else a copy that does."""
    layout = torch.empty_like(y, device="meta").stride()
    if y.stride() == layout and not y.is_neg() and (type(y) is not Tensor or looks_readable(y)):
        return y
    return y.resolve_neg().clone(memory_format=torch.preserve_format)


def tensors_in(x: Any) -> list[Tensor]:
    """The tensors in a value: itself, or those in tuples, lists, dicts and other nodes in it, in order."""
    found: list[Tensor] = []
    todo = [x]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            todo.extend(reversed(item))
        elif isinstance(item, Mapping):
            todo.extend(reversed(tuple(item.values())))
        elif type(item) in pytree.SUPPORTED_NODES:
            todo.extend(reversed(pytree.tree_leaves(item)))
    return found


def as_real(y: Tensor) -> Tensor:
    """``y``, or a complex tensor as a real view with a last dimension of 2."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def _leaves(y0: Any, is_flat: bool) -> Sequence[tuple[str, Any]]:
    """The leaves of a state with their paths.

    Raises:
        ArgumentTypeError, ArgumentValueError: it is neither a tensor nor a tree, or an empty tree.
    """
    if isinstance(y0, Tensor):
        return [("y0", y0)]
    if is_flat:
        return [(f"y0[{i}]", part) for i, part in enumerate(y0)]
    if not is_node(y0):
        raise ArgumentTypeError(
            f"y0 is {_type_name(y0)}; give a tensor, or tensors in a tuple, list or dict.{_advice(y0)}"
        )
    leaves = labelled_leaves(y0, "y0")
    if not leaves:
        raise ArgumentValueError(f"y0 is an empty {type(y0).__name__}; give at least one tensor.")
    return leaves


def _check_part(where: str, part: Any, first: tuple[str, Any]) -> None:
    """Raises ArgumentTypeError unless ``part`` is a tensor of a floating dtype, and of the first part's and device."""
    if not isinstance(part, Tensor):
        raise ArgumentTypeError(
            f"{where} is {_type_name(part)}; every component of a state must be a tensor.{_advice(part)}"
        )
    if not (part.is_floating_point() or part.is_complex()):
        raise ArgumentTypeError(
            f"{where} has dtype {part.dtype}; give {_FLOATING}. Convert it, for example with y0.float()."
        )
    if part.dtype not in _DTYPES:  # float8 can store numbers, but PyTorch has no arithmetic for it
        raise ArgumentTypeError(
            f"{where} has dtype {part.dtype}, for which PyTorch has no arithmetic; give {_FLOATING}. "
            "Convert it, for example with y0.float()."
        )
    name, like = first
    if part.dtype != like.dtype or part.device != like.device:
        raise ArgumentTypeError(
            f"{where} is {part.dtype} on {part.device} and {name} is {like.dtype} on {like.device}; all "
            "components of a state must share dtype and device. Convert them with .to()."
        )
    check_readable(where, part)


def _advice(y0: object) -> str:
    """Advice on how to convert ``y0`` into a state; empty if there is none."""
    if type(y0).__module__ == "torch.fx.proxy":
        return " torch.fx.symbolic_trace cannot trace a solve: make the layer that holds it a leaf of its tracer."
    if dataclasses.is_dataclass(y0):
        return f" Register the dataclass, torch.export.register_dataclass({type(y0).__name__}), to make it a tree."
    if isinstance(y0, (int, float, complex)) or hasattr(y0, "__array__"):
        return " Use torch.as_tensor(y0)."
    return ""


def _type_name(x: object) -> str:
    return f"of type {type(x).__name__}"
