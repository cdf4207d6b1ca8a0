"""The solver through its interface: states of every form, times, steps, options, memory, and torchdiffeq's users."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error, solve_over
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CoupledMlp, LotkaVolterra, Mlp, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors
from aca_ext.memory import TensorMemory

ADAPTIVE = [name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive]
T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
LOOSE = {"rtol": 1e-3, "atol": 1e-4}


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def oscillate(t: Tensor, y: Tensor) -> Tensor:
    """Energy-conserving, with a known solution: a rotation by angle t."""
    return torch.stack([y[1], -y[0]])


def rotated(t: float) -> Tensor:
    return torch.tensor([math.cos(t), -math.sin(t)], dtype=torch.float64)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: sample(3, 2).T,
    "expanded": lambda: sample(1, 3).expand(2, 3),
    "every other row": lambda: sample(4, 3)[::2],
    "offset": lambda: sample(3, 3).view(-1)[1:7].view(2, 3),
    "negative view": lambda: torch.complex(sample(2, 3), sample(2, 3, seed=1)).conj().imag,
    "overlapping": lambda: sample(4).as_strided((2, 3), (1, 1)),
}


class TestStates:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
    @pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 3, 1, 2), (0,), (2, 0, 3)])
    def test_shapes_and_dtypes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            assert t.dim() == 0
            assert t.dtype == (y.real.dtype if y.is_complex() else y.dtype)
            assert y.shape == shape
            assert y.dtype == dtype
            return -y * (2 + 1j) if dtype.is_complex else -y

        y0 = (sample(*shape) + (1j * sample(*shape, seed=1) if dtype.is_complex else 0)).to(dtype)
        sol = aca_ext.solve(func, y0, T, rtol=1e-6, atol=1e-7)
        assert sol.y.shape == (3, *shape)
        assert sol.y.dtype == dtype
        assert torch.equal(sol.y[0], y0)
        rate = 2 + 1j if dtype.is_complex else 1.0
        expected = torch.stack([y0 * torch.exp(torch.as_tensor(-rate * t)) for t in T.tolist()])
        torch.testing.assert_close(sol.y, expected.to(dtype), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 0, 3)])
    def test_gradient_of_empty_and_scalar_states(
        self, shape: tuple[int, ...], dtype: torch.dtype, gradient: str
    ) -> None:
        y0 = sample(*shape).to(dtype).requires_grad_()
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        y = aca_ext.odeint(lambda t, y: -y * w, y0, T, gradient=gradient, rtol=1e-8, atol=1e-9)
        y.real.sum().backward()
        assert y0.grad is not None
        assert y0.grad.shape == shape
        torch.testing.assert_close(y0.grad, torch.exp(-T).sum().to(dtype).expand(shape), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("first_row", ["requires_grad", "no_grad"])
    def test_first_row_is_the_initial_state(self, gradient: str, first_row: str) -> None:
        y0 = sample(2, 3).requires_grad_(first_row == "requires_grad")
        y = aca_ext.odeint(Mlp(), y0, T, gradient=gradient, **LOOSE)
        assert torch.equal(y[0], y0)
        assert y.data_ptr() != y0.data_ptr()

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    def test_tuple(self, gradient: str) -> None:
        y0 = (sample(4, 3), sample(3, seed=1))
        sol = aca_ext.solve(CoupledMlp(), y0, T, gradient=gradient, rtol=1e-6, atol=1e-6)
        assert isinstance(sol.y, tuple)
        assert [tuple(part.shape) for part in sol.y] == [(3, 4, 3), (3, 3)]
        truth = solve_over(CoupledMlp(), y0, T.tolist(), sol.steps.tolist(), "dopri5")
        for part, start, exact in zip(sol.y, y0, truth, strict=True):
            assert torch.equal(part[0], start)
            assert relative_error(part, exact) <= 1e-13

    def test_tuple_of_one_scalar_and_empty_components(self) -> None:
        y0 = (torch.tensor(2.0), torch.ones(0, 3), torch.ones(2, 2))
        ys = aca_ext.odeint(lambda t, y: tuple(-part for part in y), y0, T, rtol=1e-5, atol=1e-6)
        assert [tuple(part.shape) for part in ys] == [(3,), (3, 0, 3), (3, 2, 2)]
        assert float(ys[0][-1]) == pytest.approx(2 * math.exp(-1), rel=1e-4)
        (alone,) = aca_ext.odeint(lambda t, y: (-y[0],), (torch.ones(3),), T)
        assert alone.shape == (3, 3)

    def test_complex_tuple(self) -> None:
        y0 = (torch.ones(2, dtype=torch.complex128), 1j * torch.ones(3, dtype=torch.complex128))
        ys = aca_ext.odeint(lambda t, y: (1j * y[0], -y[1]), y0, T)
        torch.testing.assert_close(ys[0][-1], y0[0] * torch.exp(torch.tensor(1j)), rtol=1e-6, atol=0)
        torch.testing.assert_close(ys[1][-1], y0[1] * math.exp(-1), rtol=1e-6, atol=0)

    def test_every_component_of_a_tuple_is_held_to_the_tolerance(self) -> None:
        """The norm is the largest of the components', so a large quiet component cannot hide a small lively one."""

        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(y[0]), oscillate(t, y[1]) * 10

        quiet, lively = torch.ones(10_000, dtype=torch.float64), rotated(0.0)
        steps = [
            aca_ext.solve(func, (quiet[:n], lively), T, rtol=1e-5, atol=1e-8).stats.n_accepted for n in (1, 10_000)
        ]
        assert steps[0] == steps[1]
        flat = aca_ext.solve(
            lambda t, y: torch.cat([torch.zeros_like(y[:-2]), oscillate(t, y[-2:]) * 10]),
            torch.cat([quiet, lively]),
            T,
            rtol=1e-5,
            atol=1e-8,
        )
        assert flat.stats.n_accepted < steps[0]

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_non_contiguous_state(self, layout: str, gradient: str) -> None:
        found = []
        for prepare in (lambda x: x, lambda x: x.contiguous().clone()):
            func, y0 = Mlp(), prepare(LAYOUTS[layout]()).requires_grad_()
            y = aca_ext.odeint(func, y0, T, gradient=gradient, rtol=1e-6, atol=1e-6)
            found.append((y, *torch.autograd.grad(y.square().sum(), [y0, *func.parameters()])))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-10

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    def test_channels_last(self, gradient: str) -> None:
        conv = nn.Conv2d(4, 4, 3, padding=1).double()
        strides = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            assert y.is_contiguous(memory_format=torch.channels_last)
            strides.append(y.stride())
            return torch.tanh(conv(y))

        start = sample(2, 4, 5, 3)
        y0 = start.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = aca_ext.odeint(func, y0, T, gradient=gradient, **LOOSE)
        assert all(row.is_contiguous(memory_format=torch.channels_last) for row in y)
        assert set(strides) == {y0.stride()}
        found = torch.autograd.grad(y.square().sum(), [y0, *conv.parameters()])
        x = start.clone().requires_grad_()
        plain = aca_ext.odeint(lambda t, y: torch.tanh(conv(y)), x, T, gradient=gradient, **LOOSE)
        assert relative_error(y, plain) <= 1e-12
        expected = torch.autograd.grad(plain.square().sum(), [x, *conv.parameters()])
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= (1e-12 if gradient != "adjoint" else 1e-2)

    def test_channels_last_3d(self) -> None:
        y0 = sample(2, 3, 2, 4, 5).contiguous(memory_format=torch.channels_last_3d)
        y = aca_ext.odeint(decay, y0, T)
        assert y[1].is_contiguous(memory_format=torch.channels_last_3d)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_runs_without_kernels(self, dtype: torch.dtype) -> None:
        sol = aca_ext.solve(decay, torch.ones(4, dtype=dtype), T, options={"step_size": 0.1})
        assert sol.y.dtype == dtype
        assert sol.stats.backend == "reference"
        assert float(sol.y[-1, 0]) == pytest.approx(math.exp(-1), rel=0.05)

    def test_parameter_as_state(self) -> None:
        y0 = nn.Parameter(torch.ones(3))
        sol = aca_ext.solve(decay, y0, T)
        sol.y[-1].sum().backward()
        assert sol.stats.backend == "cpu"
        assert y0.grad is not None
        assert y0.grad[0].item() == pytest.approx(math.exp(-1), rel=1e-5)

    def test_the_callers_state_is_left_alone(self) -> None:
        y0 = sample(2, 3)
        before = y0.clone()
        aca_ext.odeint(Mlp(), y0, T)
        assert torch.equal(y0, before)


