"""func's graph of tensors as code on lanes: each of its operations on the elements of one sample."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from aca_ext.engines.ensemble.arithmetic import Arithmetic
from aca_ext.engines.ensemble.code import Code, Number, elements_of
from aca_ext.engines.ensemble.rules import CALLS, MOVES, RULES
from aca_ext.engines.ensemble.values import HINT, Computed, Given, Inputs, MixesError, Resolver, Value, moved
from aca_ext.errors import CompileError

aten = torch.ops.aten

_DROPPED = ("memory_format", "dtype", "layout", "device", "pin_memory")  # of keyword arguments: they move nothing


@dataclass(frozen=True)
class LaneCode:
    """func on one sample.

    Attributes:
        slopes: the numbers that it returns.
        inputs: tensors of the graph that it reads besides time and state.
    """

    code: Code
    slopes: list[Number]
    inputs: Inputs


class Interpreter:
    """Runs a graph on elements instead of tensors.

    Args:
        batch: number of samples.
        examples: of the tensors of all nodes.
        given: nodes that do not depend on time and state.
        constants: those of them that never change.
        dtype: of the state.
    """

    def __init__(
        self,
        code: Code,
        batch: int,
        examples: dict[fx.Node, Any],
        given: set[fx.Node],
        constants: set[fx.Node],
        dtype: torch.dtype,
    ) -> None:
        self._code, self._batch, self._dtype = code, batch, dtype
        self._examples, self._all_given, self._constants = examples, given, constants
        self._resolver = Resolver(code, batch, examples, constants)
        self._arithmetic = Arithmetic(code, self._resolver)
        self._values: dict[fx.Node, Any] = {}

    def run(self, graph: fx.Graph, inputs: dict[fx.Node, Computed]) -> LaneCode:
        """The code of a graph, given those of its inputs that are time and state.

        Raises:
            CompileError: an operation is not supported, or mixes samples.
        """
        self._values = dict(inputs)
        for node in graph.nodes:
            if node.op == "output":
                results = [self._result(self._look_up(x)) for x in node.args[0]]
                return LaneCode(self._code, [x for result in results for x in result], self._resolver.inputs)
            if node not in self._values:
                self._values[node] = self._given(node) if node in self._all_given else self._computed(node)
        raise AssertionError("a graph ends in its output")

    def _look_up(self, x: Any) -> Any:
        return pytree.tree_map(lambda a: self._values[a] if isinstance(a, fx.Node) else a, x)

    def _given(self, node: fx.Node) -> Any:
        """A tensor without time and state in it, as a view of another where it is one."""
        example = self._examples[node]
        if node.op == "call_function" and node.target is operator.getitem:
            values = self._values[node.args[0]]  # type: ignore[index]
            if values is not None:
                return values[node.args[1]]
        elif node.op == "call_function" and _packet(node) in MOVES:
            args, kwargs = self._look_up((node.args, _kept(node.kwargs)))
            if all(x is not None for x in pytree.tree_leaves(args[:1])):
                result = moved(node.target, args, kwargs, self._resolver)  # type: ignore[arg-type]
                if all(map(self._is_view, pytree.tree_leaves(result), pytree.tree_leaves(example))):
                    return result
        if not isinstance(example, Tensor):
            return None
        return Given(node, torch.arange(example.numel(), device="cpu").reshape(example.shape))

    def _is_view(self, found: Given | None, example: Tensor) -> bool:
        """Tells whether a tensor has the elements of another that it is said to have."""
        if found is None or found.index.shape != example.shape:
            return False
        base: Tensor = self._examples[found.node]
        if base.dtype != example.dtype or bool((found.index >= base.numel()).any()):
            return False
        values = torch.cat([base.reshape(-1), base.new_zeros(1)])[found.index]
        return bool(((values == example) | ((values != values) & (example != example))).all())

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = self._look_up((node.args, node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]]
        self._check_dtypes(node)
        packet = _packet(node)
        if packet in MOVES:
            if packet is aten.constant_pad_nd and len(args) > 2 and args[2] != 0:
                raise CompileError(f"func pads with {args[2]}; only zeros are supported. {HINT}")
            return moved(node.target, args, _kept(kwargs), self._resolver)  # type: ignore[arg-type]
        if packet in CALLS:
            return moved(CALLS[packet], args, {}, self._resolver)
        if packet in (aten.index, aten.index_put) and not (len(args) > 3 and args[3]):
            indices = [self._constant_index(i, node) for i in args[1]]
            return moved(node.target, (args[0], indices, *args[2:3]), {}, self._resolver)  # type: ignore[arg-type]
        if packet in (aten.gather, aten.index_select):
            index = self._constant_index(args[2], node)
            return moved(node.target, (args[0], args[1], index), {}, self._resolver)  # type: ignore[arg-type]
        rule = RULES.get(packet)
        if rule is None:
            raise CompileError(f"func needs the operation {node.target}, which compiled lanes do not have. {HINT}")
        return rule(self._arithmetic, node.target, *args, **kwargs)

    def _check_dtypes(self, node: fx.Node) -> None:
        for example in pytree.tree_leaves(self._examples[node]):
            if isinstance(example, Tensor) and example.dtype not in (self._dtype, torch.bool):
                raise CompileError(
                    f"func computes {example.dtype} from a state of {self._dtype} ({node.target}); compiled "
                    f"lanes have one dtype. {HINT}"
                )

    def _constant_index(self, index: Any, node: fx.Node) -> Tensor | None:
        if index is None:
            return None
        if not isinstance(index, Given) or index.node not in self._constants or bool((index.index < 0).any()):
            raise CompileError(f"func picks elements by an index that can change ({node.target}). {HINT}")
        tensor: Tensor = self._examples[index.node].reshape(-1)[index.index]
        return tensor

    def _result(self, x: Value) -> Sequence[Number]:
        """A component of the slope of one sample."""
        if isinstance(x, Given):  # of neither time nor state, but of the sample
            axis = 0 if self._batch > 1 else None
            elements = self._resolver.along(x, axis, "its result")
        else:
            elements = x.elements
            if x.axis not in (None, 0) or (x.axis == 0 and elements.shape[0] != 1):
                raise MixesError("its result")
        return list(self._arithmetic.numbers(elements).reshape(-1))


def time_and_state(code: Code, batch: int, t: Tensor, parts: Sequence[Tensor]) -> list[Computed]:
    """The values of func's t and of the components of its y."""
    axis = 0 if batch > 1 else None
    found = [Computed(elements_of(code.t, 0, 1).reshape([1] * t.dim()), axis)]
    start = 0
    for part in parts:
        shape = part.shape if axis is None else (1, *part.shape[1:])  # a single one need not be in a batch
        size = math.prod(shape)
        found.append(Computed(elements_of(code.y, start, size).reshape(shape), axis))
        start += size
    return found


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _kept(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _DROPPED}
