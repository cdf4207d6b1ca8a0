"""Validation of ``options``, one by one; ``grid.py`` validates those that make a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, OptionError, UnknownNameError
from aca_ext.numerics.adams import DEFAULT_MAX_ITERS, MAX_ORDER, MIN_ORDER, Adams
from aca_ext.numerics.controller import Controller
from aca_ext.numerics.implicit import ImplicitTableau
from aca_ext.numerics.switching import Switching
from aca_ext.numerics.tableau import Tableau
from aca_ext.numerics.weights import Weights
from aca_ext.problem.admission import check_readable
from aca_ext.problem.arguments import holds_grad, lookup, number_in
from aca_ext.problem.newton import NEWTON_OPTIONS
from aca_ext.problem.state import Packing

FIXED_OPTIONS = ("step_size", "grid_constructor", "n_steps")
_ALL_FIXED_OPTIONS = (*FIXED_OPTIONS, "interp", "perturb")
_ADAMS_OPTIONS = ("max_order", "max_iters")
# With 0.85 and 0.65, the errors of kvaerno5 and kvaerno3 stay within 10 tolerances on the problems of
# benchmarks/stiff.py. A larger safety saves no evaluations: more steps are rejected, and a rejected step takes as many
# iterations as an accepted one.
_IMPLICIT_SAFETY, _SAFETY_OF = 0.8, {"kvaerno5": 0.85, "kvaerno3": 0.65}
# Most rejected steps are those whose iterations fail, which says little about the right size. Half of it (Hairer &
# Wanner, Solving ODEs II, IV.8) often suffices; with a fifth, kvaerno5 takes up to a third more steps.
_IMPLICIT_DFACTOR = 0.5
_CONTROLLER_OPTIONS = (
    "first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "pcoeff", "icoeff", "dcoeff",
)  # fmt: skip
_ADAPTIVE_OPTIONS = (
    *_CONTROLLER_OPTIONS, "max_num_steps", "step_t", "jump_t", "norm", "batch", "on_step_limit", "on_failure",
    "on_min_step", "compact",
)  # fmt: skip
_ARGUMENTS = ("rtol", "atol", "method", "gradient", "engine", "checkpoints", "args", "params", "progress", "callback")
DEFAULT_MAX_NUM_STEPS = 100_000

Options = Mapping[str, Any]


def check_option_names(given: Options, tableau: Weights | Switching, is_fixed: bool) -> None:
    """Raises UnknownNameError if a name is no option, or an option of adaptive steps in a solve with fixed steps."""
    if is_fixed and isinstance(tableau, Switching):
        raise OptionError(
            f"method {tableau.name!r} changes its method with the stiffness that its steps show, so it chooses their "
            "sizes. Leave out step_size, grid_constructor and n_steps, or choose one method."
        )
    of_newton = () if isinstance(tableau, Tableau) else NEWTON_OPTIONS
    allowed = (*_ALL_FIXED_OPTIONS, *of_newton) if is_fixed else (*_ADAPTIVE_OPTIONS, *FIXED_OPTIONS, *of_newton)
    if isinstance(tableau, Adams):
        allowed = (*allowed, *_ADAMS_OPTIONS[: 2 if tableau.implicit else 1])
    for name in given:
        if name in allowed:
            continue
        if name in _ADAPTIVE_OPTIONS:
            why = (
                "has no error estimate"
                if not tableau.adaptive
                else f"was given {', '.join(name for name in FIXED_OPTIONS if given.get(name) is not None)}"
            )
            raise UnknownNameError(
                f"option {name!r} is for adaptive steps, but method {tableau.name!r} {why}, so its steps are fixed. "
                f"Remove the option; here there are {', '.join(allowed)}."
            )
        if name in NEWTON_OPTIONS:
            raise UnknownNameError(
                f"option {name!r} is for implicit methods, and method {tableau.name!r} is explicit. Remove the option."
            )
        if name in _ALL_FIXED_OPTIONS:
            raise UnknownNameError(f"option {name!r} belongs to fixed steps; give step_size too, or leave it out.")
        if name in _ADAMS_OPTIONS and (is_fixed or name == "max_order"):
            only = "implicit_adams" if name == "max_iters" else "explicit_adams and implicit_adams"
            raise UnknownNameError(f"option {name!r} belongs to {only}; method {tableau.name!r} has no use for it.")
        if name in _ARGUMENTS:
            raise UnknownNameError(f"{name!r} is no option but an argument of its own: give {name}=... beside options.")
        lookup(f"option of method {tableau.name!r}", name, allowed)


def controller_of(given: Options, tableau: Weights) -> Controller:
    """The controller of adaptive steps.

    Raises:
        OptionError: an option is no number or out of range.
    """
    values: dict[str, float] = {}
    if isinstance(tableau, ImplicitTableau):
        values |= {"safety": _SAFETY_OF.get(tableau.name, _IMPLICIT_SAFETY), "dfactor": _IMPLICIT_DFACTOR}
    for name in _CONTROLLER_OPTIONS:
        value = given.get(name)
        if value is None:
            continue
        number = number_in(value)
        if number is None or math.isnan(number):
            raise OptionError(f"option {name} is {value!r}; give a number.")
        values[name] = number
    checks = (
        *((name, math.isfinite, "finite") for name in ("pcoeff", "icoeff", "dcoeff")),
        ("first_step", lambda x: 0 < x < math.inf, "positive and finite"),
        ("min_step", lambda x: 0 <= x < math.inf, "at least 0 and finite"),
        ("max_step", lambda x: x > 0, "positive"),
        ("safety", lambda x: 0 < x <= 1, "in (0, 1]"),
        ("ifactor", lambda x: 1 <= x < math.inf, "at least 1 and finite"),
        ("dfactor", lambda x: 0 < x < 1, "in (0, 1)"),
    )
    for name, is_allowed, allowed in checks:
        if name in values and not is_allowed(values[name]):
            raise OptionError(f"option {name} is {values[name]}; it must be {allowed}.")
    if values.get("min_step", 0.0) > values.get("max_step", math.inf):
        raise OptionError(
            f"option min_step is {values['min_step']}, above max_step, {values['max_step']}; lower min_step or raise "
            "max_step."
        )
    embedded = tableau.embedded_order if isinstance(tableau, Weights) else None
    # The leading term of the error, which for an estimate of higher order is that of the method.
    order = tableau.order if embedded is None else min(tableau.order, embedded) + 1
    return Controller(order=order, **values)


def adams_of(given: Options, method: Adams) -> Adams:
    """The method of Adams with the limits of options max_order and max_iters.

    Raises:
        OptionError: an option is no integer, or out of range.
    """
    max_order, max_iters = given.get("max_order"), given.get("max_iters")
    order = number_in(MAX_ORDER if max_order is None else max_order)
    if order is None or order % 1 != 0 or not MIN_ORDER <= order <= MAX_ORDER:
        raise OptionError(
            f"option max_order is {max_order!r}; it must be an integer from {MIN_ORDER} to {MAX_ORDER}. For lower "
            'orders there is method="rk4".'
        )
    iters = number_in(DEFAULT_MAX_ITERS if max_iters is None else max_iters)
    if iters is None or iters % 1 != 0 or iters < 1:
        raise OptionError(f"option max_iters is {max_iters!r}; it must be an integer of at least 1.")
    return _limited(method, int(order), int(min(iters, 2**62)))


@lru_cache(maxsize=64)
def _limited(method: Adams, max_order: int, max_iters: int) -> Adams:
    return method.with_limits(max_order, max_iters)


def refuse_learnt_times(name: str, given: object) -> None:
    """Raises OptionError if times of option ``name`` require grad, since it would be lost."""
    if torch.is_grad_enabled() and holds_grad(given):
        raise OptionError(
            f"option {name} holds a tensor that requires grad, but times at which steps end have no gradient. Give "
            "values.detach(). To learn the time T of a jump, use events=[Event(lambda t, y: t - T, reset=...)]."
        )


def inner_times(name: str, given: object, times: tuple[float, ...]) -> tuple[float, ...]:
    """The times of option ``name`` that lie strictly inside the solve; times outside are ignored.

    Raises:
        OptionError: they are no finite numbers.
    """
    if given is None:
        return ()
    refuse_learnt_times(name, given)
    check_readable(f"option {name}", given, OptionError)
    try:
        inner = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach().reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"option {name} is no sequence of times ({error}); give a 1-d tensor of times.") from None
    low, high = min(times), max(times)
    for time in inner:
        if not math.isfinite(time):
            raise OptionError(f"option {name} holds {time}; times must be finite.")
    return tuple(time for time in inner if low < time < high)


def norm_of(norm: object, packing: Packing) -> Callable[[Tensor], Any] | None:
    """The user's norm as a function of packed states that validates its result; None for None."""
    if norm is None:
        return None
    if not callable(norm):
        raise OptionError(f"option norm is of type {type(norm).__name__}; give a function from the state to a number.")

    def checked(ratio: Tensor) -> Any:
        value = norm(packing.unpack(ratio))
        number = number_in(value)
        if number is None or number < 0:
            raise OptionError(f"the function of option norm returned {value!r}; it must return a number of at least 0.")
        return value.reshape(()) if isinstance(value, Tensor) else value

    return checked


