"""The arguments of a solve, validated once into one frozen object."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from aca_ext.controller import Controller
from aca_ext.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    OptionError,
    TimeError,
    ToleranceError,
    UnknownNameError,
)
from aca_ext.methods import ALIASES, METHODS
from aca_ext.ops import Tolerance
from aca_ext.progress import Callback
from aca_ext.resumption import SolverState
from aca_ext.state import Packing, State, dense, tensors_in
from aca_ext.tableau import Tableau

_FIXED_OPTIONS = ("step_size", "grid_constructor")
_CONTROLLER_OPTIONS = (
    "first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "pcoeff", "icoeff", "dcoeff",
)  # fmt: skip
_ADAPTIVE_OPTIONS = (*_CONTROLLER_OPTIONS, "max_num_steps", "step_t", "jump_t", "norm", "batch", "on_step_limit")
_PLAIN = (torch.float32, torch.float64)
_DEFAULT_MAX_NUM_STEPS = 100_000

_Options = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """What to solve and how.

    Attributes:
        y0: the packed initial state, one dense real tensor, with its graph.
        times: the requested times, strictly monotonic; the first is the start.
        controller: chooses the steps, or None where ``grid`` holds them.
        grid: nodes of a fixed grid that contains ``times``.
        stops: further times that an adaptive step must land on.
        jumps: those of them where func jumps, so that the slope after them is evaluated anew.
        max_num_steps: trial steps before an adaptive solve gives up.
        stops_at_limit: it stops there instead, to be resumed.
        resumed: where it goes on, if it does.
        on_step: called after every trial step.
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
    resumed: SolverState | None = None
    on_step: Callback | None = None
    settings: object = field(default_factory=object)

    @property
    def adaptive(self) -> bool:
        return self.controller is not None

    @property
    def length(self) -> float:
        """Of the solve, in time; of a batch the mean of its samples'."""
        return abs(self.times[-1] - self.times[0])

    def start_time(self, like: Tensor) -> Tensor:
        """The first time as func receives it."""
        return torch.tensor(self.times[0], dtype=like.dtype, device=like.device)

    def spread_times(self, t: Tensor) -> Tensor:
        """The times ``t`` as func receives them, one after the other in the first dimension; differentiable."""
        return t.to(self.y0)

    def of(self, func: Callable[..., State], args: tuple[Any, ...], y0: Tensor) -> Problem:
        """The same problem for another func, and for a y0 laid out alike."""
        other = object.__new__(Problem)  # a third of what dataclasses.replace takes
        vars(other).update(vars(self), func=func, args=args, y0=y0)
        return other


_MAX_KNOWN = 64
_known: dict[tuple[Any, ...] | None, Problem] = {}  # problems checked before, without their func, args and y0


def problem_of(
    func: Callable[..., State],
    y0: State,
    t: object,
    *,
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: _Options | None,
    args: Sequence[Any],
) -> Problem:
    """Checks the arguments of ``odeint``, in a common case by finding that they were checked before.

    Raises:
        ArgumentTypeError, ArgumentValueError, TimeError, ToleranceError, OptionError, UnknownNameError: whichever fits.
    """
    if not callable(func):
        raise ArgumentTypeError(f"func is of type {type(func).__name__}; give a callable func(t, y, *args).")
    key = _key(y0, t, rtol, atol, method, options)
    known = _known.get(key)
    if known is not None:
        assert isinstance(y0, Tensor)
        return known.of(func, _args(args), y0)
    problem = _checked(func, y0, t, rtol, atol, method, options, args)
    if key is not None and problem.y0 is y0:
        if len(_known) >= _MAX_KNOWN:
            _known.pop(next(iter(_known)), None)
        _known[key] = problem.of(_nothing, (), torch.empty(0))
    return problem


def known_problem(
    func: Callable[..., State],
    y0: State,
    t: object,
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: _Options | None,
    args: Sequence[Any],
) -> Problem | None:
    """What ``problem_of`` returns, where arguments like these were checked before and none needs a closer look."""
    known = _known.get(_key(y0, t, rtol, atol, method, options))
    if known is None or args != () or not callable(func):
        return None
    assert isinstance(y0, Tensor)
    return known.of(func, (), y0)


