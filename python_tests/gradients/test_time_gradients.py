"""Gradients of the requested times with fixed steps, whose sizes follow from these times."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

import aca_ext
from aca_ext import odeint, solve
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.errors import GraphError

DTYPE = torch.float64
IMPLICIT = ("implicit_euler", "implicit_midpoint", "trapezoid", "sdirk2", "radauIIA3", "radauIIA5", "gl4", "gl6")
EXACT = ("aca", "direct", "naive")
TIMES = torch.tensor([0.1, 0.7, 1.0, 2.3], dtype=DTYPE)


def grid(func: Any, y0: Any, t: Tensor) -> Tensor:
    return torch.cat([t[:1], torch.linspace(0.3, 2.0, 5, dtype=DTYPE), t[-1:]])  # nodes inside stay where they are


OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "step_size": {"step_size": 0.25},
    "n_steps": {"n_steps": 7},
    "grid_constructor": {"grid_constructor": grid},
}


class Driven(nn.Module):
    """A small network that depends on time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, torch.sin(3 * t).expand(*y.shape[:-1], 1)], -1))


def start() -> Tensor:
    return torch.randn(4, 2, dtype=DTYPE, generator=torch.Generator().manual_seed(1))


def weighted(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=DTYPE).view(y.shape)).sum()


def by_differences(value: Any, t: Tensor, step: float = 1e-6) -> Tensor:
    shifts = step * torch.eye(len(t), dtype=DTYPE)
    return torch.stack([(value(t + s) - value(t - s)) / (2 * step) for s in shifts])


def tight(method: str, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "newton_tol": 1e-12} if method in IMPLICIT or method == "kvaerno3" else options


FIXED = ("euler", "midpoint", "rk4", *IMPLICIT)
ADAPTIVE = ("bosh3", "kvaerno3", "rodas5p")  # whose steps are fixed with each of the options


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in (*FIXED, *ADAPTIVE) for n in OPTIONS if m in FIXED or n != "no option"]
)
def test_agrees_with_finite_differences(method: str, name: str) -> None:
    func, y0, settings = Driven(), start(), {"method": method, "options": tight(method, OPTIONS[name])}

    def value(t: Tensor, **further: Any) -> Tensor:
        return weighted(odeint(func, y0, t, **settings, **further))

    with torch.no_grad():
        expected = by_differences(value, TIMES)
    for gradient in EXACT:
        t = TIMES.clone().requires_grad_()
        (found,) = torch.autograd.grad(value(t, gradient=gradient), t)
        assert relative_error(found, expected) <= 1e-7, gradient


@pytest.mark.parametrize(
    "method", ["euler", "midpoint", "bosh3", "trapezoid", "implicit_midpoint", "kvaerno3", "rodas5p"]
)
def test_second_derivatives(method: str) -> None:
    func, y0 = Driven(), start()
    settings = {"method": method, "options": tight(method, {"step_size": 0.4})}

    def gradients(t: Tensor, **further: Any) -> tuple[Tensor, ...]:
        y = odeint(func, y0, t, **settings, **further)
        return torch.autograd.grad(weighted(y), [t, func.net[0].bias], create_graph=True)

    t = TIMES.clone().requires_grad_()
    found = [torch.autograd.grad(g, t, retain_graph=True)[0] for g in gradients(t)[0]]
    expected = by_differences(lambda t: gradients(t.requires_grad_())[0].detach(), TIMES, 1e-5)
    assert relative_error(torch.stack(found), expected) <= 1e-6
    mixed = [torch.autograd.grad(gradients(t, gradient=g)[1].sum(), t)[0] for g in ("aca", "direct")]
    assert relative_error(*mixed) <= 1e-9


def plain_rk4(func: Any, y: Tensor, t: Tensor) -> Tensor:
    """The 3/8 rule with one step between any two times, in plain PyTorch."""
    states = [y]
    for a, b in pairwise(t):
        h = b - a
        k1 = func(a, y)
        k2 = func(a + h / 3, y + h * k1 / 3)
        k3 = func(a + 2 * h / 3, y + h * (k2 - k1 / 3))
        k4 = func(b, y + h * (k1 - k2 + k3))
        y = y + h * (k1 + 3 * (k2 + k3) + k4) / 8
        states.append(y)
    return torch.stack(states)


@pytest.mark.parametrize(("gradient", "checkpoints"), [*((gradient, None) for gradient in EXACT), ("aca", 2)])
def test_agrees_with_autograd_through_the_steps(gradient: str, checkpoints: int | None) -> None:
    func, found = Driven(), []
    for solved in (plain_rk4, None):
        y0, t = start().requires_grad_(), torch.linspace(0, 2, 9, dtype=DTYPE).requires_grad_()
        if solved is None:
            y = odeint(func, y0, t, method="rk4", gradient=gradient, checkpoints=checkpoints)
        else:
            y = solved(func, y0, t)
        found.append(torch.autograd.grad(weighted(y), [t, y0, *func.parameters()]))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_times_that_other_operations_computed() -> None:
    """The end as a parameter: one evaluation of func belongs to each stage, and none to the gradient of t."""
    func, found = Driven(), []
    for solved in (plain_rk4, None):
        end = torch.tensor(1.5, dtype=DTYPE, requires_grad=True)
        t = torch.linspace(0, 1, 5, dtype=DTYPE) * end.square()
        if solved is None:
            solution = solve(func, start(), t, method="rk4")
            assert solution.stats.n_f_evals == 16
            y = solution.y
        else:
            y = solved(func, start(), t)
        found.append(torch.autograd.grad(weighted(y), end)[0])
    assert relative_error(*found) <= 1e-12


