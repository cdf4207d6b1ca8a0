"""Linear systems of few unknowns, solved by the compiled extension in less time than torch takes to call LAPACK."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aca_ext import _C
from aca_ext.kernels.reference import Number

MOST_UNKNOWNS = 32  # in a block; from about here on, LAPACK takes less time


class SmallSystem:
    """The matrices K_ij = δ_ij·I - h·a_ij·J_i of the stages of an implicit step, factorised.

    Args:
        on: the target of the kernels.
        like: a tensor with the layout of the states, which is contiguous: one block after the other.
        admit: returns a tensor in that layout.
        jacobians: the matrices J_i, (blocks, m, m) for each stage.
        h: a number, or a tensor with one for each block.

    Attributes:
        compiled: its C++ counterpart.
    """

    def __init__(
        self,
        on: _C.Target,
        like: Tensor,
        admit: Callable[[Tensor], Tensor],
        jacobians: Sequence[Tensor],
        a: Sequence[Sequence[float]],
        h: Number,
    ) -> None:
        self._like, self._admit = like, admit
        blocks, m, _ = jacobians[0].shape
        matrices = [j.to(like.dtype).contiguous() for j in jacobians]
        sizes = h.to(torch.float64).contiguous() if isinstance(h, Tensor) else None
        number, address = (h, 0) if sizes is None else (0.0, sizes.data_ptr())
        self.compiled = _C.StageSystem(on, blocks, m, [j.data_ptr() for j in matrices], a, number, address)

    def solve(self, r: Sequence[Tensor], transposed: bool = False) -> list[Tensor]:
        r = [self._admit(x) for x in r]
        found = [torch.empty_like(self._like) for _ in r]
        self.compiled.solve([x.data_ptr() for x in r], [x.data_ptr() for x in found], transposed)
        return found

    def correct(self, slopes: Sequence[Tensor], z: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        slopes, z = [self._admit(k) for k in slopes], [self._admit(x) for x in z]
        corrected, change = ([torch.empty_like(self._like) for _ in z] for _ in range(2))
        self.compiled.correct(*([x.data_ptr() for x in part] for part in (slopes, z, corrected, change)))
        return corrected, change


def is_small(like: Tensor, jacobian: Tensor, stages: int) -> bool:
    """Tells whether ``SmallSystem`` serves states laid out like ``like``."""
    m = jacobian.shape[-1]
    return 0 < m * stages <= MOST_UNKNOWNS and like.numel() > 0 and like.device.type == "cpu" and like.is_contiguous()