class TestTimes:
    @pytest.mark.parametrize("method", aca_ext.METHODS)
    def test_both_directions(self, method: str) -> None:
        options = {} if aca_ext.METHODS[method].adaptive else {"step_size": 0.005}
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
        """torchdiffeq's issue: 5.9/1e-4 steps miss the end by rounding."""
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

    def test_time_and_step_are_float64_for_a_float32_state(self) -> None:
        t = torch.tensor([1e6, 1e6 + 1e-3], dtype=torch.float64)
        sol = aca_ext.solve(lambda t, y: torch.ones_like(y), torch.zeros(2), t)
        assert sol.steps.dtype == torch.float64
        assert sol.y[-1, 0].item() == pytest.approx(1e-3, rel=1e-5)


def check_chain(steps: Tensor, t: Tensor) -> None:
    """Steps follow each other from the first time to the last, all in one direction."""
    assert steps.dtype == torch.float64
    assert steps.device.type == "cpu"
    assert steps[0, 0] == t[0]
    assert steps[-1, 1] == t[-1]
    assert torch.equal(steps[1:, 0], steps[:-1, 1])
    assert ((steps[:, 1] - steps[:, 0]) * torch.sign(t[-1] - t[0]) > 0).all()


class TestAccuracy:
    @pytest.mark.parametrize("method", aca_ext.METHODS)
    def test_order_of_fixed_steps(self, method: str) -> None:
        order = aca_ext.METHODS[method].order
        t = torch.tensor([0.0, 2.0], dtype=torch.float64)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return oscillate(t, y) * torch.cos(t)

        angle = math.sin(2.0)
        counts = (8, 16) if order < 8 else (4, 8)
        found = [
            aca_ext.odeint(func, rotated(0.0), t, method=method, options={"step_size": 2.0 / n})[-1] for n in counts
        ]
        one, other = (float((y - rotated(angle)).norm()) for y in found)
        assert order - 0.5 <= math.log2(one / other) <= order + 1.2

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_order_of_dense_output(self, method: str) -> None:
        order = aca_ext.METHODS[method].dense_order
        assert order is not None
        errors_at = []
        sizes = (0.4, 0.2) if order < 5 else (0.8, 0.4)
        for h in sizes:
            t = torch.tensor([0.0, *(h * theta for theta in (0.15, 0.4, 0.55, 0.85)), h], dtype=torch.float64)
            options = {"first_step": h, "max_step": h}
            sol = aca_ext.solve(oscillate, rotated(0.0), t, method=method, rtol=1.0, atol=1.0, options=options)
            assert sol.stats.n_accepted == 1
            exact = torch.stack([rotated(time) for time in t.tolist()])
            errors_at.append((sol.y - exact)[1:-1].abs().max().item())
        assert math.log2(errors_at[0] / errors_at[1]) == pytest.approx(order + 1, abs=0.5)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_outputs_do_not_move_the_steps(self, method: str) -> None:
        t = torch.linspace(0, 4, 3, dtype=torch.float64)
        many = torch.linspace(0, 4, 41, dtype=torch.float64)
        tolerance = 1e-6 if method == "fehlberg2" else 1e-3
        few, more = (
            aca_ext.solve(oscillate, rotated(0.0), x, method=method, rtol=tolerance, atol=tolerance) for x in (t, many)
        )
        assert torch.equal(few.steps, more.steps)
        assert torch.equal(few.y, more.y[::20])
        for time, row in zip(many.tolist(), more.y, strict=True):
            torch.testing.assert_close(row, rotated(time), rtol=0, atol=0.05)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_last_step_is_checked_too(self, method: str) -> None:
        """A slope that is quiet but for the very end: a cut step must not pass unseen."""

        def func(t: Tensor, y: Tensor) -> Tensor:
            return 50 * torch.exp(200 * (t - 1)) * torch.ones_like(y)

        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        sol = aca_ext.solve(func, torch.zeros(1).double(), t, method=method, rtol=1e-4, atol=1e-4)
        assert sol.y[-1].item() == pytest.approx(0.25, abs=0.02)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_stats_and_steps_agree(self, method: str) -> None:
        t = torch.tensor([0.0, 1.5, 3.0], dtype=torch.float64)
        calls = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            calls.append(float(t))
            return oscillate(t, y) * (1 + 5 * torch.exp(-50 * (t - 1) ** 2))

        sol = aca_ext.solve(func, rotated(0.0), t, method=method, options={"first_step": 1.0}, **LOOSE)
        stats = sol.stats
        check_chain(sol.steps, t)
        assert len(calls) == stats.n_f_evals
        assert len(sol.steps) == stats.n_accepted
        assert stats.n_steps == stats.n_accepted + stats.n_rejected
        assert stats.n_rejected > 0
        assert stats.backend == "cpu"
        assert min(calls) >= 0.0
        assert max(calls) <= 3.0

    def test_zero_slope(self) -> None:
        for y0 in (torch.ones(3), torch.zeros(3)):
            sol = aca_ext.solve(lambda t, y: torch.zeros_like(y), y0, torch.tensor([0.0, 1.0, 100.0]))
            assert torch.equal(sol.y, y0.expand(3, 3))
            assert sol.stats.n_steps < 20

    def test_slope_that_is_zero_only_at_the_start(self) -> None:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        y = aca_ext.odeint(lambda t, y: 3 * t**2 * torch.ones_like(y), torch.zeros(2).double(), t)
        assert y[-1, 0].item() == pytest.approx(1.0, rel=1e-6)

    def test_thread_count_does_not_change_a_bit(self) -> None:
        y0 = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
        found = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(aca_ext.solve(lambda t, y: -y * t, y0, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-5))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0].y, found[1].y)
        assert torch.equal(found[0].steps, found[1].steps)


