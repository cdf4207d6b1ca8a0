"""Arguments of torchdiffeq's functions as those of aca_ext's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.errors import ArgumentTypeError, OptionError
from aca_ext.numerics.adams import MIN_ORDER
from aca_ext.problem.arguments import number_in
from aca_ext.problem.state import State
from aca_ext.problem.trees import is_flat, like_tuple
from aca_ext.torchdiffeq.callbacks import callback_of, warn_of_unsupported
from aca_ext.torchdiffeq.names import ADAMS, IMPLICIT, checked_method, kind_of
from aca_ext.user_warnings import warn_user

_CONTROL = ("first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "max_num_steps")
_TAKEN = {
    "adaptive": (*_CONTROL, "step_t", "jump_t", "norm", "dtype"),
    "fixed": ("step_size", "grid_constructor", "interp", "perturb", "norm"),
    "scipy": ("solver", "min_step", "max_step", "norm", "grid_points", "eps"),
}
_UNUSED = {"adaptive": ("dtype",), "fixed": ("norm",), "scipy": ("norm", "grid_points", "eps")}
_OF_ADAMS = ("max_order", "max_iters")
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Call:
    """A call of ``odeint`` or ``odeint_adjoint``, translated."""

    func: Callable[..., State]
    y0: State
    t: Tensor
    rtol: Any
    atol: Any
    method: str
    options: dict[str, Any]
    callback: Callable[[Any], None] | None

    @classmethod
    def of(cls, func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any) -> Call:
        """The translated call.

        Raises:
            ArgumentTypeError, UnknownNameError: ``t`` is no tensor, or the method is none of ``SOLVERS``.
        """
        if not isinstance(t, Tensor):
            raise ArgumentTypeError(f"t is of type {type(t).__name__}; give a 1-d tensor of times.")
        y0 = _of_one_dtype(y0)
        like = y0[0] if isinstance(y0, tuple) and y0 else y0
        if isinstance(like, Tensor) and t.device != like.device:
            warn_user(f"t is on {t.device} and y0 on {like.device}; t is moved there.", UserWarning)
            t = t.to(like.device)
        method, options = with_admitted_order(checked_method(method), options)
        warn_of_unsupported(func, method, kind_of(method))
        return cls(
            func=_with_admitted_slopes(func),
            y0=y0,
            t=t,
            rtol=tolerance_of(rtol, y0),
            atol=tolerance_of(atol, y0),
            method=method,
            options=options_of(method, options, n_intervals=max(1, t.numel() - 1)),
            callback=callback_of(func, kind_of(method), t, suffix=""),
        )

    @property
    def is_fixed(self) -> bool:
        return kind_of(self.method) == "fixed"


def options_of(method: str, options: object, *, n_intervals: int) -> dict[str, Any]:
    """The options as aca_ext takes them; those that the method does not use are left out with a warning.

    ``n_intervals`` counts the intervals between the requested times: torchdiffeq's step limit holds for each of them.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentTypeError(f"options is of type {type(options).__name__}; give a dict of option names and values.")
    given, kind = {k: v for k, v in (options or {}).items() if v is not None}, kind_of(method)
    taken = (*_TAKEN[kind], *(_OF_ADAMS if method in ADAMS else ()))
    ignored = [name for name in given if name not in taken]
    if ignored:
        warn_user(f"method {method!r} has no use for the options {ignored}; they are ignored.", UserWarning)
    unused = (*_UNUSED[kind], *(("max_iters",) if method == "explicit_adams" else ()))
    found = {name: value for name, value in given.items() if name in taken and name not in unused}
    if kind == "fixed" and ("step_size" in found or "grid_constructor" in found):
        found.setdefault("interp", "linear")
    elif kind == "fixed":
        found.pop("interp", None)  # every requested time is a node
        if method in IMPLICIT:
            found["grid_constructor"] = _requested  # trbdf2 would choose its steps otherwise
    elif kind == "adaptive":
        _complete_adaptive(found, given, n_intervals)
    return found


