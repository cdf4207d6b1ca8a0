"""Memory of a solve: the tensors alive during it, and none left after it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from problems import LOOSE, CoupledMlp, Mlp, decay, sample
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.tensor_memory import TensorMemory

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
FIRST = 10  # solves until the pooled buffers of stages have reached their size


def live_tensors() -> int:
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


class TestMemory:
    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("kind", ["module", "closure", "tuple"])
    def test_nothing_is_left_without_the_garbage_collector(self, gradient: str, kind: str) -> None:
        net, context = Mlp(), sample(3).requires_grad_()
        t = T.clone().requires_grad_()

        def solve() -> list[weakref.ref]:
            y0: Any = sample(2, 3).requires_grad_()
            func: Any = net
            if kind == "closure":
                derived = torch.exp(context)
                func = lambda t, y: net(t, y) * derived  # noqa: E731
            if kind == "tuple":
                func, y0 = CoupledMlp(), (y0, sample(3).requires_grad_())
            sol = aca_ext.solve(func, y0, t, gradient=gradient, options={"step_size": 0.25})
            part = sol.y[0] if isinstance(sol.y, tuple) else sol.y
            part.sum().backward()
            parts = y0 if isinstance(y0, tuple) else (y0,)
            return [weakref.ref(x) for x in (part, sol.steps, *parts)] + [weakref.ref(func)] * (kind == "closure")

        for _ in range(FIRST):
            solve()
        gc.collect()
        gc.disable()
        try:
            before = live_tensors()
            refs = solve()
            assert [ref() for ref in refs] == [None] * len(refs)
            assert live_tensors() == before
        finally:
            gc.enable()

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    def test_solution_without_backward_is_freed_too(self, gradient: str) -> None:
        net = Mlp()

        def solve() -> None:
            y0 = sample(2, 3).requires_grad_()
            y = aca_ext.odeint(net, y0, T, gradient=gradient, options={"step_size": 0.25})
            torch.autograd.grad(y.sum(), y0, create_graph=gradient != "adjoint")

        for _ in range(FIRST):
            solve()
        gc.collect()
        gc.disable()
        try:
            before = live_tensors()
            for _ in range(5):
                solve()
            assert live_tensors() == before
        finally:
            gc.enable()

    def test_a_thousand_solves(self) -> None:
        net = Mlp(2, 2)
        y0 = sample(2).requires_grad_()
        t = torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)

        def solve() -> None:
            sol = aca_ext.solve(net, y0, t, method="bosh3", **LOOSE)
            sol.y.sum().backward()
            for p in (y0, *net.parameters()):
                p.grad = None

        for _ in range(FIRST):
            solve()
        gc.collect()
        before = len(gc.get_objects()), live_tensors()
        for _ in range(1000):
            solve()
        gc.collect()
        after = len(gc.get_objects()), live_tensors()
        assert after[1] == before[1]
        assert after[0] <= before[0] + 50

    def test_failed_solves_leave_nothing(self) -> None:
        net = Mlp()

        def solve() -> None:
            y0 = sample(2, 3).requires_grad_()
            with pytest.raises(errors.StepLimitError):
                aca_ext.odeint(net, y0, T, options={"max_num_steps": 2, "first_step": 1e-3})

        for _ in range(FIRST):
            solve()
        gc.collect()
        before = live_tensors()
        for _ in range(20):
            solve()
        gc.collect()
        assert live_tensors() == before

    def test_checkpoints_are_freed_by_backward_while_the_solution_is_kept(self) -> None:
        y0 = torch.ones(50_000, dtype=torch.float64, requires_grad=True)
        size = y0.numel() * 8
        with TensorMemory() as memory:
            sol = aca_ext.solve(decay, y0, T, options={"step_size": 0.05})
            held = memory.current
            count = sol.stats.n_accepted
            assert count == 20
            assert (count + 1) * size <= held - 3 * size <= (count + 4) * size
            sol.y[-1].sum().backward()
            assert memory.current <= 5 * size  # the solution's three outputs, the gradient, and a little
            assert sol.y.shape[0] == 3

    def test_without_gradient_there_are_no_checkpoints(self) -> None:
        y0 = torch.ones(50_000, dtype=torch.float64)
        size = y0.numel() * 8
        with TensorMemory() as memory, torch.no_grad():
            aca_ext.odeint(decay, y0, T, options={"step_size": 0.05})
            few = memory.peak
        assert few <= 16 * size

    def test_memory_of_aca_is_checkpoints_and_one_step(self) -> None:
        """Ten times the steps take ten times the states, but not ten times the autograd graphs."""
        net = Mlp(4, 64)
        x = sample(256, 4)
        size = x.numel() * 8
        peaks: dict[tuple[str, int], int] = {}
        for gradient in ("aca", "direct"):
            for count in (5, 55) if gradient == "aca" else (5, 10):
                with TensorMemory() as memory:
                    y0 = x.clone().requires_grad_()
                    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
                    y = aca_ext.odeint(net, y0, t, gradient=gradient, options={"step_size": 1 / count})
                    y[-1].sum().backward()
                peaks[gradient, count] = memory.peak
        growth = (peaks["aca", 55] - peaks["aca", 5]) / 50
        assert growth <= 1.6 * size  # states are allocated in blocks of up to 64
        assert (peaks["direct", 10] - peaks["direct", 5]) / 5 > 20 * size
