"""The operations of a Runge-Kutta step by the fused kernels of the compiled extension ``_C``.

A solve calls ``operations_for`` once and gets an object bound to one layout (shape, strides, dtype, device). Kernels
take raw addresses. They receive only tensors that this object allocated or admitted, so every address belongs to memory
of this layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext import _C
from aca_ext.kernels.autograd import DifferentiableOperations
from aca_ext.kernels.extension import controller_for
from aca_ext.kernels.layout import aligned_rows, empty_rows, rows_like, scalars
from aca_ext.kernels.operations import Array, Floats, RowOperations, Slope, Tensors, TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.kernels.small_systems import SmallSystem, is_small
from aca_ext.problem.admission import is_plain
from aca_ext.problem.tolerance import Norm, Tolerance

__all__ = [
    "Array",
    "DifferentiableKernels",
    "DifferentiableRowKernels",
    "KernelOperations",
    "Norm",
    "RowKernels",
    "RowOperations",
    "Tolerance",
    "TorchOperations",
    "empty_rows",
    "has_kernels",
    "operations_for",
    "row_operations_for",
    "rows_like",
    "target_for",
]

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_THREADS_FROM = 1 << 15  # elements; in smaller states, waking threads costs more than they save
_SHARED_BYTES = 1 << 18  # largest allocation that stage states share
_FIRST_ROWS, _MOST_ROWS = 8, 32  # in a block of stage states


class _RowBlocks:
    """Allocates blocks of rows for stage states. A replay, which cannot reuse its rows, soon gets larger blocks."""

    def __init__(self, like: Tensor, largest: int) -> None:
        self._like, self._largest = like, max(1, min(_MOST_ROWS, largest))
        self._count = min(_FIRST_ROWS, self._largest)

    def __call__(self) -> Sequence[Tensor]:
        count = self._count
        self._count = min(2 * count, self._largest)
        return aligned_rows(count, self._like)


class KernelOperations(TorchOperations):
    """The operations by the fused kernels, on the CPU or a CUDA device; results have no autograd graph."""

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        super().__init__(like, tolerance)
        device = like.device
        self.backend = device.type
        self._n = like.numel()
        self._itemsize = like.element_size()
        self._sums = torch.empty(len(tolerance.sizes), dtype=torch.float64, device=device)
        self.steppers: dict[Any, _C.Stepper] = {}  # cache, by scheme
        self._iterations: _C.StageIterations | None = None
        if device.type == "cuda":
            self._workspace = torch.zeros(_C.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._on = target_for(like, self._workspace)
        else:
            self._on = target_for(like)
        rtol, atol = tolerance.rtol, tolerance.atol
        if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
            self._rtol_each, self._atol_each = self._spread(rtol), self._spread(atol)
            self._tolerances = (0.0, 0.0, self._rtol_each.data_ptr(), self._atol_each.data_ptr())
        else:
            self._tolerances = (rtol, atol, 0, 0)

    def _spread(self, tolerance: float | Tensor) -> Tensor:
        spread = torch.empty_like(self.like)
        return spread.copy_(tolerance) if isinstance(tolerance, Tensor) else spread.fill_(tolerance)

    def weighted_sum(self, base: Tensor | None, h: Number, x: Tensors, w: Floats, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty_like(self.like)
        start = 0 if base is None else base.data_ptr()
        address = out.data_ptr()
        x_address = [x_j.data_ptr() for x_j in x]
        if len(x_address) <= _C.MAX_TERMS:
            _C.weighted_sum(self._on, self._n, address, start, h, x_address, w)
        else:  # more terms than one launch takes: the next launch adds to the sum so far
            if len(w) != len(x_address):
                raise ValueError("x and w differ in length")
            for j in range(0, len(x_address), _C.MAX_TERMS):
                upto = j + _C.MAX_TERMS
                _C.weighted_sum(self._on, self._n, address, start, h, x_address[j:upto], tuple(w[j:upto]))
                start = address
        return out

    def solution_and_error(
        self, y: Tensor, h: Number, k: Tensors, b: Floats, error_weight: Floats, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if out is None:
            out = torch.empty_like(self.like)
        error = torch.empty_like(self.like)
        k_address = [k_j.data_ptr() for k_j in k]
        _C.solution_and_error(
            self._on, self._n, out.data_ptr(), error.data_ptr(), y.data_ptr(), h, k_address, b, error_weight
        )
        return out, error

    def error_norm(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Number:
        if self.tolerance.norm is not None:
            with torch.no_grad():
                return super().error_norm(partial, k, w, y0, y1)
        segments, limit = self.tolerance.segments, _C.MAX_SEGMENTS
        for first in range(0, len(segments) - 1, limit):
            _C.squared_error_ratio(
                self._on,
                segments[first : first + limit + 1],
                self._sums.data_ptr() + 8 * first,
                partial.data_ptr(),
                0 if k is None else k.data_ptr(),
                w,
                y0.data_ptr(),
                y1.data_ptr(),
                *self._tolerances,
            )
        return self.tolerance.norm_of_sums(self._sums.tolist())

    def relative_changes(self, change: Tensor, state: Tensor) -> tuple[Any, Any]:
        if self.backend != "cpu":
            return super().relative_changes(change, state)
        length = self._n // max(1, self.n_rows)
        sizes = _C.relative_changes(self._on, self.n_rows, length, change.data_ptr(), state.data_ptr())
        if not self.row_shape:
            return sizes[0], sizes[1]
        of_elements, of_largest = np.array(sizes).reshape(self.n_rows, 2).T
        return of_elements, of_largest

    def small_system(self, jacobians: Tensors, a: Sequence[Floats], h: Number) -> SmallSystem | None:
        if not is_small(self.like, jacobians[0], len(a)):
            return None
        return SmallSystem(self._on, self.like, self.admit, jacobians, a, h)

    def newton_iteration(
        self, system: Any, f: Slope, t: Tensors, base: Tensors, z: Tensors, y: Tensor | None
    ) -> tuple[list[Tensor], Any] | None:
        if self.row_shape or self.tolerance.norm is not None or not isinstance(system, SmallSystem):
            return None
        if self._iterations is None:
            self._iterations = _C.StageIterations(self._on, self._n, self.like, self._blocks(), self._norm())
        return self._iterations.iterate(system.compiled, f, t, base, z, y)

    def _blocks(self) -> _RowBlocks:
        return _RowBlocks(self.like, _SHARED_BYTES // max(1, self._n * self._itemsize))

    def _norm(self) -> tuple[Any, ...]:
        """The norm of the tolerance, which is none of the user's, for C++."""
        return (self.tolerance.segments, self._sums, *self._tolerances)

    def stepper(self, c: Any, rows: Any, solution: Any, fsal: bool) -> _C.Stepper:
        """The C++ object for a whole step, its transpose, or many steps per call.

        The arguments are parts of a ``runge_kutta.Scheme``; see ``runge_kutta.compiled_stepper``.
        """
        times = partial(scalars, max(len(c), 2), self.like)
        norm = self._norm() if self.tolerance.norm is None else None
        return _C.Stepper(self._on, self._n, c, rows, solution, fsal, self._blocks(), times, norm)

    def compiled_specification(self, problem: Any, slope: Any, step: Any) -> _C.CompiledSpecification:
        """The description of a ``Problem`` for the C++ loop over the compiled programs ``slope`` and ``step``."""
        tableau, control = problem.tableau, problem.controller
        return _C.CompiledSpecification(
            self._on,
            self._n,
            [float(x) for x in tableau.c],
            tableau.fsal,
            () if tableau.dense is None else tableau.dense_coefficients,
            *self._tolerances,
            self.tolerance.segments,
            controller_for(control),
            0.0 if control is None else control.first_step or 0.0,
            control is not None,
            problem.times,
            problem.step_ends if len(problem.times) > 1 else (),
            list(problem.jumps),
            problem.max_num_steps,
            slope,
            step,
        )

    def scalars(self, values: Sequence[Number]) -> Sequence[Tensor]:
        out = torch.empty(len(values), dtype=self.like.dtype, device=self.like.device)
        _C.write_scalars(self._on, out.data_ptr(), list(values))
        return out.unbind(0)