def _requested(func: Any, y0: Any, t: Tensor) -> Tensor:
    return t


def with_admitted_order(method: str, options: Any) -> tuple[str, Any]:
    """The method and its options; a method of Adams of an order below 4 is rk4, as there."""
    given = options if isinstance(options, Mapping) else {}
    order = number_in(given.get("max_order"))
    if method not in ADAMS or order is None or order >= MIN_ORDER:
        return method, options
    warn_user(f"max_order is below {MIN_ORDER}, so that the method is rk4.", UserWarning)
    return "rk4", {name: value for name, value in given.items() if name not in _OF_ADAMS}


def _complete_adaptive(found: dict[str, Any], given: Mapping[str, Any], n_intervals: int) -> None:
    if not isinstance(given.get("dtype", torch.float64), torch.dtype):
        raise OptionError(f"option dtype is {given['dtype']!r}; it is a torch.dtype.")
    if (number_in(found.get("min_step")) or 0) > 0:
        found["on_min_step"] = "accept"
    limit = number_in(found.get("max_num_steps", _NO_LIMIT))
    if limit is not None:
        found["max_num_steps"] = limit * n_intervals


def tolerance_of(given: Any, y0: State) -> Any:
    """A tolerance: a number, a list or array that broadcasts to a tensor state, or one for each component of a tuple.

    Those of the components are numbers, or tensors with an entry for each element.
    """
    if not isinstance(y0, tuple):
        is_number = isinstance(given, Tensor) or number_in(given) is not None
        return given if is_number else torch.as_tensor(given, dtype=torch.float64, device=getattr(y0, "device", None))
    try:
        entries = tuple(given)
    except TypeError:
        return given
    if len(entries) != len(y0):
        return entries  # for aca_ext to say that they are too few or too many
    return tuple(
        entry.reshape(part.shape) if isinstance(entry, Tensor) and entry.numel() == part.numel() else entry
        for entry, part in zip(entries, y0, strict=True)
    )


def _of_one_dtype(y0: Any) -> Any:
    """A tuple state with its components converted to the dtype that torch promotes them to."""
    if not isinstance(y0, tuple) or not all(isinstance(part, Tensor) for part in y0):
        return y0
    if len({part.dtype for part in y0}) < 2:
        return y0
    dtype = reduce(torch.promote_types, (part.dtype for part in y0))
    return like_tuple(type(y0), (part.to(dtype) for part in y0))


class _AdmittedSlopes:
    """func with its slopes in the dtype of the state, and those of a tuple state in its shapes.

    torchdiffeq writes slopes into memory of the state's dtype, and those of a tuple one after the other.
    """

    wraps_func = True  # what func holds is found through it

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    def __call__(self, t: Tensor, y: Any) -> Any:
        slope = self.func(t, y)
        if isinstance(y, Tensor):
            return _admitted(slope, y, reshapes=False)
        if not isinstance(slope, Iterable) or isinstance(slope, Tensor) or not is_flat(y):
            return slope
        parts = tuple(slope)
        if len(parts) != len(y):
            return parts
        return tuple(_admitted(part, like, reshapes=True) for part, like in zip(parts, y, strict=True))


def _with_admitted_slopes(func: Any) -> Any:
    """The func; one that is compiled, or no function at all, as it is."""
    is_compiled = isinstance(func, torch.jit.ScriptModule) or (
        isinstance(func, nn.Module) and hasattr(func, "_orig_mod")
    )
    return func if is_compiled or not callable(func) else _AdmittedSlopes(func)


def _admitted(slope: Any, like: Tensor, *, reshapes: bool) -> Any:
    if not isinstance(slope, Tensor):
        return slope
    if slope.dtype != like.dtype and like.is_complex() >= slope.is_complex():
        slope = slope.to(like.dtype)
    if reshapes and slope.shape != like.shape and slope.numel() == like.numel():
        slope = slope.reshape(like.shape)
    return slope
