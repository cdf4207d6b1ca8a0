"""Step control: the state of a solve between two steps and the decisions about it, as in csrc/control/step_control.h.

The twin of the C++ code in Python's operators alone, so that 0-d tensors pass through it as well as floats: that is how
the naive gradient differentiates the search for the step size. It serves, too, the solves that run step by step in
Python. A loop over steps, whoever runs it, is: propose the trial, make the step, measure its error, judge it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from aca_ext.numerics.controller import Controller, Number


class StepControl:
    """The decisions between the steps of one solve.

    Args:
        controller: chooses the step sizes; None: each trial ends at the next stop and is accepted.
        max_num_steps: trial steps before the solve stops.
        times: the requested times, strictly monotonic; the first is the start.
        stops: times at which a step must end, in the direction of the solve, the last of ``times`` among them.

    Attributes:
        status: "running", "done", "step_limit", "step_size" (the step became too small) or "not_finite" (the error of
            the last trial was not finite: the caller looks whether a smaller step can help).
        t, h: the time reached, and the size of the next trial without its sign.
        sign, length: direction, 1 or -1, and length of the solve.
        ratio: error ratio of the last trial; ``ratios`` those of the last three accepted ones, newest first.
        h_trial, t_next: the signed step of the trial that was proposed, and its end.
        is_accepted: the trial just judged was accepted.
        due: range of the indices of requested times that the last accepted step reached.
        n_steps, n_accepted: counts of trials and of accepted ones.
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
        self._h_now: Number = 0.0  # the size of the trial
        self._start: Number = self.t  # of the last accepted step

    def propose(self) -> None:
        """Sets the trial to come, or the status that says why there is none.

        A trial that would pass a stop, or all but reach it, ends there.
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
        """Accepts the trial if its error ``ratio`` is at most 1, and chooses the size of the next one."""
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
            # A step cut short says little about the size to come.
            self.h = max(grown, self.h) if self._is_cut else grown
            return None
        self.h = controller.shrink(self._h_now, ratio)
        if not ratio < math.inf:
            self.status = "not_finite"
        elif not self.can_shrink:
            self.status = "step_size"
        return None

    def resume(self) -> None:
        """Lets the solve go on after a look at a trial whose error was not finite."""
        self.status = "running"

    @property
    def can_shrink(self) -> bool:
        """A smaller trial is possible: it is not below ``min_step``, and time moves."""
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
