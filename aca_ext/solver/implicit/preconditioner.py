"""Preconditioners of GMRES: the user's approximation of (I - c·J)⁻¹ as a linear map, with its transpose by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aca_ext.errors import OptionError
from aca_ext.problem.problem import Problem
from aca_ext.solver.implicit.systems import outside_inference, pulled_back, recording

# Makes the preconditioner of I - c·J at (t, y).
MakePreconditioner = Callable[[Tensor, Tensor, float], "LinearMap"]


class LinearMap:
    """A linear function of states, and its transpose.

    Args:
        function: maps packed states.
        like: a state.

    Raises:
        OptionError: autograd cannot transpose the function, or it is not linear.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self._function = function
        with recording():
            self._v = torch.zeros_like(outside_inference(like)).requires_grad_()
            self._image = function(self._v)
        if not self._image.requires_grad:
            raise _refusal("computes its result outside of autograd, which transposes it. Use operations of torch")
        if self._image.detach().any():
            raise _refusal("maps zero to another state. It must be linear")

    def product(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self._function(v)

    def transposed_product(self, v: Tensor) -> Tensor:
        return pulled_back(self._image, self._v, v)


def preconditioner_of(problem: Problem) -> MakePreconditioner | None:
    """The option ``preconditioner`` as a function of packed states; None if it is not given."""
    assert problem.newton is not None
    given, packing, args = problem.newton.preconditioner, problem.packing, problem.args
    if given is None:
        return None

    def make(t: Tensor, y: Tensor, c: float) -> LinearMap:
        with torch.no_grad():
            function = given(t, packing.unpack(y.detach()), c, *args)
        if not callable(function):
            raise _refusal(f"is a {type(function).__name__}. It must be a function of a vector", "what it returned")

        def mapped(v: Tensor) -> Tensor:
            image = packing.pack(function(packing.unpack(v)))
            if image.shape != v.shape or image.dtype != v.dtype:
                found, wanted = (f"shape {tuple(x.shape)} and {x.dtype}" for x in (image, v))
                raise _refusal(f"maps a state of {wanted} to {found}. It must return one like it")
            return image

        return LinearMap(mapped, y.detach())

    return make


def _refusal(problem: str, subject: str = "the function that it returned") -> OptionError:
    return OptionError(f"option preconditioner: {subject} {problem}: an approximation of (I - c·J)⁻¹·v for given v.")
