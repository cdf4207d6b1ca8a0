"""Tolerances of a solve: rtol and atol, checked, and the norm that errors are measured in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ToleranceError
from aca_ext.problem.admission import check_readable
from aca_ext.problem.arguments import number_in
from aca_ext.problem.state import Packing

# Norm of an error ratio given by the user: tensor in, number out.
Norm = Callable[[Tensor], Any]


class Tolerance:
    """rtol, atol and the norm that an error is measured with."""

    def __init__(
        self, rtol: float | Tensor, atol: float | Tensor, segments: Sequence[int], norm: Norm | None = None
    ) -> None:
        self.rtol, self.atol, self.norm = rtol, atol, norm
        self.segments = list(segments)
        self.sizes = [hi - lo for lo, hi in pairwise(segments)]

    def forbids_error(self) -> bool:
        """Tells whether some element may have no error at all: its rtol and atol are both zero."""
        total = self.rtol + self.atol
        return bool((total == 0).any()) if isinstance(total, Tensor) else total == 0

    def norm_of_sums(self, sums: Sequence[float]) -> float:
        """The largest RMS over the segments; NaN where any is."""
        if len(sums) == 1 and self.sizes[0]:
            return math.sqrt(sums[0] / self.sizes[0])
        if math.isnan(sum(sums)):
            return math.nan
        return math.sqrt(max((s / n for s, n in zip(sums, self.sizes, strict=True) if n), default=0.0))


def checked_tolerance(name: str, value: object, y0: Tensor, packing: Packing) -> float | Tensor:
    """A number, or a tensor of the packed state's shape, dtype and device."""
    check_readable(name, value, ToleranceError)
    number = number_in(value)
    if number is not None:
        if not math.isfinite(number) or number < 0:
            raise ToleranceError(f"{name} is {number:g}; it must be a finite number, at least 0.")
        return number
    if isinstance(value, (tuple, list)) and packing.is_tuple:
        return _tolerance_of_tuple(name, value, y0, packing)
    if not isinstance(value, Tensor):
        raise ToleranceError(
            f"{name} is of type {type(value).__name__}; give a number or a tensor that broadcasts to y0."
        )
    is_real = not value.is_complex()
    value = value.detach().to(device=y0.device, dtype=y0.dtype) if is_real else value
    if not is_real or not bool(((value >= 0) & torch.isfinite(value)).all()):
        raise ToleranceError(
            f"{name} has entries that are negative or not finite; each must be a number of at least 0."
        )
    if packing.is_complex:
        value = value.unsqueeze(-1)  # one tolerance for the real and the imaginary part
    shape = y0.shape if not packing.is_tuple else torch.Size([y0.numel()])
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ToleranceError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to y0 ({packing.describe()})."
        ) from None


def _tolerance_of_tuple(name: str, value: Sequence[Any], y0: Tensor, packing: Packing) -> Tensor:
    """One tolerance per component of a tuple state, spread over the packed state."""
    if len(value) != len(packing.shapes):
        raise ToleranceError(f"{name} has {len(value)} entries; y0 is {packing.describe()}. Give one for each.")
    parts: list[Tensor] = []
    for i, (entry, shape) in enumerate(zip(value, packing.shapes, strict=True)):
        single = Packing((shape,), False, packing.is_complex)
        part = checked_tolerance(f"{name}[{i}]", entry, y0.new_empty(shape), single)
        parts.append((part if isinstance(part, Tensor) else y0.new_full((), part)).expand(shape).reshape(-1))
    return torch.cat(parts)


def check_within_reach(tolerance: Tolerance, dtype: torch.dtype) -> None:
    """Raises ToleranceError where no step can meet the tolerance, or none that ``dtype`` can tell from nothing."""
    rtol, atol = tolerance.rtol, tolerance.atol
    # Steps that small would round to nothing, and the solution stand still without an error. float32 has room enough.
    rounding = torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    if not isinstance(rtol, Tensor) and not isinstance(atol, Tensor) and 0 < max(rtol, atol) < rounding:
        raise ToleranceError(
            f"rtol is {rtol:g} and atol is {atol:g}, below the rounding of {dtype}, {rounding:g}. Loosen one of them, "
            "or convert y0 to float32."
        )
    total = rtol + atol
    if bool((total > 0).any()) or total.numel() == 0 if isinstance(total, Tensor) else total > 0:
        return
    raise ToleranceError("rtol and atol are both zero, which no step can meet; make one of them positive.")