class TestTolerances:
    Y0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)

    def count(self, y0: Any = None, func: Any = None, **settings: Any) -> int:
        def rotate(t: Tensor, y: Tensor) -> Tensor:
            return 3 * torch.stack([y[1], -y[0]])

        return aca_ext.solve(func or rotate, self.Y0 if y0 is None else y0, T, **settings).stats.n_steps

    @pytest.mark.parametrize("name", ["rtol", "atol"])
    def test_tighter_tolerance_takes_more_steps(self, name: str) -> None:
        other = "atol" if name == "rtol" else "rtol"
        counts = [self.count(**{name: tolerance, other: 1e-12}) for tolerance in (1e-2, 1e-4, 1e-6, 1e-8)]
        assert counts == sorted(set(counts))

    @pytest.mark.parametrize("name", ["rtol", "atol"])
    def test_tensor_tolerances(self, name: str) -> None:
        other = {"atol": 1e-12} if name == "rtol" else {"rtol": 1e-12}
        number = self.count(**{name: 1e-5}, **other)
        for shape in ((), (1,), (2,), (2, 1), (2, 2)):
            assert self.count(**{name: torch.full(shape, 1e-5)}, **other) == number
        assert self.count(**{name: torch.tensor([1e-5, 1e-9])}, **other) > number
        assert self.count(**{name: torch.tensor([1e-5, 0.0])}, **other) > number

    def test_tolerances_per_element_hold_each_element(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(y[0]), 5 * torch.cos(20 * t) * y[1]])

        y0 = torch.ones(2, dtype=torch.float64)
        strict = self.count(y0, func, rtol=0.0, atol=torch.tensor([1.0, 1e-8]))
        loose = self.count(y0, func, rtol=0.0, atol=torch.tensor([1e-8, 1.0]))
        assert loose < strict / 3

    def test_tuple_tolerances(self) -> None:
        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return 3 * torch.stack([y[0][1], -y[0][0]]), torch.zeros_like(y[1])

        y0 = (self.Y0, torch.ones(5, dtype=torch.float64))
        number = self.count(y0, func, rtol=1e-6, atol=1e-6)
        assert self.count(y0, func, rtol=(1e-6, 1e-6), atol=1e-6) == number
        assert self.count(y0, func, rtol=(1e-6, 1e-12), atol=(1e-6, 1e-12)) == number
        assert self.count(y0, func, rtol=(1e-9, 1e-6), atol=(torch.full((2, 2), 1e-9), 1e-6)) > number

    def test_zero_tolerance_at_a_zero(self) -> None:
        """Where y0 = 0 and atol = 0 the first step has no scale; behind it there is one."""
        y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
        y = aca_ext.odeint(lambda t, y: torch.stack([-y[0], y[0]]), y0, T, rtol=1e-6, atol=0.0)
        assert y[-1].tolist() == pytest.approx([math.exp(-1), 1 - math.exp(-1)], rel=1e-5)

    def test_one_tolerance_may_be_zero(self) -> None:
        assert self.count(rtol=0.0, atol=1e-5) > 0
        ones = torch.ones(2, dtype=torch.float64)
        assert self.count(ones, decay, rtol=1e-5, atol=0.0) > 0

    def test_fixed_steps_do_not_look_at_tolerances(self) -> None:
        found = [
            aca_ext.odeint(oscillate, rotated(0.0), T, options={"step_size": 0.1}, rtol=tol, atol=tol)
            for tol in (1e-2, 1e-9, 0.0)
        ]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


