"""engine="graph": the adaptive checkpoint adjoint with its step control on the GPU.

A trial step with its accept-or-reject decision is captured once as a CUDA graph, and so is the transpose of a step. A
solve launches them many times without reading results on the host. Checkpoints and replay are those of
``gradients.aca``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.base import Request, obstacle_but_to_eager, solve_with
from aca_ext.engines.cuda_graph.captures import Capturer, CudaCapturer
from aca_ext.engines.cuda_graph.control_block import SolveMemory
from aca_ext.engines.cuda_graph.operation_trace import TracedFunction, is_tracing
from aca_ext.engines.cuda_graph.plan import Plan
from aca_ext.engines.cuda_graph.plan_cache import layout_of, plans_of
from aca_ext.engines.eager import method_for
from aca_ext.errors import GraphError, NonFiniteError, ReplayError, StepLimitError, StepSizeError
from aca_ext.gradients.aca import differentiable_backward
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.dependencies import FirstEvaluation
from aca_ext.gradients.passes import ForwardPass, Gradients, with_graph
from aca_ext.kernels.fused import has_kernels
from aca_ext.kernels.operations import TorchOperations
from aca_ext.problem.problem import Problem
from aca_ext.solver.checkpoints import AcceptedStep, StepRecord, rows
from aca_ext.solver.failures import NO_TOLERANCE, failure_of
from aca_ext.solver.stats import Stats
from aca_ext.vector_field.field import AutocastState, VectorField

DEVICES = ("cuda",)
_HINT = 'Use engine="eager".'


class GraphEngine:
    error = GraphError

    def obstacle(self, request: Request) -> str | None:
        return obstacle_but_to_eager("graph", request) or _obstacle_to_captures(request.problem)

    def solve(self, request: Request) -> Result:
        """Solves by captured CUDA graphs; second derivatives come from the eager engine.

        Raises:
            GraphError: func cannot be captured.
            Those of ``solve_with``.
        """
        # With a single time there is no step to capture.
        method = _solve_task if len(request.problem.times) > 1 else method_for(request)
        return solve_with(method, request)


def _solve_task(task: Task) -> Result:
    problem, run = task.problem, _Run(task)
    inputs = [*run.params, *(x for x in problem.args if isinstance(x, Tensor) and x.requires_grad)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (problem.y0, *inputs)):
        ys = run.forward(keeps_states=True)
        ys = with_graph(ys, run, run.record.memory.hand_over_states(), problem.y0, inputs)
    else:
        ys = run.forward(keeps_states=False)
    return Result(ys, run.record, run.stats)


class _Run:
    """One solve: its first slope, its plan, its record, and its backward pass."""

    def __init__(self, task: Task) -> None:
        problem = task.problem
        plans, layout = plans_of(problem.func), layout_of(problem)
        likely, started = plans.started_early(problem, layout)
        self.autocast = AutocastState(problem.y0.device.type)
        traced = TracedFunction(problem.func, self.autocast.restored)
        field = VectorField(
            traced, problem.args, problem.packing, TorchOperations(problem.y0.detach(), problem.tolerance)
        )
        field.func = problem.func  # the walk over modules and held tensors needs func itself, not its wrapper
        field.take_notes_of(task.field)
        self.task, watched = task, replace(task, field=field)
        if torch.is_grad_enabled():
            first = FirstEvaluation(watched, is_traced=True)
            k0, params = first.k, [*first.params, *first.found]
        else:
            k0, params = watched.first_slope(problem.y0.detach()), []
        assert k0 is not None
        assert traced.trace is not None
        if field.draws_random_numbers or field.moving_buffers:
            what = "draws random numbers" if field.draws_random_numbers else "changes buffers of its modules"
            raise GraphError(f"func {what}, which a captured step cannot repeat. {_HINT}")
        self.problem, self.params, self._k0 = problem, params, k0.detach()
        self.stats = Stats(backend="graph")
        start = time.perf_counter()
        key = traced.trace.key(), tuple(p.data_ptr() for p in params), layout
        self.plan, is_new = plans.find(key, self._new_plan(traced))
        self._started: SolveMemory | None = started if self.plan is likely else None
        if is_new:
            self.stats.compile_seconds = time.perf_counter() - start
        self.record: _GraphRecord = _GraphRecord()

    def _new_plan(self, traced: TracedFunction) -> Callable[[], Plan]:
        problem, trace = self.problem, traced.trace
        assert trace is not None
        y0 = problem.y0.detach()

        def make() -> Plan:
            if traced.again(problem.start_time(y0), problem.packing.unpack(y0), *problem.args).key() != trace.key():
                raise GraphError(
                    "func does not do the same twice: each evaluation uses a new tensor or another number, so that a "
                    f"capture of it would be invalid at once. {_HINT}"
                )
            plan = Plan(problem, trace.held, capturer_for(self.problem.y0.device))
            with plan.in_order():
                plan.capture_forward(problem, self._k0, self.autocast)
            return plan

        return make

    def forward(self, *, keeps_states: bool) -> Tensor:
        problem, stats = self.problem, self.stats
        self._n_f_evals = 1 + (problem.controller is not None and problem.controller.first_step is None)
        with self.plan.in_order(), torch.no_grad():
            memory, self._started = self._started, None
            if memory is None or memory.keeps_states != keeps_states or not self.plan.has_in_hand(memory):
                memory = self.plan.start(problem, problem.y0.detach(), self._k0, keeps_states)
            self.plan.finish(problem, memory, self._look)
        stats.n_steps, stats.n_accepted = memory.n_steps, memory.n_accepted
        stats.n_rejected = stats.n_steps - stats.n_accepted
        stats.n_f_evals = self._evaluations(memory.n_steps)
        self.record.memory, self.record.times = memory, problem.times
        return memory.hand_over_outputs()

    def _evaluations(self, n_steps: int) -> int:
        return self._n_f_evals + n_steps * self.plan.n_evals_per_step

    def _look(self, control: Any) -> None:
        """Raises if the solve cannot continue; returns if a smaller step may help."""
        problem, t, h, ratio, status = self.problem, control.t, control.h, control.ratio, control.status
        message = None
        if status == "not_finite":
            culprit = self.plan.not_finite()
            if culprit is None and control.can_shrink:
                return
            if culprit is not None:
                message = f"{culprit} t={t:.17g}; look at func there."
            elif ratio == math.inf and problem.tolerance.forbids_error():
                status, message = "step_size", NO_TOLERANCE
        kinds = {"step_limit": StepLimitError, "step_size": StepSizeError, "not_finite": NonFiniteError}
        raise failure_of(
            problem,
            kinds[status],
            message,
            t=t,
            h=h if control.n_steps else math.nan,  # no trial step was made yet
            error_ratio=ratio,
            n_accepted=control.n_accepted,
            n_rejected=control.n_steps - control.n_accepted,
            n_f_evals=self._evaluations(control.n_steps),
        )

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        memory, plan, params = self.record.memory, self.plan, self.params
        environment = self.task.field.environment
        with plan.in_order(), nullcontext() if environment is None else environment.restored():
            blocks = memory.take_states(states)  # keeps copies alive until all launches are made
            end = blocks[-1][-1]
            if not plan.has_backward:
                plan.capture_backward(self.problem, memory, end, params, self.autocast)
            elif not plan.reads(params):
                raise ReplayError(
                    "The memory of a parameter was replaced between the forward and the backward pass, so a replay "
                    "would not repeat the forward pass. Replace it before the forward or after the backward pass."
                )
            self.stats.n_f_evals_backward = memory.n_accepted * plan.n_evals_per_transpose
            grad_y0, grads = plan.backward(memory, end, self.problem.args, memory.laid_out(grad_ys))
            return grad_y0, *grads

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        """Computes the gradients by the eager engine, over the same accepted steps."""
        memory = self.record.memory
        blocks = [memory.laid_out(block) for block in states]
        known = dict(enumerate(rows(blocks, memory.n_accepted + 1)))
        forward = ForwardPass(self.task, self.record, self.stats, self.autocast, len(self.params))
        return differentiable_backward(forward, grad_ys, known[0] if y0 is None else y0, known, inputs)


class _GraphRecord(StepRecord):
    """Record of the accepted steps of a solve on the device; reading it copies to the host."""

    events: tuple[()] = ()  # type: ignore[assignment]
    ended_by = None
    formulas = ()
    memory: SolveMemory
    times: tuple[float, ...]

    def __init__(self) -> None:
        self.end = None

    @property
    def steps(self) -> list[AcceptedStep]:  # type: ignore[override]
        entries = self._entries()
        ends: list[int] = entries[:, 3].contiguous().view(torch.int64).tolist()
        found, begin = list[AcceptedStep](), 1
        for (t, h, t_next, _), end in zip(entries.tolist(), ends, strict=True):
            times = self.times[begin:end]
            outputs = [(i, 1.0 if time == t_next else (time - t) / (t_next - t)) for i, time in enumerate(times, begin)]
            found.append(AcceptedStep(t, h, t_next, outputs))
            begin = end
        return found

    def bounds(self) -> Tensor:
        return self._entries()[:, 0:3:2].contiguous()

    def _entries(self) -> Tensor:
        return self.memory.steps[: self.memory.n_accepted].cpu()


def capturer_for(device: torch.device) -> Capturer:
    return CudaCapturer(device)


def _obstacle_to_captures(problem: Problem) -> str | None:
    """Reason why the problem cannot be captured, such as its device, tolerance or context; None if it can."""
    y0, tolerance = problem.y0, problem.tolerance
    if len(problem.times) == 1:
        return None
    if y0.device.type not in DEVICES:
        return f'engine="graph" takes states on a CUDA device; y0 is on {y0.device}. Use engine="compiled" or "eager".'
    if not has_kernels(y0.detach()):
        return (
            'engine="graph" takes plain tensors of float32, float64, complex64 or complex128, and a build with CUDA; '
            f"y0 is a {type(y0).__name__} of {y0.dtype}. {_HINT}"
        )
    if is_tracing():
        return f'A solve with engine="graph" cannot be part of the func of another such solve. {_HINT}'
    if y0.is_cuda and torch.cuda.is_current_stream_capturing():
        return f'A solve with engine="graph" cannot be part of another capture. {_HINT}'
    if tolerance.norm is not None or isinstance(tolerance.rtol, Tensor) or isinstance(tolerance.atol, Tensor):
        return f'engine="graph" takes rtol and atol as numbers, and no option norm. {_HINT}'
    if problem.jumps:
        return f'engine="graph" does not support option jump_t. {_HINT}'
    return None
