"""The adaptive loop over a batch of independent samples. Knows nothing of gradients.

Like ``aca_ext.solver.loop``, but each sample has its own time, step size and error: one entry of an array, or one row
of a tensor. In this module a row is a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import NonFiniteError, SolveError, StepLimitError, StepSizeError
from aca_ext.kernels.extension import STATUSES, batch_control_for
from aca_ext.kernels.fused import Array, RowOperations
from aca_ext.problem.batch import BatchProblem
from aca_ext.progress import Step
from aca_ext.solver.failures import NO_TOLERANCE, fault_of_start, reason_of
from aca_ext.solver.runge_kutta import Scheme, Trial, error_norm, scheme_of, step
from aca_ext.solver.stats import BatchStats
from aca_ext.vector_field.field import VectorField

_RUNNING, _STEP_LIMIT, _STEP_SIZE, _NOT_FINITE = map(
    STATUSES.index, ("running", "step_limit", "step_size", "not_finite")
)

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class OutputRows:
    """Outputs that fall into one step of the batch; one entry per output.

    Attributes:
        rows: index of the sample.
        index: index of the requested time among the times of that sample.
        theta: position of that time in the step of that sample, in (0, 1].
    """

    rows: Index
    index: Index
    theta: Array

    def where(self, mask: Mask) -> OutputRows:
        return OutputRows(self.rows[mask], self.index[mask], self.theta[mask])


@dataclass(frozen=True)
class AcceptedRows:
    """Steps that several samples took in the same iteration of the loop; one entry per sample.

    Attributes:
        rows: indices of the samples whose step was accepted.
        t, t_next: start and end of the step.
        h: signed step size.
        outputs: outputs that fall into these steps.
    """

    rows: Index
    t: Array
    h: Array
    t_next: Array
    outputs: OutputRows


@dataclass
class BatchRecord:
    """The accepted steps of a batch, in order."""

    n_rows: int
    steps: list[AcceptedRows] = field(default_factory=lambda: list[AcceptedRows]())

    def bounds(self) -> tuple[Tensor, ...]:
        """Start and end of every accepted step: per sample an (n_accepted, 2) float64 tensor on the CPU."""
        if not self.steps:
            return tuple(torch.zeros(0, 2, dtype=torch.float64, device="cpu") for _ in range(self.n_rows))
        rows = np.concatenate([s.rows for s in self.steps])
        ends = np.stack([np.concatenate([getattr(s, end) for s in self.steps]) for end in ("t", "t_next")], 1)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=self.n_rows)
        return torch.from_numpy(ends[order]).split(counts.tolist())


class BatchSolver:
    """One solve of a batch with the given operations.

    Args:
        k0: first slopes, f(t0, y0); None if the solve has no step.
        keep_states: store the states at which accepted steps start, so that a backward pass can replay the steps.

    Attributes:
        record: accepted steps.
        states: for each entry of the record, the states of its samples before the step; empty without ``keep_states``.
        y: states of all samples, each at its own last time.
        stats: counts of the solve.
    """

    def __init__(
        self, problem: BatchProblem, field: VectorField, ops: RowOperations, k0: Tensor | None, keep_states: bool
    ) -> None:
        self.problem, self.field, self.ops, self._k = problem, field, ops, k0
        n = ops.n_rows
        self.record = BatchRecord(n)
        self.states: list[Tensor] = []
        self._control = batch_control_for(problem.controller, problem.max_num_steps, problem.times_of_rows)
        n_steps, n_accepted, n_rejected = torch.zeros(3, n, dtype=torch.int64, device="cpu").unbind()
        self.stats = BatchStats(n_steps, n_accepted, n_rejected, backend=ops.backend)
        self._scheme = scheme_of(problem.tableau, estimate_error=True)
        self._keep_states = keep_states
        times = problem.times_of_rows
        self._sign = np.where(times[:, -1] < times[:, 0], -1.0, 1.0)
        self._outputs: list[tuple[Index, Index, Tensor]] = []

    def run(self, y: Tensor) -> Tensor:
        """Solves from the packed state ``y`` and returns the outputs, (T, \\*packed shape).

        Raises:
            SolveError: a sample did not reach its last time; the message names the sample.
        """
        n = self.ops.n_rows
        self._outputs = [(np.arange(n), np.zeros(n, dtype=np.int64), y)]
        self.y = y
        if self.problem.times_of_rows.shape[1] > 1 and n > 0:
            self.y = self._run(y)
        self._count()
        return assemble(self._outputs, self.problem.times_of_rows.shape, y)

    def _count(self) -> None:
        control, stats = self._control, self.stats
        stats.n_steps, stats.n_accepted = (torch.from_numpy(x.copy()) for x in (control.n_steps, control.n_accepted))
        stats.n_rejected = stats.n_steps - stats.n_accepted
        stats.n_f_evals, stats.n_f_rows = self.field.n_evals, self.field.n_evals * self.ops.n_rows

    def _run(self, y: Tensor) -> Tensor:
        control = self._control
        self._choose_first_steps(y)
        while (active := control.status == _RUNNING).any():
            control.propose()
            self._check(control.status == _STEP_LIMIT, StepLimitError)
            self._check(control.status == _STEP_SIZE, StepSizeError)
            t, h, t_next = control.t.copy(), control.h_trial.copy(), control.t_next.copy()
            steps = self.ops.steps(h)
            trial = step(self.field, self.ops, self._scheme, stage_times(self._scheme, t, h, t_next), y, steps, self._k)
            control.judge(error_norm(self.ops, self._scheme, y, steps, trial))
            accepted = control.is_accepted != 0
            rejected = active & ~accepted
            self._report(t, h, accepted, y)
            if accepted.any():
                self._accept(accepted, t, y, h, t_next, trial)
            if rejected.any():
                self._check_progress(y, trial.k[0])
            self._k = self._next_slopes(accepted, rejected | ~active, trial)
            if accepted.any():
                y = trial.y1 if accepted.all() else torch.where(self._mask(accepted), trial.y1, y)
            del trial
        return y

    def _report(self, t: Array, h: Array, accepted: Mask, y: Tensor) -> None:
        if self.problem.on_step is not None:
            control = self._control
            counts = control.n_steps, control.n_accepted, control.n_steps - control.n_accepted
            arrays = (t, control.t, h, control.ratio, accepted, *counts)
            found = (torch.from_numpy(x.copy()) for x in arrays)
            self.problem.on_step(Step._make((*found, self.field.n_evals, self.problem.packing.unpack(y.detach()))))

    def _choose_first_steps(self, y: Tensor) -> None:
        """Chooses the first step of each sample by Hairer's rule; its evaluation is not part of the solution."""
        problem, ops, k, control = self.problem, self.ops, self._k, self._control
        assert problem.controller is not None
        assert k is not None
        if problem.controller.first_step is not None:
            return
        with torch.no_grad():
            norm_f = ops.error_norm(k, None, 0.0, y, y)
            self._check_finite(~np.isfinite(norm_f), y, k, norm_f)
            control.propose_euler_steps(ops.error_norm(y, None, 0.0, y, y), norm_f)
            euler = ops.weighted_sum(y, ops.steps(control.h_trial.copy()), [k], (1.0,))
            with self.field.aside():
                change = self.field(ops.scalars([control.t_next])[0], euler)
            control.choose_first_steps(ops.error_norm(change, k, -1.0, y, y))

    def _accept(self, accepted: Mask, t: Array, y: Tensor, h: Array, t_next: Array, trial: Trial) -> None:
        rows = np.flatnonzero(accepted)
        outputs = self._outputs_due(rows)
        self.record.steps.append(AcceptedRows(rows, t[rows], h[rows], t_next[rows], outputs))
        if self._keep_states:
            self.states.append(y if accepted.all() else y[index_of(rows, y)])
        self._outputs += outputs_of_step(outputs, self._scheme, y, self.ops.steps(h), trial)

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
            return trial.k[0]
        if not self._scheme.fsal:
            return None
        return torch.where(self._mask(accepted), trial.k[-1], trial.k[0]) if others.any() else trial.k[-1]

    def _mask(self, rows: Mask) -> Tensor:
        return torch.from_numpy(rows).view(self.ops.row_shape).to(self.ops.like.device)

    def _check_progress(self, y: Tensor, k: Tensor) -> None:
        """Raises if a sample failed and a smaller step cannot help."""
        control = self._control
        self._check(control.status == _STEP_SIZE, StepSizeError)
        doubtful = control.status == _NOT_FINITE
        if not doubtful.any():
            return
        self._check_finite(doubtful, y, k, control.ratio)
        control.retry()
        stuck = control.status == _NOT_FINITE
        if self.problem.tolerance.forbids_error():
            self._check(stuck & (control.ratio == np.inf), StepSizeError, NO_TOLERANCE)
        self._check(stuck, NonFiniteError)

    def _check_finite(self, suspects: Mask, y: Tensor, k: Tensor, ratio: Array) -> None:
        if not suspects.any() or y.numel() == 0:
            return
        for what, x in (("the state is NaN or infinite at", y), ("func returned NaN or infinity at", k)):
            failed = suspects & ~self._are_finite(x)
            if not failed.any():
                continue
            row = int(failed.argmax())
            message = self._fault_of_start(row) or f"{what} t={self._control.t[row]:.17g}; look at func there."
            self._check(failed, NonFiniteError, message, ratio)

    def _are_finite(self, x: Tensor) -> Mask:
        finite: Mask = torch.isfinite(x).reshape(len(x), -1).all(1).cpu().numpy()
        return finite

    def _fault_of_start(self, row: int) -> str | None:
        return fault_of_start(self.problem.y0[row])

    def _check(
        self, failed: Mask, kind: type[SolveError], message: str | None = None, ratio: Array | None = None
    ) -> None:
        if not failed.any():
            return
        control, row = self._control, int(failed.argmax())
        others = int(failed.sum()) - 1
        reason = message or reason_of(kind, self.problem.max_num_steps, self.problem.times_of_rows[row, -1])
        raise kind(
            f"The solve of sample {row}{f' (and {others} more)' if others else ''} with {self.problem.tableau.name} "
            f"stopped: {reason}",
            t=float(control.t[row]),
            h=float(control.h[row]) or math.nan,  # NaN until a step is chosen
            error_ratio=float((control.ratio if ratio is None else ratio)[row]),
            n_accepted=int(control.n_accepted[row]),
            n_rejected=int(control.n_steps[row] - control.n_accepted[row]),
            n_f_evals=self.field.n_evals,
            sample=row,
        )


