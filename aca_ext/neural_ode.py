"""``odeint`` as an nn.Module."""

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
from aca_ext.problem.options import option_names, refuse_to_stop
from aca_ext.problem.state import State, like_tuple, tensors_in
from aca_ext.problem.suggestions import meant_by
from aca_ext.problem.times import times_of
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.user_warnings import warn_user


class NeuralODE(nn.Module):
    """A layer that carries its input along dy/dt = func(t, y).

    Args:
        func: nn.Module, called as func(t, y, \\*args). Another callable is solved alike, but the parameters that it
            uses are not registered with the layer: an UnregisteredParameterWarning.
        t: times of the solve, the first that of the input. Numbers, or a tensor (with requires_grad, it is learnt).
        output: "end" returns the state at the last time, of the input's shape; "all" the states at all times, with a
            first dimension of len(t).
        **settings: keyword arguments of ``odeint``: rtol, atol, method, options, gradient, engine, checkpoints,
            params, progress, callback.

    Attributes:
        stats: ``Stats`` or ``BatchStats`` of the last forward pass, None before it.

    Raises:
        ArgumentValueError: ``output`` is neither "end" nor "all".
        UnknownNameError: a keyword argument that ``odeint`` does not take.
        OptionError: option ``on_step_limit="stop"``: a layer returns its last state, not how far it came.
        TimeError: ``t`` is no sequence of times. Errors of a solve are those of ``odeint``.
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
            raise ArgumentValueError(f'output is {output!r}; it is "end" (the last state) or "all".')
        _check_settings(settings)
        self.func = func
        if isinstance(t, nn.Parameter):
            self.t: Tensor | tuple[float, ...] = t
        else:
            self.t = t if isinstance(t, Tensor) else times_of(t)  # float64 whatever .to() says
        self.output = output
        self.settings = settings
        self.stats = None
        self._looked_for_unregistered = isinstance(func, nn.Module) or settings.get("params") is not None

    def forward(self, y0: State, t: Tensor | Sequence[float] | None = None, args: Sequence[Any] = ()) -> State:
        """The state at the last time (or all), starting from ``y0``; ``t`` replaces the layer's times."""
        solution = solve(self.func, y0, self.t if t is None else t, args=args, **self.settings)
        self.stats = solution.stats
        if not self._looked_for_unregistered:
            self._look_for_unregistered(solution.y, y0, args)
        if self.output == "all":
            return solution.y
        y = solution.y
        return y[-1] if isinstance(y, Tensor) else like_tuple(type(y), (part[-1] for part in y))

    def _look_for_unregistered(self, y: State, y0: State, args: Sequence[Any]) -> None:
        """Warns, once, where the solve depends on parameters that are not the layer's."""
        if torch.compiler.is_compiling() or not tensors_in(y)[0].requires_grad:
            return
        self._looked_for_unregistered = True
        known = known_tensors([*tensors_in((y0, args, self.t)), *self.parameters()])
        found = known.others(tensors_in(y)[0], None) or []
        if found:
            warn_user(
                f"func of NeuralODE is no nn.Module ({_name(self.func)}) and depends on {len(found)} parameters, the "
                f"first of shape {tuple(found[0].shape)}, which are not registered with the layer: layer.parameters(), "
                ".to() and state_dict() leave them out. Make func an nn.Module, unless another module of the model "
                "holds them.",
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
    """Raises where the layer's solves could not take them."""
    refuse_to_stop("NeuralODE", settings.get("options"))
    allowed = [argument.name for argument in fields(Arguments) if argument.kw_only and argument.name != "args"]
    for name in settings:
        option = None if name in allowed else meant_by(name, option_names())
        if option is not None and meant_by(name, allowed) is None:
            raise UnknownNameError(f"unknown setting {name!r} of NeuralODE; did you mean options={{{option!r}: ...}}?")
        lookup("setting of NeuralODE", name, allowed)


def _name(func: object) -> str:
    return str(getattr(func, "__qualname__", type(func).__name__))
