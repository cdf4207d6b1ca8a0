"""``Plan``: a step and its transpose, captured for one func and one layout, and the solves that launch them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.cuda_graph.captures import Capturer, Program, Repeat
from aca_ext.engines.cuda_graph.control_block import ControlBlock, ControlledKernels, DeviceTimes, SolveMemory
from aca_ext.errors import GraphError
from aca_ext.kernels.layout import empty_rows
from aca_ext.kernels.operations import TorchOperations
from aca_ext.problem.problem import Problem
from aca_ext.solver.runge_kutta import scheme_of, step, step_vjp
from aca_ext.vector_field.field import AutocastState, VectorField
from aca_ext.vector_field.replay import Replay
from aca_ext.vector_field.replay_check import CapturedCheck

_FIRST_STATES = 64  # room for states in a first solve, within the bytes below
_FIRST_BYTES = 1 << 26
_FIRST_STEPS = 16  # steps that a first solve launches before it reads the control block
_SMALL = 1 << 20  # bytes of a state up to which tracing func takes longer than evaluating it
_NEAR = 5e-2  # bfloat16 sums in another order differ by 1 %; operations missing in a capture cause larger differences

# Called with the control block if only the host can decide; it returns to continue the solve, or raises.
Look = Callable[[Any], None]


class Plan:
    """The captured programs of one func, with their memory.

    Attributes:
        held: tensors that func held at the capture, whose memory the programs read.
        args: the plan's own copies of func's tensor args, into which each solve copies its args; None for other args.
        n_evals_per_step, n_evals_per_transpose: evaluations of func in a trial step, and in a transposed step.
    """

    def __init__(self, problem: Problem, held: Sequence[Tensor], capturer: Capturer) -> None:
        self._like = like = torch.empty_like(problem.y0.detach())
        self._scheme = scheme_of(problem.tableau, problem.adaptive)
        self._tolerance, self._capturer, self._lock = problem.tolerance, capturer, threading.RLock()
        self._block = ControlBlock(like, self._scheme, problem.tolerance)
        self._y, self._y1, self._k_first = (torch.empty_like(like) for _ in range(3))
        self._g = torch.empty_like(like)
        self._has_inside = problem.adaptive and len(problem.times) > 2
        self._inside: tuple[Tensor, list[Tensor]] | None = None
        self._end = torch.empty_like(like)  # end of the step to transpose, as the forward pass computed it
        self._replayed: CapturedCheck | None = None
        self._grads: list[Tensor | None] = []
        self._param_addresses: list[int] = []
        self._probe: list[Tensor] = []
        self._times: DeviceTimes | None = None  # times of the last solve; the next solve often has the same
        self._n_states = max(2, min(_FIRST_STATES, _FIRST_BYTES // max(1, like.numel() * like.element_size())))
        self._n_steps = _FIRST_STEPS
        self._keeps_states = False
        self._turn = 0
        self._slope: Program | None = None
        self._solve: Repeat | None = None
        self._go_on: Repeat | None = None
        self._transpose: Repeat | None = None
        self.held = [x.detach() for x in held]
        self._held_addresses = [x.data_ptr() for x in held]
        self.args = tuple(x.detach().clone() if isinstance(x, Tensor) else None for x in problem.args)
        self.n_evals_per_step = len(self._scheme.c) - self._scheme.fsal
        last = max(i for i, w in enumerate(self._scheme.solution) if w != 0)
        self.n_evals_per_transpose = len(self._scheme.c) if self._has_inside else 1 + last

    def capture_forward(self, problem: Problem, k0: Tensor, autocast: AutocastState) -> None:
        """Captures the rule for the first step size, a trial step, and for small states also the first slope.

        Raises:
            GraphError: func cannot be captured.
        """
        field, y0 = self._field(problem), problem.y0.detach()
        memory = self._memory(problem, keeps_states=True)

        def under_conditions(body: Callable[[], None]) -> Callable[[], None]:
            def call() -> None:
                with torch.no_grad(), autocast.restored():
                    body()

            return call

        def slope() -> Callable[[], None]:
            ops = ControlledKernels(self._block, self._tolerance)
            return under_conditions(lambda: self._find_slope(field, ops))

        def first() -> Callable[[], None]:
            ops = ControlledKernels(self._block, self._tolerance)
            return under_conditions(lambda: self._find_first_step(field, ops, problem))

        def trial() -> Callable[[], None]:
            ops = ControlledKernels(self._block, self._tolerance)
            return under_conditions(lambda: self._try(field, ops))

        def reset_trial(y: Tensor = y0, k: Tensor = k0) -> None:
            self._begin(problem, memory, y, k, first_step=0.05 * problem.length)
            self._block.decide("first")

        finding_first = self._capturer.capture(first, lambda: self._begin(problem, memory, y0, k0))
        trying = self._capturer.capture(trial, reset_trial)
        with torch.no_grad(), autocast.restored():
            other = y0 * 1.25 + 0.5
            k = field(problem.start_time(other), other).clone()
        self._check(trying, trial(), lambda: reset_trial(other, k))
        if y0.numel() * y0.element_size() <= _SMALL:
            self._slope = self._capturer.capture(slope, lambda: self._begin(problem, memory, y0, k0))
        self._solve = self._capturer.repeat(finding_first, trying, self._block)
        self._go_on = self._capturer.repeat(None, trying, self._block)

    def _find_slope(self, field: VectorField, ops: ControlledKernels) -> None:
        ops.decide("start")
        self._k_first.copy_(field(self._block.stage_times[0], self._y))

    def _find_first_step(self, field: VectorField, ops: ControlledKernels, problem: Problem) -> None:
        block, y, k = self._block, self._y, self._k_first
        if problem.controller is not None and problem.controller.first_step is None:
            ops.write_norm(k, None, block.minus_one, y, y)
            ops.write_norm(y, None, block.minus_one, y, y, which=1)
            ops.decide("euler")
            euler = ops.weighted_sum(y, block.h, [k], (1.0,), self._y1)
            ops.write_norm(field(block.stage_times[0], euler), k, block.minus_one, y, y)
        ops.decide("first")

    def _try(self, field: VectorField, ops: ControlledKernels) -> None:
        """Makes a trial step, decides about it, and writes its results if it is accepted."""
        scheme, block, y = self._scheme, self._block, self._y
        trial = step(field, ops, scheme, (), y, block.h, self._k_first if scheme.fsal else None, self._y1)
        if trial.partial_error is not None:
            k_last = trial.k[-1] if scheme.error_last != 0 else None
            ops.write_norm(trial.partial_error, k_last, block.slope_weight, y, trial.y1)
        ops.decide("next")
        ops.finish(y, trial.k, trial.y1, self._k_first if scheme.fsal else None)
        self._probe = [*trial.k[1:], trial.y1]

    def can_start_early(self) -> bool:
        """Tells whether ``start`` can compute the first slope and the tensors held by func have their old addresses."""
        return self._slope is not None and self._held_addresses == [x.data_ptr() for x in self.held]

    def start(
        self, problem: Problem, y0: Tensor, k0: Tensor | None = None, keeps_states: bool | None = None
    ) -> SolveMemory:
        """Launches as many steps as the last solve made, without waiting for them.

        Args:
            k0: f(t0, y0); None to compute it on the device.
            keeps_states: True to keep the states for a backward pass; None for the choice of the last solve.
        """
        assert self._solve is not None
        if keeps_states is not None:
            self._keeps_states = keeps_states
        self._take(problem.args)
        memory = self._memory(problem, keeps_states=self._keeps_states)
        self._begin(problem, memory, y0, k0)
        self._solve(self._n_steps if problem.grid is None else len(problem.grid) - 1)
        return memory

    def has_in_hand(self, memory: SolveMemory) -> bool:
        """Tells whether no other solve has used the plan since this one started."""
        return self._turn == memory.turn

    def finish(self, problem: Problem, memory: SolveMemory, look: Look) -> None:
        """Waits for a solve that was started, and launches further steps until it ends.

        ``look`` is called with the control block if only the host can decide how to continue. ``memory.control``
        receives the final control block.
        """
        assert self._go_on is not None
        if problem.grid is not None:  # every step is known
            memory.n_accepted = memory.n_steps = len(problem.grid) - 1
            return
        while True:
            control = memory.control = self._block.read()
            if control.status == "done":
                break
            if control.status == "no_room":
                memory.grow(control)
                self._block.write(control)
                self._block.decide("resume")
            elif control.status != "running":
                look(control)
                self._block.decide("resume")
            self._go_on(max(4, control.n_steps // 4))
        memory.n_accepted, memory.n_steps = control.n_accepted, control.n_steps
        self._n_steps, self._n_states = control.n_steps, control.n_accepted + 2

    def _take(self, args: Sequence[Any]) -> None:
        """Copies args into the memory from which the programs read them."""
        for mine, given in zip(self.args, args, strict=True):
            if mine is not None:
                mine.copy_(given.detach())

    def _memory(self, problem: Problem, *, keeps_states: bool) -> SolveMemory:
        n_states = self._n_states if problem.grid is None else len(problem.grid) + 1
        stops = problem.step_ends
        if self._times is None or self._times.of != (problem.times, stops):
            self._times = DeviceTimes(problem.times, stops, self._like.device)
        return SolveMemory(
            self._times, self._like, keeps_states=keeps_states, n_states=n_states, has_weights=self._has_inside
        )

    def _begin(
        self, problem: Problem, memory: SolveMemory, y0: Tensor, k0: Tensor | None, first_step: float | None = None
    ) -> None:
        self._turn += 1
        memory.turn = self._turn
        control = memory.control = self._block.control(problem, memory, self._tolerance)
        if first_step is not None:
            control.set_first_step(first_step)
        memory.room_in(control)
        for to in (self._y, memory.ys[0], *(block[0] for block in memory.blocks[:1])):
            to.copy_(y0)
        self._block.write(control)
        if k0 is not None:
            self._k_first.copy_(k0)
        else:
            assert self._slope is not None
            self._slope.launch()

    def capture_backward(
        self,
        problem: Problem,
        memory: SolveMemory,
        end: Tensor,
        params: Sequence[Tensor],
        autocast: AutocastState,
    ) -> None:
        """Captures the transpose of a step, with the gradients of ``params`` and of args that require grad.

        ``end`` is the last state of the solve.

        Raises:
            GraphError: func's backward pass cannot be captured.
        """
        field = self._field(problem)
        args = [x for x, given in zip(field.args, problem.args, strict=True) if _requires_grad(given)]
        for arg in args:
            arg.requires_grad_()
        if self._has_inside:
            self._inside = torch.empty_like(self._like), [torch.empty_like(self._like) for _ in self._scheme.c]
        self._param_addresses = [p.data_ptr() for p in params]
        segments, n_slopes = self._tolerance.segments, self.n_evals_per_transpose
        self._replayed = CapturedCheck(self._like, segments, n_slopes, autocast.dtype, self.held)
        grad_ys = empty_rows(len(problem.times), self._like).fill_(1.0)

        def reset() -> None:
            self._begin_backward(memory, end, grad_ys)

        def transpose() -> Callable[[], None]:
            ops = ControlledKernels(self._block, self._tolerance)
            replay = Replay(field, params, args, autocast, cuts_all=True)
            replay.grads = list(self._grads)
            return lambda: self._transpose_step(replay, ops)

        reset()
        once = Replay(field, params, args, autocast, cuts_all=True)
        self._transpose_step(once, ControlledKernels(self._block, self._tolerance))
        self._grads = [None if grad is None else torch.zeros_like(grad) for grad in once.grads]
        transposing = self._capturer.capture(transpose, reset)
        grad_ys.mul_(-0.5)
        self._check(transposing, transpose(), reset)
        self._transpose = self._capturer.repeat(None, transposing, self._block)
        for arg in args:
            arg.requires_grad_(False)

    def _transpose_step(self, replay: Replay, ops: ControlledKernels) -> None:
        scheme, block, y, g = self._scheme, self._block, self._y, self._g
        assert self._replayed is not None
        self._end.copy_(y)
        ops.decide("transpose")
        ops.restore(y, g, self._inside)
        compare = partial(self._replayed.add, block.h, y, self._end)
        with replay.repeating():
            step_vjp(replay, ops, scheme, (), y, block.h, [(scheme.solution, g)], compare, inside=self._inside, out=g)
        self._probe = [g, *(grad for grad in self._grads if grad is not None)]

    def backward(
        self, memory: SolveMemory, end: Tensor, args: Sequence[Any], grad_ys: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Computes the cotangents of y0 and of the params and args for which the backward pass was captured.

        A cotangent is None if func does not depend on that tensor. ``end`` is the last state of the solve.

        Raises:
            ReplayError: the replayed steps differ from those of the forward pass.
        """
        assert self._transpose is not None
        assert self._replayed is not None
        self._take(args)
        self._begin_backward(memory, end, grad_ys)
        self._transpose(memory.n_accepted)
        found = self._g + grad_ys[0], [None if grad is None else grad.clone() for grad in self._grads]
        self._replayed.finish()
        return found

    @property
    def has_backward(self) -> bool:
        return self._transpose is not None

    def reads(self, params: Sequence[Tensor]) -> bool:
        """Tells whether these tensors have the addresses with which the backward pass was captured."""
        return self._param_addresses == [p.data_ptr() for p in params]

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Context of every use of the plan, since one solve at a time may use its memory."""
        with self._lock, self._capturer.in_order():
            yield

    def not_finite(self) -> str | None:
        """Names the tensor that is NaN or infinite at the current step; None if both are finite."""
        if not bool(torch.isfinite(self._y).all()):
            return "the state is NaN or infinite at"
        return None if bool(torch.isfinite(self._k_first).all()) else "func returned NaN or infinity at"

    def _begin_backward(self, memory: SolveMemory, end: Tensor, grad_ys: Tensor) -> None:
        assert self._replayed is not None
        self._turn += 1
        self._replayed.begin()
        self._y.copy_(end)
        control = memory.control
        control.grad_outputs, control.step = grad_ys.data_ptr(), memory.n_accepted
        self._block.write(control)
        self._g.zero_()
        for grad in self._grads:
            if grad is not None:
                grad.zero_()

    def _field(self, problem: Problem) -> VectorField:
        args = [given if mine is None else mine for mine, given in zip(self.args, problem.args, strict=True)]
        return VectorField(problem.func, args, problem.packing, TorchOperations(self._like, self._tolerance))

    def _check(self, program: Program, body: Callable[[], None], reset: Callable[[], None]) -> None:
        """Raises GraphError if program and body give different results for an input that was not captured."""
        reset()
        program.launch()
        found = [x.clone() for x in self._probe]
        reset()
        body()
        expected, self._probe = self._probe, []
        for one, other in zip(found, expected, strict=True):
            size = other.abs().nan_to_num(0.0, 0.0, 0.0).max() if other.numel() else 0.0
            if not torch.allclose(one, other, rtol=_NEAR, atol=_NEAR * float(size), equal_nan=True):
                raise GraphError(
                    "The result of a captured step differs from that of func: func works on a stream of its own, "
                    'outside PyTorch, or differently each time. Use engine="eager", or change func.'
                )


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