class RowKernels(RowOperations, KernelOperations):
    """``RowOperations`` by the fused kernels, where a row is a sample.

    On the CPU a sample gets the same bits as in a solve by itself. A GPU sums the error norms of a batch in another
    order than that of a single sample, so they may differ by rounding.
    """

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        super().__init__(like, tolerance)
        self._length = self._n // max(1, self.n_rows)
        self._sums = torch.empty(self.n_rows, len(tolerance.sizes), dtype=torch.float64, device=like.device)

    def weighted_sum(self, base: Tensor | None, h: Number, x: Tensors, w: Floats, out: Tensor | None = None) -> Tensor:
        if not isinstance(h, Tensor):
            return super().weighted_sum(base, h, x, w, out)
        if out is None:
            out = torch.empty_like(self.like)
        start = 0 if base is None else base.data_ptr()
        x_address = [x_j.data_ptr() for x_j in x]
        _C.weighted_sum_rows(self._on, self.n_rows, self._length, h.data_ptr(), out.data_ptr(), start, x_address, w)
        return out

    def solution_and_error(
        self, y: Tensor, h: Number, k: Tensors, b: Floats, error_weight: Floats, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if out is None:
            out = torch.empty_like(self.like)
        error = torch.empty_like(self.like)
        _C.solution_and_error_rows(
            self._on,
            self.n_rows,
            self._length,
            h.data_ptr(),
            out.data_ptr(),
            error.data_ptr(),
            y.data_ptr(),
            [k_j.data_ptr() for k_j in k],
            b,
            error_weight,
        )
        return out, error

    def _squared_error_ratios(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Tensor:
        if not isinstance(w, Tensor):
            w = torch.full(self.row_shape, w, dtype=torch.float64, device=self.like.device)
        segments, limit = self.tolerance.segments, _C.MAX_SEGMENTS
        if len(segments) - 1 > limit:  # more segments than one launch takes
            return super()._squared_error_ratios(partial, k, w, y0, y1)
        _C.squared_error_ratio_rows(
            self._on,
            self.n_rows,
            segments,
            w.data_ptr(),
            self._sums.data_ptr(),
            partial.data_ptr(),
            0 if k is None else k.data_ptr(),
            y0.data_ptr(),
            y1.data_ptr(),
            *self._tolerances,
        )
        return self._sums


class DifferentiableKernels(DifferentiableOperations, KernelOperations):
    """The kernels on states, with an autograd graph."""


class DifferentiableRowKernels(DifferentiableKernels, RowKernels):
    """The kernels on batches of independent samples, with an autograd graph."""


def target_for(like: Tensor, workspace: Tensor | None = None) -> _C.Target:
    """The device, dtype and threads for kernels on states laid out like ``like``; on a GPU the current stream too."""
    device = like.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    threads = torch.get_num_threads() if like.numel() >= _THREADS_FROM else 1
    address = 0 if workspace is None else workspace.data_ptr()
    return _C.Target(device.type, _DTYPES[like.dtype], threads, device.index or 0, stream, address)


def has_kernels(like: Tensor) -> bool:
    """Tells whether this build has kernels for the dtype and device of ``like``."""
    if not is_plain(like) or like.dtype not in _DTYPES:
        return False
    return like.device.type == "cpu" or (like.device.type == "cuda" and _C.HAS_CUDA)


def operations_for(like: Tensor, tolerance: Tolerance, *, differentiable: bool = False) -> TorchOperations:
    """The fastest operations for states laid out like ``like``."""
    if not has_kernels(like):
        return TorchOperations(like, tolerance)
    return (DifferentiableKernels if differentiable else KernelOperations)(like, tolerance)


def row_operations_for(like: Tensor, tolerance: Tolerance, *, differentiable: bool = False) -> RowOperations:
    """The fastest operations for a batch of independent samples; each sample of ``like`` fills one block of memory."""
    if not has_kernels(like):
        return RowOperations(like, tolerance)
    return (DifferentiableRowKernels if differentiable else RowKernels)(like, tolerance)
