"""func as a graph of tensors, traced by TorchDynamo and guarded by it: what func reads is an input of the graph, and a
graph is used again only while everything that it took for constant is as it was."""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx

from aca_ext.engines.compiled.changing_numbers import ChangingNumbers
from aca_ext.engines.compiled.method_guards import Methods, code_in_trace
from aca_ext.engines.compiled.places import Place
from aca_ext.engines.compiled.side_effects import Counter, counters_of, dependence_of, name_of, name_of_input
from aca_ext.engines.compiled.undisturbed import unchanged, undisturbed
from aca_ext.errors import CompileError
from aca_ext.kernels.fused import checksums_of
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
        names: TorchDynamo's names of them.
        checksums: of the contents of those that func does not change itself and that have no gaps in memory.
        gaps: the inputs that have.
        differentiates: whether func calls torch.autograd.grad, for which the state and such inputs must require grad.
        counters: what each evaluation of func adds a constant to.
        refusal: why it cannot be used.
        lifted: whether numbers that func reads are inputs, for they changed before.
        plans: what was compiled from it, by layout and method.
        solves: what solves of a kind share, by their settings.
    """

    graph: fx.GraphModule
    roles: tuple[tuple[str, int], ...] = ()
    inputs: tuple[Tensor, ...] = ()
    places: tuple[int, ...] = ()
    wants_gradient: tuple[bool, ...] = ()
    names: tuple[str, ...] = ()
    checksums: Any = None
    gaps: tuple[int, ...] = ()
    differentiates: bool = False
    counters: tuple[Counter, ...] = ()
    refusal: str = ""
    lifted: bool = False
    plans: dict[Any, Any] = field(default_factory=dict)
    solves: dict[Any, Any] = field(default_factory=dict)


class _Request(threading.local):
    """What is being asked for, and what the graph was called with."""

    t: Tensor
    y: Sequence[Tensor]
    captured: Captured | None = None
    inputs: tuple[Tensor, ...] = ()
    code: Set[types.CodeType] = frozenset()
    scope: Mapping[str, Any] = {}
    numbers: Mapping[str, float] = {}
    counters: tuple[Counter, ...] = ()

    def begin_trace(self) -> None:
        self.code, self.counters, self.numbers = frozenset(), (), {}


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


def specialise(func: Callable[..., Any]) -> None:
    """From now on graphs of func hold the numbers that func reads as constants, whether or not they change."""
    _by_owner.anew(func).numbers.is_given_up = True


def scope_of(func: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """What the names of places in func start from; args are a list, so that one can be replaced."""
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
    _request.captured = None
    try:
        if entry.numbers.places:
            scope = scope_of(func, args)
            with entry.numbers.as_tensors(scope):
                entry.look_up(func, t, y, tuple(scope["L"]["args"]))
        else:
            entry.look_up(func, t, y, args)
        captured = _request.captured
        if captured is None:
            refuse_swapped(func)
            _request.t, _request.y = t, parts
            try:
                captured = _new(entry, func, t, y, args)
            finally:
                _request.y, _request.scope = (), {}
        if captured.refusal:
            raise CompileError(captured.refusal)
        return captured, [_request.inputs[i] for i in captured.places]
    finally:
        _request.captured, _request.inputs = None, ()


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
    scope = _request.scope = scope_of(func, args)
    with entry.numbers.as_tensors(scope):
        given = tuple(scope["L"]["args"])
        entry = _trace(entry, func, t, y, given)
        captured = _request.captured
        if captured is None:
            raise CompileError(f"func computes nothing from tensors that TorchDynamo can see. {_HINT}")
        _check_again(entry, captured, func, t, y, given)
    captured.lifted = bool(entry.numbers.places)
    if any(counter.is_number for counter in captured.counters):
        inputs = _request.inputs
        with unchanged(func, args):
            captured.refusal = dependence_of(captured.counters, scope_of(func, args), lambda: func(t, y, *args))
        _request.inputs = inputs
    return captured


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
        with torch._dynamo.config.patch(_settings()):
            _request.begin_trace()
            entry.trace(func, t, y, args)
        entry.keep()
        entry.methods.add(func, _request.code)
        counters = {counter.place.name for counter in _request.counters}
        entry.numbers.known.update((k, v) for k, v in _request.numbers.items() if k not in counters)
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
        raise CompileError(f"func cannot be traced as one graph. {_HINT} TorchDynamo says: {reason}") from error


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


def _backend(graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    raise CompileError(
                        f"func uses {node.target}: a custom autograd.Function, checkpointing or control flow on "
                        f"tensors, which is not supported. {_HINT}"
                    )
    tracer = _tracer()
    _request.numbers = _numbers_read(_request.scope)
    _request.counters = tuple(counters_of(graph, tracer, dict(_request.scope)))
    _attach_results(graph)
    names = tuple(name_of_input(node) for node in graph.graph.nodes if node.op == "placeholder")
    differentiates = any(node.target is torch.autograd.grad for node in graph.graph.nodes)
    captured = Captured(graph, names=names, differentiates=differentiates)
    captured.counters, _request.code = _request.counters, code_in_trace()
    results = next(len(node.args[0]) for node in graph.graph.nodes if node.op == "output")
    nothing = tuple(torch.empty(0, device="cpu") for _ in range(results))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        if not captured.roles and inputs:
            _describe(captured, inputs)
        _request.captured, _request.inputs = captured, inputs
        return nothing

    return run


def _tracer() -> Any:
    """TorchDynamo's view of the trace at hand.

    Raises:
        CompileError: this version of torch does not tell, so that what func changes would go unseen.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        tracer.output.side_effects._get_modified_vars  # noqa: B018
        torch._dynamo.config.replay_side_effects  # noqa: B018
    except (AttributeError, ImportError) as error:
        raise CompileError(
            f'engine="compiled" does not know this version of torch ({torch.__version__}): {error}. Use engine="eager".'
        ) from error
    return tracer


