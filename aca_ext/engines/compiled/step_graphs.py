"""Traced graphs of the step and its transpose: the functions of ``runge_kutta``, traced with func's graph.

Each graph returns nothing. It reads and writes its inputs, in this order:

    slope      scalars, y, k; inputs of func
    step       scalars, y, k_1, y1, sums; k_2 ... k_s; tolerances if they are tensors; inputs of func
    transpose  scalars, y, g, g_y; for outputs inside the step g_inside, G_1 ... G_s; gradients; inputs of func

``scalars`` are the times of the stages, h, rtol and atol in the state's dtype. ``sums`` receives the squared error
ratios by segment. ``g`` is the cotangent of the step's end, and ``g_y`` receives that of its start. The gradients of
func's inputs are added to ``gradients``. Outputs inside a step are given by the sum of their cotangents, ``g_inside``,
and by their contribution to the cotangent of each slope, ``G_i = sum of b_i(theta) g``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.inductor import Recipe, whole_program
from aca_ext.engines.compiled.lowerings import decompositions
from aca_ext.engines.compiled.places import shown
from aca_ext.errors import CompileError
from aca_ext.kernels.fused import Tolerance, TorchOperations
from aca_ext.kernels.reference import squared_error_ratios
from aca_ext.problem.state import Packing
from aca_ext.problem.trees import leaves_of
from aca_ext.solver.runge_kutta import Scheme, step, step_vjp


class _Operations(TorchOperations):
    """Reference operations for tracing: times are already a tensor, and operands of any layout are accepted."""

    def admit(self, x: Tensor, what: str = "") -> Tensor:
        return x

    def scalars(self, values: Sequence[object]) -> Sequence[Tensor]:
        assert isinstance(values, Tensor)
        return values.unbind()


class Layout:
    """Properties for which graphs are traced: layout of the packed state, scheme, and kind of the tolerances."""

    def __init__(self, like: Tensor, packing: Packing, scheme: Scheme, tolerance: Tolerance) -> None:
        self.like, self.packing, self.scheme = like, packing, scheme
        self.ops = _Operations(like, tolerance)
        self.tolerance = tolerance
        self.tolerance_tensors = (
            [torch.ones_like(like) for x in (tolerance.rtol, tolerance.atol)]
            if isinstance(tolerance.rtol, Tensor) or isinstance(tolerance.atol, Tensor)
            else []
        )
        self.stages = len(scheme.c)

    def state(self) -> Tensor:
        return self.like.clone()

    def scalars(self) -> Tensor:
        h, tolerance = 0.25, 1.0
        values = [*(c * h for c in self.scheme.c), h, tolerance, tolerance]
        return torch.tensor(values, dtype=self.like.dtype, device="cpu")


class Slope:
    """func's traced graph as a function of packed states."""

    def __init__(self, captured: Captured, packing: Packing, inputs: Sequence[Tensor]) -> None:
        self._captured, self._packing = captured, packing
        self._inputs = _leaves(captured, inputs) if captured.differentiates else inputs

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if not self._captured.differentiates:
            return self._evaluated(t, y)
        # torch.autograd.grad in func needs a time and a state that require grad, as in the trace.
        return self._evaluated(t.detach().requires_grad_(), y.detach().requires_grad_()).detach()

    def _evaluated(self, t: Tensor, y: Tensor) -> Tensor:
        operands = {"t": (t,), "y": leaves_of(self._packing.unpack(y)), "input": self._inputs}
        k = self._captured.graph.forward(*(operands[kind][i] for kind, i in self._captured.roles))
        return self._packing.join(k)


class Replayed(Slope):
    """func's traced graph with its transpose, which adds up the gradients of func's inputs."""

    def __init__(self, captured: Captured, packing: Packing, inputs: Sequence[Tensor]) -> None:
        super().__init__(captured, packing, inputs)
        leaves = self._inputs = _leaves(captured, inputs)
        self._wanted = [x for x, wanted in zip(leaves, captured.wants_gradient, strict=True) if wanted]
        self.grads: list[Tensor | None] = [None] * len(self._wanted)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self._evaluated(t.detach().requires_grad_() if self._captured.differentiates else t, y)

    def pull_back(self, y: Tensor, k: Tensor, grad_k: Tensor) -> Tensor | None:
        v, *grads = torch.autograd.grad(k, (y, *self._wanted), grad_k, allow_unused=True)
        for i, grad in enumerate(grads):
            total = self.grads[i]
            if grad is not None:
                self.grads[i] = grad if total is None else total + grad
        return v


