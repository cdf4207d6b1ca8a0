"""The steps of a solve, replayed one by one from their checkpoints: those of Runge and Kutta, and those of Adams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.numerics.adams import Adams
from aca_ext.problem.problem import Problem
from aca_ext.solver.adams import AdamsSteps, TransposedAdamsSteps, repeated
from aca_ext.solver.checkpoints import StepRecord
from aca_ext.solver.method import Method, RepeatedSteps, advancing_method_of, methods_of_replay, parts_of
from aca_ext.solver.runge_kutta import Coefficients, scheme_of, stage_times
from aca_ext.solver.slope_checkpoints import earlier_slopes
from aca_ext.solver.transposed_step import Compare
from aca_ext.vector_field.replay import Replay

Outputs = Sequence[tuple[Sequence[float], Tensor]]
Held = Sequence[tuple[int, Tensor]]


class ReplayedSteps(Protocol):
    """The steps of one solve; a row is the checkpoint of the state at the start of a step."""

    def scheme(self, n: int) -> Coefficients:
        """The coefficients of step n."""

    def state(self, row: Tensor) -> Tensor:
        """The state in a row."""

    def advance(self, n: int, row: Tensor, out: Tensor) -> Tensor:
        """Computes the row after that of step n into ``out``, with the arithmetic of the forward pass."""

    def pull_back(self, n: int, row: Tensor, outputs: Outputs, compare: Compare, y_next: Tensor) -> Tensor:
        """Replays step n and returns the cotangent of its start; see ``runge_kutta.step_vjp``."""


def replayed_steps(
    problem: Problem, record: StepRecord, replay: Replay, ops: TorchOperations, held: Held, width: int | None
) -> ReplayedSteps:
    """The steps of ``record``. ``width`` counts the tensors in a row of a multistep method; None without slopes."""
    if width is None:
        return _OneStep(problem, record, replay, ops)
    return _Adams(problem, record, replay, ops, held, width)


class _OneStep:
    """Steps of a one-step method: a row is a state."""

    def __init__(self, problem: Problem, record: StepRecord, replay: Replay, ops: TorchOperations) -> None:
        self._problem, self._record, self._replay, self._ops = problem, record, replay, ops
        self._methods = methods_of_replay(problem, record, replay, ops, estimate_error=problem.adaptive)

    @cached_property
    def _advancing(self) -> list[Method]:
        return [advancing_method_of(part, self._replay, self._ops) for part in parts_of(self._problem)]

    def scheme(self, n: int) -> Coefficients:
        return self._methods[self._record.part_of(n)].scheme

    def state(self, row: Tensor) -> Tensor:
        return row

    def advance(self, n: int, row: Tensor, out: Tensor) -> Tensor:
        s, method = self._record.steps[n], self._advancing[self._record.part_of(n)]
        self._replay.begin_step(n, s.random_states)
        times = stage_times(method.scheme, s.t, s.h, s.t_next, self._problem.jumps, row.dtype)
        with torch.no_grad():
            return method.step(times, row, s.h, None, out).y1

    def pull_back(self, n: int, row: Tensor, outputs: Outputs, compare: Compare, y_next: Tensor) -> Tensor:
        s, method = self._record.steps[n], self._methods[self._record.part_of(n)]
        times = stage_times(method.scheme, s.t, s.h, s.t_next, self._problem.jumps, row.dtype)
        return method.vjp(times, row, s.h, outputs, compare, y_next)


class _Adams:
    def __init__(
        self, problem: Problem, record: StepRecord, replay: Replay, ops: TorchOperations, held: Held, width: int
    ) -> None:
        self._problem, self._steps, self._replay, self._ops = problem, record.steps, replay, ops
        self._formulas = record.formulas
        self._scheme = scheme_of(problem.tableau, estimate_error=False)
        self._transposed = TransposedAdamsSteps(replay, ops, record.formulas)
        self._known = dict(held) if width == 2 else {}  # rows of single slopes, which are all there

    def scheme(self, n: int) -> Coefficients:
        return self._scheme

    def state(self, row: Tensor) -> Tensor:
        return row[0]

    def _times(self, n: int, dtype: torch.dtype) -> list[Any]:
        s = self._steps[n]
        return stage_times(self._scheme, s.t, s.h, s.t_next, self._problem.jumps, dtype)

    def advance(self, n: int, row: Tensor, out: Tensor) -> Tensor:
        s, replay, ops = self._steps[n], self._replay, self._ops
        replay.begin_step(n, s.random_states)
        times = self._times(n, row.dtype)
        with torch.no_grad():
            slopes = [replay(ops.scalars(times[:1])[0], row[0]).detach(), *row[1:].unbind(0)]
            repeated(replay, ops, self._formulas[n], times, row[0], s.h, slopes, out[0])
            for kept, slope in zip(out[1:].unbind(0), slopes, strict=False):
                kept.copy_(slope)
        return out

    def pull_back(self, n: int, row: Tensor, outputs: Outputs, compare: Compare, y_next: Tensor) -> Tensor:
        earlier = earlier_slopes(n, row, self._known, self._formulas[n].n_slopes - 1)
        times = self._times(n, row.dtype)
        return self._transposed.pull_back(n, times, row[0], self._steps[n].h, earlier, outputs, compare)


def repeated_steps(
    problem: Problem, record: StepRecord, replay: Replay, ops: TorchOperations
) -> Callable[[int], RepeatedSteps]:
    """The method of each step of ``record``, for steps in order, with an autograd graph if ``ops`` make one."""
    if isinstance(problem.tableau, Adams):
        adams = AdamsSteps(replay, ops, problem, record.formulas)
        return lambda n: adams
    methods = methods_of_replay(problem, record, replay, ops, estimate_error=False)
    return lambda n: methods[record.part_of(n)]
