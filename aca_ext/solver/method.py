"""Interface of the methods, and the choice of the method of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from aca_ext.errors import ArgumentValueError
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.numerics.adams import Adams
from aca_ext.numerics.implicit import RosenbrockTableau
from aca_ext.numerics.switching import Switching
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.problem import Problem
from aca_ext.solver.adams import AdamsSteps
from aca_ext.solver.checkpoints import Checkpoints, StepRecord
from aca_ext.solver.explicit import ExplicitAmongImplicit, ExplicitMethod
from aca_ext.solver.implicit.jacobians import jacobian_of
from aca_ext.solver.implicit.rosenbrock import RosenbrockMethod, rosenbrock_scheme_of
from aca_ext.solver.implicit.scheme import implicit_scheme_of
from aca_ext.solver.implicit.step import ImplicitMethod
from aca_ext.solver.runge_kutta import Coefficients, Trial, scheme_of, solution_only
from aca_ext.solver.slope_checkpoints import SlopeCheckpoints
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.solver.switching import SwitchingSteps
from aca_ext.solver.transposed_step import Compare, Inside
from aca_ext.vector_field.field import VectorField


class Steps(Protocol):
    """The steps of one solve, in order.

    All methods share the dense output, y + h·Σ_i b_i(theta)·k_i, and the error norm: see ``runge_kutta``.

    Attributes:
        scheme: the coefficients of the step at hand.
        compiled: the C++ object that makes many steps per call; None if steps run in Python.
        memory: data of earlier steps on which the choice of later ones depends, for a solve that continues this one.
    """

    @property
    def scheme(self) -> Coefficients: ...

    @property
    def compiled(self) -> Any | None: ...

    @property
    def memory(self) -> Any: ...

    def step(
        self, times: Sequence[Number], y: Tensor, h: Number, k_first: Tensor | None = None, out: Tensor | None = None
    ) -> Trial:
        """Advances ``y`` by h; see ``runge_kutta.step``."""

    def accept(self, y: Tensor, h: Number, trial: Trial) -> Tensor | None:
        """Goes on to the next step after an accepted one from ``y``; returns its first slope if that is known."""

    def finish(self) -> None:
        """Warns of steps that may be wrong."""


class RepeatedSteps(Steps, Protocol):
    """Steps that repeat those of a forward pass."""

    def repeat(
        self, times: Sequence[Number], y: Tensor, h: Number, k_before: Tensor | None, y_next: Tensor | None
    ) -> Trial:
        """Makes a step of the forward pass again, which ended there at ``y_next`` if that is known.

        ``k_before`` is the last slope of the step before; None if it is not the first one of this step.
        """

    def repeated_end(self, compare: Compare, y: Tensor, y_next: Tensor, trial: Trial) -> Tensor:
        """The end of a repeated step with its graph, after a comparison with its end in the forward pass."""


class Method(RepeatedSteps, Protocol):
    """A one-step method, bound to f and the operations of one solve."""

    def accept_rows(self, accepted: Any, h: Tensor, trial: Trial) -> None:
        """Goes on to the next step in the rows of a batch that accepted this one, of sizes ``h``."""

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


def steps_of(
    problem: Problem,
    field: VectorField,
    ops: TorchOperations,
    counts: Stats,
    record: StepRecord,
    checkpoints: Checkpoints | SlopeCheckpoints | None,
) -> Steps:
    """The steps of a forward pass.

    Args:
        counts: receives the work of Newton's method.
        record: receives the formulas of a method that has several.
        checkpoints: receive its slopes.

    Raises:
        ArgumentValueError: func does not suit the method.
    """
    if isinstance(problem.tableau, Adams):
        adams = AdamsSteps(field.fastest, ops, problem)
        record.formulas = adams.formulas
        if isinstance(checkpoints, SlopeCheckpoints):
            checkpoints.slopes = adams.slopes
        return adams
    if problem.newton is not None:
        check_repeatable(problem, field)
    if isinstance(problem.tableau, Switching):
        explicit, implicit = (
            method_of(part, field.fastest, ops, estimate_error=True, counts=counts) for part in parts_of(problem)
        )
        assert isinstance(implicit, ImplicitMethod)
        memory = None if problem.resumed is None else problem.resumed.memory
        switching = SwitchingSteps(problem.tableau, (explicit, implicit), ops, counts, memory)
        record.formulas = switching.chosen
        return switching
    return method_of(problem, field.fastest, ops, estimate_error=problem.adaptive, counts=counts)


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
    jacobian = jacobian_of(problem, f, ops)
    return ImplicitMethod(f, ops, scheme, jacobian, tolerance, counts, repeats)


def parts_of(problem: Problem) -> list[Problem]:
    """The problem once with each of its methods, of which a step has one: see ``StepRecord.part_of``."""
    if isinstance(problem.tableau, Switching):
        return [replace(problem, tableau=tableau) for tableau in problem.tableau.parts]
    return [problem]


def methods_of_replay(
    problem: Problem, record: StepRecord, f: Any, ops: TorchOperations, *, estimate_error: bool
) -> list[Method]:
    """The methods of ``parts_of``, for steps that repeat those of a forward pass."""
    methods = [method_of(part, f, ops, estimate_error=estimate_error, repeats=True) for part in parts_of(problem)]
    if len(methods) > 1 and any(record.formulas):
        assert problem.newton is not None
        scheme = scheme_of(problem.tableau.explicit, estimate_error)
        methods[0] = ExplicitAmongImplicit(f, ops, scheme, problem.newton.tolerance)
    return methods


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
