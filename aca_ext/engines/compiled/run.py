"""Forward and backward pass of one solve with engine="compiled"."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.compiled.backend import Captured, TraceError
from aca_ext.engines.compiled.inputs import addresses_of, changed_input_error, contents_of
from aca_ext.engines.compiled.plans import Plan, Specification
from aca_ext.engines.compiled.repeated import CHANGED_FUNC, gradients_with_graph
from aca_ext.engines.compiled.side_effects import Counting
from aca_ext.engines.compiled.step_graphs import Layout
from aca_ext.engines.compiled.trace_table import scope_of, specialise
from aca_ext.engines.compiled.tracing import capture
from aca_ext.engines.compiled.undisturbed import unchanged
from aca_ext.engines.compiled.verification import MismatchError
from aca_ext.errors import CompileError, NonFiniteError, ReplayError, StepLimitError, StepSizeError
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.passes import Gradients, with_graph
from aca_ext.kernels.extension import compiled_loop
from aca_ext.problem.problem import Problem
from aca_ext.solver.checkpoints import AcceptedStep, Blocks, StepRecord
from aca_ext.solver.failures import NO_TOLERANCE, failure_of
from aca_ext.solver.runge_kutta import scheme_of
from aca_ext.solver.stats import Stats
from aca_ext.vector_field.gradient_sums import COARSE

# The time with which func is traced; it requires grad, since func may differentiate with respect to it.
_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.float64)
_ZEROS = {dtype: torch.zeros((), dtype=dtype, device=_CPU).requires_grad_() for dtype in _DTYPES}
_MAX_SPECIFICATIONS = 16  # per traced graph; beyond it, the oldest is dropped


def solve(problem: Problem, params: Sequence[Tensor] | None, task: Callable[[], Task]) -> Result:
    """Solves ``problem`` with gradient="aca" by compiled programs; ``task`` makes a task for the eager engine.

    The eager engine verifies programs and computes second derivatives.

    Raises:
        CompileError: func cannot be compiled.
    """
    run = _Run(problem, params, task)
    if run.wants_backward:
        states = Blocks(run.y0)
        run.prepare_backward(states)
        ys = with_graph(run.forward(states), run, states.blocks, problem.y0, run.learnt)
    else:
        ys = run.forward(None)
    return Result(ys, run.record, run.stats)


class _Run:
    """One solve: the C++ loop with its programs and tensors, and its backward pass."""

    def __init__(self, problem: Problem, params: Sequence[Tensor] | None, task: Callable[[], Task]) -> None:
        self.problem, self.task = problem, task
        self.stats = Stats(backend="compiled")
        self.y0 = problem.y0.detach()
        self.specification = self._find()
        self.inputs = self.used
        if params is not None:
            named = {id(x) for x in (*params, *problem.args)}
            self.inputs = [x if id(x) in named else x.detach() for x in self.used]
        self.loop = compiled_loop(self.specification.loop)
        self.record = _LoopRecord(self.loop)

    def _find(self) -> Specification:
        problem, y0 = self.problem, self.y0
        start = time.perf_counter()
        try:
            captured, self.used = capture(problem.func, _ZEROS[y0.dtype], y0, problem.packing, problem.args)
        except TraceError:
            if isinstance(problem.func, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
                raise TraceError(
                    "func is a scripted, traced or frozen object of torch.jit, which TorchDynamo cannot trace. Give "
                    "the module or function from which it was made."
                ) from None
            raise
        self.captured, self.addresses = captured, addresses_of(self.used)
        self.wants_gradient = captured.wants_gradient
        self.wants_backward = torch.is_grad_enabled() and (problem.y0.requires_grad or True in self.wants_gradient)
        self.counting = None
        if captured.counters:
            self.counting = Counting(captured.counters, scope_of(problem.func, problem.args))
        if "program" in captured.obstacles:
            raise CompileError(captured.obstacles["program"])
        found: Specification | None = captured.solves.get(problem.settings)
        if found is None:
            self._refuse_coarse_sums(captured)
            if len(captured.solves) >= _MAX_SPECIFICATIONS:
                del captured.solves[next(iter(captured.solves))]
            plan = self._plan(captured, start)
            try:
                found = captured.solves[problem.settings] = Specification(self, plan)
            except CompileError as error:
                if not captured.lifted:
                    captured.obstacles["program"] = str(error)
                    raise
                specialise(problem.func)  # func may need its numbers as numbers: retry with them as constants
                return self._find()
        return found

    def _refuse_coarse_sums(self, captured: Captured) -> None:
        coarse = {x.dtype for x, w in zip(self.used, captured.wants_gradient, strict=True) if w and x.dtype in COARSE}
        if coarse:
            captured.obstacles["program"] = (
                f"The steps run in Python because gradients of {coarse.pop()} are summed in float32."
            )
            raise CompileError(captured.obstacles["program"])

    def _evaluate_once(self) -> None:
        """Evaluates func once, without side effects, so that its own errors are raised."""
        with unchanged(self.problem.func, self.problem.args):
            self.task().first_slope(self.y0)

    def _plan(self, captured: Captured, start: float) -> Plan:
        problem, tolerance, y0 = self.problem, self.problem.tolerance, self.y0
        each = isinstance(tolerance.rtol, Tensor) or isinstance(tolerance.atol, Tensor)
        key = problem.tableau, problem.adaptive, problem.packing, y0.stride(), each, torch.get_num_threads()
        plan = captured.plans.get(key)
        if plan is None:
            self._evaluate_once()  # validates the result of func
            layout = Layout(y0, problem.packing, scheme_of(problem.tableau, problem.adaptive), tolerance)
            plan = captured.plans[key] = Plan(captured, layout)
            self.stats.compile_seconds += time.perf_counter() - start
        return plan

    def forward(self, checkpoints: Blocks | None) -> Tensor:
        specification, loop, stats, y0 = self.specification, self.loop, self.stats, self.y0
        ys = self._rows()
        memory = torch.empty(specification.forward_bytes, dtype=torch.uint8, device=_CPU)
        outcome, stats.n_steps, stats.n_accepted, stats.n_f_evals = loop.solve(
            memory.data_ptr(),
            self.addresses,
            y0.data_ptr(),
            ys.data_ptr(),
            None if checkpoints is None else checkpoints.add,
        )
        stats.n_rejected = stats.n_steps - stats.n_accepted
        if self.counting is not None:
            self.counting.count(stats.n_f_evals)
        if outcome != 0:
            self._fail(outcome)
        return ys

    def _rows(self) -> Tensor:
        """Uninitialised memory for a state, or a cotangent, at every time."""
        shape, stride = self.specification.rows_shape, self.specification.rows_stride
        return torch.empty_strided(shape, stride, dtype=self.y0.dtype, device=_CPU)

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
            message = f"func or the state is NaN or infinite at t={loop.t:.17g}; look at func there."
        raise failure_of(
            self.problem,
            kind,
            message,
            t=loop.t,
            h=loop.h,
            error_ratio=loop.error_ratio,
            n_accepted=self.stats.n_accepted,
            n_rejected=self.stats.n_rejected,
            n_f_evals=self.stats.n_f_evals,
        )

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        # Hooks on saved tensors may have moved the states, but the loop has their old addresses.
        if [block.data_ptr() for block in states] != self._addresses_of_states or not self._has_transpose():
            y0 = states[0][0].detach().requires_grad_() if self.problem.y0.requires_grad else None
            with torch.enable_grad():
                found = self.differentiable_gradients(grad_ys, y0, states, inputs)
            return [None if g is None else g.detach() for g in found]
        if self._is_learnt is None:
            return self._transposed(grad_ys, inputs)
        grad_y0, *grads = self._transposed(grad_ys, self._completed(inputs))
        return grad_y0, *self._of_learnt(grads)

    def _has_transpose(self) -> bool:
        """Tells whether the transposed steps are compiled; if they cannot be, later solves use no program either."""
        n_inside = self.loop.n_inside
        try:
            self._backward = self.specification.backward(self.stats, self.loop.n_accepted - n_inside, n_inside)
        except MismatchError:
            raise
        except CompileError as error:
            self.captured.obstacles["program"] = str(error)
            return False
        return True

    def _completed(self, learnt: Sequence[Tensor]) -> Sequence[Tensor]:
        """All inputs of func; those that require grad are replaced by the saved tensors ``learnt``."""
        if self._is_learnt is None:
            return learnt
        following = iter(learnt)
        return [next(following) if is_it else x for x, is_it in zip(self.inputs, self._is_learnt, strict=True)]

    def _of_learnt(self, grads: Gradients) -> Gradients:
        """Selects the gradients of inputs that require grad from those of all inputs."""
        if self._is_learnt is None:
            return grads
        return [g for g, is_learnt in zip(grads, self._is_learnt, strict=True) if is_learnt]

    def _transposed(self, grad_ys: Tensor, inputs: Sequence[Tensor]) -> Gradients:
        """Computes the gradients of y0 and of all inputs of func."""
        loop, y0 = self.loop, self.y0
        is_laid_out_alike = grad_ys.stride() == self.specification.rows_stride and not grad_ys.is_neg()
        if not is_laid_out_alike or type(grad_ys) is not Tensor or grad_ys.data_ptr() == 0:
            grad_ys = self._rows().copy_(grad_ys)
        addresses = addresses_of(inputs)
        contents = contents_of(self.captured, inputs, addresses)
        if contents != self._before:
            raise self._changed(inputs, contents)
        grads = [torch.empty_like(x) if w else None for x, w in zip(inputs, self.wants_gradient, strict=True)]
        grad_y0 = torch.empty_like(y0)
        end_only, inside, n_bytes = self._backward
        memory = torch.empty(n_bytes, dtype=torch.uint8, device=_CPU)
        loop.transpose(
            end_only,
            inside,
            memory.data_ptr(),
            [*[x.data_ptr() for x in grads if x is not None], *addresses],
            self.captured.gradient_bytes,
            grad_ys.data_ptr(),
            grad_y0.data_ptr(),
        )
        if self.counting is not None:
            self.counting.count(self.stats.n_f_evals_backward or 0)
        return grad_y0, *grads

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        """Computes the gradients by the eager engine, over the same accepted steps."""
        self.check_func()
        of_solve = self.task(), self.record, self.stats, self.inputs
        held = {0: states[0][0]}
        grad_y0, *grads = gradients_with_graph(*of_solve, grad_ys, y0, held, self._completed(inputs))
        return grad_y0, *self._of_learnt(grads)

    def prepare_backward(self, states: Blocks) -> None:
        """Records data for the backward pass: checksums and gradients of inputs, and the addresses of ``states``."""
        self.specification.plan.expect_gradients(self)
        self._before = contents_of(self.captured, self.used, self.addresses)
        # autograd saves and checks inputs that require grad. The others have checksums, and may be counters.
        self.learnt = [x for x in self.inputs if x.requires_grad]
        are_all = len(self.learnt) == len(self.inputs)
        self._is_learnt = None if are_all else [x.requires_grad for x in self.inputs]
        self._addresses_of_states = states.addresses

    def check_func(self) -> None:
        """Raises ReplayError if func, or a tensor that it depends on, has changed since the forward pass."""
        problem = self.problem
        try:
            captured, used = capture(problem.func, _ZEROS[self.y0.dtype], self.y0, problem.packing, problem.args)
        except CompileError:
            captured, used = None, []
        # Tensors that replace numbers are new objects in each lookup, so they are compared by value.
        if captured is not self.captured or not all(
            one is other or (captured.lifted and one.dim() == 0 and torch.equal(one, other))
            for one, other in zip(used, self.used, strict=True)
        ):
            raise ReplayError(CHANGED_FUNC)
        contents = contents_of(self.captured, used, addresses_of(used))
        if contents != self._before:
            raise self._changed(used, contents)

    def _changed(self, inputs: Sequence[Tensor], contents: bytes) -> ReplayError:
        return changed_input_error(self.captured, inputs, self._before, contents, self.loop.accepted_steps()[-1:])


class _LoopRecord(StepRecord):
    """Record of the accepted steps of a compiled loop; its Python objects are made on demand."""

    end = None  # StepRecord has slots, which its constructor would fill in each solve
    events: tuple[()] = ()  # type: ignore[assignment]
    ended_by = None
    formulas = ()

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    @property
    def steps(self) -> list[AcceptedStep]:  # type: ignore[override]
        return [AcceptedStep(t, h, t_next, outputs) for t, h, t_next, outputs in self._loop.accepted_steps()]

    def bounds(self) -> Tensor:
        if self._loop.n_accepted == 0:
            return torch.empty(0, 2, dtype=torch.float64)
        return torch.frombuffer(self._loop.bounds(), dtype=torch.float64).view(-1, 2)
