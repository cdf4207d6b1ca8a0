"""func traced on the whole batch, and what its graph makes of one sample.

A node of the graph is one of two kinds. "Computed" ones depend on time or state and become code. "Given" ones do not,
such as a product of two parameters: they are computed once per solve, by PyTorch, and the code reads their numbers. The
"constants" among them depend on no input of func, so their values at the tracing remain valid. An input is "learnt" if
it requires grad. A number is "picked" if those of the samples do not lie at one distance from another in their tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.lowerings import decompositions
from aca_ext.engines.compiled.places import shown
from aca_ext.engines.ensemble.code import Code
from aca_ext.engines.ensemble.interpreter import Interpreter, LaneCode, time_and_state
from aca_ext.engines.ensemble.rules import HELD, MOVES, RULES
from aca_ext.engines.ensemble.values import HINT, rows_of
from aca_ext.errors import CompileError
from aca_ext.problem.batch import RowPacking
from aca_ext.problem.trees import leaves_of

aten = torch.ops.aten

_BY_SHAPE = {
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty,
}  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """func on one sample, and the numbers that it reads there.

    Attributes:
        gather: of func's inputs, returns what belongs to each sample, (batch, p), and what is shared, (w,).
        is_learnt: whether what belongs to samples, and what is shared, depends on inputs that require grad.
    """

    lane: LaneCode
    gather: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
    is_learnt: tuple[bool, bool]


def trace(captured: Captured, t: Tensor, y: Tensor, packing: RowPacking) -> Traced:
    """The code of a captured func on one of its samples.

    Raises:
        CompileError: an operation is not supported, or mixes samples.
    """
    parts = leaves_of(packing.unpack(y.detach()))
    graph = _graph(captured, t.detach(), parts)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    changing = set(placeholders[: 1 + len(parts)])
    examples = _evaluated(graph, [t.detach(), *parts, *captured.inputs])
    given, constants = _given(graph.graph, changing, set(placeholders))
    code = Code.on(y[0].numel())
    interpreter = Interpreter(code, len(y), _on_cpu(examples, given), given, constants, y.dtype)
    computed = dict(zip(placeholders[: 1 + len(parts)], time_and_state(code, len(y), t, parts), strict=True))
    lane = interpreter.run(graph.graph, computed)
    places = {node: i for i, node in enumerate(placeholders[1 + len(parts) :])}
    return _traced(captured, graph, lane, places, {node: examples[node] for node in constants}, y)


def _graph(captured: Captured, t: Tensor, parts: Sequence[Tensor]) -> fx.GraphModule:
    """func as a functional graph of t, the components of y, and its inputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def slope(*operands: Tensor) -> tuple[Tensor, ...]:
        t, *others = operands
        y, inputs = others[: len(parts)], others[len(parts) :]
        if captured.differentiates:
            t, y = t.detach().requires_grad_(), [x.detach().requires_grad_() for x in y]
        by_role = {"t": (t,), "y": y, "input": inputs}
        return tuple(captured.graph.forward(*(by_role[kind][i] for kind, i in captured.roles)))

    _refuse_modes(captured)
    examples = [t.clone(), *(x.clone() for x in parts), *(x.clone() for x in captured.inputs)]
    ours = {*RULES, *MOVES}
    table = {op: rule for op, rule in decompositions().items() if getattr(op, "overloadpacket", op) not in ours}
    # func may differentiate, on a GPU in another thread, which would not trace.
    with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
        graph = make_fx(slope)(*examples)
    # In a func that differentiates, autograd detaches what it keeps, through which gradients do pass.
    keeps = captured.differentiates or _transforms(captured)
    for node in list(graph.graph.nodes):
        if node.target is _traced_detach() and keeps:
            node.replace_all_uses_with(node.args[0])
        elif node.target is _traced_detach():
            node.target = HELD
    graph.recompile()
    with torch.no_grad():
        graph = make_fx(torch.func.functionalize(graph), decomposition_table=table)(*examples)
    _check(graph, captured, 1 + len(parts))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@cache
