"""Step control: the state of a solve between two steps, and the decisions on the next one.

The Python counterpart of csrc/control/step_control.h, equal to it bit for bit. It uses only Python's operators, so that
it accepts floats and 0-d tensors; with tensors, the naive gradient differentiates the choice of the step size. Solves
whose steps run in Python use it too. Every loop over steps is: propose a trial, make the step, measure its error, judge
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aca_ext.numerics.controller import Controller, Number


class StepControl:
    """The decisions between the steps of one solve.

    Args:
        controller: chooses the step sizes. With None, each trial ends at the next stop and is accepted.
        max_num_steps: limit on the trial steps.
        times: the requested times, strictly monotonic; the first is the start.
        stops: times at which a step must end, in the direction of the solve; the last one is the last of ``times``.

    Attributes:
        status: "running", "done", "step_limit", "step_size" (the step became too small) or "not_finite" (the error of
            the last trial was not finite; the caller decides if a smaller step can help).
        t: the time reached.
        h: size of the next trial, positive.
        sign: direction of the solve, 1 or -1.
        length: length of the solve, positive.
        ratio: error ratio of the last trial.
        ratios: error ratios of the last three accepted trials, newest first.
        h_trial: signed step size of the proposed trial.
        t_next: end of the proposed trial.
        is_accepted: True if the last trial was accepted.
        due: range of the indices of requested times that the last accepted step reached.
        n_steps, n_accepted: counts of all trials and of accepted ones.
    """

    def __init__(
        self, controller: Controller | None, max_num_steps: int, times: Sequence[float], stops: Sequence[float]
    ) -> None:
        self._controller, self._max_num_steps = controller, max_num_steps
        self._times, self._stops = times, stops
        self.status = "running" if len(times) > 1 else "done"
        self.t: Number = times[0]
        self.h: Number = 0.0
        self.sign = -1.0 if times[-1] < times[0] else 1.0
        self.length = abs(times[-1] - times[0])
        self.ratio: Number = math.nan
        self.ratios: list[Number] = []
        self.h_trial: Number = 0.0
        self.t_next: Number = self.t
        self.is_accepted = False
        self.due = (0, 0)
        self.n_steps = self.n_accepted = 0
        self._next_output, self._next_stop, self._is_cut = 1, 0, False
        self._h_now: Number = 0.0  # size of the trial, positive
        self._start: Number = self.t  # start of the last accepted step

    def propose(self) -> None:
        """Sets ``h_trial`` and ``t_next`` of the next trial, or the status that says why there is none.

        A trial that would pass the next stop, or almost reach it, is cut or stretched to end there.
        """
        self.status = "running"
        t, h, sign, stop = self.t, self.h, self.sign, self._stops[self._next_stop]
        if self._controller is None:
            self._is_cut, self.t_next, self.h_trial = True, stop, stop - t
            return
        if self.n_steps >= self._max_num_steps:
            self.status, self.ratio = "step_limit", self._last_ratio
            return
        self._is_cut = bool(sign * (t + sign * h) >= sign * stop or abs(stop - t) <= h * (1 + 1e-12))
        self.t_next, self._h_now = (stop, abs(stop - t)) if self._is_cut else (t + sign * h, h)
        self.h_trial = sign * self._h_now
        if self.t_next == t:
            self.status, self.ratio = "step_size", self._last_ratio

    def judge(self, ratio: Number) -> None:
        """Accepts the trial if its error ``ratio`` is at most 1, and chooses the size of the next trial."""
        self.n_steps += 1
        self.is_accepted = False
        controller = self._controller
        if controller is None:
            return self._accept()
        self.ratio = ratio
        if ratio <= 1:
            self._accept()
            self.ratios = [ratio, *self.ratios[:2]]
            grown = controller.grow(self._h_now, self.ratios)
            # The error of a step that was cut says little about the next size, so it never lowers it.
            self.h = max(grown, self.h) if self._is_cut else grown
            return None
        self.h = controller.shrink(self._h_now, ratio)
        if not ratio < math.inf:
            self.status = "not_finite"
        elif not self.can_shrink:
            self.status = "step_size"
        return None

    def resume(self) -> None:
        """Sets the status back to "running" after a trial whose error was not finite."""
        self.status = "running"

    @property
    def can_shrink(self) -> bool:
        """True if a smaller trial is possible: it is not below ``min_step``, and adding it changes the time."""
        assert self._controller is not None
        return bool(self.h >= self._controller.min_step and self.t + self.sign * self.h * 0.5 != self.t)

    def position(self, output: int) -> float:
        """Position of a requested time in the last accepted step, exactly 1 at its end."""
        time = self._times[output]
        return 1.0 if time == self.t else (time - self._start) / (self.t - self._start)

    def _accept(self) -> None:
        self.is_accepted = True
        self.n_accepted += 1
        self._start, self.t = self.t, self.t_next
        first, reached = self._next_output, self.sign * self.t_next
        while self._next_output < len(self._times) and self.sign * self._times[self._next_output] <= reached:
            self._next_output += 1
        self.due = first, self._next_output
        if self._is_cut:
            self._next_stop += 1
            if self._next_stop == len(self._stops):
                self.status = "done"

    @property
    def _last_ratio(self) -> Number:
        return self.ratios[0] if self.ratios else math.nan
