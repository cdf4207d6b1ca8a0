"""Gradients of a batch of independent problems: ``aca`` replays the steps, ``direct`` keeps their autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, OptionError
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.batch_replay import differentiable_backward, replay_backward
from aca_ext.gradients.dependencies import FirstEvaluation, first_slope_with_graph, first_slope_without_graph
from aca_ext.gradients.passes import ForwardPass, Gradients, with_graph
from aca_ext.kernels.fused import row_operations_for
from aca_ext.problem.batch import BatchProblem
from aca_ext.solver.batch_loop import BatchSolver
from aca_ext.solver.batch_record import BatchRecord
from aca_ext.vector_field.batch_field import RowField
from aca_ext.vector_field.field import VectorField


def solve(task: Task, gradient: str) -> Result:
    """Solves a ``BatchProblem`` with the named gradient method.

    Raises:
        ArgumentValueError: the gradient is not available, ``checkpoints`` is given, func changes buffers of its
            modules, or func draws random numbers (with "aca").
        OptionError: ``on_failure="nan"`` is given with another gradient than "aca".
    """
    _check_stops(task)
    if gradient not in _GRADIENTS:
        raise ArgumentValueError(
            f'gradient is {gradient!r}; option batch="independent" takes one of {", ".join(_GRADIENTS)}.'
        )
    if task.checkpoints is not None:
        raise ArgumentValueError(
            f'checkpoints is {task.checkpoints!r}; option batch="independent" keeps every state. Leave checkpoints '
            'out, or use engine="compiled".'
        )
    assert isinstance(task.problem, BatchProblem)
    if task.problem.nan_on_failure and gradient != "aca":
        raise OptionError(
            f"gradient is {gradient!r}, whose graph holds the trial steps of failed samples too; option "
            'on_failure="nan" takes gradient="aca".'
        )
    return _GRADIENTS[gradient](task)


def _check_stops(task: Task) -> None:
    assert isinstance(task.problem, BatchProblem)
    if task.problem.stops_of_rows is not None:
        raise OptionError(
            'options step_t and jump_t take engine="compiled" where batch="independent" is given. Use it, or leave '
            "them out."
        )


def solve_without_graph(task: Task) -> Result:
    _check_stops(task)
    with torch.no_grad():
        return _forward(task, first_slope_without_graph(task), keep_states=False)[0]


def _forward(task: Task, k0: Tensor | None, keep_states: bool) -> tuple[Result, list[Tensor]]:
    """The solve, with the kept states followed by the last state."""
    problem = task.problem
    assert isinstance(problem, BatchProblem)
    _check_buffers(task.field)
    y0 = problem.y0.detach()
    assert isinstance(task.field, RowField)
    ops = row_operations_for(y0, problem.tolerance)
    solver = BatchSolver(problem, task.field, ops, k0, keep_states, task.keeps_ends)
    return Result(solver.run(y0.clone()), solver.record, solver.stats), [*solver.states, solver.y]


def _direct(task: Task) -> Result:
    problem = task.problem
    assert isinstance(problem, BatchProblem)
    k0 = first_slope_with_graph(task)
    _check_buffers(task.field)
    ops = row_operations_for(problem.y0.detach(), problem.tolerance, differentiable=True)
    assert isinstance(task.field, RowField)
    solver = BatchSolver(problem, task.field, ops, k0, keep_states=False)
    return Result(solver.run(problem.y0), solver.record, solver.stats)


def _aca(task: Task) -> Result:
    first, field = FirstEvaluation(task), task.field
    args = [arg for arg in field.args if isinstance(arg, Tensor) and arg.requires_grad]
    if not first.needs_graph(args):
        with torch.no_grad():
            return _forward(task, first.k, keep_states=False)[0]
    random_state = field.random_state()
    if field.draws_random_numbers:
        raise _random_numbers_error()
    with torch.no_grad(), first.watch():
        solved, states = _forward(task, first.k, keep_states=True)
    first.settle()
    if field.has_drawn_since(random_state):
        raise _random_numbers_error()
    assert isinstance(solved.record, BatchRecord)
    record, states = solved.record.without_failures(states)
    backward = _BatchBackward(ForwardPass.of(task, first, replace(solved, record=record)))
    ys = with_graph(solved.ys, backward, states, task.problem.y0, [*first.params, *args], first.found)
    return Result(ys, solved.record, solved.stats)


_GRADIENTS: dict[str, Callable[[Task], Result]] = {"aca": _aca, "direct": _direct}


def _random_numbers_error() -> ArgumentValueError:
    return ArgumentValueError(
        'func draws random numbers. With option batch="independent", gradient="aca" cannot draw them again, because '
        'each sample has its own steps. Use gradient="direct".'
    )


def _check_buffers(field: VectorField) -> None:
    if field.moving_buffers:
        raise ArgumentValueError(
            "func changes buffers of its modules (batch normalisation in training mode?), so samples depend on one "
            'another. Option batch="independent" does not allow that. Call module.eval() on func first.'
        )


class _BatchBackward:
    """Backward pass that replays each accepted step for the samples that accepted it."""

    def __init__(self, forward: ForwardPass) -> None:
        self._forward = forward

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        return replay_backward(self._forward, grad_ys, states, inputs)

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        return differentiable_backward(self._forward, grad_ys, y0, states, inputs)
