"""Events of one solve: located in each accepted step, recorded, and appended to its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number, as_float
from aca_ext.problem.problem import Problem
from aca_ext.solver.checkpoints import StepRecord
from aca_ext.solver.event_search import EventSearch, Occurrence
from aca_ext.solver.runge_kutta import Trial, interpolate


class StepEvents:
    """The events of one solve.

    Args:
        record: record of the solve, to which the occurrences are appended.
    """

    def __init__(self, problem: Problem, ops: TorchOperations, record: StepRecord) -> None:
        self._problem, self._ops, self._record = problem, ops, record
        self._search = EventSearch(problem.events, problem.packing, lambda number: ops.scalars([number])[0])
        self._states: list[Tensor] = []

    def start(self, t: Number, y: Tensor, slope: Tensor | None, reach: float) -> None:
        """Computes the signs of the event functions at the start of the solve."""
        self._search.start(as_float(t), y.detach(), slope, reach)

    def find(self, tableau: Any, t: Number, t_next: Number, y: Tensor, h: Number, trial: Trial) -> float:
        """Records the events within an accepted step of the method ``tableau``.

        Returns the position at which they end the solve, or infinity.
        """
        ops, events = self._ops, self._problem.events

        def state_at(theta: float) -> Tensor:
            if theta in (0.0, 1.0):
                return trial.y1 if theta else y
            return interpolate(ops, tableau, y, h, trial.k, theta)

        with torch.no_grad():
            found, last = self._search.within(as_float(t), as_float(t_next), state_at)
        for theta, event, element in found:
            with torch.no_grad():
                slopes = zip(tableau.dense_derivative_weights(theta), trial.k, strict=True)
                derivative = torch.stack([weight * k for weight, k in slopes if weight != 0]).sum(0)
            time = t_next if theta == 1.0 else t + theta * (t_next - t)
            step = len(self._record.steps)
            self._record.events.append(Occurrence(event, element, time, theta, step, derivative))
            self._states.append(state_at(theta))
        if last <= 1:
            ending = [event for theta, event, _ in found if theta == last and events[event].ends_segment]
            self._record.ended_by = min(ending, key=lambda event: not events[event].terminal)
        return last

    def append_to(self, outputs: list[Tensor]) -> None:
        """Appends the states at the events to the outputs of the solve, and to the record of their steps."""
        for occurrence, state in zip(self._record.events, self._states, strict=True):
            occurrence.row = len(outputs)
            outputs.append(state)
            self._record.steps[occurrence.step].outputs.append((occurrence.row, occurrence.theta))