def max_num_steps_of(value: object) -> int:
    """The limit on trial steps as an int that fits into 64 bits."""
    if value is None:
        return DEFAULT_MAX_NUM_STEPS
    number = number_in(value)
    if number is None or number < 1 or (number % 1 != 0 and number != math.inf):
        raise OptionError(f"option max_num_steps is {value!r}; it must be an integer of at least 1.")
    return int(min(number, 2**62))  # more steps than any solve can make


def stops_at_limit(value: object) -> bool:
    """Tells whether a solve at its step limit returns what it reached instead of raising StepLimitError."""
    if value not in (None, "raise", "stop"):
        raise OptionError(
            f'option on_step_limit is {value!r}; give "raise" (the default: StepLimitError after max_num_steps trial '
            'steps) or "stop" (return the outputs reached; Solution.resume continues).'
        )
    return value == "stop"


def is_nan_on_failure(value: object) -> bool:
    """Tells whether a sample that fails becomes NaN, instead of raising SolveError."""
    if value not in (None, "raise", "nan"):
        raise OptionError(
            f'option on_failure is {value!r}; it is "raise" (a SolveError that names the sample, the default) or "nan" '
            "(its outputs are NaN, its gradients zero, and stats.failures holds its error)."
        )
    return value == "nan"


def is_compact(given: Options) -> bool:
    """Tells whether func sees only those samples of a batch that are not finished."""
    value = given.get("compact")
    if value not in (None, True, False):
        raise OptionError(f"option compact is {value!r}; it is True or False.")
    if value and given.get("batch") != "independent":
        raise OptionError('option compact=True leaves out samples that ended before others; give batch="independent".')
    return bool(value)


