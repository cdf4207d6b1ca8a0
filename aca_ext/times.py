"""The requested times, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from aca_ext.admission import check_readable
from aca_ext.arguments import holds_grad
from aca_ext.errors import TimeError


def times_of(t: object) -> tuple[float, ...]:
    """The times in ``t``, a 1-d tensor or a sequence of numbers.

    Raises:
        TimeError: ``t`` is empty, unsorted, of another rank, not finite, or would lose a gradient.
    """
    if not isinstance(t, Tensor):
        if isinstance(t, str) or not (isinstance(t, Sequence) or hasattr(t, "__array__")):
            raise TimeError(f"t is of type {type(t).__name__}; give a 1-d tensor of times, torch.tensor([0., 1.]).")
        if holds_grad(t):
            raise TimeError(
                f"t is a {type(t).__name__} holding a tensor that requires grad, which would be lost; give one 1-d "
                "tensor of times, torch.stack(t)."
            )
        try:
            t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TimeError(f"t is no sequence of numbers ({error}); give a 1-d tensor of times.") from None
    check_readable("t", t, TimeError)
    if t.dim() != 1:
        raise TimeError(
            f"t has shape {tuple(t.shape)}; give a 1-d tensor of times, torch.tensor([0., 1.]). "
            'Times for every sample take options={"batch": "independent"}.'
        )
    if t.is_complex() or t.dtype == torch.bool:
        raise TimeError(f"t has dtype {t.dtype}; times are real numbers.")
    times: list[float] = torch.empty(t.shape, dtype=torch.float64, device="cpu").copy_(t.detach()).tolist()
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
                "decrease. Sort them, and the result back."
            )
    return tuple(times)
