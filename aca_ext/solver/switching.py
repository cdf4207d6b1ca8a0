"""Steps of method="auto": an explicit method where the problem is not stiff, else an implicit one.

The decision of a step is made once, in the forward pass. A replay looks it up in the record.

Sources: the change to the implicit method as in dopri5.f, Hairer & Wanner, Solving ODEs II, IV.2; a pause after the way
back as in LSODA, Petzold, SIAM J. Sci. Stat. Comput. 4 (1983).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number, as_float
from aca_ext.numerics.stiffness import EigenvalueEstimate, StiffnessCount
from aca_ext.numerics.switching import Switching
from aca_ext.solver.runge_kutta import Coefficients, Trial
from aca_ext.solver.stats import Stats
from aca_ext.solver.stiffness import distances
from aca_ext.solver.transposed_step import Compare

EXPLICIT, IMPLICIT = 0, 1
_CALM_STEPS = 4  # in a row that the explicit method could have taken, before it takes over
_PAUSE = 20  # accepted steps after which an explicit method that has just taken over may give way again


class Part(Protocol):
    """One of the two methods; see ``solver.method.Steps``."""

    @property
    def scheme(self) -> Coefficients: ...

    def step(
        self, times: Sequence[Number], y: Tensor, h: Number, k_first: Tensor | None = None, out: Tensor | None = None
    ) -> Trial: ...

    def accept(self, y: Tensor, h: Number, trial: Trial) -> Tensor | None: ...


class ImplicitPart(Part, Protocol):
    def jacobian_norm(self, scale: Tensor) -> float: ...


@dataclass
class Memory:
    """The method of the next step, and the counts on which the methods of later steps depend."""

    count: StiffnessCount
    now: int = EXPLICIT
    calm: int = 0
    pause: int = 0


class SwitchingSteps:
    """The steps of a forward pass; see ``solver.method.Steps``.

    Args:
        resumed: memory of the solve that this one continues.
        counts: receives the number of steps of each method.

    Attributes:
        chosen: the method of each accepted step, an index of ``Switching.parts``.
    """

    compiled = None

    def __init__(
        self,
        pair: Switching,
        parts: tuple[Part, ImplicitPart],
        ops: TorchOperations,
        counts: Stats,
        resumed: Memory | None,
    ) -> None:
        estimate = EigenvalueEstimate.of(pair.explicit)
        assert estimate is not None
        self._pair, self._ops, self._counts = pair, ops, counts
        self._parts = parts
        _, self._implicit = parts
        self._estimate, self._limit = estimate, estimate.limit
        self._memory = Memory(StiffnessCount(estimate.limit)) if resumed is None else deepcopy(resumed)
        self.chosen: list[int] = []

    @property
    def scheme(self) -> Coefficients:
        return self._parts[self._memory.now].scheme

    @property
    def memory(self) -> Memory:
        return deepcopy(self._memory)

    def step(
        self, times: Sequence[Number], y: Tensor, h: Number, k_first: Tensor | None = None, out: Tensor | None = None
    ) -> Trial:
        return self._parts[self._memory.now].step(times, y, h, k_first, out)

    def accept(self, y: Tensor, h: Number, trial: Trial) -> Tensor | None:
        memory, now = self._memory, self._memory.now
        self.chosen.append(now)
        k = self._parts[now].accept(y, h, trial)
        with torch.no_grad():
            is_over = self._is_stiff(y, trial) if now == EXPLICIT else self._is_calm(y, h, trial)
        if not is_over:
            return k
        if now == EXPLICIT:
            memory.now, memory.calm = IMPLICIT, 0
            return k
        memory.now, memory.pause, memory.count = EXPLICIT, _PAUSE, StiffnessCount(self._limit)
        return None  # the last slope comes from Newton's method, and an explicit step needs that of func

    def finish(self) -> None:
        names = [part.name for part in self._pair.parts]
        self._counts.n_accepted_of = {name: self.chosen.count(i) for i, name in enumerate(names)}

    def repeated_end(self, compare: Compare, y: Tensor, y_next: Tensor, trial: Trial) -> Tensor:
        raise NotImplementedError  # each part repeats its own steps

    def _is_stiff(self, y: Tensor, trial: Trial) -> bool:
        memory = self._memory
        if memory.pause > 0:
            memory.pause -= 1
            return False
        memory.count.observe(*distances(self._ops, self._estimate, y, trial))
        return memory.count.is_stiff

    def _is_calm(self, y: Tensor, h: Number, trial: Trial) -> bool:
        """Tells whether stability would not have limited the explicit method in the last few steps.

        The norm of the Jacobian in units of the tolerance bounds its eigenvalues, whatever the units of the components.
        """
        memory, tolerance = self._memory, self._ops.tolerance
        scale = tolerance.atol + tolerance.rtol * torch.maximum(y.detach().abs(), trial.y1.detach().abs())
        is_stable = abs(as_float(h)) * self._implicit.jacobian_norm(scale) <= self._limit
        memory.calm = memory.calm + 1 if is_stable else 0
        return memory.calm >= _CALM_STEPS