class TestOptions:
    T = torch.tensor([0.0, 6.0], dtype=torch.float64)

    def solve(self, **options: Any) -> aca_ext.Solution:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return oscillate(t, y) * (1 + 4 * torch.exp(-20 * (t - 2) ** 2))

        return aca_ext.solve(func, rotated(0.0), self.T, rtol=1e-5, atol=1e-5, options=options)

    def lengths(self, **options: Any) -> Tensor:
        steps = self.solve(**options).steps
        return steps[:, 1] - steps[:, 0]

    def test_first_step(self) -> None:
        for size in (1e-3, torch.tensor(1e-3), 1):
            first = self.lengths(first_step=size)[0].item()
            assert first == pytest.approx(float(size)) or first < float(size) == 1.0
        assert self.solve(first_step=1e-3).stats.n_f_evals == 1 + 6 * self.solve(first_step=1e-3).stats.n_steps

    def test_first_step_beyond_the_end(self) -> None:
        sol = aca_ext.solve(decay, torch.ones(1), torch.tensor([0.0, 0.1]), options={"first_step": 50.0}, **LOOSE)
        assert sol.steps[-1, 1].item() == pytest.approx(0.1)

    def test_max_step(self) -> None:
        assert self.lengths().max() > 0.25
        assert self.lengths(max_step=0.1).max() <= 0.1 * (1 + 1e-12)

    def test_min_step(self) -> None:
        with pytest.raises(errors.StepSizeError):
            self.solve(min_step=1.0)
        assert torch.equal(self.solve(min_step=1e-9).steps, self.solve().steps)

    def test_min_step_holds_after_easy_steps_too(self) -> None:
        steps = aca_ext.solve(decay, torch.ones(1).double(), self.T, options={"min_step": 0.3}, rtol=1e-1, atol=1e-1)
        lengths = (steps.steps[:, 1] - steps.steps[:, 0])[:-1]
        assert (lengths >= 0.3 * (1 - 1e-12)).all()

    def test_max_num_steps(self) -> None:
        needed = self.solve().stats.n_steps
        assert self.solve(max_num_steps=needed).stats.n_steps == needed
        assert self.solve(max_num_steps=2**31 - 1).stats.n_steps == needed
        with pytest.raises(errors.StepLimitError):
            self.solve(max_num_steps=needed - 1)

    def test_safety(self) -> None:
        assert self.solve(safety=0.5).stats.n_accepted > self.solve().stats.n_accepted

    def test_ifactor(self) -> None:
        steps = self.lengths(first_step=1e-4, ifactor=2.0)
        growth = steps[1:] / steps[:-1]
        assert growth.max() <= 2 * (1 + 1e-9)
        assert (self.lengths(first_step=1e-4)[1:] / self.lengths(first_step=1e-4)[:-1]).max() > 5

    def test_dfactor(self) -> None:
        """From a first step that is far too large, a larger dfactor takes more trials down."""
        slow, fast = self.solve(first_step=6.0, dfactor=0.8), self.solve(first_step=6.0, dfactor=0.2)
        assert slow.stats.n_rejected > fast.stats.n_rejected

    @pytest.mark.parametrize("coefficients", [{"pcoeff": 0.4, "icoeff": 0.3}, {"dcoeff": 0.2}, {"icoeff": 0.6}])
    def test_pid_coefficients(self, coefficients: dict[str, float]) -> None:
        sol, default = self.solve(**coefficients), self.solve()
        assert not torch.equal(sol.steps[:5], default.steps[:5])
        torch.testing.assert_close(sol.y[-1], default.y[-1], rtol=0, atol=1e-3)

    def test_norm(self) -> None:
        seen = []

        def largest(ratio: Tensor) -> Tensor:
            seen.append(ratio)
            return ratio.abs().max()

        strict = self.solve(norm=lambda ratio: 100 * largest(ratio))
        assert strict.stats.n_accepted > 1.5 * self.solve().stats.n_accepted
        assert seen[0].shape == (2,)

    def test_norm_of_a_tuple_state_sees_the_tuple(self) -> None:
        def first_alone(ratio: tuple[Tensor, Tensor]) -> float:
            return ratio[0].square().mean().sqrt().item()

        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return -y[0], 10 * oscillate(t, y[1])

        y0 = (torch.ones(1, dtype=torch.float64), rotated(0.0))
        counts = [
            aca_ext.solve(func, y0, self.T, rtol=1e-5, atol=1e-5, options=options).stats.n_steps
            for options in ({}, {"norm": first_alone})
        ]
        assert counts[1] < counts[0] / 3

    def test_none_means_default(self) -> None:
        names = ("first_step", "min_step", "max_step", "max_num_steps", "safety", "norm", "step_t", "step_size")
        assert torch.equal(self.solve(**dict.fromkeys(names)).steps, self.solve().steps)

    def test_options_are_not_changed(self) -> None:
        options = {"first_step": 0.1, "max_step": 1.0}
        aca_ext.odeint(decay, torch.ones(2), self.T, options=options)
        assert options == {"first_step": 0.1, "max_step": 1.0}

    def test_aliases(self) -> None:
        found = [aca_ext.odeint(decay, torch.ones(2), T, method=m, **LOOSE) for m in ("heun_euler", "adaptive_heun")]
        assert torch.equal(*found)


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
        broken: list[bool] = []

        class Net(Mlp):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3).double()

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                k = super().forward(t, nn.functional.dropout(self.norm(y), 0.1))
                if broken and float(t) < 0.5:
                    raise raised
                return k

        func = Net()
        y0 = sample(8, 3).requires_grad_()
        y = aca_ext.odeint(func, y0, T, gradient=gradient, options={"step_size": 0.2})
        buffers = [b.clone() for b in func.buffers()]
        state = torch.get_rng_state()
        broken.append(True)
        with pytest.raises(kind) as caught:
            torch.autograd.grad(y.sum(), y0, create_graph=create_graph)
        assert caught.value is raised
        assert all(torch.equal(b, before) for b, before in zip(func.buffers(), buffers, strict=True))
        self.check_that_nothing_is_broken(state)
        broken.clear()
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


