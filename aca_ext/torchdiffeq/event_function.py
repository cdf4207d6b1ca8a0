"""torchdiffeq's idea of an event: a value that leaves its first sign, if only for zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import EventError
from aca_ext.problem.state import State


class ZeroCounts:
    """An event function whose elements change their sign where they become zero.

    To aca_ext a touch of zero is no event. torchdiffeq's programs return zero to say that the solve is to end. Elements
    that start at zero are left as they are, and wait for their next change of sign.
    """

    def __init__(self, event_fn: Callable[[Tensor, Any], Tensor], t0: Tensor, y0: State) -> None:
        self._event_fn = event_fn
        like = y0[0] if isinstance(y0, tuple) else y0
        with torch.no_grad():
            self._signs = torch.sign(self._value(t0.to(like.real), y0))

    def __call__(self, t: Tensor, y: Any) -> Tensor:
        value = self._value(t, y)
        beyond = -torch.finfo(value.dtype).tiny * self._signs
        return torch.where(value == 0, value + beyond, value)

    def _value(self, t: Tensor, y: Any) -> Tensor:
        """The value of the event function; a condition or a count as numbers."""
        value: Any = self._event_fn(t, y)
        if not isinstance(value, Tensor) or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise EventError(f"event_fn returned {kind}; it must return a real tensor.")
        return value if value.is_floating_point() else value.to(t.dtype)
