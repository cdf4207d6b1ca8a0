"""Events of independent samples: those of each sample alone, with the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import METHODS, Event, odeint, solve
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.errors import ArgumentValueError, EventError, TimeError

DTYPE = torch.float64
INDEPENDENT = {"batch": "independent"}
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
MEDIUM: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
T = torch.tensor([0.0, 0.4, 1.5, 4.0], dtype=DTYPE)


class Oscillators(nn.Module):
    """Damped oscillators, each with its own frequency (an argument), with shared parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.damping = nn.Parameter(torch.tensor(0.1, dtype=DTYPE))
        self.level = nn.Parameter(torch.tensor(0.3, dtype=DTYPE))
        self.restitution = nn.Parameter(torch.tensor(0.9, dtype=DTYPE))
        self.drift = nn.Parameter(torch.tensor(0.05, dtype=DTYPE))

    def forward(self, t: Tensor, y: Tensor, frequency: Tensor) -> Tensor:
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v, -(frequency**2) * x - self.damping * v + 0.1 * torch.cos(t)], 1)

    def crosses_level(self, t: Tensor, y: Tensor) -> Tensor:
        return y[:, :1] - self.level + self.drift * t

    def bounce(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, :1] + 0.01 * t, -self.restitution * y[:, 1:]], 1)

    def both(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, :1] + 0.2, y[:, 1:] * (1 + self.level)], 1)


def oscillators(n: int = 5) -> tuple[Oscillators, Tensor, Tensor]:
    frequency = torch.linspace(0.02, 6.0, n, dtype=DTYPE).view(n, 1).requires_grad_()
    y0 = torch.cat([torch.linspace(1.0, 1.4, n, dtype=DTYPE).view(n, 1), sample(n, 1)], 1).requires_grad_()
    return Oscillators(), y0, frequency


def times_of(record: aca_ext.solution.EventRecord, i: int) -> tuple[Tensor, Tensor]:
    """Times and states of the occurrences in sample ``i`` of a batch."""
    t, y = record.t[i].reshape(-1), record.y[i]
    y = y.reshape(len(t), *y.shape[record.t.dim() - 1 :])
    return t[~t.isnan()], y[~t.isnan()]


def weighted(x: Tensor, seed: int) -> Tensor:
    return (x * sample(*x.shape, seed=seed)).sum()


def compare(
    make_events: Callable[[Oscillators], list[Event]], t: Tensor = T, n: int = 5, alone: Any = None, **call: Any
) -> aca_ext.Solution:
    """Checks times, states, steps and gradients against those of each sample alone, with common steps."""
    func, y0, frequency = oscillators(n)
    events = make_events(func)
    call = {**MEDIUM, **call}
    options = {**INDEPENDENT, **call.pop("options", {})}
    together = solve(func, y0, t, args=(frequency,), events=events, options=options, **call)
    losses, expected = [], []
    for i in range(n):
        own = t if t.dim() == 1 else t[i][~t[i].isnan()]
        one = solve(func, y0[i : i + 1], own, args=(frequency[i : i + 1],), events=events, **call)
        assert torch.allclose(together.steps[i], one.steps, rtol=1e-9)
        assert together.ended_by is not None
        assert together.ended_by[i].item() == (-1 if one.ended_by is None else one.ended_by)
        count = len(one.t)
        assert relative_error(together.y[:count, i], one.y[:, 0]) <= 1e-12
        assert together.y[count:, i].isnan().all()
        losses.append(weighted(together.y[:count, i], i))
        expected.append(weighted(one.y[:, 0], i))
        for j, (record, of_one) in enumerate(zip(together.events, one.events, strict=True)):
            times, states = times_of(record, i)
            assert len(times) == len(of_one.t)
            if len(times) == 0:
                continue
            assert relative_error(times, of_one.t) <= 1e-12
            assert relative_error(states, of_one.y[:, 0]) <= 1e-12
            losses += [weighted(times, i + j), weighted(states, i + j + 7)]
            expected += [weighted(of_one.t, i + j), weighted(of_one.y[:, 0], i + j + 7)]
    wanted = [y0, frequency, *func.parameters(), *([t] if t.requires_grad else [])]
    found = torch.autograd.grad(sum(losses), wanted, allow_unused=True)
    for one_grad, exact in zip(found, torch.autograd.grad(sum(expected), wanted, allow_unused=True), strict=True):
        # Contributions of many events cancel in part.
        assert (exact is None) or relative_error(one_grad, exact) <= 1e-10
    return together