def _key(y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any) -> tuple[Any, ...] | None:
    """What a problem depends on besides func, args and the values of y0; None where that is more than plain values."""
    if (
        options
        or type(rtol) is not float
        or type(atol) is not float
        or (method is not None and type(method) is not str)
    ):
        return None
    if not (_is_plain(y0) and _is_plain(t) and t.dim() == 1):
        return None
    return (*t.tolist(), rtol, atol, method, y0.shape, y0.stride(), y0.dtype, torch.get_num_threads())


def _nothing() -> Tensor:
    raise AssertionError("stands where func was")


def _is_plain(x: Any) -> TypeGuard[Tensor]:
    """A tensor on the CPU of a floating dtype that means what its elements say."""
    return type(x) is Tensor and x.dtype in _PLAIN and x.is_cpu and not x.is_neg()


def _checked(
    func: Callable[..., State],
    y0: State,
    t: object,
    rtol: float | Tensor,
    atol: float | Tensor,
    method: str | None,
    options: _Options | None,
    args: Sequence[Any],
) -> Problem:
    packing = Packing.of(y0)
    packed = dense(packing.pack(y0))
    times = times_of(t)
    tableau = _tableau(method)
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentTypeError(f"options is of type {type(options).__name__}; give a dict of option names and values.")
    given = dict(options or {})
    is_fixed = not tableau.adaptive or any(given.get(name) is not None for name in _FIXED_OPTIONS)
    _check_option_names(given, tableau, is_fixed)
    norm = _norm(given.get("norm"), packing)
    tolerance = Tolerance(
        _tolerance("rtol", rtol, packed, packing), _tolerance("atol", atol, packed, packing), packing.segments, norm
    )
    if not is_fixed:
        _check_within_reach(tolerance, packed.dtype)
    stops = () if is_fixed else _inner_times("step_t", given.get("step_t"), times)
    jumps = () if is_fixed else _inner_times("jump_t", given.get("jump_t"), times)
    return Problem(
        func=func,
        args=_args(args),
        y0=packed,
        packing=packing,
        times=times,
        tableau=tableau,
        tolerance=tolerance,
        controller=None if is_fixed else _controller(given, tableau),
        grid=_grid(given, func, y0, times) if is_fixed else None,
        stops=tuple(sorted({*stops, *jumps}, reverse=times[-1] < times[0])),
        jumps=frozenset(jumps),
        max_num_steps=_max_num_steps(given.get("max_num_steps")),
        stops_at_limit=_stops_at_limit(given.get("on_step_limit")),
    )


def lookup(kind: str, name: object, allowed: Iterable[str]) -> str:
    """``name`` if it is one of ``allowed``.

    Raises:
        UnknownNameError: it is not; the message lists them and names the closest.
    """
    allowed = list(allowed)
    if isinstance(name, str) and name in allowed:
        return name
    close = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownNameError(f"unknown {kind} {name!r}; there are {', '.join(allowed)}.{hint}")


def _tableau(method: object) -> Tableau:
    if method is None:
        return METHODS["dopri5"]
    name = lookup("method", method, [*METHODS, *ALIASES])
    return METHODS[ALIASES.get(name, name)]


