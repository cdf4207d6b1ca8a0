"""Options of implicit methods: the Jacobian of func, and the tolerance of Newton's method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from aca_ext.errors import ArgumentTypeError, OptionError
from aca_ext.numerics.implicit import RosenbrockTableau
from aca_ext.numerics.tableau import Tableau
from aca_ext.numerics.weights import Weights
from aca_ext.problem.arguments import lookup, number_in
from aca_ext.problem.state import Packing

NEWTON_OPTIONS = ("jacobian", "newton_tol", "preconditioner")
_KINDS = ("dense", "block", "krylov")
_LARGEST_DENSE = 2048  # elements of a state whose Jacobian is a matrix by default
# The errors of stages add up over the steps, whose number grows as the tolerance falls. With these defaults the error
# of kvaerno5 at the end of the Oregonator stays below 10 tolerances for rtol from 1e-3 to 1e-8.
_LARGEST_TOLERANCE, _LOWEST_TOLERANCE, _TOLERANCE_BY_RTOL = 1e-3, 1e-7, 30.0
# The error estimate of radau5, of order 3, asks for steps whose error is far below the tolerance.
_TOLERANCE_OF = {"radau5": 1e-2}


@dataclass(frozen=True)
class NewtonOptions:
    """Validated options.

    Attributes:
        jacobian: "dense", "block", "krylov", or a function of (t, y, \\*args) that returns a matrix.
        tolerance: largest error of a stage in units of rtol and atol, for adaptive steps.
        preconditioner: for "krylov", a function of (t, y, c, \\*args) that returns a linear function near (I - c·J)⁻¹.
    """

    jacobian: str | Callable[..., Any]
    tolerance: float
    preconditioner: Callable[..., Any] | None = None


def newton_options_of(
    given: Mapping[str, Any], tableau: Weights, packing: Packing, y0: Tensor, rtol: float | Tensor
) -> NewtonOptions | None:
    """The options of an implicit method; None for an explicit one.

    Raises:
        OptionError: an option has a value that is not accepted.
        ArgumentTypeError: the state has a dtype for which PyTorch solves no linear systems.
    """
    if isinstance(tableau, Tableau):
        return None
    if y0.dtype.itemsize < 4:
        raise ArgumentTypeError(
            f"method {tableau.name!r} solves linear systems, which PyTorch does not for states of dtype {y0.dtype}. "
            "Convert y0, for example with y0.float()."
        )
    jacobian = given.get("jacobian")
    if isinstance(tableau, RosenbrockTableau):
        _check_rosenbrock(given, tableau)
        jacobian = "dense"
    if jacobian is None:
        jacobian = "dense" if y0.numel() <= _LARGEST_DENSE else "krylov"
    elif not callable(jacobian):
        lookup("jacobian", jacobian, _KINDS)
    if jacobian == "block" and (packing.is_tuple or y0.dim() < 2):
        raise OptionError(
            'option jacobian="block" needs a state whose first dimension counts samples that do not depend on one '
            f'another; y0 is {packing.describe()}. Use "dense", or a state of shape (samples, ...).'
        )
    preconditioner = given.get("preconditioner")
    if preconditioner is not None:
        _check_preconditioner(preconditioner, jacobian)
    tolerance = given.get("newton_tol")
    number = _tolerance_for(tableau, rtol) if tolerance is None else number_in(tolerance)
    if number is None or not 0 < number < 1:
        raise OptionError(f"option newton_tol is {tolerance!r}; it must be a number above 0 and below 1.")
    return NewtonOptions(jacobian, number, preconditioner)


def _tolerance_for(tableau: Weights, rtol: float | Tensor) -> float:
    """The default of option newton_tol."""
    if tableau.name in _TOLERANCE_OF:
        return _TOLERANCE_OF[tableau.name]
    if isinstance(rtol, Tensor):
        rtol = float(rtol.min()) if rtol.numel() else 0.0
    return min(_LARGEST_TOLERANCE, max(_LOWEST_TOLERANCE, _TOLERANCE_BY_RTOL * rtol))


def newton_options_of_samples(common: NewtonOptions, jacobian: Any, packed: Tensor) -> NewtonOptions:
    """The options for independent samples, each with a Jacobian of its own, from those for their common state.

    Args:
        jacobian: the given option.
        packed: the initial states, (batch, ...).

    Raises:
        OptionError: the samples would need GMRES.
    """
    size = packed[0].numel() if len(packed) else 0
    if jacobian == "krylov" or (jacobian is None and size > _LARGEST_DENSE):
        given = "option jacobian is 'krylov'" if jacobian else f"a sample has {size} elements, for 'krylov' by default"
        raise OptionError(
            f'{given}, whose iterations have one step size for all samples. With batch="independent", use '
            'jacobian="dense" or a function, or leave batch out.'
        )
    return common if callable(common.jacobian) else replace(common, jacobian="block")


def _check_preconditioner(preconditioner: Any, jacobian: Any) -> None:
    if not callable(preconditioner):
        raise OptionError(
            f"option preconditioner is a {type(preconditioner).__name__}; it must be a function of (t, y, c, *args) "
            "that returns a function of a vector, an approximation of its product with (I - c·J)⁻¹."
        )
    if jacobian != "krylov":
        given = "a function" if callable(jacobian) else repr(jacobian)
        raise OptionError(
            f"option preconditioner is for GMRES, and option jacobian is {given}, which solves directly. Give "
            'jacobian="krylov" too, or leave preconditioner out.'
        )


def _check_rosenbrock(given: Mapping[str, Any], tableau: RosenbrockTableau) -> None:
    """Raises OptionError for options that Rosenbrock methods do not have."""
    unusable = [
        name
        for name, allowed in {
            "jacobian": (None, "dense"),
            "newton_tol": (None,),
            "preconditioner": (None,),
            "interp": (None, "linear"),
        }.items()
        if given.get(name) not in allowed
    ]
    if unusable:
        raise OptionError(
            f"method {tableau.name!r} makes no Newton iterations, needs the exact Jacobian as a matrix, and has no "
            f"cubic interpolation, so it does not take the given {unusable[0]}. Leave it out, or use an implicit "
            "Runge-Kutta method such as kvaerno5."
        )