def terminal(func: Oscillators) -> list[Event]:
    return [Event(func.crosses_level, terminal=True)]


@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_terminal_event_ends_each_sample_by_itself(method: str, gradient: str) -> None:
    loose = {"rtol": 1e-3, "atol": 1e-4} if METHODS[method].order < 4 else {}
    solution = compare(terminal, method=method, gradient=gradient, **loose)
    (record,) = solution.events
    assert record.t.shape == (5,)
    assert record.y.shape == (5, 2)
    ended = solution.ended_by == 0
    assert 1 < ended.sum() < 5
    assert torch.equal(record.t.isnan(), ~ended)
    assert not solution.is_complete


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_events_that_end_nothing(gradient: str) -> None:
    def events(func: Oscillators) -> list[Event]:
        return [
            Event(func.crosses_level, direction=-1),
            Event(func.both),
            Event(func.crosses_level, direction=1),
            Event(lambda t, y: y[:, :1] - 100.0),
        ]

    solution = compare(events, gradient=gradient)
    first, second, third, never = solution.events
    n = (~second.t.isnan()).sum(1)
    assert second.t.shape == (5, n.max())
    assert second.y.shape == (5, n.max(), 2)
    assert len(set(n.tolist())) > 2
    assert never.t.shape == (5, 0)
    assert first.t.shape[1] >= third.t.shape[1] >= 1
    assert solution.is_complete
    assert (solution.ended_by == -1).all()


def test_terminal_and_other_events_with_ragged_times_and_compact() -> None:
    nan = math.nan
    t = torch.tensor(
        [[0, 1, 2, 9], [0, nan, nan, nan], [0, 0.2, nan, nan], [0, -1, -5, nan], [1, 2, 3, 4.5]], dtype=DTYPE
    )

    def events(func: Oscillators) -> list[Event]:
        return [
            Event(func.both),
            Event(func.crosses_level, direction=-1),
            Event(lambda t, y: y[:, 1:] - 3.0, terminal=True),
        ]

    compare(events, t=t)
    compare(events, t=t.clone().requires_grad_())
    compare(terminal, t=t.clone().requires_grad_(), gradient="direct")


def test_compact_leaves_out_the_samples_that_events_ended() -> None:
    func, y0, frequency = oscillators(8)
    found = []
    for options in (INDEPENDENT, INDEPENDENT | {"compact": True}):
        solution = solve(func, y0, T, args=(frequency,), events=terminal(func), options=options, **MEDIUM)
        loss = solution.y.nansum() + solution.events[0].t.nansum() + solution.events[0].y.square().nansum()
        found.append((solution, torch.autograd.grad(loss, [y0, frequency, func.damping, func.level])))
    (whole, expected), (compact, grads) = found
    assert torch.equal(whole.events[0].t.nan_to_num(7.0), compact.events[0].t.nan_to_num(7.0))
    assert compact.stats.n_f_rows < whole.stats.n_f_rows
    for one, other in zip(grads, expected, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_gradients_against_finite_differences() -> None:
    func, y0, frequency = oscillators(4)
    with torch.no_grad():
        y0, frequency = y0[2:].clone(), frequency[2:].clone()
    inputs = [y0, frequency, func.damping, func.level, func.drift]

    def ends() -> Tensor:
        solution = solve(
            func, y0, T, args=(frequency,), events=terminal(func), options=INDEPENDENT, rtol=1e-11, atol=1e-11
        )
        return weighted(solution.events[0].t, 1) + weighted(solution.events[0].y, 2)

    for x in inputs:
        x.requires_grad_()
    grads = torch.autograd.grad(ends(), inputs)
    for x, grad in zip(inputs, grads, strict=True):
        for k in range(x.numel()):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    x.view(-1)[k] += step
                    values.append(ends().item())
                    x.view(-1)[k] -= step
            assert grad.reshape(-1)[k].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=2e-5, abs=1e-7)


