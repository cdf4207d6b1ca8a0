"""Text that determines the programs made of a traced graph, to find them again in another process."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.step_graphs import Layout

# Values of these types are shown in full by repr.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
_ROOTS = ("torch", "_operator", "math", "builtins")  # of functions that change with the version of torch or Python only
_OPERATIONS = ("aten", "prims")


class UnknownError(Exception):
    """Content whose text does not determine it, such as a function of the user."""


def fingerprint(captured: Captured, layout: Layout) -> tuple[str, ...] | None:
    """The parts of the name of programs for a traced graph and a layout; None if they cannot be known by a text."""
    try:
        return (_settings(), text_of(captured.graph), _inputs(captured), _layout(layout))
    except UnknownError:
        return None


def _settings() -> str:
    """Settings of torch and of its compiler that programs may depend on."""
    from torch._inductor import config

    found = {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
    }
    return f"{found} {sorted(config.save_config_portable().items())}"


def _inputs(captured: Captured) -> str:
    forms = [_form(x) for x in captured.inputs]
    return repr((captured.roles, captured.wants_gradient, captured.differentiates, forms))


def _layout(layout: Layout) -> str:
    scheme, packing, tolerance = layout.scheme, layout.packing, layout.tolerance
    of_scheme = {name: value for name, value in vars(scheme).items() if name != "tableau"}
    of_packing = packing.shapes, packing.is_tuple, packing.is_complex
    of_tolerance = tolerance.segments, tolerance.sizes, len(layout.tolerance_tensors)
    return repr((_form(layout.like), of_scheme, of_packing, of_tolerance))


def _form(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device} {x.requires_grad}"


def text_of(graph: fx.GraphModule) -> str:
    """The operations of a graph with their operands.

    Raises:
        UnknownError: the graph contains something that the text would not determine.
    """
    numbers: dict[fx.Node, int] = {}
    lines = []
    for node in graph.graph.nodes:
        numbers[node] = len(numbers)
        operands = [_value(x, numbers) for x in (node.args, dict(node.kwargs)) if node.op != "placeholder"]
        lines.append(" ".join([node.op, _target(graph, node), *operands]))
    return "\n".join(lines)


def _target(graph: fx.GraphModule, node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "get_attr":
        return _constant(reduce(getattr, str(node.target).split("."), graph))
    if node.op == "call_function":
        return _function(node.target)
    raise UnknownError(node.op)


def _constant(value: Any) -> str:
    if type(value) is not Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
        raise UnknownError(type(value))
    content = value.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return f"{_form(value)} {hashlib.sha256(content.numpy().tobytes()).hexdigest()}"


def _function(target: Any) -> str:
    """The name of a function of torch or Python, under which it must be found."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        if target.__module__.rpartition(".")[2] not in _OPERATIONS:
            raise UnknownError(target)
        return str(target)
    owner = getattr(target, "__objclass__", None)  # of a method of torch.Tensor
    module = getattr(target if owner is None else owner, "__module__", None) or ""
    name = getattr(target, "__name__", "")
    if module.partition(".")[0] in _ROOTS:
        for start in (owner, sys.modules.get(module)):
            if getattr(start, name, None) is target:
                return f"{module} {owner} {name}"
    raise UnknownError(target)


def _value(x: Any, numbers: Mapping[fx.Node, int]) -> str:
    """Text of an operand; two values with the same text are the same."""
    if isinstance(x, fx.Node):
        return f"%{numbers[x]}"
    if x is None or x is Ellipsis or type(x) in _PLAIN:
        return f"{type(x).__name__}:{x!r}"
    if isinstance(x, (tuple, list)):  # as an index, a list is not a tuple
        kind = "tuple" if isinstance(x, tuple) else "list"
        return f"{kind}({', '.join(_value(part, numbers) for part in x)})"
    if isinstance(x, dict):
        return f"dict({', '.join(f'{_value(k, numbers)}: {_value(v, numbers)}' for k, v in x.items())})"
    if isinstance(x, slice):
        return f"slice({_value((x.start, x.stop, x.step), numbers)})"
    raise UnknownError(type(x))
