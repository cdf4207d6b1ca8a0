"""Programs of the step and its transpose, composed of calls of one compiled evaluation of func.

Inductor compiles one evaluation, not one for each stage. The functions of ``runge_kutta`` run once with operations that
record calls, on memory whose contents do not matter. The inputs of the programs are those of step_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.cpp_source import Call
from aca_ext.engines.compiled.evaluation_graphs import evaluation_graph, transposed_graphs
from aca_ext.engines.compiled.inductor import Recipe, Recorder, Wrapper, wrapper_of
from aca_ext.engines.compiled.step_graphs import Layout
from aca_ext.engines.compiled.sums import error_sums, weighted_sums
from aca_ext.errors import CompileError
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.operations import Floats, Tensors
from aca_ext.kernels.reference import Number
from aca_ext.solver.runge_kutta import step, step_vjp


class ComposedSteps:
    """The recipes of the programs of a traced func, which share its compiled evaluations."""

    def __init__(self, captured: Captured, layout: Layout) -> None:
        self._captured, self._layout = captured, layout

    @cached_property
    def _evaluation(self) -> _Compiled:
        return _Compiled(evaluation_graph(self._captured, self._layout))

    @cached_property
    def _transposed(self) -> _Transposed:
        return _Transposed(self._captured, self._layout)

    def slope(self) -> Recipe:
        layout = self._layout

        def record(recorder: Recorder, scalars: Tensor, y: Tensor, k: Tensor, *inputs: Tensor) -> None:
            self._evaluation(recorder, scalars[0], y, k, *inputs)

        return self._recipe(record, [layout.scalars(), layout.state(), layout.state()], inlines=True)

    def step(self) -> Recipe:
        layout, scheme, s = self._layout, self._layout.scheme, self._layout.stages
        n_tolerances = len(layout.tolerance_tensors)

        def record(recorder: Recorder, scalars: Tensor, y: Tensor, k_first: Tensor, y1: Tensor, sums: Tensor,
                   *more: Tensor) -> None:  # fmt: skip
            slopes, tolerances, inputs = more[: s - 1], more[s - 1 : s - 1 + n_tolerances], more[s - 1 + n_tolerances :]
            ops, h, to = _RecordedOperations(layout, recorder.calls), scalars[s], iter(slopes)

            def f(t: Tensor, y: Tensor) -> Tensor:
                k = next(to)
                self._evaluation(recorder, t, y, k, *inputs)
                return k

            trial = step(f, ops, scheme, scalars[:s], y, h, k_first, y1)  # type: ignore[arg-type]
            if trial.partial_error is not None:
                k_last = trial.k[-1] if scheme.error_last != 0 else None
                given = tolerances or (scalars[s + 1], scalars[s + 2])
                ops.add_error_sums(sums, trial.partial_error, k_last, scheme.error_last, h, (y, y1), given)

        sums = torch.zeros(len(layout.tolerance.sizes), dtype=torch.float64, device="cpu")
        states = [layout.state() for _ in range(s + 2)]
        return self._recipe(
            record, [layout.scalars(), *states[:3], sums, *states[3:], *layout.tolerance_tensors], inlines=True
        )

    def transpose(self, *, inside: bool) -> Recipe:
        layout, scheme, s = self._layout, self._layout.scheme, self._layout.stages
        n_inside = s + 1 if inside else 0
        wanted = [x for x, w in zip(self._captured.inputs, self._captured.wants_gradient, strict=True) if w]

        def record(recorder: Recorder, scalars: Tensor, y: Tensor, g: Tensor, g_y: Tensor, *more: Tensor) -> None:
            of_slopes, grads = more[:n_inside], more[n_inside : n_inside + len(wanted)]
            ops = _RecordedOperations(layout, recorder.calls)
            replay = _Replay(self._transposed, recorder, more[n_inside + len(wanted) :])
            sums = (of_slopes[0], of_slopes[1:]) if inside else None
            pulled = step_vjp(
                replay, ops, scheme, scalars[:s], y, scalars[s], [(scheme.solution, g)], inside=sums  # type: ignore[arg-type]
            )  # fmt: skip
            ops.weighted_sum(pulled, 1.0, [], (), g_y)
            for i, parts in replay.grads.items():
                recorder.calls.append(weighted_sums([(grads[i], grads[i], [1.0] * len(parts))], 1.0, parts))

        states = [layout.state() for _ in range(3 + n_inside)]
        return self._recipe(record, [layout.scalars(), *states, *(torch.zeros_like(x) for x in wanted)], inlines=False)

    def _recipe(self, record: Callable[..., None], inputs: Sequence[Tensor], *, inlines: bool) -> Recipe:
        inputs = [*inputs, *self._captured.inputs]

        def calls() -> list[Call]:
            recorder = Recorder()
            record(recorder, *inputs)
            return recorder.calls

        return Recipe(calls, inputs, len(self._captured.inputs), inlines)


class _Compiled:
    """A graph that is compiled when it is first run."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._wrapper: Wrapper | None = None

    def __call__(self, recorder: Recorder, *inputs: Tensor) -> Sequence[Tensor]:
        if self._wrapper is None:
            self._wrapper = wrapper_of(self._graph, inputs)
        return recorder.run(self._wrapper, inputs)


