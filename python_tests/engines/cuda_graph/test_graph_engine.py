"""engine="graph" against the eager engine: equal steps and gradients.

On the CPU, a stand-in calls the bodies again instead of capturing them, which tests everything but the capture. The
same tests run on a GPU if there is one.
"""

from __future__ import annotations

import gc
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import RUNGE_KUTTA, LotkaVolterra, ThreeBody, VanDerPol
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aca_ext import METHODS, odeint, solve
from aca_ext.engines.cuda_graph import captures as programs
from aca_ext.engines.cuda_graph import engine, plan_cache
from aca_ext.engines.cuda_graph.control_block import ControlBlock
from aca_ext.engines.cuda_graph.operation_trace import Trace, TracedFunction
from aca_ext.engines.cuda_graph.plan import Plan
from aca_ext.errors import (
    ArgumentTypeError,
    GraphError,
    NonFiniteError,
    ReplayError,
    SlopeError,
    StepLimitError,
    StepSizeError,
)

ADAPTIVE = [name for name, method in METHODS.items() if method.adaptive]
FIXED = [name for name in RUNGE_KUTTA if not METHODS[name].adaptive]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")


class CalledAgain:
    """Stand-in for a captured program: a launch calls its body again."""

    def __init__(self, body: Callable[[], None]) -> None:
        self._body = body
        self.launches = 0

    def forget_body(self) -> None:
        del self._body

    def launch(self, times: int = 1) -> None:
        self.launches += times
        for _ in range(times):
            self._body()


class Caller:
    """Stand-in for the capturer. Its programs call their bodies a given number of times, or until the solve is done."""

    def __init__(self, made: list[CalledAgain]) -> None:
        self.made = made

    def capture(self, make_body: Callable[[], Callable[[], None]], reset: Callable[[], None]) -> CalledAgain:
        body = make_body()
        reset()
        body()
        reset()
        body()
        self.made.append(CalledAgain(body))
        return self.made[-1]

    def repeat(self, first: CalledAgain | None, body: CalledAgain, block: ControlBlock) -> Callable[[int], None]:
        def run(times: int) -> None:
            if first is not None:
                first.launch()
            body.launch(1 if programs.DEVICE_LOOPS else times)
            while programs.DEVICE_LOOPS and block.read().is_unfinished:
                body.launch()

        return run

    def in_order(self) -> Any:
        return nullcontext()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, made: list[CalledAgain]) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(engine, "DEVICES", ("cpu",))
        monkeypatch.setattr(engine, "capturer_for", lambda device: Caller(made))
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["launched ahead", "device loops"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "DEVICE_LOOPS", request.param)


@pytest.fixture
def made() -> list[CalledAgain]:
    return []


@pytest.fixture(autouse=True)
def _no_plans() -> Iterator[None]:
    yield
    plan_cache._by_owner.clear()


class Net(nn.Module):
    def __init__(self, size: int = 3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, size)).to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.inner(y * torch.cos(t))
        return result


