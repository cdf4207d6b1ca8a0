"""Interface of the gradient methods: the task that each receives and the result that it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from aca_ext.problem.problem import Problem
from aca_ext.solver.checkpoints import Policy
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.vector_field.field import VectorField


@dataclass(frozen=True)
class Task:
    """A problem with the settings of its gradient.

    Attributes:
        field: func with its checks.
        params: tensors besides t, y and args that func depends on, as given by the user; None to find them.
        adjoint: settings of the backward solve of ``gradient="adjoint"``.
        checkpoints: choice of the states that ``gradient="aca"`` keeps.
        keeps_ends: the ends of all steps are further outputs, after those at the requested times.
    """

    problem: Problem
    field: VectorField
    params: Sequence[Tensor] | None
    adjoint: AdjointOptions
    checkpoints: Policy = None
    keeps_ends: bool = False

    def first_slope(self, y0: Tensor, watch: AbstractContextManager[Any] | None = None) -> Tensor | None:
        """f(t0, y0), evaluated inside ``watch``; None if the solve has no step."""
        problem = self.problem
        if len(problem.times) == 1:
            return None
        if problem.resumed is None or problem.resumed.k is None:
            return self.field.first(problem.start_time(y0), y0, watch)
        # A resumed solve knows its slope, but not the parameters that func uses. This evaluation finds them, without
        # side effects.
        random_state = self.field.random_state()
        with self.field.aside():
            k = self.field.first(problem.start_time(y0), y0, watch)
        self.field.set_random_state(random_state)
        return k


@dataclass(frozen=True)
class AdjointOptions:
    """Tolerances, method and options of the backward solve.

    Attributes:
        solve: returns the packed state at the end of a problem, in place of the solver of this package.
    """

    rtol: float | Tensor
    atol: float | Tensor
    method: str | None
    options: dict[str, object]
    solve: Callable[[Problem], Tensor] | None = None


class Record(Protocol):
    """Record of the accepted steps of a solve."""

    def bounds(self) -> Tensor | tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Result:
    """Outputs of a solve, (T, \\*packed shape), with its record and statistics."""

    ys: Tensor
    record: Record
    stats: Stats | BatchStats


class Gradient(Protocol):
    def __call__(self, task: Task) -> Result: ...
