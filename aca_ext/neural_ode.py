"""``odeint`` as an nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from aca_ext.errors import ArgumentValueError
from aca_ext.independent.solver import BatchStats
from aca_ext.odeint import solve
from aca_ext.solver import Stats
from aca_ext.state import State
from aca_ext.times import times_of


class NeuralODE(nn.Module):
    """A layer that carries its input along dy/dt = func(t, y).

    Args:
        func: nn.Module or callable, called as func(t, y, \\*args).
        t: times of the solve, the first that of the input. Numbers, or a tensor (with requires_grad, it is learnt).
        output: "end" returns the state at the last time, of the input's shape; "all" the states at all times, with a
            first dimension of len(t).
        **settings: keyword arguments of ``odeint``: rtol, atol, method, options, gradient, engine, checkpoints,
            params, progress, callback.

    Attributes:
        stats: ``Stats`` or ``BatchStats`` of the last forward pass, None before it.

    Raises:
        ArgumentValueError: ``output`` is neither "end" nor "all".
        TimeError: ``t`` is no sequence of times. Errors of a solve are those of ``odeint``.
    """

    stats: Stats | BatchStats | None

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
        self.func = func
        if isinstance(t, nn.Parameter):
            self.t: Tensor | tuple[float, ...] = t
        else:
            self.t = t if isinstance(t, Tensor) else times_of(t)  # float64 whatever .to() says
        self.output = output
        self.settings = settings
        self.stats = None

    def forward(self, y0: State, t: Tensor | Sequence[float] | None = None, args: Sequence[Any] = ()) -> State:
        """The state at the last time (or all), starting from ``y0``; ``t`` replaces the layer's times."""
        solution = solve(self.func, y0, self.t if t is None else t, args=args, **self.settings)
        self.stats = solution.stats
        if self.output == "all":
            return solution.y
        return solution.y[-1] if isinstance(solution.y, Tensor) else tuple(part[-1] for part in solution.y)

    def extra_repr(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"t={self.t!r}, output={self.output!r}{settings}"