def _attach_results(graph: fx.GraphModule) -> None:
    """Takes the last detach() before each result, ``_call``'s own, out of the graph."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    for clone in output.args[0]:
        detach = clone.args[0]
        clone.replace_input_with(detach, detach.args[0])
        if not detach.users:
            graph.graph.erase_node(detach)
    graph.recompile()


def _numbers_read(scope: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that the trace at hand took for constants, by TorchDynamo's names."""
    context = torch._guards.TracingContext.try_get()
    numbers: dict[str, float] = {}
    for guard in () if context is None else context.guards_context.dynamo_guards:
        name = name_of(guard)
        try:
            place = Place(name)
            value = place.get(place.owner(dict(scope)))
        except Exception:  # names of other things than places
            continue
        if type(value) in (int, float):
            numbers[name] = value
    return numbers


def _keep_guard(guard: Any) -> bool:
    """Whether a guard is to hold for a graph to be used; those on counters are not."""
    name = name_of(guard.orig_guard) if hasattr(guard, "orig_guard") else str(guard.name)
    return all(counter.place.name != name for counter in _request.counters)


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
    captured.names = tuple(captured.names[i] for i in captured.places)
    counting = {counter.place.name for counter in captured.counters}
    fixed = {i for i, name in enumerate(captured.names) if name not in counting}
    captured.gaps = tuple(i for i in sorted(fixed) if span_of(others[i]) != others[i].numel())
    without_gaps = fixed.difference(captured.gaps)
    captured.checksums = checksums_of([x.nbytes if i in without_gaps else 0 for i, x in enumerate(others)])


def _like(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not is_plain(x):
        raise CompileError(
            f"func depends on a {type(x).__name__} of layout {x.layout} on {x.device}: only dense, plain ones on the "
            f"CPU with memory of their own are supported. {_HINT}"
        )
    copy, span = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu"), (span_of(x),)
    with torch.no_grad():
        copy.as_strided(span, (1,)).copy_(x.detach().as_strided(span, (1,), x.storage_offset()))
    return copy


def is_plain(x: Tensor) -> bool:
    """Whether the memory of a tensor on the CPU holds its elements as they are."""
    is_own = type(x) is Tensor or isinstance(x, torch.nn.Parameter)
    return is_own and x.layout is torch.strided and not (x.is_neg() or x.is_conj() or x._is_zerotensor())


def span_of(x: Tensor) -> int:
    """Elements between the first and the last, as x lies in memory."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


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
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [_keep_guard(guard) for guard in guards]}
        self.trace = torch.compile(self._call, backend=_backend, fullgraph=True, dynamic=False, options=options)
        self.kept: list[_Kept] | None = []  # None: not to be had from this torch
        self.methods = Methods()
        self.numbers = ChangingNumbers()

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