def test_func_need_not_exist_beyond_the_event() -> None:
    """Torricelli: the tank is empty at y = 0, and the square root of less is NaN. Other samples go on."""
    y0 = torch.tensor([[1.0], [4.0], [100.0]], dtype=DTYPE, requires_grad=True)
    hole = torch.tensor(1.0, dtype=DTYPE, requires_grad=True)
    t = torch.tensor([0.0, 5.0], dtype=DTYPE)
    for gradient in ("aca", "direct"):
        solution = solve(
            lambda t, y: torch.where(y > 1e-3, -hole * torch.sqrt(y), math.nan), y0, t, options=INDEPENDENT,
            events=[Event(lambda t, y: y - 0.01, terminal=True)], gradient=gradient, rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        exact = 2 * (y0.sqrt() - 0.1) / hole
        assert torch.allclose(solution.events[0].t[:2], exact[:2, 0], rtol=1e-6)
        assert solution.events[0].t[2].isnan()
        for found, expected in zip(
            torch.autograd.grad(solution.events[0].t[:2].sum() + solution.y[-1, 2, 0], [y0, hole]),
            torch.autograd.grad(exact[:2].sum() + ((y0[2, 0].sqrt() - 2.5 * hole) ** 2), [y0, hole]),
            strict=True,
        ):
            assert relative_error(found, expected) <= 1e-6


@pytest.mark.parametrize("kind", ["tuple", "complex", "vector", "float32"])
def test_states_of_every_form(kind: str) -> None:
    if kind == "tuple":
        y0: Any = (sample(3, 2).requires_grad_(), torch.zeros(3, dtype=DTYPE))
        solution = solve(lambda t, y: (-y[0], torch.ones_like(y[1])), y0, [0.0, 3.0], options=INDEPENDENT,
                         events=[Event(lambda t, y: y[1] - torch.tensor([1.0, 2.0, 9.0])),
                                 Event(lambda t, y: y[1] - 2.5, terminal=True)])  # fmt: skip
        assert torch.allclose(solution.events[0].t[:2, 0], torch.tensor([1.0, 2.0], dtype=DTYPE))
        assert solution.events[0].y[0].shape == (3, 1, 2)
        assert solution.events[1].y[1].shape == (3,)
        (grad,) = torch.autograd.grad(solution.events[0].y[0].nansum(), y0[0])
        assert torch.allclose(grad, torch.exp(-solution.events[0].t).nan_to_num(0.0).expand(3, 2), rtol=1e-5)
    elif kind == "complex":
        y0 = torch.tensor([[1.0 + 0j], [1j], [-1.0 + 0j]], dtype=torch.complex128, requires_grad=True)
        solution = solve(lambda t, y: 1j * y, y0, [0.0, 2.0], options=INDEPENDENT,
                         events=[Event(lambda t, y: y.real, terminal=True)])  # fmt: skip
        assert torch.allclose(solution.events[0].t[[0, 2]], torch.full((2,), math.pi / 2, dtype=DTYPE), rtol=1e-6)
        assert solution.events[0].t[1].isnan()  # it starts on the surface
        torch.autograd.grad(solution.events[0].t.nansum(), y0)
    else:
        dtype = torch.float32 if kind == "float32" else DTYPE
        y0 = torch.tensor([1.0, 2.0, 0.4], dtype=dtype, requires_grad=True)
        t = torch.tensor([0.0, 3.0], dtype=dtype)
        solution = solve(
            lambda t, y: -y, y0, t, options=INDEPENDENT, events=[Event(lambda t, y: y - 0.5, terminal=True)]
        )
        record = solution.events[0]
        assert record.t.dtype == record.y.dtype == dtype
        assert torch.allclose(record.t[:2], torch.log(2 * y0[:2]), rtol=1e-5)
        (grad,) = torch.autograd.grad(record.t.nansum(), y0)
        assert torch.allclose(grad, torch.tensor([1.0, 0.5, 0.0], dtype=dtype), rtol=1e-5)


def test_several_events_of_one_sample_in_one_step_come_in_order() -> None:
    events = [Event(lambda t, y, c=c: y - c) for c in (0.3, 0.1, 0.2)]
    events.append(Event(lambda t, y: torch.stack([y[:, 0] - 0.25, y[:, 0] - 0.35], 1), terminal=True))
    y0 = torch.tensor([[0.0], [0.15], [0.4]], dtype=DTYPE)
    solution = solve(lambda t, y: 1 + 0 * y, y0, [0.0, 0.02, 5.0], events=events, options=INDEPENDENT)
    expected: list[list[list[float]]] = [[[], [], []], [[0.1], [], []], [[0.2], [0.05], []]]
    for record, times in zip(solution.events, expected, strict=False):
        assert [times_of(record, i)[0].tolist() for i in range(3)] == [pytest.approx(t) for t in times]
    assert solution.events[3].t[:2].tolist() == pytest.approx([0.25, 0.1])
    assert solution.events[3].t[2].isnan()
    assert solution.ended_by.tolist() == [3, 3, -1]
    assert solution.y[:, :, 0].isnan().tolist() == [[False] * 3, [False] * 3, [True, True, False]]


def test_of_a_network_without_gradients() -> None:
    net, y0 = Mlp(), sample(6, 3)
    with torch.no_grad():
        solution = solve(net, y0, T, events=[Event(lambda t, y: y.sum(1))], options=INDEPENDENT, **MEDIUM)
        for i in range(6):
            one = solve(net, y0[i : i + 1], T, events=[Event(lambda t, y: y.sum(1))], **MEDIUM)
            assert torch.allclose(times_of(solution.events[0], i)[0], one.events[0].t, rtol=1e-12)


def test_second_derivatives_of_the_states_alone() -> None:
    func, y0, frequency = oscillators()
    solution = solve(func, y0, T, args=(frequency,), events=terminal(func), options=INDEPENDENT, **MEDIUM)
    wanted, seconds = [y0, frequency, func.damping], []
    for y in (solution.y, None):
        if y is None:
            counts = (~solution.y[..., 0].isnan()).sum(0).tolist()
            parts = [odeint(func, y0[i : i + 1], T, args=(frequency[i : i + 1],), **MEDIUM)[:n, 0]
                     for i, n in enumerate(counts)]  # fmt: skip
            loss = sum(part.sin().sum() for part in parts)
        else:
            loss = y.sin().nansum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for one, other in zip(*seconds, strict=True):
        assert relative_error(one, other) <= 1e-11
    with pytest.raises(EventError, match="second derivatives"):
        torch.autograd.grad(solution.events[0].t.nansum(), y0, create_graph=True)


def test_event_fn() -> None:
    y0 = torch.tensor([[1.0], [2.0]], dtype=DTYPE, requires_grad=True)
    call: dict[str, Any] = {"event_fn": lambda t, y: y - 0.5, "options": INDEPENDENT}
    t, y = odeint(lambda t, y: -y, y0, torch.tensor([0.0, 50.0, 100.0], dtype=DTYPE), **call)
    assert torch.allclose(t, torch.log(2 * y0[:, 0]), rtol=1e-6)
    assert torch.allclose(y, torch.stack([y0, torch.full_like(y0, 0.5)]), rtol=1e-6)
    assert torch.autograd.grad(t.sum(), y0)[0].flatten().tolist() == pytest.approx([1.0, 0.5], rel=1e-6)
    ragged = torch.tensor([[0.0, 1.0, math.nan], [0.0, 0.5, 1.0]], dtype=DTYPE)
    with pytest.raises(EventError, match="no sign for sample 1 up to"):
        odeint(lambda t, y: -y, y0, ragged, **call)
    with pytest.raises(TimeError, match="second time"):
        odeint(lambda t, y: -y, y0, [[0.0, math.nan], [0.0, 1.0]], **call)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda t, y: 1.0, "returned float"),
        (lambda t, y: y.sum(), r"returned shape \(\); .* first dimension is the batch, 2"),
        (lambda t, y: y.T, r"returned shape \(1, 2\)"),
        (lambda t, y: torch.where(t > 0.5, math.nan, y), "NaN or infinity for sample 0"),
    ],
)
def test_event_functions_that_return_nonsense(fn: Any, match: str) -> None:
    with pytest.raises(EventError, match=match):
        solve(lambda t, y: -y, torch.ones(2, 1, dtype=DTYPE), [0.0, 3.0], events=[Event(fn)], options=INDEPENDENT)


