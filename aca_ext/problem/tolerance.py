"""Validation of rtol and atol, and the norm of the error."""

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
from aca_ext.problem.trees import is_node

# A norm given by the user: from error / tolerance, a tensor like the packed state, to a number.
Norm = Callable[[Tensor], Any]


class Tolerance:
    """Tolerances of a packed state, and the norm of the error in units of them.

    Attributes:
        rtol, atol: a number, or a tensor of the packed state's shape.
        norm: the user's norm of packed error ratios; None for the largest RMS over the segments.
        segments: bounds of the components in the packed state; of one sample in a batch of independent samples.
        sizes: number of elements of each component.
    """

    def __init__(
        self, rtol: float | Tensor, atol: float | Tensor, segments: Sequence[int], norm: Norm | None = None
    ) -> None:
        self.rtol, self.atol, self.norm = rtol, atol, norm
        self.segments = list(segments)
        self.sizes = [hi - lo for lo, hi in pairwise(segments)]

    def forbids_error(self) -> bool:
        """Tells whether rtol and atol are both zero in some element, so that any error there is too large."""
        total = self.rtol + self.atol
        return bool((total == 0).any()) if isinstance(total, Tensor) else total == 0

    def norm_of_sums(self, sums: Sequence[float]) -> float:
        """The largest RMS over the segments, from their sums of squares; NaN if a sum is NaN."""
        if len(sums) == 1 and self.sizes[0]:
            return math.sqrt(sums[0] / self.sizes[0])
        if math.isnan(sum(sums)):
            return math.nan
        return math.sqrt(max((s / n for s, n in zip(sums, self.sizes, strict=True) if n), default=0.0))


def checked_tolerance(name: str, value: object, y0: Tensor, packing: Packing) -> float | Tensor:
    """Validates ``rtol`` or ``atol``: returns a number, or a tensor of the packed state's shape, dtype and device.

    Raises:
        ToleranceError: it is negative, not finite, or does not broadcast to the state.
    """
    check_readable(name, value, ToleranceError)
    number = number_in(value)
    if number is not None:
        if not math.isfinite(number) or number < 0:
            raise ToleranceError(f"{name} is {number:g}; it must be a finite number of at least 0.")
        return number
    if packing.is_tuple and (isinstance(value, (tuple, list)) or is_node(value)):
        return _tolerance_of_components(name, value, y0, packing)
    if not isinstance(value, Tensor):
        raise ToleranceError(
            f"{name} is of type {type(value).__name__}; give a number or a tensor that broadcasts to y0."
        )
    is_real = not value.is_complex()
    value = value.detach().to(device=y0.device, dtype=y0.dtype) if is_real else value
    if not is_real or not bool(((value >= 0) & torch.isfinite(value)).all()):
        raise ToleranceError(
            f"{name} has entries that are negative, not finite or complex; each must be a real number of at least 0."
        )
    if packing.is_complex:
        value = value.unsqueeze(-1)  # one tolerance for the real and the imaginary part
    shape = y0.shape if not packing.is_tuple else torch.Size([y0.numel()])
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ToleranceError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to y0 ({packing.describe()}). Give a "
            "number or a tensor that does."
        ) from None


def _tolerance_of_components(name: str, value: Any, y0: Tensor, packing: Packing) -> Tensor:
    """One tolerance per component of a tuple state or another tree, expanded to the shape of the packed state."""
    entries = packing.components(value, name, ToleranceError)
    if not isinstance(entries, (tuple, list)):
        raise ToleranceError(f"{name} is of type {type(value).__name__}; y0 is {packing.describe()}. Give a tuple.")
    if len(entries) != len(packing.shapes):
        raise ToleranceError(f"{name} has {len(entries)} entries; y0 is {packing.describe()}. Give one for each.")
    parts: list[Tensor] = []
    for i, (entry, shape) in enumerate(zip(entries, packing.shapes, strict=True)):
        single = Packing((shape,), False, packing.is_complex)
        place = f"[{i}]" if packing.tree is None else packing.paths[i]
        part = checked_tolerance(f"{name}{place}", entry, y0.new_empty(shape), single)
        parts.append((part if isinstance(part, Tensor) else y0.new_full((), part)).expand(shape).reshape(-1))
    return torch.cat(parts)


def check_within_reach(tolerance: Tolerance, dtype: torch.dtype) -> None:
    """Raises ToleranceError if the tolerance is zero everywhere, or below the rounding of a 16-bit ``dtype``."""
    rtol, atol = tolerance.rtol, tolerance.atol
    # Steps that small round to no change: the solution would stay constant without an error. float32 is fine enough.
    rounding = torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    if not isinstance(rtol, Tensor) and not isinstance(atol, Tensor) and 0 < max(rtol, atol) < rounding:
        raise ToleranceError(
            f"rtol is {rtol:g} and atol is {atol:g}, below the rounding of {dtype}, {rounding:g}. Loosen one of them, "
            "or convert y0 to float32."
        )
    total = rtol + atol
    if bool((total > 0).any()) or total.numel() == 0 if isinstance(total, Tensor) else total > 0:
        return
    raise ToleranceError("rtol and atol are both zero, and no step is that accurate; make one of them positive.")
