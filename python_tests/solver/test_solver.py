"""The solver through its interface: requested times, accepted steps, and errors raised by func."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import LOOSE, Mlp, check_chain, decay, oscillate, rotated, sample
from torch import Tensor, nn

import aca_ext

pytestmark = pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


class TestTimes:
    @pytest.mark.parametrize("method", aca_ext.METHODS)
    def test_both_directions(self, method: str) -> None:
        options = {} if aca_ext.METHODS[method].adaptive else {"step_size": 0.005}
        if method == "explicit_adams":
            options["max_order"] = 5  # higher orders need smaller steps to be stable
        for times in ([0.0, 0.5, 2.0], [2.0, 0.5, 0.0], [-1.0, -2.5], [3.0, -3.0]):
            t = torch.tensor(times, dtype=torch.float64)
            y = aca_ext.odeint(oscillate, rotated(times[0]), t, method=method, rtol=1e-6, atol=1e-6, options=options)
            precision = {"euler": 0.05, "fehlberg2": 0.05}.get(method, 1e-4)
            for time, row in zip(times, y, strict=True):
                torch.testing.assert_close(row, rotated(time), rtol=0, atol=precision)

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("method", ["dopri5", "rk4"])
    def test_one_time(self, gradient: str, method: str) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            raise AssertionError("nothing to solve")

        y0 = sample(2, 3).requires_grad_()
        sol = aca_ext.solve(func, y0, torch.tensor([0.7]), gradient=gradient, method=method)
        assert torch.equal(sol.y, y0[None])
        assert sol.steps.shape == (0, 2)
        assert (sol.stats.n_steps, sol.stats.n_f_evals) == (0, 0)
        sol.y.sum().backward()
        assert torch.equal(y0.grad, torch.ones(2, 3, dtype=torch.float64))

    @pytest.mark.parametrize("kind", ["float32", "int", "list", "numpy"])
    def test_forms_of_t(self, kind: str) -> None:
        t = {
            "float32": torch.tensor([0.0, 1.0, 2.0]),
            "int": torch.tensor([0, 1, 2]),
            "list": [0, 1.0, 2],
            "numpy": torch.tensor([0.0, 1.0, 2.0]).numpy(),
        }[kind]
        sol = aca_ext.solve(decay, torch.ones(2), t)
        assert isinstance(sol.t, Tensor)
        assert sol.t.tolist() == [0.0, 1.0, 2.0]
        assert float(sol.y[-1, 0]) == pytest.approx(math.exp(-2), rel=1e-5)

    def test_euler_lands_on_the_end(self) -> None:
        """A known issue of torchdiffeq: by rounding, 5.9 / 1e-4 steps miss the end."""
        t = torch.tensor([0.0, 5.9], dtype=torch.float64)
        sol = aca_ext.solve(lambda t, y: torch.ones_like(y), torch.zeros(1).double(), t, method="euler",
                            options={"step_size": 1e-4})  # fmt: skip
        assert sol.stats.n_accepted == 59_000
        assert sol.steps[-1, 1].item() == 5.9
        assert sol.y[-1].item() == pytest.approx(5.9, rel=1e-12)

    @pytest.mark.parametrize("end", [1.0, 0.7, 1 / 3, 1e-3, 5.9, 123.4])
    @pytest.mark.parametrize("step_size", [0.1, 0.3, 1e-2])
    def test_fixed_steps_are_no_longer_than_asked(self, end: float, step_size: float) -> None:
        t = torch.tensor([0.0, end / 2, end], dtype=torch.float64)
        steps = aca_ext.solve(decay, torch.ones(1), t, method="euler", options={"step_size": step_size}).steps
        check_chain(steps, t)
        lengths = steps[:, 1] - steps[:, 0]
        assert lengths.max() <= step_size * (1 + 1e-8)
        assert len(steps) == 2 * max(1, math.ceil(end / 2 / step_size - 1e-9))
        assert torch.isin(t[1:], steps[:, 1]).all()

    def test_without_step_size_the_requested_times_are_the_grid(self) -> None:
        steps = aca_ext.solve(decay, torch.ones(1), T, method="rk4").steps
        assert steps.tolist() == [[0.0, 0.3], [0.3, 1.0]]

    @pytest.mark.parametrize("method", ["euler", "dopri5"])
    def test_grid_constructor(self, method: str) -> None:
        seen = []

        def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
            seen.append((func, y0, t))
            return torch.tensor([0.0, 0.1, 0.5, 1.0])

        y0 = torch.ones(1)
        sol = aca_ext.solve(decay, y0, T, method=method, options={"grid_constructor": grid})
        assert sol.steps[:, 1].tolist() == pytest.approx([0.1, 0.3, 0.5, 1.0], rel=1e-7)
        assert sol.steps[1, 1] == T[1]
        assert seen[0][0] is decay
        assert seen[0][1] is y0
        assert torch.equal(seen[0][2], T)
        backwards = {"grid_constructor": lambda func, y0, t: torch.tensor([1.0, 0.5, 0.0])}
        steps = aca_ext.solve(decay, y0, torch.tensor([1.0, 0.0]), method=method, options=backwards).steps
        assert steps.tolist() == [[1.0, 0.5], [0.5, 0.0]]

    @pytest.mark.parametrize("stops", [[0.25, 0.5], torch.tensor([0.5, 0.25]), [-3.0, 0.5, 0.25, 7.0, 1.0]])
    @pytest.mark.parametrize("name", ["step_t", "jump_t"])
    def test_steps_land_on_given_times(self, name: str, stops: Any) -> None:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        free = aca_ext.solve(decay, torch.ones(1).double(), t, **LOOSE).steps
        assert not torch.isin(torch.tensor([0.25, 0.5], dtype=torch.float64), free).any()
        for times in (t, t.flip(0)):
            steps = aca_ext.solve(decay, torch.ones(1).double(), times, options={name: stops}, **LOOSE).steps
            assert torch.isin(torch.tensor([0.25, 0.5], dtype=torch.float64), steps).all()
            check_chain(steps, times)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("before", [lambda t: t < 0.5, lambda t: t <= 0.5], ids=["<", "<="])
    def test_slope_is_evaluated_on_the_right_side_of_a_jump(
        self, before: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(before(t), torch.zeros_like(y), torch.ones_like(y))

        y0 = torch.zeros(1, dtype=dtype)
        for times in ([0.0, 1.0], [1.0, 0.0]):
            t = torch.tensor(times, dtype=torch.float64)
            jump = aca_ext.solve(func, y0, t, rtol=1e-5, atol=1e-5, options={"jump_t": [0.5]})
            free = aca_ext.solve(func, y0, t, rtol=1e-5, atol=1e-5)
            assert free.stats.n_rejected > 0
            assert jump.stats.n_rejected == 0
            assert jump.y[-1].item() == pytest.approx(0.5 * (times[1] - times[0]), rel=1e-5)

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    def test_gradient_across_a_jump(self, gradient: str) -> None:
        w = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y * (w[0] if t < 0.5 else w[1])

        y = aca_ext.odeint(func, torch.ones(1).double(), T, gradient=gradient, options={"jump_t": [0.5]})
        y[-1].sum().backward()
        exact = -0.5 * math.exp(-0.5 * (0.5 + 2.0))
        assert w.grad.tolist() == pytest.approx([exact, exact], rel=1e-5)

    @pytest.mark.filterwarnings("ignore::aca_ext.errors.TimeResolutionWarning")
    def test_time_and_step_are_float64_for_a_float32_state(self) -> None:
        t = torch.tensor([1e6, 1e6 + 1e-3], dtype=torch.float64)
        sol = aca_ext.solve(lambda t, y: torch.ones_like(y), torch.zeros(2), t)
        assert sol.steps.dtype == torch.float64
        assert sol.y[-1, 0].item() == pytest.approx(1e-3, rel=1e-5)


class TestUsersExceptions:
    class OwnError(Exception):
        pass

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("at", [1, 2, 5, 20])
    @pytest.mark.parametrize("kind", [OwnError, KeyboardInterrupt, StopIteration])
    def test_forward(self, kind: type[BaseException], at: int, gradient: str) -> None:
        raised = kind("mine")
        net, count = Mlp(), iter(range(1, 10_000))

        def func(t: Tensor, y: Tensor) -> Tensor:
            if next(count) == at:
                raise raised
            return net(t, y)

        y0 = sample(2, 3).requires_grad_()
        state = torch.get_rng_state()
        with pytest.raises(kind) as caught:
            aca_ext.odeint(func, y0, T, gradient=gradient, rtol=1e-6, atol=1e-6)
        assert caught.value is raised
        self.check_that_nothing_is_broken(state)

    @pytest.mark.parametrize("gradient", ["aca", "adjoint"])
    @pytest.mark.parametrize("kind", [OwnError, KeyboardInterrupt])
    @pytest.mark.parametrize("create_graph", [False, True])
    def test_backward(self, kind: type[BaseException], gradient: str, create_graph: bool) -> None:
        raised = kind("mine")
        # The backward pass is told by a count of evaluations, since a replay would put a flag that func reads back.
        count, n_forward = itertools.count(1), math.inf

        class Net(Mlp):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3).double()

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                k = super().forward(t, nn.functional.dropout(self.norm(y), 0.1))
                if next(count) > n_forward and float(t) < 0.5:
                    raise raised
                return k

        func = Net()
        y0 = sample(8, 3).requires_grad_()
        aca_ext.odeint(func, y0, T, gradient=gradient, options={"step_size": 0.2})
        count, n_forward = itertools.count(1), next(count) - 1
        y = aca_ext.odeint(func, y0, T, gradient=gradient, options={"step_size": 0.2})
        buffers = [b.clone() for b in func.buffers()]
        state = torch.get_rng_state()
        with pytest.raises(kind) as caught:
            torch.autograd.grad(y.sum(), y0, create_graph=create_graph)
        assert caught.value is raised
        assert all(torch.equal(b, before) for b, before in zip(func.buffers(), buffers, strict=True))
        self.check_that_nothing_is_broken(state)
        n_forward = math.inf
        aca_ext.odeint(func, y0, T, gradient=gradient, options={"step_size": 0.2}).sum().backward()

    def check_that_nothing_is_broken(self, random_state: Tensor) -> None:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert torch.equal(torch.get_rng_state(), random_state)
        assert torch.overrides._len_torch_function_stack() == 0
        y0 = torch.ones(2, requires_grad=True)
        aca_ext.odeint(decay, y0, T).sum().backward()
        assert y0.grad is not None
