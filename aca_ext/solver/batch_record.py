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
from aca_ext.solver.runge_kutta import Scheme, Trial

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]
Outputs = tuple[Index, Index, Tensor]  # samples, indices of their times, states


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
        seen: samples that func evaluated in these steps; None for all.
    """

    rows: Index
    t: Array
    h: Array
    t_next: Array
    outputs: OutputRows
    seen: Index | None = None

    def where(self, mask: Mask) -> AcceptedRows:
        """The steps of those samples for which ``mask`` is true."""
        outputs = self.outputs.where(np.isin(self.outputs.rows, self.rows[mask]))
        return AcceptedRows(self.rows[mask], self.t[mask], self.h[mask], self.t_next[mask], outputs, self.seen)


@dataclass
class BatchRecord:
    """The accepted steps of a batch, in order.

    Attributes:
        failed: True for samples that failed; they have steps, but no outputs.
    """

    n_rows: int
    steps: list[AcceptedRows] = field(default_factory=lambda: list[AcceptedRows]())

    def __post_init__(self) -> None:
        self.failed: Mask = np.zeros(self.n_rows, dtype=np.bool_)

    def without_failures(self, states: Sequence[Tensor]) -> tuple[BatchRecord, list[Tensor]]:
        """The record of the samples that did not fail, with the states before their steps and the last states."""
        if not self.failed.any():
            return self, list(states)
        kept, starts = BatchRecord(self.n_rows), list[Tensor]()
        kept.failed = self.failed
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


def outputs_of_step(outputs: OutputRows, scheme: Scheme, y: Tensor, h: Tensor, trial: Trial) -> list[Outputs]:
    """Tuples (samples, indices of their times, states): first outputs at step ends, then outputs by dense output."""
    found: list[Outputs] = []
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


def assemble(outputs: Sequence[Outputs], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Arranges outputs by time and sample into one tensor, (T, \\*packed shape), NaN where there is none.

    Differentiable; the cotangents of missing outputs go nowhere.
    """
    n_rows, n_times = shape
    places = np.concatenate([index * n_rows + rows for rows, index, _ in outputs])
    order = np.full(n_times * n_rows, len(places))
    order[places] = np.arange(len(places))
    states = [states for _, _, states in outputs]
    if len(places) < len(order):
        states.append(like.new_full((1, *like.shape[1:]), math.nan))
    return torch.cat(states)[index_of(order, like).view(n_times, n_rows)]