def _leaves(captured: Captured, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """func's inputs, of which those with gradients become leaves that require grad."""
    wanted = captured.wants_gradient
    return [x.detach().requires_grad_() if w else x for x, w in zip(inputs, wanted, strict=True)]


class WholeSteps:
    """The recipes of the programs of a traced func, each from one graph of all stages, so that their kernels fuse."""

    def __init__(self, captured: Captured, layout: Layout) -> None:
        self._captured, self._layout = captured, layout

    def slope(self) -> Recipe:
        return _slope_graph(self._captured, self._layout)

    def step(self) -> Recipe:
        return _step_graph(self._captured, self._layout)

    def transpose(self, *, inside: bool) -> Recipe:
        return _transpose_graph(self._captured, self._layout, inside=inside)


def _slope_graph(captured: Captured, layout: Layout) -> Recipe:
    def slope(scalars: Tensor, y: Tensor, k: Tensor, *inputs: Tensor) -> tuple[()]:
        k.copy_(Slope(captured, layout.packing, inputs)(scalars[0], y))
        return ()

    return whole_program(*traced(slope, [layout.scalars(), layout.state(), layout.state()], {2}, captured))


def _step_graph(captured: Captured, layout: Layout) -> Recipe:
    s, scheme, ops = layout.stages, layout.scheme, layout.ops
    n_tolerances = len(layout.tolerance_tensors)

    def whole_step(scalars: Tensor, y: Tensor, k_first: Tensor, y1: Tensor, sums: Tensor, *more: Tensor) -> tuple[()]:
        slopes, tolerances, inputs = more[: s - 1], more[s - 1 : s - 1 + n_tolerances], more[s - 1 + n_tolerances :]
        h = scalars[s]
        f = Slope(captured, layout.packing, inputs)
        trial = step(f, ops, scheme, scalars[:s], y, h, k_first)  # type: ignore[arg-type]
        if trial.partial_error is not None:
            rtol, atol = tolerances or (scalars[s + 1], scalars[s + 2])
            k_last = trial.k[-1] if scheme.error_last != 0 else None
            segments = layout.tolerance.segments
            w = scheme.error_last * h
            sums.copy_(squared_error_ratios(trial.partial_error, k_last, w, y, trial.y1, rtol, atol, segments))
        y1.copy_(trial.y1)
        for to, k in zip(slopes, trial.k[1:], strict=True):
            to.copy_(k)
        return ()

    sums = torch.zeros(len(layout.tolerance.sizes), dtype=torch.float64, device="cpu")
    states = [layout.state() for _ in range(s + 2)]
    inputs = [layout.scalars(), *states[:3], sums, *states[3:], *layout.tolerance_tensors]
    return whole_program(*traced(whole_step, inputs, {3, 4, *range(5, 4 + s)}, captured))


def _transpose_graph(captured: Captured, layout: Layout, *, inside: bool) -> Recipe:
    s, scheme, ops = layout.stages, layout.scheme, layout.ops
    n_inside = s + 1 if inside else 0
    wanted = [x for x, w in zip(captured.inputs, captured.wants_gradient, strict=True) if w]
    n_wanted = len(wanted)

    def transpose(scalars: Tensor, y: Tensor, g: Tensor, g_y: Tensor, *more: Tensor) -> tuple[()]:
        of_slopes, grads, inputs = more[:n_inside], more[n_inside : n_inside + n_wanted], more[n_inside + n_wanted :]
        outputs: list[tuple[Sequence[float], Tensor]] = [(scheme.solution, g)]
        if inside:
            g_inside, *each = of_slopes
            outputs.append(((0.0,) * s, g_inside))
            outputs += [(tuple(float(i == j) for j in range(s)), g_i) for i, g_i in enumerate(each)]
        replay = Replayed(captured, layout.packing, inputs)
        pulled = step_vjp(replay, ops, scheme, scalars[:s], y, scalars[s], outputs)  # type: ignore[arg-type]
        # step_vjp adds the g of each pair (w, g) to the cotangent of the state. G_i belongs to a slope only.
        for g_i in of_slopes[1:]:
            pulled = pulled - g_i
        g_y.copy_(pulled)
        for to, grad in zip(grads, replay.grads, strict=True):
            if grad is not None:
                to.copy_(to + grad)
        return ()

    states = [layout.state() for _ in range(3 + n_inside)]
    grads = [torch.zeros_like(x) for x in wanted]
    inputs = [layout.scalars(), *states, *grads]
    first = 4 + n_inside
    return whole_program(*traced(transpose, inputs, {3, *range(first, first + n_wanted)}, captured))


def traced(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], written: set[int], captured: Captured
) -> tuple[fx.GraphModule, list[Tensor], int]:
    """Traces ``function`` of ``inputs`` followed by func's inputs into a functional graph.

    The graph ends with ``copy_`` to the inputs whose indices are ``written``. It comes with its inputs, and the number
    of those of func.

    Raises:
        CompileError: the graph draws random numbers, or changes another input.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    first = len(inputs)
    inputs = [*inputs, *captured.inputs]
    examples = [x.clone() for x in inputs]
    # Without this context, make_fx makes a new FakeTensorMode for each node, which takes longer than the rest of it.
    context = TracingContext(FakeTensorMode())
    with tracing(context), torch.enable_grad():  # the transpose differentiates, and func may
        graph = make_fx(function)(*examples)  # still contains autograd and in-place operations
    with tracing(context), torch.no_grad():
        graph = make_fx(torch.func.functionalize(graph), decomposition_table=decompositions())(*examples)
    placeholders = {node: i for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise CompileError(
                f"func needs {node.target}, which can draw random numbers, and a replay could not repeat them. "
                'Use engine="eager"; for dropout, func.eval() is enough.'
            )
        if node.target is torch.ops.aten.copy_.default and placeholders.get(node.args[0]) not in written:
            i = placeholders.get(node.args[0], 0) - first
            name = shown(captured.names[i]) if i >= 0 else "y"
            raise CompileError(
                f"func changes {name} in place and depends on it (a buffer such as the statistics of BatchNorm in "
                'training, or the state argument). Use engine="eager", or func.eval().'
            )
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, inputs, len(captured.inputs)
