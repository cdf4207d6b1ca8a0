"""engine="eager": the host runs the loop, calls func at every stage, and calls the kernels between."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from aca_ext.engines.base import Request, solve_with
from aca_ext.errors import AcaError, ArgumentValueError, SlopeError
from aca_ext.gradients import GRADIENTS, batch
from aca_ext.gradients.aca import solve_without_graph
from aca_ext.gradients.base import Gradient, Result, Task
from aca_ext.progress import both, progress_bar


class EagerEngine:
    error: type[AcaError] = ArgumentValueError

    def obstacle(self, request: Request) -> str | None:
        return None

    def solve(self, request: Request) -> Result:
        """Solves with any gradient method, with or without callback and progress bar.

        Raises:
            SlopeError: func used the times of a batch's samples as one number.
            Those of ``solve_with`` and of the gradient method.
        """
        problem = request.problem
        with progress_bar(problem.length) if request.progress else nullcontext() as show:
            on_step = both(request.callback, show)
            if on_step is not None:
                request = request._replace(problem=replace(problem, on_step=on_step))
            try:
                return solve_with(method_for(request), request)
            except (RuntimeError, ValueError) as error:
                if request.is_batch:
                    _explain_times_of_samples(error)
                raise


def method_for(request: Request) -> Gradient:
    """The gradient method, or a solve without an autograd graph if gradients are disabled."""
    if not torch.is_grad_enabled():
        return batch.solve_without_graph if request.is_batch else _without_graph
    return partial(batch.solve, gradient=request.gradient) if request.is_batch else GRADIENTS[request.gradient]


def _without_graph(task: Task) -> Result:
    return solve_without_graph(task, task.first_slope(task.problem.y0.detach()))


def _explain_times_of_samples(error: Exception) -> None:
    """Raises SlopeError if the error shows that func used the times of all samples as one number."""
    signs = ("Boolean value of Tensor", "cannot be converted to Scalar", "can be converted to Python scalars")
    if any(sign in str(error) for sign in signs):
        raise SlopeError(
            f'func failed ({error}). With option batch="independent", t holds the time of every sample, in shape '
            "(batch, 1, ..., 1), so `if t > 1`, float(t) and t.item() do not work. Use torch.where(t > 1, a, b)."
        ) from error
