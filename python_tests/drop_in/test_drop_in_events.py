"""Events by ``aca_ext.torchdiffeq``'s ``event_fn`` and ``odeint_event``, beside torchdiffeq's."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

import aca_ext.torchdiffeq as ours
from aca_ext.errors import EventError

theirs = pytest.importorskip("torchdiffeq")
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Ball(nn.Module):
    """A ball that falls, on a floor whose height is a parameter of the event function alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(9.8, dtype=torch.float64))
        self.floor = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        height, speed, floor = state
        return speed, -self.gravity * torch.ones_like(height), torch.zeros_like(floor)

    def hits(self, t: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return state[0] - state[2]

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor([10.0]).double(), torch.tensor([0.0]).double(), self.floor[None]


def bounces(of: Any, odeint: Any, ball: Ball, n: int, t0: Tensor) -> tuple[Tensor, Tensor]:
    """Time and speed of the n-th bounce, through the bounces before it."""
    state = ball.start()
    for _ in range(n):
        t0, found = of.odeint_event(ball, state, t0, event_fn=ball.hits, odeint_interface=odeint, **TIGHT)
        height, speed, floor = (part[-1] for part in found)
        state = (height + 1e-7, -0.8 * speed, floor)
    return t0, state[1]


class TestBouncingBall:
    @pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
    def test_times_and_gradients(self, interface: str) -> None:
        found = []
        for of in (ours, theirs):
            ball, t0 = Ball(), torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
            time, speed = bounces(of, getattr(of, interface), ball, 3, t0)
            grads = torch.autograd.grad(time.sum(), [ball.gravity, ball.floor, t0], retain_graph=True)
            found.append([time.reshape(()), speed, *grads])
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-5

    def test_gradients_are_exact(self) -> None:
        def time(gravity: Tensor, floor: Tensor, t0: Tensor) -> tuple[Tensor, Tensor]:
            ball = Ball()
            del ball.gravity, ball.floor
            ball.gravity, ball.floor = gravity, floor
            return bounces(ours, ours.odeint, ball, 2, t0)

        inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (9.8, 0.2, [0.5])]
        assert torch.autograd.gradcheck(time, inputs, eps=1e-6, atol=1e-5, rtol=1e-5)


def circle(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


def first(t: Tensor, y: Tensor) -> Tensor:
    return y[0]


Y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)


