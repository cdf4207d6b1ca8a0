"""Checkpoints of a multistep method: rows that hold a state and slopes, from which a step can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from aca_ext.kernels.fused import empty_rows
from aca_ext.solver.checkpoints import Policy, checkpoints_for


class SlopeCheckpoints:
    """Checkpoints of all states with the slope at each, or of fewer states with the whole history of each.

    Where every state is kept on the device, row n holds y_n and f_n. Otherwise a step may be replayed from row n alone,
    which holds y_n and f_{n-1}, f_{n-2}, ...

    Args:
        n_slopes: length of the history f_n, f_{n-1}, ... that a step needs.

    Attributes:
        slopes: the history at the last step, newest first; the solver's list.
    """

    def __init__(self, policy: Policy, y0: Tensor, n_slopes: int) -> None:
        self._keeps_all = policy is None
        self.width = 2 if self._keeps_all else n_slopes
        first = empty_rows(self.width, y0).zero_()
        first[0].copy_(y0)
        self._rows = checkpoints_for(policy, first)
        self._current = self._rows.blocks[0][0] if self._keeps_all else None
        self.slopes: Sequence[Tensor] = ()
        self.capacity = self._rows.capacity

    @property
    def blocks(self) -> list[Tensor]:
        return self._rows.blocks

    def numbers(self) -> Sequence[int]:
        return self._rows.numbers()

    def slot(self) -> Tensor:
        """The tensor that receives the solution of the current step."""
        return self._rows.slot()[0]

    def accept(self) -> None:
        """Keeps the state in the current slot, and the slopes."""
        row = self._rows.slot()
        if self._current is not None:
            self._current[1].copy_(self.slopes[0])
            self._current = row
        else:
            for kept, slope in zip(row[1:].unbind(0), self.slopes, strict=False):
                kept.copy_(slope)
        self._rows.accept()


def earlier_slopes(n: int, row: Tensor, known: Mapping[int, Tensor], count: int) -> Sequence[Tensor]:
    """The slopes f_{n-1}, f_{n-2}, ... of a step, at most ``count``, from its row or from those of ``known``."""
    if not known:
        return row[1:].unbind(0)
    return [known[n - j][1] for j in range(1, min(count, n) + 1)]
