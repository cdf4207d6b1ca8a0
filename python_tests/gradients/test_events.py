"""Events: where they are found, how a solve goes on after them, and their gradients against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import aca_ext
from aca_ext import METHODS, Event, odeint, solve
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, EventError, NonFiniteError, OptionError, TimeError

DTYPE = torch.float64
G = 9.81
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
KINDS: dict[str, dict[str, Any]] = {
    "aca": {},
    "direct": {"gradient": "direct"},
    "naive": {"gradient": "naive"},
    "one checkpoint": {"checkpoints": 1},
    "rk4": {"method": "rk4", "options": {"step_size": 0.1}},
    "tsit5": {"method": "tsit5"},
}


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**TIGHT, **KINDS[request.param]}


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=DTYPE, requires_grad=True)


def fall(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -G + 0 * y[1]])


def bounce(restitution: Tensor | float) -> Event:
    def reset(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([0 * y[0], -restitution * y[1]])

    return Event(lambda t, y: y[0], direction=-1, reset=reset)


def test_bouncing_ball(settings: dict[str, Any]) -> None:
    """Times of all bounces, and the height at the end, with their gradients, in closed form."""
    height, restitution = number(10.0), number(0.8)
    y0 = torch.stack([height, torch.zeros((), dtype=DTYPE)])
    solution = solve(fall, y0, [0.0, 1.0, 3.0, 6.0], events=[bounce(restitution)], **settings)
    (bounces,) = solution.events
    speed = (2 * G * height).sqrt()
    exact = [speed / G]
    for _ in range(len(bounces.t)):
        speed = restitution * speed
        exact.append(exact[-1] + 2 * speed / G)
    assert len(bounces.t) == 3
    assert torch.allclose(bounces.t, torch.stack(exact[:3]), rtol=1e-12)
    left = 6.0 - exact[2]
    for found, expected in ((bounces.t[2], exact[2]), (solution.y[-1, 0], speed * left - G / 2 * left**2)):
        assert found.item() == pytest.approx(expected.item(), rel=1e-11)
        gradients = torch.autograd.grad(found, [height, restitution], retain_graph=True)
        for one, other in zip(
            gradients, torch.autograd.grad(expected, [height, restitution], retain_graph=True), strict=True
        ):
            assert one.item() == pytest.approx(other.item(), rel=1e-9)
    assert solution.is_complete
    assert solution.ended_by is None
    assert solution.steps.shape[1] == 2
    assert torch.equal(solution.t, torch.tensor([0.0, 1.0, 3.0, 6.0], dtype=DTYPE))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_backward", [False, True])
def test_every_method_finds_a_terminal_event(method: str, is_backward: bool) -> None:
    """Exponential decay to a level that depends on time; the gradient against finite differences of the same steps."""
    rate, level = number(1.3), number(0.4)
    fixed = (
        {"step_size": 0.05} if not METHODS[method].adaptive else {"first_step": 0.05, "max_step": 0.05, "ifactor": 1.0}
    )
    sign = -1.0 if is_backward else 1.0

    def time_of(rate: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        event = Event(lambda t, y: y - level * (1 + 0.1 * sign * t), terminal=True)
        y0 = torch.tensor([1.0], dtype=DTYPE)
        times = [0.0, sign * 10.0]
        solution = solve(
            lambda t, y: -sign * rate * y, y0, times, rtol=1.0, method=method, options=fixed, events=[event]
        )
        assert solution.ended_by == 0
        assert len(solution.t) == 1
        return solution.events[0].t[0], solution.events[0].y[0, 0]

    t, y = time_of(rate, level)
    assert y.item() == pytest.approx(level.item() * (1 + 0.1 * sign * t.item()), rel=1e-13)
    assert math.exp(-1.3 * sign * t.item()) == pytest.approx(y.item(), rel=0.03 if METHODS[method].order == 1 else 2e-3)
    gradients = torch.autograd.grad(t, [rate, level])
    for i, gradient in enumerate(gradients):
        ends = []
        for step in (1e-6, -1e-6):
            values = [1.3, 0.4]
            values[i] += step
            with torch.no_grad():
                ends.append(time_of(*(torch.tensor(v, dtype=DTYPE) for v in values))[0].item())
        assert gradient.item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


class Leaky(nn.Module):
    """A neuron that spikes at a threshold, driven by a current."""

    def __init__(self) -> None:
        super().__init__()
        self.current = nn.Parameter(torch.tensor(1.5, dtype=DTYPE))
        self.threshold = nn.Parameter(torch.tensor(1.0, dtype=DTYPE))

    def forward(self, t: Tensor, v: Tensor) -> Tensor:
        return self.current - v


def test_spiking_neuron(settings: dict[str, Any]) -> None:
    """The parameter of the event function alone has a gradient too; the interval between spikes is known."""
    neuron = Leaky()
    event = Event(lambda t, v: v - neuron.threshold, direction=1, reset=lambda t, v: 0 * v)
    solution = solve(neuron, torch.zeros(1, dtype=DTYPE), [0.0, 6.0], events=[event], **settings)
    spikes = solution.events[0].t
    interval = torch.log(neuron.current / (neuron.current - neuron.threshold))
    assert len(spikes) == 5
    assert torch.allclose(spikes, interval * torch.arange(1, 6, dtype=DTYPE), rtol=1e-6)
    parameters = list(neuron.parameters())
    found = torch.autograd.grad(spikes[-1], parameters)
    for one, other in zip(found, torch.autograd.grad(5 * interval, parameters), strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("jump", [0.7, 0.9, 1.1])
def test_jumps_of_func_after_a_reset(jump: float, dtype: torch.dtype) -> None:
    def steep(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < jump, 1.0, 100.0).to(y) * torch.ones_like(y)

    times = torch.tensor([0.0, jump, 2.0], dtype=torch.float64)
    events = [Event(lambda t, y: t - 0.3 + 0 * y, reset=lambda t, y: y + 1)]
    exact = 1 + jump + 100 * (2 - jump)
    for call in (
        {"method": "rk4", "options": {"step_size": 0.1, "perturb": True}},
        {"method": "dopri5", "options": {"jump_t": [jump]}},
    ):
        solution = solve(steep, torch.zeros(1, dtype=dtype), times, events=events, **call)
        assert solution.y[-1].item() == pytest.approx(exact, rel=1e-6)
        assert solution.stats.n_steps <= 25


def test_func_that_depends_on_time_goes_on_in_absolute_time(settings: dict[str, Any]) -> None:
    """dy/dt = a·t with a dose at y = 1: y jumps by the dose, and time does not start anew."""
    a, dose = number(0.5), number(-0.7)
    event = Event(lambda t, y: y - 1, reset=lambda t, y: y + dose)
    times = torch.tensor([0.0, 2.5, 4.0], dtype=DTYPE)
    solution = solve(lambda t, y: a * t + 0 * y, torch.zeros(1, dtype=DTYPE), times, events=[event], **settings)
    first = (2 / a).sqrt()
    second = (2 * (1 - dose) / a).sqrt()
    assert torch.allclose(solution.events[0].t[:2], torch.stack([first, second]), rtol=1e-9)
    for found, expected in ((solution.y[1, 0], a / 2 * 2.5**2 + dose), (solution.events[0].t[1], second)):
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        gradients = torch.autograd.grad(found, [a, dose], retain_graph=True)
        for one, other in zip(gradients, torch.autograd.grad(expected, [a, dose], retain_graph=True), strict=True):
            assert one.item() == pytest.approx(other.item(), rel=1e-8)


def circle(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


START = torch.tensor([0.0, 1.0], dtype=DTYPE)  # y = (sin t, cos t)


def test_events_that_do_not_end_the_solve() -> None:
    events = [
        Event(lambda t, y: y[0]),
        Event(lambda t, y: y[0], direction=1),
        Event(lambda t, y: y[0], direction=-1),
        Event(lambda t, y: torch.stack([y[0] - 0.5, y[1]])),
        Event(lambda t, y: y[0] - 1.5),
    ]
    solution = solve(circle, START, [0.0, 5.0, 10.0], events=events, **TIGHT)
    pi = math.pi
    expected = [
        [pi, 2 * pi, 3 * pi],  # the start on the surface does not count
        [2 * pi],
        [pi, 3 * pi],
        sorted([pi / 6, 5 * pi / 6, 13 * pi / 6, 17 * pi / 6, pi / 2, 3 * pi / 2, 5 * pi / 2]),
        [],
    ]
    for record, times in zip(solution.events, expected, strict=True):
        assert record.t.tolist() == pytest.approx(times, abs=1e-9)
        assert torch.allclose(record.y, torch.stack([record.t.sin(), record.t.cos()], 1), atol=1e-9)
        assert record.y.shape == (len(times), 2)
    assert len(solution.t) == 3
    assert torch.allclose(solution.y[:, 0], torch.tensor([0.0, 5.0, 10.0], dtype=DTYPE).sin(), atol=1e-8)


def test_a_touch_does_not_count() -> None:
    parabola = Event(lambda t, y: y[0] - 1)  # sin t touches 1
    options = {"max_step": 0.05}
    solution = solve(circle, START, [0.0, 3.0], events=[parabola], options=options, rtol=1e-6, atol=1e-6)
    assert len(solution.events[0].t) in (0, 2)  # up to the error of the solution


def test_several_events_in_one_step_come_in_order() -> None:
    events = [Event(lambda t, y, c=c: y - c) for c in (0.3, 0.1, 0.2)]
    solution = solve(lambda t, y: 1 + 0 * y, torch.zeros(1, dtype=DTYPE), [0.0, 5.0], events=events)
    assert [record.t.item() for record in solution.events] == pytest.approx([0.3, 0.1, 0.2])


def test_the_first_of_several_terminal_events_ends_the_solve() -> None:
    events = [
        Event(lambda t, y: y - 0.3, terminal=True),
        Event(lambda t, y: y - 0.1),
        Event(lambda t, y: y - 0.2, terminal=True),
    ]
    solution = solve(lambda t, y: 1 + 0 * y, torch.zeros(1, dtype=DTYPE), [0.0, 0.15, 0.25, 5.0], events=events)
    assert solution.ended_by == 2
    assert [len(record.t) for record in solution.events] == [0, 1, 1]
    assert solution.t.tolist() == [0.0, 0.15]
    assert not solution.is_complete


@pytest.mark.parametrize("is_tuple", [False, True])
def test_a_reset_may_write_into_its_state(is_tuple: bool) -> None:
    def reset(t: Tensor, y: Any) -> Any:
        (y[0] if is_tuple else y).add_(1.0)
        return y

    y0, t = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    event = Event(lambda t, y: t - 1.0, reset=reset)
    if is_tuple:
        solution = solve(lambda t, y: (-y[0],), (y0,), t, events=[event])
        before, end = solution.events[0].y[0], solution.y[0][-1]
    else:
        solution = solve(lambda t, y: -y, y0, t, events=[event])
        before, end = solution.events[0].y, solution.y[-1]
    assert before.item() == pytest.approx(2 * math.exp(-1), rel=1e-5)
    assert end.item() == pytest.approx((2 * math.exp(-1) + 1) * math.exp(-1), rel=1e-5)


def test_resets_at_the_same_time_act_in_order() -> None:
    events = [
        Event(lambda t, y: t - 1.0, reset=lambda t, y: 2 * y),
        Event(lambda t, y: t - 1.0, reset=lambda t, y: y + 10),
    ]
    solution = solve(lambda t, y: 0 * y, torch.ones(1, dtype=DTYPE), [0.0, 2.0], events=events)
    assert solution.y[-1].item() == 12.0
    assert [len(record.t) for record in solution.events] == [1, 1]


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@pytest.mark.parametrize("kind", ["tuple", "namedtuple", "complex"])
def test_states_of_every_form(kind: str) -> None:
    if kind == "complex":
        y0: Any = torch.tensor([1.0 + 0.0j], dtype=torch.complex128, requires_grad=True)
        func: Any = lambda t, y: 1j * y  # noqa: E731
        event = Event(lambda t, y: y.real, reset=lambda t, y: y.conj())
        read = lambda y: y[-1].real.sum()  # noqa: E731
    else:
        parts = torch.tensor([1.0], dtype=DTYPE, requires_grad=True), torch.zeros(1, 2, dtype=DTYPE)
        y0 = parts if kind == "tuple" else Pair(*parts)
        make = (lambda a, b: (a, b)) if kind == "tuple" else Pair
        func = lambda t, y: make(y[1][:, 0], -y[0] * torch.ones(1, 2, dtype=DTYPE))  # noqa: E731
        event = Event(lambda t, y: y[0], reset=lambda t, y: make(-y[0], 0.5 * y[1]))
        read = lambda y: y[0][-1].sum()  # noqa: E731
    found = []
    for gradient in ("aca", "direct"):
        solution = solve(func, y0, [0.0, 1.0, 4.0], events=[event], gradient=gradient, **TIGHT)
        record = solution.events[0]
        assert record.t[0].item() == pytest.approx(math.pi / 2)
        leaf = y0 if kind == "complex" else y0[0]
        found.append(torch.autograd.grad(read(solution.y) + record.t[0], leaf)[0])
        if kind == "namedtuple":
            assert isinstance(record.y, Pair)
            assert isinstance(solution.y, Pair)
    assert torch.allclose(*found, rtol=1e-10)


def test_float32_times_and_state() -> None:
    times = torch.tensor([0.0, 1.0, 6.0], requires_grad=True)
    y0 = torch.tensor([10.0, 0.0], requires_grad=True)
    solution = solve(fall, y0, times, events=[bounce(0.8)])
    assert solution.events[0].t.dtype == torch.float32
    assert solution.events[0].t[0].item() == pytest.approx(math.sqrt(20 / G), rel=1e-5)
    grads = torch.autograd.grad(solution.y[-1].sum() + solution.events[0].t.sum(), [times, y0])
    assert all(torch.isfinite(g).all() for g in grads)


def test_event_fn_as_torchdiffeq_has_it() -> None:
    y0 = torch.tensor([1.0, 2.0], dtype=DTYPE, requires_grad=True)
    t, y = odeint(lambda t, y: -y, y0, torch.tensor([0.0, 100.0], dtype=DTYPE), event_fn=lambda t, y: y - 0.5)
    assert t.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.allclose(y, torch.stack([y0, y0 / 2]), rtol=1e-6)
    (g,) = torch.autograd.grad(t, y0)
    assert g.tolist() == pytest.approx([1.0, 0.0], rel=1e-6)
    with pytest.raises(EventError, match="no sign up to t=100"):
        odeint(lambda t, y: -y, y0, [0.0, 100.0], event_fn=lambda t, y: y + 0.5)
    with pytest.raises(TimeError, match="second time"):
        odeint(lambda t, y: -y, y0, [0.0], event_fn=lambda t, y: y - 0.5)


def test_callbacks_see_absolute_times() -> None:
    seen: list[Any] = []
    solve(fall, START, [0.0, 0.5], events=[bounce(0.8)], callback=seen.append)
    times = [step.t for step in seen]
    assert times == sorted(times)
    assert seen[-1].t_next == pytest.approx(0.5)


def test_second_derivatives_are_refused() -> None:
    height = number(10.0)
    solution = solve(fall, torch.stack([height, 0 * height]), [0.0, 3.0], events=[bounce(0.8)])
    with pytest.raises(EventError, match="second derivatives"):
        torch.autograd.grad(solution.events[0].t[0], height, create_graph=True)


def test_an_event_without_a_derivative_has_no_gradient() -> None:
    y0 = number(1.0)
    event = Event(lambda t, y: (y > 0.5).double() - 0.5 + 0 * y, terminal=True)
    solution = solve(lambda t, y: -y, y0, [0.0, 3.0], events=[event], **TIGHT)
    assert solution.events[0].t.item() == pytest.approx(math.log(2), abs=1e-8)
    with pytest.raises(EventError, match="does not change along the solution"):
        torch.autograd.grad(solution.events[0].t.sum(), y0)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Event(lambda t, y: 1.0), "returned float"),
        (Event(lambda t, y: y * float("nan")), "NaN or infinity"),
        (Event(lambda t, y: 1j * y), "complex128"),
        (Event(lambda t, y: y < 0.5), "returned a condition"),
        (Event(lambda t, y: y - 0.5, reset=lambda t, y: y[0]), "returned shape"),
        (Event(lambda t, y: y - 0.5, reset=lambda t, y: 1.0), "no state"),
    ],
)
def test_functions_that_return_nonsense(event: Event, message: str) -> None:
    with pytest.raises(EventError, match=message):
        solve(lambda t, y: -y, torch.ones(1, dtype=DTYPE), [0.0, 3.0], events=[event])


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
@pytest.mark.parametrize(
    ("func", "start", "settings"),
    [
        (lambda t, y: 0 * y, 0.0, {"max_step": 0.3}),
        (lambda t, y: -y, 0.0, {"first_step": 1e-8, "max_step": 0.3}),
        (lambda t, y: -1e6 * y, 1000.0, {"method": "kvaerno5", "max_step": 0.3}),
    ],
    ids=["constant", "small first step", "stiff"],
)
def test_resets_at_times_go_on_from_times_that_are_rounded(
    func: Any, start: float, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    """The next segment starts at a rounded zero of the function, which is no second occurrence."""
    method = {"method": settings["method"]} if "method" in settings else {}
    given = {name: value for name, value in settings.items() if name != "method"} | options
    dose = Event(lambda t, y: torch.cos(math.pi * t), direction=-1, reset=lambda t, y: y + 1)
    y0 = torch.zeros(2, 1, dtype=DTYPE)
    solution = solve(func, y0, [start, start + 5.0], events=[dose], options=given, **method)
    expected = torch.tensor([0.5, 2.5, 4.5], dtype=DTYPE) + start
    torch.testing.assert_close(solution.events[0].t, expected if not options else expected.expand(2, 3))


def test_chattering_is_an_error() -> None:
    with pytest.raises(EventError, match="chatters"):
        solve(fall, torch.tensor([10.0, 0.0], dtype=DTYPE), [0.0, 30.0], events=[bounce(0.5)])


def test_arguments_that_do_not_go_together() -> None:
    y0, event = torch.ones(1, dtype=DTYPE), Event(lambda t, y: y - 0.5, reset=lambda t, y: y)
    decay = lambda t, y: -y  # noqa: E731
    for settings in (
        {"gradient": "adjoint"},
        {"options": {"on_step_limit": "stop"}},
    ):
        with pytest.raises(ArgumentValueError, match="events are given"):
            solve(decay, y0, [0.0, 1.0], events=[event], **settings)
    with pytest.raises(aca_ext.errors.GraphError, match="events"):
        solve(decay, y0, [0.0, 1.0], events=[event], engine="graph")
    with pytest.raises(OptionError, match="grid_constructor"):
        solve(decay, y0, [0.0, 1.0], events=[event], options={"grid_constructor": lambda f, y, t: t})
    with pytest.raises(ArgumentValueError, match="one of them"):
        odeint(decay, y0, [0.0, 1.0], events=[event], event_fn=lambda t, y: y)
    with pytest.raises(ArgumentValueError, match="terminal"):
        aca_ext.NeuralODE(nn.Linear(1, 1), events=[Event(lambda t, y: y, terminal=True)])
    with pytest.raises(ArgumentValueError, match="terminal"):
        odeint(decay, y0, [0.0, 1.0], events=[Event(lambda t, y: y, terminal=True)])
    with pytest.raises(ArgumentTypeError, match="give a list"):
        solve(decay, y0, [0.0, 1.0], events=event)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"events\[0\] is of type function"):
        solve(decay, y0, [0.0, 1.0], events=[decay])  # type: ignore[list-item]
    with pytest.raises(ArgumentValueError, match=r"terminal.*reset"):
        Event(decay, terminal=True, reset=decay)
    with pytest.raises(ArgumentValueError, match="direction"):
        Event(decay, direction=2)


@pytest.mark.parametrize("options", [None, {"batch": "independent"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reset_of_lower_precision_does_not_lower_that_of_the_solve(dtype: torch.dtype, options: Any) -> None:
    found = []
    for kind in (dtype, torch.float64):
        event = Event(lambda t, y: y[..., 0] - 2, reset=lambda t, y, kind=kind: (0 * y + 0.5).to(kind))
        y0, t = torch.ones(2, 2, dtype=torch.float64), torch.tensor([0.0, 3.0], dtype=torch.float64)
        y0 = y0[0] if options is None else y0
        how: dict[str, Any] = {"events": [event], "options": options, **TIGHT}
        found.append(solve(lambda t, y: 1 - 0.1 * y, y0, t, **how).y)
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_errors_after_a_reset_tell_the_time_of_the_solve() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 1.5, torch.nan, 1.0) * torch.ones_like(y)

    event = Event(lambda t, y: y[0] - 2, reset=lambda t, y: y / 2)
    y0 = torch.ones(1, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="count from the reset at t=1") as caught:
        solve(func, y0, [0.0, 3.0], events=[event])
    assert caught.value.t == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_backward", [False, True])
def test_resets_at_close_times_all_act(is_backward: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Backward in time too, and where the times differ by few roundings: none is missed, and none acts twice."""
    first = 100.0
    second = first + 16 * 100 * torch.finfo(dtype).eps
    doses = [Event(lambda t, y, at=at: (t - at).flatten(), reset=lambda t, y: y + 1) for at in (first, second)]
    y0 = torch.zeros(1, 1, dtype=dtype)
    times = torch.tensor([99.0, 101.0], dtype=DTYPE)
    times = times.flip(0) if is_backward else times
    solution = solve(lambda t, y: 0 * y, y0, times, events=doses, options=options or None)
    assert solution.y[-1].item() == 2
    for record, at in zip(solution.events, (first, second), strict=True):
        assert record.t.item() == pytest.approx(at, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
def test_bouncing_ball_backward_in_time(options: dict[str, Any]) -> None:
    """Resets that leave the state on the surface; the same motion as forward in time."""

    def fall(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[:, 1], torch.full_like(y[:, 1], -G)], 1)

    bounce = Event(lambda t, y: y[:, 0], reset=lambda t, y: torch.stack([0 * y[:, 0], -0.8 * y[:, 1]], 1))
    y0 = torch.tensor([[10.0, 0.0]], dtype=DTYPE)
    forward, backward = (solve(fall, y0, [0.0, end], events=[bounce], options=options or None) for end in (6.0, -6.0))
    assert forward.events[0].t.numel() == 3
    torch.testing.assert_close(backward.events[0].t, -forward.events[0].t)


