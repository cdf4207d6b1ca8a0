"""Names of the methods that torchdiffeq and aca_ext share, and their kinds."""

from __future__ import annotations

from aca_ext.errors import UnknownNameError
from aca_ext.numerics.methods import ALIASES, METHODS
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.suggestions import is_implicit

SCIPY = "scipy_solver"
_NAMES = (
    "dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun", "euler", "midpoint", "heun2", "heun3", "rk4",
    "explicit_adams", "implicit_adams", "fixed_adams",
)  # fmt: skip
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
SOLVERS: dict[str, Tableau | str] = {**{name: METHODS[ALIASES.get(name, name)] for name in _NAMES}, SCIPY: SCIPY}


def checked_method(method: object) -> str:
    """The name of a method; None is "dopri5".

    Raises:
        UnknownNameError: there is no such method.
    """
    if method is None:
        return "dopri5"
    if isinstance(method, str) and method in SOLVERS:
        return method
    missing = " Implicit Runge-Kutta methods are not available yet." if _is_missing(method) else ""
    raise UnknownNameError(f"unknown method {method!r}; there are {', '.join(SOLVERS)}.{missing}")


def _is_missing(method: object) -> bool:
    return is_implicit(method) or method in ("trapezoid", "gl4", "gl6")


def kind_of(method: str) -> str:
    """The kind of method: "adaptive", "fixed" or "scipy"."""
    if method == SCIPY:
        return "scipy"
    return "adaptive" if METHODS[ALIASES.get(method, method)].adaptive else "fixed"
