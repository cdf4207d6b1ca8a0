"""func as a graph of tensors, traced by TorchDynamo and guarded by it: what func reads is an input of the graph, and a
graph is used again only while everything that it took for constant is as it was."""

from __future__ import annotations

import itertools
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from aca_ext.engines.compiled.backend import HINT, Captured, backend, keep_guard, request
from aca_ext.engines.compiled.changing_numbers import ChangingNumbers
from aca_ext.engines.compiled.method_guards import Methods
from aca_ext.engines.compiled.side_effects import dependence_of
from aca_ext.engines.compiled.undisturbed import unchanged, undisturbed
from aca_ext.errors import CompileError
from aca_ext.problem.signature import refuse_swapped
from aca_ext.problem.state import Packing, State
from aca_ext.vector_field.function_cache import PerOwner

# Private to torch: without it, graphs are found in TorchDynamo's usual way, which takes longer.
_eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_cache_entries: Any = getattr(_eval_frame, "_debug_get_cache_entry_list", None)

_ORIGINAL = "_torchdynamo_orig_callable"


def capture(
    func: Callable[..., Any], t: Tensor, y0: Tensor, packing: Packing, args: tuple[Any, ...]
) -> tuple[Captured, list[Tensor]]:
    """The graph of func at (t, y, \\*args), y a packed state, and the tensors that it depends on besides t and y.

    Raises:
        CompileError: TorchDynamo cannot trace func as one graph.
    """
    has_graph = torch.is_grad_enabled()
    torch._C._set_grad_enabled(True)  # torch.enable_grad() takes several times as long
    try:
        return _captured(func, t, y0, packing, args)
    finally:
        torch._C._set_grad_enabled(has_graph)


def specialise(func: Callable[..., Any]) -> None:
    """From now on graphs of func hold the numbers that func reads as constants, whether or not they change."""
    _by_owner.anew(func).numbers.is_given_up = True


