"""The operations of a Runge-Kutta step in plain PyTorch, with one step size or one per sample.

The fused kernels extend these classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.kernels import reference
from aca_ext.kernels.layout import Relayout
from aca_ext.kernels.reference import Number
from aca_ext.problem.admission import check_readable, has_memory, is_plain
from aca_ext.problem.tolerance import Tolerance

Array = NDArray[np.float64]
Tensors = Sequence[Tensor]
Floats = Sequence[float]
Slope = Callable[[Tensor, Tensor], Tensor]


class TorchOperations:
    """The operations by ``reference``: on any device, differentiable in all operands and in the step size.

    Args:
        like: a tensor with the layout of the states: shape, strides, dtype, device.
        tolerance: tolerances and norm of ``error_norm``.

    Attributes:
        n_rows: number of step sizes.
        row_shape: shape of a tensor with a number for each row of the state, if a row has a step size of its own.
    """

    backend = "reference"
    n_rows = 1
    row_shape: tuple[int, ...] = ()

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        self.like, self.tolerance = like, tolerance
        self.stride = like.stride()

    def admit(self, x: Tensor, what: str = "a tensor") -> Tensor:
        """``x`` itself if it has the layout of the states, else a copy that has; ``what`` names it in errors.

        Raises:
            ArgumentTypeError: the elements of ``x`` cannot be read, for example on the meta device.
        """
        is_like = has_memory(x) if type(x) is Tensor else type(x) is type(self.like)
        if is_like and x.stride() == self.stride and not x.is_neg():
            return x
        check_readable(what, x)
        if is_plain(self.like) and not is_plain(x):
            return self.admit(x.as_subclass(Tensor), what)
        if x.requires_grad and torch.is_grad_enabled():
            return Relayout.apply(x, self.like)
        return torch.empty_like(self.like).copy_(x)

    def weighted_sum(self, base: Tensor | None, h: Number, x: Tensors, w: Floats, out: Tensor | None = None) -> Tensor:
        """base + h·Σ_j w[j]·x[j], with 0 for a base of None; written into ``out`` if it is given."""
        result = reference.weighted_sum(base, h, x, w)
        if result.requires_grad:
            # A backward pass inside func may write the gradient of every stage into one buffer; each needs its copy.
            result.register_hook(torch.clone)
        return result if out is None else out.copy_(result)

    def solution_and_error(
        self, y: Tensor, h: Number, k: Tensors, b: Floats, error_weight: Floats, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The solution y + h·Σ_j b[j]·k[j] (in ``out`` if given) and the error h·Σ_j error_weight[j]·k[j]."""
        return self.weighted_sum(y, h, k, b, out), reference.weighted_sum(None, h, k, error_weight)

    def error_norm(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Number:
        """The norm of (partial + w·k) / (atol + rtol·max(|y0|, |y1|)), with 0 for a k of None."""
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
            return worst.sqrt().cpu().double() if worst != 0 else worst.detach().cpu().double()
        return tolerance.norm_of_sums(sums.tolist())

    def relative_changes(self, change: Tensor, state: Tensor) -> tuple[Any, Any]:
        """The largest change of an element relative to that element, and relative to the largest element of the sum.

        Numbers, or arrays with one for each row of the state if rows have step sizes of their own.
        """
        found = reference.relative_changes(change.reshape(self.n_rows, -1), state.reshape(self.n_rows, -1))
        of_element, of_largest = torch.stack(found).double().cpu().numpy()
        return (of_element, of_largest) if self.row_shape else (float(of_element[0]), float(of_largest[0]))

    def small_system(self, jacobians: Tensors, a: Sequence[Floats], h: Number) -> Any:
        """A ``SmallSystem`` of the stages of an implicit step; None if torch solves it in less time."""
        return None

    def newton_iteration(
        self, system: Any, f: Slope, t: Tensors, base: Tensors, z: Tensors, y: Tensor | None
    ) -> tuple[list[Tensor], Any] | None:
        """An iteration of Newton's method from ``z``, with f at the states base + z: the next z and its change's size.

        The size is the largest of all stages: by ``error_norm`` with the scale of ``y`` and the states or, for a y of
        None, by ``relative_changes``. Returns None if the caller has to put the iteration together from its parts.
        """
        return None

    @staticmethod
    def _as_number(norm: Any) -> Number:
        if isinstance(norm, Tensor) and norm.requires_grad:
            return norm.cpu().double()
        return float(norm)

    def scalars(self, values: Sequence[Number]) -> Sequence[Tensor]:
        """The numbers as 0-d tensors of the state's dtype and device."""
        if any(isinstance(v, Tensor) for v in values):
            numbers = [torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in values]
            return torch.stack(numbers).to(self.like.dtype).to(self.like.device).unbind(0)
        return torch.tensor(values, dtype=self.like.dtype, device=self.like.device).unbind(0)


class RowOperations(TorchOperations):
    """The operations on a batch of independent samples, one per row of the first dimension, each with its own h and t.

    Step sizes are a tensor (batch, 1, ...), made by ``steps``. Times are tensors (batch, 1, ...), made by
    ``scalars``. Norms are a float64 array (batch,).
    """

    def __init__(self, like: Tensor, tolerance: Tolerance) -> None:
        super().__init__(like, tolerance)
        self.n_rows = like.shape[0]
        self.row_shape = (self.n_rows, *(1,) * (like.dim() - 1))

    def steps(self, h: Array) -> Tensor:
        """The step sizes (batch,) as a tensor (batch, 1, ...) on the state's device, float64 where that has it."""
        device = self.like.device
        return torch.from_numpy(h).view(self.row_shape).to(reference.widest_dtype(device)).to(device)

    def scalars(self, values: Sequence[Any]) -> Sequence[Tensor]:
        stacked = torch.from_numpy(np.stack(values)).to(self.like.dtype).to(self.like.device)
        return stacked.view(len(values), *self.row_shape).unbind(0)

    def error_norm(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Array:
        """The norm of (partial + w·k) / (atol + rtol·max(|y0|, |y1|)) per sample; w is a number or one per sample."""
        return self._norms_of(self._squared_error_ratios(partial, k, w, y0, y1).cpu().numpy())

    def _norms_of(self, sums: Array) -> Array:
        """The norm per sample, from its sum over each component."""
        sizes = np.array(self.tolerance.sizes)
        if not sizes.any():
            return np.zeros(self.n_rows)
        norms: Array = np.sqrt((sums[:, sizes > 0] / sizes[sizes > 0]).max(1))
        return norms

    def _squared_error_ratios(self, partial: Tensor, k: Tensor | None, w: Number, y0: Tensor, y1: Tensor) -> Tensor:
        t = self.tolerance
        with torch.no_grad():
            return reference.squared_error_ratios_of_rows(partial, k, w, y0, y1, t.rtol, t.atol, t.segments)