class TestSearch:
    @pytest.mark.parametrize("reverse", [False, True])
    def test_direction(self, reverse: bool) -> None:
        found = []
        for of in (ours, theirs):
            t0 = torch.tensor(2.0, dtype=torch.float64)
            t, y = of.odeint_event(circle, Y0, t0, event_fn=first, reverse_time=reverse, **TIGHT)
            found.append((t, y))
        assert found[0][0].item() == pytest.approx(2 + (-1 if reverse else 1) * math.pi / 2, abs=1e-8)
        torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)

    def test_the_second_time_is_no_limit(self) -> None:
        t = torch.tensor([0.0, 1e-3], dtype=torch.float64)
        found = [
            of.odeint(lambda t, y: torch.ones_like(y), Y0, t, event_fn=lambda t, y: y[0] - 1e4) for of in (ours, theirs)
        ]
        assert found[0][0].item() == pytest.approx(9999.0, rel=1e-6)
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_of_the_time(self, dtype: torch.dtype) -> None:
        t = torch.tensor([0.0, 1.0], dtype=dtype)
        event_t, y = ours.odeint(circle, Y0.to(dtype), t, event_fn=first, rtol=1e-5, atol=1e-5)
        assert (event_t.dtype, event_t.shape, y.dtype, y.shape) == (dtype, (), dtype, (2, 2))
        assert event_t.item() == pytest.approx(math.pi / 2, abs=1e-3)

    def test_integer_times_do_not_cut_the_time_of_the_event(self) -> None:
        start = torch.tensor(0)
        found, expected = (of.odeint_event(circle, Y0.float(), start, event_fn=first) for of in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        event_t, _ = ours.odeint(circle, Y0, torch.tensor([0, 1]), event_fn=first)
        assert event_t.item() == pytest.approx(math.pi / 2, abs=1e-6)

    @pytest.mark.parametrize("kind", [torch.bool, torch.int64])
    def test_event_functions_that_return_conditions(self, kind: torch.dtype) -> None:
        t0 = torch.tensor(0.0, dtype=torch.float64)
        found, expected = (
            of.odeint_event(circle, Y0, t0, event_fn=lambda t, y: (y[0] > 0).to(kind), **TIGHT) for of in (ours, theirs)
        )
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)

    def test_event_functions_that_return_no_real_tensor(self) -> None:
        for event_fn in (lambda t, y: 1.0, lambda t, y: y * 1j):
            with pytest.raises(EventError, match="must return a real tensor"):
                ours.odeint_event(circle, Y0, torch.tensor(0.0), event_fn=event_fn)

    def test_an_event_just_behind_the_start_is_found(self) -> None:
        y0 = torch.tensor([1e-4, -1.0])
        event_t, _ = ours.odeint(circle, y0, torch.tensor([0.0, 1.0]), event_fn=first, rtol=1e-4, atol=1e-4)
        assert event_t.item() == pytest.approx(1e-4, rel=1e-3)

    @pytest.mark.parametrize("interp", [None, "linear", "cubic"])
    @pytest.mark.parametrize("method", ["euler", "rk4"])
    def test_fixed_steps(self, interp: str | None, method: str) -> None:
        options = {"step_size": 0.03} if interp is None else {"step_size": 0.03, "interp": interp}
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        how = {"method": method, "options": options, "event_fn": first, "atol": 1e-12}
        torch.testing.assert_close(*(of.odeint(circle, Y0, t, **how) for of in (ours, theirs)), rtol=1e-9, atol=1e-9)

    def test_fixed_steps_end_after_20000(self) -> None:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        how = {"method": "euler", "options": {"step_size": 1e-3}}
        with torch.no_grad(), pytest.raises(EventError, match="t=20"):
            ours.odeint(lambda t, y: torch.ones_like(y), Y0, t, event_fn=lambda t, y: y[0] - 22, **how)
        with pytest.raises(ValueError, match="step_size"):
            ours.odeint(circle, Y0, t, method="euler", event_fn=first)

    def test_the_first_element_to_change_ends_the_solve(self) -> None:
        def either(t: Tensor, y: tuple[Tensor, ...]) -> Tensor:
            return torch.stack([y[0][0], 0.25 - t, -1 - y[0][1]])

        found = []
        for of in (ours, theirs):
            t0 = torch.tensor(0.0, dtype=torch.float64)
            found.append(of.odeint_event(lambda t, y: (circle(t, y[0]),), (Y0,), t0, event_fn=either, **TIGHT))
        assert found[0][0].item() == pytest.approx(0.25)
        torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_a_function_that_becomes_zero_ends_the_solve(self, sign: float) -> None:
        def until(t: Tensor, y: Tensor) -> Tensor:
            return torch.zeros_like(t) if t > 0.7 else sign * (y[0] + 3)

        t0 = torch.tensor(0.0, dtype=torch.float64)
        found = [of.odeint_event(circle, Y0, t0, event_fn=until, **TIGHT) for of in (ours, theirs)]
        assert found[0][0].item() == pytest.approx(0.7, abs=1e-9)
        torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)

    def test_a_start_on_the_surface_waits(self) -> None:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        y0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
        assert theirs.odeint(circle, y0, t, event_fn=first)[0].item() == 0
        assert ours.odeint(circle, y0, t, event_fn=first)[0].item() == pytest.approx(math.pi, abs=1e-6)

    @pytest.mark.parametrize("of", [ours, theirs], ids=["ours", "theirs"])
    def test_two_times_are_needed(self, of: Any) -> None:
        with pytest.raises(ValueError, match="t"):
            of.odeint(circle, Y0, torch.tensor([0.0, 0.5, 1.0]), event_fn=first)

    def test_through_a_wrapped_interface(self) -> None:
        interface = partial(ours.odeint_adjoint, adjoint_params=())
        y0 = Y0.clone().requires_grad_()
        t0 = torch.tensor(0.0, dtype=torch.float64)
        t, _ = ours.odeint_event(circle, y0, t0, event_fn=first, odeint_interface=interface, **TIGHT)
        t.backward()
        assert y0.grad is not None
        torch.testing.assert_close(y0.grad, torch.tensor([0.0, 1.0]).double(), rtol=1e-6, atol=1e-6)
