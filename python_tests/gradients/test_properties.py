"""Properties that hold for solves of any state and times."""

from __future__ import annotations

import torch
from autograd_reference import solve_over
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import RUNGE_KUTTA, check_chain, oscillate, rotated, sample
from torch import Tensor

import aca_ext


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
    """Solutions and gradients for random states, times, tolerances and methods, drawn by Hypothesis."""

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
    @given(times=grids(), step_size=st.floats(1e-2, 2.0), method=st.sampled_from(RUNGE_KUTTA))
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
