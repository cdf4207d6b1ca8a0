"""Tracing of func by TorchDynamo to a graph of tensor operations, and lookup of graphs traced before.

Tensors that func reads are inputs of the traced graph. Other values are constants of it: TorchDynamo's guards let a
graph be used only as long as these are unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from aca_ext.engines.compiled.backend import HINT, Captured, TraceError, request
from aca_ext.engines.compiled.side_effects import dependence_of
from aca_ext.engines.compiled.trace_table import TraceTable, scope_of, specialise, table_of, tables
from aca_ext.engines.compiled.undisturbed import unchanged, undisturbed
from aca_ext.errors import CompileError
from aca_ext.problem.signature import refuse_swapped
from aca_ext.problem.state import Packing, State
from aca_ext.problem.trees import leaves_of, like
from aca_ext.vector_field.function_cache import PerOwner


def capture(
    func: Callable[..., Any], t: Tensor, y0: Tensor, packing: Packing, args: tuple[Any, ...]
) -> tuple[Captured, list[Tensor]]:
    """The traced graph of func(t, y, \\*args) for a packed state, and the tensors it depends on besides t and y.

    Raises:
        TraceError: TorchDynamo cannot trace func as one graph, or func has side effects.
    """
    has_graph = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)  # torch.enable_grad() takes several times as long
    try:
        captured, used = _captured(func, t, y0, packing, args)
        if captured.lifted and not _holds_for_numbers(captured, used, func, t, _state(packing, y0)[0], args):
            specialise(func)
            return _captured(func, t, y0, packing, args)
        return captured, used
    except TraceError:
        raise
    except CompileError as error:
        raise TraceError(str(error)) from error.__cause__
    finally:
        torch._C._set_grad_enabled(has_graph)


def _holds_for_numbers(
    captured: Captured, used: Sequence[Tensor], func: Callable[..., Any], t: Tensor, y: State, args: tuple[Any, ...]
) -> bool:
    numbers, scope = tables.of(func).numbers, scope_of(func, args)
    if numbers.were_compared(captured, scope):
        return True
    with undisturbed(), unchanged(func, args):
        return numbers.compare(captured, scope, used, t, y, lambda: func(t, y, *args))


def _captured(
    func: Callable[..., Any], t: Tensor, y0: Tensor, packing: Packing, args: tuple[Any, ...]
) -> tuple[Captured, list[Tensor]]:
    y, parts = _state(packing, y0)
    table = table_of(func)
    request.captured = None
    try:
        if table.numbers.places:
            scope = scope_of(func, args)
            with table.numbers.as_tensors(scope):
                table.look_up(func, t, y, tuple(scope["L"]["args"]))
        else:
            table.look_up(func, t, y, args)
        captured = request.captured
        if captured is None:
            refuse_swapped(func)
            failures = _failures.of(innermost(func))
            failures.check()
            request.t, request.y = t, parts
            try:
                captured = _new(table, func, t, y, args)
                failures.end()
            except CompileError as error:
                failures.add(str(error))
                raise
            finally:
                request.y, request.scope = (), {}
        if captured.refusal:
            raise CompileError(captured.refusal)
        return captured, [request.inputs[i] for i in captured.places]
    finally:
        request.captured, request.inputs = None, ()


def _state(packing: Packing, y0: Tensor) -> tuple[State, Sequence[Tensor]]:
    """The state as func receives it, and its components; they require grad, or TorchDynamo ignores custom gradients."""
    if packing.is_trivial:
        y = y0.detach().requires_grad_()
        return y, (y,)
    given = packing.unpack(y0.detach())
    parts = [part.detach().requires_grad_() for part in leaves_of(given)]
    return like(given, parts), parts


def _new(table: TraceTable, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> Captured:
    """Traces func; numbers that changed since the last trace become inputs if func works with tensors there."""
    with undisturbed():
        if table.numbers.lift_changed(scope_of(func, args)):
            try:
                return _traced(table, func, t, y, args)
            except CompileError:
                specialise(func)
                table = table_of(func)
        return _traced(table, func, t, y, args)


def _traced(table: TraceTable, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> Captured:
    scope = request.scope = scope_of(func, args)
    with table.numbers.as_tensors(scope):
        given = tuple(scope["L"]["args"])
        random_state = random.getstate()
        table = _trace(table, func, t, y, given)
        captured = request.captured
        if captured is None:
            raise CompileError(f"TorchDynamo sees no tensor operation in func. {HINT}")
        _check_again(table, captured, func, t, y, given)
    captured.lifted = bool(table.numbers.places)
    if random.getstate() != random_state:  # some versions of TorchDynamo draw once per call of a graph
        tables.anew(func)  # drops this graph, or the next solve would find it and draw
        raise CompileError(f"func draws numbers from Python's random, which a replay cannot repeat. {HINT}")
    if any(counter.is_number for counter in captured.counters):
        inputs = request.inputs
        with unchanged(func, args):
            captured.refusal = dependence_of(captured.counters, scope_of(func, args), lambda: func(t, y, *args))
        request.inputs = inputs
    return captured


def _check_again(
    table: TraceTable, captured: Captured, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]
) -> None:
    """Raises if the guards of the new graph already fail, in which case every solve would compile."""
    inputs, request.captured = request.inputs, None
    table.look_up(func, t, y, args)
    if table.kept is not None and request.captured is not captured:
        raise CompileError(
            "func changes a Python value that it depends on, such as a counter of its evaluations, so that every solve "
            f"would compile it again. {HINT}"
        )
    request.inputs = inputs


def _trace(
    table: TraceTable, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...], is_fresh: bool = False
) -> TraceTable:
    try:
        with torch._dynamo.config.patch(_settings()):
            request.begin_trace()
            table.trace(func, t, y, args)
        table.keep()
        table.methods.add(func, request.code)
        counters = {counter.place.name for counter in request.counters}
        table.numbers.known.update((k, v) for k, v in request.numbers.items() if k not in counters)
        return table
    except Exception as error:
        if type(error).__name__ in _TOO_MANY and not is_fresh:
            # TorchDynamo keeps no further graph for this table, so start a new one.
            other = tables.anew(func)
            other.numbers = table.numbers
            return _trace(other, func, t, y, args, is_fresh=True)
        cause = getattr(error, "inner_exception", error)  # the error that the backend raised
        if isinstance(cause, CompileError):
            raise cause from None
        reason = str(error).strip().split("\n\nfrom user code")[0]
        raise CompileError(f"func cannot be traced as one graph. {HINT} TorchDynamo reports: {reason}") from error


_TOO_MANY = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")  # the name depends on torch's version


def _settings() -> dict[str, Any]:
    """Settings of TorchDynamo: guards on hooks, no work for profilers in each call, and gradients inside func.

    A lookup calls the graph, so it must not replay the side effects of func.
    """
    settings = {
        "skip_nnmodule_hook_guards": False,
        "record_runtime_overhead": False,
        "trace_autograd_ops": True,
        "replay_side_effects": False,
        "side_effect_replay_policy": "silent",
    }
    return {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}


class _Failures:
    """Failed traces of an owner's funcs. After n of them, the next 2ⁿ - 1 solves do not try again.

    func may become traceable, by a flag or an argument, but a trace in every solve would cost more than it can save.
    """

    def __init__(self) -> None:
        self._count, self._left, self._message = 0, 0, ""

    def check(self) -> None:
        """Raises TraceError if there should be no trace now."""
        if self._left > 0:
            self._left -= 1
            raise TraceError(self._message)

    def add(self, message: str) -> None:
        self._count += 1
        self._left, self._message = 2 ** min(self._count, 20) - 1, message

    def end(self) -> None:
        self._count = self._left = 0


_failures = PerOwner(_Failures)


def innermost(func: Any) -> Any:
    """The callable inside partials and the like, whose owner would be a class that many share."""
    while not isinstance(func, torch.nn.Module) and callable(getattr(func, "func", None)):
        func = func.func
    return func
