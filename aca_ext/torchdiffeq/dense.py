"""``odeint_dense``: a solution as a function of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError
from aca_ext.known_steps.dense import DenseSolution
from aca_ext.odeint import solve
from aca_ext.problem.state import State
from aca_ext.torchdiffeq.names import kind_of
from aca_ext.torchdiffeq.translation import Call


def odeint_dense(
    func: Callable[[Tensor, Any], State],
    y0: State,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Any], State]:
    """The dense output of a solve from t0 to t1, as a function of a time or a 1-d tensor of times between them.

    Differentiable, exactly, with respect to y0, what func depends on, and the time that the function is given.

    Raises:
        ArgumentValueError: the method has no steps of its own choice.
    """
    ends = torch.stack([torch.as_tensor(t, dtype=torch.float64, device="cpu").detach().reshape(()) for t in (t0, t1)])
    call = Call.of(func, y0, ends.to(_device_of(y0)), rtol, atol, method, options)
    if kind_of(call.method) != "adaptive":
        raise ArgumentValueError(f"odeint_dense takes adaptive methods; method {call.method!r} is none.")

    with_dense = {"rtol": call.rtol, "atol": call.atol, "method": call.method, "options": call.options, "dense": True}
    solution = solve(call.func, call.y0, ends, **with_dense)
    assert isinstance(solution, DenseSolution)
    return solution


def _device_of(y0: Any) -> Any:
    like = y0[0] if isinstance(y0, tuple) else y0
    return like.device if isinstance(like, Tensor) else None