class TestNeuralODE:
    def test_is_odeint(self) -> None:
        func, y0 = Mlp(), sample(2, 3)
        times = (0.0, 0.3, 1.0)
        expected = aca_ext.odeint(func, y0, torch.tensor(times, dtype=torch.float64), **LOOSE)
        layer = aca_ext.NeuralODE(func, times, output="all", **LOOSE)
        assert layer.stats is None
        assert torch.equal(layer(y0), expected)
        assert layer.stats is not None
        assert layer.stats.n_accepted > 0
        assert torch.equal(aca_ext.NeuralODE(func, times, **LOOSE)(y0), expected[-1])
        assert torch.equal(layer(y0, t=(0.0, 1.0))[-1], expected[-1])

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    def test_trains(self, gradient: str) -> None:
        model = nn.Sequential(aca_ext.NeuralODE(Mlp(), gradient=gradient, **LOOSE), nn.Linear(3, 1).double())
        assert len(list(model.parameters())) == 6
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        x = sample(16, 3)
        target = x.prod(1, keepdim=True)
        losses = []
        for _ in range(8):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_learns_its_times(self) -> None:
        t = nn.Parameter(torch.tensor([0.0, 0.5], dtype=torch.float64))
        layer = aca_ext.NeuralODE(decay, t)
        assert dict(layer.named_parameters())["t"] is t
        layer(torch.ones(1).double()).sum().backward()
        assert t.grad is not None
        assert t.grad[1].item() == pytest.approx(-math.exp(-0.5), rel=1e-5)

    def test_tuple_and_args(self) -> None:
        layer = aca_ext.NeuralODE(lambda t, y, rate: (-rate * y[0], y[0]), (0.0, 1.0))
        one, _ = layer((torch.ones(2), torch.zeros(2)), args=(0.5,))
        assert one.shape == (2,)
        assert one[0].item() == pytest.approx(math.exp(-0.5), rel=1e-5)

    def test_state_dict_and_copy(self) -> None:
        import copy
        import pickle

        layer = aca_ext.NeuralODE(Mlp(), (0.0, 1.0), **LOOSE)
        y = layer(sample(2, 3))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(sample(2, 3)), y)
        other = aca_ext.NeuralODE(Mlp(seed=1), (0.0, 1.0), **LOOSE)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(sample(2, 3)), y)

    def test_wrong_output(self) -> None:
        with pytest.raises(errors.ArgumentValueError, match=r'"end".*"all"'):
            aca_ext.NeuralODE(decay, output="last")


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

        solve()
        gc.collect()
        gc.disable()
        try:
            before = live_tensors()
            for _ in range(3):
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

        for _ in range(10):
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
            assert memory.current <= 5 * size  # the solution's three rows, the gradient, a little
            assert sol.y.shape[0] == 3

    def test_without_gradient_there_are_no_checkpoints(self) -> None:
        y0 = torch.ones(50_000, dtype=torch.float64)
        size = y0.numel() * 8
        with TensorMemory() as memory, torch.no_grad():
            aca_ext.odeint(decay, y0, T, options={"step_size": 0.05})
            few = memory.peak
        assert few <= 16 * size

    def test_memory_of_aca_is_checkpoints_and_one_step(self) -> None:
        """Ten times the steps cost ten times the states, not ten times the graphs."""
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
        assert growth <= 1.6 * size  # blocks of 64 states: up to that many allocated in vain
        assert (peaks["direct", 10] - peaks["direct", 5]) / 5 > 20 * size


