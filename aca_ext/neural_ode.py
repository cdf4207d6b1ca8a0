"""``NeuralODE``: a solve as a layer, an nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.engines.arguments import Arguments
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, UnknownNameError, UnregisteredParameterWarning
from aca_ext.kernels.extension import known_tensors
from aca_ext.odeint import solve
from aca_ext.problem.arguments import lookup
from aca_ext.problem.events import refuse_terminal
from aca_ext.problem.options import option_names, refuse_dense, refuse_to_stop
from aca_ext.problem.state import State, tensors_in
from aca_ext.problem.suggestions import option_meant_by
from aca_ext.problem.times import times_of
from aca_ext.problem.transforms import is_transformed
from aca_ext.problem.trees import map_leaves
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.user_warnings import warn_user


class NeuralODE(nn.Module):
    """Layer that solves dy/dt = func(t, y, \\*args) from its input y and returns the state at the last or at all times.

    Args:
        func: nn.Module with the signature (t, y, \\*args). For another callable, its parameters are not registered.
        t: (T,) strictly monotonic times; y0 is the state at the first. Numbers or a tensor; default (0.0, 1.0).
        output: "end" (default) returns a state, shaped like y0; "all" returns (T, \\*y0.shape).
        **settings: keyword arguments of ``odeint`` except args and event_fn; same meanings and defaults.

    Attributes:
        stats: ``Stats`` or ``BatchStats`` of the last forward pass; None before it.

    Raises:
        ArgumentValueError: ``output`` is neither "end" nor "all".
        UnknownNameError: a keyword argument is not one of ``odeint``.
        OptionError: option ``on_step_limit="stop"`` is given; a layer cannot return how far the solve came.
        TimeError: ``t`` is not a sequence of times.

    Warns:
        UnregisteredParameterWarning: func is not an nn.Module, and the solve uses parameters outside the layer.
    """

    stats: Stats | BatchStats | None
    _looked_for_unregistered = False

    def __init__(
        self,
        func: Callable[..., State],
        t: Tensor | Sequence[float] = (0.0, 1.0),
        *,
        output: str = "end",
        **settings: Any,
    ) -> None:
        super().__init__()
        if output not in ("end", "all"):
            raise ArgumentValueError(f'output is {output!r}; give "end" (the last state) or "all" (all states).')
        _check_settings(settings)
        self.func = func
        if isinstance(t, nn.Parameter):
            self.t: Tensor | tuple[float, ...] = t
        else:
            self.t = t if isinstance(t, Tensor) else times_of(t)  # numbers, since .to() would convert a buffer
        self.output = output
        self.settings = settings
        self.stats = None
        self._looked_for_unregistered = isinstance(func, nn.Module) or settings.get("params") is not None

    def forward(self, y0: State, t: Tensor | Sequence[float] | None = None, args: Sequence[Any] = ()) -> State:
        """The state at the last time, or at all times, from the initial state ``y0``.

        Args:
            y0: initial state, a tensor or a tree of tensors.
            t: (T,) times that replace those of the layer; default None.
            args: further arguments of func.

        Raises:
            ArgumentValueError: a callback ended the solve early.
            Those of ``solve``.
        """
        solution = solve(self.func, y0, self.t if t is None else t, args=args, **self.settings)
        self.stats = solution.stats
        if not solution.is_complete:
            raise ArgumentValueError(
                "callback returned True, which ends a solve early, and a layer does not show where. Only aca_ext.solve "
                "does; a callback that returns None lets the solve go on."
            )
        if not self._looked_for_unregistered:
            self._look_for_unregistered(solution.y, y0, args)
        if self.output == "all":
            return solution.y
        y = solution.y
        return y[-1] if isinstance(y, Tensor) else map_leaves(lambda part: part[-1], y)

    def _look_for_unregistered(self, y: State, y0: State, args: Sequence[Any]) -> None:
        """Warns once if the solve depends on parameters that are not registered with the layer."""
        if torch.compiler.is_compiling() or is_transformed() or not tensors_in(y)[0].requires_grad:
            return
        self._looked_for_unregistered = True
        known = known_tensors([*tensors_in((y0, args, self.t)), *self.parameters()])
        found = known.others(tensors_in(y)[0], None) or []
        if found:
            warn_user(
                f"func of NeuralODE is not an nn.Module ({_name(self.func)}). It depends on {len(found)} parameters, "
                f"the first of shape {tuple(found[0].shape)}, that are not registered with the layer: "
                "layer.parameters(), .to() and state_dict() leave them out. Make func an nn.Module, unless another "
                "module of the model holds them.",
                UnregisteredParameterWarning,
            )

    def __prepare_scriptable__(self) -> None:
        raise ArgumentTypeError(
            "torch.jit.script cannot compile a solve. Script func alone, NeuralODE(torch.jit.script(func)), or record "
            "the model with torch.jit.trace or torch.export, with fixed steps (option step_size)."
        )

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"t={self.t!r}, output={self.output!r}{settings}"


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises if ``odeint`` does not accept one of the settings, or a layer cannot."""
    refuse_to_stop("NeuralODE", settings.get("options"))
    refuse_terminal("NeuralODE", settings.get("events") or ())
    refuse_dense("NeuralODE", settings.get("dense"))
    allowed = [argument.name for argument in fields(Arguments) if argument.kw_only and argument.name != "args"]
    for name in settings:
        option = None if name in allowed else option_meant_by(name, option_names(), allowed)
        if option is not None:
            raise UnknownNameError(f"unknown setting {name!r} of NeuralODE; did you mean options={{{option!r}: ...}}?")
        lookup("setting of NeuralODE", name, allowed)


def _name(func: object) -> str:
    return str(getattr(func, "__qualname__", type(func).__name__))
