"""Choice of the Jacobian of a problem."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from aca_ext.errors import OptionError
from aca_ext.problem.problem import Problem
from aca_ext.solver.implicit.krylov import Krylov
from aca_ext.solver.implicit.systems import Blocks, GivenMatrix, Jacobian
from aca_ext.vector_field.slope_function import SlopeFunction


def jacobian_of(problem: Problem, f: SlopeFunction) -> Jacobian:
    """The Jacobian that option ``jacobian`` names."""
    assert problem.newton is not None
    kind = problem.newton.jacobian
    if callable(kind):
        return GivenMatrix(f, _checked(kind, problem))
    if kind == "krylov":
        return Krylov(f)
    return Blocks(f, len(problem.y0) if kind == "block" else 1)


def _checked(function: Callable[..., object], problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """The user's function of (t, y, \\*args) as a function of packed states, with its result checked."""
    packing, args, y0 = problem.packing, problem.args, problem.y0
    n = y0.numel()

    def matrix(t: Tensor, y: Tensor) -> Tensor:
        found = function(t, packing.unpack(y), *args)
        if not isinstance(found, Tensor) or found.numel() != n * n:
            given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise OptionError(
                f"the function of option jacobian returned {given}; it must return the derivative of func with respect "
                f"to the {n} elements of the state, a tensor ({n}, {n})."
            )
        return found.detach().to(y0).reshape(1, n, n)

    return matrix
