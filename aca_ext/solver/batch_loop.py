"""The adaptive loop of a batch whose samples are independent. Knows nothing of gradients.

As ``aca_ext.solver.loop`` with an array entry, or a row of a tensor, for each sample.
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
from aca_ext.kernels.fused import Array, RowOperations
from aca_ext.numerics.batch_controller import RowController
from aca_ext.problem.batch import BatchProblem
from aca_ext.progress import Step
from aca_ext.solver.failures import NO_TOLERANCE, fault_of_start, reason_of
from aca_ext.solver.runge_kutta import Scheme, Trial, error_norm, scheme_of, step
from aca_ext.vector_field.field import VectorField

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


@dataclass(repr=False)
class BatchStats:
    """Counts of a solve whose samples are independent.

    Attributes:
        n_f_evals: how often func was called; every call is on the whole batch.
        n_f_rows: samples that func was evaluated on, n_f_evals times the batch.
        n_steps: (batch,) int64, trial steps of each sample, as many as it takes by itself.
        n_accepted, n_rejected: (batch,) int64, those that became part of its solution, and those that did not.
        backend: what did the arithmetic: "cpu" or "cuda" kernels, or "reference", plain PyTorch.
        n_f_evals_backward: calls of func in the backward pass; None until it has run.
    """

    n_steps: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    n_f_evals: int = 0
    n_f_rows: int = 0
    backend: str = ""
    n_f_evals_backward: int | None = None

    def __repr__(self) -> str:
        """Counts by sample as their range."""
        parts = [f"n_f_evals={self.n_f_evals}", f"n_f_rows={self.n_f_rows}"]
        for name in ("n_steps", "n_accepted", "n_rejected"):
            count = getattr(self, name)
            parts.append(f"{name}={int(count.min())}..{int(count.max())}" if len(count) else f"{name}=none")
        parts += [f"backend={self.backend!r}", f"n_f_evals_backward={self.n_f_evals_backward}"]
        return f"BatchStats of {len(self.n_steps)} samples({', '.join(parts)})"


@dataclass(frozen=True)
class OutputRows:
    """Outputs inside a step: of which samples, which of their times, and where in their steps."""

    rows: Index
    index: Index
    theta: Array

    def where(self, mask: Mask) -> OutputRows:
        return OutputRows(self.rows[mask], self.index[mask], self.theta[mask])


@dataclass(frozen=True)
class AcceptedRows:
    """The steps that some samples, ``rows``, took at once; ``h`` with the sign of their direction."""

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
        """For each sample (n_accepted, 2) float64: start and end of every accepted step."""
        if not self.steps:
            return tuple(torch.zeros(0, 2, dtype=torch.float64, device="cpu") for _ in range(self.n_rows))
        rows = np.concatenate([s.rows for s in self.steps])
        ends = np.stack([np.concatenate([getattr(s, end) for s in self.steps]) for end in ("t", "t_next")], 1)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=self.n_rows)
        return torch.from_numpy(ends[order]).split(counts.tolist())


class OutputTimesOfRows:
    """Walks through the requested times of every sample once."""

    def __init__(self, times: Array, sign: Array) -> None:
        self._times, self._sign = times, sign
        self._next = np.ones(len(times), dtype=np.int64)  # the first time is the start

    def within(self, rows: Index, t: Array, t_next: Array) -> OutputRows:
        """The requested times that the steps of ``rows`` from t to t_next reach; theta is exactly 1 at t_next."""
        found: list[OutputRows] = []
        while len(rows):
            i = self._next[rows]
            is_left = i < self._times.shape[1]
            time = self._times[rows, np.where(is_left, i, 0)]
            due = is_left & (self._sign[rows] * time <= self._sign[rows] * t_next)
            rows, i, t, t_next, time = rows[due], i[due], t[due], t_next[due], time[due]
            self._next[rows] += 1
            found.append(OutputRows(rows, i, np.where(time == t_next, 1.0, (time - t) / (t_next - t))))
        if not found:
            return OutputRows(rows, rows, t)
        return OutputRows(*(np.concatenate([getattr(o, name) for o in found]) for name in ("rows", "index", "theta")))


class BatchSolver:
    """One solve of a batch with the given operations.

    Args:
        k0: the first slopes, f(t0, y0).
        keep_states: keep the states that accepted steps start from, for a replay.

    Attributes:
        record: the accepted steps.
        states: for each entry of the record the states of its rows before, where they are kept.
        y: the states of all samples at their ends.
        stats: the counts.
    """

    def __init__(
        self, problem: BatchProblem, field: VectorField, ops: RowOperations, k0: Tensor | None, keep_states: bool
    ) -> None:
        self.problem, self.field, self.ops, self._k = problem, field, ops, k0
        n = ops.n_rows
        self.record = BatchRecord(n)
        self.states: list[Tensor] = []
        zeros = [torch.zeros(n, dtype=torch.int64, device="cpu") for _ in _COUNTS]
        self.stats = BatchStats(zeros[0], zeros[1], zeros[2], backend=ops.backend)
        self._counts = {what: count.numpy() for what, count in zip(_COUNTS, zeros, strict=True)}  # the same memory
        self._scheme = scheme_of(problem.tableau, estimate_error=True)
        self._keep_states = keep_states
        times = problem.times_of_rows
        self._end, self._sign = times[:, -1].copy(), np.where(times[:, -1] < times[:, 0], -1.0, 1.0)
        self._output_times = OutputTimesOfRows(times, self._sign)
        self._outputs: list[tuple[Index, Index, Tensor]] = []

    def run(self, y: Tensor) -> Tensor:
        """Solves from ``y`` and returns the outputs, (T, \\*packed shape).

        Raises:
            SolveError: a sample could not reach its end; the message names it.
        """
        n = self.ops.n_rows
        self._outputs = [(np.arange(n), np.zeros(n, dtype=np.int64), y)]
        self.y = y
        if self.problem.times_of_rows.shape[1] > 1 and n > 0:
            self.y = self._run(y)
        self.stats.n_f_evals = self.field.n_evals
        self.stats.n_f_rows = self.field.n_evals * n
        return assemble(self._outputs, self.problem.times_of_rows.shape, y)

    def _run(self, y: Tensor) -> Tensor:
        problem, sign, end = self.problem, self._sign, self._end
        assert problem.controller is not None
        controller = RowController(problem.controller, len(end))
        t = problem.times_of_rows[:, 0].copy()
        h = self._initial_steps(controller, t, y)
        ratio = np.full(len(end), math.nan)
        active = np.ones(len(end), dtype=np.bool_)
        while active.any():
            self._check(active & (self._counts["steps"] >= problem.max_num_steps), StepLimitError, t, h, ratio)
            is_cut = (sign * (t + sign * h) >= sign * end) | (np.abs(end - t) <= h * (1 + 1e-12))
            t_next = np.where(active, np.where(is_cut, end, t + sign * h), t)
            h_now = np.where(active, np.where(is_cut, np.abs(end - t), h), 0.0)
            self._check(active & (t_next == t), StepSizeError, t, h, ratio)
            steps = self.ops.steps(sign * h_now)
            trial = step(self.field, self.ops, self._scheme, stage_times(self._scheme, t, sign * h_now, t_next), y,
                         steps, self._k)  # fmt: skip
            found = error_norm(self.ops, self._scheme, y, steps, trial)
            ratio = np.where(active, found, ratio)
            accepted, rejected = active & (found <= 1), active & ~(found <= 1)
            for what, mask in zip(_COUNTS, (active, accepted, rejected), strict=True):
                self._counts[what] += mask
            self._report(t, np.where(accepted, t_next, t), sign * h_now, ratio, accepted)
            if accepted.any():
                self._accept(accepted, t, y, sign * h_now, t_next, trial)
                grown = controller.grow(h_now, found, accepted)
            if rejected.any():
                shrunk = controller.shrink(h_now, found, rejected)
                self._check_progress(rejected, t, y, shrunk, trial.k[0], found)
                h = np.where(rejected, shrunk, h)
            self._k = self._next_slopes(accepted, rejected | ~active, trial)
            if accepted.any():
                # A step cut short says little about the size to come.
                h = np.where(accepted, np.where(is_cut, np.maximum(grown, h), grown), h)
                t = np.where(accepted, t_next, t)
                y = trial.y1 if accepted.all() else torch.where(self._mask(accepted), trial.y1, y)
                active &= ~(accepted & is_cut)
            del trial
        return y

    def _report(self, t: Array, t_next: Array, h: Array, ratio: Array, accepted: Mask) -> None:
        if self.problem.on_step is not None:
            arrays = (t, t_next, h, ratio, accepted, *(self._counts[what] for what in _COUNTS))
            self.problem.on_step(Step._make((*(torch.from_numpy(x.copy()) for x in arrays), self.field.n_evals)))

    def _initial_steps(self, controller: RowController, t: Array, y: Tensor) -> Array:
        problem, ops, k, sign = self.problem, self.ops, self._k, self._sign
        assert problem.controller is not None
        assert k is not None
        if problem.controller.first_step is not None:
            return np.full(len(t), problem.controller.first_step)
        with torch.no_grad():
            norm_f = ops.error_norm(k, None, 0.0, y, y)
            self._check_finite(~np.isfinite(norm_f), t, y, k, np.full(len(t), math.nan), norm_f)

            def change_of_slope(h: Array) -> Array:
                euler = ops.weighted_sum(y, ops.steps(sign * h), [k], (1.0,))
                with self.field.aside():
                    change = self.field(ops.scalars([t + sign * h])[0], euler)
                return ops.error_norm(change, k, -1.0, y, y)

            norm_y = ops.error_norm(y, None, 0.0, y, y)
            return controller.initial(np.abs(self._end - t), norm_y, norm_f, change_of_slope)

    def _accept(self, accepted: Mask, t: Array, y: Tensor, h: Array, t_next: Array, trial: Trial) -> None:
        rows = np.flatnonzero(accepted)
        outputs = self._output_times.within(rows, t[rows], t_next[rows])
        self.record.steps.append(AcceptedRows(rows, t[rows], h[rows], t_next[rows], outputs))
        if self._keep_states:
            self.states.append(y if accepted.all() else y[index_of(rows, y)])
        self._outputs += outputs_of_step(outputs, self._scheme, y, self.ops.steps(h), trial)

    def _next_slopes(self, accepted: Mask, others: Mask, trial: Trial) -> Tensor | None:
        """First slopes of the next step: those at the solution for samples that go on, the same again for others."""
        if not accepted.any():
            return trial.k[0]
        if not self._scheme.fsal:
            return None
        return torch.where(self._mask(accepted), trial.k[-1], trial.k[0]) if others.any() else trial.k[-1]

    def _mask(self, rows: Mask) -> Tensor:
        return torch.from_numpy(rows).view(self.ops.row_shape).to(self.ops.like.device)

    def _check_progress(self, rejected: Mask, t: Array, y: Tensor, h: Array, k: Tensor, ratio: Array) -> None:
        """Raises where a smaller step cannot help."""
        assert self.problem.controller is not None
        is_finite = np.isfinite(ratio)
        self._check_finite(rejected & ~is_finite, t, y, k, h, ratio)
        stuck = rejected & ((h < self.problem.controller.min_step) | (t + self._sign * h * 0.5 == t))
        if not stuck.any():
            return
        if self.problem.tolerance.forbids_error():
            self._check(stuck & (ratio == np.inf), StepSizeError, t, h, ratio, NO_TOLERANCE)
        self._check(stuck & ~is_finite, NonFiniteError, t, h, ratio)
        self._check(stuck, StepSizeError, t, h, ratio)

    def _check_finite(self, suspects: Mask, t: Array, y: Tensor, k: Tensor, h: Array, ratio: Array) -> None:
        if not suspects.any() or y.numel() == 0:
            return
        for what, x in (("the state is NaN or infinite at", y), ("func returned NaN or infinity at", k)):
            failed = suspects & ~torch.isfinite(x).reshape(len(x), -1).all(1).cpu().numpy()
            if not failed.any():
                continue
            row = int(failed.argmax())
            message = fault_of_start(self.problem.y0[row]) or f"{what} t={t[row]:.17g}; look at func there."
            self._check(failed, NonFiniteError, t, h, ratio, message)

    def _check(
        self, failed: Mask, kind: type[SolveError], t: Array, h: Array, ratio: Array, message: str | None = None
    ) -> None:
        if not failed.any():
            return
        row = int(failed.argmax())
        others = int(failed.sum()) - 1
        reason = message or reason_of(kind, self.problem.max_num_steps, self._end[row])
        raise kind(
            f"The solve of sample {row}{f' (and {others} more)' if others else ''} with {self.problem.tableau.name} "
            f"stopped: {reason}",
            t=float(t[row]),
            h=float(h[row]),
            error_ratio=float(ratio[row]),
            n_accepted=int(self._counts["accepted"][row]),
            n_rejected=int(self._counts["rejected"][row]),
            n_f_evals=self.field.n_evals,
            sample=row,
        )


_COUNTS = ("steps", "accepted", "rejected")


def stage_times(scheme: Scheme, t: Array, h: Array, t_next: Array) -> list[Array]:
    return [t_next if c == 1 else t + c * h for c in scheme.c]


def index_of(rows: Index, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def outputs_of_step(
    outputs: OutputRows, scheme: Scheme, y: Tensor, h: Tensor, trial: Trial
) -> list[tuple[Index, Index, Tensor]]:
    """(rows, index, states) of the outputs at the ends of the samples' steps, and of those inside."""
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
    """The states of all samples at all their times, (T, \\*packed shape); differentiable."""
    n_rows, n_times = shape
    places = np.concatenate([index * n_rows + rows for rows, index, _ in outputs])
    order = index_of(np.argsort(places), like).view(n_times, n_rows)
    return torch.cat([states for _, _, states in outputs])[order]
