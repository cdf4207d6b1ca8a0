"""``odeint``, ``odeint_adjoint`` and ``odeint_event`` with torchdiffeq's signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.errors import ArgumentValueError, OptionError
from aca_ext.odeint import odeint as solve_states
from aca_ext.problem.arguments import number_in
from aca_ext.problem.state import State
from aca_ext.problem.trees import like_tuple
from aca_ext.torchdiffeq.callbacks import callback_of
from aca_ext.torchdiffeq.event_function import ZeroCounts
from aca_ext.torchdiffeq.names import ADAMS, SCIPY, checked_method, kind_of
from aca_ext.torchdiffeq.scipy_solver import adjoint_with_scipy, solve_with_scipy
from aca_ext.torchdiffeq.translation import Call, options_of, with_admitted_order
from aca_ext.user_warnings import warn_user

EventFn = Callable[[Tensor, Any], Tensor]
Result = State | tuple[Tensor, State]

_MAX_FIXED_STEPS = 20_000  # of torchdiffeq's search for an event
_FAR = 2.0**100  # stands for a time without limit


def odeint(
    func: Callable[[Tensor, Any], State],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFn | None = None,
) -> Any:
    """torchdiffeq's ``odeint``: the states at the times t, or the time of the first event and the states at both ends.

    Gradients are those of ``aca_ext.odeint``, exact for the discrete solution. See ``aca_ext.torchdiffeq`` for what
    differs from torchdiffeq.
    """
    call = Call.of(func, y0, t, rtol, atol, method, options)
    if event_fn is not None:
        return _until_event(call, event_fn)
    if call.method == SCIPY:
        return solve_with_scipy(call)
    return _states(call, call.t)


def odeint_adjoint(
    func: Callable[[Tensor, Any], State],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFn | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Any = None,
) -> Any:
    """torchdiffeq's ``odeint_adjoint``: gradients by the continuous adjoint, solved backward in time.

    With ``event_fn`` gradients are exact, as those of ``odeint``.

    Raises:
        ArgumentValueError: func is no module and ``adjoint_params`` is missing; or ``adjoint_options`` is missing
            where it cannot be inferred.
    """
    params = _checked_params(func, adjoint_params)
    if adjoint_method is not None and adjoint_method != method and options is not None and adjoint_options is None:
        raise ArgumentValueError(
            "adjoint_method differs from method, so that options says nothing of the backward solve; give "
            "adjoint_options too, adjoint_options={} for none."
        )
    call = Call.of(func, y0, t, rtol, atol, method, options)
    call = replace(call, y0=_anchored(call.y0, _parameters_of(func) if params is None else params))
    if event_fn is not None:
        return _until_event(call, event_fn, params=params)
    if call.method != method and method in ADAMS:
        options = {name: value for name, value in (options or {}).items() if name in call.options}
    backward_method = call.method
    if adjoint_options is not None or adjoint_method not in (None, method):
        chosen = method if adjoint_method is None else adjoint_method
        backward_method, adjoint_options = with_admitted_order(checked_method(chosen), adjoint_options)
    backward_options = _backward_options(func, call, backward_method, options, adjoint_options, params)
    if params is None and (callable(backward_options.get("norm")) or "callback" in backward_options):
        params = _parameters_of(func)  # which these see, in this order
    how: dict[str, Any] = {
        "params": params,
        "adjoint_rtol": _backward_tolerance(call.rtol if adjoint_rtol is None else adjoint_rtol, call.y0),
        "adjoint_atol": _backward_tolerance(call.atol if adjoint_atol is None else adjoint_atol, call.y0),
        "adjoint_method": backward_method,
        "adjoint_options": backward_options,
    }
    if SCIPY in (call.method, backward_method):
        return adjoint_with_scipy(call, **how)
    return _states(call, call.t, gradient="adjoint", **how)


def odeint_event(
    func: Callable[[Tensor, Any], State],
    y0: State,
    t0: Tensor,
    *,
    event_fn: EventFn,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """torchdiffeq's ``odeint_event``: the time of the first event after t0, and the states at t0 and there.

    Both are differentiable, exactly: also with respect to t0, and to what event_fn depends on.
    """
    start = torch.as_tensor(t0).reshape(-1)
    ahead = 1.0 + start.detach().abs()  # floating-point, also for an integer start
    t = torch.cat([start, start.detach() - ahead if reverse_time else start.detach() + ahead])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def _states(call: Call, t: Tensor, **how: Any) -> Any:
    return solve_states(
        call.func,
        call.y0,
        t,
        rtol=call.rtol,
        atol=call.atol,
        method=call.method,
        options=call.options,
        callback=call.callback,
        **how,
    )


def _until_event(call: Call, event_fn: EventFn, **how: Any) -> tuple[Tensor, State]:
    """The time of the first event in the direction from t[0] to t[1], however late, and the states at both ends."""
    t = call.t
    if len(t) != 2:
        raise ArgumentValueError(
            f"with event_fn, t holds the start and a time that shows the direction; it has {len(t)}."
        )
    if call.method == SCIPY:
        raise ArgumentValueError(f"method {SCIPY!r} finds no events; use another one.")
    reach = _FAR
    if call.is_fixed:
        step = number_in(call.options.get("step_size"))
        if step is None:
            raise OptionError('an event on fixed steps needs options={"step_size": h}.')
        reach = _MAX_FIXED_STEPS * step
    end = t[:1].detach().double() + (reach if t[1] > t[0] else -reach)
    counted = ZeroCounts(event_fn, t[0], call.y0)
    event_t, y = _states(call, torch.cat([t[:1].double(), end]), event_fn=counted, **how)
    return event_t.to(t) if t.is_floating_point() else event_t, y


def _checked_params(func: Any, given: Any) -> tuple[Tensor, ...] | None:
    """The parameters that get gradients; None: all that the module is found to depend on."""
    if given is not None:
        return tuple(given)
    if not isinstance(func, nn.Module):
        raise ArgumentValueError(
            "func is no nn.Module, so its parameters are unknown: give them as adjoint_params, adjoint_params=() for "
            "none."
        )
    return None


def _parameters_of(func: Any) -> tuple[Tensor, ...]:
    return tuple(func.parameters())


def _backward_tolerance(given: Any, y0: State) -> Any:
    """A tolerance of the backward solve; one by element holds for the state and its adjoint, the least for the rest."""
    if number_in(given) is not None:
        return given
    parts = y0 if isinstance(y0, tuple) else (y0,)
    entries = [given] if not isinstance(y0, tuple) or isinstance(given, Tensor) else list(given)
    if len(entries) != len(parts):
        return given  # for aca_ext to say that they are too few or too many
    spread = [
        torch.as_tensor(entry, dtype=part.real.dtype, device=part.device).expand(part.shape)
        for entry, part in zip(entries, parts, strict=True)
    ]
    of_state = spread[0] if not isinstance(y0, tuple) else torch.cat([part.reshape(-1) for part in spread])
    least = min((float(part.min()) for part in spread if part.numel()), default=0.0)
    return of_state, of_state, least


def _backward_options(
    func: Any, call: Call, method: str, options: Any, given: Any, params: Sequence[Tensor] | None
) -> dict[str, Any]:
    """The options of the backward solve: by default those of the forward one without its norm."""
    chosen = {k: v for k, v in (options or {}).items() if k != "norm"} if given is None else dict(given)
    if callable(chosen.get("norm")) and any(not p.requires_grad for p in params or ()):
        warn_user("adjoint_params without requires_grad are left out of the adjoint norm.", UserWarning)
    state_norm = None if kind_of(call.method) == "scipy" else (options or {}).get("norm")
    found = options_of(method, chosen, n_intervals=1)
    if state_norm is not None and kind_of(method) == "adaptive" and not callable(chosen.get("norm")):
        found["norm"] = _adjoint_norm(state_norm, call.y0, with_params=chosen.get("norm") != "seminorm")
    callback = callback_of(func, kind_of(method), call.t, suffix="_adjoint")
    return found if callback is None else {**found, "callback": callback}


def _adjoint_norm(norm: Callable[[Any], Any], y0: State, *, with_params: bool) -> Callable[[tuple[Tensor, ...]], Any]:
    """The norm of the augmented state that follows from a norm of the state: the largest of its parts'."""
    n = len(y0) if isinstance(y0, tuple) else 1

    def of_augmented(parts: tuple[Tensor, ...]) -> Any:
        y, a, params = parts[1 : n + 1], parts[n + 1 : 2 * n + 1], parts[2 * n + 1 :]
        of_state = [norm(like_tuple(type(y0), x) if isinstance(y0, tuple) else x[0]) for x in (y, a)]
        of_params = [p.abs().square().mean().sqrt() for p in params if p.numel()] if with_params else []
        return max(*of_state, *of_params)

    return of_augmented


def _anchored(y0: State, params: Sequence[Tensor]) -> State:
    """The state with a graph to ``params``, which gives zeros to those that the solution does not depend on."""
    wanted = [p for p in params if p.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return y0
    if isinstance(y0, Tensor):
        return _Anchor.apply(y0, *wanted)
    return like_tuple(type(y0), (_Anchor.apply(y0[0], *wanted), *y0[1:]))


class _Anchor(torch.autograd.Function):
    """A copy of its first argument, of which the others get a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *params: Tensor) -> Tensor:
        ctx.params = params
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return g, *(torch.zeros_like(p) for p in ctx.params)
