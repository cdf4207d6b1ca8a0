"""Events of independent samples: located in each accepted step and recorded. A row is a sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aca_ext.kernels.fused import Array, RowOperations
from aca_ext.problem.batch import BatchProblem
from aca_ext.solver.batch_event_search import FoundRows, RowEventSearch
from aca_ext.solver.batch_record import BatchOccurrences, Mask, OutputRows, index_of
from aca_ext.solver.event_search import STEPS_BEFORE
from aca_ext.solver.runge_kutta import Trial


class BatchEvents:
    """The events of the solve of one batch.

    Attributes:
        ended_by: index of the event that ended the solve of each sample, -1 for none.
    """

    def __init__(self, problem: BatchProblem, ops: RowOperations) -> None:
        self._problem, self._ops = problem, ops
        shape = problem.packing.time_shape
        self._search = RowEventSearch(problem.events, problem.packing, lambda t: ops.scalars([t])[0].view(shape))
        self._counts = np.zeros(ops.n_rows, dtype=np.int64)  # of all occurrences so far
        self._found: list[BatchOccurrences] = []
        self.ended_by = np.full(ops.n_rows, -1)

    def start(self, t: Array, y: Tensor, slope: Tensor | None, h: Array, rows: Mask) -> None:
        """Computes the signs of the event functions at the start; ``h`` are the sizes of the first steps."""
        length = self._problem.last_times - t
        reach = np.sign(length) * np.minimum(np.abs(length), np.maximum(np.abs(t), STEPS_BEFORE * h))
        self._search.start(t, y.detach(), slope, reach, rows)

    def find(self, rows: Mask, t: Array, t_next: Array, y: Tensor, h: Tensor, trial: Trial) -> tuple[OutputRows, Array]:
        """Records the events in the steps that the samples ``rows`` accepted.

        Returns:
            Their states as further outputs; for each sample the position at which an event ends its solve, or infinity.
        """
        tableau = self._problem.tableau
        is_accepted = torch.from_numpy(rows).view(self._ops.row_shape).to(y.device)

        def state_at(theta: Array) -> Tensor:
            weights = [np.broadcast_to(w, theta.shape) for w in tableau.dense_weights(theta)]
            is_end = torch.from_numpy(theta == 1.0).view(self._ops.row_shape).to(y.device)
            inside = y + h.to(y.dtype) * self._weighted(weights, trial)
            return torch.where(is_accepted, torch.where(is_end, trial.y1, inside), y)

        with torch.no_grad():
            found, end = self._search.within(t, t_next, state_at, rows)
            ended = np.isfinite(end)
            if len(found.rows):
                self._record(found, t, t_next, y, trial)
            self._note_end(found, end)
        places = self._found[-1].index if len(found.rows) else found.rows
        return OutputRows(found.rows, places, found.theta), np.where(ended, end, np.inf)

    def _weighted(self, weights: list[Array], trial: Trial) -> Tensor | float:
        """Σ w_i·k_i with a weight for each sample."""
        total: Tensor | float = 0.0
        for w, k in zip(weights, trial.k, strict=True):
            if (w != 0).any():
                total = total + torch.from_numpy(w.copy()).view(self._ops.row_shape).to(k) * k
        return total

    def _record(self, found: FoundRows, t: Array, t_next: Array, y: Tensor, trial: Trial) -> None:
        rows, theta = found.rows, found.theta
        time = np.where(theta == 1.0, t_next[rows], t[rows] + theta * (t_next - t)[rows])
        of_rows = index_of(rows, y)
        derivative = torch.zeros_like(y[of_rows])
        for w, k in zip(self._problem.tableau.dense_derivative_weights(theta), trial.k, strict=True):
            each = torch.from_numpy(np.broadcast_to(w, theta.shape).copy()).to(k)
            derivative += each.view(-1, *self._ops.row_shape[1:]) * k[of_rows]
        # Occurrences of one sample follow one another in ``found``.
        is_first = np.concatenate([[True], rows[1:] != rows[:-1]])
        start = np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))
        n_times = self._problem.times_of_rows.shape[1]
        index = n_times + self._counts[rows] + np.arange(len(rows)) - start
        np.add.at(self._counts, rows, 1)
        self._found.append(BatchOccurrences(rows, found.event, found.element, time, index, derivative))

    def _note_end(self, found: FoundRows, end: Array) -> None:
        """Notes which event ended a sample: a terminal one, if several occur at once."""
        events = self._problem.events
        for row, theta, event in zip(found.rows.tolist(), found.theta.tolist(), found.event.tolist(), strict=True):
            if theta == end[row] and events[event].ends_segment:
                before = self.ended_by[row]
                if before < 0 or (events[event].terminal and not events[before].terminal):
                    self.ended_by[row] = event

    @property
    def n_outputs(self) -> int:
        """The largest number of occurrences in a sample."""
        return int(self._counts.max(initial=0))

    def occurrences(self) -> BatchOccurrences | None:
        """All of them; None if there are none."""
        if not self._found:
            return None
        every = self._found
        order = np.argsort(np.concatenate([one.rows for one in every]), kind="stable")
        derivative = torch.cat([one.derivative for one in every])
        return BatchOccurrences(
            rows=np.concatenate([one.rows for one in every])[order],
            event=np.concatenate([one.event for one in every])[order],
            element=np.concatenate([one.element for one in every])[order],
            t=np.concatenate([one.t for one in every])[order],
            index=np.concatenate([one.index for one in every])[order],
            derivative=derivative[index_of(order, derivative)],
        )
