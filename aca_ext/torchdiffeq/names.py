"""Names of the methods that torchdiffeq and aca_ext share, and their kinds."""

from __future__ import annotations

from aca_ext.errors import UnknownNameError
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS
from aca_ext.numerics.methods import ALIASES, METHODS
from aca_ext.numerics.weights import Weights

SCIPY = "scipy_solver"
_NAMES = (
    "dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun", "euler", "midpoint", "heun2", "heun3", "rk4",
    "explicit_adams", "implicit_adams", "fixed_adams",
)  # fmt: skip
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
# Of fixed steps in torchdiffeq, whatever they can do here.
IMPLICIT = (
    "implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "gl4", "radauIIA5", "gl6", "sdirk2", "trbdf2",
)  # fmt: skip
SOLVERS: dict[str, Weights | str] = {
    **{name: METHODS[ALIASES.get(name, name)] for name in _NAMES},
    **{name: IMPLICIT_METHODS[name] for name in IMPLICIT},
    SCIPY: SCIPY,
}


def checked_method(method: object) -> str:
    """The name of a method; None is "dopri5".

    Raises:
        UnknownNameError: there is no such method.
    """
    if method is None:
        return "dopri5"
    if isinstance(method, str) and method in SOLVERS:
        return method
    raise UnknownNameError(f"unknown method {method!r}; there are {', '.join(SOLVERS)}.")


def kind_of(method: str) -> str:
    """The kind of method: "adaptive", "fixed" or "scipy"."""
    if method == SCIPY:
        return "scipy"
    return "adaptive" if method not in IMPLICIT and METHODS[ALIASES.get(method, method)].adaptive else "fixed"
