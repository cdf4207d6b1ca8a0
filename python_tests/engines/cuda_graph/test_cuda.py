"""Solves on a GPU: waits, streams, captures, devices, and growth of memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from operands import on_cuda
from torch import Tensor, nn

from aca_ext import odeint, solve
from aca_ext.engines.cuda_graph import captures as programs
from aca_ext.engines.cuda_graph import plan_cache
from aca_ext.engines.cuda_graph.control_block import supports_device_loops
from aca_ext.errors import GraphError

T = torch.tensor([0.0, 1.0])
MIB = 1 << 20
WAIT = "called a synchronizing CUDA operation"
both_engines = pytest.mark.parametrize("engine_name", ["eager", "graph"])
both_loops = pytest.mark.parametrize("device_loops", [False, True], ids=["launched ahead", "device loops"])


class Net(nn.Module):
    def __init__(self, size: int = 3, device: str = "cuda") -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, size)).to(device)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.inner(y * torch.cos(t))
        return result


@pytest.fixture(autouse=True)
def _no_plans() -> Iterator[None]:
    yield
    plan_cache._by_owner.clear()


@contextmanager
def waits_are(mode: str) -> Iterator[list[str]]:
    """Records each wait of the host for the GPU inside PyTorch ("warn"), or raises an error there ("error")."""
    noted: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # setting the mode warns that it sees only PyTorch's waits
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield noted
        finally:
            torch.cuda.set_sync_debug_mode("default")
    noted += [str(w.message) for w in caught if WAIT in str(w.message)]


def start(rows: int = 4, size: int = 3, device: str = "cuda") -> Tensor:
    return torch.randn(rows, size, device=device).requires_grad_()


@on_cuda
class TestWaits:
    def test_are_seen(self) -> None:
        x = torch.ones(3, device="cuda")
        with waits_are("warn") as noted:
            x.sum().item()
            x.cpu()
        assert len(noted) == 2

    def test_none_in_fixed_steps_but_one_in_the_backward_pass(self) -> None:
        net, y0 = Net(), start()
        options = {"step_size": 0.1}
        odeint(net, y0, T, method="rk4", options=options).sum().backward()
        torch.cuda.synchronize()
        with waits_are("error"):
            loss = odeint(net, y0, T, method="rk4", options=options).sum()
        with waits_are("warn") as noted:
            loss.backward()
        assert len(noted) <= 1  # for the comparison of all steps with the forward pass

    def test_one_for_each_trial_of_adaptive_steps(self) -> None:
        net, y0, t = Net(), start(), torch.tensor([0.0, 0.7, 5.0])
        solve(net, y0, t)
        with waits_are("warn") as noted:
            solution = solve(net, y0, t, rtol=1e-6, atol=1e-6)
        assert solution.stats.n_steps > 10
        assert len(noted) <= solution.stats.n_steps + 3  # three norms for the first step

    def test_one_in_an_adaptive_backward_pass(self) -> None:
        net, y0 = Net(), start()
        odeint(net, y0, T).sum().backward()
        loss = odeint(net, y0, T).sum()
        torch.cuda.synchronize()
        with waits_are("warn") as noted:
            loss.backward()
        assert len(noted) <= 1

    @both_loops
    @pytest.mark.parametrize(
        "settings", [{"rtol": 1e-6, "atol": 1e-6}, {"method": "rk4", "options": {"step_size": 0.1}}]
    )
    def test_as_many_in_a_long_graph_solve_as_in_a_short_one(
        self, device_loops: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(programs, "DEVICE_LOOPS", device_loops)
        net, y0 = Net(), start()
        found = []
        for end in (1.0, 20.0):
            t = torch.tensor([0.0, end])
            for _ in range(2):
                odeint(net, y0, t, engine="graph", **settings).sum().backward()
            with waits_are("warn") as noted:
                solution = solve(net, y0, t, engine="graph", **settings)
            found.append((len(noted), solution.stats.n_steps))
            with waits_are("warn") as noted:
                solution.y.sum().backward()
            assert len(noted) <= 1
        (short, few), (long, many) = found
        assert many > 2 * few
        assert short == long <= 2  # the control block, and the record of steps


@on_cuda
class TestStreams:
    @both_engines
    def test_a_side_stream(self, engine_name: str) -> None:
        net, y0 = Net(), start()
        expected = self._solved(net, y0, engine_name)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = (y0.detach() * 1).requires_grad_()  # ready only after the stream has slept
            found = self._solved(net, late, engine_name)
        stream.synchronize()
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)

    @both_engines
    def test_two_streams_in_turn(self, engine_name: str) -> None:
        net = Net()
        starts = [start() for _ in range(10)]
        expected = [self._solved(net, y0, engine_name) for y0 in starts]
        torch.cuda.synchronize()
        streams, found = (torch.cuda.Stream(), torch.cuda.Stream()), []
        for i, y0 in enumerate(starts):
            with torch.cuda.stream(streams[i % 2]):
                found.append(self._solved(net, y0, engine_name))
        torch.cuda.synchronize()
        for ones, others in zip(expected, found, strict=True):
            for one, other in zip(ones, others, strict=True):
                assert torch.equal(one, other)

    def test_two_funcs_on_two_streams_do_not_share_what_they_work_in(self) -> None:
        nets = [Net(64), Net(64)]
        y0 = start(256, 64)
        settings: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.02}, "engine": "graph"}
        expected = [odeint(net, y0, T, **settings) for net in nets]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in nets]
        for _ in range(5):
            found = []
            for net, stream in zip(nets, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(odeint(net, y0, T, **settings))
            torch.cuda.synchronize()
            for one, other in zip(expected, found, strict=True):
                assert torch.equal(one, other)

    def _solved(self, net: nn.Module, y0: Tensor, engine_name: str) -> list[Tensor]:
        y = odeint(net, y0, T, engine=engine_name, rtol=1e-6, atol=1e-6)
        grads = torch.autograd.grad(y.square().sum(), [y0, *net.parameters()])
        return [y.detach(), *grads]  # without the autograd graph, whose nodes belong to this stream


@on_cuda
class TestMemory:
    @pytest.mark.parametrize(("engine_name", "solves_of_a_shape"), [("eager", 1), ("graph", 25)])
    def test_does_not_grow_with_solves_of_changing_shapes(self, engine_name: str, solves_of_a_shape: int) -> None:
        net, allocated = Net(), []
        for i in range(1000):
            rows = 1 + (i // solves_of_a_shape) % 40
            odeint(net, start(rows), T, engine=engine_name, rtol=1e-2, atol=1e-2).sum().backward()
            if i in (499, 999):
                gc.collect()
                torch.cuda.synchronize()
                allocated.append(torch.cuda.memory_allocated())
        assert allocated[1] - allocated[0] <= MIB

    def test_of_a_graph_goes_with_its_func(self) -> None:
        odeint(Net(), start(50_000), T, engine="graph").sum().backward()  # libraries such as cuBLAS keep some memory
        gc.collect()
        before = torch.cuda.memory_allocated()
        net = Net()
        odeint(net, start(50_000), T, engine="graph").sum().backward()
        assert torch.cuda.memory_allocated() - before > MIB
        del net
        gc.collect()
        assert torch.cuda.memory_allocated() - before <= MIB // 4
        assert not plan_cache._by_owner


@on_cuda
class TestDeviceLoops:
    @pytest.mark.parametrize(
        "settings",
        [
            {"rtol": 1e-6, "atol": 1e-6},
            {"rtol": 1e-6, "atol": 1e-6, "method": "tsit5"},
            {"options": {"step_size": 0.1}},
        ],
        ids=["dopri5", "tsit5", "fixed"],
    )
    @pytest.mark.parametrize("times", [[0.0, 5.0], [0.0, 0.3, 2.2, 5.0]], ids=["end", "outputs"])
    def test_equal_launched_ahead(
        self, settings: dict[str, Any], times: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not supports_device_loops() or not programs._keeps_graphs():
            pytest.skip("needs CUDA 12.4 in the build and the driver, and torch 2.8")
        net, y0, found = Net(), start(), []
        for device_loops in (False, True):
            monkeypatch.setattr(programs, "DEVICE_LOOPS", device_loops)
            for _ in range(2):
                solution = solve(net, y0, torch.tensor(times), engine="graph", **settings)
                grads = torch.autograd.grad(solution.y.square().sum(), [y0, *net.parameters()])
                found.append([solution.y, solution.steps, *grads])
        plans = list(plan_cache._by_owner.of(net)._plans.values())
        for repeats in ([plan._solve for plan in plans], [plan._transpose for plan in plans]):
            assert [getattr(repeat, "obstacle", "a loop") for repeat in repeats] == ["", "a loop"]
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@on_cuda
class TestCaptures:
    def test_a_solve_in_a_capture_of_the_user_is_refused(self) -> None:
        net, y0 = Net(), start()
        x = torch.zeros(3, device="cuda")
        odeint(net, y0, T, engine="graph")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
            with pytest.raises(GraphError, match="part of another capture"):
                odeint(net, y0, T, engine="graph")
        graph.replay()
        assert torch.equal(x, torch.ones_like(x))

    @pytest.mark.parametrize("fails_in", ["forward", "backward"])
    def test_one_that_fails_leaves_nothing_behind(self, fails_in: str) -> None:
        func = _Waits() if fails_in == "forward" else _WaitsBackward()
        good, y0 = Net(), start()
        stream = torch.cuda.current_stream()
        for _ in range(2):
            with pytest.raises(GraphError, match="captured"):
                odeint(func, y0, T, engine="graph").sum().backward()
            assert torch.cuda.current_stream() == stream
            assert not torch.cuda.is_current_stream_capturing()
            torch.cuda.empty_cache()  # fails if torch believes that a capture is under way
            torch.randn(3, device="cuda")  # likewise
            one, other = (solve(good, y0, T, engine=name) for name in ("eager", "graph"))
            assert torch.equal(one.y, other.y)
            plan_cache._by_owner.clear()

    def test_outlive_others(self) -> None:
        """torch frees cuBLAS's workspace when another CUDA graph is deleted, and when torch.compile captures one."""
        kept, y0 = Net(64), start(256, 64)
        settings: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
        expected = self._solved(kept, y0, settings)
        for _ in range(3):
            odeint(Net(64), y0, T, engine="graph").sum().backward()
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            others = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(32)]
            for one, other in zip(expected, self._solved(kept, y0, settings), strict=True):
                assert torch.equal(one, other)
            assert all(bool((x == 7).all()) for x in others)

    def test_leave_garbage_alone(self) -> None:
        """The garbage collector must not destroy a CUDA graph during a capture, which would invalidate it."""
        y0, thresholds = start(), gc.get_threshold()
        gc.collect()
        gc.set_threshold(1_000_000)
        try:
            forgotten = Net()
            odeint(forgotten, y0, T, engine="graph")
            forgotten.itself = [forgotten]
            del forgotten
            odeint(_Collecting(), y0, T, engine="graph").sum().backward()
        finally:
            gc.set_threshold(*thresholds)
        assert gc.isenabled()

    def test_the_first_in_inference_mode(self) -> None:
        gc.collect()
        net, y0 = Net(), start()
        expected = odeint(net, y0, T)
        with torch.inference_mode():
            assert torch.equal(odeint(net, y0, T, engine="graph"), expected)
        odeint(net, y0, T, engine="graph").sum().backward()
        x, graph = torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)

    def test_leaves_that_another_stream_knows(self) -> None:
        """DistributedDataParallel, and losses of the parameters alone, keep leaf nodes tied to another stream."""
        net, y0 = Net(), start()
        known = [p.expand_as(p).grad_fn.next_functions[0][0] for p in net.parameters()]
        grads = []
        for name in ("eager", "graph"):
            loss = sum(p.square().sum() for p in net.parameters()) + odeint(net, y0, T, engine=name).sin().sum()
            grads.append(torch.autograd.grad(loss, [y0, *net.parameters()]))
        assert known
        for one, other in zip(*grads, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)

    def test_no_room(self) -> None:
        """Running out of memory during a capture raises OutOfMemoryError, and a later solve works."""
        net, y0 = Net(), start()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            odeint(_Huge(), y0, T, engine="graph")
        assert torch.equal(odeint(net, y0, T, engine="graph"), odeint(net, y0, T))

    def test_two_threads(self) -> None:
        nets, y0 = [Net() for _ in range(2)], start()
        expected = [self._solved(net, y0, {}) for net in nets]
        plan_cache._by_owner.clear()
        with ThreadPoolExecutor(2) as threads:
            for _ in range(3):
                found = list(threads.map(lambda net: self._solved(net, y0, {}), nets))
                for ones, others in zip(expected, found, strict=True):
                    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))

    def _solved(self, net: nn.Module, y0: Tensor, settings: dict[str, Any]) -> list[Tensor]:
        y = odeint(net, y0, T, engine="graph", **settings)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [y0, *net.parameters()])]

    def test_a_constant_made_in_func(self) -> None:
        with pytest.raises(GraphError):
            odeint(lambda t, y: y * torch.tensor([1.0, 2.0, 3.0], device="cuda"), start(), T, engine="graph")
        y0 = start()
        assert torch.equal(odeint(_minus, y0, T, engine="graph"), odeint(_minus, y0, T))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
    @both_engines
    def test_the_other_device(self, engine_name: str) -> None:
        y0 = torch.randn(4, 3)
        net = Net(device="cpu")
        found = []
        for device in ("cuda:0", "cuda:1"):
            x = y0.to(device).requires_grad_()
            y = odeint(net.to(device), x, T, engine=engine_name)
            found.append([z.cpu() for z in (y, *torch.autograd.grad(y.sum(), [x, *net.parameters()]))])
            assert torch.cuda.current_device() == 0
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _minus(t: Tensor, y: Tensor) -> Tensor:
    return -y


class _Waits(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        torch.cuda.current_stream().synchronize()
        return -y


class _Collecting(nn.Module):
    """Lowers the garbage collector's threshold in captures, so that it would run there."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
            assert len([[] for _ in range(100)]) == 100
        return -y


class _Huge(nn.Module):
    """Allocates all memory of the device, but only in a capture."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            y = torch.empty(torch.cuda.get_device_properties(y.device).total_memory, device=y.device)[0] * y
        return -y


class _WaitsBackward(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = _Backward.apply(y)
        return result


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return -y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        torch.cuda.current_stream().synchronize()
        return -g