class _Transposed:
    """The compiled graphs of the transposed evaluation of func, see ``transposed_graphs``."""

    def __init__(self, captured: Captured, layout: Layout) -> None:
        found = transposed_graphs(captured, layout)
        self.like, self.is_differentiable = layout.like, found.has_v or bool(found.wanted)
        self.replay, self._pull = _Compiled(found.replay), _Compiled(found.pull)
        self._has_v, self._wanted = found.has_v, found.wanted
        grads = [torch.zeros_like(x) for x, w in zip(captured.inputs, captured.wants_gradient, strict=True) if w]
        self._strides = [layout.state().stride()] * found.has_v + [grads[i].stride() for i in found.wanted]

    def pull(self, recorder: Recorder, *inputs: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The cotangent of the state, None if it is zero, and the gradients that are not zero."""
        results = list(self._pull(recorder, *inputs))
        if [x.stride() for x in results] != self._strides:
            raise CompileError("Inductor returns gradients in another layout.")
        v = results.pop(0) if self._has_v else None
        return v, dict(zip(self._wanted, results, strict=True))


class _Replay:
    """func with its transpose for ``step_vjp``; ``grads`` are the gradients of each stage."""

    def __init__(self, transposed: _Transposed, recorder: Recorder, inputs: Sequence[Tensor]) -> None:
        self._transposed, self._recorder, self._inputs = transposed, recorder, inputs
        self._saved: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}  # by address of the slope: time, for the pull
        self.grads: dict[int, list[Tensor]] = {}
        self._pulled: list[_Pulled] = []  # held, so that ``own_result`` copies them by ``clone``
        self.fastest = self

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        k = torch.empty_like(self._transposed.like)
        self._saved[id(k)] = t, self._transposed.replay(self._recorder, t, y.detach(), k, *self._inputs)
        return k.requires_grad_(self._transposed.is_differentiable)

    def pull_back(self, y: Tensor, k: Tensor, grad_k: Tensor) -> Any:
        t, saved = self._saved[id(k)]
        operands = t, y.detach(), k.detach(), grad_k, *self._inputs, *saved
        v, grads = self._transposed.pull(self._recorder, *operands)
        for i, grad in grads.items():
            self.grads.setdefault(i, []).append(grad)
        if v is None:
            return None
        self._pulled.append(_Pulled(v))
        return self._pulled[-1]


class _Pulled:
    """A result of ``pull_back`` that cannot be copied: ``own_result`` would copy a tensor, without recording it."""

    def __init__(self, v: Tensor) -> None:
        self.v = v

    def clone(self) -> _Pulled:
        return self


class _RecordedOperations(TorchOperations):
    """Operations that record calls of kernels, on states of one layout without gaps."""

    def __init__(self, layout: Layout, calls: list[Call]) -> None:
        super().__init__(layout.like, layout.tolerance)
        self._calls = calls

    def admit(self, x: Any, what: str = "") -> Tensor:
        return x.v if isinstance(x, _Pulled) else x

    def scalars(self, values: Sequence[Number]) -> Sequence[Tensor]:
        assert isinstance(values, Tensor)
        return values.unbind()

    def weighted_sum(self, base: Tensor | None, h: Number, x: Tensors, w: Floats, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(self.like) if out is None else out
        self._calls.append(weighted_sums([(out, base, w)], h, x))
        return out

    def solution_and_error(
        self, y: Tensor, h: Number, k: Tensors, b: Floats, error_weight: Floats, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        out, error = torch.empty_like(self.like) if out is None else out, torch.empty_like(self.like)
        self._calls.append(weighted_sums([(out, y, b), (error, None, error_weight)], h, k))
        return out, error

    def add_error_sums(
        self, sums: Tensor, partial: Tensor, k: Tensor | None, w: float, h: Tensor, ends: tuple[Tensor, Tensor],
        tolerances: Sequence[Tensor],
    ) -> None:  # fmt: skip
        rtol, atol = tolerances
        self._calls.append(error_sums(sums, partial, k, w, h, ends, (rtol, atol), self.tolerance.segments))
