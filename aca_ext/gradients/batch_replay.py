"""The backward pass of ``aca`` for independent samples, which repeats the accepted steps of all of them.

Each step of the forward pass is accepted by some of the samples. The backward pass goes through the steps from last to
first. It replays a step and transposes it: samples that accepted it start from their checkpoints with their step
sizes, all others make a step of length zero. Only the cotangents of the former change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import ReplayError
from aca_ext.gradients.aca import Gate, transposed
from aca_ext.gradients.base import Task
from aca_ext.gradients.passes import ForwardPass, Gradients
from aca_ext.kernels.fused import Array, RowOperations, row_operations_for
from aca_ext.solver.batch_loop import stage_times
from aca_ext.solver.batch_record import AcceptedRows, BatchRecord, OutputRows, assemble, index_of, outputs_of_step
from aca_ext.solver.method import Method, advancing_method_of, method_of
from aca_ext.solver.runge_kutta import Trial
from aca_ext.solver.transposed_step import Compare, Inside
from aca_ext.vector_field.batch_field import RowField
from aca_ext.vector_field.replay import Replay
from aca_ext.vector_field.replay_check import ReplayCheck, ReplayedStep


def _record(forward: ForwardPass) -> BatchRecord:
    assert isinstance(forward.record, BatchRecord)
    return forward.record


def _steps(forward: ForwardPass) -> Sequence[AcceptedRows]:
    return _record(forward).steps


def _check_for(forward: ForwardPass, y: Tensor, replay: Replay, *, restarts: bool) -> ReplayCheck:
    segments, n_steps, dtype = forward.task.problem.tolerance.segments, len(_steps(forward)), forward.autocast.dtype
    return ReplayCheck(y, segments, n_steps, dtype, replay.held, by_row=True, restarts=restarts)


class _Steps:
    """The accepted steps of a batch, to be repeated with their autograd graphs or transposed.

    Samples that failed or made no step rest in place of one that did, since func may have no derivative where they are.
    """

    def __init__(self, task: Task, ops: RowOperations, replay: Replay, record: BatchRecord) -> None:
        self._ops, self._replay = ops, replay
        is_idle = np.ones(ops.n_rows, dtype=np.bool_)
        for s in record.steps:  # without those of samples that failed
            is_idle[s.rows] = False
        self._places = np.arange(ops.n_rows)
        if not is_idle.all():
            self._places[is_idle] = is_idle.argmin()
        problem = self._problem = task.problem
        self._whole = method_of(problem, replay, ops, estimate_error=False, repeats=True)
        self._short = advancing_method_of(problem, replay, ops) if problem.newton is None else self._whole
        self.repeated_end = self._whole.repeated_end
        self._h = np.zeros(ops.n_rows)
        self._k_before: Tensor | None = None
        self._t = record.rest_times[self._places]

    def rested(self, y: Tensor) -> Tensor:
        """The states, with those of idle samples replaced by that of the sample in whose place they rest."""
        is_moved = self._places != np.arange(len(self._places))
        return self._ops.admit(y[index_of(self._places, y)]) if is_moved.any() else y

    def begin(self, y: Tensor) -> None:
        """Evaluates func at the starts, for steps in order that each begin with the last slope of the one before."""
        if self._problem.newton is not None and self._whole.scheme.fsal:
            times = self._problem.start_time(y.detach())
            self._k_before = self._replay(times[index_of(self._places, y)], y)

    def take(self, s: AcceptedRows, y: Tensor, y_next: Tensor) -> tuple[Trial, Tensor]:
        """Repeats a step; returns it with its step sizes, which are zero for samples that did not accept it.

        Args:
            y_next: its end in the forward pass.
        """
        method = self._whole if (s.outputs.theta != 1.0).any() else self._short
        times, h = self._begin(s, method)
        trial = method.repeat(times, y, h, self._k_before, y_next)
        if self._k_before is not None:
            rows = index_of(s.rows, y)
            self._k_before = self._ops.admit(self._k_before.index_copy(0, rows, trial.k[-1][rows]))
        return trial, h

    def pull_back(
        self, s: AcceptedRows, y: Tensor, at_end: Tensor, grad_ys: Tensor, compare: Compare, y_next: Tensor
    ) -> Tensor:
        """Replays a step and returns the cotangents of its start.

        Args:
            at_end: cotangents of the states at the end of the step.
            grad_ys: cotangents of all outputs.
        """
        method, outputs = self._whole, s.outputs
        times, h = self._begin(s, method)
        ends = outputs.where(outputs.theta == 1.0)
        at_end = self._ops.admit(_added(at_end, ends, _cotangents(ends, grad_ys)))
        inside = self._inside(outputs.where(outputs.theta != 1.0), grad_ys, like=y)
        return method.vjp(times, y, h, [(method.scheme.solution, at_end)], compare, y_next, inside)

    def _begin(self, s: AcceptedRows, method: Method) -> tuple[list[Array], Tensor]:
        """Prepares to repeat a step; returns the times of its stages, and its step sizes."""
        t, t_next, h = self._t, self._t.copy(), self._h
        t[s.rows], t_next[s.rows], h[s.rows] = s.t, s.t_next, s.h
        times, steps = stage_times(method.scheme, t, h, t_next), self._ops.steps(h.copy())
        h[s.rows] = 0.0
        self._replay.begin_step(None)
        assert isinstance(self._replay.field, RowField)
        self._replay.field.see(s.seen)
        return times, steps

    def _inside(self, outputs: OutputRows, grad_ys: Tensor, like: Tensor) -> Inside | None:
        """The sums over outputs inside a step; None without such outputs."""
        if not len(outputs.rows):
            return None
        g, zero = _cotangents(outputs, grad_ys), torch.zeros_like(like)
        sums: list[Tensor] = []
        for weights in self._problem.tableau.dense_weights(outputs.theta):
            each = torch.from_numpy(np.broadcast_to(weights, outputs.theta.shape).copy()).to(g)
            sums.append(self._ops.admit(_added(zero, outputs, each.view(-1, *self._ops.row_shape[1:]) * g)))
        return self._ops.admit(_added(zero, outputs, g)), sums


def _cotangents(outputs: OutputRows, grad_ys: Tensor) -> Tensor:
    return grad_ys[index_of(outputs.index, grad_ys), index_of(outputs.rows, grad_ys)]


def _added(total: Tensor, outputs: OutputRows, g: Tensor) -> Tensor:
    """``total`` and for each output its ``g``, in the row of its sample."""
    # Not index_add, whose order of terms varies on a GPU.
    return total.index_put((index_of(outputs.rows, total),), g, accumulate=True) if len(g) else total


def replay_backward(
    forward: ForwardPass, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Gradients:
    task, accepted = forward.task, _steps(forward)
    *starts, y = states
    ops = row_operations_for(y, task.problem.tolerance)
    replay = forward.replay(inputs)
    steps = _Steps(task, ops, replay, _record(forward))
    y = steps.rested(y)
    check = _check_for(forward, y, replay, restarts=True)
    g = torch.zeros_like(y)  # cotangents of the samples' states at the end of the step to replay
    with replay.repeating():
        for n, (s, start) in reversed(list(enumerate(zip(accepted, starts, strict=True)))):
            rows = index_of(s.rows, y)
            y_next, y = _end_of(s, start, y), _with_rows(y, rows, start[: len(rows)])
            compare = partial(check.compare, ReplayedStep(n, s.t, s.h, rows=s.rows), y, y_next)
            at_end = _with_rows(torch.zeros_like(g), rows, g[rows])
            pulled = steps.pull_back(s, y, at_end, grad_ys, compare, y_next)
            g = _with_rows(g, rows, pulled[rows])
        check.finish()
        forward.stats.n_f_evals_backward = replay.n_evals
        if accepted:
            start = task.problem.y0.detach()
            replay.check_end(forward.leaves, task.problem.start_time(start), start)
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


def _with_rows(y: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """A copy of ``y`` with new rows, in the same layout, which ``index_copy`` does not keep."""
    return y.clone().index_copy_(0, rows, new)


def _end_of(s: AcceptedRows, states: Tensor, y: Tensor) -> Tensor:
    """The states at the end of a step, from those in which the samples go on; ``states`` is its entry in the record."""
    return _with_rows(y, index_of(s.ended, y), states[len(s.rows) :]) if len(s.ended) else y


def _ends(steps: Sequence[AcceptedRows], states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The first state, and for each step the end states of the samples that accepted it."""
    *starts, y = states
    found: list[Tensor] = []
    for s, start in zip(reversed(steps), reversed(starts), strict=True):
        rows = index_of(s.rows, y)
        found.append(_end_of(s, start, y)[rows])
        y = _with_rows(y, rows, start[: len(rows)])
    return y, found[::-1]


