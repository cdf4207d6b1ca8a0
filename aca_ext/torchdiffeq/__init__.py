"""A drop-in for torchdiffeq: ``import aca_ext.torchdiffeq as torchdiffeq`` is the whole migration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from aca_ext.torchdiffeq.dense import odeint_dense
from aca_ext.torchdiffeq.names import SOLVERS
from aca_ext.torchdiffeq.solves import odeint, odeint_adjoint, odeint_event

__all__ = ["SOLVERS", "install", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]

__version__ = "0.2.5"  # of torchdiffeq, whose interface this is


def install() -> Callable[[], None]:
    """Makes ``import torchdiffeq`` find this module, in this process.

    Modules that have imported torchdiffeq before keep what they have.

    Returns:
        A function that undoes it.
    """
    inner, module_of_odeint = ModuleType("torchdiffeq._impl"), ModuleType("torchdiffeq._impl.odeint")
    for name in ("odeint", "odeint_adjoint", "odeint_dense", "odeint_event"):
        setattr(inner, name, globals()[name])
    for name in ("SOLVERS", "odeint", "odeint_dense", "odeint_event"):
        setattr(module_of_odeint, name, globals()[name])
    new = {
        "torchdiffeq": sys.modules[__name__],
        "torchdiffeq._impl": inner,
        "torchdiffeq._impl.odeint": module_of_odeint,
    }
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchdiffeq"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(new)

    def undo() -> None:
        for name in new:
            sys.modules.pop(name, None)
        sys.modules.update(before)

    return undo
