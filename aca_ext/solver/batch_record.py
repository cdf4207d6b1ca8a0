"""The accepted steps of a batch of independent samples, and the outputs inside them. A row is a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.kernels.fused import Array
from aca_ext.numerics.weights import Weights
from aca_ext.solver.runge_kutta import Trial

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]
Outputs = tuple[Index, Index, Tensor]  # samples, indices of their times, states


@dataclass(frozen=True)
class OutputRows:
    """Outputs that fall into one step of the batch; one entry per output.

    Attributes:
        rows: index of the sample.
        index: index of the requested time among the times of that sample; beyond them, that of an event.
        theta: position of that time in the step of that sample, from 0 to 1.
    """

    rows: Index
    index: Index
    theta: Array

    def where(self, mask: Mask) -> OutputRows:
        return OutputRows(self.rows[mask], self.index[mask], self.theta[mask])

    def followed_by(self, other: OutputRows) -> OutputRows:
        rows, index = np.concatenate([self.rows, other.rows]), np.concatenate([self.index, other.index])
        return OutputRows(rows, index, np.concatenate([self.theta, other.theta]))


@dataclass(frozen=True)
class AcceptedRows:
    """Steps that several samples took in the same iteration of the loop; one entry per sample.

    Attributes:
        rows: indices of the samples whose step was accepted.
        t, t_next: start and end of the step.
        h: signed step size.
        outputs: outputs that fall into these steps.
        seen: samples that func evaluated in these steps; None for all.
        ended: samples whose solve was ended inside these steps, by an event.
    """

    rows: Index
    t: Array
    h: Array
    t_next: Array
    outputs: OutputRows
    seen: Index | None = None
    ended: Index = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def where(self, mask: Mask) -> AcceptedRows:
        """The steps of those samples for which ``mask`` is true."""
        outputs = self.outputs.where(np.isin(self.outputs.rows, self.rows[mask]))
        ended = self.ended[np.isin(self.ended, self.rows[mask])]
        return AcceptedRows(self.rows[mask], self.t[mask], self.h[mask], self.t_next[mask], outputs, self.seen, ended)


@dataclass(frozen=True)
class BatchOccurrences:
    """Occurrences of events, ordered by sample, then along its solve; one entry per occurrence.

    Attributes:
        rows: index of the sample.
        event, element: index of the event, and of the element that changed its sign.
        t: time.
        index: index of the state there among the outputs of that sample.
        derivative: dy/dt of the dense output there, packed.
    """

    rows: Index
    event: Index
    element: Index
    t: Array
    index: Index
    derivative: Tensor


@dataclass
class BatchRecord:
    """The accepted steps of a batch, in order.

    Attributes:
        failed: True for samples that failed; they have steps, but no outputs.
        rest_times: times at which the samples rest after their last step, where func exists.
        is_missing: (outputs, batch), True for outputs that a sample does not have; set at the end of the solve.
        occurrences: occurrences of events; None if there are none.
        ended_by: index of the event that ended the solve of each sample, -1 for none.
    """

    n_rows: int
    steps: list[AcceptedRows] = field(default_factory=lambda: list[AcceptedRows]())

    def __post_init__(self) -> None:
        self.failed: Mask = np.zeros(self.n_rows, dtype=np.bool_)
        self.rest_times = np.zeros(self.n_rows)
        self.is_missing: Mask = np.zeros((0, self.n_rows), dtype=np.bool_)
        self.occurrences: BatchOccurrences | None = None
        self.ended_by: Index = np.full(self.n_rows, -1)

    def without_failures(self, states: Sequence[Tensor]) -> tuple[BatchRecord, list[Tensor]]:
        """The record of the samples that did not fail, with the states before their steps and the last states."""
        if not self.failed.any():
            return self, list(states)
        kept, starts = BatchRecord(self.n_rows), list[Tensor]()
        kept.failed, kept.rest_times, kept.is_missing = self.failed, self.rest_times, self.is_missing
        for s, start in zip(self.steps, states, strict=False):
            mask = ~self.failed[s.rows]
            if mask.any():
                kept.steps.append(s.where(mask))
                starts.append(start[index_of(np.flatnonzero(mask), start)])
        return kept, [*starts, states[-1]]

    def bounds(self) -> tuple[Tensor, ...]:
        """Start and end of every accepted step: per sample an (n_accepted, 2) float64 tensor on the CPU."""
        if not self.steps:
            return tuple(torch.zeros(0, 2, dtype=torch.float64, device="cpu") for _ in range(self.n_rows))
        rows = np.concatenate([s.rows for s in self.steps])
        ends = np.stack([np.concatenate([getattr(s, end) for s in self.steps]) for end in ("t", "t_next")], 1)
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=self.n_rows)
        return torch.from_numpy(ends[order]).split(counts.tolist())


def index_of(rows: Index, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def outputs_of_step(outputs: OutputRows, tableau: Weights, y: Tensor, h: Tensor, trial: Trial) -> list[Outputs]:
    """Tuples (samples, indices of their times, states): first outputs at step ends, then outputs by dense output."""
    found: list[Outputs] = []
    at_end = outputs.where(outputs.theta == 1.0)
    if len(at_end.rows):
        found.append((at_end.rows, at_end.index, trial.y1[index_of(at_end.rows, y)]))
    inside = outputs.where(outputs.theta != 1.0)
    if len(inside.rows):
        rows = index_of(inside.rows, y)
        dense = [tableau.dense_weights(theta) for theta in inside.theta.tolist()]
        weights = torch.tensor(dense, dtype=torch.float64, device="cpu").to(y)
        total = sum(
            w.view(-1, *h.shape[1:]) * k[rows]
            for w, k, is_used in zip(weights.T, trial.k, weights.any(0).tolist(), strict=True)
            if is_used
        )
        found.append((inside.rows, inside.index, y[rows] + h[rows].to(y.dtype) * total))
    return found


def order_of(outputs: Sequence[Outputs], shape: tuple[int, int]) -> Index:
    """For each output of each sample its number among ``outputs``; their count for one that a sample does not have.

    ``shape`` is (outputs, batch), as that of the result.
    """
    places = np.concatenate([index * shape[1] + rows for rows, index, _ in outputs])
    order = np.full(shape[0] * shape[1], len(places))
    order[places] = np.arange(len(places))
    return order.reshape(shape)


def assemble(outputs: Sequence[Outputs], shape: tuple[int, int], like: Tensor) -> Tensor:
    """Arranges outputs by time and sample into one tensor, (outputs, \\*packed shape), NaN where there is none.

    Differentiable; the cotangents of missing outputs go nowhere.
    """
    order = order_of(outputs, shape)
    states = [states for _, _, states in outputs]
    if order.size and order.max() == sum(map(len, states)):
        states.append(like.new_full((1, *like.shape[1:]), math.nan))
    return torch.cat(states)[index_of(order, like)]
