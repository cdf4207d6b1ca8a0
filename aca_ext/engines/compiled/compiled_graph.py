"""func's traced graph, compiled by torch.compile's backend: its values, and its values with their autograd graph.

The graph is a function of time, state and the tensors that func reads, so its evaluations have no side effects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.inductor import LOCK
from aca_ext.engines.compiled.undisturbed import undisturbed
from aca_ext.errors import CompileError
from aca_ext.vector_field.field import AutocastState

_SETTINGS = {
    "compile_threads": 1,
    "emulate_precision_casts": True,  # rounds where func rounds
    "fallback_random": True,
    "freezing": False,  # parameters change between solves
    "max_autotune": False,
    "cpp_wrapper": False,
}


class UnsuitableError(CompileError):
    """A traced graph that should not be compiled, although it could be."""


class CompiledGraph:
    """Compiled functions of one traced graph, made at their first use.

    Attributes:
        records_always: values come from the function that records a graph, too, since those of the other function are
            rounded differently, or since func differentiates.
        is_checked: for values and for gradients, True if they were compared with those of func.
        seconds: for values and for gradients, the times of a compiled evaluation and of one of func.
    """

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._autocast = AutocastState("cpu")  # the guards of the traced graph include it
        self._functions: dict[tuple[bool, bool], Callable[..., Any]] = {}
        self.records_always = captured.differentiates
        self.is_checked = {False: False, True: False}
        self.seconds: dict[bool, tuple[float, float]] = {}

    def values(self, t: Tensor, y: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The components of the slope, without an autograd graph."""
        if self.records_always:
            leaves = [x.detach().requires_grad_() for x in y]
            return [k.detach() for k in self.with_graph(t.detach(), leaves, [x.detach() for x in inputs])]
        with torch.no_grad():
            return list(self._function(t, y, inputs, records=False)(*self._operands(t, y, inputs)))

    def with_graph(self, t: Tensor, y: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The components of the slope, with an autograd graph that can be differentiated once."""
        with torch.enable_grad():
            if self._captured.differentiates:  # the trace differentiates with respect to them
                t, *y = (x if x.requires_grad else x.detach().requires_grad_() for x in (t, *y))
            return list(self._function(t, y, inputs, records=True)(*self._operands(t, y, inputs)))

    def uncompiled(self, t: Tensor, y: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The components of the slope from the traced graph itself, whose autograd graph has all derivatives."""
        with torch.enable_grad(), self._autocast.restored():
            return list(self._captured.graph.forward(*self._operands(t, y, inputs)))

    def _operands(self, t: Tensor, y: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        of = {"t": (t,), "y": y, "input": inputs}
        return [of[kind][i] for kind, i in self._captured.roles]

    def _function(self, t: Tensor, y: Sequence[Tensor], inputs: Sequence[Tensor], records: bool) -> Callable[..., Any]:
        key = records, records and t.requires_grad
        function = self._functions.get(key)
        if function is None:
            wanted = self._captured.wants_gradient
            leaves = [x.detach().requires_grad_(records and w) for x, w in zip(inputs, wanted, strict=True)]
            y = [x.detach().requires_grad_(records) for x in y]
            operands = self._operands(t.detach().requires_grad_(key[1]), y, leaves)
            # Enabled for values, too, since func may differentiate inside (torch.func).
            with torch.enable_grad(), self._autocast.restored():
                function = self._functions[key] = _compiled(self._captured.graph, operands)
        return function


def _compiled(graph: fx.GraphModule, operands: Sequence[Tensor]) -> Callable[..., Any]:
    """Compiles a copy of the graph for operands like these.

    Raises:
        CompileError: torch's compiler fails.
    """
    try:
        with undisturbed(), LOCK, _inductor_settings():
            compiled = backend(fx.GraphModule(graph, copy.deepcopy(graph.graph)), list(operands))
            results = [k for k in compiled(*operands) if k.requires_grad]
            if results:  # torch compiles the transpose at its first use, which must be here
                wanted = [x for x in operands if x.requires_grad]
                torch.autograd.grad(results, wanted, [torch.zeros_like(k) for k in results], allow_unused=True)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise CompileError(f"torch's compiler failed on func: {type(error).__name__}: {message}") from error
    return compiled


def backend(graph: fx.GraphModule, operands: list[Tensor]) -> Callable[..., Any]:
    """The backend of ``torch.compile``; the function records an autograd graph if an operand requires grad."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, operands)  # type: ignore[return-value]


def _inductor_settings() -> Any:
    from torch._inductor import config

    return config.patch({name: value for name, value in _SETTINGS.items() if hasattr(config, name)})


def changes_or_draws(captured: Captured, t: Tensor, y: Sequence[Tensor], inputs: Sequence[Tensor]) -> str:
    """Evaluates the traced graph once; tells in words if it draws random numbers or changes what it reads, else ""."""
    of: dict[str, Sequence[Tensor]] = {
        "t": [t.detach().requires_grad_()],
        "y": [x.detach().clone().requires_grad_() for x in y],
        "input": [x.detach().requires_grad_() if x.requires_grad else x.clone() for x in inputs],
    }
    with undisturbed(), torch.enable_grad():
        before = torch.get_rng_state()
        try:
            captured.graph.forward(*(of[kind][i] for kind, i in captured.roles))
        except Exception as error:  # perhaps of func, which then raises it again when it runs uncompiled
            return f"an evaluation failed: {type(error).__name__}: {error}"
        if not torch.equal(torch.get_rng_state(), before):
            return "func draws random numbers, which compiled code draws differently"
    for name, x, copied in zip(captured.names, inputs, of["input"], strict=True):
        if not x.requires_grad and (copied._version or not torch.equal(copied, x)):
            return f"func changes {name} in place"
    return ""
