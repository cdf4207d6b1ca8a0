"""Backend of TorchDynamo that turns the traced graph of func into a ``Captured``, to be compiled later."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx

from aca_ext.engines.compiled.method_guards import code_in_trace
from aca_ext.engines.compiled.places import Place
from aca_ext.engines.compiled.side_effects import Counter, counters_of, name_of, name_of_input
from aca_ext.errors import CompileError
from aca_ext.kernels.extension import checksums_of

HINT = 'Use engine="eager", or change func.'


class TraceError(CompileError):
    """A func that cannot be traced as one graph, or whose evaluations have side effects that a graph would lose."""


class UnusableFuncError(CompileError):
    """A func that no engine could solve right, in compiled code or not."""


@dataclass(eq=False)
class Captured:
    """A traced graph of func, with what was compiled from it.

    The inputs of the graph are the time, the components of the state, and the "other" inputs, numbered by i.

    Attributes:
        graph: function of all inputs that returns the components of the slope.
        roles: kind and number of each input: ("t", 0), ("y", i) for component i of the state, or ("input", i).
        inputs: copies of the other inputs, as examples for tracing.
        places: indices of the other inputs among all inputs.
        wants_gradient: for each other input, True if it requires grad.
        gradient_bytes: sizes of the gradients of these.
        names: TorchDynamo's names of the other inputs.
        checksums: function that computes checksums of the other inputs, except of counters and of ``gaps``.
        gaps: indices of other inputs with gaps in memory.
        differentiates: func calls torch.autograd.grad, so the state and inputs with gradients must require grad.
        counters: values to which each evaluation of func adds a constant.
        refusal: reason why the graph cannot be used, else "".
        obstacles: reasons why the graph cannot be compiled, by the way of compiling it: "program" (the whole solve),
            "lanes" (the solves of independent samples), "evaluations".
        lifted: some numbers that func reads are inputs, because they changed before.
        plans: cache of programs, by layout and method.
        solves: cache of ``Specification``, by the settings of a solve.
    """

    graph: fx.GraphModule
    roles: tuple[tuple[str, int], ...] = ()
    inputs: tuple[Tensor, ...] = ()
    places: tuple[int, ...] = ()
    wants_gradient: tuple[bool, ...] = ()
    gradient_bytes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    checksums: Any = None
    gaps: tuple[int, ...] = ()
    differentiates: bool = False
    counters: tuple[Counter, ...] = ()
    refusal: str = ""
    obstacles: dict[str, str] = field(default_factory=dict)
    lifted: bool = False
    plans: dict[Any, Any] = field(default_factory=dict)
    solves: dict[Any, Any] = field(default_factory=dict)


class Request(threading.local):
    """Data passed between a lookup or trace of func and this backend; ``inputs`` are the operands of the last call."""

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


request = Request()


def backend(graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
    tracer = _tracer()
    request.numbers = _numbers_read(request.scope)
    request.counters = tuple(counters_of(graph, tracer, dict(request.scope)))
    _attach_results(graph)
    names = tuple(name_of_input(node) for node in graph.graph.nodes if node.op == "placeholder")
    differentiates = any(node.target is torch.autograd.grad for node in graph.graph.nodes)
    captured = Captured(graph, names=names, differentiates=differentiates)
    captured.counters, request.code = request.counters, code_in_trace()
    captured.obstacles = _obstacles(graph)
    results = next(len(node.args[0]) for node in graph.graph.nodes if node.op == "output")
    nothing = tuple(torch.empty(0, device="cpu") for _ in range(results))

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        if not captured.roles and inputs:
            _describe(captured, inputs)
        request.captured, request.inputs = captured, inputs
        return nothing

    return run


def _obstacles(graph: fx.GraphModule) -> dict[str, str]:
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                reason = (
                    f"func uses {node.target}. A program of a whole solve does not support a custom autograd.Function, "
                    f"checkpointing and control flow on tensors. {HINT}"
                )
                return {"program": reason, "lanes": reason}
    return {}


def _tracer() -> Any:
    """TorchDynamo's InstructionTranslator of the current trace.

    Raises:
        CompileError: this version of torch does not give access to it, so side effects of func would go unseen.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer = InstructionTranslator.current_tx()
        tracer.output.side_effects._get_modified_vars  # noqa: B018
        torch._dynamo.config.replay_side_effects  # noqa: B018
    except (AttributeError, ImportError) as error:
        raise CompileError(
            f'engine="compiled" does not support torch {torch.__version__}: {error}. Use engine="eager".'
        ) from error
    return tracer