def times_of(t: object) -> tuple[float, ...]:
    """The times in ``t``, a 1-d tensor or a sequence of numbers.

    Raises:
        TimeError: ``t`` is empty, unsorted, of another rank, not finite, or would lose a gradient.
    """
    if not isinstance(t, Tensor):
        if isinstance(t, str) or not (isinstance(t, Sequence) or hasattr(t, "__array__")):
            raise TimeError(f"t is of type {type(t).__name__}; give a 1-d tensor of times, torch.tensor([0., 1.]).")
        if _holds_grad(t):
            raise TimeError(
                f"t is a {type(t).__name__} holding a tensor that requires grad, which would be lost; give one 1-d "
                "tensor of times, torch.stack(t)."
            )
        try:
            t = torch.as_tensor(t, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TimeError(f"t is no sequence of numbers ({error}); give a 1-d tensor of times.") from None
    if t.dim() != 1:
        raise TimeError(
            f"t has shape {tuple(t.shape)}; give a 1-d tensor of times, torch.tensor([0., 1.]). "
            'Times for every sample take options={"batch": "independent"}.'
        )
    if t.is_complex() or t.dtype == torch.bool:
        raise TimeError(f"t has dtype {t.dtype}; times are real numbers.")
    times: list[float] = t.detach().to(device="cpu", dtype=torch.float64).tolist()
    if not times:
        raise TimeError("t is empty; give at least the initial time.")
    for i, time in enumerate(times):
        if not math.isfinite(time):
            raise TimeError(f"t[{i}] is {time}; times must be finite.")
    sign = 1.0 if len(times) < 2 or times[1] > times[0] else -1.0
    for i, (one, other) in enumerate(pairwise(times)):
        if one == other:
            raise TimeError(f"t[{i}] and t[{i + 1}] are both {one!r}; times must not repeat. Remove one of them.")
        if sign * (other - one) < 0:
            raise TimeError(
                f"t is not sorted: t[{i}] = {one!r}, t[{i + 1}] = {other!r}; times must strictly increase or strictly "
                "decrease. Sort them, and the result back."
            )
    return tuple(times)


def _number(value: object) -> float | None:
    """A number of Python's, NumPy's or in a tensor of one element; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.detach().item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _inner_times(name: str, given: object, times: tuple[float, ...]) -> tuple[float, ...]:
    """The given times strictly inside the solve."""
    if given is None:
        return ()
    try:
        inner = torch.as_tensor(given, dtype=torch.float64).detach().cpu().reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"option {name} is no sequence of times ({error}).") from None
    low, high = min(times), max(times)
    for time in inner:
        if not math.isfinite(time):
            raise OptionError(f"option {name} holds {time}; times must be finite.")
    return tuple(time for time in inner if low < time < high)


def _tolerance(name: str, value: object, y0: Tensor, packing: Packing) -> float | Tensor:
    """A number, or a tensor of the packed state's shape, dtype and device."""
    number = _number(value)
    if number is not None:
        if not math.isfinite(number) or number < 0:
            raise ToleranceError(f"{name} is {number:g}; it must be a finite number, at least 0.")
        return number
    if isinstance(value, (tuple, list)) and packing.is_tuple:
        return _tolerance_of_tuple(name, value, y0, packing)
    if not isinstance(value, Tensor):
        raise ToleranceError(
            f"{name} is of type {type(value).__name__}; give a number or a tensor that broadcasts to y0."
        )
    if value.is_complex() or not bool(((value >= 0) & torch.isfinite(value)).all()):
        raise ToleranceError(
            f"{name} has entries that are negative or not finite; each must be a number of at least 0."
        )
    value = value.detach().to(device=y0.device, dtype=y0.dtype)
    if packing.is_complex:
        value = value.unsqueeze(-1)  # one tolerance for the real and the imaginary part
    shape = y0.shape if not packing.is_tuple else torch.Size([y0.numel()])
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ToleranceError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to y0 ({packing.describe()})."
        ) from None


def _tolerance_of_tuple(name: str, value: Sequence[Any], y0: Tensor, packing: Packing) -> Tensor:
    """One tolerance per component of a tuple state, spread over the packed state."""
    if len(value) != len(packing.shapes):
        raise ToleranceError(f"{name} has {len(value)} entries; y0 is {packing.describe()}. Give one for each.")
    parts: list[Tensor] = []
    for i, (entry, shape) in enumerate(zip(value, packing.shapes, strict=True)):
        single = Packing((shape,), False, packing.is_complex)
        part = _tolerance(f"{name}[{i}]", entry, y0.new_empty(shape), single)
        parts.append((part if isinstance(part, Tensor) else y0.new_full((), part)).expand(shape).reshape(-1))
    return torch.cat(parts)


