"""Error messages for solves that stop early, shared by all engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import NonFiniteError, SolveError, StepLimitError, StepSizeError
from aca_ext.kernels.reference import Number, as_float
from aca_ext.problem.problem import Problem
from aca_ext.vector_field.field import VectorField

NOT_FINITE_ON_GRID = "the solution on the fixed grid is NaN or infinite at its end. Use smaller steps, or look at func."
NO_TOLERANCE = "rtol and atol are both zero in an element that has an error. Make one of them positive there."

_GROWTH = 1e6  # of a state from its start, or from 1, that suggests a solution without bound


def unsolved(size: float, residual: float, unit: str) -> str:
    """The message where Newton's method failed, in a step of a given size and with a last change in a given unit."""
    return (
        f"Newton's method did not solve the stages of a step of size {size:.6g}; its last change was {residual:.3g} "
        f"{unit}. Look at func and at option jacobian there, use smaller steps, or end the solve earlier."
    )


def failure_of(
    problem: Problem,
    kind: type[SolveError],
    message: str | None,
    advice: Callable[[], str | None] = lambda: None,
    **numbers: Any,
) -> SolveError:
    """The error of a solve that stopped early.

    Args:
        message: the reason, by default that of ``kind``.
        advice: function that returns advice for this solve, to be added to the default reason.
    """
    if kind is NonFiniteError:
        message = fault_of_start(problem.y0) or message
    reason = message or default_reason(problem, kind, problem.times[-1])
    if problem.newton is None and kind in (StepLimitError, StepSizeError) and message is None:
        reason += " " + (advice() or 'If the problem is stiff, use method="auto" or "kvaerno5".')
    return kind(f"The solve with {problem.tableau.name} stopped: {reason}", **numbers)


def failure_at(
    problem: Problem,
    field: VectorField,
    control: Any,
    kind: type[SolveError],
    message: str | None = None,
    ratio: Number | None = None,
    advice: Callable[[], str | None] = lambda: None,
) -> SolveError:
    """``failure_of`` with the numbers of a control; ``ratio`` is by default that of its last trial."""
    return failure_of(
        problem,
        kind,
        message,
        advice,
        t=as_float(control.t),
        h=as_float(control.h if problem.adaptive else control.h_trial) or math.nan,  # until a step is chosen
        error_ratio=as_float(control.ratio if ratio is None else ratio),
        n_accepted=control.n_accepted,
        n_rejected=control.n_steps - control.n_accepted,
        n_f_evals=field.n_evals,
    )


def check_finite(
    problem: Problem, field: VectorField, control: Any, y: Tensor, k: Tensor, ratio: Number | None = None
) -> None:
    """Raises NonFiniteError if the state or its slope is not finite."""
    if is_finite(y) and is_finite(k):
        return
    what = "func returned NaN or infinity at" if is_finite(y) else "the state is NaN or infinite at"
    message = f"{what} t={as_float(control.t):.17g}; look at func there."
    raise failure_at(problem, field, control, NonFiniteError, message, ratio)


def is_finite(x: Tensor) -> bool:
    # If the sum is finite, so is every element; the sum takes a third of the time of isfinite.
    return math.isfinite(x.detach().sum()) or bool(torch.isfinite(x).all())


def fault_of_start(y0: Tensor) -> str | None:
    """The reason for a solve that stopped because y0 is not finite; None if y0 is finite."""
    wrong = ~torch.isfinite(y0.detach())
    if not wrong.any():
        return None
    kind = "NaN" if y0.isnan().any() else "infinity"
    return f"y0 holds {kind} ({int(wrong.sum())} of {y0.numel()} elements are not finite). Clean the initial state."


def default_reason(problem: Problem, kind: type[SolveError], end: float) -> str:
    """``reason_of`` with the settings of a problem; a tolerance below rounding is named first."""
    min_step = 0.0 if problem.controller is None else problem.controller.min_step
    is_of_steps = kind in (StepLimitError, StepSizeError)
    return (fault_of_tolerance(problem) if is_of_steps else "") + reason_of(kind, problem.max_num_steps, end, min_step)


def fault_of_tolerance(problem: Problem) -> str:
    """A sentence about a tolerance far below what the dtype of the state resolves; "" if there is none."""
    y0, tolerance = problem.y0.detach(), problem.tolerance
    eps = torch.finfo(y0.dtype).eps
    rtol, atol = (torch.as_tensor(x, device=y0.device) for x in (tolerance.rtol, tolerance.atol))
    is_too_fine = (rtol < 0.1 * eps) & (atol < 0.1 * eps * y0.abs())  # the default, 1e-7, works in float32
    if not problem.adaptive or not is_too_fine.any():
        return ""
    dtype = str(y0.dtype).removeprefix("torch.")
    other = "" if y0.dtype == torch.float64 else ", or use float64"
    return f"rtol={float(rtol.min()):.3g} asks for more than {dtype} resolves ({eps:.2g}). Raise rtol{other}. Also, "


def growth_advice(problem: Problem, y: Tensor, t: float) -> str | None:
    """Advice for a solve that stopped at ``y`` because the solution grows without bound; None if it did not grow."""
    before, after = (float(x.detach().abs().max()) if x.numel() else 0.0 for x in (problem.y0, y))
    if not after > _GROWTH * max(before, 1.0):
        return None
    return (
        f"The largest element of the state has grown from {before:.3g} to {after:.3g}, so the solution is perhaps "
        f"infinite near t={t:.6g}."
    )


def reason_of(kind: type[SolveError], max_num_steps: int, end: float, min_step: float = 0.0) -> str:
    """The reason for an error of this kind in a solve to t = ``end``, with advice."""
    lower = "lower min_step, " if min_step > 0 else ""
    return {
        StepLimitError: f"the {max_num_steps} trial steps of option max_num_steps did not reach t={end:.17g}. Raise "
        "max_num_steps, loosen rtol or atol, or look for blow-up.",
        StepSizeError: "the step became too small: the problem is stiff here, has a singularity or a jump, or the "
        f"tolerance is below rounding. Loosen rtol or atol, use float64, {lower}or end the solve earlier.",
        NonFiniteError: "func or the solution is NaN or infinite beyond this time, however small the step: a "
        "blow-up, or an operation outside its domain. End the solve earlier or look at func there.",
    }[kind]
