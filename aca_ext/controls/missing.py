"""Missing values of a path, NaN, filled in from those observed.

Nothing here depends on where the NaNs are, so that the host need not know. All functions take x of shape (..., L) and
fill a path without any observation with zeros. Gradients of missing values are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def observed_before(is_observed: Tensor) -> Tensor:
    """Index of the last observation up to each place, -1 before the first."""
    places = torch.arange(is_observed.shape[-1], device=is_observed.device)
    return torch.where(is_observed, places, -1).cummax(-1).values


def observed_after(is_observed: Tensor) -> Tensor:
    """Index of the first observation from each place on, L behind the last."""
    n = is_observed.shape[-1]
    return n - 1 - observed_before(is_observed.flip(-1)).flip(-1)


def filled_forward(x: Tensor) -> Tensor:
    """The path with the last observation before each gap, at the start the first one."""
    is_observed, values = _split(x)
    before = observed_before(is_observed)
    after = observed_after(is_observed).clamp(max=x.shape[-1] - 1)
    return values.gather(-1, torch.where(before >= 0, before, after))


def filled_at_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The path, constant before its first and behind its last observation; and where it is known then."""
    is_observed, values = _split(x)
    n = x.shape[-1]
    before, after = observed_before(is_observed), observed_after(is_observed)
    at_start, at_end = before < 0, after == n
    source = torch.where(at_start, after.clamp(max=n - 1), before.clamp(min=0))
    return values.gather(-1, source), is_observed | at_start | at_end


def filled_linearly(t: Tensor, x: Tensor) -> Tensor:
    """The path with gaps on straight lines between the observations around them, constant at the ends."""
    x, is_known = filled_at_ends(x)
    before, after = observed_before(is_known), observed_after(is_known)
    start, end = t[before], t[after]
    # A known value is its own neighbour on both sides. The length 1 keeps 0/0 out of its gradient.
    position = (t - start) / torch.where(is_known, 1.0, end - start)
    first, last = x.gather(-1, before), x.gather(-1, after)
    return torch.where(is_known, x, first + position * (last - first))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """A mask of the observations; and the values, with zeros for those that are missing."""
    is_missing = x.isnan()
    return ~is_missing, torch.where(is_missing, 0.0, x)