def both_engines(func: Any, y0: Any, t: Tensor, **settings: Any) -> None:
    """Asserts that steps and outputs of both engines are equal bit for bit, and gradients within 1e-12."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    inputs = [x for x in (*parts, *settings.get("args", ())) if isinstance(x, Tensor) and x.requires_grad]
    inputs += list(func.parameters()) if isinstance(func, nn.Module) else []
    found: list[tuple[Any, list[Tensor]]] = []
    for name in ("eager", "graph"):
        solution = solve(func, y0, t, engine=name, **settings)
        ys = solution.y if isinstance(solution.y, tuple) else (solution.y,)
        loss = sum((y.abs().square() if y.is_complex() else y.sin()).sum() for y in ys)
        found.append((solution, list(torch.autograd.grad(loss, inputs)) if inputs else []))
    (one, grads), (other, others) = found
    assert torch.equal(one.steps, other.steps)
    for y, y_other in zip(*(s.y if isinstance(s.y, tuple) else (s.y,) for s in (one, other)), strict=True):
        assert torch.equal(y, y_other)
    if METHODS[settings.get("method", "dopri5")].fsal:
        assert one.stats.n_f_evals == other.stats.n_f_evals
    assert (one.stats.n_accepted, one.stats.n_rejected) == (other.stats.n_accepted, other.stats.n_rejected)
    assert other.stats.backend == "graph"
    tolerance = 1e-12 if parts[0].dtype in (torch.float64, torch.complex128) else 1e-4
    for grad, grad_other in zip(grads, others, strict=True):
        assert relative_error(grad_other, grad) <= tolerance


@pytest.mark.usefixtures("loops")
class TestAgainstEager:
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_adaptive_methods(self, device: str, method: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(net, y0, torch.tensor([0.0, 2.0]), method=method, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("method", [*FIXED, "dopri5"])
    def test_fixed_steps(self, device: str, method: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
        times = torch.tensor([0.0, 0.5, 1.25])
        both_engines(net, y0, times, method=method, options={"step_size": 0.1})

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_outputs_inside_steps(self, device: str, method: str) -> None:
        times = torch.linspace(0.0, 3.0, 41)
        both_engines(
            LotkaVolterra().to(device),
            torch.ones(2, dtype=torch.float64, device=device, requires_grad=True),
            times,
            method=method,
            rtol=1e-3,
            atol=1e-5,
        )

    @pytest.mark.parametrize(
        "options",
        [
            {"first_step": 0.01},
            {"step_t": [0.3, 1.7]},
            {"pcoeff": 0.2, "icoeff": 0.7, "dcoeff": 0.1},
            {"safety": 0.8, "ifactor": 3.0, "dfactor": 0.5, "max_step": 0.2},
            {"min_step": 0.02},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_options(self, device: str, options: dict[str, Any]) -> None:
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device, requires_grad=True)
        both_engines(VanDerPol(3.0).to(device), y0, torch.tensor([0.0, 2.0]), rtol=1e-5, atol=1e-7, options=options)

    def test_backward_in_time(self, device: str) -> None:
        y0 = torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(LotkaVolterra().to(device), y0, torch.tensor([1.0, 0.3, -2.0]), rtol=1e-6, atol=1e-8)

    def test_many_rejections(self, device: str) -> None:
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device, requires_grad=True)
        func = VanDerPol(20.0).to(device)
        settings: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6, "options": {"first_step": 5.0, "ifactor": 10.0}}
        assert solve(func, y0, torch.tensor([0.0, 3.0]), engine="graph", **settings).stats.n_rejected > 5
        both_engines(func, y0, torch.tensor([0.0, 3.0]), **settings)

    def test_float32(self, device: str) -> None:
        net = Net(dtype=torch.float32).to(device)
        both_engines(net, torch.randn(5, 3, device=device, requires_grad=True), torch.tensor([0.0, 1.0]), rtol=1e-5)

    def test_tuple_state(self, device: str) -> None:
        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return y[1].sum() * torch.ones_like(y[0]), -y[0].mean() * y[1] * t

        y0 = (
            torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True),
            torch.randn(5, dtype=torch.float64, device=device, requires_grad=True),
        )
        both_engines(func, y0, torch.tensor([0.0, 0.4, 1.0]), rtol=1e-5, atol=1e-7)

    def test_complex_state(self, device: str) -> None:
        y0 = torch.randn(3, dtype=torch.complex128, device=device, requires_grad=True)
        both_engines(lambda t, y: 1j * y * (1 + t), y0, torch.tensor([0.0, 2.0]), rtol=1e-6, atol=1e-8)

    def test_channels_last(self, device: str) -> None:
        conv = nn.Conv2d(3, 3, 3, padding=1).to(device=device, dtype=torch.float64)
        y0 = torch.randn(2, 3, 5, 5, dtype=torch.float64, device=device).contiguous(memory_format=torch.channels_last)
        y0.requires_grad_()
        times = torch.tensor([0.0, 0.5, 1.0])
        func = _Wrapped(conv)
        both_engines(func, y0, times, rtol=1e-4, atol=1e-6)
        assert solve(func, y0, times, engine="graph").y[0].is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0)])
    def test_small_states(self, device: str, shape: tuple[int, ...]) -> None:
        y0 = torch.ones(shape, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]))

    def test_args_and_closures(self, device: str) -> None:
        scale = torch.tensor([1.5], dtype=torch.float64, device=device, requires_grad=True)
        held = torch.tensor([0.5], dtype=torch.float64, device=device)
        y0 = torch.rand(3, dtype=torch.float64, device=device, requires_grad=True)

        def func(t: Tensor, y: Tensor, a: Tensor, n: int) -> Tensor:
            return -a * y**n + held

        both_engines(func, y0, torch.tensor([0.0, 1.0]), args=(scale, 2))

    def test_gather_and_scatter(self, device: str) -> None:
        source, target = (torch.tensor(x, device=device) for x in ([0, 1, 2, 2], [1, 2, 0, 1]))
        y0 = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
        func = lambda t, y: torch.zeros_like(y).index_add(0, target, torch.tanh(y[source])) - y[target[:3]]  # noqa: E731
        both_engines(func, y0, torch.tensor([0.0, 1.0]))

    def test_func_that_returns_its_input(self, device: str) -> None:
        y0 = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(lambda t, y: y, y0, torch.tensor([0.0, 0.7, 1.0]))

    def test_func_that_differentiates(self, device: str) -> None:
        class Hamiltonian(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.energy = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                with torch.enable_grad():
                    y = y if y.requires_grad else y.detach().requires_grad_()
                    (slope,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=True)
                return torch.stack([slope[..., 1], -slope[..., 0]], -1)

        y0 = torch.randn(5, 2, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(Hamiltonian().to(device).double(), y0, torch.tensor([0.0, 1.0]))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputed_in_the_backward_pass(self, device: str, reentrant: bool) -> None:
        net = Net().to(device)
        y0 = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
        grads = []
        for name in ("eager", "graph"):
            solved = partial(odeint, net, t=torch.tensor([0.0, 1.0]), engine=name)
            ys = checkpoint(solved, y0 * 1.0, use_reentrant=reentrant)
            ys.sin().sum().backward()
            grads.append([x.grad.clone() for x in (y0, *net.parameters())])
            for x in (y0, *net.parameters()):
                x.grad = None
        for one, other in zip(*grads, strict=True):
            assert relative_error(other, one) <= 1e-12

    def test_times_receive_gradients(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(3, dtype=torch.float64, device=device)
        grads = []
        for name in ("eager", "graph"):
            t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
            grads += torch.autograd.grad(odeint(net, y0, t, engine=name).sin().sum(), t)
        assert torch.allclose(*grads, rtol=1e-12, atol=0.0)

    def test_second_derivatives(self, device: str) -> None:
        func = LotkaVolterra().to(device)
        y0 = torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)
        seconds = []
        for name in ("eager", "graph"):
            y = odeint(func, y0, torch.tensor([0.0, 0.5]), engine=name)[-1]
            (g,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
            seconds.append(torch.autograd.grad(g.sin().sum(), [y0, func.p]))
        for one, other in zip(*seconds, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-300)

    def test_one_time(self, device: str) -> None:
        y0 = torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)
        y = odeint(LotkaVolterra().to(device), y0, torch.tensor([0.0]), engine="graph")
        assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], torch.ones_like(y0))


class _Wrapped(nn.Module):
    """A module that is called with y alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.inner(y)
        return result


