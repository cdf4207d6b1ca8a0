"""engine="compiled" for solves that no program can hold: compiled evaluations of func in the loop of the eager engine.

The eager engine solves with ``Evaluation`` in place of func: a function of time, state and the tensors that func reads,
which become its args. So steps, gradient methods, checkpoints, events and batches are those of the eager engine. What
cannot be compiled, or is not faster for it, is solved with func itself, and ``stats.reason`` tells why.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.base import Request
from aca_ext.engines.compiled.backend import Captured, UnusableFuncError
from aca_ext.engines.compiled.compiled_graph import CompiledGraph, UnsuitableError, changes_or_draws
from aca_ext.engines.compiled.graph_check import NotComparedError, check
from aca_ext.engines.compiled.inputs import addresses_of
from aca_ext.engines.compiled.side_effects import Counting
from aca_ext.engines.compiled.trace_table import scope_of, specialise
from aca_ext.engines.compiled.tracing import capture, innermost
from aca_ext.engines.compiled.uncompiled import shortened, solve_uncompiled
from aca_ext.engines.eager import EagerEngine
from aca_ext.errors import CompileError, ReplayError
from aca_ext.gradients.base import Result
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Problem
from aca_ext.problem.trees import leaves_of, like
from aca_ext.progress import Callback, Step
from aca_ext.vector_field.environment import overwritten_message
from aca_ext.vector_field.function_cache import PerOwner

_MAX_GRAPHS = 8  # compiled for one func; a func that needs more would be compiled in every solve
_EAGER = EagerEngine()


def solve(request: Request, reason: str) -> Result:
    """Solves by compiled evaluations, or by func itself; ``reason`` tells why no program holds the whole solve.

    Raises:
        UnusableFuncError: the memory of a tensor that func reads was freed.
    """
    start = time.perf_counter()
    try:
        evaluation, inputs, is_new = _evaluation(request)
    except UnusableFuncError:
        raise
    except CompileError as error:
        seconds = time.perf_counter() - start
        result = solve_uncompiled(request, f"{reason} And evaluations of func are not compiled: {shortened(error)}")
        result.stats.compile_seconds += seconds
        return result
    seconds = time.perf_counter() - start if is_new else 0.0
    problem = replace(request.problem, func=evaluation, args=inputs)
    callback = None if request.callback is None else _Watched(request.callback, request.problem, evaluation)
    result = _EAGER.solve(request._replace(problem=problem, params=(), callback=callback))
    result.stats.compiled, result.stats.reason = "evaluations", reason
    result.stats.compile_seconds += seconds
    return result


class _Count:
    graphs = 0


_counts = PerOwner(_Count)


def _evaluation(request: Request) -> tuple[Evaluation, tuple[Tensor, ...], bool]:
    """The evaluation, its inputs, and True if something was compiled for it.

    Raises:
        CompileError: func cannot be compiled, draws random numbers, changes what it reads, or is faster itself.
    """
    problem = request.problem
    captured, used = _captured(problem)
    addresses_of([x for x in used if x.layout is torch.strided])  # raises if memory was freed
    refusal = captured.obstacles.get("evaluations")
    if refusal is not None:
        raise CompileError(refusal)
    compiled: CompiledGraph | None = captured.plans.get("evaluations")
    try:
        if compiled is None:
            compiled = captured.plans["evaluations"] = _new(captured, used, problem)
        evaluation = Evaluation(captured, compiled, used, request.gradient in ("aca", "adjoint"))
        evaluation.may_differentiate_once = request.learnt is None  # those of times are in a graph
        is_new = check(request, evaluation, compiled, used)
    except NotComparedError:
        raise
    except CompileError as error:
        if captured.lifted and not isinstance(error, UnsuitableError):
            specialise(problem.func)  # func may need its numbers as numbers
            return _evaluation(request)
        captured.obstacles["evaluations"] = str(error)
        raise
    if captured.counters:
        evaluation.count_in(Counting(captured.counters, scope_of(problem.func, problem.args)))
    return evaluation, _with_gradient(request, used), is_new


def _new(captured: Captured, used: Sequence[Tensor], problem: Problem) -> CompiledGraph:
    count = _counts.of(innermost(problem.func))
    if count.graphs >= _MAX_GRAPHS:
        raise UnsuitableError(f"func was compiled {_MAX_GRAPHS} times, for shapes, flags or numbers that changed")
    obstacle = changes_or_draws(captured, _time(problem), leaves_of(problem.packing.unpack(problem.y0.detach())), used)
    if obstacle:
        raise UnsuitableError(obstacle)
    count.graphs += 1
    return CompiledGraph(captured)


def _captured(problem: Problem) -> tuple[Captured, list[Tensor]]:
    return capture(problem.func, _time(problem).requires_grad_(), problem.y0, problem.packing, problem.args)


def _time(problem: Problem) -> Tensor:
    t = problem.start_time(problem.y0)
    return t.view(problem.packing.time_shape) if isinstance(problem, BatchProblem) else t


def _with_gradient(request: Request, used: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs, of which only those that the user named receive a gradient, if there are any named."""
    if request.params is None:
        return tuple(used)
    named = {id(x) for x in (*request.params, *request.problem.args)}
    return tuple(x if id(x) in named else x.detach() for x in used)


