"""Gradients of a batch of independent problems: ``aca`` replays the steps, ``direct`` keeps their autograd graph.

Each step of the forward pass is accepted by some of the samples. The backward pass of ``aca`` goes through the steps
from last to first. It repeats a step with its graph: samples that accepted it start from their checkpoints with their
step sizes, all others make a step of length zero. It pulls the cotangents of the former back and drops the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, OptionError, ReplayError
from aca_ext.gradients.aca import Gate
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.dependencies import FirstEvaluation, first_slope_with_graph
from aca_ext.gradients.passes import ForwardPass, Gradients, with_graph
from aca_ext.kernels.fused import RowOperations, row_operations_for
from aca_ext.problem.admission import check_readable
from aca_ext.problem.batch import BatchProblem
from aca_ext.solver.batch_loop import BatchSolver, stage_times
from aca_ext.solver.batch_record import AcceptedRows, BatchRecord, Mask, assemble, index_of, outputs_of_step
from aca_ext.solver.runge_kutta import Trial, scheme_of, solution_only, step
from aca_ext.vector_field.batch_field import RowField
from aca_ext.vector_field.field import VectorField
from aca_ext.vector_field.replay import Replay
from aca_ext.vector_field.replay_check import ReplayCheck, ReplayedStep


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
        y0 = task.problem.y0.detach()
        return _forward(task, task.first_slope(y0), keep_states=False)[0]


def _forward(task: Task, k0: Tensor | None, keep_states: bool) -> tuple[Result, list[Tensor]]:
    """The solve, with the kept states followed by the last state."""
    problem = task.problem
    assert isinstance(problem, BatchProblem)
    _check_buffers(task.field)
    y0 = problem.y0.detach()
    assert isinstance(task.field, RowField)
    solver = BatchSolver(problem, task.field, row_operations_for(y0, problem.tolerance), k0, keep_states)
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
        return _replay_backward(self._forward, grad_ys, states, inputs)

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        first, ends = _ends(_steps(self._forward), states)
        return _differentiable_backward(self._forward, grad_ys, first if y0 is None else y0, ends, inputs)


def _record(forward: ForwardPass) -> BatchRecord:
    assert isinstance(forward.record, BatchRecord)
    return forward.record


def _steps(forward: ForwardPass) -> Sequence[AcceptedRows]:
    return _record(forward).steps


def _check_for(forward: ForwardPass, y: Tensor, replay: Replay, *, restarts: bool) -> ReplayCheck:
    segments, n_steps, dtype = forward.task.problem.tolerance.segments, len(_steps(forward)), forward.autocast.dtype
    return ReplayCheck(y, segments, n_steps, dtype, replay.held, by_row=True, restarts=restarts)


class _Steps:
    """Repeats the accepted steps of a batch with their autograd graphs.

    Samples that failed rest in place of a sample that did not, since func may have no derivative where they stopped.

    Args:
        failed: True for samples that failed.
    """

    def __init__(self, task: Task, ops: RowOperations, replay: Replay, failed: Mask) -> None:
        self._ops, self._replay = ops, replay
        self._places = np.arange(ops.n_rows)
        if failed.any() and not failed.all():
            self._places[failed] = (~failed).argmax()
        tableau = task.problem.tableau
        self._whole = scheme_of(tableau, estimate_error=False)
        self._short = solution_only(self._whole)
        self._h = np.zeros(ops.n_rows)
        assert isinstance(task.problem, BatchProblem)
        self._t = task.problem.last_times[self._places]  # samples at rest need a time at which f exists

    def rested(self, y: Tensor) -> Tensor:
        """The states, with those of failed samples replaced by that of the sample in whose place they rest."""
        is_moved = self._places != np.arange(len(self._places))
        return y[index_of(self._places, y)] if is_moved.any() else y

    def take(self, s: AcceptedRows, y: Tensor) -> tuple[Trial, Tensor]:
        """Repeats a step; returns it with its step sizes, which are zero for samples that did not accept it."""
        t, t_next, h = self._t, self._t.copy(), self._h
        t[s.rows], t_next[s.rows], h[s.rows] = s.t, s.t_next, s.h
        scheme = self._whole if (s.outputs.theta != 1.0).any() else self._short
        steps = self._ops.steps(h.copy())
        self._replay.begin_step(None)
        assert isinstance(self._replay.field, RowField)
        self._replay.field.see(s.seen)
        trial = step(self._replay, self._ops, scheme, stage_times(scheme, t, h, t_next), y, steps)
        h[s.rows] = 0.0
        return trial, steps


def _replay_backward(
    forward: ForwardPass, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Gradients:
    task, accepted = forward.task, _steps(forward)
    *starts, y = states
    ops = row_operations_for(y, task.problem.tolerance, differentiable=True)
    scheme = scheme_of(task.problem.tableau, estimate_error=False)
    replay = forward.replay(inputs)
    steps = _Steps(task, ops, replay, _record(forward).failed)
    y = steps.rested(y)
    check = _check_for(forward, y, replay, restarts=True)
    g = torch.zeros_like(y)  # cotangents of the samples' states at the end of the step to replay
    with replay.repeating():
        for n, (s, start) in reversed(list(enumerate(zip(accepted, starts, strict=True)))):
            rows = index_of(s.rows, y)
            y_next, y = y, y.index_copy(0, rows, start).requires_grad_()
            trial, h = steps.take(s, y)
            check.compare(ReplayedStep(n, s.t, s.h, rows=s.rows), y, y_next, trial.y1, trial.k)
            found = outputs_of_step(s.outputs, scheme, y, h, trial)
            cotangents = [grad_ys[index_of(i, y), index_of(r, y)] for r, i, _ in found]
            at_end = torch.zeros_like(g).index_copy(0, rows, g[rows])
            ends = [trial.y1, *(state for _, _, state in found)]
            pulled = replay.pull_back(y, ends, [at_end, *cotangents])
            assert pulled is not None
            check_readable("the gradient that a backward pass inside func returned", pulled)
            g = g.index_copy(0, rows, pulled[rows])
            y = y.detach()
        check.finish()
        if accepted:
            start = task.problem.y0.detach()
            replay.check_reached(forward.leaves, task.problem.start_time(start), start)
    forward.stats.n_f_evals_backward = replay.n_evals
    return _without_failures(forward, [g + grad_ys[0], *replay.grads], replay.inputs)


def _without_failures(forward: ForwardPass, grads: Gradients, inputs: Sequence[Tensor]) -> Gradients:
    """The gradients of y0 and the inputs, zero for the initial states of samples that failed.

    Raises:
        ReplayError: func is NaN for a failed sample wherever it rests, which spoils what all samples share.
    """
    failed = _record(forward).failed
    if not failed.any():
        return grads
    grad_y0, *others = grads
    healthy = None if grad_y0 is None else grad_y0.index_fill(0, index_of(np.flatnonzero(failed), grad_y0), 0.0)
    shared = [g for g in others if g is not None]
    is_finite = healthy is None or torch.isfinite(healthy).all()
    if is_finite and not all(torch.isfinite(g).all() for g in shared):
        raise ReplayError(
            f"the gradient is NaN or infinite, and sample {int(failed.argmax())} failed. func has no finite derivative "
            "for that sample, even at the time and state of another one (its parameters may be NaN), which spoils the "
            "gradients of what all samples share. Leave the sample out of the batch, or mend its parameters."
        )
    if failed.all():  # nothing was replayed
        others = [torch.zeros_like(x) for x in inputs]
    return healthy, *others


def _ends(steps: Sequence[AcceptedRows], states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The first state, and for each step the end states of the samples that accepted it."""
    *starts, y = states
    found: list[Tensor] = []
    for s, start in zip(reversed(steps), reversed(starts), strict=True):
        rows = index_of(s.rows, y)
        found.append(y[rows])
        y = y.index_copy(0, rows, start)
    return y, found[::-1]


