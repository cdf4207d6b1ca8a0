"""Validation of the arguments of a solve, which makes a ``Problem``, with a cache of arguments validated before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError, OptionError
from aca_ext.numerics.adams import Adams
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS, ROSENBROCK_METHODS
from aca_ext.numerics.methods import ALIASES, METHODS
from aca_ext.numerics.switching import AUTO
from aca_ext.problem.admission import is_readable
from aca_ext.problem.arguments import ProblemArguments, holds_grad, lookup
from aca_ext.problem.grid import followed_by_nodes, grid_of
from aca_ext.problem.newton import newton_options_of
from aca_ext.problem.options import (
    FIXED_OPTIONS,
    accepts_min_step,
    adams_of,
    check_option_names,
    controller_of,
    inner_times,
    interpolation_of,
    is_compact,
    is_nan_on_failure,
    is_perturbed,
    max_num_steps_of,
    norm_of,
    stops_at_limit,
)
from aca_ext.problem.problem import Problem
from aca_ext.problem.signature import refuse_swapped
from aca_ext.problem.state import Packing, dense
from aca_ext.problem.times import resolution_of, times_of
from aca_ext.problem.tolerance import Tolerance, check_within_reach, checked_tolerance
from aca_ext.problem.transforms import is_inside_transform

ALL_METHODS: dict[str, Any] = {**METHODS, **IMPLICIT_METHODS, **ROSENBROCK_METHODS, AUTO.name: AUTO}
_PLAIN = (torch.float32, torch.float64)
_MAX_KNOWN = 64
_LONGEST_KNOWN_GRID = 10_000
_PLAIN_OPTIONS = ("interp", "perturb", "batch", "on_failure")  # besides numbers
_P = TypeVar("_P", bound=Problem)
_known: dict[tuple[Any, ...] | None, Problem] = {}  # cache of validated problems, without func, args and y0


def problem_of(given: ProblemArguments) -> Problem:
    """Validates the arguments of ``solve``, or finds them in the cache of arguments validated before.

    Raises:
        ArgumentTypeError: func, y0, options or args has a type that is not accepted.
        ArgumentValueError: an argument has a value that is not accepted (also as TimeError, ToleranceError, OptionError
            or UnknownNameError).
    """
    return remembered(checked_problem, given)


def remembered(check: Callable[[ProblemArguments], _P], given: ProblemArguments) -> _P:
    """The problem that ``check`` makes of these arguments, or one from the cache of arguments validated before.

    ``check`` must be determined by the options, which are part of the cache's keys.
    """
    func, y0 = given.func, given.y0
    if not callable(func):
        raise ArgumentTypeError(f"func is of type {type(func).__name__}; give a callable func(t, y, *args).")
    refuse_swapped(func)
    key = _key(given)
    known: Any = _known.get(key)
    if known is not None:
        assert isinstance(y0, Tensor)
        return known.of(func, _args(given.args), y0)
    problem = check(given)
    if key is not None and problem.y0 is y0 and len(problem.grid or ()) <= _LONGEST_KNOWN_GRID:
        if len(_known) >= _MAX_KNOWN:
            _known.pop(next(iter(_known)), None)
        _known[key] = problem.of(_nothing, (), torch.empty(0, device="cpu"))
    return problem


def known_problem(given: ProblemArguments) -> Problem | None:
    """The problem of arguments in the cache, for a func that need not be checked; None if they are not in it."""
    known = _known.get(_key(given))
    if known is None or not callable(given.func):
        return None
    assert isinstance(given.y0, Tensor)
    return known.of(given.func, _args(given.args), given.y0)


def _key(given: ProblemArguments) -> tuple[Any, ...] | None:
    """Cache key of all arguments except func, args and the values of y0; None if an argument is not a plain value."""
    y0, t, rtol, atol, method = given.y0, given.t, given.rtol, given.atol, given.method
    numbers = _numbers_in(given.options)
    is_known_kind = type(rtol) is type(atol) is float and (method is None or type(method) is str)
    if not (is_known_kind and numbers is not None and _is_plain(y0) and _is_plain(t) and t.dim() == 1):
        return None
    about_y0 = y0.shape, y0.stride(), y0.dtype
    return tuple(t.tolist()), t.dtype, rtol, atol, method, numbers, *about_y0, torch.get_num_threads()


def _nothing() -> Tensor:
    raise AssertionError("func of a cached problem was called; replace it with Problem.of")


def _numbers_in(options: object) -> tuple[tuple[Any, Any], ...] | None:
    """The options as pairs if all values are plain numbers, or those of a fixed grid, else None."""
    if not options:
        return ()
    if type(options) is not dict:
        return None
    for name, value in options.items():
        if type(value) not in (int, float) and not (name in _PLAIN_OPTIONS and type(value) in (str, bool)):
            return None
    return tuple(options.items())


def _is_plain(x: Any) -> TypeGuard[Tensor]:
    """Tells whether ``x`` is a plain float32 or float64 tensor on the CPU with readable, unnegated elements."""
    if type(x) is not Tensor or x.dtype not in _PLAIN or not x.is_cpu or is_inside_transform(x):
        return False
    return not x.is_neg() and is_readable(x)


def checked_problem(given: ProblemArguments) -> Problem:
    """``problem_of`` without the cache."""
    packing = Packing.of(given.y0)
    packed = dense(packing.pack(given.y0))
    times, resolution = times_of(given.t), resolution_of(given.t)
    tableau = _tableau(given.method)
    options = _options(given.options)
    is_fixed = not tableau.adaptive or any(options.get(name) is not None for name in FIXED_OPTIONS)
    check_option_names(options, tableau, is_fixed)
    if is_nan_on_failure(options.get("on_failure")) and options.get("batch") != "independent":
        raise OptionError('option on_failure="nan" belongs to samples of their own; give batch="independent", too.')
    is_compact(options)
    if isinstance(tableau, Adams):
        tableau = adams_of(options, tableau)
    norm = norm_of(options.get("norm"), packing)
    checked_rtol = checked_tolerance("rtol", given.rtol, packed, packing)
    checked_atol = checked_tolerance("atol", given.atol, packed, packing)
    tolerance = Tolerance(checked_rtol, checked_atol, packing.segments, norm)
    if not is_fixed:
        check_within_reach(tolerance, packed.dtype)
    stops = () if is_fixed else inner_times("step_t", options.get("step_t"), times)
    jumps = () if is_fixed else inner_times("jump_t", options.get("jump_t"), times)
    interp = interpolation_of(options.get("interp"))
    newton = newton_options_of(options, tableau, packing, packed, checked_rtol)
    grid = grid_of(options, given.func, given.y0, times, resolution) if is_fixed else None
    perturbed = grid if grid is not None and is_perturbed(options.get("perturb")) else ()
    return Problem(
        func=given.func,
        args=_args(given.args),
        y0=packed,
        packing=packing,
        times=times,
        tableau=tableau if interp is None else _with_interpolation(tableau, interp),
        tolerance=tolerance,
        controller=None if is_fixed else controller_of(options, tableau),
        grid=grid,
        stops=tuple(sorted({*stops, *jumps}, reverse=times[-1] < times[0])),
        jumps=frozenset((*jumps, *perturbed)),
        max_num_steps=max_num_steps_of(options.get("max_num_steps")),
        stops_at_limit=stops_at_limit(options.get("on_step_limit")),
        accepts_min_step=accepts_min_step(options.get("on_min_step")),
        interp=interp,
        nodes_follow=followed_by_nodes(options),
        newton=newton,
        resolution=resolution,
    )


def _options(options: object) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentTypeError(f"options is of type {type(options).__name__}; give a dict of option names and values.")
    return dict(options or {})


def _tableau(method: object) -> Any:
    if method is None:
        return METHODS["dopri5"]
    name = lookup("method", method, [*ALL_METHODS, *ALIASES])
    return ALL_METHODS[ALIASES.get(name, name)]


@cache
def _with_interpolation(tableau: Any, interp: str) -> Any:
    return tableau.with_linear_output() if interp == "linear" else tableau.with_hermite_output()


def _args(args: object) -> tuple[Any, ...]:
    if not isinstance(args, (tuple, list)):
        raise ArgumentTypeError(f"args is of type {type(args).__name__}; give a tuple, args=(x,) for one argument.")
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor) and holds_grad(arg):
            raise ArgumentValueError(
                f"args[{i}] is a {type(arg).__name__} holding a tensor that requires grad, whose gradient would be "
                "lost; pass each such tensor as an entry of args."
            )
    return tuple(args)
