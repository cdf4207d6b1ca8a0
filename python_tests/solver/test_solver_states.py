"""Solves of states of every form: shapes, dtypes, memory layouts, tuples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from autograd_reference import relative_error, solve_over
from problems import LOOSE, CoupledMlp, Mlp, decay, oscillate, rotated, sample
from torch import Tensor, nn

import aca_ext

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
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
        """The norm is the largest over the components: a large constant component must not hide a small fast one."""

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
