"""method="scipy_solver": SciPy's solve_ivp, alone or in both directions of the continuous adjoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.base import Request, solve_with
from aca_ext.errors import NotInstalledError, SolveError
from aca_ext.gradients import adjoint
from aca_ext.gradients.aca import solve_without_graph
from aca_ext.gradients.base import AdjointOptions, Result, Task
from aca_ext.gradients.dependencies import checked_params
from aca_ext.kernels.fused import operations_for
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.problem import Problem
from aca_ext.problem.state import State
from aca_ext.problem.validation import problem_of
from aca_ext.solver.checkpoints import StepRecord
from aca_ext.solver.stats import Stats
from aca_ext.torchdiffeq.names import SCIPY
from aca_ext.torchdiffeq.translation import Call
from aca_ext.vector_field.field import VectorField

Options = Mapping[str, Any]


def solve_with_scipy(call: Call) -> State:
    """The states at the times of the call, without a graph, as torchdiffeq returns them from SciPy."""
    problem, forward = _forward(call)
    with torch.no_grad():
        task = Request(problem).task()
        result = forward(task, task.first_slope(problem.y0.detach()))
    return problem.packing.unpack_rows(result.ys)


def adjoint_with_scipy(
    call: Call,
    *,
    params: Any,
    adjoint_rtol: Any,
    adjoint_atol: Any,
    adjoint_method: str,
    adjoint_options: dict[str, Any],
) -> State:
    """The states, with the continuous adjoint as their gradient; SciPy solves forward, backward or both."""
    if not torch.is_grad_enabled():
        return solve_with_scipy(call)
    problem, forward = _forward(call)
    by_scipy = adjoint_method == SCIPY
    backward = AdjointOptions(
        rtol=adjoint_rtol,
        atol=adjoint_atol,
        method=None if by_scipy else adjoint_method,
        options={} if by_scipy else adjoint_options,
        solve=partial(_last_state, options=adjoint_options) if by_scipy else None,
    )
    learnt = call.t if call.t.requires_grad else None
    request = Request(problem, "adjoint", learnt, checked_params(params), adjoint=backward)
    result = solve_with(partial(adjoint.solve, forward=forward), request)
    return problem.packing.unpack_rows(result.ys)


def _forward(call: Call) -> tuple[Problem, Any]:
    """The problem of a call, and the function that solves it from a task and the first slope."""
    by_scipy = call.method == SCIPY
    method, options = (None, {}) if by_scipy else (call.method, call.options)
    given = ProblemArguments(call.func, call.y0, call.t, rtol=call.rtol, atol=call.atol, method=method, options=options)
    problem = replace(problem_of(given), on_step=call.callback)
    return problem, partial(_result, options=call.options) if by_scipy else solve_without_graph


def _result(task: Task, _: Tensor | None, *, options: Options) -> Result:
    ys = _rows(task.problem, task.field, options)
    return Result(ys, StepRecord(), Stats(n_f_evals=task.field.n_evals, backend="scipy"))


def _last_state(problem: Problem, *, options: Options) -> Tensor:
    ops = operations_for(problem.y0, problem.tolerance)
    return _rows(problem, VectorField(problem.func, (), problem.packing, ops), options)[-1]


def _rows(problem: Problem, field: VectorField, options: Options) -> Tensor:
    """The packed states at the requested times, (T, \\*packed shape).

    Raises:
        NotInstalledError: SciPy is missing.
        SolveError: SciPy did not reach the end.
    """
    y0, times = problem.y0.detach(), problem.times
    if len(times) == 1:
        return y0[None].clone()
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        raise NotInstalledError(f"method {SCIPY!r} needs SciPy. Run `pip install scipy`.") from None

    def slope(t: float, y: Any) -> Any:
        state = torch.as_tensor(y, dtype=y0.dtype, device=y0.device).reshape(y0.shape)
        with torch.no_grad():
            k = field(torch.full((), t, dtype=y0.dtype, device=y0.device), field.admit(state))
        return k.double().reshape(-1).cpu().numpy()

    limits = {name: options[name] for name in ("min_step", "max_step") if name in options}
    solved = solve_ivp(
        slope,
        t_span=(times[0], times[-1]),
        y0=y0.double().reshape(-1).cpu().numpy(),
        t_eval=times,
        method=options.get("solver", "LSODA"),
        rtol=_as_array(problem.tolerance.rtol),
        atol=_as_array(problem.tolerance.atol),
        **limits,
    )
    if not solved.success:
        raise _failure(solved, times[0], field.n_evals)
    return torch.from_numpy(solved.y.T.copy()).to(y0).reshape(len(times), *y0.shape)


def _as_array(tolerance: float | Tensor) -> Any:
    return tolerance.double().reshape(-1).cpu().numpy() if isinstance(tolerance, Tensor) else tolerance


def _failure(solved: Any, start: float, n_evals: int) -> SolveError:
    reached = float(solved.t[-1]) if len(solved.t) else start
    message = f"SciPy stopped: {solved.message}"
    counts = {"n_accepted": 0, "n_rejected": 0, "n_f_evals": n_evals}
    return SolveError(message, t=reached, h=math.nan, error_ratio=math.nan, **counts)