def test_an_event_without_a_derivative_names_the_sample() -> None:
    y0 = torch.tensor([[0.1], [1.0]], dtype=DTYPE, requires_grad=True)
    event = Event(lambda t, y: (y > 0.5).double() - 0.5 + 0 * y, terminal=True)
    solution = solve(lambda t, y: -y, y0, [0.0, 3.0], events=[event], options=INDEPENDENT)
    with pytest.raises(EventError, match="event 0 of sample 1 does not exist"):
        torch.autograd.grad(solution.events[0].t.nansum(), y0)


@pytest.mark.parametrize("fn", [lambda t, y: y[:, 0] - t, lambda t, y: y - y.mean()], ids=["broadcast", "mean"])
def test_event_functions_that_mix_samples_are_refused(fn: Any) -> None:
    y0 = torch.tensor([[1.0], [2.0], [3.0]], dtype=DTYPE)
    with pytest.raises(EventError, match="depends on other samples"):
        solve(lambda t, y: -y, y0, [0.0, 2.0], events=[Event(fn, terminal=True)], options=INDEPENDENT)
    event = Event(lambda t, y: y[:, 0] - t.flatten(), terminal=True)
    found = solve(lambda t, y: -y, y0, [0.0, 2.0], events=[event], options=INDEPENDENT | {"max_step": 0.5}).events[0]
    assert torch.allclose(y0[:, 0] * torch.exp(-found.t), found.t, rtol=1e-5)


