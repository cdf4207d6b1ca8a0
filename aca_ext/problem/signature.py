"""The order in which func names its arguments: func(y, t), as scipy's odeint has it, is refused by name.

Called the other way round, such a func often returns a slope of the right shape, and a wrong solution.
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
    """Raises ArgumentTypeError where the first two arguments of func are named like a state and a time."""
    names = _first_names(func)
    if len(names) == 2 and names[1] in _TIMES and names[0] in _STATES:
        raise ArgumentTypeError(
            f"func takes ({names[0]}, {names[1]}), but is called as func(t, y): time first. Change the order, or give "
            "lambda t, y: func(y, t)."
        )


def _first_names(func: Any) -> tuple[str, ...]:
    """The names of the first two arguments, where code in Python tells them."""
    first = 0
    if type(func) is not FunctionType:
        if type(func) is partial:
            return () if func.args else _first_names(func.func)
        first = 1  # after self
        if isinstance(func, nn.Module):
            func = getattr(type(func), "forward", None)  # of a scripted module there is none
        elif type(func) is not MethodType:
            func = type(func).__call__
    code = getattr(func, "__code__", None)
    return () if code is None or code.co_argcount < first + 2 else code.co_varnames[first : first + 2]