class TestModules:
    @pytest.mark.parametrize(
        "inner",
        [
            lambda: nn.LayerNorm(6),
            lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()).eval(),
            lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).eval(),
            lambda: nn.GELU(),
        ],
        ids=["layer norm", "batch norm in eval", "dropout in eval", "no parameters"],
    )
    def test_layers(self, device: str, inner: Callable[[], nn.Module]) -> None:
        func = _Wrapped(inner()).to(device=device, dtype=torch.float64)
        func.train(not isinstance(func.inner, nn.Sequential))
        y0 = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(func, y0, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-6)

    def test_attention(self, device: str) -> None:
        class Attending(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                result: Tensor = self.attention(y, y, y, need_weights=False)[0]
                return result

        func = Attending().to(device=device, dtype=torch.float64)
        y0 = torch.randn(2, 5, 8, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(func, y0, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-6)

    def test_autocast(self, device: str) -> None:
        net = Net(dtype=torch.float32).to(device)
        y0 = torch.randn(4, 3, device=device, requires_grad=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            one, other = (
                solve(net, y0, torch.tensor([0.0, 1.0]), rtol=1e-2, atol=1e-2, engine=name)
                for name in ("eager", "graph")
            )
        assert torch.equal(one.y, other.y)
        grads = [torch.autograd.grad(s.y.sum(), [y0, *net.parameters()]) for s in (one, other)]
        for grad, grad_other in zip(*grads, strict=True):
            assert torch.allclose(grad, grad_other, rtol=1e-2, atol=1e-3)


class TestCaptures:
    T = torch.tensor([0.0, 1.0])

    def test_are_used_again(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(3, dtype=torch.float64, device=device)
        first = solve(net, y0, self.T, engine="graph")
        assert first.stats.compile_seconds > 0
        for other in (y0, y0 + 1, y0 * 2):
            solution = solve(net, other, self.T, engine="graph")
            assert solution.stats.compile_seconds == 0
            assert torch.equal(solution.y, solve(net, other, self.T).y)

    def test_other_times_need_no_capture(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(3, dtype=torch.float64, device=device)
        solve(net, y0, torch.tensor([0.0, 0.5, 1.0]), engine="graph")
        t = torch.tensor([2.0, 1.0, 0.5, -3.0])
        solution = solve(net, y0, t, engine="graph")
        assert solution.stats.compile_seconds == 0
        assert torch.equal(solution.y, solve(net, y0, t).y)

    def test_other_parts_of_a_tensor_need_none(self, device: str) -> None:
        rows = torch.randn(4, 3, dtype=torch.float64, device=device)
        func = lambda t, y, a: -a * y.view(3)  # noqa: E731
        for i, (y0, rate) in enumerate(zip(rows, rows.flip(0), strict=True)):
            solution = solve(func, y0, self.T, engine="graph", args=(rate,))
            assert (solution.stats.compile_seconds > 0) == (i == 0)
            assert torch.equal(solution.y, solve(func, y0, self.T, args=(rate,)).y)

    @pytest.mark.parametrize("holds", ["y0", "arg"])
    def test_tell_what_func_holds_from_what_it_is_given(self, device: str, holds: str) -> None:
        def solved(engine: str, y0: Tensor, arg: Tensor) -> Tensor:
            held = y0 if holds == "y0" else arg
            return odeint(lambda t, y, a: -y * a * held, y0, self.T, engine=engine, args=(arg,))

        for _ in range(3):
            given = torch.rand(2, 3, dtype=torch.float64, device=device).unbind(0)
            assert torch.equal(solved("graph", *given), solved("eager", *given))

    @pytest.mark.parametrize("twice", [False, True], ids=["", "create_graph"])
    def test_after_functional_call(self, device: str, twice: bool) -> None:
        class Solving(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.engine = Net(), "eager"

            def forward(self, y: Tensor) -> Tensor:
                return odeint(self.net, y, TestCaptures.T, engine=self.engine)[-1]

        model = Solving().to(device)
        y0 = torch.randn(2, 3, dtype=torch.float64, device=device)
        params = {name: (1.5 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        grads = []
        for model.engine in ("eager", "graph"):
            y = torch.func.functional_call(model, params, (y0,))
            grads.append(torch.autograd.grad(y.sum(), list(params.values()), create_graph=twice))
        for one, other in zip(*grads, strict=True):
            assert relative_error(other, one) <= 1e-12

    def test_an_arg_that_holds_tensors(self, device: str) -> None:
        rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
        y0 = torch.ones(3, dtype=torch.float64, device=device)
        for name in ("eager", "graph", "graph"):
            held = SimpleNamespace(rate=rate.view(3))  # a new tensor each time, on the same memory
            y = odeint(lambda t, y, held: -y * held.rate, y0, self.T, engine=name, args=(held,))[-1]
        (grad,) = torch.autograd.grad(y.sum(), rate)
        assert torch.allclose(grad, -torch.exp(-rate), rtol=1e-5)

    def test_a_solve_goes_without_the_garbage_collector(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        runs = list[weakref.ref[Any]]()
        made = engine._Run.forward

        def forward(run: Any, **settings: Any) -> Tensor:
            runs.append(weakref.ref(run))
            return made(run, **settings)

        monkeypatch.setattr(engine._Run, "forward", forward)
        net, y0 = Net().to(device), torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
        gc.collect()
        gc.disable()
        try:
            odeint(net, y0, self.T, engine="graph")
            odeint(net, y0, self.T, engine="graph").sum().backward()
            (grad,) = torch.autograd.grad(odeint(net, y0, self.T, engine="graph").sum(), y0, create_graph=True)
            del grad
            assert [run() for run in runs] == [None] * 3
        finally:
            gc.enable()

    def test_keep_nothing_of_an_evaluation(self, device: str) -> None:
        made = list[weakref.ref[Tensor]]()

        def func(t: Tensor, y: Tensor) -> Tensor:
            k = torch.tanh(2 * y)
            made.append(weakref.ref(k))
            return 3 * k

        y0 = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
        y = odeint(func, y0, self.T, engine="graph")
        assert y.requires_grad
        assert made
        assert not any(x() is not None for x in made)

    def test_see_parameters_updated_in_place(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(net, y0, self.T)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            solution = solve(net, y0, self.T, engine="graph")
            solution.y.square().sum().backward()
            assert solution.stats.compile_seconds == 0
            optimizer.step()
            both_engines(net, y0, self.T)

    @pytest.mark.parametrize("change", ["parameter", "data", "train", "number", "shape", "dtype", "autocast", "buffer"])
    def test_are_made_anew_where_func_changed(self, device: str, change: str) -> None:
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 3)
                self.number = 2.0
                self.register_buffer("buffer", torch.ones(3))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                k: Tensor = self.linear(y) * self.number * self.buffer
                return k if self.training else -k

        func = Changing().to(device)
        y0 = torch.randn(2, 3, device=device, requires_grad=True)
        both_engines(func, y0, self.T, rtol=1e-4)
        if change == "parameter":
            func.linear.weight = nn.Parameter(torch.randn(3, 3, device=device))
        elif change == "data":
            func.linear.weight.data = torch.randn(3, 3, device=device)
        elif change == "train":
            func.eval()
        elif change == "number":
            func.number = 3.0
        elif change == "shape":
            y0 = torch.randn(5, 3, device=device, requires_grad=True)
        elif change == "dtype":
            func, y0 = func.double(), y0.detach().double().requires_grad_()
        elif change == "buffer":
            func.buffer = torch.full((3,), 0.5, device=device)
        conditions: Any = torch.autocast(device, dtype=torch.bfloat16) if change == "autocast" else nullcontext()
        with conditions:
            both_engines(func, y0, self.T, rtol=1e-2 if change == "autocast" else 1e-4)

    def test_a_number_that_func_computes_is_seen(self, device: str) -> None:
        calls = [1.0]
        y0 = torch.ones(3, dtype=torch.float64, device=device)
        func = lambda t, y: -calls[0] * y  # noqa: E731
        for calls[0] in (1.0, 2.0, 1.0):
            assert torch.equal(solve(func, y0, self.T, engine="graph").y, solve(func, y0, self.T).y)

    def test_are_bounded(self, device: str) -> None:
        net = Net().to(device)
        for n in range(1, 20):
            solve(net, torch.ones(n, 3, dtype=torch.float64, device=device), self.T, engine="graph")
        assert len(plan_cache._by_owner.of(net)._plans) == plan_cache._MAX_PLANS

    def test_go_with_their_module(self, device: str, made: list[CalledAgain]) -> None:
        net = Net().to(device)
        y0 = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
        odeint(net, y0, self.T, engine="graph").sum().backward()
        assert len(plan_cache._by_owner) == 1
        for program in made:
            program.forget_body()  # the body holds func; a captured program would not need it any more
        del net
        gc.collect()
        assert len(plan_cache._by_owner) == 0

    def test_solves_between_forward_and_backward(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
        y1 = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
        grads = []
        for name in ("eager", "graph"):
            one, other = (odeint(net, y, self.T, engine=name) for y in (y0, y1))
            grads.append(torch.autograd.grad(one.square().sum() + other.sin().sum(), [y0, y1, *net.parameters()]))
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)

    def test_solves_with_other_args_between_forward_and_backward(self, device: str) -> None:
        y0 = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
        rates = [torch.full((3,), r, dtype=torch.float64, device=device, requires_grad=True) for r in (0.5, 2.0)]
        grads = []
        for name in ("eager", "graph"):
            one, other = (odeint(lambda t, y, r: -r * y * y, y0, self.T, engine=name, args=(r,)) for r in rates)
            grads.append(torch.autograd.grad(one.sum() + other.sin().sum(), [y0, *rates]))
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)

    def test_a_parameter_that_func_does_not_use_has_no_gradient(self, device: str) -> None:
        net = Net().to(device)
        net.unused = nn.Parameter(torch.ones(2, device=device))
        odeint(net, torch.ones(3, dtype=torch.float64, device=device), self.T, engine="graph").sum().backward()
        assert net.unused.grad is None
        assert net.inner[0].weight.grad is not None

    def test_a_parameter_that_is_frozen_later(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
        both_engines(net, y0, self.T)
        net.inner[0].requires_grad_(False)
        grads = []
        for name in ("eager", "graph"):
            inputs = [y0, *net.inner[2].parameters()]
            grads.append(torch.autograd.grad(odeint(net, y0, self.T, engine=name).sin().sum(), inputs))
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)

    def test_inference_mode(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.ones(3, dtype=torch.float64, device=device)
        expected = solve(net, y0, self.T).y
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                assert torch.equal(solve(net, y0, self.T, engine="graph").y, expected)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_saved_tensors_that_hooks_move(self, device: str, layout: torch.memory_format) -> None:
        conv = _Wrapped(nn.Conv2d(3, 3, 1)).to(device=device, dtype=torch.float64)
        y0 = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device).contiguous(memory_format=layout)
        y0.requires_grad_()

        def packed(x: Tensor) -> Tensor:
            kept = x.detach().contiguous().clone()
            if x.dim() == 5:  # a stack of states, which nothing else refers to
                x.data.fill_(math.nan)
            return kept

        grads = []
        for name in ("eager", "graph"):
            with torch.autograd.graph.saved_tensors_hooks(packed, Tensor.clone) if name == "graph" else nullcontext():
                y = odeint(conv, y0, self.T, engine=name)
            grads.append(torch.autograd.grad(y.sin().sum(), [y0, *conv.parameters()]))
        for one, other in zip(*grads, strict=True):
            assert relative_error(other, one) <= 1e-12

    def test_a_retained_graph_is_used_twice(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
        y = odeint(net, y0, self.T, engine="graph")
        first = torch.autograd.grad(y.sum(), y0, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(y.sum(), y0)[0])


def test_a_workspace_is_kept_once_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[torch.device]()
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool, device: nullcontext(kept.append(device)))
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 0)
    x = torch.full((3,), 2.0, requires_grad=True)
    with programs._Keeping(None, x.device):
        (grad,) = torch.autograd.grad(x.square().sum(), x)
    assert torch.equal(grad, 2 * x)
    assert kept == [x.device]


@pytest.mark.usefixtures("loops")
class Controlled(nn.Module):
    """A func that reads a buffer and another tensor of its own."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.5, -0.2, 0.3], dtype=dtype))
        self.register_buffer("gain", torch.ones(3, dtype=dtype))
        self.control = torch.tensor([1.0, 2.0, -1.0], dtype=dtype)

    def forward(self, t: Tensor, y: Any) -> Any:
        if isinstance(y, tuple):
            return -y[0], self.gain * self.p * y[1]
        return torch.tanh(self.p * y + self.control.to(y.device)) * self.gain


@pytest.mark.usefixtures("loops")
class TestReplays:
    """Replays after memory that func reads was overwritten between the passes."""

    @pytest.mark.parametrize("create_graph", [False, True])
    @pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.3, 0.4, 1.0]], ids=["at the end", "inside steps"])
    @pytest.mark.parametrize("change", ["buffer", "control", "data"])
    def test_overwritten_memory_is_found(
        self, device: str, change: str, times: list[float], create_graph: bool
    ) -> None:
        func = Controlled()
        func.control = func.control.to(device)
        func.to(device)
        y0 = torch.ones(4, 3, dtype=torch.float64, device=device, requires_grad=True)
        for _ in range(2):  # before and after the backward pass is captured
            y = odeint(func, y0, torch.tensor(times), engine="graph")
            torch.autograd.grad(y.sum(), y0, retain_graph=True, create_graph=create_graph)
            memory = {"buffer": func.gain, "control": func.control, "data": func.p.data}[change]
            before = memory.clone()
            memory.mul_(1 + 1e-11)
            is_seen_by_torch = create_graph and change != "data"  # the replay in Python compares versions
            message = "was written to between" if is_seen_by_torch else "did not repeat the forward pass"
            with pytest.raises(ReplayError, match=message):
                torch.autograd.grad(y.sum(), y0, retain_graph=True, create_graph=create_graph)
            memory.copy_(before)
            if not is_seen_by_torch:
                torch.autograd.grad(y.sum(), y0, create_graph=create_graph)

    def test_float32_and_a_small_component(self, device: str) -> None:
        func = Controlled(torch.float32).to(device)
        y0 = torch.full((2,), 1e6, device=device), torch.full((3,), 1e-3, device=device, requires_grad=True)
        y = odeint(func, y0, torch.tensor([0.0, 1.0]), engine="graph")
        torch.autograd.grad(y[1].sum(), y0[1], retain_graph=True)
        func.gain.mul_(1 + 1e-4)
        with pytest.raises(ReplayError):
            torch.autograd.grad(y[1].sum(), y0[1])

    def test_a_control_that_is_another_tensor_is_not_mistaken(self, device: str) -> None:
        grads = []
        for name in ("eager", "graph"):
            w = torch.tensor([0.7, -0.4], dtype=torch.float64, device=device, requires_grad=True)
            y = torch.tensor([0.5, 1.0], dtype=torch.float64, device=device)
            for k, values in enumerate(([1.0, 2.0], [-3.0, 0.5], [0.2, 0.1])):
                control = torch.tensor(values, dtype=torch.float64, device=device)
                func = lambda t, y, u=control: torch.tanh(w * y) * u  # noqa: B023, E731
                y = odeint(func, y, torch.tensor([k, k + 1.0]), engine=name)[-1]
            grads.append(torch.autograd.grad(y.sum(), w)[0])
        assert relative_error(*grads) <= 1e-12


class TestEarlyStart:
    """Launch of a solve like an earlier one while the host still checks that func is the same."""

    T = torch.tensor([0.0, 1.0])

    @pytest.fixture
    def looks(self, monkeypatch: pytest.MonkeyPatch, made: list[CalledAgain]) -> list[int]:
        """Number of launches at the time of each check of func."""
        found: list[int] = []
        look = TracedFunction.__call__

        def noted(self: TracedFunction, *args: Any) -> Any:
            found.append(sum(program.launches for program in made))
            return look(self, *args)

        monkeypatch.setattr(TracedFunction, "__call__", noted)
        return found

    @pytest.mark.parametrize("is_small", [True, False])
    def test_of_small_states(
        self, device: str, looks: list[int], made: list[CalledAgain], is_small: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if device != "cpu":
            pytest.skip("counts calls of bodies")
        if not is_small:
            monkeypatch.setattr("aca_ext.engines.cuda_graph.plan._SMALL", 0)
        net, y0 = Net(), torch.randn(3, dtype=torch.float64, requires_grad=True)
        both_engines(net, y0, self.T)
        before = sum(program.launches for program in made)
        solution = solve(net, y0, self.T, engine="graph")
        assert (looks[-1] > before) == is_small
        assert (looks[-1] == sum(program.launches for program in made)) == is_small
        assert torch.equal(solution.y, solve(net, y0, self.T).y)

    def test_of_one_layout_among_several(self, device: str, looks: list[int], made: list[CalledAgain]) -> None:
        if device != "cpu":
            pytest.skip("counts calls of bodies")
        net, states = Net(), [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5)]
        for y0 in states:
            solve(net, y0, self.T, engine="graph")
        for y0 in states:
            before = sum(program.launches for program in made)
            assert torch.equal(solve(net, y0, self.T, engine="graph").y, solve(net, y0, self.T).y)
            assert looks[-1] > before

    def test_is_made_up_for_where_another_solve_came_in_between(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        net = Net().to(device)
        y0, other = (torch.randn(3, dtype=torch.float64, device=device) for _ in range(2))
        expected = solve(net, y0, self.T)
        solve(net, y0, self.T, engine="graph")
        look, interruptions = TracedFunction.__call__, [lambda: solve(net, other, self.T, engine="graph")]

        def interrupted(self: TracedFunction, *args: Any) -> Any:
            if interruptions:
                thread = threading.Thread(target=interruptions.pop())
                thread.start()
                thread.join()
            return look(self, *args)

        monkeypatch.setattr(TracedFunction, "__call__", interrupted)
        found = solve(net, y0, self.T, engine="graph")
        assert not interruptions
        assert torch.equal(found.y, expected.y)
        assert torch.equal(found.steps, expected.steps)

    def test_not_where_what_func_holds_has_moved(self, device: str) -> None:
        net, y0 = Net().to(device), torch.randn(3, dtype=torch.float64, device=device)
        solve(net, y0, self.T, engine="graph")
        (plan,) = plan_cache._by_owner.of(net)._plans.values()
        assert plan.can_start_early()
        storage = net.inner[0].weight.untyped_storage()
        weight = net.inner[0].weight.detach().clone()
        storage.resize_(0)  # as libraries do that move parameters elsewhere for a time
        assert not plan.can_start_early()
        storage.resize_(weight.nbytes)
        net.inner[0].weight.data.copy_(weight)
        assert torch.equal(solve(net, y0, self.T, engine="graph").y, solve(net, y0, self.T).y)


@pytest.mark.usefixtures("loops")
class TestRoom:
    def test_grows(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aca_ext.engines.cuda_graph.plan._FIRST_STATES", 2)
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device, requires_grad=True)
        func = VanDerPol(2.0).to(device)
        t = torch.tensor([0.0, 1.0, 20.0])
        assert solve(func, y0, t, engine="graph", rtol=1e-8, atol=1e-10).stats.n_accepted > 400
        both_engines(func, y0, t, rtol=1e-8, atol=1e-10)

    def test_without_gradients(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aca_ext.engines.cuda_graph.plan._FIRST_STATES", 2)
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device)
        func, t = VanDerPol(2.0).to(device), torch.tensor([0.0, 20.0])
        with torch.no_grad():
            one, other = (solve(func, y0, t, engine=name) for name in ("eager", "graph"))
        assert torch.equal(one.y, other.y)
        assert torch.equal(one.steps, other.steps)

    def test_a_second_solve_knows_how_many_steps(self, device: str, made: list[CalledAgain]) -> None:
        if device != "cpu":
            pytest.skip("counts calls of bodies")
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
        func, t = VanDerPol(2.0), torch.tensor([0.0, 20.0])
        n_steps = solve(func, y0, t, engine="graph").stats.n_steps
        trials = made[1]
        before = trials.launches
        solve(func, y0, t, engine="graph")
        assert trials.launches - before == n_steps

    def test_is_what_a_solve_takes(self, device: str) -> None:
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device, requires_grad=True)
        func, t = VanDerPol(2.0).to(device), torch.tensor([0.0, 20.0])
        solve(func, y0, t, engine="graph")
        solution = solve(func, y0, t, engine="graph")
        saved = solution.y.grad_fn.saved_tensors  # type: ignore[union-attr, attr-defined]
        (block,) = (x for x in saved if x.dim() == 2)
        assert len(block) == solution.stats.n_accepted + 1
        assert block.untyped_storage().nbytes() == (len(block) + 1) * y0.nbytes


@pytest.mark.usefixtures("loops")
class TestFailures:
    def test_step_limit(self, device: str) -> None:
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device)
        self._same_error(StepLimitError, VanDerPol(5.0).to(device), y0, {"max_num_steps": 20})

    def test_step_size(self, device: str) -> None:
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device)
        self._same_error(StepSizeError, VanDerPol(500.0).to(device), y0, {"min_step": 0.05})

    def test_blow_up(self, device: str) -> None:
        self._same_error((StepSizeError, NonFiniteError), lambda t, y: y * y, torch.ones(1, device=device).double(), {})

    def test_nan_at_the_start(self, device: str) -> None:
        func = lambda t, y: (y - 2).sqrt()  # noqa: E731
        self._same_error(NonFiniteError, func, torch.ones(1, device=device).double(), {})

    def test_nan_from_some_time_on(self, device: str) -> None:
        func = lambda t, y: (0.5 - t).sqrt() * y  # noqa: E731
        self._same_error(NonFiniteError, func, torch.ones(1, device=device).double(), {})

    def _same_error(self, kind: Any, func: Any, y0: Tensor, options: dict[str, Any]) -> None:
        errors = []
        for name in ("eager", "graph"):
            with pytest.raises(kind) as raised:
                solve(func, y0, torch.tensor([0.0, 3.0]), engine=name, options=options)
            errors.append(raised.value)
        one, other = errors
        assert type(one) is type(other)
        # The eager engine makes one more step to find out whether the problem is stiff; the graph engine says "if".
        # Only the eager engine has the state at hand, and tells that it has grown.
        advice = r" (?:The problem looks|If the problem is) stiff| The largest element| \(t="
        first, second = (re.split(advice, str(error))[0] for error in errors)
        assert first == second
        assert (one.t, one.n_accepted, one.n_rejected) == (other.t, other.n_accepted, other.n_rejected)
        assert one.h == other.h or math.isnan(one.h)
        assert one.error_ratio == other.error_ratio or math.isnan(one.error_ratio)

    def test_a_wrong_shape_is_func_s_fault(self, device: str) -> None:
        with pytest.raises(SlopeError, match="shape"):
            solve(lambda t, y: y[:1], torch.ones(2, device=device), torch.tensor([0.0, 1.0]), engine="graph")

    def test_a_wrong_signature_too(self, device: str) -> None:
        with pytest.raises(ArgumentTypeError, match="func takes"):
            solve(lambda y: y, torch.ones(2, device=device), torch.tensor([0.0, 1.0]), engine="graph")


class TestRefusals:
    T = torch.tensor([0.0, 1.0])

    def test_states_elsewhere(self) -> None:
        with pytest.raises(GraphError, match="CUDA device; y0 is on cpu"):
            solve(lambda t, y: y, torch.ones(2), self.T, engine="graph")

    @pytest.mark.parametrize(
        ("func", "reason"),
        [
            (lambda t, y: y + torch.randn_like(y), "random numbers"),
            (lambda t, y: nn.functional.dropout(y, 0.5, training=True), "random numbers"),
            (lambda t, y: y.clone().bernoulli_(0.5, generator=torch.Generator(y.device)), "random numbers"),
            (lambda t, y: y if t < 0.5 else -y, "decides on the host"),
            (lambda t, y: y * float(y.sum()), "decides on the host"),
            (lambda t, y: y * len(y[y > 0]), "shape depends"),
            (lambda t, y: y * y.nonzero().shape[0], "shape depends"),
        ],
        ids=["randn", "dropout", "a generator", "branch on t", "float()", "mask", "nonzero"],
    )
    def test_functions(self, device: str, func: Any, reason: str) -> None:
        with pytest.raises(GraphError, match=reason):
            solve(func, torch.ones(2, device=device), self.T, engine="graph")

    def test_batch_norm_in_training(self, device: str) -> None:
        func = _Wrapped(nn.BatchNorm1d(3)).to(device)
        with pytest.raises(GraphError, match="changes"):
            solve(func, torch.randn(4, 3, device=device), self.T, engine="graph")

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x.add_(1),
            lambda x: torch.add(x, 1, out=x),
            lambda x: torch._foreach_add_([x], 1),
        ],
        ids=["in place", "out", "in a list"],
    )
    def test_a_tensor_that_func_changes(self, device: str, change: Callable[[Tensor], object]) -> None:
        counter = torch.zeros((), device=device)

        def func(t: Tensor, y: Tensor) -> Tensor:
            change(counter)
            return y * 1

        with pytest.raises(GraphError, match="changes a tensor that it holds"):
            solve(func, torch.randn(3, device=device), self.T, engine="graph")

    @pytest.mark.parametrize(
        "change",
        [
            lambda held, y: torch.mul(y, 2, out=held),
            lambda held, y: torch._foreach_add_([held], 1.0),
            lambda held, y: held.view(-1).copy_(y),
        ],
        ids=["out", "foreach", "view"],
    )
    def test_other_ways_to_change_one(self, device: str, change: Any) -> None:
        held = torch.zeros(3, device=device)

        def func(t: Tensor, y: Tensor) -> Tensor:
            change(held, y)
            return -y

        with pytest.raises(GraphError, match="changes a tensor that it holds"):
            solve(func, torch.randn(3, device=device), self.T, engine="graph")

    def test_a_solve_in_func(self, device: str) -> None:
        func = lambda t, y: odeint(lambda t, y: -y, y, self.T, engine="graph")[-1]  # noqa: E731
        with pytest.raises(GraphError, match="part of the func of another"):
            solve(func, torch.randn(3, device=device), self.T, engine="graph")

    def test_sparse_tensors(self, device: str) -> None:
        weights = torch.eye(3, device=device).to_sparse()
        with pytest.raises(GraphError, match=r"layout torch\.sparse_coo"):
            solve(lambda t, y: weights @ y, torch.randn(3, 2, device=device), self.T, engine="graph")

    @pytest.mark.parametrize(
        "func",
        [
            lambda y: torch.arange(3.0).to(y.device, non_blocking=True),
            lambda y: y[torch.arange(2)],
        ],
        ids=["to", "index"],
    )
    def test_copies_from_the_host(self, func: Callable[[Tensor], Tensor]) -> None:
        y = torch.empty(3, device="meta")  # for a trace, like any device other than the host
        with pytest.raises(GraphError, match="between the host and the device"), Trace([y]):
            func(y)

    def test_numbers_of_the_host_are_fine(self) -> None:
        y, held = torch.empty(3, device="meta"), torch.tensor([1.0, 2.0])
        keys = []
        for held[1] in (2.0, 3.0, 2.0):
            with Trace([y]) as trace:
                assert (y * held[1] + torch.tensor(0.5)).device == y.device
            keys.append(trace.key())
        assert keys[0] == keys[2] != keys[1]

    def test_a_func_that_is_another_each_time(self, device: str) -> None:
        calls = iter(range(100))
        with pytest.raises(GraphError, match="not do the same twice"):
            solve(lambda t, y: -y * next(calls), torch.ones(3, device=device), self.T, engine="graph")

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"gradient": "naive"}, "gradient"),
            ({"checkpoints": 3}, "checkpoints"),
            ({"callback": print}, "callback"),
            ({"progress": True}, "progress"),
            ({"options": {"batch": "independent"}}, "options"),
            ({"options": {"on_step_limit": "stop"}}, "options"),
            ({"options": {"jump_t": [0.5]}}, "jump_t"),
            ({"options": {"norm": torch.amax}}, "norm"),
            ({"rtol": torch.full((2, 3), 1e-3)}, "rtol"),
        ],
        ids=lambda x: str(x) if isinstance(x, str) else "",
    )
    def test_arguments(self, device: str, settings: dict[str, Any], reason: str) -> None:
        with pytest.raises(GraphError, match=reason):
            solve(lambda t, y: -y, torch.ones(2, 3, device=device), self.T, engine="graph", **settings)

    def test_a_body_that_launches_elsewhere(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program without effect, as if the kernels of its body had gone to another stream."""
        if device != "cpu":
            pytest.skip("a wrong program can be made for the stand-in only")
        monkeypatch.setattr(CalledAgain, "launch", lambda self, times=1: None)
        with pytest.raises(GraphError, match="stream of its own"):
            solve(Net(), torch.randn(3, dtype=torch.float64), self.T, engine="graph")

    def test_memory_replaced_before_the_backward_pass(self, device: str) -> None:
        net = Net().to(device)
        y0 = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
        torch.autograd.grad(odeint(net, y0, self.T, engine="graph").sum(), y0)
        y = odeint(net, y0, self.T, engine="graph")
        net.inner[0].weight.data = net.inner[0].weight.data.clone()
        with pytest.raises(Exception, match="was replaced"):
            y.sum().backward()


def test_three_bodies(device: str) -> None:
    if device != "cpu":
        pytest.skip("its func makes tensors on the CPU")
    y0 = torch.tensor(ThreeBody.START, dtype=torch.float64, requires_grad=True)
    both_engines(ThreeBody(), y0, torch.linspace(0.0, 0.5, 6), rtol=1e-5, atol=1e-5)


def test_plan_holds_no_func() -> None:
    """A plan in the cache must not keep its func alive."""
    assert not any("func" in name or "problem" in name for name in Plan.__init__.__code__.co_names)
