"""Rejection of a func whose argument names show the order (y, t), which is that of scipy's odeint.

Called as func(t, y), such a func often returns a slope of the right shape, and the solution would be wrong.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from aca_ext.errors import ArgumentTypeError

_STATES = frozenset(("y", "x", "z", "u", "h", "q", "state", "hidden"))
_TIMES = frozenset(("t", "time", "tau"))


def refuse_swapped(func: Any) -> None:
    """Raises ArgumentTypeError if the first argument of func is named like a state and the second like a time."""
    names = _first_names(func)
    if len(names) == 2 and names[1] in _TIMES and names[0] in _STATES:
        raise ArgumentTypeError(
            f"func takes ({names[0]}, {names[1]}), but is called as func(t, y), time first. Swap its arguments, or "
            "give lambda t, y: func(y, t)."
        )


def _first_names(func: Any) -> tuple[str, ...]:
    """The names of the first two arguments; empty if func has no Python code or fewer arguments."""
    first = 0
    if type(func) is not FunctionType:
        if type(func) is partial:
            return () if func.args else _first_names(func.func)
        first = 1  # after self
        if isinstance(func, nn.Module):
            func = getattr(type(func), "forward", None)  # None for a scripted module
        elif type(func) is not MethodType:
            func = type(func).__call__
    code = getattr(func, "__code__", None)
    return () if code is None or code.co_argcount < first + 2 else code.co_varnames[first : first + 2]