def stage_times(scheme: Scheme, t: Array, h: Array, t_next: Array) -> list[Array]:
    return [t_next if c == 1 else t + c * h for c in scheme.c]


def index_of(rows: Index, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def outputs_of_step(
    outputs: OutputRows, scheme: Scheme, y: Tensor, h: Tensor, trial: Trial
) -> list[tuple[Index, Index, Tensor]]:
    """Tuples (samples, indices of their times, states): first outputs at step ends, then outputs by dense output."""
    found: list[tuple[Index, Index, Tensor]] = []
    at_end = outputs.where(outputs.theta == 1.0)
    if len(at_end.rows):
        found.append((at_end.rows, at_end.index, trial.y1[index_of(at_end.rows, y)]))
    inside = outputs.where(outputs.theta != 1.0)
    if len(inside.rows):
        rows = index_of(inside.rows, y)
        dense = [scheme.tableau.dense_weights(theta) for theta in inside.theta.tolist()]
        weights = torch.tensor(dense, dtype=torch.float64, device="cpu").to(y)
        total = sum(
            w.view(-1, *h.shape[1:]) * k[rows]
            for w, k, is_used in zip(weights.T, trial.k, weights.any(0).tolist(), strict=True)
            if is_used
        )
        found.append((inside.rows, inside.index, y[rows] + h[rows].to(y.dtype) * total))
    return found


def assemble(outputs: Sequence[tuple[Index, Index, Tensor]], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Arranges outputs by time and sample into one tensor, (T, \\*packed shape); differentiable."""
    n_rows, n_times = shape
    places = np.concatenate([index * n_rows + rows for rows, index, _ in outputs])
    order = index_of(np.argsort(places), like).view(n_times, n_rows)
    return torch.cat([states for _, _, states in outputs])[order]
