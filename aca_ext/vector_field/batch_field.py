"""The user's f on a batch of independent samples, each with a time of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from aca_ext.kernels.operations import TorchOperations
from aca_ext.problem.batch import RowPacking
from aca_ext.problem.state import State
from aca_ext.vector_field.field import VectorField


class RowField(VectorField):
    """f of a batch whose samples have each a time of their own."""

    def __init__(self, func: Callable[..., State], args: Sequence[Any], packing: RowPacking, ops: TorchOperations):
        super().__init__(func, args, packing, ops)
        self._time_shape = packing.time_shape

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return super().__call__(t if t.shape == self._time_shape else t.view(self._time_shape), y)
