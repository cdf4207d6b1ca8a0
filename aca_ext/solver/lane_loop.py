"""The adaptive loop inside transforms: chooses the steps of each sample of vmap from values alone.

A sample of vmap has steps of its own, the same that it takes alone. Tensors stay inside the transforms, since func may
use others that are; step sizes, times and norms go in and out as arrays with an entry for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.kernels import reference
from aca_ext.kernels.operations import Array, Floats, RowOperations, Tensors
from aca_ext.kernels.reference import Number
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.tolerance import Tolerance
from aca_ext.problem.transforms import Batches
from aca_ext.solver.batch_failures import SampleFailures
from aca_ext.solver.batch_loop import BatchSolver
from aca_ext.solver.batch_record import AcceptedRows, Index, Mask, OutputRows
from aca_ext.solver.runge_kutta import Trial
from aca_ext.vector_field.slope_function import SlopeFunction

_NO_OUTPUTS = OutputRows(*(np.zeros(0, dtype=np.int64),) * 2, np.zeros(0))


class TransformedLanes:
    """Samples of vmap, and within each of them the rows of the state if these are independent: conversions of arrays.

    Args:
        row_shape: (rows, 1, ..., 1) for independent rows, else ().
    """

    def __init__(self, batches: Batches, row_shape: tuple[int, ...]) -> None:
        self.batches, self.row_shape = batches, row_shape
        self.count = batches.count * (row_shape[0] if row_shape else 1)

    def wrap(self, values: NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An array with an entry for each sample and row, as a tensor that broadcasts to a state."""
        return self.batches.wrap(values.reshape(self.batches.count, *self.row_shape), dtype, device)

    def read(self, x: Tensor) -> NDArray[Any]:
        """A tensor (\\*entries), or (rows, \\*entries) for independent rows, as an array (count, \\*entries)."""
        values = self.batches.read(x)
        return values.reshape(self.count, *values.shape[2:]) if self.row_shape else values

    def numbers(self, values: Array, like: Tensor) -> Tensor:
        return self.wrap(values, like.dtype, like.device)

    def pick(self, stacked: Tensor, index: Index) -> Tensor:
        if not self.row_shape:
            return stacked[self.batches.wrap(index, torch.int64, stacked.device)]
        by_row = index.reshape(self.batches.count, self.row_shape[0], -1).transpose(0, 2, 1)
        rows = torch.arange(self.row_shape[0], device=stacked.device)
        return stacked[self.batches.wrap(by_row, torch.int64, stacked.device), rows]

    def weights(self, values: Array, like: Tensor) -> Tensor:
        n_times = values.shape[1]
        if self.row_shape:
            values = values.reshape(self.batches.count, self.row_shape[0], n_times).transpose(0, 2, 1)
        wrapped = self.batches.wrap(values, like.dtype, like.device)
        return wrapped.reshape(n_times, *(self.row_shape or (1,) * (like.dim() - 1)))


class LaneOperations(RowOperations):
    """The operations of a step on values alone: results are detached from every graph and tangent."""

    def __init__(self, like: Tensor, tolerance: Tolerance, lanes: TransformedLanes) -> None:
        self.like, self.tolerance, self._lanes = like, tolerance, lanes
        self.n_rows, self.row_shape = lanes.count, lanes.row_shape

    def admit(self, x: Tensor, what: str = "") -> Tensor:
        return x

    def weighted_sum(self, base: Tensor | None, h: Number, x: Tensors, w: Floats, out: Tensor | None = None) -> Tensor:
        return reference.weighted_sum(base, h, x, w).detach()

    def steps(self, h: Array) -> Tensor:
        return self._lanes.wrap(h.copy(), reference.widest_dtype(self.like.device), self.like.device)

    def scalars(self, values: Sequence[Any]) -> Sequence[Tensor]:
        return [self._lanes.numbers(value, self.like) for value in values]

    def error_norm(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Array:
        t = self.tolerance
        sums_of = reference.squared_error_ratios_of_rows if self.row_shape else reference.squared_error_ratios
        return self._norms_of(self._lanes.read(sums_of(partial, k, w, y0, y1, t.rtol, t.atol, t.segments)))


class LaneField:
    """f with a count of its evaluations, as ``BatchSolver`` calls it; each evaluates ``n_lanes`` samples."""

    def __init__(self, f: SlopeFunction, n_lanes: int) -> None:
        self._f, self._n_lanes, self.n_evals = f, n_lanes, 0

    @property
    def n_rows_evaluated(self) -> int:
        return self.n_evals * self._n_lanes

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.n_evals += 1
        return self._f(t, y)

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()


class LaneFailures(SampleFailures):
    def __init__(self, problem: BatchProblem, field: LaneField, control: Any, lanes: TransformedLanes) -> None:
        super().__init__(problem, field, control)  # type: ignore[arg-type]
        self._lanes = lanes

    def _are_finite(self, x: Tensor) -> Mask:
        return np.asarray(self._lanes.read(torch.isfinite(x)).reshape(self._lanes.count, -1).all(1))

    def _fault_of_start(self, row: int) -> str | None:
        return None


class LaneSolver(BatchSolver):
    """``BatchSolver`` that only chooses steps: it keeps no states and makes no outputs."""

    def __init__(
        self, problem: BatchProblem, field: LaneField, ops: LaneOperations, k0: Tensor, lanes: TransformedLanes
    ) -> None:
        super().__init__(problem, field, ops, k0, keep_states=False)  # type: ignore[arg-type]
        self._lanes = lanes
        self._failures = LaneFailures(problem, field, self._control, lanes)

    def choose_steps(self, y: Tensor) -> None:
        """Solves from the packed state ``y``; fills the record and the counts.

        Raises:
            SolveError: a sample did not reach its last time.
            FurtherBatchError: func is batched by a vmap that its first slope did not show.
        """
        if self.problem.times_of_rows.shape[1] > 1 and self._lanes.count > 0:
            self._run(y.detach())
        self._count()

    def _accept(self, accepted: Mask, t: Array, y: Tensor, h: Array, t_next: Array, trial: Trial) -> Mask:
        rows = np.flatnonzero(accepted)
        self.record.steps.append(AcceptedRows(rows, t[rows], h[rows], t_next[rows], _NO_OUTPUTS))
        return accepted

    def _mask(self, rows: Mask) -> Tensor:
        return self._lanes.wrap(rows, torch.bool, self.ops.like.device)