def _traced_detach() -> Any:
    """The operation that x.detach() is traced as, which differs between versions of PyTorch."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.enable_grad():
        graph = make_fx(lambda x: x.detach())(torch.ones((), device="cpu"))
    return next(node.target for node in graph.graph.nodes if node.op == "call_function")


def _refuse_modes(captured: Captured) -> None:
    for node in captured.graph.graph.nodes:
        is_off = "grad_enabled" in str(node.target) and False in node.args
        if is_off or "inference_mode" in str(node.target):
            raise CompileError(
                f"func switches gradients off in a part of it (torch.no_grad), which compiled lanes do not "
                f"follow; use x.detach(). {HINT}"
            )


def _transforms(captured: Captured) -> bool:
    """Tells whether func uses torch.func."""
    return any("functorch" in str(getattr(node.target, "__module__", "")) for node in captured.graph.graph.nodes)


def _check(graph: fx.GraphModule, captured: Captured, n_changing: int) -> None:
    """Raises where func draws random numbers or changes what it is given."""
    placeholders = {node: i for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise CompileError(
                f"func draws random numbers ({node.target}), which a replay could not repeat. "
                'Use engine="eager", or func.eval() where it is dropout.'
            )
        if node.target is aten.copy_.default:
            i = placeholders.get(node.args[0], 0) - n_changing
            name = shown(captured.names[i]) if i >= 0 else "y"
            raise CompileError(f'func changes {name} in place. Use engine="eager", or func.eval().')


def _evaluated(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """The tensors of all nodes."""
    found: dict[fx.Node, Any] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad():
        Keeping(graph, garbage_collect_values=False).run(*inputs)
    return found


def _on_cpu(tensors: dict[fx.Node, Any], nodes: set[fx.Node]) -> dict[fx.Node, Any]:
    """With the tensors of some nodes on the CPU, where indices of their elements are."""
    from torch.utils._pytree import tree_map

    def moved(x: Any) -> Any:
        return x.cpu() if isinstance(x, Tensor) else x

    return {node: tree_map(moved, x) if node in nodes else x for node, x in tensors.items()}


def _given(graph: fx.Graph, changing: set[fx.Node], placeholders: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that do not depend on time and state, and those among them that depend on no input at all."""
    computed, given, constants = set(changing), set(), set()
    for node in graph.nodes:
        if node.op == "output" or node in computed:
            continue
        sources = [] if _is_by_shape(node) else node.all_input_nodes
        if any(source in computed for source in sources):
            computed.add(node)
            continue
        given.add(node)
        if node not in placeholders and all(source in constants for source in sources):
            constants.add(node)
    return given, constants


def _traced(
    captured: Captured,
    graph: fx.GraphModule,
    lane: LaneCode,
    places: dict[fx.Node, int],
    constants: dict[fx.Node, Any],
    y: Tensor,
) -> Traced:
    """With a function that computes the numbers that the code reads from func's inputs."""
    inputs, batch, empty = lane.inputs, len(y), y.detach().new_empty(0)
    of_samples = [*(node for node, _ in inputs.by_sample), *(node for node, _, _ in inputs.picked)]
    nodes = list(dict.fromkeys([*inputs.shared, *of_samples]))
    before = _part(graph, nodes, places, constants)
    position = {node: i for i, node in enumerate(nodes)}

    def gather(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found = before(*tensors)
        rows = {place: rows_of(found[position[node]], step, batch) for (node, step), place in inputs.by_sample.items()}
        rows |= {place: found[position[node]].reshape(-1)[index][:, None] for node, index, place in inputs.picked}
        shared = [found[position[node]].reshape(-1).to(empty) for node in inputs.shared]
        in_order = [rows[place].to(empty) for place in sorted(rows)]
        return _joined(in_order, 1, empty.expand(batch, 0)), _joined(shared, 0, empty)

    learnt = {node for node in nodes if any(captured.wants_gradient[places[n]] for n in _inputs_of(node, places))}
    return Traced(
        lane, gather, (any(node in learnt for node in of_samples), any(node in learnt for node in inputs.shared))
    )


def _joined(parts: Sequence[Tensor], dim: int, empty: Tensor) -> Tensor:
    if not parts:
        return empty
    return torch.cat(list(parts), dim)  # a copy also of a single one, which may change before the backward pass


def _inputs_of(node: fx.Node, places: dict[fx.Node, int]) -> set[fx.Node]:
    """The inputs that a node depends on."""
    seen, todo = set(), [node]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += one.all_input_nodes
    return seen & set(places)


def _part(
    graph: fx.GraphModule, nodes: Sequence[fx.Node], places: dict[fx.Node, int], constants: dict[fx.Node, Any]
) -> Callable[..., Any]:
    """The part of a graph that computes these nodes from func's inputs and from constants."""
    if all(node in places for node in nodes):
        chosen = [places[node] for node in nodes]
        return lambda *tensors: [tensors[i] for i in chosen]
    needed: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [] if node in constants else node.all_input_nodes
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in places:
        copies[node] = part.placeholder(node.name)
    for node in graph.graph.nodes:
        if node in needed and isinstance(constants.get(node), Tensor):
            graph.register_buffer(f"_constant_{node.name}", constants[node])
            copies[node] = part.get_attr(f"_constant_{node.name}")
        elif node in needed and node not in copies:
            if getattr(node.target, "namespace", "") == "prims":
                raise CompileError(f"func needs {node.target} of its parameters, which has no derivative. {HINT}")
            copies[node] = part.node_copy(node, lambda n: copies[n])
            if node.target is HELD:
                copies[node].target = aten.detach.default
    part.output([copies[node] for node in nodes])
    return fx.GraphModule(graph, part)


def _is_by_shape(node: fx.Node) -> bool:
    """Tells whether a node makes a tensor of which its operand gives nothing but the shape."""
    return getattr(node.target, "overloadpacket", None) in _BY_SHAPE
