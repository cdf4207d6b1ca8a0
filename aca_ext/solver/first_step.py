"""The first step of an adaptive solve, by Hairer's rule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.problem.problem import Problem
from aca_ext.solver.failures import check_finite
from aca_ext.vector_field.field import VectorField


def first_step(problem: Problem, field: VectorField, ops: TorchOperations, control: Any, y: Tensor, k: Tensor) -> float:
    """The size of the first step from ``y`` with slope ``k``; its evaluation of func is not part of the solution.

    Raises:
        NonFiniteError: y or k is not finite.
    """
    assert problem.controller is not None
    with torch.no_grad():
        norm_f = float(ops.error_norm(k, None, 0.0, y, y))
        if not math.isfinite(norm_f):
            check_finite(problem, field, control, y, k, norm_f)

        def change_of_slope(h: float) -> float:
            euler = ops.weighted_sum(y, control.sign * h, [k], (1.0,))
            with field.aside():
                change = field(ops.scalars([control.t + control.sign * h])[0], euler)
            return float(ops.error_norm(change, k, -1.0, y, y))

        norm_y = float(ops.error_norm(y, None, 0.0, y, y))
        return problem.controller.initial(control.length, norm_y, norm_f, change_of_slope)
