"""Conversion between a user's state (tensor or tuple, real or complex) and one packed real tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.problem.admission import check_readable, looks_readable

# A state as users give and receive it: a tensor, or a tuple of tensors.
State = Tensor | tuple[Tensor, ...]

_FLOATING = "float32, float64, complex64 or complex128 (float16 and bfloat16 run without fused kernels)"
_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128,
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """Conversion between a user's state and the one dense real tensor that the solver works on.

    A real tensor is used as it is and keeps its memory format. A complex tensor becomes a real view with a last
    dimension of 2. The components of a tuple are flattened and concatenated.

    Attributes:
        shapes: shape of each component as a real tensor, for complex components with the last 2.
        kind: class of the tuple, for namedtuples.
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    is_complex: bool
    kind: type[tuple[Tensor, ...]] = tuple

    @classmethod
    def of(cls, y0: object) -> Packing:
        """Validates ``y0`` and returns its packing.

        Raises:
            ArgumentTypeError: y0 is no tensor or tuple of tensors of one floating dtype on one device.
            ArgumentValueError: y0 is an empty tuple.
        """
        if isinstance(y0, Tensor):
            parts: tuple[Tensor, ...] = (y0,)
        elif isinstance(y0, tuple):
            if not y0:
                raise ArgumentValueError("y0 is an empty tuple; give at least one tensor.")
            for i, part in enumerate(y0):
                if not isinstance(part, Tensor):
                    raise ArgumentTypeError(
                        f"y0[{i}] is {_type_name(part)}; every component of a tuple state must be a tensor."
                    )
            parts = y0
        else:
            raise ArgumentTypeError(f"y0 is {_type_name(y0)}; give a tensor or a tuple of tensors.{_advice(y0)}")
        first = parts[0]
        for i, part in enumerate(parts):
            where = f"y0[{i}]" if len(parts) > 1 else "y0"
            if not (part.is_floating_point() or part.is_complex()):
                raise ArgumentTypeError(
                    f"{where} has dtype {part.dtype}; give {_FLOATING}. Convert it, for example with y0.float()."
                )
            if part.dtype not in _DTYPES:  # float8 can store numbers, but PyTorch has no arithmetic for it
                raise ArgumentTypeError(
                    f"{where} has dtype {part.dtype}, for which PyTorch has no arithmetic; give {_FLOATING}. "
                    "Convert it, for example with y0.float()."
                )
            if part.dtype != first.dtype or part.device != first.device:
                raise ArgumentTypeError(
                    f"{where} is {part.dtype} on {part.device} and y0[0] is {first.dtype} on {first.device}; all "
                    "components of a tuple state must share dtype and device. Convert them with .to()."
                )
            check_readable(where, part)
        shapes = tuple(torch.Size((*p.shape, 2)) if p.is_complex() else p.shape for p in parts)
        kind = type(y0) if isinstance(y0, tuple) and hasattr(y0, "_make") else tuple
        return cls(shapes, isinstance(y0, tuple), first.is_complex(), kind)

    @property
    def is_trivial(self) -> bool:
        """True if the user's state is the packed tensor itself."""
        return not self.is_tuple and not self.is_complex

    @cached_property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]  # torch.Size.numel would turn symbolic sizes into constants

    @property
    def segments(self) -> list[int]:
        """Bounds of the components in the packed tensor: the start of each one, and the end."""
        bounds = [0]
        for size in self.sizes:
            bounds.append(bounds[-1] + size)
        return bounds

    def pack(self, y: State) -> Tensor:
        """The user's state as one real tensor; differentiable."""
        if not self.is_tuple:
            assert isinstance(y, Tensor)
            return _as_real(y)
        return torch.cat([_as_real(part).reshape(-1) for part in y])

    def unpack(self, y: Tensor) -> State:
        """The user's form of a packed state, as views of it; differentiable."""
        if not self.is_tuple:
            return torch.view_as_complex(y) if self.is_complex else y
        parts = (part.view(shape) for part, shape in zip(y.split(self.sizes), self.shapes, strict=True))
        return self.as_given(torch.view_as_complex(p) if self.is_complex else p for p in parts)

    def as_given(self, parts: Iterable[Tensor]) -> State:
        """The components as a tuple of the class of y0."""
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
        return f"a tuple of {len(shapes)} {kind}tensors of shapes {shapes}" if self.is_tuple else f"shape {shapes[0]}"


def dense(y: Tensor) -> Tensor:
    """``y`` itself if its elements fill one block of memory, in any order of dimensions; else a copy that does."""
    layout = torch.empty_like(y, device="meta").stride()
    if y.stride() == layout and not y.is_neg() and (type(y) is not Tensor or looks_readable(y)):
        return y
    return y.resolve_neg().clone(memory_format=torch.preserve_format)


def tensors_in(x: Any) -> list[Tensor]:
    """The tensors in a value: itself, or those in tuples, lists and dicts nested in it, in order."""
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
    return found


def _as_real(y: Tensor) -> Tensor:
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def like_tuple(kind: type[tuple[Tensor, ...]], parts: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The parts as a tuple or namedtuple of class ``kind``."""
    made: tuple[Tensor, ...] = getattr(kind, "_make", kind)(parts)
    return made


def _advice(y0: object) -> str:
    """Advice on how to convert ``y0`` into a state; empty if there is none."""
    if type(y0).__module__ == "torch.fx.proxy":
        return " torch.fx.symbolic_trace cannot trace a solve: make the layer that holds it a leaf of its tracer."
    if isinstance(y0, list):
        return " Use tuple(y0)."
    if isinstance(y0, Mapping):
        return " Use tuple(y0.values()), and name its components inside func."
    if isinstance(y0, (int, float, complex)) or hasattr(y0, "__array__"):
        return " Use torch.as_tensor(y0)."
    return ""


def _type_name(x: object) -> str:
    return f"of type {type(x).__name__}"
