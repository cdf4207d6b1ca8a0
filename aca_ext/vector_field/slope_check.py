"""Checks of the values that the user's func returns: type, shape, dtype and device of a derivative of the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import SlopeError
from aca_ext.kernels.extension import slope_function
from aca_ext.kernels.fused import TorchOperations
from aca_ext.problem.admission import check_readable, looks_readable
from aca_ext.problem.recorders import recorder
from aca_ext.problem.state import Packing, State
from aca_ext.problem.transforms import refuse_transforms, version_of
from aca_ext.vector_field.slope_function import SlopeFunction

Func = Callable[..., State]

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def checked_slope_function(func: Func, args: tuple[Any, ...], packing: Packing, ops: TorchOperations) -> Any:
    """func with its args, its checks and a counter. Holds no reference to its caller, which would be a cycle."""
    like = ops.like
    check = SlopeCheck(packing, ops)
    called = func if packing.is_trivial else partial(_unpacked, func, packing, check)
    versioned = not like.is_inference() and not torch.is_inference_mode_enabled()
    return slope_function(called, args, like, check, _changed_in_place, versioned)


_SWAPPED = " It may have been computed from t alone: func is called as func(t, y), time first."


class SlopeCheck:
    """Converts the result of func into the packed slope: its layout always, its dtype only under torch.autocast."""

    def __init__(self, packing: Packing, ops: TorchOperations) -> None:
        self.packing, self._ops = packing, ops
        self._dtype, self._device = ops.like.dtype, ops.like.device
        self._places = _places(packing) if packing.is_tuple else ("func's output",)
        self._has_looked = False  # the thorough checks of the first evaluation take too long for every one

    def __call__(self, k: Any) -> Tensor:
        packing = self.packing
        parts = self._parts(k)
        given: list[Tensor] = []
        for where, part, shape in zip(self._places, parts, packing.shapes, strict=True):
            if not isinstance(part, Tensor):
                raise SlopeError(f"{where} is of type {type(part).__name__}; it must be a tensor.")
            if part.device != self._device:
                raise SlopeError(f"{where} is on {part.device}; the state is on {self._device}. Move one to the other.")
            self._look(where, part)
            expected = shape[:-1] if packing.is_complex else shape
            if part.shape != expected:
                raise SlopeError(
                    f"{where} has shape {tuple(part.shape)}; the state has {tuple(expected)}. The derivative has the "
                    f"shape of the state; nothing is broadcast.{_SWAPPED if part.numel() == 1 else ''}"
                )
            given.append(self._of_state_dtype(part, where))
        self._has_looked = True
        packed = packing.join(given)
        return self._ops.admit(packed, "func's output")

    def _look(self, where: str, part: Tensor) -> None:
        if not (self._has_looked and looks_readable(part)):
            refuse_transforms(where, part)
            check_readable(where, part, SlopeError)

    def _parts(self, k: Any) -> Sequence[Any]:
        packing = self.packing
        if packing.tree is not None:
            return packing.components(k, "func's output", SlopeError)
        if not packing.is_tuple:
            if isinstance(k, (tuple, list)):
                raise SlopeError(f"func returned a {type(k).__name__}; y0 is a tensor, so func returns one tensor.")
            return (k,)
        if not isinstance(k, (tuple, list)):
            raise SlopeError(
                f"func returned a {type(k).__name__}; y0 is {packing.describe()}, so func returns a tuple."
            )
        if len(k) != len(packing.shapes):
            raise SlopeError(f"func returned {len(k)} components; y0 is {packing.describe()}.")
        return packing.components(k, "func's output", SlopeError)

    def _of_state_dtype(self, part: Tensor, where: str) -> Tensor:
        real, packing = self._dtype, self.packing
        expected = _COMPLEX.get(real, torch.complex32) if packing.is_complex else real
        if part.dtype == expected:
            return part
        if part.is_floating_point() and torch.is_autocast_enabled(self._device.type):
            return part.to(expected)
        if part.is_complex() and not packing.is_complex:
            raise SlopeError(
                f"{where} is complex ({part.dtype}) and the state is real ({expected}). Make y0 complex, for example "
                f"y0.to({part.dtype}), or return a real derivative."
            )
        raise SlopeError(
            f"{where} has dtype {part.dtype}; the state has {expected}. Convert y0 or the output, for example with "
            f".to({expected}). (Under torch.autocast a lower precision is converted for you.)"
        )


def _places(packing: Packing) -> Sequence[str]:
    """Names of the components in error messages."""
    if packing.tree is not None:
        return [f"func's output{path}" for path in packing.paths]
    return [f"component {i} of func's output" for i in range(len(packing.shapes))]


def _unpacked(func: Func, packing: Packing, check: SlopeCheck, t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return check(func(t, packing.unpack(y), *args))


class _PlainSlopeCheck(SlopeCheck):
    """``SlopeCheck`` for slopes inside transforms and recordings, whose elements nobody reads by address."""

    def _look(self, where: str, part: Tensor) -> None:
        pass


def plain_slope_function(
    func: Func, args: Sequence[Any], packing: Packing, ops: TorchOperations, time_shape: Sequence[int] | None = None
) -> SlopeFunction:
    """func on packed states with its checks, in Python alone; ``time_shape`` is that of the times of samples."""
    check = _PlainSlopeCheck(packing, ops)
    is_recorded = torch.compiler.is_compiling() or recorder() is not None

    def f(t: Tensor, y: Tensor) -> Tensor:
        before = 0 if is_recorded else version_of(y)
        k = func(t if time_shape is None else t.view(time_shape), packing.unpack(y), *args)
        if not is_recorded and version_of(y) != before:
            _changed_in_place()
        return check(k)

    return f


def _changed_in_place() -> None:
    raise SlopeError(
        "func changed its state argument in place, which would corrupt the solution. "
        "Work on a copy: y = y.clone(), or use the out-of-place operation."
    )
