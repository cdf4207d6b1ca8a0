"""The operations of a Runge-Kutta step on tensors: checks, addresses and streams. The only module that imports ``_C``.

Whoever solves asks ``operations_for`` once and gets an object bound to one layout (shape, strides, dtype, device).
Only tensors that the object allocated or admitted reach a kernel, so addresses are always of memory laid out alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext import _C, reference
from aca_ext.reference import Number

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_THREADS_FROM = 1 << 15  # elements; below, waking threads costs more than they save
_ALIGNMENT = 64  # bytes
_SHARED_BYTES = 1 << 15  # stage states below this size share allocations up to it

Array = NDArray[np.float64]

# Norm of an error ratio given by the user: tensor in, number out.
Norm = Callable[[Tensor], Any]


class Tolerance:
    """rtol, atol and the norm that an error is measured with."""

    def __init__(
        self, rtol: float | Tensor, atol: float | Tensor, segments: Sequence[int], norm: Norm | None = None
    ) -> None:
        self.rtol, self.atol, self.norm = rtol, atol, norm
        self.segments = list(segments)
        self.sizes = [hi - lo for lo, hi in pairwise(segments)]

    def forbids_error(self) -> bool:
        """Whether some element may have no error at all: its rtol and atol are both zero."""
        return bool((torch.as_tensor(self.rtol) + torch.as_tensor(self.atol) == 0).any())

    def norm_of_sums(self, sums: Sequence[float]) -> float:
        """The largest RMS over the segments; NaN where any is."""
        if len(sums) == 1 and self.sizes[0]:
            return math.sqrt(sums[0] / self.sizes[0])
        if math.isnan(sum(sums)):
            return math.nan
        return math.sqrt(max((s / n for s, n in zip(sums, self.sizes, strict=True) if n), default=0.0))


class TorchOperations:
    """The operations by ``reference``: on any device, differentiable in all operands and in the step size."""

    backend = "reference"

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        self.like, self.tolerance = like, tolerance
        self.stride = like.stride()

    def admit(self, x: Tensor) -> Tensor:
        """``x``, a copy only where its elements are laid out unlike the state's."""
        if x.stride() == self.stride and not x.is_neg():
            return x
        if x.requires_grad and torch.is_grad_enabled():
            return _Relayout.apply(x, self.like)
        return torch.empty_like(self.like).copy_(x)

    def weighted_sum(
        self, base: Tensor | None, h: Number, x: Sequence[Tensor], w: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """base + h·Σ_j w[j]·x[j], or without base h·Σ_j w[j]·x[j]; into ``out`` where given."""
        result = reference.weighted_sum(base, h, x, w)
        return result if out is None else out.copy_(result)

    def solution_and_error(
        self,
        y: Tensor,
        h: Number,
        k: Sequence[Tensor],
        b: Sequence[float],
        error_weight: Sequence[float],
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """y + h·Σ_j b[j]·k[j] and h·Σ_j error_weight[j]·k[j]."""
        return self.weighted_sum(y, h, k, b, out), reference.weighted_sum(None, h, k, error_weight)

    def error_norm(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Number:
        """The norm of (partial + w·k) / (atol + rtol·max(|y0|, |y1|))."""
        tolerance = self.tolerance
        if tolerance.norm is not None:
            if isinstance(w, Tensor):
                w = w.to(partial.dtype)
            error = partial if k is None else partial + w * k
            ratio = error / (tolerance.atol + tolerance.rtol * torch.maximum(y0.abs(), y1.abs()))
            return self._as_number(tolerance.norm(ratio))
        sums = reference.squared_error_ratios(partial, k, w, y0, y1, tolerance.rtol, tolerance.atol, tolerance.segments)
        if sums.requires_grad:
            sizes = torch.tensor(tolerance.sizes, dtype=sums.dtype, device=sums.device).clamp(min=1)
            worst = (sums / sizes).max()
            return worst.sqrt().cpu() if worst != 0 else worst.detach().cpu()
        return tolerance.norm_of_sums(sums.tolist())

    @staticmethod
    def _as_number(norm: Any) -> Number:
        if isinstance(norm, Tensor) and norm.requires_grad:
            return norm.double().cpu()
        return float(norm)

    def scalars(self, values: Sequence[Number]) -> Sequence[Tensor]:
        """Numbers as 0-d tensors of the state's dtype and device."""
        if any(isinstance(v, Tensor) for v in values):
            return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values]).to(self.like).unbind(0)
        return torch.tensor(values, dtype=self.like.dtype, device=self.like.device).unbind(0)


class KernelOperations(TorchOperations):
    """The operations by the fused kernels, on the CPU or a CUDA device, outside autograd."""

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        super().__init__(like, tolerance)
        device = like.device
        self.backend = device.type
        self._n = n = like.numel()
        self._itemsize = like.element_size()
        self._sums = torch.empty(len(tolerance.sizes), dtype=torch.float64, device=device)
        self._workspace = torch.zeros(
            _C.WORKSPACE_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device
        )
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        threads = torch.get_num_threads() if n >= _THREADS_FROM else 1
        self._on = _C.Target(
            device.type, _DTYPES[like.dtype], threads, device.index or 0, stream, self._workspace.data_ptr()
        )
        rtol, atol = tolerance.rtol, tolerance.atol
        if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
            self._rtol_each, self._atol_each = self._spread(rtol), self._spread(atol)
            self._tolerances = (0.0, 0.0, self._rtol_each.data_ptr(), self._atol_each.data_ptr())
        else:
            self._tolerances = (rtol, atol, 0, 0)

    def _spread(self, tolerance: float | Tensor) -> Tensor:
        spread = torch.empty_like(self.like)
        return spread.copy_(tolerance) if isinstance(tolerance, Tensor) else spread.fill_(tolerance)

    def weighted_sum(
        self, base: Tensor | None, h: Number, x: Sequence[Tensor], w: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty_like(self.like)
        start = 0 if base is None else base.data_ptr()
        address = out.data_ptr()
        x_address = [x_j.data_ptr() for x_j in x]
        if len(x_address) <= _C.MAX_TERMS:
            _C.weighted_sum(self._on, self._n, address, start, h, x_address, w)
        else:  # more terms than one launch takes: continue on the sum so far
            if len(w) != len(x_address):
                raise ValueError("x and w differ in length")
            for j in range(0, len(x_address), _C.MAX_TERMS):
                upto = j + _C.MAX_TERMS
                _C.weighted_sum(self._on, self._n, address, start, h, x_address[j:upto], tuple(w[j:upto]))
                start = address
        return out

    def solution_and_error(
        self,
        y: Tensor,
        h: Number,
        k: Sequence[Tensor],
        b: Sequence[float],
        error_weight: Sequence[float],
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if out is None:
            out = torch.empty_like(self.like)
        error = torch.empty_like(self.like)
        _C.solution_and_error(
            self._on,
            self._n,
            out.data_ptr(),
            error.data_ptr(),
            y.data_ptr(),
            h,
            [k_j.data_ptr() for k_j in k],
            b,
            error_weight,
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

    def stepper(self, c: Any, rows: Any, solution: Any, fsal: bool) -> _C.Stepper:
        """A whole step, its transpose, or many steps in one call; ``runge_kutta`` and ``solver`` say what they do."""
        like, tolerance, stages = self.like, self.tolerance, len(c)
        states = partial(_aligned_rows, max(1, min(16, _SHARED_BYTES // max(1, self._n * self._itemsize))), like)
        times = partial(_times, max(2 * stages, 16), like)
        norm = None
        if tolerance.norm is None:
            norm = (tolerance.segments, self._sums.data_ptr(), *self._tolerances)
        return _C.Stepper(self._on, self._n, c, rows, solution, fsal, states, times, norm)

    def norm_of_step(self) -> float:
        """The error norm of the last step that a ``stepper`` made."""
        return self.tolerance.norm_of_sums(self._sums.tolist())

    def compiled_specification(self, problem: Any, slope: Any, step: Any) -> _C.CompiledSpecification:
        """A ``Problem`` for the loop over these compiled programs."""
        tableau, control = problem.tableau, problem.controller
        coefficients = dict.fromkeys(_COEFFICIENTS, 1) if control is None else control.coefficients
        return _C.CompiledSpecification(
            self._on,
            self._n,
            [float(x) for x in tableau.c],
            tableau.fsal,
            () if tableau.dense is None else tableau.dense_coefficients,
            *self._tolerances,
            self.tolerance.segments,
            compiled_controller(**coefficients),
            0.0 if control is None else control.first_step or 0.0,
            problem.times,
            problem.stops,
            list(problem.jumps),
            problem.grid or (),
            problem.max_num_steps,
            slope,
            step,
        )

    def scalars(self, values: Sequence[Number]) -> Sequence[Tensor]:
        out = torch.empty(len(values), dtype=self.like.dtype, device=self.like.device)
        _C.write_scalars(self._on, out.data_ptr(), list(values))
        return out.unbind(0)


def empty_rows(count: int, like: Tensor) -> Tensor:
    """Uninitialised (count, \\*like.shape), each row laid out in memory like ``like``."""
    return torch.empty_strided(
        (count, *like.shape), (like.numel(), *like.stride()), dtype=like.dtype, device=like.device
    )


def _aligned_rows(count: int, like: Tensor) -> Sequence[Tensor]:
    """``count`` uninitialised tensors laid out in memory like ``like``, each aligned like an allocation of its own."""
    if count == 1:
        return (torch.empty_like(like),)
    alignment = _ALIGNMENT // like.element_size()
    pitch = -(-like.numel() // alignment) * alignment
    rows = torch.empty_strided((count, *like.shape), (pitch, *like.stride()), dtype=like.dtype, device=like.device)
    return rows.unbind(0)


def _times(count: int, like: Tensor) -> Sequence[Tensor]:
    return torch.empty(count, dtype=like.dtype, device=like.device).unbind(0)


def compiled_controller(**coefficients: Any) -> _C.Controller:
    """``controller.Controller`` with the same coefficients, for steps that do not go through Python."""
    return _C.Controller(**coefficients)


def slope_function(
    func: Callable[..., Any], args: tuple[Any, ...], like: Tensor, checked: Any, changed: Any, versioned: bool
) -> _C.Slope:
    """f(t, y) = func(t, y, \\*args) with its result checked, which the kernels call without Python in between.

    A result laid out unlike ``like`` becomes ``checked(result)``. If ``versioned``, ``changed()`` is called where func
    changed its state in place. The result has a graph only where gradients are enabled. ``n_evals`` counts.
    """
    return _C.Slope(func, args, like, checked, changed, torch.is_grad_enabled, versioned)


class RowOperations(TorchOperations):
    """The operations on a batch of independent samples, the rows of the first dimension, each with its own h and t.

    A step size is a float64 tensor (rows, 1, ...) as ``steps`` makes it, a norm an array (rows,), a time one of
    ``scalars``, (rows, 1, ...) too.
    """

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        super().__init__(like, tolerance)
        self.n_rows = like.shape[0]
        self.row_shape = (self.n_rows, *(1,) * (like.dim() - 1))

    def steps(self, h: Array) -> Tensor:
        """The step sizes of all rows where the operations read them."""
        return torch.from_numpy(h).view(self.row_shape).to(self.like.device)

    def scalars(self, values: Sequence[Any]) -> Sequence[Tensor]:
        stacked = torch.from_numpy(np.stack(values)).to(dtype=self.like.dtype, device=self.like.device)
        return stacked.view(len(values), *self.row_shape).unbind(0)

    def error_norm(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Array:
        """For each row the norm of (partial + w·k) / (atol + rtol·max(|y0|, |y1|)), w a number or by row."""
        sums = self._squared_error_ratios(partial, k, w, y0, y1)
        sizes = np.array(self.tolerance.sizes)
        if not sizes.any():
            return np.zeros(self.n_rows)
        return np.sqrt((sums.cpu().numpy()[:, sizes > 0] / sizes[sizes > 0]).max(1))

    def _squared_error_ratios(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Tensor:
        t = self.tolerance
        with torch.no_grad():
            return reference.squared_error_ratios_of_rows(partial, k, w, y0, y1, t.rtol, t.atol, t.segments)


class RowKernels(RowOperations, KernelOperations):
    """The same by the kernels: every row sees the arithmetic that it would see by itself, bit for bit."""

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        super().__init__(like, tolerance)
        self._length = self._n // max(1, self.n_rows)
        self._sums = torch.empty(self.n_rows, len(tolerance.sizes), dtype=torch.float64, device=like.device)

    def weighted_sum(
        self, base: Tensor | None, h: Number, x: Sequence[Tensor], w: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        if not isinstance(h, Tensor):
            return super().weighted_sum(base, h, x, w, out)
        if out is None:
            out = torch.empty_like(self.like)
        start = 0 if base is None else base.data_ptr()
        x_address = [x_j.data_ptr() for x_j in x]
        _C.weighted_sum_rows(self._on, self.n_rows, self._length, h.data_ptr(), out.data_ptr(), start, x_address, w)
        return out

    def solution_and_error(
        self,
        y: Tensor,
        h: Number,
        k: Sequence[Tensor],
        b: Sequence[float],
        error_weight: Sequence[float],
        out: Tensor | None = None,
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
        if len(segments) - 1 > limit:  # more than one launch takes
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


class DifferentiableKernels(KernelOperations):
    """The kernels with a graph: bitwise their results, differentiable to any order in the states and slopes.

    The step size is a constant, and so is the error estimate. Results with a graph go into tensors of their own.
    """

    def weighted_sum(
        self, base: Tensor | None, h: Number, x: Sequence[Tensor], w: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().weighted_sum(base, h, x, w, out)
        return _WeightedSum.apply(super().weighted_sum, h, w, base, *x)

    def solution_and_error(
        self,
        y: Tensor,
        h: Number,
        k: Sequence[Tensor],
        b: Sequence[float],
        error_weight: Sequence[float],
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return super().solution_and_error(y, h, k, b, error_weight, out)
        return _SolutionAndError.apply(super().solution_and_error, h, b, error_weight, y, *k)


class DifferentiableRowKernels(DifferentiableKernels, RowKernels):
    """The kernels on rows with a graph."""


class _WeightedSum(torch.autograd.Function):
    """base + h·Σ w·x with the kernel as its forward; the backward is plain torch, so it differentiates again."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, h: float, w: Sequence[float], base: Tensor | None, *x: Tensor) -> Tensor:
        ctx.h, ctx.w, ctx.has_base = h, w, base is not None
        return kernel(base, h, x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return None, None, None, g if ctx.has_base else None, *_scaled(g, ctx.h, ctx.w, ctx.needs_input_grad[4:])


class _SolutionAndError(torch.autograd.Function):
    """The solution like ``_WeightedSum``; the error estimate carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Any, h: float, b: Sequence[float], error_weight: Sequence[float], y: Tensor, *k: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.h, ctx.b = h, b
        y1, error = kernel(y, h, k, b, error_weight)
        ctx.mark_non_differentiable(error)
        return y1, error

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
        return None, None, None, None, g, *_scaled(g, ctx.h, ctx.b, ctx.needs_input_grad[5:])


class _Relayout(torch.autograd.Function):
    """A copy of ``x`` laid out in memory like ``like``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor) -> Tensor:
        return torch.empty_like(like).copy_(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _scaled(g: Tensor, h: Number, w: Sequence[float], needed: Sequence[bool]) -> list[Tensor | None]:
    if isinstance(h, Tensor):
        h = h.to(g.dtype)
    return [g * (h * w_j) if n and w_j != 0 else None for w_j, n in zip(w, needed, strict=True)]


# For fixed steps, which ask no controller.
_COEFFICIENTS = (
    "order", "safety", "ifactor", "dfactor", "pcoeff", "icoeff", "dcoeff", "min_step", "max_step",
)  # fmt: skip


def compiled_loop(specification: _C.CompiledSpecification) -> _C.CompiledLoop:
    """The loop for one solve."""
    return _C.CompiledLoop(specification)


def has_kernels(like: Tensor) -> bool:
    """Whether this build has kernels for the dtype and device of ``like``."""
    if type(like) is not Tensor and not isinstance(like, torch.nn.Parameter):
        return False  # a subclass may hold its elements elsewhere
    return like.dtype in _DTYPES and (like.device.type == "cpu" or (like.device.type == "cuda" and _C.HAS_CUDA))


def operations_for(like: Tensor, tolerance: Tolerance, *, differentiable: bool = False) -> TorchOperations:
    """The fastest operations for states laid out like ``like``."""
    if not has_kernels(like):
        return TorchOperations(like, tolerance)
    return (DifferentiableKernels if differentiable else KernelOperations)(like, tolerance)


def row_operations_for(like: Tensor, tolerance: Tolerance, *, differentiable: bool = False) -> RowOperations:
    """The same for batches whose rows are independent; the elements of a row of ``like`` are neighbours in memory."""
    if not has_kernels(like):
        return RowOperations(like, tolerance)
    return (DifferentiableRowKernels if differentiable else RowKernels)(like, tolerance)


def config() -> dict[str, str]:
    """What was built, and what runs."""
    cuda = f"built for {_C.CUDA_ARCHITECTURES}; {_C.cuda_device_count()} device(s) here" if _C.HAS_CUDA else "not built"
    threads = f"{torch.get_num_threads()}" if _C.HAS_OPENMP else "1 (built without OpenMP)"
    return {
        "aca_ext": _C.VERSION,
        "torch": torch.__version__,
        "cpu kernels": f"{_C.cpu_instruction_set()}, {threads} thread(s)",
        "cuda kernels": cuda,
    }


def show_config() -> None:
    """Prints ``config()``."""
    for name, value in config().items():
        print(f"{name:13} {value}")
