"""Choice of the traced function in a compiled solve: it must be valid for func in its present state."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from autograd_reference import relative_error
from problems import sample
from torch import Tensor, nn

from aca_ext import odeint
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import trace_table
from aca_ext.engines.compiled import tracing as capture
from aca_ext.engines.compiled.backend import Captured
from aca_ext.problem.state import Packing

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

TIMES = torch.tensor([0.0, 0.5], dtype=torch.float64)
FACTOR = 1.5
FACTORS = {"a": [1.0, 0.9]}


def outer(y: Tensor) -> Tensor:
    return -y


class Reads(nn.Module):
    """A func that reads every kind of value that a function can read."""

    RATE = 1.2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.register_buffer("shift", torch.ones(2).double())
        self.plain = torch.full((2,), 0.3).double()
        self.scale = 1.0
        self.settings: dict[str, Any] = {"x": [1.0, 0.7], "w": torch.ones(2).double()}

    def activation(self, x: Tensor) -> Tensor:
        return x.sin()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        z = self.activation(self.net(y)) * self.scale * self.settings["x"][1] * self.RATE * FACTOR * FACTORS["a"][0]
        return outer(z * 1.5 if self.training else z) * self.shift + self.plain * self.settings["w"]


def changes_of(func: Reads) -> dict[str, Callable[[], Any]]:
    """Functions that change ``func``, to be called in turn; if one returns a function, that undoes its change."""
    net, generator = func.net, torch.Generator().manual_seed(0)
    linear = net[0]
    assert isinstance(linear, nn.Linear)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def set_to(owner: Any, name: str, value: Any) -> Callable[[], Callable[[], None]]:
        def change() -> Callable[[], None]:
            before = getattr(owner, name)
            setattr(owner, name, value)
            return lambda: setattr(owner, name, before)

        return change

    module = sys.modules[__name__]
    hooks = nn.modules.module
    return {
        "nothing": lambda: None,
        "attribute": set_to(func, "scale", 0.5),
        "value in a dict": lambda: func.settings["x"].__setitem__(1, 0.1),
        "tensor in a dict": lambda: func.settings.__setitem__("w", random(2)),
        "attribute of the class": set_to(Reads, "RATE", 0.4),
        "global": set_to(module, "FACTOR", 0.7),
        "value in a global": lambda: FACTORS["a"].__setitem__(0, 0.6),
        "global function": set_to(module, "outer", lambda y: 0.1 * y),
        "code of a function": set_to(outer, "__code__", (lambda y: 0.2 * y).__code__),
        "method": set_to(Reads, "activation", lambda self, x: x.cos()),
        "method of the object": lambda: func.__dict__.__setitem__("activation", torch.tanh),
        "parameter in place": lambda: linear.weight.data.mul_(0.5),
        "data of a parameter": lambda: setattr(linear.weight, "data", random(3, 2)),
        "parameter": lambda: setattr(linear, "weight", nn.Parameter(random(3, 2))),
        "parameter laid out differently": lambda: setattr(linear, "weight", nn.Parameter(random(2, 3).t())),
        "data laid out differently": lambda: setattr(linear.weight, "data", random(3, 2)),
        "frozen parameter": lambda: linear.weight.requires_grad_(False),
        "buffer": lambda: setattr(func, "shift", random(2)),
        "buffer in place": lambda: func.shift.mul_(0.3),
        "tensor": lambda: setattr(func, "plain", random(2)),
        "two tensors that become one": lambda: setattr(func, "plain", func.shift),
        "module": lambda: net.__setitem__(1, nn.Sigmoid()),
        "further module": lambda: net.append(nn.Tanh()),
        "eval": lambda: func.eval(),
        "train": lambda: func.train(),
        "hook": lambda: net.register_forward_hook(lambda module, args, out: 0.3 * out).remove,
        "hook before": lambda: linear.register_forward_pre_hook(lambda module, args: (0.3 * args[0],)).remove,
        "hook of func": lambda: func.register_forward_hook(lambda module, args, out: 0.3 * out).remove,
        "forward of the object": lambda: setattr(net, "forward", lambda x: 0.9 * x),
        "forward": set_to(Reads, "forward", lambda self, t, y: FACTOR * y),
        "hook of all modules": lambda: (
            hooks.register_module_forward_hook(
                lambda module, args, out: 0.9 * out if isinstance(out, Tensor) else out
            ).remove
        ),
    }


def test_whatever_func_reads_may_change_between_solves() -> None:
    func, t, y = Reads(), torch.tensor(0.5).double(), sample(2, 2)

    def captured() -> tuple[Captured, Tensor]:
        graph, inputs = capture.capture(func, t, y, Packing.of(y), ())
        operands = {"t": [t], "y": [y], "input": inputs}
        (slope,) = graph.graph.forward(*(operands[kind][i] for kind, i in graph.roles))
        return graph, slope

    for name, change in changes_of(func).items():
        undo = change()
        graph, slope = captured()
        again, _ = captured()
        expected = func(t, y)
        if isinstance(undo, (types.FunctionType, types.MethodType)):
            undo()
        assert torch.allclose(slope, expected, rtol=1e-12, atol=0), name
        assert again is graph, name


def test_a_changed_hook_or_method_is_compiled_anew() -> None:
    func, y0, t = Reads(), sample(2, 2), torch.tensor([0.0, 0.5])
    for name in ("nothing", "hook", "method"):
        undo = changes_of(func)[name]()
        found = odeint(func, y0, t, method="euler", engine="compiled")
        expected = odeint(func, y0, t, method="euler")
        if undo is not None:
            undo()
        assert relative_error(found, expected) < 1e-12, name


def test_graphs_that_torch_gave_up_are_made_anew() -> None:
    func = Reads()
    expected = odeint(func, sample(2, 2), TIMES, method="euler", engine="compiled")
    kept = list(trace_table.table_of(func).kept or [])
    assert kept
    torch._dynamo.reset()
    assert all(graph.manager.cache_entry is None for graph in kept)
    assert torch.equal(odeint(func, sample(2, 2), TIMES, method="euler", engine="compiled"), expected)


def test_without_what_is_private_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_table, "_cache_entries", None)
    func = Reads()
    for scale in (1.0, 0.5, 0.5):
        func.scale = scale
        found = odeint(func, sample(2, 2), TIMES, method="euler", engine="compiled")
        assert relative_error(found, odeint(func, sample(2, 2), TIMES, method="euler")) < 1e-9
    assert trace_table.table_of(func).kept is None
