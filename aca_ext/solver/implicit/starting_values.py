"""Starting values of Newton's iterations: the dense output of the step before, continued beyond its end.

Source: Hairer & Wanner, Solving ODEs II, IV.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.solver.implicit.rows import Mask, chosen, constant, in_dtype_of, is_any, of_tensor
from aca_ext.solver.implicit.scheme import Group, ImplicitScheme

_FARTHEST = 3.0  # longest continuation of a step, in its lengths


class StepBefore:
    """The last accepted step, of each row.

    Only groups of several stages start from it: earlier slopes of its own step predict a single stage as well.
    """

    def __init__(self, ops: TorchOperations, scheme: ImplicitScheme) -> None:
        self._ops, self._scheme = ops, scheme
        self._serves = any(len(group.stages) > 1 for group in scheme.groups)
        self._step: tuple[Number, Sequence[Tensor]] | None = None  # size and slopes; NaN in rows without a step

    def forget(self) -> None:
        self._step = None

    def keep(self, h: Number, k: Sequence[Tensor]) -> None:
        if self._serves:
            self._step = constant(h), [x.detach() for x in k]

    def keep_rows(self, accepted: Mask, h: Tensor, k: Sequence[Tensor]) -> None:
        """Keeps the step of the rows that accepted it."""
        if self._serves:
            slopes = [x.detach() for x in k]
            before, earlier = (torch.full_like(h, math.nan), slopes) if self._step is None else self._step
            assert isinstance(before, Tensor)
            self._step = chosen(accepted, [h], [before])[0], chosen(accepted, slopes, earlier)

    def starts(self, group: Group, h: Number, others: list[Tensor]) -> list[Tensor]:
        """Stage states of a step of size h, without their base; ``others`` where no step before is near."""
        if self._step is None or len(group.stages) == 1:
            return others
        (size, slopes), weights_at = self._step, self._scheme.tableau.dense_weights
        ratio: Any = h / size
        is_near = of_tensor(ratio <= _FARTHEST)
        if not is_any(is_near):
            return others
        at, end = [weights_at(1.0 + self._scheme.c[i] * ratio) for i in group.stages], weights_at(1.0)
        rows = [[w - e for w, e in zip(weights, end, strict=True)] for weights in at]
        if not isinstance(size, Tensor):
            return [self._ops.weighted_sum(None, size, slopes, tuple(row)) for row in rows]
        found = [sum(in_dtype_of(x, size * w) * x for w, x in zip(row, slopes, strict=True)) for row in rows]
        return chosen(is_near, found, others)
