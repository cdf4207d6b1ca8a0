"""``StepPlan``: the accepted steps of a solve as constants, from which the solve can be repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aca_ext.numerics.switching import Switching
from aca_ext.numerics.tableau import Tableau
from aca_ext.numerics.weights import Weights
from aca_ext.solver.batch_record import BatchRecord
from aca_ext.solver.checkpoints import StepRecord

Array = NDArray[np.float64]
StepBounds = tuple[float, float, float]  # t, h, t_next
Position = tuple[int, float]  # index of a requested time, and its position in its step, in (0, 1]

_RANDOM = (
    "func draws random numbers, so another evaluation would use others than the solve. Use a func without them, for "
    "example a module in evaluation mode."
)


_PADDED = "the requested times are padded with NaN. Solve samples with equally many times together."
_NOT_EXPLICIT = (
    "is an implicit or multistep method. Use an explicit Runge-Kutta method, such as dopri5. For derivatives, "
    "torch.autograd and torch.autograd.functional take any method."
)


class KnownSteps(NamedTuple):
    """Accepted steps as numbers.

    Attributes:
        common: (t, h, t_next) of each step that all samples share; empty for independent samples.
        of_rows: of independent samples (batch, n, 3), the n-th step of each sample; a sample with fewer steps rests at
            its last time, in steps of length zero. Else None.
        refusal: reason why the steps cannot be repeated, for error messages; None if they can.
    """

    common: tuple[StepBounds, ...] = ()
    of_rows: Array | None = None
    refusal: str | None = None


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The accepted steps of a solve. Its record is read at first use, since that takes time and may not be needed.

    Attributes:
        tableau: method with the dense output of the solve.
        record: record of the solve, or the steps themselves.
        times: requested times that the solve reached, (batch, T) for independent samples.
        jumps: times at which func jumps.
    """

    tableau: Weights | Switching
    record: Any
    times: Any
    jumps: frozenset[float] = frozenset()

    @property
    def method(self) -> Weights:
        """The method of the steps that can be repeated."""
        return self.tableau.explicit if isinstance(self.tableau, Switching) else self.tableau

    @cached_property
    def known(self) -> KnownSteps:
        """The steps as numbers."""
        record = self.record
        if isinstance(record, KnownSteps):
            return record
        if isinstance(self.tableau, Switching) and any(record.formulas):
            n = sum(map(bool, record.formulas))
            return KnownSteps(refusal=f"{n} steps of method {self.tableau.name!r} {_NOT_EXPLICIT}")
        if type(self.method) is not Tableau:
            return KnownSteps(refusal=f"{self.tableau.name} {_NOT_EXPLICIT}")
        if isinstance(record, StepRecord):
            steps = record.steps
            if any(s.random_states is not None for s in steps):
                return KnownSteps(refusal=_RANDOM)
            return KnownSteps(tuple((s.t, s.h, s.t_next) for s in steps))
        if np.isnan(self.times).any():
            return KnownSteps(refusal=_PADDED)
        found = _of_batch(record) if isinstance(record, BatchRecord) else _of_bounds(record.bounds())
        return KnownSteps(of_rows=_padded(found, self.times[:, -1]))

    def refused(self, reason: str) -> StepPlan:
        """The plan of a solve that cannot be repeated for this reason."""
        return replace(self, record=KnownSteps(refusal=reason))

    def reaching(self, n_times: int) -> StepPlan:
        """The plan with only the first ``n_times`` requested times, of a solve that ended early."""
        return replace(self, times=self.times[:n_times])

    def followed_by(self, other: StepPlan) -> StepPlan:
        """The plan of a solve with common steps and of its continuation, which starts at its last time."""
        one, rest = self.known, other.known
        known = KnownSteps(one.common + rest.common, refusal=one.refusal or rest.refusal)
        return StepPlan(self.tableau, known, (*self.times, *other.times[1:]), self.jumps | other.jumps)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepPlan, (self.tableau, self.known, self.times, self.jumps)


def outputs_by_step(steps: Sequence[StepBounds], times: Sequence[float]) -> list[list[Position]]:
    """For each step the requested times in it; a time between two steps belongs to the first of them."""
    sign = 1.0 if len(times) > 1 and times[-1] > times[0] else -1.0
    found: list[list[Position]] = []
    i = 1
    for t, _, t_next in steps:
        due: list[Position] = []
        while i < len(times) and sign * (times[i] - t_next) <= 0:
            due.append((i, 1.0 if times[i] == t_next else (times[i] - t) / (t_next - t)))
            i += 1
        found.append(due)
    return found


def places_of(steps: Array, times: Array) -> tuple[NDArray[np.int64], Array]:
    """Number of the step of each sample that contains each of its times, and the position in it, both (batch, T).

    Steps are (batch, n, 3). A time between two steps belongs to the first of them.
    """
    sign = np.where(steps[:, -1, 2:] < steps[:, 0, :1], -1.0, 1.0)
    ends = sign * steps[:, :, 2]
    index = np.minimum((ends[:, None, :] < (sign * times)[:, :, None]).sum(2), steps.shape[1] - 1)
    t, t_next = (np.take_along_axis(steps[:, :, i], index, 1) for i in (0, 2))
    length = np.where(t_next == t, 1.0, t_next - t)
    return index, np.where(times == t_next, 1.0, (times - t) / length)


def _of_batch(record: BatchRecord) -> list[Array]:
    if not record.steps:
        return [np.zeros((0, 3))] * record.n_rows
    rows = np.concatenate([s.rows for s in record.steps])
    table = np.stack([np.concatenate([getattr(s, name) for s in record.steps]) for name in ("t", "h", "t_next")], 1)
    counts = np.bincount(rows, minlength=record.n_rows)
    return np.split(table[np.argsort(rows, kind="stable")], np.cumsum(counts)[:-1])


def _of_bounds(bounds: Any) -> list[Array]:
    """Steps of samples from (start, end) alone; their sizes are the differences, up to rounding."""
    pairs = [np.asarray(part, dtype=np.float64) for part in bounds]
    return [np.stack([p[:, 0], p[:, 1] - p[:, 0], p[:, 1]], 1) for p in pairs]


def _padded(steps: Sequence[Array], ends: Array) -> Array:
    n = max((len(s) for s in steps), default=0)
    table = np.zeros((len(steps), n, 3))
    table[:, :, 0] = table[:, :, 2] = ends[:, None]
    for row, of_row in zip(table, steps, strict=True):
        row[: len(of_row)] = of_row
    return table
