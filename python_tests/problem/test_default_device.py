"""Solves with another default device in torch: the package names the device of every tensor that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import Mlp, sample
from torch import Tensor

import aca_ext
import aca_ext.torchdiffeq

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
ATOL = torch.full((2, 3), 1e-4, dtype=torch.float64)
SOLVES: dict[str, dict[str, Any]] = {
    **{gradient: {"gradient": gradient} for gradient in aca_ext.GRADIENTS},
    "tolerances": {"rtol": 1e-3, "atol": ATOL},
    "one tolerance": {"rtol": torch.tensor(1e-3), "atol": torch.tensor(1e-4)},
    "fixed steps": {"method": "rk4", "options": {"step_size": 0.1}},
    "grid": {
        "method": "heun2",
        "options": {"grid_constructor": lambda func, y0, t: torch.cat([t, t[:1] + 0.5]).sort().values},
    },
    "jumps": {"options": {"jump_t": [0.5], "step_t": [0.7]}},
    "norm": {"options": {"norm": lambda x: x.abs().max()}},
    "host": {"checkpoints": "cpu"},
    "few checkpoints": {"checkpoints": 1},
    "independent": {"options": {"batch": "independent"}},
    "independent, direct": {"options": {"batch": "independent"}, "gradient": "direct"},
    "independent, tolerances": {"options": {"batch": "independent"}, "atol": ATOL},
    "independent, times": {"options": {"batch": "independent"}, "t": torch.stack([T, 2 * T])},
    "independent, ragged": {
        "options": {"batch": "independent", "compact": True, "on_failure": "nan"},
        "t": torch.tensor([[0.0, 0.3, 1.0], [0.0, 0.1, float("nan")]], dtype=torch.float64),
    },
    "times as a list": {"t": [0.0, 0.3, 1.0]},
    "callback": {"callback": lambda step: None},
}


@pytest.fixture
def _another_default_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


def results(kind: str, y0: Any, func: Any, default: str | None, **given: Any) -> list[Tensor]:
    settings = {"t": T, "rtol": 1e-3, "atol": 1e-4, **given}
    torch.set_default_device(default)
    y = aca_ext.odeint(func, y0, settings.pop("t"), **settings)
    parts = y if isinstance(y, tuple) else (y,)
    inputs = [
        *(y0 if isinstance(y0, tuple) else (y0,)),
        *(func.parameters() if isinstance(func, torch.nn.Module) else ()),
    ]
    loss = sum((part.abs().square().sum() for part in parts[1:]), parts[0].abs().square().sum())
    found = [*parts, *torch.autograd.grad(loss, inputs)]
    torch.set_default_device(None)
    return found


@pytest.mark.usefixtures("_another_default_device")
@pytest.mark.parametrize("kind", SOLVES)
def test_solves(kind: str) -> None:
    y0, func = sample(2, 3).requires_grad_(), Mlp()
    found, expected = (results(kind, y0, func, default, **SOLVES[kind]) for default in ("meta", None))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.usefixtures("_another_default_device")
@pytest.mark.parametrize("settings", [{}, SOLVES["independent"]], ids=["common", "independent"])
@pytest.mark.parametrize("kind", ["tuple", "complex", "float16"])
def test_states(kind: str, settings: dict[str, Any]) -> None:
    y0: Any = {
        "tuple": (sample(2, 3).requires_grad_(), sample(2, 1).requires_grad_()),
        "complex": torch.complex(sample(2, 3), sample(2, 3)).requires_grad_(),
        "float16": sample(2, 3).half().requires_grad_(),
    }[kind]

    def func(t: Tensor, y: Any) -> Any:
        return tuple(-part for part in y) if isinstance(y, tuple) else -y

    found, expected = (results(kind, y0, func, default, **{"rtol": 1e-2, **settings}) for default in ("meta", None))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_another_default_device")
def test_second_derivatives_and_requested_times() -> None:
    y0, t = sample(2, 3).requires_grad_(), T.clone().requires_grad_()
    torch.set_default_device("meta")
    y = aca_ext.odeint(lambda t, y: -torch.sin(y) * t, y0, t, rtol=1e-3, atol=1e-4)
    grads = torch.autograd.grad(y.sum(), [y0, t], create_graph=True)
    (second,) = torch.autograd.grad(grads[0].sum(), y0)
    assert all(grad.device.type == "cpu" for grad in (*grads, second))


@pytest.mark.usefixtures("_another_default_device")
def test_a_solve_that_goes_on() -> None:
    y0, options = sample(2, 3), {"max_num_steps": 2, "on_step_limit": "stop", "jump_t": [0.5]}
    torch.set_default_device("meta")
    solution = aca_ext.solve(lambda t, y: -y, y0, T, options=options)
    while not solution.is_complete:
        solution = solution.resume()
    assert solution.y.device.type == "cpu"
    assert solution.steps.device.type == "cpu"


@pytest.mark.usefixtures("_another_default_device")
def test_a_solution_that_says_where_it_stepped() -> None:
    y0 = sample(2, 3)
    torch.set_default_device("meta")
    solution = aca_ext.solve(lambda t, y: -y, y0, T, options={"batch": "independent"})
    assert all(steps.device.type == "cpu" for steps in solution.steps)
    empty = aca_ext.solve(lambda t, y: -y, y0, T[:1], options={"batch": "independent"})
    assert [steps.shape for steps in empty.steps] == [(0, 2), (0, 2)]


@pytest.mark.usefixtures("_another_default_device")
def test_events_of_independent_samples() -> None:
    y0 = sample(3, 1).abs().requires_grad_()
    events = [
        aca_ext.Event(lambda t, y: y - 0.5, reset=lambda t, y: y + 0.2),
        aca_ext.Event(lambda t, y: t - 0.9 + 0 * y, terminal=True),
    ]
    torch.set_default_device("meta")
    solution = aca_ext.solve(lambda t, y: -y, y0, T, events=events, options={"batch": "independent"})
    assert isinstance(solution.y, Tensor)
    loss = solution.y.nansum() + solution.events[0].t.nansum() + solution.events[1].t.nansum()
    (grad,) = torch.autograd.grad(loss, y0)
    assert {x.device.type for x in (solution.y, solution.events[0].t, solution.ended_by, grad)} == {"cpu"}


@pytest.mark.usefixtures("_another_default_device")
@pytest.mark.parametrize("given", [T, T.tolist()], ids=["tensor", "list"])
def test_events(given: Any) -> None:
    y0 = torch.full((3, 1), 0.3, dtype=torch.float64, requires_grad=True)
    events = [
        aca_ext.Event(lambda t, y: y[:1] - 0.2, reset=lambda t, y: y + 0.5),
        aca_ext.Event(lambda t, y: y + 1),  # never
    ]
    torch.set_default_device("meta")
    solution = aca_ext.solve(lambda t, y: -y, y0, given, events=events)
    found, none = solution.events
    assert (len(found.t), len(none.t)) == (1, 0)
    (grad,) = torch.autograd.grad(found.t.sum(), y0)
    event_t, _ = aca_ext.odeint(lambda t, y: -y, y0, given, event_fn=lambda t, y: y[:1] - 0.2)
    assert {x.device.type for x in (solution.y, solution.steps, found.t, none.t, grad, event_t)} == {"cpu"}


@pytest.mark.usefixtures("_another_default_device")
def test_the_drop_in() -> None:
    y0 = sample(2, 3)
    torch.set_default_device("meta")
    y = aca_ext.torchdiffeq.odeint(lambda t, y: -y, y0, T, rtol=[1e-6, 1e-6, 1e-7], atol=1e-8)
    at = aca_ext.torchdiffeq.odeint_dense(lambda t, y: -y, y0, 0.0, 1.0)(T[1])
    torch.testing.assert_close(y[1], at, rtol=1e-5, atol=1e-6)
