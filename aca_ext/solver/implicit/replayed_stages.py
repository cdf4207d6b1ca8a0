"""Stages of a replayed implicit step, and the cotangents of their slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ReplayError
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.solver.implicit.rows import combined, inverse, largest
from aca_ext.solver.implicit.scheme import Group
from aca_ext.solver.implicit.systems import System

_MOST_REFINEMENTS = 200  # of a transposed solve with a matrix that is not the derivative of func
_NOT_A_JACOBIAN = (
    "The transposed stage equations were solved up to a residual of {:.3g} only, so the gradient would be wrong: the "
    "matrix of option jacobian is too far from the derivative of func. Correct the option, or leave it out."
)


@dataclass(slots=True)
class ReplayedStage:
    """A stage of a replayed step.

    Attributes:
        t, y: its time and state.
        slope: the slope with its graph.
        k: the slope of the solution.
        system: that of its group, at the solution; None if the stage is explicit.
    """

    t: Tensor
    y: Tensor
    slope: Tensor
    k: Tensor
    system: System | None = None


def transposed_solution(
    ops: TorchOperations, is_exact: bool, group: Group, h: Number, stages: Sequence[ReplayedStage], r: list[Tensor]
) -> list[Tensor]:
    """The cotangents of the slopes of a group: the solution of Kᵀ·λ = r.

    It is improved until rounding unless the Jacobian ``is_exact``.
    """
    if group.a is None:
        return r
    system = stages[0].system
    assert system is not None
    found = [ops.admit(x) for x in system.solve(r, transposed=True)]
    if is_exact:
        return found
    eps, tiny = torch.finfo(r[0].dtype).eps, torch.finfo(r[0].dtype).tiny
    before = torch.full_like(largest(r, ops), math.inf)
    for _ in range(_MOST_REFINEMENTS):
        residual = _residual(group, h, stages, r, found)
        size = largest(residual, ops) / largest((*r, *found), ops).clamp_min(tiny)
        is_better = (size > 16 * eps) & (size < 0.5 * before)
        if not is_better.any():
            break
        before = torch.where(is_better, size, before)
        change = system.solve(residual, transposed=True)
        found = [ops.admit(torch.where(is_better, x + d, x)) for x, d in zip(found, change, strict=True)]
    if not (size <= 2**16 * eps).all():
        raise ReplayError(_NOT_A_JACOBIAN.format(float(size.max())))
    return found


def pulled_states(
    ops: TorchOperations, group: Group, h: Number, r: Sequence[Tensor], found: Sequence[Tensor]
) -> list[Tensor]:
    """The products v_i of the cotangents ``found`` with the Jacobians: h·Σ_j a_ji·v_j = λ_i - r_i.

    Products by autograd would multiply the rounding errors of λ by the stiffness.
    """
    transposed = tuple(zip(*group.inverse, strict=True))
    return [ops.admit(v) for v in combined(inverse(h), transposed, [x - y for x, y in zip(found, r, strict=True)])]


def _residual(
    group: Group, h: Number, stages: Sequence[ReplayedStage], r: Sequence[Tensor], found: Sequence[Tensor]
) -> list[Tensor]:
    """r - Kᵀ·λ with the derivatives of func itself, in case that the matrix has others."""
    assert group.a is not None
    how: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    v = [
        torch.autograd.grad(s.slope, s.y, x, **how)[0] if s.slope.requires_grad else torch.zeros_like(x)
        for s, x in zip(stages, found, strict=True)
    ]
    sums = combined(h, tuple(zip(*group.a, strict=True)), v)
    return [r_i + s - x for r_i, s, x in zip(r, sums, found, strict=True)]


def predicted(ops: TorchOperations, predictor: Sequence[tuple[int, float]], states: dict[int, Tensor]) -> Tensor:
    """The value of the polynomial through known states of a step: see ``Group.predictors``."""
    found, weights = [states[i] for i, _ in predictor], tuple(w for _, w in predictor)
    return found[0] if len(found) == 1 else ops.weighted_sum(None, 1.0, found, weights)
