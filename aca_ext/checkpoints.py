"""Storage of accepted steps: (t, h) of each always, and where a replay is to come the state each step started from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from aca_ext.ops import empty_rows

_BLOCK_BYTES = 1 << 20  # small states share blocks up to this size; it bounds what is allocated and not used
_BLOCK_ROWS = 64


class AcceptedStep(NamedTuple):
    """One accepted step from ``t`` to ``t_next`` and the outputs inside it.

    ``h`` is what the step was computed with; ``t_next`` is t + h, or exactly the time the step was cut to land on.
    ``random_states`` holds the random generators' states before each stage where func draws random numbers, else None.
    """

    t: float
    h: float
    t_next: float
    outputs: list[tuple[int, float]]
    random_states: Sequence[tuple[Tensor, ...]] | None = None


@dataclass(slots=True)
class StepRecord:
    """The accepted steps of one solve, in order."""

    steps: list[AcceptedStep] = field(default_factory=lambda: list[AcceptedStep]())

    def bounds(self) -> Tensor:
        """(n_accepted, 2) float64: start and end of every accepted step."""
        return torch.tensor([t for s in self.steps for t in (s.t, s.t_next)], dtype=torch.float64).view(-1, 2)


class Checkpoints:
    """States at the start of every accepted step and at the end, in blocks that the solution is written into.

    A rejected trial leaves its slot to the next one, so accepting costs no copy.
    """

    def __init__(self, y0: Tensor) -> None:
        bytes_each = max(1, y0.numel() * y0.element_size())
        self._rows_per_block = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // bytes_each))
        self._like = y0
        self._free: list[Tensor] = []
        self.blocks: list[Tensor] = []
        self.count = 0
        self.slot().copy_(y0)
        self.accept()

    def slot(self) -> Tensor:
        """Where the solution of the current trial belongs."""
        if not self._free:
            block = empty_rows(self._rows_per_block, self._like)
            self.blocks.append(block)
            self._free = list(reversed(block.unbind(0)))
        return self._free[-1]

    def accept(self) -> None:
        """Keeps what stands in the current slot."""
        self._free.pop()
        self.count += 1


def rows(blocks: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """The first ``count`` states of ``blocks``, in order."""
    for block in blocks:
        for row in block.unbind(0):
            if count == 0:
                return
            count -= 1
            yield row
