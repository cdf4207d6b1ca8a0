"""The vector field of a controlled equation: func applied to the derivative of its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aca_ext.controls.interpolation import Interpolation
from aca_ext.controls.pieces import derivative, polynomial
from aca_ext.errors import SlopeError
from aca_ext.problem.state import State
from aca_ext.problem.trees import is_flat, leaves_like, leaves_of, like, parts_like, structure_of, unflattened

_CONTROL = "Control (..., channels) and state (..., hidden) need the same batch dimensions."
_PRODUCT = "It must have the shape of z."
_MATRIX = "It must be (..., hidden, channels) for z (..., hidden)."


def is_path(x: object) -> bool:
    """Tells whether ``x`` is a control, not a tree of controls."""
    return callable(getattr(x, "derivative", None))


class ControlledField:
    """dz/dt = func(t, z) dX/dt, or func.prod(t, z, dX/dt) if func has a method ``prod``."""

    wraps_func = True  # what func and the path hold is found through it

    def __init__(self, path: Any, func: Callable[..., Any]) -> None:
        self.path, self.func = path, func
        self.prod = getattr(func, "prod", None)
        self.paths, self._structure = pytree.tree_flatten(path, is_path)

    def __call__(self, t: Tensor, z: State, *args: Any) -> State:
        return self.slope(t, z, self._speed(t), *args)

    def slope(self, t: Tensor, z: State, speed: Any, *args: Any) -> State:
        """The slope of z where the path has the derivative ``speed``."""
        _check("the derivative of the control", speed, z, lambda part, z: part.shape[:-1] == z.shape[:-1], _CONTROL)
        if self.prod is not None:
            product = self.prod(t, z, speed, *args)
            _check("the result of func.prod", product, z, lambda part, z: part.shape == z.shape, _PRODUCT)
            return product
        matrix = self.func(t, z, *args)
        _check("the result of func", matrix, z, lambda part, z: part.shape[:-1] == z.shape, _MATRIX)
        if isinstance(z, Tensor):
            return _product(matrix, speed)
        return like(z, [_product(*parts) for parts in zip(*(parts_like(z, x) for x in (matrix, speed)), strict=True)])

    def _speed(self, t: Tensor) -> Any:
        speeds = [path.derivative(t) for path in self.paths]
        return speeds[0] if self._structure.is_leaf() else unflattened(self._structure, speeds)


class FieldOfSamples(ControlledField):
    """The same for a batch of independent samples, each with its own time.

    It is called with t (batch, 1, ..., 1) and the path's pieces (batch, powers, ..., pieces, channels) as an argument,
    which follow the samples where the solver takes them one by one.
    """

    def __init__(self, path: Interpolation, func: Callable[..., Any], *, by_weights: bool) -> None:
        """``by_weights`` finds the piece of a time by a sum over all, which takes no index that varies."""
        super().__init__(path, func)
        self.knots, self.by_weights = path.grid_points, by_weights

    def __call__(self, t: Tensor, z: State, *args: Any) -> State:
        pieces, *others = args
        times = t.reshape(-1, 1)
        knots = self.knots.to(t.dtype)
        is_behind = times.detach() > knots[1:-1].detach()
        ones = (1,) * (pieces.dim() - 3)
        if self.by_weights:
            behind, one = is_behind.to(t.dtype), torch.ones_like(times)
            weights = torch.cat([one, behind], dim=-1) - torch.cat([behind, 0 * one], dim=-1)
            start = (weights * knots[:-1]).sum(-1, keepdim=True)
            coefficients = (pieces * weights.reshape(-1, *ones, weights.shape[-1], 1)).sum(-2)
        else:
            piece = is_behind.sum(-1, keepdim=True)
            start = knots[piece]
            coefficients = pieces.take_along_dim(piece.reshape(-1, *ones, 1, 1), dim=-2).squeeze(-2)
        u = (times - start).reshape(-1, *ones)
        return self.slope(t, z, polynomial(derivative(coefficients.unbind(1)), u), *others)


def _product(matrix: Tensor, speed: Tensor) -> Tensor:
    if matrix.shape[-1] != speed.shape[-1]:
        raise SlopeError(
            f"the result of func has shape {tuple(matrix.shape)}, with {matrix.shape[-1]} channels last, but the "
            f"control has {speed.shape[-1]}; return (..., hidden, channels)."
        )
    return (matrix @ speed.unsqueeze(-1)).squeeze(-1)


def _check(what: str, given: Any, z: State, fits: Callable[[Tensor, Tensor], bool], rule: str) -> None:
    """Raises SlopeError unless ``given`` is a tensor, or a tree of such, that ``fits`` z."""
    if isinstance(z, Tensor):
        given, z = (given,), (z,)
    elif not is_flat(z):
        given, z = leaves_like(structure_of(z), given, what, SlopeError), leaves_of(z)
    elif not isinstance(given, (tuple, list)) or len(given) != len(z):
        kind = f"{len(given)} tensors" if isinstance(given, (tuple, list)) else f"a {type(given).__name__}"
        raise SlopeError(f"z is a tuple of {len(z)} tensors, and {what} {kind}; it must be a tuple of as many.")
    for part, state in zip(given, z, strict=True):
        if not isinstance(part, Tensor):
            raise SlopeError(f"{what} is of type {type(part).__name__}; it must be a tensor.")
        if part.dtype != state.dtype:
            raise SlopeError(f"{what} is of dtype {part.dtype}, and z of {state.dtype}; give both the same dtype.")
        if not fits(part, state):
            raise SlopeError(
                f"{what} has shape {tuple(part.shape)}, which does not fit z, {tuple(state.shape)}. {rule}"
            )
