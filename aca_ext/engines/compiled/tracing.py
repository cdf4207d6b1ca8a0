"""func as a graph of tensors, traced by TorchDynamo and guarded by it: what func reads is an input of the graph, and a
graph is used again only while everything that it took for constant is as it was."""

from __future__ import annotations

import itertools
import threading
import types
import warnings
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx

from aca_ext.engines.compiled.method_guards import Methods, code_in_trace
from aca_ext.errors import CompileError
from aca_ext.problem.signature import refuse_swapped
from aca_ext.problem.state import Packing, State
from aca_ext.vector_field.function_cache import PerOwner

# Private to torch: without it, graphs are found in TorchDynamo's usual way, which takes longer.
_eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_cache_entries: Any = getattr(_eval_frame, "_debug_get_cache_entry_list", None)

_ORIGINAL = "_torchdynamo_orig_callable"

_HINT = 'Use engine="eager", or change func.'


@dataclass(eq=False)
class Captured:
    """A graph of func.

    Attributes:
        graph: called with its inputs, returns the components of the slope.
        roles: of each input: "t", ("y", i) for component i of the state, or ("input", i).
        inputs: what each input i that is neither time nor state looked like: copies, for tracing.
        places: of the inputs that are neither time nor state, among all of them.
        wants_gradient: whether input i requires grad.
        plans: what was compiled from it, by layout and method.
        solves: what solves of a kind share, by their settings.
    """

    graph: fx.GraphModule
    roles: tuple[tuple[str, int], ...] = ()
    inputs: tuple[Tensor, ...] = ()
    places: tuple[int, ...] = ()
    wants_gradient: tuple[bool, ...] = ()
    plans: dict[Any, Any] = field(default_factory=dict)
    solves: dict[Any, Any] = field(default_factory=dict)


class _Request(threading.local):
    """What is being asked for, and what the graph was called with."""

    t: Tensor
    y: Sequence[Tensor]
    captured: Captured | None = None
    inputs: tuple[Tensor, ...] = ()
    code: Set[types.CodeType] = frozenset()


_request = _Request()


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
    _request.captured = None
    entry.look_up(func, t, y, args)
    captured = _request.captured
    if captured is None:
        refuse_swapped(func)
        _request.t, _request.y = t, parts
        entry = _trace(entry, func, t, y, args)
        captured = _request.captured
        if captured is None:
            raise CompileError(f"func computes nothing from tensors that TorchDynamo can see. {_HINT}")
        _check_again(entry, captured, func, t, y, args)
    inputs = [_request.inputs[i] for i in captured.places]
    _request.captured, _request.inputs = None, ()
    return captured, inputs


def _check_again(
    entry: _Entry, captured: Captured, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]
) -> None:
    """Raises where the graph just made does not serve a second time, so that every solve would compile."""
    inputs, _request.captured = _request.inputs, None
    entry.look_up(func, t, y, args)
    if entry.kept is not None and _request.captured is not captured:
        raise CompileError(
            "func changes a Python value that it depends on, such as a counter of its evaluations, so that no graph of "
            f"it would hold twice. {_HINT}"
        )
    _request.inputs = inputs


def _trace(
    entry: _Entry, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...], is_fresh: bool = False
) -> _Entry:
    try:
        with torch._dynamo.config.patch(_settings()), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own modules
            _request.code = frozenset()
            entry.trace(func, t, y, args)
        entry.keep()
        entry.methods.add(func, _request.code)
        return entry
    except Exception as error:
        if type(error).__name__ in _TOO_MANY and not is_fresh:
            # As many graphs as are kept: begin anew.
            return _trace(_by_owner.anew(func), func, t, y, args, is_fresh=True)
        reason = str(error).strip().split("\n\nfrom user code")[0]
        raise CompileError(f"func cannot be traced as one graph. {_HINT} TorchDynamo says: {reason}") from error


_TOO_MANY = ("FailOnRecompileLimitHit", "FailOnCacheLimitHit")  # the name depends on torch's version


def _settings() -> dict[str, Any]:
    """Guard hooks too, and spare each call of a graph work for profilers."""
    settings = {"skip_nnmodule_hook_guards": False, "record_runtime_overhead": False}
    return {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}


def _call(func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> list[Tensor]:
    k = func(t, y, *args)
    # Clones, so that each component is a result of the graph, in order.
    return [part.clone() for part in (k if isinstance(k, (tuple, list)) else (k,))]


def _backend(graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    raise CompileError(
                        f"func uses {node.target}: a custom autograd.Function, checkpointing or control flow on "
                        f"tensors, which is not supported. {_HINT}"
                    )
    captured, _request.code = Captured(graph), code_in_trace()
    results = next(len(node.args[0]) for node in graph.graph.nodes if node.op == "output")
    nothing = tuple(torch.empty(0, device="cpu") for _ in range(results))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        if not captured.roles and inputs:
            _describe(captured, inputs)
        _request.captured, _request.inputs = captured, inputs
        return nothing

    return run


def _describe(captured: Captured, inputs: Sequence[Tensor]) -> None:
    roles: list[tuple[str, int]] = []
    others: list[Tensor] = []
    for x in inputs:
        position = [i for i, part in enumerate(_request.y) if part is x]
        if x is _request.t:
            roles.append(("t", 0))
        elif position:
            roles.append(("y", position[0]))
        else:
            roles.append(("input", len(others)))
            others.append(x)
    captured.roles = tuple(roles)
    captured.inputs = tuple(_like(x) for x in others)
    captured.places = tuple(i for i, (kind, _) in enumerate(roles) if kind == "input")
    captured.wants_gradient = tuple(x.requires_grad for x in others)


def _like(x: Tensor) -> Tensor:
    if x.layout is not torch.strided or x.is_neg() or x.is_conj() or x.device.type != "cpu":
        raise CompileError(
            f"func depends on a tensor of layout {x.layout} on {x.device}: only dense ones on the CPU are "
            f"supported. {_HINT}"
        )
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
    with torch.no_grad():
        copy.as_strided(_span(x), (1,)).copy_(x.detach().as_strided(_span(x), (1,)))
    return copy


def _span(x: Tensor) -> tuple[int]:
    """Elements between the first and the last, as x lies in memory."""
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0,)


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
        self.trace = torch.compile(self._call, backend=_backend, fullgraph=True, dynamic=False)
        self.kept: list[_Kept] | None = []  # None: not to be had from this torch
        self.methods = Methods()

    def look_up(self, func: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> None:
        """What ``trace`` does where there is a graph whose guards hold, at a fifth of its overhead, else nothing."""
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
