"""Comparison of compiled evaluations with func itself, before their first use: values, gradients, and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.base import Request
from aca_ext.engines.compiled.compiled_graph import CompiledGraph, UnsuitableError
from aca_ext.engines.compiled.undisturbed import unchanged
from aca_ext.engines.compiled.verification import Point, check_close, inputs_by_kind, sums_by_input
from aca_ext.errors import CompileError
from aca_ext.gradients.base import Task
from aca_ext.vector_field.field import AutocastState
from aca_ext.vector_field.replay import Replay

_ROUNDS, _SECONDS = 5, 0.3  # of timing
_LAST_BITS = 4.0  # largest difference, in units of the last bit, between the two compiled functions of a graph


class NotComparedError(CompileError):
    """A start at which compiled code cannot be compared with func; another solve may have another one."""


def check(request: Request, evaluation: Callable[..., Any], compiled: CompiledGraph, inputs: Sequence[Tensor]) -> bool:
    """Compares what the solve needs and was not compared before; tells if there was anything.

    Raises:
        CompileError: a result differs from that of func, or func itself is faster.
    """
    needs_gradients = torch.is_grad_enabled()
    is_new = False
    for with_gradients in (False, True) if needs_gradients else (False,):
        if not compiled.is_checked[with_gradients]:
            is_new = True
            try:
                with unchanged(request.problem.func, request.problem.args):
                    _Comparison(request, evaluation, compiled, inputs).run(with_gradients)
            except CompileError:
                raise
            except Exception as error:  # perhaps of func, which then raises it again when it runs uncompiled
                raise CompileError(f"an evaluation failed: {type(error).__name__}: {error}") from error
            compiled.is_checked[with_gradients] = True
    of_compiled, of_func = (sum(seconds) for seconds in zip(*compiled.seconds.values(), strict=True))
    if needs_gradients or len(compiled.seconds) == 1:
        _refuse_slower(of_compiled, of_func)
    return is_new


def _refuse_slower(of_compiled: float, of_func: float) -> None:
    if not is_worthwhile(of_compiled, of_func):
        raise UnsuitableError(
            f"compiled code is not faster: they take {of_compiled * 1e6:.0f} µs and those of func "
            f"{of_func * 1e6:.0f} µs, as measured before the first solve"
        )


def is_worthwhile(of_compiled: float, of_func: float) -> bool:
    """Tells whether compiled code is worth using, from the times of an evaluation."""
    return of_compiled < of_func


class _Comparison:
    """Compiled evaluations beside those of func."""

    def __init__(
        self, request: Request, evaluation: Callable[..., Any], compiled: CompiledGraph, inputs: Sequence[Tensor]
    ) -> None:
        self._problem, self._compiled, self._inputs = request.problem, compiled, inputs
        request.task().field.prepare_replay()  # refuses distributed modules
        self._of_func = request.task()
        self._of_func.field.calls_autograd = compiled.records_always
        same = replace(request.problem, func=evaluation, args=tuple(inputs))
        self._of_compiled = request._replace(problem=same).task()
        self._autocast = AutocastState("cpu")
        floating = (x.dtype for x in inputs if x.is_floating_point() and x.dtype.itemsize > 1)
        dtypes = {request.problem.y0.dtype, self._autocast.dtype or request.problem.y0.dtype, *floating}
        self._dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def run(self, with_gradients: bool) -> None:
        """Compares values, or values and gradients, and measures their times."""
        points = list(self._points())
        if not points:
            raise NotComparedError("func is not finite at its start, so that compiled evaluations cannot be compared")
        what, evaluate = ("gradient", self._gradients) if with_gradients else ("slope", self._values)
        for t, point in points:
            expected, found = evaluate(self._of_func, t, point), evaluate(self._of_compiled, t, point)
            check_close(what, expected, found, point, partial(evaluate, self._of_func, t), self._dtype)
            if with_gradients:
                self._compare_functions(t, point, found[0])
        t, point = points[0]
        self._compiled.seconds[with_gradients] = self._times(evaluate, t, point)

    def _points(self) -> Iterator[tuple[Tensor, Point]]:
        """The start, and a state and a time at a distance from it, if func is finite there."""
        problem, y0 = self._problem, self._problem.y0.detach()
        random = torch.Generator(device="cpu").manual_seed(0)
        size = float(y0.double().square().mean().sqrt()) or 1.0
        noise = torch.empty_like(y0).copy_(torch.randn(y0.shape, generator=random, dtype=torch.float64, device="cpu"))
        for distance in (0.0, 0.1):
            t = problem.start_time(y0) + distance * (problem.times[-1] - problem.times[0])
            point = Point([], y0 + distance * size * noise, 0.0)
            try:
                (k,) = self._values(self._of_func, t, point)
            except Exception:
                if distance == 0:
                    raise
                continue  # func may be undefined at other states
            if torch.isfinite(k).all():
                yield t, point

    def _values(self, task: Task, t: Tensor, point: Point) -> list[Tensor]:
        with torch.no_grad():
            return [task.field(t, point.y.detach())]

    def _gradients(self, task: Task, t: Tensor, point: Point) -> list[Tensor]:
        """The slope, and its derivatives with respect to the state and the inputs, times a random cotangent."""
        of_params, of_args = inputs_by_kind(task.field.args, self._inputs)
        replay = Replay(task.field, [self._inputs[i] for i in of_params], [x for x, _ in of_args], self._autocast)
        y = point.y.detach().requires_grad_()
        g = torch.randn(y.shape, generator=torch.Generator(device="cpu").manual_seed(1), dtype=torch.float64)
        with replay.repeating():
            k = replay(t, y)
            pulled = replay.pull_back(y, k, torch.empty_like(y).copy_(g)) if k.requires_grad else None
        of_inputs = sums_by_input(of_params, of_args, replay.grads)
        wanted = [(x, of_inputs.get(i)) for i, x in enumerate(self._inputs) if x.requires_grad]
        found = [(y, pulled), *wanted]
        return [k.detach(), *(torch.zeros_like(x).detach() if grad is None else grad.detach() for x, grad in found)]

    def _compare_functions(self, t: Tensor, point: Point, recorded: Tensor) -> None:
        """Takes values from the function that records a graph, too, if a replay would differ from the other one."""
        (k,) = self._values(self._of_compiled, t, point)
        difference, largest = (float(x.abs().max()) for x in (k - recorded, recorded))
        if difference > _LAST_BITS * torch.finfo(k.dtype).eps * largest:
            self._compiled.records_always = True

    def _times(self, evaluate: Callable[..., Any], t: Tensor, point: Point) -> tuple[float, float]:
        """The least times of an evaluation by compiled code and by func, measured in turns."""
        least = [math.inf, math.inf]
        start = time.perf_counter()
        for _ in range(_ROUNDS):
            for i, task in enumerate((self._of_compiled, self._of_func)):
                before = time.perf_counter()
                evaluate(task, t, point)
                least[i] = min(least[i], time.perf_counter() - before)
            if time.perf_counter() - start > _SECONDS:
                break
        return least[0], least[1]
