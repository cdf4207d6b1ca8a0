"""Numbers and truth values of rows: NumPy arrays with an entry for each, or Python scalars if there is one row.

A row is an independent sample, or the whole state of a solve without such samples. Scalars take a tenth of the time of
arrays with one entry. The operators ``+ - * / & |`` and comparisons serve both, and so do these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext.kernels.operations import TorchOperations
from aca_ext.kernels.reference import Number, as_float

Numbers = Any  # a float, or an array of floats
Mask = Any  # a bool, or an array of bools


def spread(value: Any, ops: TorchOperations) -> Any:
    """The value for every row of the states of ``ops``."""
    return np.full(ops.n_rows, value) if ops.row_shape else value


def of_tensor(numbers: Any) -> Numbers:
    """Numbers that may be a tensor: of one element without a dimension, or with one for each row."""
    if not isinstance(numbers, Tensor):
        return numbers
    return numbers.detach().reshape(-1).cpu().numpy() if numbers.dim() else numbers.item()


def constant(h: Number) -> Number:
    """A step size without its graph; one for each row stays as it is."""
    return as_float(h) if isinstance(h, Tensor) and h.dim() == 0 else h


def inverse(h: Number) -> Number:
    """1/h; 0 in rows at rest."""
    return torch.where(h == 0, 0.0, 1 / h) if isinstance(h, Tensor) else 1 / h


def in_dtype_of(x: Tensor, factor: Number) -> Number:
    """A number, or one for each row, as a factor of ``x``."""
    return factor.to(x.dtype) if isinstance(factor, Tensor) else factor


def largest(x: Sequence[Tensor], ops: TorchOperations) -> Tensor:
    """The largest magnitude in each row, in a shape that broadcasts to the state."""
    if ops.like.numel() == 0:
        return ops.like.new_zeros(ops.row_shape)
    sizes = [part.reshape(ops.n_rows, -1).abs().amax(1) for part in x]
    return torch.stack(sizes).amax(0).view(ops.row_shape)


def are_finite(x: Sequence[Tensor], ops: TorchOperations) -> Mask:
    """Tells for each row whether all its elements are finite."""
    sums = torch.stack([part.reshape(ops.n_rows, -1).sum(1) for part in x])
    finite = sums.isfinite().all(0).cpu().numpy()
    return finite if ops.row_shape else bool(finite[0])


def where(mask: Mask, x: Any, y: Any) -> Any:
    return (x if mask else y) if isinstance(mask, bool) else np.where(mask, x, y)


def other_than(mask: Mask) -> Mask:
    return not mask if isinstance(mask, bool) else ~mask


def larger(x: Numbers, y: Numbers) -> Numbers:
    return max(x, y) if isinstance(y, float) and isinstance(x, float) else np.maximum(x, y)


def is_any(mask: Mask) -> bool:
    return mask if isinstance(mask, bool) else bool(mask.any())


def is_all(mask: Mask) -> bool:
    return mask if isinstance(mask, bool) else bool(mask.all())


def count(mask: Mask) -> int:
    return int(mask) if isinstance(mask, bool) else int(np.count_nonzero(mask))


def chosen(mask: Mask, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    """``new`` for the rows of the mask, ``old`` for the others; the first dimension of the tensors counts rows."""
    if is_all(mask):
        return list(new)
    if not is_any(mask):
        return list(old)
    of_rows = torch.from_numpy(mask).view(-1, *(1,) * (new[0].dim() - 1)).to(new[0].device)
    return [torch.where(of_rows, x, x_old) for x, x_old in zip(new, old, strict=True)]


def combined(h: Number, rows: Sequence[Sequence[float]], x: Sequence[Tensor]) -> list[Tensor]:
    """h·Σ_j rows[i][j]·x[j] for each i."""
    sums: list[Tensor] = []
    for row in rows:
        terms = [in_dtype_of(x_j, h * w) * x_j for w, x_j in zip(row, x, strict=True) if w != 0]
        first, *others = terms or [torch.zeros_like(x[0])]
        for other in others:
            first = first + other
        sums.append(first)
    return sums
