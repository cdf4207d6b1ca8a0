"""The forward and the backward pass of gradient="aca", and the autograd.Function that stands between them.

Each engine has its own backward pass, and all share the Function: it saves tensors, checks the cotangent that autograd
brings, and hands out the gradients that autograd asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from aca_ext.gradients.base import Record, Result, Task
from aca_ext.gradients.dependencies import FirstEvaluation
from aca_ext.problem.admission import check_readable
from aca_ext.problem.transforms import refuse_transforms
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.vector_field.field import AutocastState
from aca_ext.vector_field.module_buffers import holds_script
from aca_ext.vector_field.replay import Replay

Gradients = Sequence[Tensor | None]


@dataclass
class ForwardPass:
    """A solve that ran, as far as a replay in Python needs to know it. It holds no state and no output.

    Attributes:
        n_params: of the inputs, how many are params; the others are tensor args, and at last those in ``found``.
        leaves: indices of the params that func's first evaluation used.
        found: inputs that func held and had not used when it ended.
        autocast: the setting that it ran under.
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
        """The solve that began with the evaluation ``first``."""
        autocast = AutocastState(task.problem.y0.device.type)
        return cls(task, solved.record, solved.stats, autocast, len(first.params), first.leaves, first.found)

    def replay(
        self, inputs: Sequence[Tensor], cut: Callable[[Tensor], Tensor] | None = None, y0: Tensor | None = None
    ) -> Replay:
        """The replay of the solve, whose gradients are those of ``inputs``.

        ``y0`` is given where the gradients are to have a graph. It and the inputs may have been computed, and their
        history may hold leaves that are inputs too. Unless these are cut, autograd walks into the history to look for
        them, and calls the hooks there with None.
        """
        params, args = inputs[: self.n_params], inputs[self.n_params : len(inputs) - len(self.found)]
        has_history = y0 is not None and any(x.grad_fn is not None for x in (y0, *inputs))
        field, is_checked = self.task.field, self.task.params is None
        cuts_all = has_history and not holds_script(field.func)
        return Replay(field, params, args, self.autocast, cut, cuts_all, found=self.found, is_checked=is_checked)


class BackwardPass(Protocol):
    """The way back through one solve. It holds no state and no output, which are freed with autograd's graph."""

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        """The gradients of y0 and of the inputs, from the cotangent of the outputs and the saved states."""

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        """The same with a graph (``create_graph=True``); y0 is None where it does not require grad."""


def with_graph(
    ys: Tensor,
    backward: BackwardPass,
    states: Sequence[Tensor],
    y0: Tensor,
    used: Sequence[Tensor],
    found: Sequence[Tensor] = (),
) -> Tensor:
    """``ys``, the outputs, with a graph to y0 and to the inputs: those that func used, and those found besides.

    What func had not used yet may change before the backward pass, as long as it does not come to use it.
    """
    result: Tensor = _Aca.apply(backward, [(ys, states, tuple(found))], y0, *used, *found)
    return result


def check_cotangent(grad_ys: Tensor) -> None:
    """Raises ArgumentTypeError where a backward pass cannot read the gradient of the solution."""
    refuse_transforms("the gradient of the solution", grad_ys)
    check_readable("the gradient of the solution", grad_ys)


class _Aca(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: BackwardPass, boxed: list[Any], y0: Tensor, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ys, states, found = boxed.pop()
        ctx.pass_back, ctx.n_states, ctx.has_y0, ctx.found = backward, len(states), y0.requires_grad, found
        # Saved, so that they are freed with the graph, and a parameter changed in place before backward is an error.
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
        return None, None, *(g if n else None for g, n in zip(grads, needed[2:], strict=True))
