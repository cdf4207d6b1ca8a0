"""Calls of the user's callback after each trial, and its request to end the solve."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aca_ext.errors import ArgumentValueError
from aca_ext.kernels.reference import Number, as_float
from aca_ext.problem.problem import Problem
from aca_ext.progress import Step, asks_to_stop


def report(
    problem: Problem, control: Any, times: tuple[Number, Number, Number], ratio: Number, y: Tensor, n: int
) -> bool:
    """Calls the callback, if there is one; returns True if it ends the solve.

    Args:
        times: t, t_next and h of the trial.
        ratio: its error in units of the tolerance.
        y: state at its start.
        n: number of evaluations of func so far.
    """
    if problem.on_step is None:
        return False
    t, t_next, h = (as_float(x) for x in times)
    counts = control.n_steps, control.n_accepted, control.n_steps - control.n_accepted, n
    state = problem.packing.unpack(y.detach())
    return stops(problem, problem.on_step(Step(t, t_next, h, as_float(ratio), control.is_accepted, *counts, state)))


def stops(problem: Problem, result: object) -> bool:
    """Tells whether the result of a callback ends the solve.

    Raises:
        ArgumentValueError: it would, and this solve cannot end early.
    """
    if not asks_to_stop(result):
        return False
    if not problem.callback_stops:
        raise ArgumentValueError(
            "callback returned True, which ends a solve early. Only aca_ext.solve shows where it ended: use it with "
            'gradient="aca" or "direct", without events, dense, output_fn or times that require grad, and with samples '
            "that share their steps. A callback that returns None lets the solve go on."
        )
    return True