def _attach_results(graph: fx.GraphModule) -> None:
    """Removes the last detach() before each result, which ``_call`` added, from the traced graph."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    for clone in output.args[0]:
        detach = clone.args[0]
        clone.replace_input_with(detach, detach.args[0])
        if not detach.users:
            graph.graph.erase_node(detach)
    graph.recompile()


def _numbers_read(scope: Mapping[str, Any]) -> dict[str, float]:
    """Numbers that the current trace took as constants, by TorchDynamo's names."""
    context = torch._guards.TracingContext.try_get()
    numbers: dict[str, float] = {}
    for guard in () if context is None else context.guards_context.dynamo_guards:
        name = name_of(guard)
        try:
            place = Place(name)
            value = place.get(place.owner(dict(scope)))
        except Exception:  # a name that is not a place
            continue
        if type(value) in (int, float):
            numbers[name] = value
    return numbers


def keep_guard(guard: Any) -> bool:
    """Tells whether a guard is checked before a graph is used; guards on counters are not."""
    name = name_of(guard.orig_guard) if hasattr(guard, "orig_guard") else str(guard.name)
    return all(counter.place.name != name for counter in request.counters)


def _describe(captured: Captured, inputs: Sequence[Tensor]) -> None:
    roles: list[tuple[str, int]] = []
    others: list[Tensor] = []
    for x in inputs:
        position = [i for i, part in enumerate(request.y) if part is x]
        if x is request.t:
            roles.append(("t", 0))
        elif position:
            roles.append(("y", position[0]))
        else:
            roles.append(("input", len(others)))
            others.append(x)
    captured.roles = tuple(roles)
    captured.inputs = tuple(_like(x, request.t.device) for x in others)
    captured.places = tuple(i for i, (kind, _) in enumerate(roles) if kind == "input")
    captured.wants_gradient = tuple(x.requires_grad for x in others)
    captured.gradient_bytes = tuple(x.nbytes for x in others if x.requires_grad)
    captured.names = tuple(captured.names[i] for i in captured.places)
    counting = {counter.place.name for counter in captured.counters}
    fixed = {i for i, name in enumerate(captured.names) if name not in counting}
    captured.gaps = tuple(i for i in sorted(fixed) if span_of(others[i]) != others[i].numel())
    without_gaps = fixed.difference(captured.gaps)
    captured.checksums = checksums_of([x.nbytes if i in without_gaps else 0 for i, x in enumerate(others)])


def _like(x: Tensor, device: torch.device) -> Tensor:
    is_there = x.device == device or (x.is_cpu and x.dim() == 0)  # which PyTorch takes for a number
    if not is_there or not is_plain(x):
        raise CompileError(
            f"func depends on a {type(x).__name__} of layout {x.layout} on {x.device}; only plain, dense tensors on "
            f"the state's device ({device}) are supported. {HINT}"
        )
    return copy_of(x)


def copy_of(x: Tensor) -> Tensor:
    """A copy of a plain tensor with the same strides, so also with the gaps in memory that ``clone`` would close."""
    copy, span = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device), (span_of(x),)
    with torch.no_grad():
        copy.as_strided(span, (1,)).copy_(x.detach().as_strided(span, (1,), x.storage_offset()))
    return copy


def is_plain(x: Tensor) -> bool:
    """Tells whether the memory of a tensor holds its elements, with no conjugate or negative bit set."""
    is_own = type(x) is Tensor or isinstance(x, torch.nn.Parameter)
    return is_own and x.layout is torch.strided and not (x.is_neg() or x.is_conj() or x._is_zerotensor())


def span_of(x: Tensor) -> int:
    """Number of elements in memory from the first to the last element of ``x``, gaps included."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
