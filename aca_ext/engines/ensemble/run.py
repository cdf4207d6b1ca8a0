"""Solves of independent samples by compiled lanes, and their exact gradient by replay of the accepted steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.engines.compiled.backend import UnusableFuncError
from aca_ext.engines.compiled.side_effects import Counting
from aca_ext.engines.compiled.trace_table import scope_of, specialise
from aca_ext.engines.compiled.tracing import capture
from aca_ext.engines.compiled.undisturbed import unchanged
from aca_ext.engines.ensemble.library import NEWTON_WORDS, OUTCOME_WORDS, Keep, cotangents_to, task_of
from aca_ext.engines.ensemble.plan import Plan
from aca_ext.errors import CompileError, NonFiniteError, ReplayError, SolveError, StepLimitError, StepSizeError
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.passes import Gradients, with_graph
from aca_ext.problem.batch import BatchProblem
from aca_ext.solver.batch_record import BatchRecord
from aca_ext.solver.checkpoints import Policy
from aca_ext.solver.failures import NO_TOLERANCE, default_reason, fault_of_start, unsolved
from aca_ext.solver.stats import BatchStats

_KINDS: tuple[type[SolveError], ...] = (
    SolveError, StepLimitError, StepSizeError, NonFiniteError, NonFiniteError, NonFiniteError, StepSizeError,
    StepSizeError,
)  # fmt: skip
_OF_STATE, _OF_SLOPE, _OF_TOLERANCE, _OF_NEWTON = 4, 5, 6, 7  # numbers of failures in csrc/ensemble/task.h

_NOT_COUNTED = torch.empty(0, dtype=torch.int64, device="cpu")

# Faults of repeated steps, by their numbers in csrc/ensemble/implicit_backward.h.
_FAULTS = (
    "",
    "the backward pass did not repeat the forward pass: Newton's method did not solve the stages of a step until "
    "rounding. Look at the derivative of func, or use a smaller rtol.",
    "the backward pass did not repeat the forward pass: a step ended elsewhere. Its equations may have several "
    "solutions; use a smaller rtol or newton_tol.",
)


def solve(
    problem: BatchProblem,
    params: Sequence[Tensor] | None,
    task: Callable[[], Task],
    *,
    checkpoints: Policy = None,
    finished: Callable[[int], object] | None = None,
) -> Result:
    """Solves ``problem`` with gradient="aca" on compiled lanes; ``task`` evaluates func itself.

    With a number of ``checkpoints``, so many states of each sample are kept at most. The backward pass repeats the
    steps from one to the next, and holds those of a chunk of samples at a time. ``finished`` is called while the solve
    runs, each time with the number of samples that ended since the last call. Outputs at padded times are NaN; their
    cotangents are ignored.

    Raises:
        CompileError: func cannot be compiled for one sample, or this kind of solve is not supported.
    """
    y0 = problem.y0
    if (problem.counts == 1).all() or y0.numel() == 0:  # nothing to solve
        padding = [torch.full_like(y0, math.nan)] * (problem.times_of_rows.shape[1] - 1)
        n_steps, n_accepted, n_rejected = torch.zeros(3, len(y0), dtype=torch.int64, device="cpu").unbind()
        stats = BatchStats(n_steps, n_accepted, n_rejected, backend="compiled")
        return Result(torch.stack([y0, *padding]), BatchRecord(len(y0)), stats)
    run = Run(problem, params, task, checkpoints if isinstance(checkpoints, int) else 0)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (y0, run.p, run.w)):
        keep = Keep.CHECKPOINTS if isinstance(checkpoints, int) else Keep.STATES
        ys = run.forward(keep, finished)
        ys = with_graph(ys, _Backward(run), [run.states()], y0, [run.p, run.w])
    else:
        ys = run.forward(Keep.NOTHING, finished)
    return Result(ys, run, run.stats)


class Run:
    """One solve: its library, its numbers, its record."""

    def __init__(
        self, problem: BatchProblem, params: Sequence[Tensor] | None, task: Callable[[], Task], most_checkpoints: int
    ) -> None:
        self.problem, self._task, self._most_checkpoints = problem, task, most_checkpoints
        self.y0 = problem.y0.detach().clone(memory_format=torch.contiguous_format)  # which may be edited later
        self.stats = BatchStats(_NOT_COUNTED, _NOT_COUNTED, _NOT_COUNTED, backend="compiled")
        self._held: list[Tensor] = []
        self._steps: Any = None  # a record that has them
        start = time.perf_counter()
        self._plan, used, is_new = self._find()
        if params is not None:
            named = {id(x) for x in (*params, *problem.args)}
            used = [x if id(x) in named else x.detach() for x in used]
        self._used = used
        self._check(with_gradient=False)
        if is_new:
            self.stats.compile_seconds = time.perf_counter() - start
        self.p, self.w = self._gathered(used)

    def _find(self) -> tuple[Plan, list[Tensor], bool]:
        problem, y0 = self.problem, self.y0
        t = problem.start_time(y0).view(problem.packing.time_shape).requires_grad_()
        captured, used = capture(problem.func, t, y0, problem.packing, problem.args)
        counters = captured.counters
        self._counting = Counting(counters, scope_of(problem.func, problem.args)) if counters else None
        key = "lanes", y0.device, problem.tableau, problem.packing
        lanes = "lanes" if problem.newton is None else "implicit lanes"
        if lanes in captured.obstacles:
            raise CompileError(captured.obstacles[lanes])
        plan: Plan | None = captured.plans.get(key)
        if plan is not None:
            return plan, used, False
        self._evaluate_once()  # checks what func returns
        try:
            plan = captured.plans[key] = Plan(captured, problem, t)
        except CompileError as error:
            if not captured.lifted:
                if not isinstance(error, UnusableFuncError):
                    captured.obstacles[lanes] = str(error)
                raise
            specialise(problem.func)  # perhaps it needs as numbers what it reads: once more without tensors for them
            return self._find()
        return plan, used, True

    def _gathered(self, used: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self._plan.gather(used)

    def _evaluate_once(self) -> None:
        with unchanged(self.problem.func, self.problem.args):
            self._task().first_slope(self.y0)

    def _check(self, with_gradient: bool) -> None:
        self._plan.check(self._task, self._used, with_gradient)

    def forward(self, keep: Keep, finished: Callable[[int], object] | None) -> Tensor:
        """The outputs, (T, \\*packed shape).

        Raises:
            SolveError: a sample could not reach its end; the message names it.
        """
        problem, n, ys = self.problem, len(self.y0), self._rows()
        if keep is not Keep.NOTHING:
            self._check(with_gradient=True)
        self._outcomes = torch.zeros(n, OUTCOME_WORDS, dtype=torch.int64, device=problem.y0.device)
        self._numbers = p, w = self.p.detach(), self.w.detach()
        self._library_task = task_of(problem, self.y0, p, w, ys, self._outcomes, self._held)
        if problem.newton is not None:
            self._prepare_newton(keep)
        self._keep, self._record = keep, self._solve(keep, finished)
        if keep is Keep.STATES:
            self._steps = self._record
        self._counted = self._outcomes.cpu()
        failures = self._count()
        if failures.any():
            failed = np.flatnonzero(failures)
            if not problem.nan_on_failure:
                raise self._failure(int(failed[0]), len(failed) - 1)
            ys[:, torch.from_numpy(failed)] = math.nan
            self.stats.failures = [self._failure(row, 0) for row in failed.tolist()]
        return ys

    def _prepare_newton(self, keep: Keep) -> None:
        """Memory for the counts of an implicit method, and for the ends by which the backward pass is judged."""
        task, n = self._library_task, len(self.y0)
        self._newton_counts = torch.zeros(n, NEWTON_WORDS, dtype=torch.int64, device="cpu")
        task.newton_counts = self._newton_counts.data_ptr()
        if keep is not Keep.NOTHING:
            self._ends = torch.zeros_like(self.y0)
            self._held.append(self._ends)
            task.ends = self._ends.data_ptr()

    def _rows(self) -> Tensor:
        """Memory for the states of all samples at all times."""
        n_times = self.problem.times_of_rows.shape[1]
        return torch.empty(n_times, *self.y0.shape, dtype=self.y0.dtype, device=self.y0.device)

    def _solve(self, keep: Keep, finished: Callable[[int], object] | None = None) -> Any:
        """Solves; returns the record of what is kept."""
        library: Any = self._plan.library  # whose own records it takes
        record = library.new_record(len(self.y0), keep, self._most_checkpoints)
        self._use(*self._numbers)
        library.forward(self._library_task, record, finished)
        return record

    def _solve_again(self, keep: Keep) -> Any:
        """The record of the same solve, which may keep more than before."""
        again = self._rows()
        self._library_task.outputs = again.data_ptr()
        return self._solve(keep)

    def _use(self, p: Tensor, w: Tensor) -> None:
        """Sets the numbers that func reads besides time and state."""
        self._library_task.by_sample, self._library_task.shared = p.data_ptr(), w.data_ptr()

    def _count(self) -> NDArray[np.int64]:
        """Sets the counts of ``stats``, and returns the failure of each sample, 0 for none."""
        stats, problem, tableau = self.stats, self.problem, self.problem.tableau
        controller = problem.controller
        assert controller is not None
        n_steps, n_accepted, failures, _, _, _, jumps = self._counted.numpy().T  # NumPy takes half of torch's time
        # Copies, so that statistics that are kept or pickled do not hold the whole buffer.
        stats.n_steps, stats.n_accepted = torch.from_numpy(n_steps.copy()), torch.from_numpy(n_accepted.copy())
        stats.n_rejected = torch.from_numpy(n_steps - n_accepted)
        slopes = jumps + (1 + (controller.first_step is None))
        if problem.newton is None:
            slopes += n_steps * (tableau.stages - tableau.fsal)
        else:
            jacobians, factorizations, iterations = self._newton_counts[:, :3].numpy().T
            slopes += iterations + jacobians
            stats.n_jacobians, stats.n_factorizations = int(jacobians.sum()), int(factorizations.sum())
            stats.n_newton_iterations = int(iterations.sum())
        slopes *= problem.counts > 1  # others take no step
        stats.n_f_evals, stats.n_f_rows = int(slopes.max()), int(slopes.sum())
        if self._counting is not None:
            self._counting.count(stats.n_f_evals)
        return failures

    def _failure(self, row: int, others: int) -> SolveError:
        """The error of a sample that failed."""
        problem = self.problem
        kind, message, numbers = self._fault(row)
        reason = message or default_reason(problem, kind, problem.last_times[row])
        return kind(
            f"The solve of sample {row}{f' (and {others} more)' if others else ''} with {problem.tableau.name} "
            f"stopped: {reason}",
            **numbers,
            sample=row,
        )

    def _fault(self, row: int) -> tuple[type[SolveError], str | None, dict[str, Any]]:
        """The kind of failure of a sample, the reason if it is not that of the kind, and the numbers of the error."""
        n_steps, n_accepted, failure = self._counted[row, :3].tolist()
        t, h, ratio = self._counted[row, 3:6].view(torch.float64).tolist()
        message = None
        if failure in (_OF_STATE, _OF_SLOPE):
            what = "the state is NaN or infinite at" if failure == _OF_STATE else "func returned NaN or infinity at"
            message = fault_of_start(self.problem.y0[row]) or f"{what} t={t:.17g}; look at func there."
        elif failure == _OF_TOLERANCE:
            message = NO_TOLERANCE
        elif failure == _OF_NEWTON:
            size, residual = self._newton_counts[row, 3:].view(torch.float64).tolist()
            message = unsolved(size, residual, "times the tolerance")
        numbers = {"t": t, "h": h or math.nan, "error_ratio": ratio}  # h is 0 if none was chosen yet
        counts = {"n_accepted": n_accepted, "n_rejected": n_steps - n_accepted, "n_f_evals": self.stats.n_f_evals}
        return _KINDS[failure], message, numbers | counts

    def states(self) -> Tensor:
        """A tensor that owns the recorded states; autograd frees them with it."""
        return self._plan.library.states_of(self._record)

    def backward(self, grad_ys: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cotangents of y0, of what belongs to samples, and of what they share."""
        library = self._plan.library
        n_chunks = library.chunks(len(self.y0))
        grad_ys = grad_ys.to(self.y0.dtype).resolve_neg().contiguous()
        grad_y0, grad_p = torch.empty_like(self.y0), torch.zeros_like(p)
        grad_w = torch.zeros(n_chunks, library.n_learnt, dtype=torch.float64, device=w.device)
        most_slopes = torch.zeros(n_chunks, dtype=torch.int64, device=w.device)
        faults = torch.zeros_like(most_slopes)
        to = cotangents_to(grad_ys, grad_y0, grad_p, grad_w, most_slopes, faults)
        # Hooks on saved tensors, such as those of torch.utils.checkpoint, let go of the tensor that owns the states.
        record = self._record if self._record.has_states else self._solve_again(self._keep)
        self._use(p, w)
        library.backward(self._library_task, record, to)
        if faults.any():
            raise ReplayError(_FAULTS[int(faults.max())])
        self.stats.n_f_evals_backward = int(most_slopes.max())
        if self._counting is not None:
            self._counting.count(self.stats.n_f_evals_backward)
        total = grad_w.sum(0).to(w.dtype) if library.n_learnt else torch.zeros_like(w)
        return grad_y0, grad_p, total

    def bounds(self) -> tuple[Tensor, ...]:
        """For each sample (n_accepted, 2) float64: start and end of every accepted step."""
        if self._steps is None or not self._steps.has_steps:  # they are so many: few solves are asked for them
            self._steps = self._solve_again(Keep.STEPS)
        return self._plan.library.bounds(self._steps, self.stats.n_accepted)


class _Backward:
    """Back through the recorded steps of all samples."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        return self._run.backward(grad_ys, *inputs)

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        raise CompileError(
            'engine="compiled" has no second derivatives of independent samples (create_graph=True). Use '
            'engine="eager".'
        )
