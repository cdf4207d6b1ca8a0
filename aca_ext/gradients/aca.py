"""The adaptive checkpoint adjoint (Zhuang et al., ICML 2020): replay every accepted step and transpose it.

The forward pass records no autograd graph. It keeps a checkpoint (t, h, y) of every accepted step. The backward pass
goes through the steps from last to first: it replays a step from its checkpoint, pulls the cotangent back through it
and drops its graph. The gradient is that of the discrete solution with its step sizes held constant.

Memory: the autograd graph of one step and N_t + 1 states. With ``checkpoints=`` the solve keeps fewer states, and the
backward pass recomputes each missing one, bit for bit, from the last kept state before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.dependencies import FirstEvaluation
from aca_ext.gradients.passes import ForwardPass, Gradients, with_graph
from aca_ext.gradients.replayed_steps import repeated_steps, replayed_steps
from aca_ext.kernels.fused import TorchOperations, empty_rows, operations_for, rows_like
from aca_ext.kernels.layout import stack_rows
from aca_ext.kernels.pool import pool_for
from aca_ext.numerics.adams import Adams
from aca_ext.solver.checkpoints import AcceptedStep, Checkpoints, StepRecord, checkpoints_for, rows
from aca_ext.solver.loop import Solver
from aca_ext.solver.one_step import slope_at_end
from aca_ext.solver.reversed_states import brought_to, distances, reversed_states
from aca_ext.solver.runge_kutta import Coefficients, interpolate, stage_times
from aca_ext.solver.slope_checkpoints import SlopeCheckpoints
from aca_ext.vector_field.replay import Replay
from aca_ext.vector_field.replay_check import ReplayCheck, ReplayedStep


def solve(task: Task) -> Result:
    first = FirstEvaluation(task)
    args = [arg for arg in task.field.args if isinstance(arg, Tensor) and arg.requires_grad]
    if not first.needs_graph(args):
        return solve_without_graph(task, first.k)
    checkpoints = _checkpoints_of(task)
    with first.watch():
        solved = solve_without_graph(task, first.k, checkpoints)
    first.settle()
    backward = _EagerBackward(ForwardPass.of(task, first, solved), checkpoints)
    used = [*first.params, *args]
    ys = with_graph(solved.ys, backward, checkpoints.blocks, task.problem.y0, used, first.found)
    return Result(ys, solved.record, solved.stats)


def _checkpoints_of(task: Task) -> Checkpoints | SlopeCheckpoints:
    y0, method = task.problem.y0.detach(), task.problem.tableau
    if isinstance(method, Adams):
        return SlopeCheckpoints(task.checkpoints, y0, method.max_order - 1)
    return checkpoints_for(task.checkpoints, y0)


def solve_without_graph(
    task: Task, k0: Tensor | None, checkpoints: Checkpoints | SlopeCheckpoints | None = None
) -> Result:
    """Solves without an autograd graph; ``checkpoints`` receives the states for a backward pass."""
    problem = task.problem
    y0 = problem.y0.detach()
    if checkpoints is None and task.keeps_ends:
        checkpoints = Checkpoints(y0)
    with torch.no_grad(), pool_for(problem.settings).lend(y0, problem.tolerance) as ops:
        ys = empty_rows(len(problem.times) + problem.may_stop, y0)
        solver = Solver(problem, task.field, ops, k0=k0, rows=ys.unbind(0), checkpoints=checkpoints)
        outputs = solver.run(y0)
        if problem.events:
            ys = stack_rows(outputs, y0)
        elif problem.may_stop:
            ys = ys[: len(outputs)].clone()
        if task.keeps_ends:
            assert isinstance(checkpoints, Checkpoints)
            ys = _with_ends(ys, solver.record, checkpoints)
    return Result(ys, solver.record, solver.stats)


def _with_ends(ys: Tensor, record: StepRecord, checkpoints: Checkpoints) -> Tensor:
    """The outputs and then the ends of all steps, which the record now lists as outputs of their steps."""
    n = len(ys)
    record.steps = [s._replace(outputs=[*s.outputs, (n + i, 1.0)]) for i, s in enumerate(record.steps)]
    _, *ends = rows(checkpoints.blocks, checkpoints.count)
    all_rows = empty_rows(n + len(ends), ys[0])
    for row, state in zip(all_rows.unbind(0), (*ys.unbind(0), *ends), strict=True):
        row.copy_(state)
    return all_rows


class _EagerBackward:
    """Backward pass that replays each accepted step from its checkpoint."""

    def __init__(self, forward: ForwardPass, checkpoints: Checkpoints | SlopeCheckpoints) -> None:
        self._forward = forward
        self._width = checkpoints.width if isinstance(checkpoints, SlopeCheckpoints) else None
        self._numbers, self._capacity = checkpoints.numbers(), checkpoints.capacity

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        held, steps = self._held(states), _steps(self._forward)
        if math.isfinite(self._capacity):
            # This pass overwrites the states between the ends, so a second pass (retain_graph) must not read them.
            ends = 0, len(steps)
            self._numbers = [n if n in ends else -1 for n in self._numbers]
        problem = self._forward.task.problem
        with pool_for(problem.settings).lend(problem.y0.detach(), problem.tolerance) as ops:
            return _replay_backward(self._forward, ops, self._capacity, grad_ys, held, self._width, inputs)

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        known = {n: row if self._width is None else row[0] for n, row in self._held(states)}
        start = known[0].to(grad_ys.device) if y0 is None else y0
        return differentiable_backward(self._forward, grad_ys, start, known, inputs)

    def _held(self, blocks: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The kept states, each with its number."""
        like = self._forward.task.problem.y0.detach()
        if self._width is not None:
            like = empty_rows(self._width, like)
        # The backward pass overwrites rows of these saved tensors. .data keeps autograd from calling that an error.
        laid_out = [rows_like(like, block.data) for block in blocks]
        return list(zip(self._numbers, rows(laid_out, len(self._numbers)), strict=True))


