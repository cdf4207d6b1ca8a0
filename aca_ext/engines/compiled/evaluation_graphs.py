"""Traced graphs of one evaluation of func and of its transpose, from which composed_steps.py makes a step.

    evaluation   t, y, k; inputs of func                  writes k
    replay       the same                                 writes k, returns what the pull needs besides its own inputs
    pull         t, y, k, grad_k; inputs of func; those   returns v, if it is not zero, and gradients of func's inputs

The last two are the two parts of one graph, of func and its transpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.step_graphs import Layout, Replayed, Slope, traced

_K, _GRAD_K = 2, 3  # places of inputs


@dataclass(frozen=True)
class Transposed:
    """The graphs of ``replay`` and ``pull``.

    Attributes:
        has_v: the slope depends on the state.
        wanted: numbers of those gradients, among all that are wanted, that are not zero.
    """

    replay: fx.GraphModule
    pull: fx.GraphModule
    has_v: bool
    wanted: Sequence[int]


def evaluation_graph(captured: Captured, layout: Layout) -> fx.GraphModule:
    def evaluation(t: Tensor, y: Tensor, k: Tensor, *inputs: Tensor) -> tuple[()]:
        k.copy_(Slope(captured, layout.packing, inputs)(t, y))
        return ()

    time, states = layout.scalars()[0], [layout.state() for _ in range(2)]
    return traced(evaluation, [time, *states], {_K}, captured)[0]


def transposed_graphs(captured: Captured, layout: Layout) -> Transposed:
    found: list[bool] = []

    def transposed(t: Tensor, y: Tensor, k: Tensor, grad_k: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        f, y = Replayed(captured, layout.packing, inputs), y.detach().requires_grad_()
        slope = f(t, y)
        k.copy_(slope.detach())
        v = f.pull_back(y, slope, grad_k) if slope.requires_grad else None
        likes = [layout.like, *(x for x, w in zip(captured.inputs, captured.wants_gradient, strict=True) if w)]
        results = [None if x is None else _laid_out(x, like) for x, like in zip([v, *f.grads], likes, strict=True)]
        found[:] = [x is not None for x in results]
        return tuple(x for x in results if x is not None)

    time, states = layout.scalars()[0], [layout.state() for _ in range(3)]
    graph = traced(transposed, [time, *states], {_K}, captured)[0]
    replay, pull = _parts(graph)
    return Transposed(replay, pull, found[0], [i for i, is_there in enumerate(found[1:]) if is_there])


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides of an ``empty_like(like)``."""
    stride = torch.empty_like(like).stride()
    return x if x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)


def _parts(graph: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graphs of ``replay`` and ``pull``. A pull repeats views and constants instead of getting them."""
    nodes = list(graph.graph.nodes)
    inputs, results = [node for node in nodes if node.op == "placeholder"], nodes[-1].args[0]
    (copy,) = (node for node in nodes if node.target is torch.ops.aten.copy_.default)
    slope = copy.args[1]
    is_k = slope not in inputs and slope.meta["val"].stride() == inputs[_K].meta["val"].stride()
    of_replay = _needed([copy], set(inputs))
    given = {node for node in of_replay if node is not copy and _may_be_given(node)}
    of_pull = _needed(results, {*inputs, *given})
    used = {x for node in of_pull for x in node.all_input_nodes}.union(results)
    saved = [node for node in nodes if node in given and node in used and not (is_k and node is slope)]
    of_replay.update(_needed(saved, set(inputs)))

    replay = _graph_of([node for node in inputs if node is not inputs[_GRAD_K]], {}, nodes, of_replay, saved)
    pull = _graph_of([*inputs, *saved], {slope: inputs[_K]} if is_k else {}, nodes, of_pull, results)
    return fx.GraphModule(graph, replay), fx.GraphModule(graph, pull)


def _needed(results: Sequence[fx.Node], known: Set[fx.Node]) -> set[fx.Node]:
    """The nodes from which the results are computed, without those that are known."""
    found: set[fx.Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in known:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _may_be_given(node: fx.Node) -> bool:
    is_view = getattr(node.target, "is_view", False)
    return isinstance(node.meta.get("val"), Tensor) and bool(node.all_input_nodes) and not is_view


def _graph_of(
    inputs: Sequence[fx.Node],
    same: Mapping[fx.Node, fx.Node],
    nodes: Sequence[fx.Node],
    needed: Set[fx.Node],
    results: Sequence[fx.Node],
) -> fx.Graph:
    """A graph of the nodes that are needed; those in ``same`` have the value of an input."""
    graph = fx.Graph()
    copied = {node: graph.placeholder(node.name) for node in inputs}
    copied.update({node: copied[x] for node, x in same.items()})
    for node in nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in results))
    return graph
