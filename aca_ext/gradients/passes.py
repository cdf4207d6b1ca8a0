"""The forward and backward pass of gradient="aca", and the autograd.Function that connects them.

Each engine has its own backward pass. All share one autograd.Function, which saves the tensors, validates the cotangent
and returns the gradients that autograd needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from aca_ext.gradients.base import Record, Result, Task
from aca_ext.gradients.dependencies import FirstEvaluation
from aca_ext.kernels.extension import is_surely_readable
from aca_ext.problem.admission import check_readable
from aca_ext.problem.transforms import is_transformed, outside_ended_transforms, refuse_transforms
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.vector_field.field import AutocastState
from aca_ext.vector_field.module_buffers import holds_script
from aca_ext.vector_field.replay import Replay

Gradients = Sequence[Tensor | None]


@dataclass
class ForwardPass:
    """Data of a finished solve for a replay in Python; it holds no state and no output.

    Attributes:
        n_params: number of params. The inputs of the solve are its params, its tensor args and ``found``, in this
            order.
        leaves: indices of the params in the autograd graph of func's first evaluation.
        found: inputs that func holds and did not use in the solve.
        autocast: state of torch.autocast in the forward pass.
    """

    task: Task
    record: Record
    stats: Stats | BatchStats
    autocast: AutocastState
    n_params: int
    leaves: Sequence[int] = ()
    found: Sequence[Tensor] = ()

    @classmethod
    def of(cls, task: Task, first: FirstEvaluation, solved: Result) -> ForwardPass:
        """The data of the solve ``solved``, which began with the evaluation ``first``."""
        autocast = AutocastState(task.problem.y0.device.type)
        return cls(task, solved.record, solved.stats, autocast, len(first.params), first.leaves, first.found)

    def replay(
        self, inputs: Sequence[Tensor], cut: Callable[[Tensor], Tensor] | None = None, y0: Tensor | None = None
    ) -> Replay:
        """The replay of the solve, which returns the gradients of ``inputs``.

        Pass ``y0`` if the gradients need an autograd graph. It and the inputs may have a history, which may contain
        other inputs. Unless ``cut`` detaches them, autograd searches the history for these and calls hooks there with
        None.
        """
        params, args = inputs[: self.n_params], inputs[self.n_params : len(inputs) - len(self.found)]
        has_history = y0 is not None and any(x.grad_fn is not None for x in (y0, *inputs))
        field, is_checked = self.task.field, self.task.params is None
        cuts_all = has_history and not holds_script(field.func)
        return Replay(field, params, args, self.autocast, cut, cuts_all, found=self.found, is_checked=is_checked)


class BackwardPass(Protocol):
    """Backward pass of one solve; it holds no state and no output, so these are freed with the autograd graph."""

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        """Computes the gradients of y0 and the inputs from the cotangent of the outputs and the saved states."""

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        """As ``gradients``, with an autograd graph (``create_graph=True``); y0 is None if it does not require grad."""


def with_graph(
    ys: Tensor,
    backward: BackwardPass,
    states: Sequence[Tensor],
    y0: Tensor,
    used: Sequence[Tensor],
    found: Sequence[Tensor] = (),
) -> Tensor:
    """The outputs ``ys`` with an autograd graph to y0 and to the inputs, which are ``used`` followed by ``found``.

    Tensors in ``used`` are saved: changing one in place before the backward pass is an error. func has not used the
    tensors in ``found``, so they may change.
    """
    inputs = map(outside_ended_transforms, (y0, *used, *found))
    result: Tensor = _apply(backward, [(ys, states, tuple(found))], *inputs)
    return result


def check_cotangent(grad_ys: Tensor) -> None:
    """Raises ArgumentTypeError if a backward pass cannot read the gradient of the solution."""
    if is_surely_readable(grad_ys) and not is_transformed():
        return
    refuse_transforms("the gradient of the solution", grad_ys)
    check_readable("the gradient of the solution", grad_ys)


class _Aca(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: BackwardPass, boxed: list[Any], y0: Tensor, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ys, states, found = boxed.pop()
        ctx.pass_back, ctx.n_states, ctx.has_y0, ctx.found = backward, len(states), y0.requires_grad, found
        # Saved tensors are freed with the graph, and autograd refuses a parameter that changed in place.
        ctx.save_for_backward(*states, *([y0] if ctx.has_y0 else []), *inputs[: len(inputs) - len(found)])
        return ys

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad_ys is None:
            return (None,) * len(needed)
        check_cotangent(grad_ys)
        saved, n_states = ctx.saved_tensors, ctx.n_states
        states, inputs = saved[:n_states], saved[n_states + ctx.has_y0 :] + ctx.found
        if torch.is_grad_enabled():
            y0 = saved[n_states] if ctx.has_y0 else None
            grads = ctx.pass_back.differentiable_gradients(grad_ys, y0, states, inputs)
        else:
            grads = ctx.pass_back.gradients(grad_ys, states, inputs)
        return None, None, *[g if n else None for g, n in zip(grads, needed[2:], strict=True)]


# ``_Aca.apply`` without the Python code that torch before 2.14 has around it, which takes 3 % of a compiled solve.
# ``with_graph`` does what that code does. No transform of torch.func is active there.
_apply = super(torch.autograd.Function, _Aca).apply
