"""The nodes of fixed steps, by the options step_size and grid_constructor."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from aca_ext.arguments import number_in
from aca_ext.errors import OptionError, TimeError
from aca_ext.options import Options
from aca_ext.state import State
from aca_ext.times import times_of


def grid_of(given: Options, func: Any, y0: State, times: tuple[float, ...]) -> tuple[float, ...]:
    """The nodes that the options ask for, each of the requested ``times`` among them."""
    step_size, constructor = given.get("step_size"), given.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise OptionError("options step_size and grid_constructor exclude each other; give one.")
    if constructor is not None:
        return _constructed_grid(constructor, func, y0, times)
    if step_size is None:
        return times
    step = number_in(step_size)
    if step is None or not 0 < step < math.inf:
        raise OptionError(f"option step_size is {step_size!r}; it must be positive and finite.")
    nodes = [times[0]]
    for start, end in pairwise(times):
        # A remainder below a billionth of a step is rounding of end - start, not a step.
        count = max(1, math.ceil(abs(end - start) / step - 1e-9))
        signed = math.copysign(step, end - start)
        nodes += [start + i * signed for i in range(1, count)]
        nodes.append(end)
    return tuple(nodes)


def _constructed_grid(constructor: Any, func: Any, y0: State, times: tuple[float, ...]) -> tuple[float, ...]:
    """The user's grid with the requested times among its nodes."""
    if not callable(constructor):
        raise OptionError("option grid_constructor is no function; give one of (func, y0, t) that returns a 1-d grid.")
    grid = constructor(func, y0, torch.tensor(times, dtype=torch.float64, device="cpu"))
    try:
        nodes = times_of(grid)
    except TimeError as error:
        raise OptionError(f"the grid of option grid_constructor is no grid: {error}") from None
    reach = abs(times[-1] - times[0])
    tolerance = 1e-9 * reach
    if abs(nodes[0] - times[0]) > tolerance or abs(nodes[-1] - times[-1]) > tolerance:
        raise OptionError(
            f"the grid of option grid_constructor runs from {nodes[0]!r} to {nodes[-1]!r}; it must run from t[0] = "
            f"{times[0]!r} to t[-1] = {times[-1]!r}."
        )
    # A node within rounding of a requested time is that time.
    apart = [n for n in nodes if min(abs(n - time) for time in times) > 1e-12 * reach]
    return tuple(sorted({*apart, *times}, reverse=times[-1] < times[0]))
