"""The arguments of a solve, validated once into one frozen object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.numerics.controller import Controller
from aca_ext.numerics.methods import ALIASES, METHODS
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.admission import looks_readable
from aca_ext.problem.arguments import holds_grad, lookup
from aca_ext.problem.events import Event
from aca_ext.problem.grid import grid_of
from aca_ext.problem.options import (
    FIXED_OPTIONS,
    Options,
    accepts_min_step,
    check_option_names,
    controller_of,
    inner_times,
    interpolation_of,
    is_perturbed,
    max_num_steps_of,
    norm_of,
    stops_at_limit,
)
from aca_ext.problem.resumption import SolverState
from aca_ext.problem.signature import refuse_swapped
from aca_ext.problem.state import Packing, State, dense
from aca_ext.problem.times import resolution_of, times_of
from aca_ext.problem.tolerance import Tolerance, check_within_reach, checked_tolerance
from aca_ext.progress import Callback

_PLAIN = (torch.float32, torch.float64)


class Settings:
    """Identity of problems that differ in func, args and the values of y0 alone: the key of what they share."""


@dataclass(frozen=True)
class Problem:
    """Description of a solve, with its arguments checked.

    Attributes:
        y0: the packed initial state, one dense real tensor, with its graph.
        times: the requested times, strictly monotonic; the first is the start.
        controller: chooses the steps, or None where ``grid`` holds them.
        grid: nodes of a fixed grid that contains ``times``, or their ends at least if ``interp`` is given.
        stops: further times that an adaptive step must land on.
        jumps: those of them where func jumps, so that the slope after them is evaluated anew; on a perturbed fixed grid
            all of its nodes.
        max_num_steps: trial steps before an adaptive solve gives up.
        stops_at_limit: it stops there instead, to be resumed.
        resumed: where it goes on, if it does.
        accepts_min_step: a step of ``min_step`` is accepted whatever its error.
        interp: interpolation between the nodes of a fixed grid, "linear" or "cubic".
        on_step: called after every trial step.
        events: conditions whose sign changes are looked for.
        settings: the same object for problems that are known to differ in func, args and the values of y0 alone.
    """

    func: Callable[..., State]
    args: tuple[Any, ...]
    y0: Tensor
    packing: Packing
    times: tuple[float, ...]
    tableau: Tableau
    tolerance: Tolerance
    controller: Controller | None
    grid: tuple[float, ...] | None
    stops: tuple[float, ...]
    jumps: frozenset[float]
    max_num_steps: int
    stops_at_limit: bool = False
    accepts_min_step: bool = False
    interp: str | None = None
    resumed: SolverState | None = None
    on_step: Callback | None = None
    events: tuple[Event, ...] = ()
    settings: Settings = field(default_factory=Settings)

    @property
    def adaptive(self) -> bool:
        return self.controller is not None

    @property
    def step_ends(self) -> tuple[float, ...]:
        """Times at which a step must end, the end of the solve last: the nodes of a fixed grid, or the stops."""
        return (*self.stops, self.times[-1]) if self.grid is None else self.grid[1:]

    @property
    def length(self) -> float:
        """Of the solve, in time; of a batch the mean of its samples'."""
        return abs(self.times[-1] - self.times[0])

    @property
    def span(self) -> tuple[float, float]:
        """First and last time; of a batch those of the sample whose times its dtype resolves worst."""
        return self.times[0], self.times[-1]

    def start_time(self, like: Tensor) -> Tensor:
        """The first time as func receives it."""
        start = torch.full((), self.times[0], dtype=like.dtype, device=like.device)
        if self.grid is None or self.times[0] not in self.jumps:
            return start
        return torch.nextafter(start, torch.full_like(start, self.times[-1]))

    def spread_times(self, t: Tensor) -> Tensor:
        """The times ``t`` as func receives them, one after the other in the first dimension; differentiable."""
        return t.to(self.y0)

    def of(self, func: Callable[..., State], args: tuple[Any, ...], y0: Tensor) -> Problem:
        """The same problem for another func, and for a y0 laid out alike."""
        other = object.__new__(Problem)  # a third of what dataclasses.replace takes
        vars(other).update(vars(self), func=func, args=args, y0=y0)
        return other


_MAX_KNOWN = 64
_LONGEST_KNOWN_GRID = 10_000
_PLAIN_OPTIONS = ("interp", "perturb")  # besides numbers
_known: dict[tuple[Any, ...] | None, Problem] = {}  # problems checked before, without their func, args and y0


def problem_of(
    func: Callable[..., State],
    y0: State,
    t: object,
    *,
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: Options | None,
    args: Sequence[Any],
) -> Problem:
    """Checks the arguments of ``odeint``, in a common case by finding that they were checked before.

    Raises:
        ArgumentTypeError, ArgumentValueError, TimeError, ToleranceError, OptionError, UnknownNameError: whichever fits.
    """
    if not callable(func):
        raise ArgumentTypeError(f"func is of type {type(func).__name__}; give a callable func(t, y, *args).")
    refuse_swapped(func)
    key = _key(y0, t, rtol, atol, method, options)
    known = _known.get(key)
    if known is not None:
        assert isinstance(y0, Tensor)
        return known.of(func, _args(args), y0)
    problem = checked_problem(func, y0, t, rtol, atol, method, options, args)
    if key is not None and problem.y0 is y0 and len(problem.grid or ()) <= _LONGEST_KNOWN_GRID:
        if len(_known) >= _MAX_KNOWN:
            _known.pop(next(iter(_known)), None)
        _known[key] = problem.of(_nothing, (), torch.empty(0, device="cpu"))
    return problem