def _check_within_reach(tolerance: Tolerance, dtype: torch.dtype) -> None:
    rtol, atol = tolerance.rtol, tolerance.atol
    # Steps that small would round to nothing, and the solution stand still without an error. float32 has room enough.
    rounding = torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    if not isinstance(rtol, Tensor) and not isinstance(atol, Tensor) and 0 < max(rtol, atol) < rounding:
        raise ToleranceError(
            f"rtol is {rtol:g} and atol is {atol:g}, below the rounding of {dtype}, {rounding:g}. Loosen one of them, "
            "or convert y0 to float32."
        )
    if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
        if bool((torch.as_tensor(rtol) + torch.as_tensor(atol) > 0).any()) or torch.as_tensor(rtol + atol).numel() == 0:
            return
    elif rtol > 0 or atol > 0:
        return
    raise ToleranceError("rtol and atol are both zero, which no step can meet; make one of them positive.")


def _check_option_names(given: _Options, tableau: Tableau, is_fixed: bool) -> None:
    allowed = (*_FIXED_OPTIONS,) if is_fixed else (*_ADAPTIVE_OPTIONS, *_FIXED_OPTIONS)
    for name in given:
        if name in allowed:
            continue
        if name in _ADAPTIVE_OPTIONS:
            why = "has no error estimate" if not tableau.adaptive else "was given step_size or grid_constructor"
            raise UnknownNameError(
                f"option {name!r} belongs to adaptive steps, but method {tableau.name!r} {why}: its steps are fixed. "
                f"Fixed steps take {', '.join(_FIXED_OPTIONS)}."
            )
        lookup(f"option of method {tableau.name!r}", name, allowed)


def _controller(given: _Options, tableau: Tableau) -> Controller:
    values: dict[str, float] = {}
    for name in _CONTROLLER_OPTIONS:
        value = given.get(name)
        if value is None:
            continue
        number = _number(value)
        if number is None or math.isnan(number):
            raise OptionError(f"option {name} is {value!r}; it must be a number.")
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
        raise OptionError(f"option min_step {values['min_step']} exceeds max_step {values['max_step']}.")
    return Controller(order=tableau.order, **values)


def _max_num_steps(value: object) -> int:
    if value is None:
        return _DEFAULT_MAX_NUM_STEPS
    number = _number(value)
    if number is None or number < 1 or (number % 1 != 0 and number != math.inf):
        raise OptionError(f"option max_num_steps is {value!r}; it must be an integer of at least 1.")
    return int(min(number, 2**62))  # beyond what a solve can reach, within 64 bits


def _stops_at_limit(value: object) -> bool:
    if value not in (None, "raise", "stop"):
        raise OptionError(
            f'option on_step_limit is {value!r}; it is "raise" (StepLimitError after max_num_steps trial steps, the '
            'default) or "stop" (return what was reached, for Solution.resume to continue).'
        )
    return value == "stop"


def _norm(norm: object, packing: Packing) -> Callable[[Tensor], Any] | None:
    if norm is None:
        return None
    if not callable(norm):
        raise OptionError(f"option norm is of type {type(norm).__name__}; give a function from the state to a number.")

    def checked(ratio: Tensor) -> Any:
        value = norm(packing.unpack(ratio))
        number = _number(value)
        if number is None or number < 0:
            raise OptionError(f"the function of option norm returned {value!r}; it must return one number, at least 0.")
        return value.reshape(()) if isinstance(value, Tensor) else value

    return checked


def _grid(given: _Options, func: Any, y0: State, times: tuple[float, ...]) -> tuple[float, ...]:
    step_size, constructor = given.get("step_size"), given.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise OptionError("options step_size and grid_constructor exclude each other; give one.")
    if constructor is not None:
        return _constructed_grid(constructor, func, y0, times)
    if step_size is None:
        return times
    step = _number(step_size)
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
    grid = constructor(func, y0, torch.tensor(times, dtype=torch.float64))
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


def _args(args: object) -> tuple[Any, ...]:
    if not isinstance(args, (tuple, list)):
        raise ArgumentTypeError(f"args is of type {type(args).__name__}; give a tuple, args=(x,) for one argument.")
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor) and _holds_grad(arg):
            raise ArgumentValueError(
                f"args[{i}] is a {type(arg).__name__} holding a tensor that requires grad, which would be lost; "
                "pass each such tensor as an argument of its own."
            )
    return tuple(args)


def _holds_grad(x: Any) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(x))
