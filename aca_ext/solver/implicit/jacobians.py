"""Choice of the Jacobian of a problem."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from aca_ext.errors import OptionError
from aca_ext.kernels.operations import TorchOperations
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Problem
from aca_ext.solver.implicit.krylov import Krylov
from aca_ext.solver.implicit.preconditioner import preconditioner_of
from aca_ext.solver.implicit.systems import Blocks, GivenMatrix, Jacobian
from aca_ext.vector_field.slope_function import SlopeFunction


def jacobian_of(problem: Problem, f: SlopeFunction, ops: TorchOperations) -> Jacobian:
    """The Jacobian that option ``jacobian`` names."""
    assert problem.newton is not None
    kind, is_batch = problem.newton.jacobian, isinstance(problem, BatchProblem)
    count = len(problem.y0) if is_batch or kind == "block" else 1
    if callable(kind):
        return GivenMatrix(f, ops, count, _checked(kind, problem, count))
    if kind == "krylov":
        return Krylov(f, preconditioner_of(problem))
    return Blocks(f, ops, count)


def _checked(function: Callable[..., object], problem: Problem, count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The user's function of (t, y, \\*args) as a function of packed states, with its result checked."""
    packing, args, y0 = problem.packing, problem.args, problem.y0
    m = y0.numel() // max(count, 1)

    def matrix(t: Tensor, y: Tensor) -> Tensor:
        found = function(t, packing.unpack(y), *args)
        is_batch = isinstance(problem, BatchProblem)
        if not isinstance(found, Tensor) or found.numel() != count * m * m or (is_batch and len(found) != count):
            given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            shape, what = (f"({count}, {m}, {m})", "each sample") if is_batch else (f"({m}, {m})", "the state")
            raise OptionError(
                f"the function of option jacobian returned {given}; it must return the derivative of func with respect "
                f"to the {m} elements of {what}, a tensor {shape}."
            )
        return found.detach().to(y0).reshape(count, m, m)

    return matrix
