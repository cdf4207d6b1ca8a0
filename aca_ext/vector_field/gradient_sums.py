"""Sums of gradients over the evaluations of func."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.extension import running_sums

_NONE = type(None)
COARSE = (torch.float16, torch.bfloat16)  # many terms in these would lose most digits, so float32 holds their sums


class GradientSums:
    """Adds the gradients of one evaluation after another to their totals.

    Attributes:
        totals: one for each input, None until its first term; updated in place. Autograd rounds those of coarse
            inputs to their dtype.
    """

    def __init__(self, totals: list[Tensor | None]) -> None:
        self.totals = totals
        self._running: Any = None  # adds in C++, as soon as all totals have a first term

    def add(self, grads: Sequence[Tensor | None], indices: Sequence[int] | None = None) -> None:
        """Adds one gradient to each total, or to the totals with these indices; None adds nothing."""
        if self._running is not None:  # the usual case, without a loop in Python
            if self._running.add(grads):
                return
            if _NONE not in map(type, grads):
                torch._foreach_add_(self.totals, grads)  # type: ignore[arg-type]
                return
        totals: list[Tensor] = []
        terms: list[Tensor] = []
        for i, grad in enumerate(grads) if indices is None else zip(indices, grads, strict=True):
            if grad is None:
                continue
            total = self.totals[i]
            if total is None:
                # autograd may return the same tensor again, so sums need a copy
                self.totals[i] = grad.float() if grad.dtype in COARSE else grad.clone()
            else:
                totals.append(total)
                terms.append(grad)
        if totals:
            torch._foreach_add_(totals, terms)
        if self._running is None and totals and indices is None and _NONE not in map(type, self.totals):
            self._running = running_sums(self.totals)


class WideSum:
    """The sum, in float32, of the gradients that a coarse input receives from the evaluations of one graph.

    Attributes:
        total: tensor whose gradient is that sum.
        of: the input, and the tensor that stands for it in func.
    """

    def __init__(self, x: Tensor, standin: Tensor, cut: Tensor) -> None:
        self.of, self.total = (x, standin), cut.float()

    def for_evaluation(self) -> Tensor:
        """The input for one evaluation."""
        found: Tensor = _Addend.apply(self.total, self.of[1].detach())
        return found


class _Addend(torch.autograd.Function):
    """The second operand, in the memory that it has; the gradient is that of the first."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        return None if g is None else g.float(), None