def test_what_is_refused() -> None:
    y0 = torch.ones(2, 1, dtype=DTYPE)
    event = Event(lambda t, y: y - 0.5)
    with pytest.raises(ArgumentValueError, match="on_failure"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], events=[event], options=INDEPENDENT | {"on_failure": "nan"})
    with pytest.raises(EventError, match="returned a condition"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], events=[Event(lambda t, y: y < 0.5)], options=INDEPENDENT)


@pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")
@pytest.mark.usefixtures("no_evaluations")
def test_lanes_leave_events_to_the_eager_loop() -> None:
    event = Event(lambda t, y: y - 0.5)
    y0 = torch.ones(2, 1, dtype=DTYPE)
    solution = solve(lambda t, y: -y, y0, [0.0, 1.0], events=[event], options=INDEPENDENT, engine="compiled")
    assert "events" in solution.stats.reason


def resets(func: Oscillators) -> list[Event]:
    return [
        Event(func.crosses_level, direction=-1, reset=func.bounce),
        Event(lambda t, y: y[:, 1:] - 0.1),
        Event(lambda t, y: t - 1.7, reset=lambda t, y: y * 0.5),
        Event(lambda t, y: y[:, :1] - func.level - 1.2, terminal=True),
    ]


@pytest.mark.parametrize(("method", "gradient"), [("dopri5", "aca"), ("dopri5", "direct"), ("fehlberg2", "aca")])
def test_samples_go_on_from_their_own_resets(method: str, gradient: str) -> None:
    t = torch.tensor([0.0, 0.4, 1.5, 2.2], dtype=DTYPE)
    loose = {"rtol": 1e-3, "atol": 1e-3} if method == "fehlberg2" else {}
    solution = compare(resets, t=t, method=method, gradient=gradient, **loose)
    bounces, crossings, halved, ends = solution.events
    n = (~bounces.t.isnan()).sum(1)
    assert len(set(n.tolist())) > 2
    assert bounces.t.shape == (5, n.max())
    assert bounces.y.shape == (5, n.max(), 2)
    assert torch.allclose(halved.t[~halved.t.isnan()], torch.tensor(1.7, dtype=DTYPE), rtol=1e-15)
    assert ends.t.shape == (5,)
    assert not crossings.t.isnan().all()
    assert (solution.stats.n_steps == solution.stats.n_accepted + solution.stats.n_rejected).all()
    assert [len(steps) for steps in solution.steps] == solution.stats.n_accepted.tolist()


