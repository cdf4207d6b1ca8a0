"""The adaptive loop over a batch of independent samples. Knows nothing of gradients.

Like ``aca_ext.solver.loop``, but each sample has its own time, step size and error: one entry of an array, or one row
of a tensor. In this module a row is a sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aca_ext.kernels.extension import batch_control_for
from aca_ext.kernels.fused import Array, RowOperations
from aca_ext.problem.batch import BatchProblem
from aca_ext.progress import Step
from aca_ext.solver.batch_events import BatchEvents
from aca_ext.solver.batch_failures import DONE, RUNNING, SampleFailures
from aca_ext.solver.batch_record import (
    AcceptedRows,
    BatchRecord,
    Index,
    Mask,
    OutputRows,
    Outputs,
    assemble,
    index_of,
    order_of,
    outputs_of_step,
)
from aca_ext.solver.callback import stops
from aca_ext.solver.method import check_repeatable, method_of
from aca_ext.solver.runge_kutta import Coefficients, Trial, error_norm
from aca_ext.solver.stats import BatchStats
from aca_ext.vector_field.batch_field import RowField


class BatchSolver:
    """One solve of a batch with the given operations.

    Args:
        k0: first slopes, f(t0, y0); None if the solve has no step.
        keep_states: store the states at which accepted steps start, so that a backward pass can replay the steps.
        keep_ends: the ends of the steps are further outputs, after those at the requested times.

    Attributes:
        record: accepted steps.
        states: for each entry of the record, the states of its samples before the step, followed by those at its end of
            the samples that an event ended in it; empty without ``keep_states``.
        y: states of all samples, each at its own last time.
        stats: counts of the solve.
        events: events of the solve; None without events.
    """

    def __init__(
        self,
        problem: BatchProblem,
        field: RowField,
        ops: RowOperations,
        k0: Tensor | None,
        keep_states: bool,
        keep_ends: bool = False,
    ) -> None:
        self.problem, self.field, self.ops, self._k = problem, field, ops, k0
        n = ops.n_rows
        self.record = BatchRecord(n)
        self.states: list[Tensor] = []
        self._control = batch_control_for(problem.controller, problem.max_num_steps, problem.times_of_rows)
        self._failures = SampleFailures(problem, field, self._control)
        n_steps, n_accepted, n_rejected = torch.zeros(3, n, dtype=torch.int64, device="cpu").unbind()
        self.stats = BatchStats(n_steps, n_accepted, n_rejected, backend=ops.backend)
        self._method = method_of(problem, field, ops, estimate_error=True, counts=self.stats)
        self._scheme = self._method.scheme
        if problem.newton is not None:
            check_repeatable(problem, field)
        self._keep_states = keep_states
        self._outputs: list[Outputs] = []
        self._n_ends: Index | None = np.zeros(n, dtype=np.int64) if keep_ends else None
        self.events = BatchEvents(problem, ops) if problem.events else None

    def run(self, y: Tensor) -> Tensor:
        """Solves from the packed state ``y`` and returns the outputs, (T, \\*packed shape), and behind them the events.

        Raises:
            SolveError: a sample did not reach its last time; the message names the sample.
        """
        n = self.ops.n_rows
        self._outputs = [(np.arange(n), np.zeros(n, dtype=np.int64), y)]
        self.y = y
        if n > 0 and (self.problem.counts > 1).any():
            self.y = self._run(y)
        self._count()
        self.field.see(None)
        n_outputs = self.problem.times_of_rows.shape[1] + (0 if self.events is None else self.events.n_outputs)
        n_outputs += 0 if self._n_ends is None else int(self._n_ends.max(initial=0))
        outputs = self._outputs_of_survivors()
        self.record.rest_times = self._control.t.copy()
        if self.events is not None:
            self.record.occurrences, self.record.ended_by = self.events.occurrences(), self.events.ended_by
        order = order_of(outputs, (n_outputs, n))
        self.record.is_missing = order == sum(len(states) for _, _, states in outputs)
        return assemble(outputs, (n_outputs, n), y)

    def _count(self) -> None:
        control, stats = self._control, self.stats
        stats.n_steps, stats.n_accepted = (torch.from_numpy(x.copy()) for x in (control.n_steps, control.n_accepted))
        stats.n_rejected = stats.n_steps - stats.n_accepted
        stats.n_f_evals, stats.n_f_rows = self.field.n_evals, self.field.n_rows_evaluated
        stats.failures = [self._failures.errors[row] for row in sorted(self._failures.errors)]

    def _outputs_of_survivors(self) -> list[Outputs]:
        """The outputs of the samples that did not fail."""
        failed = self.record.failed
        failed[list(self._failures.errors)] = True
        if not failed.any():
            return self._outputs
        kept = [~failed[rows] for rows, _, _ in self._outputs]
        return [
            (rows[mask], index[mask], states[index_of(np.flatnonzero(mask), states)])
            for mask, (rows, index, states) in zip(kept, self._outputs, strict=True)
        ]

    def _run(self, y: Tensor) -> Tensor:
        control = self._control
        self._choose_first_steps(y)
        if self.events is not None:
            self.events.start(control.t.copy(), y, self._k, control.h.copy(), control.status == RUNNING)
        while (active := control.status == RUNNING).any():
            if self.problem.is_compact:
                self._leave_out_finished(active, y)
            control.propose()
            self._failures.check_proposal()
            t, h, t_next = control.t.copy(), control.h_trial.copy(), control.t_next.copy()
            steps = self.ops.steps(h)
            trial = self._method.step(stage_times(self._scheme, t, h, t_next), y, steps, self._k)
            control.judge(error_norm(self.ops, self._scheme, y, steps, trial))
            accepted = control.is_accepted != 0
            rejected = active & ~accepted
            self._report(t, h, accepted, y)
            if accepted.any():
                accepted = self._accept(accepted, t, y, h, t_next, trial)
                self._method.accept_rows(accepted, steps, trial)
            if rejected.any():
                self._failures.check_progress(y, self._first_slope(trial), trial.failures or {})
            self._k = self._next_slopes(accepted, rejected | ~active, trial)
            if accepted.any():
                y = trial.y1 if accepted.all() else torch.where(self._mask(accepted), trial.y1, y)
            del trial
        return y

    def _leave_out_finished(self, active: Mask, y: Tensor) -> None:
        """Takes finished samples from func once at most half of those that it sees are left."""
        seen = self.field.seen
        n_active = int(active.sum())
        if 2 * n_active <= (len(active) if seen is None else len(seen)):
            control, ops = self._control, self.ops
            t, h = ops.scalars([control.t])[0], ops.steps(control.h.copy())
            # The slopes of implicit stages are f at the stages only up to the error of Newton's method.
            k = self._k if self.problem.newton is None else None
            self.field.see_fewer(np.flatnonzero(active), t, y.detach(), h.to(y.dtype), k)

    def _report(self, t: Array, h: Array, accepted: Mask, y: Tensor) -> None:
        if self.problem.on_step is not None:
            control = self._control
            counts = control.n_steps, control.n_accepted, control.n_steps - control.n_accepted
            arrays = (t, control.t, h, control.ratio, accepted, *counts)
            found = (torch.from_numpy(x.copy()) for x in arrays)
            step = Step._make((*found, self.field.n_evals, self.problem.packing.unpack(y.detach())))
            stops(self.problem, self.problem.on_step(step))

    def _choose_first_steps(self, y: Tensor) -> None:
        """Chooses the first step of each sample by Hairer's rule; its evaluation is not part of the solution."""
        problem, ops, k, control = self.problem, self.ops, self._k, self._control
        assert problem.controller is not None
        assert k is not None
        if problem.controller.first_step is not None:
            return
        with torch.no_grad():
            norm_f = ops.error_norm(k, None, 0.0, y, y)
            self._failures.check_start(y, k, norm_f)
            control.propose_euler_steps(ops.error_norm(y, None, 0.0, y, y), norm_f)
            euler = ops.weighted_sum(y, ops.steps(control.h_trial.copy()), [k], (1.0,))
            with self.field.aside():
                change = self.field(ops.scalars([control.t_next])[0], euler)
            control.choose_first_steps(ops.error_norm(change, k, -1.0, y, y))

    def _accept(self, accepted: Mask, t: Array, y: Tensor, h: Array, t_next: Array, trial: Trial) -> Mask:
        """Adds the step to the solutions of the samples that accepted it; returns those that go on from its end.

        A sample that an event ends rests where the step started: func need not exist beyond the event.
        """
        rows = np.flatnonzero(accepted)
        outputs, steps, ended = self._outputs_due(rows), self.ops.steps(h), np.zeros_like(accepted)
        if self.events is not None:
            found, end = self.events.find(accepted, t, t_next, y, steps, trial)
            outputs = outputs.where(outputs.theta <= end[outputs.rows]).followed_by(found)
            ended = np.isfinite(end)
            self._control.status[ended] = DONE
            self._control.t[ended] = t[ended]
        if self._n_ends is not None:
            outputs = outputs.followed_by(self._ends(rows, self._n_ends))
        seen, of_ended = self.field.seen, np.flatnonzero(ended)
        self.record.steps.append(AcceptedRows(rows, t[rows], h[rows], t_next[rows], outputs, seen, of_ended))
        if self._keep_states:
            starts = y if accepted.all() else y[index_of(rows, y)]
            self.states.append(torch.cat([starts, trial.y1[index_of(of_ended, y)]]) if len(of_ended) else starts)
        self._outputs += outputs_of_step(outputs, self.problem.tableau, y, steps, trial)
        return accepted & ~ended

    def _ends(self, rows: Index, counts: Index) -> OutputRows:
        """The ends of steps just accepted as outputs; ``counts`` holds the number of those before."""
        index = self.problem.times_of_rows.shape[1] + counts[rows]
        counts[rows] += 1
        return OutputRows(rows, index, np.ones(len(rows)))

    def _outputs_due(self, rows: Index) -> OutputRows:
        """The requested times inside the steps just accepted; theta is exactly 1 at the end of a step."""
        control, times = self._control, self.problem.times_of_rows
        first = control.first_due[rows]
        counts = control.end_due[rows] - first
        of_rows = np.repeat(rows, counts)
        index = np.arange(len(of_rows)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        time, start, end = times[of_rows, index], control.t_start[of_rows], control.t[of_rows]
        return OutputRows(of_rows, index, np.where(time == end, 1.0, (time - start) / (end - start)))

    def _next_slopes(self, accepted: Mask, others: Mask, trial: Trial) -> Tensor | None:
        """First slopes of the next step: the last slope after an accepted step, the old first slope otherwise."""
        if not accepted.any():
            return self._first_slope(trial)
        if not self._scheme.fsal:
            return None
        return torch.where(self._mask(accepted), trial.k[-1], trial.k[0]) if others.any() else trial.k[-1]

    def _first_slope(self, trial: Trial) -> Tensor | None:
        """f at the start of the trial, if it evaluates that."""
        return trial.k[0] if self._scheme.starts_explicitly else None

    def _mask(self, rows: Mask) -> Tensor:
        return torch.from_numpy(rows).view(self.ops.row_shape).to(self.ops.like.device)


def stage_times(scheme: Coefficients, t: Array, h: Array, t_next: Array) -> list[Array]:
    return [t_next if c == 1 else t + c * h for c in scheme.c]
