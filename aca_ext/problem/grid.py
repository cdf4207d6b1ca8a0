"""The grid of fixed steps, from the options step_size, n_steps and grid_constructor."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from aca_ext.errors import OptionError, TimeError
from aca_ext.problem.arguments import number_in
from aca_ext.problem.moving_nodes import NodesFollow
from aca_ext.problem.options import FIXED_OPTIONS, Options
from aca_ext.problem.state import State
from aca_ext.problem.times import resolution_of, times_of


def grid_of(given: Options, func: Any, y0: State, times: tuple[float, ...], resolution: float) -> tuple[float, ...]:
    """The nodes of the grid, with every requested time among them unless option interp is given.

    ``resolution`` is the relative spacing of the dtype in which ``times`` were given. A remainder below it is rounding
    and does not become a step of its own.

    Raises:
        OptionError: an option is not accepted, or several are given.
    """
    step_size, constructor = given.get("step_size"), given.get("grid_constructor")
    both = [name for name in FIXED_OPTIONS if given.get(name) is not None]
    if len(both) > 1:
        raise OptionError(f"options {both[0]} and {both[1]} are both given; give only one of them.")
    lands = given.get("interp") is None
    if given.get("n_steps") is not None:
        return _equal_grid(given["n_steps"], times, resolution, lands)
    if constructor is not None:
        return _constructed_grid(constructor, func, y0, times, resolution, lands)
    if step_size is None:
        return times
    step = number_in(step_size)
    if step is None or not 0 < step < math.inf:
        raise OptionError(f"option step_size is {step_size!r}; it must be positive and finite.")
    rounding = resolution * max(abs(times[0]), abs(times[-1]))
    nodes = [times[0]]
    for start, end in pairwise(times if lands or len(times) == 1 else (times[0], times[-1])):
        nodes += _nodes_between(start, end, step, rounding, resolution_of(step_size) / 2)
    return tuple(nodes) if lands else _moved_to_times(nodes, times, rounding)


def followed_by_nodes(given: Options) -> NodesFollow:
    """The behaviour of nodes between requested times when these move."""
    if given.get("grid_constructor") is not None:
        return NodesFollow.NOTHING
    if given.get("n_steps") is not None:
        return NodesFollow.BOTH_ENDS
    return NodesFollow.TIMES if given.get("step_size") is None else NodesFollow.TIME_BEFORE


def _moved_to_times(nodes: Sequence[float], times: Sequence[float], rounding: float) -> tuple[float, ...]:
    """The nodes, those within rounding of a requested time moved there."""
    sign = -1.0 if times[-1] < times[0] else 1.0
    moved = [sign * node for node in nodes]
    for time in (sign * time for time in times):
        i = bisect_left(moved, time)
        for j in (i - 1, i):
            if 0 <= j < len(moved) and abs(moved[j] - time) <= rounding:
                moved[j] = time
                break
    return tuple(sign * node for node in moved)


def _nodes_between(start: float, end: float, step: float, rounding: float, step_rounding: float) -> list[float]:
    """The nodes after ``start``, up to ``end``.

    ``rounding`` is the absolute error of ``end - start``, ``step_rounding`` the relative error of ``step``.
    """
    steps = abs(end - start) / step
    # At most half a step: coarse times, for example in bfloat16, may be wrong by many steps.
    slack = min(0.5, max(1e-9, rounding / step + steps * step_rounding))
    count = max(1, math.ceil(steps - slack))
    signed = math.copysign(step, end - start)
    if steps > count + 1e-9:
        signed = (end - start) / count  # spreads the rounding over all steps
    return [*(start + i * signed for i in range(1, count)), end]


def _constructed_grid(
    constructor: Any, func: Any, y0: State, times: tuple[float, ...], resolution: float, lands: bool
) -> tuple[float, ...]:
    """The grid of ``constructor``, with the requested times among its nodes if the solve ``lands`` on them."""
    if not callable(constructor):
        raise OptionError(
            f"option grid_constructor is of type {type(constructor).__name__}; give a function of (func, y0, t) that "
            "returns a 1-d tensor of times."
        )
    grid = constructor(func, y0, torch.tensor(times, dtype=torch.float64, device="cpu"))
    try:
        nodes = times_of(grid)
    except TimeError as error:
        raise OptionError(f"option grid_constructor must return increasing or decreasing times, but {error}") from None
    reach = abs(times[-1] - times[0])
    rounding = max(resolution, resolution_of(grid)) * max(abs(times[0]), abs(times[-1]))
    if max(abs(nodes[0] - times[0]), abs(nodes[-1] - times[-1])) > max(1e-9 * reach, rounding):
        raise OptionError(
            f"option grid_constructor returned a grid from {nodes[0]!r} to {nodes[-1]!r}; it must run from t[0] = "
            f"{times[0]!r} to t[-1] = {times[-1]!r}."
        )
    return _with_times([times[0], *nodes[1:-1], times[-1]], times, rounding, lands)


def _equal_grid(n_steps: object, times: tuple[float, ...], resolution: float, lands: bool) -> tuple[float, ...]:
    """The grid of ``n_steps`` equal steps, with the requested times among its nodes if the solve ``lands`` on them."""
    number = number_in(n_steps)
    if number is None or number % 1 != 0 or not 1 <= number < math.inf:
        raise OptionError(f"option n_steps is {n_steps!r}; it must be an integer of at least 1.")
    if len(times) == 1:
        return times
    n, start, end = int(number), times[0], times[-1]
    nodes = [start, *(start + (end - start) * (i / n) for i in range(1, n)), end]
    if any(one == other for one, other in pairwise(nodes)):
        raise OptionError(f"option n_steps is {n}, and steps as small do not change the time. Give fewer steps.")
    return _with_times(nodes, times, resolution * max(abs(start), abs(end)), lands)


def _with_times(nodes: Sequence[float], times: tuple[float, ...], rounding: float, lands: bool) -> tuple[float, ...]:
    """The nodes, those within rounding of a requested time moved there; all times among them if the solve ``lands``."""
    # A node within rounding of a requested time is that time, unless the nodes are closer to one another than that.
    closest = min((abs(other - one) for one, other in pairwise(nodes)), default=0.0)
    near = max(1e-12 * abs(times[-1] - times[0]), min(rounding, closest / 2))
    moved = _moved_to_times(nodes, times, near)
    return tuple(sorted({*moved, *times}, reverse=times[-1] < times[0])) if lands else moved