def differentiable_backward(
    forward: ForwardPass, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Gradients:
    """The gradients with an autograd graph (create_graph=True): repeats all accepted steps in one graph.

    y0 is None if it does not require grad.
    """
    task = forward.task
    first, ends = _ends(_steps(forward), states)
    y0 = first if y0 is None else y0
    ops = row_operations_for(y0.detach(), task.problem.tolerance, differentiable=True)
    gate = Gate()
    replay = forward.replay(inputs, gate.of, y0)
    steps = _Steps(task, ops, replay, _record(forward))
    start = gate.of(y0)
    y = steps.rested(start)
    survivors = np.flatnonzero(~_record(forward).failed)
    outputs = [(survivors, np.zeros_like(survivors), start[index_of(survivors, y0)])]
    check = _check_for(forward, y0.detach(), replay, restarts=False)
    expected = y.detach()
    with replay.repeating():
        steps.begin(y)
        for n, (s, end) in enumerate(zip(_steps(forward), ends, strict=True)):
            at_end = _with_rows(expected, index_of(s.rows, y0), end)
            trial, h = steps.take(s, y, at_end)
            compare = partial(check.compare, ReplayedStep(n, s.t, s.h, rows=s.rows), y, at_end)
            trial.y1 = steps.repeated_end(compare, y, at_end, trial)
            outputs += outputs_of_step(s.outputs, task.problem.tableau, y, h, trial)
            go_on = index_of(s.rows[~np.isin(s.rows, s.ended)], y0)
            y = ops.admit(y.index_copy(0, go_on, trial.y1[go_on]))
            expected = _with_rows(expected, go_on, at_end[go_on])
    check.finish()
    ys = assemble(outputs, _record(forward).is_missing.shape, y0)
    grad_y0 = transposed(ys, grad_ys, start, replay, gate)
    forward.stats.n_f_evals_backward = replay.n_evals
    with replay.repeating():
        replay.check_end(forward.leaves, task.problem.start_time(y0), y0)
    return _without_failures(forward, [grad_y0, *replay.grads], replay.inputs)
