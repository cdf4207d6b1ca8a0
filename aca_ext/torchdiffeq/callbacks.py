"""torchdiffeq's callbacks: methods of func that are told of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.progress import Step
from aca_ext.user_warnings import warn_user

_STEP, _ACCEPT, _REJECT = "callback_step", "callback_accept_step", "callback_reject_step"
_SUPPORTED = {"adaptive": (_STEP, _ACCEPT, _REJECT), "fixed": (_STEP,), "scipy": ()}


def warn_of_unsupported(func: Any, method: str, kind: str) -> None:
    """Warns of callbacks that a method of this ``kind`` never calls."""
    ignored = [name for name in (_STEP, _ACCEPT, _REJECT) if hasattr(func, name) and name not in _SUPPORTED[kind]]
    if ignored:
        warn_user(f"method {method!r} does not call func's {', '.join(ignored)}.", UserWarning)


def callback_of(func: Any, kind: str, t: Tensor, *, suffix: str) -> Callable[[Step], None] | None:
    """A callback of ``solve`` that calls those of func whose names end in ``suffix``; None if there are none."""
    found = {name: getattr(func, name + suffix, None) for name in _SUPPORTED[kind]}
    if not any(map(callable, found.values())):
        return None
    dtype = torch.float64 if kind == "adaptive" else t.dtype

    def tell(step: Step) -> None:
        outcome = _ACCEPT if step.is_accepted else _REJECT
        t0, dt = (torch.tensor(x, dtype=dtype, device=t.device) for x in (step.t, abs(step.h)))
        for name in (_STEP, outcome):
            callback = found.get(name)
            if callback is not None:
                callback(t0, step.y, dt)

    return tell
