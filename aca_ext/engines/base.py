"""Interface of the engines: the request that each is given, and the obstacle that it may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aca_ext.errors import AcaError
from aca_ext.gradients.base import AdjointOptions, Gradient, Result, Task
from aca_ext.gradients.requested_times import with_time_gradient
from aca_ext.kernels.fused import TorchOperations
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Problem
from aca_ext.progress import Callback
from aca_ext.solver.checkpoints import Policy
from aca_ext.vector_field.batch_field import RowField
from aca_ext.vector_field.field import VectorField

_NO_ADJOINT = AdjointOptions(rtol=0.0, atol=0.0, method=None, options={})  # of gradients that solve nothing backward


class Request(NamedTuple):
    """A solve to be run: its problem, and the arguments that say how. (A tuple, which is made faster than a dataclass.)

    Attributes:
        gradient: a key of ``GRADIENTS``.
        learnt: the requested times, where they are to receive a gradient.
        params, checkpoints, progress, callback: as given to ``odeint``.
        adjoint: how ``gradient="adjoint"`` solves backward.
    """

    problem: Problem
    gradient: str = "aca"
    learnt: Tensor | None = None
    params: Sequence[Tensor] | None = None
    checkpoints: Policy = None
    progress: bool = False
    callback: Callback | None = None
    adjoint: AdjointOptions = _NO_ADJOINT

    @property
    def is_batch(self) -> bool:
        """True where every sample has its own steps."""
        return isinstance(self.problem, BatchProblem)

    def task(self) -> Task:
        """The task for a gradient method; its field is new, and has counted no evaluation."""
        return Task(self.problem, _field(self.problem), self.params, self.adjoint, self.checkpoints)


class Engine(Protocol):
    """Runs solves. An engine holds nothing of a single solve."""

    @property
    def error(self) -> type[AcaError]:
        """The error to raise with an obstacle."""

    def obstacle(self, request: Request) -> str | None:
        """The reason why this engine cannot take the request, and what to use instead; None if it can."""

    def solve(self, request: Request) -> Result:
        """The result, with its graph where gradients are enabled. ``request`` has no obstacle."""


def _field(problem: Problem) -> VectorField:
    """func as the solver calls it."""
    ops = TorchOperations(problem.y0.detach(), problem.tolerance)
    if isinstance(problem, BatchProblem):
        return RowField(problem.func, problem.args, problem.packing, ops)
    return VectorField(problem.func, problem.args, problem.packing, ops)


def solve_with(method: Gradient, task: Task, learnt: Tensor | None) -> Result:
    """The solve by a method that calls func as it is.

    Raises:
        ArgumentTypeError: func does not take the arguments that it is called with.
    """
    if torch.is_grad_enabled():
        task.field.prepare_replay()
    try:
        if learnt is not None:
            return with_time_gradient(task, t=learnt, method_of_gradient=method)
        return method(task)
    except TypeError:
        task.field.check_signature()
        raise


def obstacle_but_to_eager(engine: str, request: Request, takes_batches: bool = False) -> str | None:
    """The argument, if there is one, that asks for what the eager engine alone does."""
    name = _for_eager(request, takes_batches)
    if name is None:
        return None
    value = f" ({request.gradient!r})" if name == "gradient" else ""
    return f'engine="{engine}" does not take what {name} asks for{value}. Use engine="eager" for it.'


def _for_eager(request: Request, takes_batches: bool) -> str | None:
    if request.gradient != "aca":
        return "gradient"
    if request.checkpoints is not None:
        return "checkpoints"
    if request.progress:
        return "progress"
    if request.callback is not None:
        return "callback"
    if request.problem.events:
        return "events"
    problem, is_batch = request.problem, request.is_batch and not takes_batches
    if problem.stops_at_limit or problem.accepts_min_step or problem.interp is not None or is_batch:
        return "options"
    return "options" if problem.grid is not None and problem.jumps else None
