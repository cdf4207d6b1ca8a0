"""engine="compiled": the adaptive checkpoint adjoint with every step, and every transposed step, one compiled program.

The loop over the steps is compiled too (csrc/compiled/loop.h). What is stored, and which steps are replayed, is as in
``gradients.aca``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.compiled.inductor import Program, Traced, compile_programs
from aca_ext.engines.compiled.step_graphs import Layout, slope_graph, step_graph, transpose_graph
from aca_ext.engines.compiled.tracing import Captured, capture
from aca_ext.errors import AcaError, CompileError, NonFiniteError, StepLimitError, StepSizeError
from aca_ext.gradients.aca import differentiable_backward
from aca_ext.gradients.base import Result, Task
from aca_ext.kernels.fused import KernelOperations, compiled_loop, operations_for
from aca_ext.problem.admission import check_readable, looks_readable
from aca_ext.problem.problem import Problem
from aca_ext.solver.checkpoints import AcceptedStep, Blocks, StepRecord
from aca_ext.solver.failures import NO_TOLERANCE, failure_of
from aca_ext.solver.loop import Stats
from aca_ext.solver.runge_kutta import scheme_of
from aca_ext.vector_field.field import AutocastState

_ZEROS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
_OLDEST_TORCH = (2, 13)
_MAX_SPECIFICATIONS = 16  # of one plan; beyond, the oldest is made anew


def solve(problem: Problem, params: Sequence[Tensor] | None, task: Callable[[], Task]) -> Result:
    """Solves ``problem`` with gradient="aca" by compiled programs; ``task`` is for what the eager engine does better.

    Raises:
        CompileError: func cannot be compiled, or this kind of solve is not supported.
    """
    run = _Run(problem, params, task)
    if torch.is_grad_enabled() and (problem.y0.requires_grad or True in run.wants_gradient):
        ys = _CompiledAca.apply(run, problem.y0, *run.inputs)
    else:
        ys = run.forward(None)
    return Result(ys, run.record, run.stats)


class _Plan:
    """The programs for one graph of func and one layout, compiled when they are first needed."""

    def __init__(self, captured: Captured, layout: Layout) -> None:
        self._captured, self._layout = captured, layout
        self._programs: dict[str, list[Program]] = {}

    def forward(self, stats: Stats) -> tuple[Program, Program]:
        """For the first slope, and for a step."""
        captured, layout = self._captured, self._layout
        slope, step = self._compiled(
            "forward", stats, lambda: (slope_graph(captured, layout), step_graph(captured, layout))
        )
        return slope, step

    def transpose(self, stats: Stats, *, inside: bool) -> Program:
        """For a step transposed, with or without outputs inside it."""
        name = "inside" if inside else "end only"
        return self._compiled(name, stats, lambda: (transpose_graph(self._captured, self._layout, inside=inside),))[0]

    def _compiled(self, name: str, stats: Stats, trace: Callable[[], tuple[Traced, ...]]) -> list[Program]:
        if name not in self._programs:
            start = time.perf_counter()
            try:
                self._programs[name] = compile_programs(*trace())
            except AcaError:
                raise
            except Exception as error:
                raise CompileError(
                    f'torch\'s compiler failed on func. Use engine="eager". It says: {type(error).__name__}: {error}'
                ) from error
            stats.compile_seconds += time.perf_counter() - start
        return self._programs[name]


class _Specification:
    """What one solve and the next share beyond the programs: times, tolerances, step control, and sizes."""

    def __init__(self, problem: Problem, plan: _Plan, stats: Stats) -> None:
        self._plan, y0 = plan, problem.y0.detach()
        ops = operations_for(y0, problem.tolerance)
        assert isinstance(ops, KernelOperations)
        self._ops = ops  # holds the tolerances of each element
        self.loop = ops.compiled_specification(problem, *plan.forward(stats))
        self.forward_bytes = self.loop.forward_bytes
        self.rows_shape, self.rows_stride = (len(problem.times), *y0.shape), (y0.numel(), *y0.stride())
        # Each step is replayed up to the last stage that an output needs.
        solution = scheme_of(problem.tableau, problem.adaptive).solution
        self._evals = 1 + max(i for i, w in enumerate(solution) if w != 0), len(solution)
        self._backward: dict[tuple[bool, bool], tuple[Program | None, Program | None, int]] = {}

    def backward(self, stats: Stats, n_end_only: int, n_inside: int) -> tuple[Program | None, Program | None, int]:
        """Programs for so many steps without and with outputs inside, and the bytes that they need."""
        key = n_end_only > 0, n_inside > 0
        if key not in self._backward:
            end_only = self._plan.transpose(stats, inside=False) if key[0] else None
            inside = self._plan.transpose(stats, inside=True) if key[1] else None
            self._backward[key] = end_only, inside, self.loop.backward_bytes(end_only, inside)
        stats.n_f_evals_backward = n_end_only * self._evals[0] + n_inside * self._evals[1]
        return self._backward[key]


class _Run:
    """One solve: its programs, its tensors, its loop."""

    def __init__(self, problem: Problem, params: Sequence[Tensor] | None, task: Callable[[], Task]) -> None:
        _check_supported(problem)
        self.problem, self.task = problem, task
        self.stats = Stats(backend="compiled")
        self.y0 = problem.y0.detach()
        self.specification = self._find(params)
        self.loop = compiled_loop(self.specification.loop)
        self.record = _LoopRecord(self.loop)

    def _find(self, params: Sequence[Tensor] | None) -> _Specification:
        problem, y0 = self.problem, self.y0
        start = time.perf_counter()
        try:
            captured, inputs = capture(problem.func, _ZEROS[y0.dtype], y0, problem.packing, problem.args)
        except CompileError:
            self.task().first_slope(y0)  # where func itself is at fault, its own error says more
            raise
        self.inputs = inputs
        if params is not None:
            named = {id(x) for x in (*params, *problem.args)}
            self.inputs = [x if id(x) in named else x.detach() for x in inputs]
        self.wants_gradient = captured.wants_gradient
        found: _Specification | None = captured.solves.get(problem.settings)
        if found is None:
            if len(captured.solves) >= _MAX_SPECIFICATIONS:
                del captured.solves[next(iter(captured.solves))]
            plan = self._plan(captured)
            self.stats.compile_seconds += time.perf_counter() - start
            found = captured.solves[problem.settings] = _Specification(problem, plan, self.stats)
        return found

    def _plan(self, captured: Captured) -> _Plan:
        problem, tolerance, y0 = self.problem, self.problem.tolerance, self.y0
        each = isinstance(tolerance.rtol, Tensor) or isinstance(tolerance.atol, Tensor)
        key = problem.tableau, problem.adaptive, problem.packing, y0.stride(), each, torch.get_num_threads()
        plan = captured.plans.get(key)
        if plan is None:
            self.task().first_slope(y0)  # checks what func returns
            layout = Layout(y0, problem.packing, scheme_of(problem.tableau, problem.adaptive), tolerance)
            plan = captured.plans[key] = _Plan(captured, layout)
        return plan

    def forward(self, checkpoints: Blocks | None) -> Tensor:
        specification, loop, stats, y0 = self.specification, self.loop, self.stats, self.y0
        ys = torch.empty_strided(specification.rows_shape, specification.rows_stride, dtype=y0.dtype, device="cpu")
        memory = torch.empty(specification.forward_bytes, dtype=torch.uint8, device="cpu")
        outcome = loop.solve(
            memory.data_ptr(),
            [x.data_ptr() for x in self.inputs],
            y0.data_ptr(),
            ys.data_ptr(),
            None if checkpoints is None else checkpoints.add,
        )
        stats.n_steps, stats.n_accepted, stats.n_rejected = loop.n_steps, loop.n_accepted, loop.n_rejected
        stats.n_f_evals = loop.n_f_evals
        if outcome != 0:
            self._fail(outcome)
        return ys

    def _fail(self, outcome: int) -> None:
        loop = self.loop
        kind = (StepLimitError, StepSizeError, NonFiniteError, NonFiniteError)[outcome - 1]
        message = None
        if not self.problem.adaptive:
            message = (
                "the solution on the fixed grid is NaN or infinite at its end. Use smaller steps, or look at func."
            )
        elif loop.error_ratio == math.inf and self.problem.tolerance.forbids_error():
            kind, message = StepSizeError, NO_TOLERANCE
        elif outcome == 4:
            message = f"func returned NaN or infinity at t={loop.t:.17g}, or the state is so there; look at func there."
        raise failure_of(
            self.problem,
            kind,
            message,
            t=loop.t,
            h=loop.h,
            error_ratio=loop.error_ratio,
            n_accepted=loop.n_accepted,
            n_rejected=loop.n_rejected,
            n_f_evals=loop.n_f_evals,
        )

    def backward(self, grad_ys: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """The cotangent of y0 and those of func's inputs."""
        specification, loop, y0 = self.specification, self.loop, self.y0
        is_laid_out_alike = grad_ys.stride() == specification.rows_stride and not grad_ys.is_neg()
        if not is_laid_out_alike or not looks_readable(grad_ys):
            check_readable("the gradient of the solution", grad_ys)
            shape, stride = specification.rows_shape, specification.rows_stride
            grad_ys = torch.empty_strided(shape, stride, dtype=y0.dtype, device="cpu").copy_(grad_ys)
        grads = [torch.zeros_like(x) if w else None for x, w in zip(inputs, self.wants_gradient, strict=True)]
        g, g_next = torch.empty_like(y0), torch.empty_like(y0)
        n_inside = loop.n_inside
        end_only, inside, n_bytes = specification.backward(self.stats, loop.n_accepted - n_inside, n_inside)
        memory = torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
        result = loop.transpose(
            end_only,
            inside,
            memory.data_ptr(),
            [x.data_ptr() for x in (*grads, *inputs) if x is not None],
            grad_ys.data_ptr(),
            g.data_ptr(),
            g_next.data_ptr(),
        )
        return g if result == g.data_ptr() else g_next, grads