class Evaluation:
    """func(t, y, \\*inputs) in compiled code, for one solve; ``inputs`` are all tensors that func reads.

    Args:
        is_replayed: the solve keeps no autograd graph of its evaluations, or only of its backward pass.

    Attributes:
        may_differentiate_once: no evaluation of a replayed solve is in a graph outside of its backward pass.
    """

    __slots__ = ("_captured", "_compiled", "_counting", "_is_replayed", "_used", "_versions", "may_differentiate_once")

    def __init__(self, captured: Captured, compiled: CompiledGraph, used: Sequence[Tensor], is_replayed: bool) -> None:
        self._captured, self._compiled, self._used, self._is_replayed = captured, compiled, used, is_replayed
        self._counting: Counting | None = None
        self.may_differentiate_once = True
        counters = {counter.place.name for counter in captured.counters}
        self._versions = [
            (i, x._version)
            for i, (name, x) in enumerate(zip(captured.names, used, strict=True))
            if name not in counters and not x.requires_grad and not x.is_inference()
        ]

    def count_in(self, counting: Counting) -> None:
        """From now on evaluations count in func's counters."""
        self._counting = counting

    def check_func(self, problem: Problem) -> None:
        """Raises CompileError if func would be traced to another graph now, or reads other tensors."""
        captured, used = _captured(problem)
        counters = self._counting.names if self._counting is not None else ()
        is_same = captured is self._captured and all(
            one is other or name in counters or (captured.lifted and one.dim() == 0 and torch.equal(one, other))
            for name, one, other in zip(captured.names, used, self._used, strict=True)
        )
        if not is_same:
            raise CompileError(
                "the callback changed an attribute, a number or a tensor that func reads, but the evaluations of a "
                'solve were compiled with those of its start. Use engine="eager", or change it between solves.'
            )

    def __call__(self, t: Tensor, y: Any, *inputs: Tensor) -> Any:
        if self._counting is not None:
            self._counting.count(1)
        has_graph = torch.is_grad_enabled()
        if has_graph and self._is_replayed:
            self._check_versions(inputs)
        with torch._C.DisableTorchFunction():  # what the eager engine looks for, it is given as inputs
            parts = leaves_of(y)
            if has_graph and any(x.requires_grad for x in (t, *parts, *inputs)):
                k = self._recorded(t, parts, inputs)
            else:
                k = self._compiled.values(t, parts, inputs)
        return k[0] if isinstance(y, Tensor) else like(y, k)

    def _recorded(self, t: Tensor, y: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._is_replayed and self.may_differentiate_once and not _belong_to_graph(y, inputs):
            return self._compiled.with_graph(t, y, inputs)
        found: Sequence[Tensor] = _Twice.apply(self._compiled, len(y), t, *y, *inputs)
        return found

    def _check_versions(self, inputs: Sequence[Tensor]) -> None:
        for i, version in self._versions:
            if inputs[i]._version != version:
                raise ReplayError(overwritten_message(inputs[i]))


def _belong_to_graph(y: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Tells whether a replay repeats a solve in one graph (create_graph=True): its inputs, or else its state, have one.

    Otherwise only first derivatives can be asked for.
    """
    learnt = [x for x in inputs if x.requires_grad]
    # The components of a state are views of it.
    return any(x.grad_fn is not None for x in learnt or (x if x._base is None else x._base for x in y))


class _Watched:
    """The user's callback; it must not change func, whose evaluations are those of the start of the solve."""

    def __init__(self, callback: Callback, problem: Problem, evaluation: Evaluation) -> None:
        self._callback, self._problem, self._evaluation = callback, problem, evaluation

    def __call__(self, step: Step) -> object:
        stops = self._callback(step)
        self._evaluation.check_func(self._problem)
        return stops


class _Twice(torch.autograd.Function):
    """An evaluation with derivatives of any order; compiled code has the first, the traced graph the others."""

    @staticmethod
    def forward(ctx: Any, compiled: CompiledGraph, n_y: int, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in operands]
        ctx.k = compiled.with_graph(*_split(leaves, n_y))
        ctx.compiled, ctx.n_y, ctx.leaves = compiled, n_y, leaves
        ctx.save_for_backward(*operands)
        return tuple(k.detach() for k in ctx.k)  # ctx.k can be differentiated once

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = ctx.leaves
        saved = ctx.saved_tensors  # raises if one was changed in place
        if torch.is_grad_enabled():
            operands = [x.view_as(x) for x in saved]  # views, so that no gradient flows into the history of an operand
            k = ctx.compiled.uncompiled(*_split(operands, ctx.n_y))
        else:
            k, ctx.k = ctx.k or ctx.compiled.with_graph(*_split(operands, ctx.n_y)), None
        given = [(x, g) for x, g in zip(k, grads, strict=True) if g is not None and x.requires_grad]
        wanted = [i for i, x in enumerate(operands) if x.requires_grad]
        found: list[Tensor | None] = [None] * len(operands)
        if given and wanted:
            slopes, cotangents = zip(*given, strict=True)
            of = torch.autograd.grad(
                slopes, [operands[i] for i in wanted], cotangents, allow_unused=True,
                create_graph=torch.is_grad_enabled(),
            )  # fmt: skip
            for i, g in zip(wanted, of, strict=True):
                found[i] = g
        return None, None, *found


def _split(operands: Sequence[Tensor], n_y: int) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    return operands[0], operands[1 : 1 + n_y], operands[1 + n_y :]