def test_a_reset_that_writes_into_its_state_changes_no_other_sample() -> None:
    y0, t = torch.tensor([[2.0], [3.0]], dtype=DTYPE), torch.tensor([0.0, 2.0], dtype=DTYPE)
    starts = torch.tensor([[0.5], [1.0]], dtype=DTYPE)

    def only_of(sample: int, added: float) -> Event:
        is_own = torch.tensor([[sample == 0], [sample == 1]])
        return Event(lambda t, y: torch.where(is_own, t - starts, 1.0), reset=lambda t, y: y.add_(added))

    events = [only_of(0, 1.0), only_of(1, 10.0)]
    solution = aca_ext.solve(lambda t, y: -y, y0, t, events=events, options={"batch": "independent"})
    expected = y0 * math.exp(-2) + torch.tensor([[1.0], [10.0]], dtype=DTYPE) * torch.exp(starts - 2)
    assert isinstance(solution.y, Tensor)
    assert torch.allclose(solution.y[-1], expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"compact": True}, {"first_step": 0.1, "max_step": 0.3}])
def test_resets_with_ragged_and_learnt_times(options: dict[str, Any]) -> None:
    nan = math.nan
    t = torch.tensor(
        [[0, 1, 2, 4], [0, nan, nan, nan], [0, 0.2, nan, nan], [0, -1, -1.5, nan], [1, 1.2, 2, 2.5]], dtype=DTYPE
    ).requires_grad_()
    func, y0, frequency = oscillators()
    wanted = [y0, frequency, t, *func.parameters()]
    call: dict[str, Any] = {"events": resets(func), **MEDIUM}
    together = solve(func, y0, t, args=(frequency,), options=INDEPENDENT | options, **call)
    loss = together.y.square().nansum() + sum(r.t.sin().nansum() + r.y.square().nansum() for r in together.events)
    options = {name: value for name, value in options.items() if name != "compact"}
    expected = torch.zeros((), dtype=DTYPE)
    for i in range(5):
        times = t[i][~t[i].isnan()]
        one = solve(func, y0[i : i + 1], times, args=(frequency[i : i + 1],), options=options, **call)
        expected = expected + one.y.square().sum() + sum(r.t.sin().sum() + r.y.square().sum() for r in one.events)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, exact in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert relative_error(found, exact) <= 1e-10