class _LoopRecord(StepRecord):
    """The accepted steps of a compiled loop, as objects only when they are asked for."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    @property
    def steps(self) -> list[AcceptedStep]:  # type: ignore[override]
        return [AcceptedStep(t, h, t_next, outputs) for t, h, t_next, outputs in self._loop.accepted_steps()]

    def bounds(self) -> Tensor:
        if self._loop.n_accepted == 0:
            return torch.empty(0, 2, dtype=torch.float64, device="cpu")
        return torch.frombuffer(self._loop.bounds(), dtype=torch.float64).view(-1, 2)


class _CompiledAca(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, y0: Tensor, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        checkpoints = Blocks(run.y0)
        ys = run.forward(checkpoints)
        ctx.run, ctx.n_blocks, ctx.has_y0 = run, len(checkpoints.blocks), y0.requires_grad
        ctx.save_for_backward(*checkpoints.blocks, *([y0] if ctx.has_y0 else []), *inputs)
        return ys

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor | None) -> tuple[Any, ...]:
        if grad_ys is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, run = ctx.saved_tensors, ctx.run
        inputs = saved[ctx.n_blocks + ctx.has_y0 :]
        if torch.is_grad_enabled():
            y0 = saved[ctx.n_blocks] if ctx.has_y0 else run.y0
            grad_y0, *grads = _eager_backward(ctx, run, grad_ys, y0, inputs)
        else:
            grad_y0, grads = run.backward(grad_ys, inputs)
        needed = ctx.needs_input_grad[1:]
        return None, *(g if n else None for g, n in zip((grad_y0, *grads), needed, strict=True))


def _eager_backward(ctx: Any, run: _Run, grad_ys: Tensor, y0: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """create_graph=True: the eager engine over the same accepted steps."""
    task = run.task()
    field = task.field
    originals = {id(x): i for i, x in enumerate(run.inputs)}
    args = [(x, originals.get(id(x))) for x in field.args if isinstance(x, Tensor) and x.requires_grad]
    of_args = {i for _, i in args}
    of_params = [i for i, x in enumerate(inputs) if x.requires_grad and i not in of_args]
    ctx.task, ctx.record, ctx.stats = task, run.record, run.stats
    ctx.n_params, ctx.autocast = len(of_params), AutocastState(y0.device.type)
    given = [*(inputs[i] for i in of_params), *(x if i is None else inputs[i] for x, i in args)]
    grad_y0, *found = differentiable_backward(ctx, grad_ys, y0, {}, given)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, grad in zip([*of_params, *(i for _, i in args)], found, strict=True):
        if i is not None:
            grads[i] = grad
    return [grad_y0, *grads]


def _check_supported(problem: Problem) -> None:
    y0 = problem.y0
    hint = 'Use engine="eager".'
    if _TORCH < _OLDEST_TORCH:
        raise CompileError(
            f'engine="compiled" needs torch {".".join(map(str, _OLDEST_TORCH))} or newer, on whose compiler it rests; '
            f"here is {torch.__version__}. {hint}"
        )
    if not y0.is_cpu or y0.dtype not in _ZEROS or problem.packing.is_complex:
        raise CompileError(
            f'engine="compiled" takes real float32 and float64 states on the CPU; y0 is '
            f"{'complex' if problem.packing.is_complex else y0.dtype} on {y0.device}. {hint}"
        )
    if type(y0) is not Tensor and not isinstance(y0, torch.nn.Parameter):
        raise CompileError(f'engine="compiled" takes plain tensors; y0 is of type {type(y0).__name__}. {hint}')
    if problem.tolerance.norm is not None:
        raise CompileError(f'engine="compiled" does not take a norm of your own (options["norm"]). {hint}')
    if torch.is_autocast_enabled("cpu"):
        raise CompileError(f'engine="compiled" does not run under torch.autocast. {hint}')
