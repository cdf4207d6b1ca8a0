"""Interface of the one-step methods, and the choice of the method of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from aca_ext.errors import ArgumentValueError
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.numerics.implicit import RosenbrockTableau
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.problem import Problem
from aca_ext.solver.implicit.jacobians import jacobian_of
from aca_ext.solver.implicit.rosenbrock import RosenbrockMethod, rosenbrock_scheme_of
from aca_ext.solver.implicit.scheme import implicit_scheme_of
from aca_ext.solver.implicit.step import ImplicitMethod
from aca_ext.solver.runge_kutta import (
    Coefficients,
    Compare,
    Inside,
    Scheme,
    Trial,
    compiled_stepper,
    scheme_of,
    solution_only,
    stepper,
    transposed_stepper,
)
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.vector_field.field import VectorField


class Method(Protocol):
    """A one-step method, bound to f and the operations of one solve.

    All methods share the dense output, y + h·Σ_i b_i(theta)·k_i, and the error norm: see ``runge_kutta``.

    Attributes:
        scheme: its coefficients.
        compiled: the C++ object that makes many steps per call; None if steps run in Python.
    """

    @property
    def scheme(self) -> Coefficients: ...

    @property
    def compiled(self) -> Any | None: ...

    def step(
        self, times: Sequence[Number], y: Tensor, h: Number, k_first: Tensor | None = None, out: Tensor | None = None
    ) -> Trial:
        """Advances ``y`` by h; see ``runge_kutta.step``."""

    def vjp(
        self,
        times: Sequence[Number],
        y: Tensor,
        h: Number,
        outputs: Sequence[tuple[Sequence[float], Tensor]],
        compare: Compare | None = None,
        y_next: Tensor | None = None,
        inside: Inside | None = None,
    ) -> Tensor:
        """Replays a step and returns the cotangent of ``y``; see ``runge_kutta.step_vjp``."""

    def is_near(self, y: Tensor, y_next: Tensor, y1: Tensor, n_steps: int) -> bool:
        """Tells whether y1, repeated over n_steps steps, is y_next up to the error of the method's linear solves.

        The last step starts from ``y``. For a method without linear solves the answer is no.
        """


class ExplicitMethod:
    """An explicit Runge-Kutta method."""

    def __init__(self, f: Any, ops: TorchOperations, scheme: Scheme) -> None:
        self._f, self._ops, self.scheme = f, ops, scheme
        self.compiled = compiled_stepper(ops, scheme)
        self.step = stepper(f, ops, scheme, self.compiled)

    @cached_property
    def vjp(self) -> Any:
        return transposed_stepper(self._f, self._ops, self.scheme)

    def is_near(self, y: Tensor, y_next: Tensor, y1: Tensor, n_steps: int) -> bool:
        return False


def method_of(
    problem: Problem,
    f: Any,
    ops: TorchOperations,
    *,
    estimate_error: bool,
    counts: Stats | BatchStats | None = None,
    repeats: bool = False,
) -> Method:
    """The method of a problem.

    Args:
        counts: receives the work of Newton's method.
        repeats: steps repeat those of a forward pass.
    """
    if isinstance(problem.tableau, Tableau):
        return ExplicitMethod(f, ops, scheme_of(problem.tableau, estimate_error))
    assert problem.newton is not None
    counts = Stats() if counts is None else counts
    if isinstance(problem.tableau, RosenbrockTableau):
        return RosenbrockMethod(f, ops, rosenbrock_scheme_of(problem.tableau, estimate_error), counts)
    scheme = implicit_scheme_of(problem.tableau, estimate_error)
    tolerance = problem.newton.tolerance if problem.adaptive else None
    jacobian = jacobian_of(problem, f)
    return ImplicitMethod(f, ops, scheme, jacobian, tolerance, counts, repeats)


def advancing_method_of(problem: Problem, f: Any, ops: TorchOperations) -> Method:
    """The method that repeats the steps of a forward pass: the solution alone, bit for bit if it is explicit."""
    if not isinstance(problem.tableau, Tableau):
        return method_of(problem, f, ops, estimate_error=False, repeats=True)
    return ExplicitMethod(f, ops, solution_only(scheme_of(problem.tableau, problem.adaptive)))


def check_repeatable(problem: Problem, field: VectorField) -> None:
    """Raises ArgumentValueError if func does not return the same at every evaluation, as Newton's method needs."""
    draws, moves = field.draws_random_numbers, bool(field.moving_buffers)
    if draws or moves:
        what = "draws random numbers" if draws else "changes buffers of its modules"
        raise ArgumentValueError(
            f"func {what}, so that the equations of method {problem.tableau.name!r} have no solution. Use .eval(), or "
            "an explicit method."
        )