def scope_of(func: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """The scope that names of places in func start from; args are a list, so that one can be replaced."""
    return {"L": {"func": func, "args": list(args)}, "G": globals()}


def _captured(
    func: Callable[..., Any], t: Tensor, y0: Tensor, packing: Packing, args: tuple[Any, ...]
) -> tuple[Captured, list[Tensor]]:
    # A state that requires grad, or TorchDynamo would look through custom derivatives as if there were none.
    y: State
    if packing.is_tuple:
        parts = packing.unpack(y0.detach())
        y = parts = tuple(part.detach().requires_grad_() for part in parts)
    else:
        y = y0.detach().requires_grad_()
        parts = (y,)
    entry = _entry_of(func)
    request.captured = None
    try:
        if entry.numbers.places:
            scope = scope_of(func, args)
            with entry.numbers.as_tensors(scope):
                entry.look_up(func, t, y, tuple(scope["L"]["args"]))
        else:
            entry.look_up(func, t, y, args)
        captured = request.captured
        if captured is None:
            refuse_swapped(func)
            request.t, request.y = t, parts
            try:
                captured = _new(entry, func, t, y, args)
            finally:
                request.y, request.scope = (), {}
        if captured.refusal:
            raise CompileError(captured.refusal)
        return captured, [request.inputs[i] for i in captured.places]
    finally:
        request.captured, request.inputs = None, ()


def _new(entry: _Entry, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> Captured:
    """Traces func, with numbers that changed since the last trace as inputs if that is possible."""
    with undisturbed():
        if entry.numbers.lift_changed(scope_of(func, args)):
            try:
                return _traced(entry, func, t, y, args)
            except CompileError:
                specialise(func)
                entry = _entry_of(func)
        return _traced(entry, func, t, y, args)


def _traced(entry: _Entry, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> Captured:
    scope = request.scope = scope_of(func, args)
    with entry.numbers.as_tensors(scope):
        given = tuple(scope["L"]["args"])
        random_state = random.getstate()
        entry = _trace(entry, func, t, y, given)
        captured = request.captured
        if captured is None:
            raise CompileError(f"func computes nothing from tensors that TorchDynamo can see. {HINT}")
        _check_again(entry, captured, func, t, y, given)
    captured.lifted = bool(entry.numbers.places)
    if random.getstate() != random_state:  # some versions of TorchDynamo draw once for each call of a graph
        _by_owner.anew(func)  # or the next solve would find this graph, and draw
        raise CompileError(f"func draws numbers from Python's random, which a replay could not repeat. {HINT}")
    if any(counter.is_number for counter in captured.counters):
        inputs = request.inputs
        with unchanged(func, args):
            captured.refusal = dependence_of(captured.counters, scope_of(func, args), lambda: func(t, y, *args))
        request.inputs = inputs
    return captured


def _check_again(
    entry: _Entry, captured: Captured, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]
) -> None:
    """Raises where the graph just made does not serve a second time, so that every solve would compile."""
    inputs, request.captured = request.inputs, None
    entry.look_up(func, t, y, args)
    if entry.kept is not None and request.captured is not captured:
        raise CompileError(
            "func changes a Python value that it depends on, such as a counter of its evaluations, so that no graph of "
            f"it would hold twice. {HINT}"
        )
    request.inputs = inputs


def _trace(
    entry: _Entry, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...], is_fresh: bool = False
) -> _Entry:
    try:
        with torch._dynamo.config.patch(_settings()):
            request.begin_trace()
            entry.trace(func, t, y, args)
        entry.keep()
        entry.methods.add(func, request.code)
        counters = {counter.place.name for counter in request.counters}
        entry.numbers.known.update((k, v) for k, v in request.numbers.items() if k not in counters)
        return entry
    except Exception as error:
        if type(error).__name__ in _TOO_MANY and not is_fresh:
            # As many graphs as are kept: begin anew.
            other = _by_owner.anew(func)
            other.numbers = entry.numbers
            return _trace(other, func, t, y, args, is_fresh=True)
        cause = getattr(error, "inner_exception", error)  # of what the backend raised
        if isinstance(cause, CompileError):
            raise cause from None
        reason = str(error).strip().split("\n\nfrom user code")[0]
        raise CompileError(f"func cannot be traced as one graph. {HINT} TorchDynamo says: {reason}") from error


_TOO_MANY = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")  # the name depends on torch's version


def _settings() -> dict[str, Any]:
    """Guard hooks too, spare each call of a graph work for profilers, and trace gradients in func.

    What func changes in Python is not to be changed by looking a graph up.
    """
    settings = {
        "skip_nnmodule_hook_guards": False,
        "record_runtime_overhead": False,
        "trace_autograd_ops": True,
        "replay_side_effects": False,
        "side_effect_replay_policy": "silent",
    }
    return {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}


def _call(func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> list[Tensor]:
    k = func(t, y, *args)
    # Clones, so that each component is a result of the graph, in order; detached for TorchDynamo's sake alone, which
    # refuses results that depend on intermediates made to require grad: the backend takes that out of the graph.
    return [part.detach().clone() for part in (k if isinstance(k, (tuple, list)) else (k,))]


_numbers = itertools.count()


@dataclass(frozen=True)
class _Kept:
    """A graph as TorchDynamo keeps it.

    Attributes:
        manager: of its guards; TorchDynamo takes its ``cache_entry`` away when it gives the graph up.
        holds: whether the guards hold, given the arguments of ``_call`` by name.
        find: called with these arguments, gathers the inputs of the graph and calls it.
    """

    manager: Any
    holds: Callable[[dict[str, Any]], bool]
    find: Callable[..., Any]


class _Entry:
    """The graphs of one owner. TorchDynamo keeps them with a code object: each entry has one of its own."""

    def __init__(self) -> None:
        code = _call.__code__.replace(co_name=f"_call_{next(_numbers)}")  # equal to no other
        self._call = types.FunctionType(code, globals(), "_call")
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [keep_guard(guard) for guard in guards]}
        self.trace = torch.compile(self._call, backend=backend, fullgraph=True, dynamic=False, options=options)
        self.kept: list[_Kept] | None = []  # None: not to be had from this torch
        self.methods = Methods()
        self.numbers = ChangingNumbers()

    def look_up(self, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> None:
        """Does as ``trace`` if there is a graph whose guards hold, at a fifth of its overhead, else nothing."""
        if self.kept:
            values = {"func": func, "t": t, "y": y, "args": args}
            for graph in self.kept:
                if graph.manager.cache_entry is not None and graph.holds(values):
                    graph.find(func, t, y, args)
                    return

    def keep(self) -> None:
        """Notes which graphs there are, after ``trace`` made another."""
        try:
            self.kept = [self._kept(entry) for entry in _cache_entries(self._call.__code__)]
        except (AttributeError, StopIteration, TypeError, ValueError):
            self.kept = None

    def _kept(self, entry: Any) -> _Kept:
        scope, manager = self._call.__globals__, entry.guard_manager
        if manager.cache_entry is None:
            raise ValueError("there is no telling when TorchDynamo gives this graph up")
        # The code calls the graph by a name of its own; here without the wrapper that keeps TorchDynamo out of it.
        name = next(name for name in entry.code.co_names if getattr(scope.get(name), _ORIGINAL, None) is not None)
        find = types.FunctionType(entry.code, {**scope, name: getattr(scope[name], _ORIGINAL)})
        return _Kept(manager, manager.root.check, find)


_by_owner = PerOwner(_Entry)


def _entry_of(func: Any) -> _Entry:
    entry = _by_owner.of(func)
    return entry if entry.methods.are_unchanged() else _by_owner.anew(func)