def accepts_min_step(value: object) -> bool:
    """Tells whether a step of ``min_step`` is accepted whatever its error."""
    if value not in (None, "raise", "accept"):
        raise OptionError(
            f'option on_min_step is {value!r}; it is "raise" (StepSizeError where less than min_step would be needed, '
            'the default) or "accept" (a step of min_step is accepted whatever its error).'
        )
    return value == "accept"


def interpolation_of(value: object) -> str | None:
    """The interpolation between the nodes of a fixed grid; None where all requested times are nodes."""
    if value is not None:
        lookup("interp", value, ("linear", "cubic"))
    return None if value is None else str(value)


def is_perturbed(value: object) -> bool:
    """Tells whether the stages at the ends of a fixed step see the next number inside the step."""
    if value not in (None, True, False):
        raise OptionError(f"option perturb is {value!r}; it is True or False.")
    return bool(value)


def option_names() -> tuple[str, ...]:
    """Names of all options, of adaptive and of fixed steps."""
    return (*_ADAPTIVE_OPTIONS, *_ALL_FIXED_OPTIONS, *NEWTON_OPTIONS, *_ADAMS_OPTIONS)


def refuse_dense(caller: str, dense: object) -> None:
    """Raises ArgumentValueError if ``caller``, which returns only the state, is given ``dense``."""
    if dense:
        raise ArgumentValueError(
            f"dense={dense!r} makes a solution that is a function of time, which the result of {caller} is not. Use "
            "aca_ext.solve."
        )


def refuse_to_stop(caller: str, options: object) -> None:
    """Raises OptionError if ``caller``, which returns only the state, is given ``on_step_limit="stop"``."""
    if options is not None and isinstance(options, Mapping) and options.get("on_step_limit") == "stop":
        raise OptionError(
            f'option on_step_limit="stop" may end a solve before its last time, and the result of {caller} does not '
            "show where. Use aca_ext.solve: its Solution has t_reached and resume()."
        )