@st.composite
def states(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.complex128]))
    y0 = sample(*shape, seed=draw(st.integers(0, 9))).to(dtype)
    form = draw(st.sampled_from(["contiguous", "permuted", "expanded", "sliced", "channels_last"]))
    if form == "permuted":
        y0 = y0.permute(draw(st.permutations(range(y0.dim()))))
    elif form == "expanded":
        y0 = y0.unsqueeze(0).expand(3, *y0.shape)
    elif form == "sliced" and y0.dim():
        y0 = y0[::2]
    elif form == "channels_last" and y0.dim() == 4:
        y0 = y0.contiguous(memory_format=torch.channels_last)
    return y0


@st.composite
def grids(draw: st.DrawFn) -> list[float]:
    gaps = draw(st.lists(st.floats(1e-3, 1.0), min_size=0, max_size=6))
    times = [draw(st.floats(-5.0, 5.0))]
    sign = draw(st.sampled_from([1.0, -1.0]))
    for gap in gaps:
        times.append(times[-1] + sign * gap)
    return times


class TestProperties:
    """Hypothesis: for any state, times, tolerance and method, the solution and its gradient are right."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        y0=states(),
        times=grids(),
        method=st.sampled_from(["bosh3", "tsit5", "dopri5", "dopri8"]),
        tolerance=st.floats(1e-6, 1e-2),
        gradient=st.sampled_from(["aca", "direct"]),
    )
    def test_adaptive(self, y0: Tensor, times: list[float], method: str, tolerance: float, gradient: str) -> None:
        w = torch.tensor(0.3, dtype=y0.real.dtype if y0.is_complex() else y0.dtype, requires_grad=True)
        y0 = y0.detach().requires_grad_()
        strides = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            strides.append(y.stride())
            return torch.sin(w * y) - y * t / 10

        t = torch.tensor(times, dtype=torch.float64)
        sol = aca_ext.solve(func, y0, t, method=method, rtol=tolerance, atol=tolerance, gradient=gradient)
        assert sol.y.shape == (len(times), *y0.shape)
        assert sol.y.dtype == y0.dtype
        assert torch.equal(sol.y[0], y0)
        assert len(set(strides)) <= 1
        if len(times) > 1:
            check_chain(sol.steps, t)
        truth = solve_over(func, y0, times, sol.steps.tolist(), method)
        single = w.dtype == torch.float32
        torch.testing.assert_close(sol.y, truth, rtol=1e-4 if single else 1e-12, atol=1e-5 if single else 1e-13)
        if y0.numel():
            found, expected = (
                torch.autograd.grad(y.abs().square().sum(), [y0, w], allow_unused=True) for y in (sol.y, truth)
            )
            for grad, exact in zip(found, expected, strict=True):
                exact = torch.zeros_like(y0) if exact is None else exact
                grad = torch.zeros_like(exact) if grad is None else grad
                torch.testing.assert_close(grad, exact, rtol=1e-3 if single else 1e-10, atol=1e-4 if single else 1e-11)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(times=grids(), step_size=st.floats(1e-2, 2.0), method=st.sampled_from(list(aca_ext.METHODS)))
    def test_fixed(self, times: list[float], step_size: float, method: str) -> None:
        t = torch.tensor(times, dtype=torch.float64)
        sol = aca_ext.solve(oscillate, rotated(0.0), t, method=method, options={"step_size": step_size})
        if len(times) > 1:
            check_chain(sol.steps, t)
            assert torch.isin(t[1:], sol.steps[:, 1]).all()
            assert (sol.steps[:, 1] - sol.steps[:, 0]).abs().max() <= step_size * (1 + 1e-8)
        truth = solve_over(oscillate, rotated(0.0), times, sol.steps.tolist(), method)
        torch.testing.assert_close(sol.y, truth, rtol=1e-12, atol=1e-13)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(times=grids(), tolerance=st.floats(1e-8, 1e-2), first_step=st.none() | st.floats(1e-4, 3.0))
    def test_error_is_of_the_size_of_the_tolerance(
        self, times: list[float], tolerance: float, first_step: float | None
    ) -> None:
        t = torch.tensor(times, dtype=torch.float64)
        options = {"first_step": first_step}
        y = aca_ext.odeint(oscillate, rotated(times[0]), t, rtol=tolerance, atol=tolerance, options=options)
        exact = torch.stack([rotated(time) for time in times])
        assert (y - exact).abs().max() <= 30 * tolerance


class TestTorchdiffeq:
    """Who replaces ``from torchdiffeq import odeint`` gets the same solution, to tolerance, from the same call."""

    @pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
    @pytest.mark.parametrize("times", [[0.0, 0.5, 2.0], [2.0, 0.7, 0.0]])
    def test_adaptive(self, method: str, times: list[float]) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint
        t, func = torch.tensor(times, dtype=torch.float64), LotkaVolterra()
        y0 = torch.ones(2, dtype=torch.float64)
        tolerance, precision = {"adaptive_heun": (1e-4, 1e-2), "fehlberg2": (1e-5, 0.1)}.get(method, (1e-6, 1e-4))
        call = {"method": method, "rtol": tolerance, "atol": tolerance}
        call["options"] = {"max_num_steps": 10_000, "safety": 0.8}
        torch.testing.assert_close(aca_ext.odeint(func, y0, t, **call), theirs(func, y0, t, **call),
                                   rtol=precision, atol=precision)  # fmt: skip

    @pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
    def test_fixed(self, method: str) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint
        t, func = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), LotkaVolterra()
        y0 = torch.ones(2, dtype=torch.float64)
        for options in ({}, {"step_size": 0.125}):
            call = {"method": method, "options": options}
            torch.testing.assert_close(aca_ext.odeint(func, y0, t, **call), theirs(func, y0, t, **call),
                                       rtol=1e-12, atol=1e-13)  # fmt: skip

    @pytest.mark.parametrize("is_tuple", [False, True])
    def test_gradients(self, is_tuple: bool) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint_adjoint
        found = []
        for odeint in (aca_ext.odeint, theirs):
            func: nn.Module = CoupledMlp() if is_tuple else Mlp()
            y0 = [sample(4, 3).requires_grad_(), sample(3, seed=1).requires_grad_()][: 2 if is_tuple else 1]
            ys = odeint(
                func,
                tuple(y0) if is_tuple else y0[0],
                torch.tensor([0.0, 0.5, 1.5]),
                rtol=1e-9,
                atol=1e-9,
                method="dopri5",
                options={"first_step": 0.01},
                adjoint_rtol=1e-9,
                adjoint_atol=1e-9,
                adjoint_method="dopri5",
                adjoint_options={"first_step": 0.01},
                adjoint_params=tuple(func.parameters()),
            )
            assert isinstance(ys, tuple) == is_tuple
            parts = list(ys) if is_tuple else [ys]
            loss = sum(part.square().sum() for part in parts)
            found.append([*parts, *torch.autograd.grad(loss, [*y0, *func.parameters()])])
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-6

    @pytest.mark.parametrize("gradient", ["aca", "adjoint"])
    def test_keywords_of_the_adjoint_reach_it(self, gradient: str) -> None:
        counts = []
        for tolerance in (1e-3, 1e-9):
            y0 = sample(2, 3).requires_grad_()
            func = Mlp()
            calls = []
            func.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            y = aca_ext.odeint(func, y0, T, gradient=gradient, rtol=1e-5, atol=1e-5,
                               adjoint_rtol=tolerance, adjoint_atol=tolerance)  # fmt: skip
            calls.clear()
            y[-1].sum().backward()
            counts.append(len(calls))
        assert (counts[0] < counts[1]) == (gradient == "adjoint")

    def test_times_receive_the_same_gradient(self) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint_adjoint
        found = []
        for odeint in (aca_ext.odeint, theirs):
            t = torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
            odeint(Mlp(), sample(2, 3), t, rtol=1e-9, atol=1e-9).square().sum().backward()
            found.append(t.grad)
        assert relative_error(*found) <= 1e-6


@pytest.mark.filterwarnings("default")  # of the compiler itself
def test_a_model_is_compiled_around_its_solve() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), aca_ext.NeuralODE(lambda t, y: torch.sin(y) * t), torch.nn.Linear(3, 1)
    )
    x = torch.randn(4, 3)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="eager")
    found = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
