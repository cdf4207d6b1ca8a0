"""The vector field of a controlled equation: func applied to the derivative of its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from aca_ext.errors import ArgumentTypeError, SlopeError
from aca_ext.problem.state import State


class ControlledField:
    """dz/dt = func(t, z) dX/dt, or func.prod(t, z, dX/dt) if func has a method ``prod``."""

    wraps_func = True  # what func and the path hold is found through it

    def __init__(self, path: Any, func: Callable[..., Any]) -> None:
        self.path, self.func = path, func
        self.prod = getattr(func, "prod", None)

    def __call__(self, t: Tensor, z: State, *args: Any) -> State:
        if isinstance(self.path, (tuple, list)):
            speed = tuple(path.derivative(t) for path in self.path)
        else:
            speed = self.path.derivative(t)
        found = self.func(t, z, *args) if self.prod is None else self.prod(t, z, speed, *args)
        if isinstance(z, Tensor):
            return self._slope(found, speed, z, "")
        _check_length("the control", speed, z)
        _check_length("func", found, z)
        parts = zip(found, speed, z, strict=True)
        return tuple(self._slope(*part, f" for component {i}") for i, part in enumerate(parts))

    def _slope(self, found: Any, speed: Any, z: Tensor, which: str) -> Tensor:
        for what, x in (("the derivative of the control", speed), ("the result of func", found)):
            if not isinstance(x, Tensor):
                raise ArgumentTypeError(f"{what}{which} is of type {type(x).__name__}; it must be a tensor like z.")
            if x.dtype != z.dtype:
                raise SlopeError(f"{what}{which} is of dtype {x.dtype}, and z of {z.dtype}; give all the same dtype.")
        if speed.shape[:-1] != z.shape[:-1]:
            raise SlopeError(
                f"the derivative of the control{which} has shape {tuple(speed.shape)}, and z {tuple(z.shape)}; give a "
                "control (..., channels) and a state (..., hidden) of the same batch dimensions."
            )
        if self.prod is not None:
            if found.shape != z.shape:
                raise SlopeError(f"func.prod returned shape {tuple(found.shape)}{which}, not z's {tuple(z.shape)}.")
            return found
        if found.shape != (*z.shape, speed.shape[-1]):
            raise SlopeError(
                f"func returned shape {tuple(found.shape)}{which}; it must be (..., hidden, channels), here "
                f"{(*z.shape, speed.shape[-1])}."
            )
        return (found @ speed.unsqueeze(-1)).squeeze(-1)


def _check_length(what: str, given: Any, z: tuple[Tensor, ...]) -> None:
    if not isinstance(given, (tuple, list)) or len(given) != len(z):
        kind = f"{len(given)} tensors" if isinstance(given, (tuple, list)) else f"a {type(given).__name__}"
        raise SlopeError(f"z is a tuple of {len(z)} tensors, but {what} returns {kind}; it must return as many.")