def known_problem(
    func: Callable[..., State],
    y0: State,
    t: object,
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: Options | None,
    args: Sequence[Any],
) -> Problem | None:
    """``problem_of`` for arguments like ones that were checked before; None if they were not."""
    known = _known.get(_key(y0, t, rtol, atol, method, options))
    if known is None or args != () or not callable(func):
        return None
    assert isinstance(y0, Tensor)
    return known.of(func, (), y0)


def _key(y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any) -> tuple[Any, ...] | None:
    """Key of the checked arguments besides func, args and the values of y0; None unless they are plain values."""
    numbers = _numbers_in(options)
    is_known_kind = type(rtol) is type(atol) is float and (method is None or type(method) is str)
    if not (is_known_kind and numbers is not None and _is_plain(y0) and _is_plain(t) and t.dim() == 1):
        return None
    about_y0 = y0.shape, y0.stride(), y0.dtype
    return tuple(t.tolist()), t.dtype, rtol, atol, method, numbers, *about_y0, torch.get_num_threads()


def _nothing() -> Tensor:
    raise AssertionError("stands where func was")


def _numbers_in(options: object) -> tuple[tuple[Any, Any], ...] | None:
    """The options where they are numbers, or those of a fixed grid, and nothing else."""
    if not options:
        return ()
    if type(options) is not dict:
        return None
    for name, value in options.items():
        if type(value) not in (int, float) and not (name in _PLAIN_OPTIONS and type(value) in (str, bool)):
            return None
    return tuple(options.items())


def _is_plain(x: Any) -> TypeGuard[Tensor]:
    """A tensor on the CPU of a floating dtype that means what its elements say."""
    return type(x) is Tensor and x.dtype in _PLAIN and x.is_cpu and not x.is_neg() and looks_readable(x)


def checked_problem(
    func: Callable[..., State],
    y0: State,
    t: object,
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: Options | None,
    args: Sequence[Any],
) -> Problem:
    """``problem_of`` for arguments that are not known."""
    packing = Packing.of(y0)
    packed = dense(packing.pack(y0))
    times = times_of(t)
    tableau = _tableau(method)
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentTypeError(f"options is of type {type(options).__name__}; give a dict of option names and values.")
    given = dict(options or {})
    is_fixed = not tableau.adaptive or any(given.get(name) is not None for name in FIXED_OPTIONS)
    check_option_names(given, tableau, is_fixed)
    norm = norm_of(given.get("norm"), packing)
    checked_rtol = checked_tolerance("rtol", rtol, packed, packing)
    checked_atol = checked_tolerance("atol", atol, packed, packing)
    tolerance = Tolerance(checked_rtol, checked_atol, packing.segments, norm)
    if not is_fixed:
        check_within_reach(tolerance, packed.dtype)
    stops = () if is_fixed else inner_times("step_t", given.get("step_t"), times)
    jumps = () if is_fixed else inner_times("jump_t", given.get("jump_t"), times)
    interp = interpolation_of(given.get("interp"))
    grid = grid_of(given, func, y0, times, resolution_of(t)) if is_fixed else None
    perturbed = grid if grid is not None and is_perturbed(given.get("perturb")) else ()
    return Problem(
        func=func,
        args=_args(args),
        y0=packed,
        packing=packing,
        times=times,
        tableau=tableau if interp is None else _with_interpolation(tableau, interp),
        tolerance=tolerance,
        controller=None if is_fixed else controller_of(given, tableau),
        grid=grid,
        stops=tuple(sorted({*stops, *jumps}, reverse=times[-1] < times[0])),
        jumps=frozenset((*jumps, *perturbed)),
        max_num_steps=max_num_steps_of(given.get("max_num_steps")),
        stops_at_limit=stops_at_limit(given.get("on_step_limit")),
        accepts_min_step=accepts_min_step(given.get("on_min_step")),
        interp=interp,
    )


def _tableau(method: object) -> Tableau:
    if method is None:
        return METHODS["dopri5"]
    name = lookup("method", method, [*METHODS, *ALIASES])
    return METHODS[ALIASES.get(name, name)]


@cache
def _with_interpolation(tableau: Tableau, interp: str) -> Tableau:
    return tableau.with_linear_output() if interp == "linear" else tableau.with_hermite_output()


def _args(args: object) -> tuple[Any, ...]:
    if not isinstance(args, (tuple, list)):
        raise ArgumentTypeError(f"args is of type {type(args).__name__}; give a tuple, args=(x,) for one argument.")
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor) and holds_grad(arg):
            raise ArgumentValueError(
                f"args[{i}] is a {type(arg).__name__} holding a tensor that requires grad, which would be lost; "
                "pass each such tensor as an argument of its own."
            )
    return tuple(args)
