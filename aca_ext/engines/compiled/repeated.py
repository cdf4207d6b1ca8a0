"""Second derivatives of a compiled solve: the eager engine repeats its accepted steps with an autograd graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aca_ext.engines.compiled.verification import inputs_by_kind, sums_by_input
from aca_ext.errors import ReplayError
from aca_ext.gradients.aca import differentiable_backward
from aca_ext.gradients.base import Task
from aca_ext.gradients.passes import ForwardPass
from aca_ext.solver.checkpoints import StepRecord
from aca_ext.solver.stats import Stats
from aca_ext.vector_field.field import AutocastState

CHANGED_FUNC = (
    "func has changed since the forward pass: it depends on other tensors, numbers or modules now. With "
    "create_graph=True the backward pass evaluates it again. Change it after the backward pass, or use "
    'gradient="direct", which does not replay.'
)

_CHANGED_START = (
    "y0 has changed since the forward pass. With create_graph=True the backward pass starts from it again. Write to it "
    "after the backward pass, or give a copy to the solve."
)


def gradients_with_graph(
    task: Task,
    record: StepRecord,
    stats: Stats,
    used: Sequence[Tensor],
    grad_ys: Tensor,
    y0: Tensor | None,
    states: Mapping[int, Tensor],
    inputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of y0 and of ``inputs``, with an autograd graph.

    Args:
        task: a new task of the eager engine.
        used: the tensors on which func depends; ``inputs`` are these, as autograd has saved them.
        y0: the start, as autograd has saved it; None if it does not require grad.
        states: states of the solve by their numbers, at least the first; the repeated ones are compared with them.

    Raises:
        ReplayError: y0 has changed since the forward pass.
    """
    start = states[0] if y0 is None else y0
    if not torch.equal(start, states[0]):  # a stiff solve may forget where it started
        raise ReplayError(_CHANGED_START)
    of_params, of_args = inputs_by_kind(task.field.args, used)
    forward = ForwardPass(task, record, stats, AutocastState(start.device.type), len(of_params))
    given = [*(inputs[i] for i in of_params), *(x if i is None else inputs[i] for x, i in of_args)]
    grad_y0, *found = differentiable_backward(forward, grad_ys, start, states, given)
    grads = sums_by_input(of_params, of_args, found)
    return [grad_y0, *(grads.get(i) for i in range(len(inputs)))]
