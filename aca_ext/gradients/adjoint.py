"""The continuous adjoint (Chen et al., NeurIPS 2018): solves a second ODE backward in time, from the outputs alone.

It needs the least memory and is not exact. The states of the backward solve differ from those of the forward solve, so
the gradient is accurate to the tolerances of both solves at best. It is here as the baseline of the ACA paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, SolveError
from aca_ext.gradients.aca import solve_without_graph
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.dependencies import FirstEvaluation
from aca_ext.gradients.passes import check_cotangent
from aca_ext.kernels.fused import operations_for
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.problem import Problem
from aca_ext.problem.state import Packing, tensors_in
from aca_ext.problem.validation import problem_of
from aca_ext.progress import Callback
from aca_ext.solver.loop import Solver
from aca_ext.vector_field.field import AutocastState, VectorField
from aca_ext.vector_field.replay import Replay


def solve(task: Task, forward: Callable[[Task, Tensor | None], Result] = solve_without_graph) -> Result:
    """The solve by ``forward``, which takes the first slope too, with the graph of the backward solve."""
    first = FirstEvaluation(task)
    with first.watch():
        solved = forward(task, first.k)
    first.settle()
    params = [*first.params, *first.found]
    args = [arg for arg in task.field.args if isinstance(arg, Tensor) and arg.requires_grad]
    ys = _Adjoint.apply(task, len(params), [solved], task.problem.y0, *params, *args)
    return Result(ys, solved.record, solved.stats)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: Task, n_params: int, boxed: list[Result], y0: Tensor, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        solved = boxed.pop()
        ctx.task, ctx.n_params, ctx.stats = task, n_params, solved.stats
        ctx.autocast = AutocastState(y0.device.type)
        ctx.save_for_backward(solved.ys, *inputs)
        return solved.ys

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor | None) -> tuple[Any, ...]:
        if grad_ys is None:
            return (None,) * len(ctx.needs_input_grad)
        check_cotangent(grad_ys)
        ys, *inputs = ctx.saved_tensors
        task: Task = ctx.task
        times = task.problem.times
        args, is_checked = inputs[ctx.n_params :], task.params is None
        replay = Replay(task.field, inputs[: ctx.n_params], args, ctx.autocast, is_checked=is_checked)
        a = grad_ys[-1]
        grads = ys.new_zeros(sum(_flat(x.detach()).numel() for x in inputs))
        with torch.no_grad(), replay.repeating():
            for i in range(len(times) - 1, 0, -1):
                a, grads = _interval(task, replay, (times[i], times[i - 1]), ys[i], a, grads)
                a = a + grad_ys[i - 1].detach()
        ctx.stats.n_f_evals_backward = replay.n_evals
        found = (a, *_unflatten(grads, inputs))
        if torch.is_grad_enabled():
            found = tuple(_FirstDerivative.apply(g, grad_ys, ys, *inputs) for g in found)
        return None, None, None, *found


class _FirstDerivative(torch.autograd.Function):
    """A gradient that raises when differentiated; otherwise second derivatives would silently lack a term."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *origins: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:  # autograd passes through here for the gradients of other tensors
            return (None,) * len(ctx.needs_input_grad)
        raise ArgumentValueError(
            'gradient is "adjoint", which has no second derivatives. Use "aca", "direct" or "naive" for them.'
        )


def _interval(
    task: Task, replay: Replay, times: tuple[float, float], y: Tensor, a: Tensor, grads: Tensor
) -> tuple[Tensor, Tensor]:
    """Solves the adjoint ODE from one output back to the one before it."""
    forward_ops = operations_for(task.problem.y0.detach(), task.problem.tolerance)

    def augmented(t: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        y_t, a_t, _ = state
        replay.begin_step(None)
        is_linearised = torch.is_grad_enabled() and y_t.requires_grad  # by an implicit method, for its Jacobian
        with torch.enable_grad():
            leaf = forward_ops.admit(y_t if is_linearised else y_t.detach().requires_grad_())
            k = replay(t, leaf)
            wanted = (leaf, *replay.inputs)
            found: Sequence[Tensor | None] = (None,) * len(wanted)
            if k.requires_grad:
                if not is_linearised:
                    replay.check(k, leaf)
                found = replay.gradients(k, wanted, -a_t, create_graph=is_linearised)
        minus_a_fy, *rest = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
        flat = torch.cat([_flat(g).to(y_t.dtype) for g in rest]) if rest else y_t.new_zeros(0)
        return k if is_linearised else k.detach(), minus_a_fy, flat

    def parts_of(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _parts_of(state, task.problem.packing, replay.inputs)

    how = task.adjoint
    options: dict[str, Any] = dict(how.options)
    on_step: Callback | None = options.pop("callback", None)
    if options.get("norm") == "seminorm":  # an error norm without the parameters' gradients (Kidger et al., 2021)
        options["norm"] = lambda state: max(part.square().mean().sqrt() for part in state[:2])
    elif callable(options.get("norm")):
        options["norm"] = partial(_norm_of_parts, options["norm"], parts_of)
    y0 = (y.contiguous(), a.contiguous(), grads)
    problem = problem_of(
        ProblemArguments(augmented, y0, times, rtol=how.rtol, atol=how.atol, method=how.method, options=options)
    )
    if on_step is not None:
        problem = replace(problem, on_step=lambda step: on_step(step._replace(y=parts_of(step.y))))
    solve_backward = how.solve or _last_output
    try:
        with torch.no_grad():
            end = solve_backward(problem)
    except SolveError as error:
        what = str(error) if torch.isfinite(a).all() else "the gradient of the solution holds NaN or infinity."
        error.args = (f'In the backward solve of gradient="adjoint" ("aca" needs none): {what}',)
        raise
    _, a_end, grads_end = problem.packing.unpack(end)
    return a_end, grads_end


def _last_output(problem: Problem) -> Tensor:
    """The state at the end of a solve without a graph."""
    ops = operations_for(problem.y0, problem.tolerance)
    field = VectorField(problem.func, (), problem.packing, ops)
    start = problem.y0.detach()
    k0 = field.first(problem.start_time(start), start, None)
    return Solver(problem, field, ops, k0=k0).run(start)[-1]


def _norm_of_parts(norm: Callable[[Any], Any], parts_of: Callable[[Any], Any], state: tuple[Tensor, ...]) -> Any:
    return norm(parts_of(state))


def _parts_of(state: tuple[Tensor, ...], packing: Packing, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The augmented state as torchdiffeq has it: (t, \\*y, \\*a, \\*gradients). The part of t is zero here."""
    y, a, flat = state
    parts = [part for x in (y, a) for part in tensors_in(packing.unpack(x))]
    return y.new_zeros(()), *parts, *_unflatten(flat, inputs)


def _flat(x: Tensor) -> Tensor:
    x = x.to_dense()  # such as the gradient of an embedding with sparse=True; others stay as they are
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([_flat(x.detach()).numel() for x in like])
    result: list[Tensor] = []
    for part, x in zip(parts, like, strict=True):
        if x.is_complex():
            # A copy: view_as_complex needs an even storage offset, and a part may begin at an odd one.
            part = torch.view_as_complex(part.to(x.real.dtype, copy=True).view(*x.shape, 2))
        part = part.to(x.dtype).view(x.shape)
        result.append(part if x.layout is torch.strided else part.to_sparse(layout=x.layout))
    return result
