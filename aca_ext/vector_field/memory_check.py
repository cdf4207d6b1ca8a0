"""Refusal of a func whose derivatives depend on its earlier evaluations.

A replay whose slopes differ is found by ``replay_check``. What func remembers may be hidden from its slopes, for
example by a factor that is still zero, and yet be part of a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aca_ext.errors import ReplayError

_ROUNDING = 64.0  # difference that counts as rounding, in units of the spacing of the dtype


def refuse_memory(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
    """Raises ReplayError if derivatives by two evaluations of func at the same point differ by more than rounding."""
    for one, other in zip(first, second, strict=True):
        if (one is None) != (other is None) or (one is not None and other is not None and _differ(one, other)):
            raise ReplayError(
                "Two evaluations of func at the same time and state have different derivatives, so that a replay gives "
                "a wrong gradient. func keeps something from one evaluation to the next, such as a counter, a running "
                "mean, or the vectors of spectral_norm in training mode. Make it a part of the state, or keep it "
                'constant (func.eval()), or use gradient="direct", which does not replay.'
            )


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.numel() == 0 or torch.equal(one, other):
        return False
    allowed = _ROUNDING * torch.finfo(one.dtype).eps * torch.maximum(one.abs().max(), other.abs().max())
    return bool(((one - other).abs() > allowed).any())