def _steps(forward: ForwardPass) -> Sequence[AcceptedStep]:
    return _record(forward).steps


def _record(forward: ForwardPass) -> StepRecord:
    assert isinstance(forward.record, StepRecord)
    return forward.record


def _replay_backward(
    forward: ForwardPass,
    ops: TorchOperations,
    capacity: float,
    grad_ys: Tensor,
    held: Sequence[tuple[int, Tensor]],
    width: int | None,
    inputs: Sequence[Tensor],
) -> Gradients:
    problem, steps = forward.task.problem, _steps(forward)
    y0 = problem.y0.detach()
    replay = forward.replay(inputs)
    replayed = replayed_steps(problem, _record(forward), replay, ops, held, width)
    segments = problem.tolerance.segments
    check = ReplayCheck(y0, segments, len(steps), forward.autocast.dtype, replay.held)
    distance = distances([n for n, _ in held]) if math.isfinite(capacity) else {}
    g: Tensor | None = None  # cotangent of the state at the end of the step
    with replay.repeating():
        for n, row, row_next in brought_to(y0.device, reversed_states(held, len(steps), capacity, replayed.advance)):
            s: AcceptedStep = steps[n]
            scheme = replayed.scheme(n)
            outputs: list[tuple[Sequence[float], Tensor]] = [] if g is None else [(scheme.solution, g)]
            outputs += [(_weights(scheme, theta), ops.admit(grad_ys[i])) for i, theta in s.outputs]
            replay.begin_step(n, s.random_states)
            if outputs:
                assert row_next is not None
                y, y_next = replayed.state(row), replayed.state(row_next)
                compare = partial(check.compare, ReplayedStep(n, s.t, s.h, distance.get(n + 1, 1)), y, y_next)
                g = replayed.pull_back(n, row, outputs, compare, y_next)
        check.finish()
        forward.stats.n_f_evals_backward = replay.n_evals
        if g is not None:
            replay.begin_step(0, steps[0].random_states)
            replay.check_end(forward.leaves, problem.start_time(y0), y0)
    grad_y0 = grad_ys[0] if g is None else g + grad_ys[0]
    return grad_y0, *replay.grads