def _differentiable_backward(
    forward: ForwardPass, grad_ys: Tensor, y0: Tensor, ends: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Gradients:
    """The gradients with an autograd graph (create_graph=True): repeats all accepted steps in one graph."""
    task = forward.task
    ops = row_operations_for(y0.detach(), task.problem.tolerance, differentiable=True)
    scheme = scheme_of(task.problem.tableau, estimate_error=False)
    gate = Gate()
    replay = forward.replay(inputs, gate.of, y0)
    steps = _Steps(task, ops, replay, _record(forward).failed)
    start = gate.of(y0)
    y = steps.rested(start)
    survivors = np.flatnonzero(~_record(forward).failed)
    outputs = [(survivors, np.zeros_like(survivors), start[index_of(survivors, y0)])]
    check = _check_for(forward, y0.detach(), replay, restarts=False)
    expected = y.detach()
    with replay.repeating():
        for n, (s, end) in enumerate(zip(_steps(forward), ends, strict=True)):
            trial, h = steps.take(s, y)
            outputs += outputs_of_step(s.outputs, scheme, y, h, trial)
            rows = index_of(s.rows, y0)
            expected = expected.index_copy(0, rows, end)
            check.compare(ReplayedStep(n, s.t, s.h, rows=s.rows), y, expected, trial.y1, trial.k)
            y = y.index_copy(0, rows, trial.y1[rows])
    check.finish()
    forward.stats.n_f_evals_backward = replay.n_evals
    ys = assemble(outputs, task.problem.times_of_rows.shape, y0)  # type: ignore[attr-defined]
    wanted = [x for x in (start, *replay.inputs) if x.requires_grad]
    replay.check_all(ys, start)
    with gate.closed():
        found = iter(torch.autograd.grad(ys, wanted, grad_ys, create_graph=True, allow_unused=True))
    grad_y0, *replay.grads = [next(found) if x.requires_grad else None for x in (start, *replay.inputs)]
    with replay.repeating():
        replay.check_reached(forward.leaves, task.problem.start_time(y0), y0)
    return _without_failures(forward, [grad_y0, *replay.grads], replay.inputs)