def stiff_towards_cosine(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    return -k * (y - torch.cos(t))


seen: list[float] = []  # times that the functions in options got


def its_jacobian(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    seen.append(float(t.max()))
    identity = torch.eye(2, dtype=torch.float64) * -k
    return identity if y.dim() == 1 else identity.expand(len(y), 2, 2)


def its_inverse(t: Tensor, y: Tensor, c: float, k: Tensor) -> Callable[[Tensor], Tensor]:
    seen.append(float(t))
    return lambda v: v / (1 + c * k.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"jacobian": its_jacobian},
        {"jacobian": its_jacobian, "batch": "independent"},
        {"jacobian": "krylov", "preconditioner": its_inverse},
    ],
    ids=["jacobian", "jacobians of samples", "preconditioner"],
)
def test_functions_in_options_get_the_time_and_arguments_of_func(options: dict[str, Any]) -> None:
    """After a reset, too, where the solve counts time from the reset."""
    y0 = torch.tensor([2.0, 3.0], dtype=torch.float64)
    y0 = y0.expand(3, 2).clone() if "batch" in options else y0

    def up(t: Tensor, y: Tensor) -> Tensor:
        seen.clear()
        return y + 1

    reset = Event(lambda t, y: t - 1.3 + 0 * y[..., 0], reset=up)
    found = []
    for given in (options, {name: value for name, value in options.items() if name == "batch"}):
        k = torch.tensor(1000.0, dtype=torch.float64, requires_grad=True)
        how: dict[str, Any] = {"method": "kvaerno5", "rtol": 1e-6, "atol": 1e-8, "options": given}
        solution = solve(stiff_towards_cosine, y0, [0.0, 1.0, 1.32], args=(k,), events=[reset], **how)
        least = min(seen, default=None)  # since the reset
        (gradient,) = torch.autograd.grad(solution.y[-1].sum(), k)
        found.append((solution.y[-1].detach(), gradient, solution.stats.n_f_evals, least))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-9)
    assert found[0][2] < 1.5 * found[1][2]
    assert found[0][3] == pytest.approx(1.3, abs=1e-9)
