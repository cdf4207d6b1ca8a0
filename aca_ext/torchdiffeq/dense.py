"""``odeint_dense``: a solution as a function of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, TimeError
from aca_ext.numerics.methods import METHODS
from aca_ext.odeint import solve
from aca_ext.problem.state import State, like_tuple
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
    ends = torch.stack([torch.as_tensor(t, dtype=torch.float64).detach().cpu().reshape(()) for t in (t0, t1)])
    call = Call.of(func, y0, ends.to(_device_of(y0)), rtol, atol, method, options)
    if kind_of(call.method) != "adaptive":
        raise ArgumentValueError(f"odeint_dense takes adaptive methods; method {call.method!r} is none.")

    def solved(times: Tensor) -> Any:
        how = {"rtol": call.rtol, "atol": call.atol, "method": call.method, "options": call.options}
        return solve(call.func, call.y0, times, **how)

    with torch.no_grad():
        steps = solved(ends).steps
    dense = METHODS[call.method].dense
    assert dense is not None
    # The dense output of a step is a polynomial of this degree, hence known from one more of its values.
    degree = len(dense[0])
    inside = torch.arange(degree, dtype=torch.float64) / degree
    nodes = torch.cat([(steps[:, :1] + (steps[:, 1:] - steps[:, :1]) * inside).reshape(-1), steps[-1, 1:]])
    return _Interpolant(nodes, solved(nodes).y, degree)


def _device_of(y0: Any) -> Any:
    like = y0[0] if isinstance(y0, tuple) else y0
    return like.device if isinstance(like, Tensor) else None


class _Interpolant:
    """Piecewise polynomials, each through ``degree`` + 1 of the values ``y`` at ``nodes``."""

    def __init__(self, nodes: Tensor, y: State, degree: int) -> None:
        self._nodes, self._y, self._degree = nodes, y, degree
        self._sign = 1.0 if nodes[-1] > nodes[0] else -1.0
        self._ends = self._sign * nodes[degree::degree].contiguous()

    def __call__(self, t: Any) -> State:
        time = torch.as_tensor(t, dtype=torch.float64).cpu()
        flat, nodes, degree = time.reshape(-1), self._nodes, self._degree
        along = self._sign * flat.detach()
        if bool(((along < self._sign * nodes[0]) | (along > self._sign * nodes[-1])).any()):
            raise TimeError(f"t reaches beyond the solution, which goes from {nodes[0]:.17g} to {nodes[-1]:.17g}.")
        first = torch.searchsorted(self._ends, along) * degree
        index = first[:, None] + torch.arange(degree + 1)
        weights = _lagrange(flat, nodes[index])

        def value(y: Tensor) -> Tensor:
            w = weights.to(y.real.dtype if y.is_complex() else y.dtype).to(y.device)
            shape = (*w.shape, *(1,) * (y.dim() - 1))
            return (w.view(shape) * y[index.to(y.device)]).sum(1).reshape(*time.shape, *y.shape[1:])

        y = self._y
        return value(y) if isinstance(y, Tensor) else like_tuple(type(y), map(value, y))


def _lagrange(t: Tensor, nodes: Tensor) -> Tensor:
    """The weights, (n, m), of the values at ``nodes``, (n, m), in the polynomials through them at ``t``, (n,)."""
    m = nodes.shape[1]
    weights = []
    for j in range(m):
        others = [i for i in range(m) if i != j]
        ratios = (t[:, None] - nodes[:, others]) / (nodes[:, j : j + 1] - nodes[:, others])
        weights.append(ratios.prod(1))
    return torch.stack(weights, 1)
