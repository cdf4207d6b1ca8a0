"""Storage of accepted steps, and of the states that a backward pass replays them from.

Three policies: keep every state, keep at most a given number, or keep every state in host memory. States and the rows
of blocks that hold them are numbered; state n is the start of step n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.kernels.fused import empty_rows
from aca_ext.problem.resumption import SolverState
from aca_ext.solver.event_search import Occurrence

# Policy of ``checkpoints``: None keeps every state, an int at most so many, "cpu" every state in host memory.
Policy = int | str | None

_BLOCK_BYTES = 1 << 20  # largest block that small states share; bounds the memory that is allocated and not used
_BLOCK_ROWS = 64
_ROWS_AT_ONCE = 8  # rows that become views at once; views of a whole block would cost a short solve too much time


class AcceptedStep(NamedTuple):
    """One accepted step from ``t`` to ``t_next`` and the outputs inside it.

    Attributes:
        h: signed step size that the step was computed with.
        t_next: t + h, or exactly the time at which the step was cut.
        outputs: pairs (index of a requested time, its position in the step, in (0, 1]).
        random_states: states of the random generators before each stage; None if func draws no random numbers.
    """

    t: float
    h: float
    t_next: float
    outputs: list[tuple[int, float]]
    random_states: Sequence[tuple[Tensor, ...]] | None = None


@dataclass(slots=True)
class StepRecord:
    """The accepted steps of one solve, in order.

    Attributes:
        end: state of the solver where the solve stopped; None without option ``on_step_limit="stop"``.
        events: the events found, in the order of time.
        ended_by: index of the event that ended the solve: a terminal one, or else the first reset.
        formulas: the formula of each step, for a method that has several: those of Adams (``solver/adams.py``), or the
            number of the part of a method that switches (``solver/switching.py``).
    """

    steps: list[AcceptedStep] = field(default_factory=lambda: list[AcceptedStep]())
    end: SolverState | None = None
    events: list[Occurrence] = field(default_factory=lambda: list[Occurrence]())
    ended_by: int | None = None
    formulas: Sequence[Any] = ()

    def part_of(self, n: int) -> int:
        """The number of the part that made step n, of a method that switches; else 0."""
        return self.formulas[n] if self.formulas else 0

    def add_run(
        self, accepted: Sequence[tuple[float, float, float, int, int]], times: Sequence[float]
    ) -> Iterator[int]:
        """Adds steps (t, h, t_next, first output, end of the outputs); yields the indices of their outputs."""
        for t, h, t_next, first, end in accepted:
            due = [(i, _position(times[i], t, t_next)) for i in range(first, end)]
            self.steps.append(AcceptedStep(t, h, t_next, due))
            yield from range(first, end)

    def bounds(self) -> Tensor:
        """Start and end of every accepted step, (n_accepted, 2) float64 on the CPU."""
        return torch.from_numpy(np.array([(s.t, s.t_next) for s in self.steps], dtype=np.float64).reshape(-1, 2))


def _position(time: float, t: float, t_next: float) -> float:
    return 1.0 if time == t_next else (time - t) / (t_next - t)


class Checkpoints:
    """Storage that keeps every state: the start of every accepted step and the end of the last one.

    A step writes its solution straight into a row of a block. After a rejected trial, the next trial gets the same row;
    so accepting a step costs no copy.

    Attributes:
        blocks: tensors (rows, \\*state shape); each row holds one state.
        count: number of states so far, kept or not.
        capacity: largest number of states kept, besides the last one.
    """

    capacity: float = math.inf

    def __init__(self, y0: Tensor) -> None:
        self._rows_per_block = int(min(_rows_per_block(y0), self.capacity + 2))
        self._like = y0
        self._free: list[tuple[int, Tensor]] = []  # free rows, each with its number
        self._n_rows = 0
        self.blocks: list[Tensor] = []
        self.count = 0
        self.slot().copy_(y0)
        self.accept()

    def slot(self) -> Tensor:
        """The row that receives the solution of the current trial."""
        if not self._free:
            first = self._n_rows % self._rows_per_block
            if first == 0:
                self.blocks.append(self._new_block())
            views = self.blocks[-1][first : first + _ROWS_AT_ONCE].unbind(0)
            self._free = list(reversed(list(enumerate(views, self._n_rows))))
            self._n_rows += len(views)
        return self._free[-1][1]

    def accept(self) -> None:
        """Keeps the state in the current slot."""
        self._free.pop()
        self.count += 1

    def _new_block(self) -> Tensor:
        return empty_rows(self._rows_per_block, self._like)

    def numbers(self) -> Sequence[int]:
        """Number of the state in each row of the blocks, -1 for a free row; rows beyond the list are free."""
        return range(self.count)


class ThinnedCheckpoints(Checkpoints):
    """Storage for at most ``capacity`` states and the last one, while the number of steps is not known yet.

    Online checkpointing by Wang, Moin & Iaccarino, SIAM J. Sci. Comput. 31 (2009). A new state has level 0. It replaces
    a dispensable state: one that a later state of a higher level follows. If there is none, it replaces the newest
    state and gets a level one above it. No step is then recomputed more often than if the number N of steps had been
    known beforehand: at most r times for N ≤ C(capacity + r, r).

    Example with capacity 4, and levels after a colon; state 0 is never replaced. The states 0, 1:0, 2:0, 3:0 are kept.
    State 4 finds none that is dispensable, so it replaces state 3 and gets level 1: 0, 1:0, 2:0, 4:1. Now a higher
    level follows states 1 and 2. State 5 replaces state 1, and state 6 replaces state 2: 0, 4:1, 5:0, 6:0. State 7
    finds none again and replaces state 6: 0, 4:1, 5:0, 7:1.
    """

    def __init__(self, y0: Tensor, capacity: int) -> None:
        self.capacity = capacity
        self._kept: dict[int, tuple[int, Tensor]] = {}  # state number -> numbered row, in the order of time
        self._level: dict[int, float] = {}
        self._dispensable: list[int] = []
        self._current: tuple[int, Tensor] | None = None
        super().__init__(y0)

    def accept(self) -> None:
        # The state in the slot becomes the current one. The start of the step is now placed or dropped.
        row, self._current = self._current, self._free[-1]
        super().accept()
        if row is not None:
            self._place(self.count - 2, row)

    def numbers(self) -> Sequence[int]:
        numbers = [-1] * self._n_rows
        for n, (row, _) in self._kept.items():
            numbers[row] = n
        assert self._current is not None
        numbers[self._current[0]] = self.count - 1
        return numbers

    def _place(self, n: int, row: tuple[int, Tensor]) -> None:
        if len(self._kept) < self.capacity:
            self._keep(n, row, math.inf if n == 0 else 0)
        elif self._dispensable:
            self._drop(self._dispensable.pop())
            self._keep(n, row, 0)
        elif self.capacity == 1:
            self._free.append(row)
        else:
            level = self._drop(n - 1) + 1
            for earlier in reversed(self._level):
                if self._level[earlier] >= level:
                    break
                self._dispensable.append(earlier)
            self._keep(n, row, level)

    def _keep(self, n: int, row: tuple[int, Tensor], level: float) -> None:
        self._kept[n], self._level[n] = row, level

    def _drop(self, n: int) -> float:
        self._free.append(self._kept.pop(n))
        return self._level.pop(n)


class HostCheckpoints(Checkpoints):
    """Storage that keeps every state in host memory, pinned for a solve on a GPU so that copies are asynchronous."""

    def __init__(self, y0: Tensor) -> None:
        self._of_step = [torch.empty_like(y0) for _ in range(2)]  # start and trial of a step, which swap roles
        super().__init__(y0)

    def slot(self) -> Tensor:
        return self._of_step[self.count % 2]

    def accept(self) -> None:
        super().slot().copy_(self.slot(), non_blocking=True)
        super().accept()

    def _new_block(self) -> Tensor:
        like = self._like
        shape, stride = (self._rows_per_block, *like.shape), (like.numel(), *like.stride())
        is_pinned = like.device.type == "cuda"
        return torch.empty_strided(shape, stride, dtype=like.dtype, device="cpu", pin_memory=is_pinned)


def checked_policy(policy: object) -> Policy:
    """Validates the ``checkpoints`` argument of ``odeint``.

    Raises:
        ArgumentTypeError: it is neither None, an int nor a string.
        ArgumentValueError: it is an int below 1, or a string other than "cpu".
    """
    allowed = (
        'give None (keep every state), an int of at least 1 (keep at most so many) or "cpu" (keep all in host memory).'
    )
    if isinstance(policy, str) or policy is None:
        if policy in (None, "cpu"):
            return policy
        raise ArgumentValueError(f"checkpoints is {policy!r}; {allowed}")
    if isinstance(policy, bool) or not isinstance(policy, int):
        raise ArgumentTypeError(f"checkpoints is of type {type(policy).__name__}; {allowed}")
    if policy < 1:
        raise ArgumentValueError(f"checkpoints is {policy}; {allowed}")
    return policy


def checkpoints_for(policy: Policy, y0: Tensor) -> Checkpoints:
    """The storage of this policy, with ``y0`` as its first state."""
    if policy is None:
        return Checkpoints(y0)
    return ThinnedCheckpoints(y0, policy) if isinstance(policy, int) else HostCheckpoints(y0)


class Blocks:
    """Blocks of rows without bookkeeping, for a C++ loop that fills them in order."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._rows = like, _rows_per_block(like)
        self.blocks: list[Tensor] = []
        self.addresses: list[int] = []

    def add(self) -> tuple[int, int]:
        """A further block: its address, and how many states it takes."""
        block = empty_rows(self._rows, self._like)
        self.blocks.append(block)
        self.addresses.append(block.data_ptr())
        return self.addresses[-1], self._rows


def _rows_per_block(like: Tensor) -> int:
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // max(1, like.numel() * like.element_size())))


def rows(blocks: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """The first ``count`` rows of ``blocks``, in order."""
    for block in blocks:
        yield from block[:count].unbind(0)
        count = max(0, count - len(block))