def test_backward_in_time_complex_trees_and_float32() -> None:
    t = torch.tensor([1.0, 0.4, -0.3], requires_grad=True)

    def func(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": 1j * y["a"] * t, "b": y["a"].sum() * y["b"]}

    def value(t: Tensor) -> Tensor:
        y0 = {"a": torch.ones(2, dtype=torch.complex128), "b": torch.full((), 0.5 + 0.2j, dtype=torch.complex128)}
        y = odeint(func, y0, t, method="midpoint", options={"step_size": 0.25})
        return y["a"][-1].real.sum() + y["b"].imag.sum()

    value(t).backward()
    assert t.grad is not None
    assert t.grad.dtype == torch.float32
    expected = by_differences(value, t.detach().double())
    assert relative_error(t.grad.double(), expected) <= 1e-6


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize(("interp", "limit"), [("cubic", 1e-4), ("linear", 3e-2)])
def test_inside_steps_it_is_accurate(interp: str, limit: float, gradient: str) -> None:
    """Requested times inside steps, where the slope of func serves."""
    func, y0, options = Driven(), start(), {"step_size": 0.05, "interp": interp}

    def value(t: Tensor) -> Tensor:
        return weighted(odeint(func, y0, t, method="rk4", options=options, gradient=gradient))

    t = TIMES.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(t), t)
    with torch.no_grad():
        assert relative_error(found, by_differences(value, TIMES)) <= limit


@pytest.mark.parametrize("gradient", EXACT)
def test_events_and_what_follows_resets(gradient: str) -> None:
    """Times and states of events, and requested times after a reset, by large fixed steps."""

    def fall(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -9.81 - 0.3 * y[1] * torch.cos(t)])

    bounce = aca_ext.Event(lambda t, y: y[0], direction=-1, reset=lambda t, y: torch.stack([y[0], -0.8 * y[1]]))

    def value(t: Tensor, speed: Tensor) -> Tensor:
        y0 = torch.stack([torch.full_like(speed, 10.0), speed])
        solution = solve(fall, y0, t, events=[bounce], method="rk4", options={"step_size": 0.3}, gradient=gradient)
        assert len(solution.events[0].t) == 2
        return weighted(solution.y) + solution.events[0].t.square().sum() + solution.events[0].y.sum()

    times = torch.tensor([0.0, 0.5, 2.0, 4.2], dtype=DTYPE)
    t, speed = times.clone().requires_grad_(), torch.tensor(1.0, dtype=DTYPE, requires_grad=True)
    found = torch.autograd.grad(value(t, speed), [t, speed])
    with torch.no_grad():
        assert relative_error(found[0], by_differences(lambda t: value(t, speed), times)) <= 1e-6
        of_speed = by_differences(lambda speed: value(times, speed[0]), speed.detach()[None])
    assert relative_error(found[1], of_speed[0]) <= 1e-6


def test_func_that_calls_autograd_draws_numbers_or_keeps_state() -> None:
    class Dropped(Driven):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                y = y if y.requires_grad else y.detach().requires_grad_()
                energy = nn.functional.dropout(super().forward(t, y), 0.3).square().sum() * (1 + t)
                return -torch.autograd.grad(energy, y, create_graph=True)[0]

    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(3)
        t, func = TIMES.clone().requires_grad_(), Dropped()
        y = odeint(func, start(), t, method="rk4", options={"step_size": 0.4}, gradient=gradient)
        found.append(torch.autograd.grad(weighted(y), [t, *func.parameters()]))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-11


def test_the_graph_engine_refuses() -> None:
    with pytest.raises(GraphError, match="t, which requires grad, with fixed steps"):
        odeint(Driven(), start(), TIMES.clone().requires_grad_(), method="rk4", engine="graph")


@pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")
def test_the_compiled_engine_makes_the_steps_in_python() -> None:
    func, found = Driven(), []
    for engine in ("eager", "compiled"):
        t = TIMES.clone().requires_grad_()
        solution = solve(func, start(), t, method="rk4", engine=engine)
        found.append(torch.autograd.grad(weighted(solution.y), [t, *func.parameters()]))
    assert "t, which requires grad, with fixed steps" in str(solution.stats.reason)
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_adjoint_and_adams_take_the_slope() -> None:
    """Their gradients of t are as accurate as the solution, as with adaptive steps."""
    k, y0 = -0.7, torch.ones(1, dtype=DTYPE)
    for settings in ({"method": "rk4", "gradient": "adjoint"}, {"method": "explicit_adams"}):
        t = torch.tensor([0.0, 1.0, 1.5], dtype=DTYPE, requires_grad=True)
        y = odeint(lambda t, y: k * y, y0, t, options={"step_size": 0.02}, **settings)
        (found,) = torch.autograd.grad(y[-1].sum(), t)
        expected = k * y[-1].item()
        assert found.tolist() == pytest.approx([-expected, 0.0, expected], rel=1e-6)


@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize(
    ("times", "options", "expected"),
    [
        ([0.0, 2.0], {"step_size": 0.01}, [-1.0, 3.0]),
        ([0.0, 1.0, 2.0], {}, [-1.0, 0.0, 3.0]),
        ([0.0, 1.0, 2.0], {"step_size": 0.25}, [-1.0, 0.0, 3.0]),
    ],
)
def test_jumps_of_func_do_not_move_with_the_nodes(
    times: list[float], options: dict[str, Any], expected: list[float], gradient: str
) -> None:
    """Option perturb says that func jumps at nodes; the slopes beside the jump serve for the gradient."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 1, 1.0, 3.0) + 0 * y

    t = torch.tensor(times, dtype=DTYPE, requires_grad=True)
    y0, options = torch.zeros(1, dtype=DTYPE), {**options, "perturb": True}
    y = odeint(func, y0, t, method="rk4", options=options, gradient=gradient)
    (found,) = torch.autograd.grad(y[-1].sum(), t)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
