"""The user's f on a batch of independent samples, each with a time of its own; on request on some samples only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import OptionError
from aca_ext.kernels.operations import TorchOperations
from aca_ext.problem.batch import RowPacking
from aca_ext.problem.state import State
from aca_ext.vector_field.field import VectorField
from aca_ext.vector_field.slope_check import checked_slope_function

Index = NDArray[np.int64]

_ROUNDING = 1e3  # deviation of a step, in units of the dtype's spacing, that another number of rows may cause


class RowField(VectorField):
    """f of a batch whose samples have each a time of their own.

    Attributes:
        seen: samples that func evaluates; None for all. The slopes of the others are zero.
    """

    def __init__(self, func: Callable[..., State], args: Sequence[Any], packing: RowPacking, ops: TorchOperations):
        super().__init__(func, args, packing, ops)
        self._time_shape, self._n_rows = packing.time_shape, packing.n_rows
        self.seen: Index | None = None
        self._seen_rows: Tensor | None = None
        self._earlier_evals = self._earlier_rows = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        t = t if t.shape == self._time_shape else t.view(self._time_shape)
        rows = self._seen_rows
        if rows is None:
            return super().__call__(t, y)
        return torch.zeros_like(y).index_copy_(0, rows, super().__call__(t[rows], y[rows]))

    @property
    def n_evals(self) -> int:
        return self._earlier_evals + super().n_evals

    @property
    def n_rows_evaluated(self) -> int:
        """Number of evaluations of single samples."""
        n_rows = self._n_rows if self.seen is None else len(self.seen)
        return self._earlier_rows + super().n_evals * n_rows

    def with_args(self, args: Sequence[Any]) -> RowField:
        other = copy.copy(self)
        other.args = tuple(args)
        assert isinstance(self.packing, RowPacking)
        fresh = RowField(self.func, other.args, self.packing, self._ops)
        other.__dict__.update({name: getattr(fresh, name) for name in _OF_EVALUATIONS})
        return other

    def see(self, rows: Index | None) -> None:
        """Restricts evaluations to the samples ``rows``. Of tensors in args, those with a row per sample follow."""
        if rows is self.seen:
            return
        self._earlier_evals, self._earlier_rows = self.n_evals, self.n_rows_evaluated
        self.seen, self._seen_rows = rows, None
        if rows is None:
            self._call = checked_slope_function(self.func, self.args, self.packing, self._ops)
            return
        found = self._seen_rows = torch.from_numpy(rows).to(self._device)
        is_own = [isinstance(a, Tensor) and a.dim() > 0 and len(a) == self._n_rows for a in self.args]
        func = self.func

        def of_rows(t: Tensor, y: State, *args: Any) -> State:
            own = zip(args, is_own, strict=True)
            return func(t, y, *(a.index_select(0, found) if is_row else a for a, is_row in own))

        shapes = tuple(torch.Size((len(rows), *shape[1:])) for shape in self.packing.shapes)
        ops = TorchOperations(self._ops.like[found], self._ops.tolerance)
        self._call = checked_slope_function(of_rows, self.args, self.packing.with_shapes(shapes), ops)

    def see_fewer(self, rows: Index, t: Tensor, y: Tensor, h: Tensor, k: Tensor | None) -> None:
        """``see`` with a comparison: func must return for these samples what it returns among all that it sees now.

        Args:
            t, y, h: times, states and step sizes of all samples.
            k: slopes at (t, y); None if they are not known.

        Raises:
            OptionError: func fails on fewer samples, or returns other slopes.
        """
        advice = (
            "Option compact=True takes a func that reads what belongs to a sample from t, y and args, in tensors whose "
            "first dimension is the batch; no other tensor in args has that length. Change func, or leave compact out."
        )
        with torch.no_grad(), self.aside():
            expected = self(t, y) if k is None else k
            self.see(rows)
            try:
                given = self(t, y)
            except Exception as error:
                raise OptionError(
                    f"func fails on {len(rows)} of {self._n_rows} samples ({type(error).__name__}: {error}). {advice}"
                ) from error
            of_rows = self._seen_rows
            deviation = ((given - expected) * h)[of_rows].reshape(len(rows), -1).abs()
            size = torch.maximum(y.abs(), (expected * h).abs())[of_rows].reshape(len(rows), -1)
            allowed = _ROUNDING * torch.finfo(y.dtype).eps * size.amax(1, keepdim=True)
            is_finite = torch.isfinite(expected[of_rows]).reshape(len(rows), -1)
            wrong = (is_finite & ~(deviation <= allowed)).any(1)
        if size.numel() and wrong.any():
            sample = int(rows[int(wrong.nonzero()[0])])
            raise OptionError(
                f"func returns another slope for sample {sample} among {len(rows)} samples than among more. {advice}"
            )


_OF_EVALUATIONS = ("_call", "seen", "_seen_rows", "_earlier_evals", "_earlier_rows")
