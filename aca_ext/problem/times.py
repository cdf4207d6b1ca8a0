"""Validation of the requested times, and the resolution of the dtypes that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import TimeError, TimeResolutionWarning
from aca_ext.problem.admission import check_readable
from aca_ext.problem.arguments import holds_grad
from aca_ext.user_warnings import warn_user


def as_float64(t: Any) -> Any:
    """The numbers in a tensor, a sequence, an array or a pandas Series (by position) as a float64 NumPy array.

    Raises:
        TimeError: they are no real numbers.
    """
    try:
        if isinstance(t, Tensor) or (isinstance(t, (tuple, list)) and any(isinstance(item, Tensor) for item in t)):
            if isinstance(t, Tensor):
                check_readable("t", t, TimeError)
            t = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach()
            return torch.empty(t.shape, dtype=torch.float64, device="cpu").copy_(t).numpy()
        array = np.asarray(t)
        if array.dtype.kind not in "biufO":  # astype would drop imaginary parts and convert dates and strings
            raise TypeError(f"it holds {array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TimeError(f"t is no sequence of numbers ({error}); give a 1-d tensor of times.") from None


def resolution_of(x: object) -> float:
    """Relative spacing (eps) of the coarsest dtype among the numbers in ``x``; 0 for integers."""
    dtype = getattr(x, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    if isinstance(dtype, np.dtype):
        return float(np.finfo(dtype).eps) if dtype.kind == "f" else 0.0
    if isinstance(x, (tuple, list)):
        return max((resolution_of(item) for item in x if not isinstance(item, float)), default=_FLOAT64)
    return _FLOAT64


_FLOAT64 = torch.finfo(torch.float64).eps
_FAR, _COARSE, _COARSE_BETWEEN = 8.0, 1e-3, 0.05


def warn_where_time_stands_still(start: float, end: float, n_gaps: int, dtype: torch.dtype) -> None:
    """Warns if ``dtype``, in which func receives times, is too coarse for this solve and a shift to 0 would help.

    A spacing of ``dtype`` counts as coarse above a thousandth of the solve, or a twentieth of an average gap. A shift
    helps if the times are far from zero, compared with the length of the solve. ``n_gaps`` is the number of steps of a
    fixed grid, or of gaps between the requested times of an adaptive solve.
    """
    length, far = abs(end - start), max(abs(start), abs(end))
    if far < _FAR * length:
        return
    spacing = torch.finfo(dtype).eps * far
    if spacing <= min(_COARSE, _COARSE_BETWEEN / n_gaps) * length:
        return
    warn_user(
        f"func receives times as {dtype}, whose spacing near t={far:.10g} is about {spacing:.3g}; the solve from "
        f"t={start:.10g} to {end:.10g} is only {length:.6g} long, so func sees the time jump or stand still. Shift t "
        "to start at 0, t - t[0], and add the offset inside func if it needs it, or use a float64 state.",
        TimeResolutionWarning,
    )


def times_of(t: object) -> tuple[float, ...]:
    """The times in ``t``, a 1-d tensor or a sequence of numbers, as floats.

    Raises:
        TimeError: ``t`` is empty, not sorted, not 1-d, not finite, or a sequence of tensors that require grad.
    """
    if not isinstance(t, Tensor):
        if isinstance(t, str) or not (isinstance(t, Sequence) or hasattr(t, "__array__")):
            raise TimeError(f"t is of type {type(t).__name__}; give a 1-d tensor of times, torch.tensor([0., 1.]).")
        if holds_grad(t):
            raise TimeError(
                f"t is a {type(t).__name__} holding a tensor that requires grad, whose gradient would be lost; give "
                "one 1-d tensor of times, torch.stack(t)."
            )
    elif t.is_complex() or t.dtype == torch.bool:
        raise TimeError(f"t has dtype {t.dtype}; times must be real numbers. Give a float64 tensor.")
    array = as_float64(t)
    if array.ndim != 1:
        raise TimeError(
            f"t has shape {array.shape}; give a 1-d tensor of times, torch.tensor([0., 1.]). "
            'Times for every sample take options={"batch": "independent"}.'
        )
    times: list[float] = array.tolist()
    if not times:
        raise TimeError("t is empty; give at least the initial time.")
    for i, time in enumerate(times):
        if not math.isfinite(time):
            raise TimeError(f"t[{i}] is {time}; times must be finite.")
    sign = 1.0 if len(times) < 2 or times[1] > times[0] else -1.0
    for i, (one, other) in enumerate(pairwise(times)):
        if one == other:
            raise TimeError(f"t[{i}] and t[{i + 1}] are both {one!r}; times must not repeat. Remove one of them.")
        if sign * (other - one) < 0:
            raise TimeError(
                f"t is not sorted: t[{i}] = {one!r}, t[{i + 1}] = {other!r}; times must strictly increase or strictly "
                "decrease. Sort them, and reorder the result."
            )
    return tuple(times)
