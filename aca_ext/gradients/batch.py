"""The gradients of a batch of independent problems: ``aca``, which replays, and ``direct``, which keeps the graph.

A replay goes through the steps of the forward pass from last to first, each taken by some of the samples. It takes the
step with its graph, from their checkpoints, with their step sizes and steps of length zero for all other samples, pulls
their cotangents back through it and drops the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, OptionError
from aca_ext.gradients.aca import Gate
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.dependencies import FirstEvaluation, first_slope_with_graph
from aca_ext.gradients.passes import ForwardPass, Gradients, with_graph
from aca_ext.kernels.fused import RowOperations, row_operations_for
from aca_ext.problem.admission import check_readable
from aca_ext.problem.batch import BatchProblem
from aca_ext.solver.batch_loop import (
    AcceptedRows,
    BatchRecord,
    BatchSolver,
    assemble,
    index_of,
    outputs_of_step,
    stage_times,
)
from aca_ext.solver.runge_kutta import Trial, scheme_of, solution_only, step
from aca_ext.vector_field.field import VectorField
from aca_ext.vector_field.replay import Replay
from aca_ext.vector_field.replay_check import ReplayCheck, ReplayedStep


def solve(task: Task, gradient: str) -> Result:
    """The solve of a ``BatchProblem`` with the gradient of this name.

    Raises:
        ArgumentValueError: the gradient is not available, or func moves buffers or, with "aca", draws random numbers.
    """
    _check_failures_raise(task)
    if gradient not in _GRADIENTS:
        raise ArgumentValueError(
            f'gradient is {gradient!r}; with option batch="independent" there are {", ".join(_GRADIENTS)}.'
        )
    if task.checkpoints is not None:
        raise ArgumentValueError(
            f'checkpoints is {task.checkpoints!r}; with option batch="independent" every state is kept. Leave it out.'
        )
    return _GRADIENTS[gradient](task)


def _check_failures_raise(task: Task) -> None:
    assert isinstance(task.problem, BatchProblem)
    if task.problem.nan_on_failure:
        raise OptionError('option on_failure="nan" takes engine="compiled", whose samples see nothing of one another.')


def solve_without_graph(task: Task) -> Result:
    _check_failures_raise(task)
    with torch.no_grad():
        y0 = task.problem.y0.detach()
        return _forward(task, task.first_slope(y0), keep_states=False)[0]


def _forward(task: Task, k0: Tensor | None, keep_states: bool) -> tuple[Result, list[Tensor]]:
    """The solve, with the states that are kept and the last one."""
    problem = task.problem
    assert isinstance(problem, BatchProblem)
    _check_buffers(task.field)
    y0 = problem.y0.detach()
    solver = BatchSolver(problem, task.field, row_operations_for(y0, problem.tolerance), k0, keep_states)
    return Result(solver.run(y0.clone()), solver.record, solver.stats), [*solver.states, solver.y]


def _direct(task: Task) -> Result:
    problem = task.problem
    assert isinstance(problem, BatchProblem)
    k0 = first_slope_with_graph(task)
    _check_buffers(task.field)
    ops = row_operations_for(problem.y0.detach(), problem.tolerance, differentiable=True)
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
    backward = _BatchBackward(ForwardPass.of(task, first, solved))
    ys = with_graph(solved.ys, backward, states, task.problem.y0, [*first.params, *args], first.found)
    return Result(ys, solved.record, solved.stats)


_GRADIENTS: dict[str, Callable[[Task], Result]] = {"aca": _aca, "direct": _direct}


def _random_numbers_error() -> ArgumentValueError:
    return ArgumentValueError(
        'func draws random numbers, which gradient="aca" cannot draw again for samples that step by themselves; with '
        'option batch="independent" use gradient="direct".'
    )


def _check_buffers(field: VectorField) -> None:
    if field.moving_buffers:
        raise ArgumentValueError(
            "func changes buffers of its modules (batch normalisation in training mode?), which makes samples depend "
            'on one another; with option batch="independent" put it into evaluation mode, module.eval().'
        )


class _BatchBackward:
    """Back through the accepted steps, each replayed for the samples that took it."""

    def __init__(self, forward: ForwardPass) -> None:
        self._forward = forward

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        return _replay_backward(self._forward, grad_ys, states, inputs)

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        first, ends = _ends(_steps(self._forward), states)
        return _differentiable_backward(self._forward, grad_ys, first if y0 is None else y0, ends, inputs)


def _steps(forward: ForwardPass) -> Sequence[AcceptedRows]:
    assert isinstance(forward.record, BatchRecord)
    return forward.record.steps


def _check_for(forward: ForwardPass, y: Tensor, replay: Replay, *, restarts: bool) -> ReplayCheck:
    segments, n_steps, dtype = forward.task.problem.tolerance.segments, len(_steps(forward)), forward.autocast.dtype
    return ReplayCheck(y, segments, n_steps, dtype, replay.held, by_row=True, restarts=restarts)


class _Steps:
    """The accepted steps of a batch once more, with their graphs."""

    def __init__(self, task: Task, ops: RowOperations, replay: Replay) -> None:
        self._ops, self._replay = ops, replay
        tableau = task.problem.tableau
        self._whole = scheme_of(tableau, estimate_error=False)
        self._short = solution_only(self._whole)
        self._h = np.zeros(ops.n_rows)
        assert isinstance(task.problem, BatchProblem)
        self._t = task.problem.times_of_rows[:, -1].copy()  # of samples that do not step: any that they have met

    def take(self, s: AcceptedRows, y: Tensor) -> tuple[Trial, Tensor]:
        """The step and its step sizes, zero for the samples that did not take it."""
        t, t_next, h = self._t, self._t.copy(), self._h
        t[s.rows], t_next[s.rows], h[s.rows] = s.t, s.t_next, s.h
        scheme = self._whole if (s.outputs.theta != 1.0).any() else self._short
        steps = self._ops.steps(h.copy())
        self._replay.begin_step(None)
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
    steps = _Steps(task, ops, replay)
    check = _check_for(forward, y, replay, restarts=True)
    g = torch.zeros_like(y)  # cotangents of the samples' states at the ends of the steps still to come
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
    return g + grad_ys[0], *replay.grads


def _ends(steps: Sequence[AcceptedRows], states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The first state, and for each step the states of its rows at its end."""
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
    """create_graph=True: the accepted steps once more, all with their graph, so that the gradient has one too."""
    task = forward.task
    ops = row_operations_for(y0.detach(), task.problem.tolerance, differentiable=True)
    scheme = scheme_of(task.problem.tableau, estimate_error=False)
    gate = Gate()
    replay = forward.replay(inputs, gate.of, y0)
    steps = _Steps(task, ops, replay)
    start = y = gate.of(y0)
    everything = np.arange(len(y0))
    outputs = [(everything, np.zeros_like(everything), start)]
    check = _check_for(forward, y0.detach(), replay, restarts=False)
    expected = y0.detach()
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
    return [grad_y0, *replay.grads]
