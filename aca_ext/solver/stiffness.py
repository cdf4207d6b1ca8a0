"""The eigenvalue estimate of ``numerics.stiffness`` on the slopes of a step, and the advice that follows from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import as_float
from aca_ext.numerics.stiffness import EigenvalueEstimate
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.problem import Problem
from aca_ext.solver.runge_kutta import Trial, nonzero, stage_times
from aca_ext.vector_field.field import VectorField

_NEAR = 0.75  # share of the limit that the next step of a stiff problem exceeds, since rejections make it smaller


def distances(ops: TorchOperations, estimate: EigenvalueEstimate, y: Tensor, trial: Trial) -> tuple[float, float]:
    """Norms of the differences of slopes and of states whose quotient is h·|λ|, in units of the tolerance."""
    indices, weights = nonzero(estimate.weights)
    with torch.no_grad():
        y, y1, k = y.detach(), trial.y1.detach(), [x.detach() for x in trial.k]
        states = ops.weighted_sum(None, 1.0, [k[i] for i in indices], weights)
        of_slopes = float(ops.error_norm(k[-1], k[-2], -1.0, y, y1))
        return of_slopes, float(ops.error_norm(states, None, 0.0, y, y1))


def stiffness_advice(
    problem: Problem, field: VectorField, ops: TorchOperations, steps: Any, control: Any, y: Tensor, k: Tensor | None
) -> str | None:
    """Advice for a solve that cannot go on, if stability limits its next step; else None.

    Args:
        steps: a ``solver.method.Steps``.
        y, k: state at which the solve stopped, and its slope if it is known.
    """
    tableau = steps.scheme.tableau
    estimate = EigenvalueEstimate.of(tableau) if type(tableau) is Tableau else None
    if estimate is None or problem.newton is not None or field.draws_random_numbers:
        return None
    t, h = as_float(control.t), as_float(control.sign * control.h)
    with field.aside(), torch.no_grad():
        trial = steps.step(stage_times(steps.scheme, t, h, t + h, problem.jumps, y.dtype), y, h, k)
    of_slopes, of_states = distances(ops, estimate, y, trial)
    if not _NEAR * estimate.limit * of_states < of_slopes < math.inf:
        return None
    return (
        f"The problem looks stiff here: h times the largest eigenvalue is about {of_slopes / of_states:.2g}, near the "
        f'limit of stability of {tableau.name}. Use method="auto" or "kvaerno5".'
    )
