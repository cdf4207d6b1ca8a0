"""What the error of a step is measured with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

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