def _weights(scheme: Coefficients, theta: float) -> Sequence[float]:
    return scheme.solution if theta == 1.0 else scheme.tableau.dense_weights(theta)


def differentiable_backward(
    forward: ForwardPass, grad_ys: Tensor, y0: Tensor, states: Mapping[int, Tensor], inputs: Sequence[Tensor]
) -> Gradients:
    """The gradients with an autograd graph (create_graph=True): repeats all accepted steps in one graph.

    ``states`` maps numbers to the states that the forward pass kept; the repeated states are compared with them.
    """
    problem, steps = forward.task.problem, _steps(forward)
    ops = operations_for(y0.detach(), problem.tolerance, differentiable=True)
    gate = Gate()
    replay = forward.replay(inputs, gate.of, y0)
    method_of_step = repeated_steps(problem, _record(forward), replay, ops)
    start = gate.of(y0)
    y, outputs = start, {0: start}
    segments, dtype = problem.tolerance.segments, forward.autocast.dtype
    check = ReplayCheck(y0.detach(), segments, len(steps), dtype, replay.held, restarts=False)
    distance, k_before = distances([0, *(n for n in states if n > 0)]), None
    with replay.repeating():
        for n, s in enumerate(steps):
            replay.begin_step(n, s.random_states)
            made = method_of_step(n)
            times = stage_times(made.scheme, s.t, s.h, s.t_next, problem.jumps, y0.dtype)
            y_next = states[n + 1].to(y0.device) if n + 1 in states else None
            trial = made.repeat(times, y, s.h, k_before, y_next)
            is_reused = replay.field.reuses_slopes and s.t_next not in problem.jumps
            k_before = slope_at_end(made.scheme, trial) if is_reused else None
            end = trial.y1
            if y_next is not None:
                compare = partial(check.compare, ReplayedStep(n, s.t, s.h, distance[n + 1]), y, y_next)
                end = made.repeated_end(compare, y, y_next, trial)
            for i, theta in s.outputs:
                inside = theta != 1.0
                outputs[i] = interpolate(ops, made.scheme.tableau, y, s.h, trial.k, theta) if inside else end
            y = end
    check.finish()
    ys = stack_rows([outputs[i] for i in sorted(outputs)], y0)
    grad_y0 = transposed(ys, grad_ys, start, replay, gate)
    forward.stats.n_f_evals_backward = replay.n_evals
    if steps:
        with replay.repeating():
            replay.begin_step(0, steps[0].random_states)
            replay.check_end(forward.leaves, problem.start_time(y0), y0)
    return grad_y0, *replay.grads


def transposed(ys: Tensor, grad_ys: Tensor, start: Tensor, replay: Replay, gate: Gate) -> Tensor | None:
    """The gradient of ``start`` from the graph of the outputs; those of the inputs become the replay's ``grads``."""
    wanted = [*(x for x in (start, *replay.inputs) if x.requires_grad), *(p for _, p in replay.origins)]
    replay.check_all(ys, start)
    with gate.closed():
        found = iter(torch.autograd.grad(ys, wanted, grad_ys, create_graph=True, allow_unused=True))
    grad_start, *grads = [next(found) if x.requires_grad else None for x in (start, *replay.inputs)]
    replay.grads = replay.with_origins([*grads, *found])
    return grad_start


class Gate:
    """Adds a tensor to an autograd graph; while the gate is closed, no gradient flows into the tensor's history.

    The history of one input may contain another input. Autograd outside this solve adds the gradient that flows from
    one to the other, so adding it here would count it twice. The graph of a gradient still includes the history.
    """

    def __init__(self) -> None:
        self.is_open = True

    def of(self, x: Tensor) -> Tensor:
        return _Gated.apply(x, self) if x.requires_grad else x

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.is_open = False
        try:
            yield
        finally:
            self.is_open = True


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.set_materialize_grads(False)  # zeros would start the backward passes of the solves that computed x
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        return g if ctx.gate.is_open else None, None