def test_bouncing_balls() -> None:
    """Times of all bounces in closed form, with their gradients; a ball that lies still for the whole solve."""
    gravity = 9.81
    height = torch.tensor([10.0, 5.0, 200.0, 2.0], dtype=DTYPE, requires_grad=True)
    restitution = torch.tensor([0.8, 0.9, 0.5, 0.75], dtype=DTYPE, requires_grad=True)
    y0 = (height, torch.zeros(4, dtype=DTYPE))

    def reset(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return 0 * y[0], -restitution * y[1]

    event = Event(lambda t, y: y[0], direction=-1, reset=reset)
    solution = solve(lambda t, y: (y[1], -gravity + 0 * y[1]), y0, [0.0, 1.0, 4.0], events=[event],
                     options=INDEPENDENT, rtol=1e-10, atol=1e-10)  # fmt: skip
    (bounces,) = solution.events
    speed = (2 * gravity * height).sqrt()
    exact = [speed / gravity]
    for _ in range(bounces.t.shape[1] - 1):
        speed = restitution * speed
        exact.append(exact[-1] + 2 * speed / gravity)
    expected = torch.stack(exact, 1)
    happened = expected < 4.0
    assert torch.equal(happened, ~bounces.t.isnan())
    assert len(set(happened.sum(1).tolist())) > 2
    assert torch.allclose(bounces.t[happened], expected[happened], rtol=1e-11)
    for found, grad in zip(
        torch.autograd.grad(bounces.t[happened].sum(), [height, restitution]),
        torch.autograd.grad(expected[happened].sum(), [height, restitution]),
        strict=True,
    ):
        assert torch.allclose(found, grad, rtol=1e-8, atol=1e-9)
    assert solution.is_complete
    assert (solution.ended_by == -1).all()


def test_float32_callbacks_and_an_event_at_the_last_time() -> None:
    seen: list[aca_ext.Step] = []
    t = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    y0 = torch.tensor([[1.0], [0.2]], requires_grad=True)
    events = [
        Event(lambda t, y: y - 0.5, reset=lambda t, y: y + 1.0),
        Event(lambda t, y: t - 2.0 + 0 * y, reset=lambda t, y: 0 * y),
    ]
    solution = solve(lambda t, y: -y, y0, t, events=events, options=INDEPENDENT, callback=seen.append, rtol=1e-5)
    assert solution.t is t
    assert solution.events[0].t.dtype == torch.float32
    assert solution.events[0].t[0, 0].item() == pytest.approx(math.log(2), rel=1e-4)
    assert solution.y[1, 0].item() == pytest.approx(1.5 * math.exp(math.log(2) - 1), rel=1e-4)
    assert solution.y[2, 1].item() == pytest.approx(0.2 * math.exp(-2), rel=1e-4)  # before the reset
    assert max(float(step.t_next.max()) for step in seen) <= 2.0
    for grad in torch.autograd.grad(solution.y.sum() + solution.events[0].t.nansum(), [t, y0]):
        assert torch.isfinite(grad).all()


def test_chattering_names_the_sample() -> None:
    y0 = torch.tensor([[0.0, 1.0], [10.0, 0.0], [10.0, 0.0]], dtype=DTYPE)
    restitution = torch.tensor([[0.9], [0.99], [0.5]], dtype=DTYPE)

    def reset(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([0 * y[:, :1], -restitution * y[:, 1:]], 1)

    event = Event(lambda t, y: y[:, :1], direction=-1, reset=reset)
    with pytest.raises(EventError, match=r"event 0 of sample 2 chatters"):
        solve(lambda t, y: torch.cat([y[:, 1:], -9.81 + 0 * y[:, 1:]], 1), y0,
              [[0.0, 0.1], [0.0, 2.0], [0.0, 30.0]], events=[event], options=INDEPENDENT)  # fmt: skip


@pytest.mark.parametrize("returned", [1.0, torch.ones(1, 1, dtype=DTYPE)])
def test_a_reset_that_returns_nonsense(returned: Any) -> None:
    event = Event(lambda t, y: y - 0.5, reset=lambda t, y: returned)
    with pytest.raises(EventError, match="the reset of event 0 returned"):
        solve(lambda t, y: -y, torch.ones(2, 1, dtype=DTYPE), [0.0, 3.0], events=[event], options=INDEPENDENT)


def test_times_that_are_refused_with_resets() -> None:
    event = Event(lambda t, y: y - 0.5, reset=lambda t, y: y + 1)
    for t, match in (("now", "type str"), ([[0.0, 1.0], [1.0, 1.0]], "sample 1")):
        with pytest.raises(TimeError, match=match):
            solve(lambda t, y: -y, torch.ones(2, 1), t, events=[event], options=INDEPENDENT)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"compact": True}])
@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_gradients_through_resets_against_finite_differences(gradient: str, options: dict[str, Any]) -> None:
    """A dose whenever a concentration falls to its level; states are numbers, and levels belong to samples."""
    y0, rate, level, t = (
        torch.tensor(x, dtype=DTYPE).requires_grad_()
        for x in ([1.0, 1.1, 2.0, 1.5], [1.0, 2.0, 0.1, 3.0], [0.5, 0.2, 0.9, 0.3], [0.0, 1.0, 2.5])
    )
    dose = torch.ones((), dtype=DTYPE, requires_grad=True)
    inputs = [y0, rate, level, t, dose]

    def loss() -> Tensor:
        events = [Event(lambda t, y: y - level, reset=lambda t, y: y + dose), Event(lambda t, y: torch.sin(3 * t))]
        solution = solve(
            lambda t, y, rate: -rate * y * (1 + 0.1 * t), y0, t, args=(rate,), events=events, gradient=gradient,
            options=INDEPENDENT | options, rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        assert isinstance(solution.y, Tensor)
        assert solution.events[0].t.isnan().any(1).tolist() == [True, True, True, False]
        return solution.y.sin().sum() + sum(2 * e.t.nansum() + e.y.square().nansum() for e in solution.events)  # type: ignore[union-attr]

    grads = torch.autograd.grad(loss(), inputs)
    for x, grad in zip(inputs, grads, strict=True):
        entry, values = x.detach().view(-1)[-1:], []
        for step in (1e-6, -1e-6):
            entry += step
            with torch.no_grad():
                values.append(loss().item())
            entry -= step
        assert grad.reshape(-1)[-1].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-6)
