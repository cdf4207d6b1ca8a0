"""Interface of the gradient methods: the task that each is given, and the result that it returns."""

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
    """A problem together with what its gradient is to reach.

    Attributes:
        field: func with its checks.
        params: tensors that func depends on by itself, where the user named them, else None.
        adjoint: how ``gradient="adjoint"`` solves backward.
        checkpoints: which states ``gradient="aca"`` keeps.
    """

    problem: Problem
    field: VectorField
    params: Sequence[Tensor] | None
    adjoint: AdjointOptions
    checkpoints: Policy = None

    def first_slope(self, y0: Tensor, watch: AbstractContextManager[Any] | None = None) -> Tensor | None:
        """f(t0, y0), evaluated in ``watch``; None where the solve has no step."""
        problem = self.problem
        if len(problem.times) == 1:
            return None
        if problem.resumed is None or problem.resumed.k is None:
            return self.field.first(problem.start_time(y0), y0, watch)
        # The slope is known; what else the evaluation shows is not, and it is to leave no trace.
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
    """The outputs stacked, (T, \\*packed shape), with what is known of the solve.

    Attributes:
        is_lazy: the record is slow to read (it is on a device, or made by another solve), and read only on demand.
    """

    ys: Tensor
    record: Record
    stats: Stats | BatchStats
    is_lazy: bool = False


class Gradient(Protocol):
    def __call__(self, task: Task) -> Result: ...
