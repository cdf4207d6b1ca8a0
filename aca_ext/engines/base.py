"""Interface of the engines: the request that each receives, and the obstacle with which it may refuse it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aca_ext.errors import AcaError
from aca_ext.gradients.base import AdjointOptions, Gradient, Result, Task
from aca_ext.gradients.requested_times import with_gradient_by_grid, with_gradient_by_slopes
from aca_ext.kernels.fused import TorchOperations
from aca_ext.numerics.adams import Adams
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Problem
from aca_ext.progress import Callback
from aca_ext.solver.checkpoints import Policy
from aca_ext.vector_field.batch_field import RowField
from aca_ext.vector_field.field import VectorField

_NO_ADJOINT = AdjointOptions(rtol=0.0, atol=0.0, method=None, options={})  # for gradients without a backward solve


class Request(NamedTuple):
    """Problem of a solve with its settings; a NamedTuple, since creating a dataclass takes longer.

    Attributes:
        gradient: a key of ``GRADIENTS``.
        learnt: the requested times if they receive a gradient, else None.
        params, checkpoints, progress, callback: as given to ``odeint``.
        adjoint: settings of the backward solve of ``gradient="adjoint"``.
        keeps_ends: the states at the ends of all steps are further outputs.
    """

    problem: Problem
    gradient: str = "aca"
    learnt: Tensor | None = None
    params: Sequence[Tensor] | None = None
    checkpoints: Policy = None
    progress: bool = False
    callback: Callback | None = None
    adjoint: AdjointOptions = _NO_ADJOINT
    keeps_ends: bool = False

    @property
    def is_batch(self) -> bool:
        """True if every sample has its own steps."""
        return isinstance(self.problem, BatchProblem)

    @property
    def moves_grid(self) -> bool:
        """True if the gradient of t is that of fixed steps whose sizes follow from t."""
        problem = self.problem
        if self.learnt is None or problem.grid is None or len(problem.grid) == 1:
            return False
        # Jumps of func at nodes (option perturb) stay where they are, while their nodes move.
        return self.gradient != "adjoint" and not isinstance(problem.tableau, Adams) and not problem.jumps

    def task(self) -> Task:
        """A task for a gradient method, with a new field that has counted no evaluation."""
        return Task(self.problem, _field(self.problem), self.params, self.adjoint, self.checkpoints, self.keeps_ends)


class Engine(Protocol):
    """Runs solves; it holds no data of a single solve."""

    @property
    def error(self) -> type[AcaError]:
        """Type of the error to raise with an obstacle."""

    def obstacle(self, request: Request) -> str | None:
        """Reason why this engine cannot run the request, with what to use instead; None if it can."""

    def solve(self, request: Request) -> Result:
        """Runs a request that has no obstacle; the result has an autograd graph if gradients are enabled."""


def _field(problem: Problem) -> VectorField:
    """The ``VectorField`` of the problem, on which the solver evaluates func."""
    ops = TorchOperations(problem.y0.detach(), problem.tolerance)
    if isinstance(problem, BatchProblem):
        return RowField(problem.func, problem.args, problem.packing, ops)
    return VectorField(problem.func, problem.args, problem.packing, ops)


def solve_with(method: Gradient, request: Request) -> Result:
    """Solves a request by a gradient method that calls func itself.

    Raises:
        ArgumentTypeError: func does not accept the arguments that it is called with.
    """
    task = request.task()
    if torch.is_grad_enabled():
        task.field.prepare_replay()
    try:
        if request.learnt is None:
            return method(task)
        of_times = with_gradient_by_grid if request.moves_grid else with_gradient_by_slopes
        return of_times(task, request.learnt, method)
    except TypeError:
        task.field.check_signature()
        raise


def obstacle_but_to_eager(engine: str, request: Request) -> str | None:
    """Obstacle of ``engine`` if an argument needs the loop of the eager engine; None if no argument does."""
    name = argument_for_eager(request, takes_batches=False)
    return None if name is None else f'engine="{engine}" does not support the given {name}. Use engine="eager".'


def argument_for_eager(request: Request, takes_batches: bool) -> str | None:
    """Name of an argument for which the loop of the eager engine is needed; None if there is none."""
    if request.gradient != "aca":
        return f"gradient ({request.gradient!r})"
    if request.checkpoints is not None:
        return "checkpoints"
    if request.progress:
        return "progress"
    if request.callback is not None:
        return "callback"
    if request.problem.events:
        return "events"
    if isinstance(request.problem.tableau, Adams):
        return f"method ({request.problem.tableau.name!r})"
    problem, is_batch = request.problem, request.is_batch and not takes_batches
    if problem.newton is not None and not takes_batches:
        return f"method ({problem.tableau.name!r})"
    if request.moves_grid:
        return "t, which requires grad, with fixed steps"
    if problem.stops_at_limit or problem.accepts_min_step or problem.interp is not None or is_batch:
        return "options"
    return "options" if problem.grid is not None and problem.jumps else None
