"""Models that hold a solve under torch.jit.trace, torch.jit.script, torch.export and torch.fx: right or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import CoupledMlp, DrivenMlp, Mlp, sample
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import aca_ext
from aca_ext import errors

# Every call of torch.jit warns that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TIMES = (0.0, 0.3, 1.0)
HAS_EXPORTING = hasattr(torch.compiler, "is_exporting")
FIXED: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4"},
    "dopri5": {"method": "dopri5", "options": {"step_size": 0.25}},
    "euler, compiled engine": {"method": "euler", "options": {"step_size": 0.1}, "engine": "compiled"},
    "adjoint": {"method": "heun2", "options": {"step_size": 0.1}, "gradient": "adjoint"},
}


class Solve(nn.Module):
    """nn.Module that solves from its inputs by odeint."""

    def __init__(self, func: Callable[..., Any], n_parts: int = 1, **call: Any) -> None:
        super().__init__()
        self.func, self.n_parts, self.call = func, n_parts, call

    def forward(self, *inputs: Tensor) -> Any:
        y0, args = inputs[: self.n_parts], inputs[self.n_parts :]
        return aca_ext.odeint(self.func, y0 if self.n_parts > 1 else y0[0], TIMES, args=args, **self.call)


def exported(model: nn.Module, inputs: tuple[Tensor, ...], **call: Any) -> nn.Module:
    return torch.export.export(model, inputs, strict=False, **call).module()


def traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    return torch.jit.trace(model, inputs, check_trace=False)


RECORDERS = [
    traced,
    pytest.param(exported, marks=pytest.mark.skipif(not HAS_EXPORTING, reason="this torch does not tell")),
]


@pytest.mark.parametrize("record", RECORDERS)
class TestFixedSteps:
    @pytest.mark.parametrize("name", FIXED)
    def test_value_and_gradient_for_another_input(self, name: str, record: Any) -> None:
        layer = aca_ext.NeuralODE(Mlp(), TIMES, output="all", **FIXED[name])
        eager = aca_ext.NeuralODE(
            layer.func, TIMES, output="all", **FIXED[name] | {"engine": "eager", "gradient": "aca"}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            model = record(layer, (sample(2, 3),))
        found = []
        for m in (model, eager):
            x = sample(2, 3, seed=1).requires_grad_()
            y = m(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_tuple_state_with_an_arg_that_is_an_input(self, record: Any) -> None:
        class Field(CoupledMlp):
            def forward(self, t: Tensor, y: Any, rate: Tensor) -> Any:
                return tuple(rate * k for k in super().forward(t, y))

        model = Solve(Field(), n_parts=2, method="rk4")
        recorded = record(model, (sample(4, 3), sample(3), sample(1)))
        inputs = sample(4, 3, seed=1), sample(3, seed=2), sample(1, seed=3)
        for one, other in zip(recorded(*inputs), model(*inputs), strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_complex_state_not_dense_in_memory(self, record: Any) -> None:
        class Rotate(nn.Module):
            def forward(self, y: Tensor) -> Tensor:
                return aca_ext.odeint(lambda t, y: 1j * t * y, y[:, ::2], TIMES, method="rk4")

        y = torch.complex(sample(4, 4), sample(4, 4, seed=1))
        found = record(Rotate(), (y,))(2j * y)
        torch.testing.assert_close(found, Rotate()(2j * y), rtol=1e-12, atol=1e-14)

    def test_without_gradients(self, record: Any) -> None:
        layer = aca_ext.NeuralODE(Mlp(), TIMES, method="rk4")
        with torch.no_grad():
            found = record(layer, (sample(2, 3),))(sample(2, 3, seed=1))
            assert relative_error(found, layer(sample(2, 3, seed=1))) <= 1e-12


@pytest.mark.parametrize("record", RECORDERS)
class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "match"),
        [
            ({}, "adaptive steps .*step_size"),
            ({"method": "tsit5"}, "adaptive steps"),
            ({"engine": "compiled"}, "adaptive steps"),
            ({"options": {"batch": "independent"}}, 'batch="independent"'),
            ({"method": "rk4", "callback": print}, "callback"),
        ],
    )
    def test_of_steps_that_are_of_the_example(self, call: dict[str, Any], match: str, record: Any) -> None:
        with pytest.raises(errors.ArgumentValueError, match=match):
            record(aca_ext.NeuralODE(Mlp(), **call), (sample(2, 3),))

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_of_adaptive_steps_whatever_the_gradient(self, gradient: str, needs_grad: bool, record: Any) -> None:
        with torch.set_grad_enabled(needs_grad), pytest.raises(errors.ArgumentValueError, match="adaptive steps"):
            record(aca_ext.NeuralODE(Mlp(), gradient=gradient), (sample(2, 3),))

    @pytest.mark.parametrize("make", [lambda t: t, lambda t: 2 * t, lambda t: torch.linspace(0, 1, 3) * t[1]])
    def test_of_times_that_are_inputs(self, make: Any, record: Any) -> None:
        class Model(nn.Module):
            def forward(self, y: Tensor, t: Tensor) -> Tensor:
                return aca_ext.odeint(lambda t, y: -y, y, make(t), method="rk4")

        with pytest.raises(errors.ArgumentTypeError, match="t is"):
            record(Model(), (sample(2, 3), torch.tensor([0.0, 1.0])))


class TestTrace:
    def test_takes_another_batch_size(self) -> None:
        layer = aca_ext.NeuralODE(DrivenMlp(), TIMES, method="rk4")
        model = torch.jit.trace(Solve(Mlp(), method="rk4"), sample(2, 3))
        assert model(sample(5, 3)).shape == (3, 5, 3)
        assert layer.stats is None

    @pytest.mark.parametrize("hold", [lambda t: t, nn.Parameter])
    def test_times_held_by_the_layer_or_made_in_it(self, hold: Any) -> None:
        t = torch.tensor(TIMES, dtype=torch.float64)
        layer = aca_ext.NeuralODE(Mlp(), hold(t).requires_grad_(False), method="rk4")
        y = sample(2, 3)
        assert relative_error(torch.jit.trace(layer, y)(2 * y), layer(2 * y)) <= 1e-12

        def model(y: Tensor) -> Tensor:
            return aca_ext.odeint(lambda t, y: -t * y, y, torch.linspace(0, 1, 5).to(y), method="rk4")

        assert relative_error(torch.jit.trace(model, y)(2 * y), model(2 * y)) <= 1e-12

    def test_refuses_learnt_times_and_step_sizes(self) -> None:
        t = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))
        with pytest.raises(errors.ArgumentTypeError, match="requires grad"):
            torch.jit.trace(aca_ext.NeuralODE(Mlp(), t, method="rk4"), sample(2, 3))

        def model(y: Tensor) -> Tensor:
            return aca_ext.odeint(lambda t, y: -y, y, TIMES, method="rk4", options={"step_size": y[0, 0].abs()})

        with pytest.raises(errors.ArgumentTypeError, match="option step_size"):
            torch.jit.trace(model, sample(2, 3))

    def test_func_keeps_the_warnings_of_the_tracer(self) -> None:
        with pytest.warns(torch.jit.TracerWarning):
            torch.jit.trace(lambda y: aca_ext.odeint(lambda t, y: -y if y.sum() > 0 else y, y, TIMES, method="rk4"),
                            sample(2, 3), check_trace=False)  # fmt: skip

    def test_leaves_solves_outside_as_they_are(self) -> None:
        layer, y = aca_ext.NeuralODE(Mlp(), method="rk4"), sample(2, 3)
        expected = layer(y)
        torch.jit.trace(layer, y)
        assert torch.equal(layer(y), expected)
        assert layer.stats is not None
        assert layer.stats.backend == "cpu"


@pytest.mark.skipif(not HAS_EXPORTING, reason="this torch does not tell")
def test_export_with_a_symbolic_batch_size() -> None:
    batch = ({0: torch.export.Dim("batch")},)
    layer = aca_ext.NeuralODE(Mlp(), TIMES, method="rk4")
    found = exported(layer, (sample(4, 3),), dynamic_shapes=batch)(sample(7, 3))
    assert relative_error(found, layer(sample(7, 3))) <= 1e-12
    pair = Solve(lambda t, y: (-y[1], t * y[0]), n_parts=2, method="rk4")
    inputs = sample(7, 3), sample(7, 3, seed=1)
    model = exported(pair, (sample(4, 3), sample(4, 3)), dynamic_shapes={"inputs": batch * 2})
    for one, other in zip(model(*inputs), pair(*inputs), strict=True):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str) -> None:
    def solve(y: Tensor, **call: Any) -> Tensor:
        return aca_ext.odeint(lambda t, y: torch.tanh(t * y), y, TIMES, **call)

    recorded = make_fx(lambda y: solve(y, method="rk4"), tracing_mode=mode)(sample(2, 3))
    y = sample(2, 3, seed=1)
    assert relative_error(recorded(y), solve(y, method="rk4")) <= 1e-12
    with pytest.raises(errors.ArgumentValueError, match="adaptive steps"):
        make_fx(solve, tracing_mode=mode)(sample(2, 3))
    with pytest.raises(errors.ArgumentTypeError, match="t is a tensor"):
        make_fx(lambda y, t: aca_ext.odeint(lambda t, y: -y, y, t, method="rk4"), tracing_mode=mode)(
            y, torch.arange(3.0)
        )


def test_modes_that_record_nothing_leave_solves_as_they_are() -> None:
    with FlopCounterMode(display=False):
        assert aca_ext.solve(Mlp(), sample(2, 3), TIMES).stats.backend == "cpu"


@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.Sequential])
def test_script_is_refused(wrap: Any) -> None:
    with pytest.raises(errors.ArgumentTypeError, match=r"torch\.jit\.script cannot compile a solve"):
        torch.jit.script(wrap(aca_ext.NeuralODE(Mlp(), method="rk4")))


def test_symbolic_trace_is_refused() -> None:
    with pytest.raises(errors.ArgumentTypeError, match="symbolic_trace"):
        torch.fx.symbolic_trace(aca_ext.NeuralODE(Mlp(), method="rk4"))
