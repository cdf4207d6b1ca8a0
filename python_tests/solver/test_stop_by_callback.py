"""Callbacks that return True: the solve ends where it is, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor

import aca_ext
from aca_ext.errors import ArgumentValueError

TIMES = torch.linspace(0, 3, 7, dtype=torch.float64)
METHODS: list[dict[str, Any]] = [
    {"rtol": 1e-6, "atol": 1e-6},
    {"method": "rk4", "options": {"step_size": 0.1}},
    {"method": "explicit_adams", "options": {"step_size": 0.1, "max_order": 5}},
    {"method": "implicit_adams", "options": {"step_size": 0.1}, "rtol": 1e-3, "atol": 1e-3},
]


def beyond(time: float) -> Callable[[aca_ext.Step], bool]:
    """A callback that stops after the first accepted step that ends beyond ``time``."""
    return lambda step: step.is_accepted and step.t_next > time


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("checkpoints", [None, 2])
def test_solution_and_gradient_are_those_of_the_steps_made(
    how: dict[str, Any], gradient: str, checkpoints: int | None
) -> None:
    func, y0 = Mlp(), sample(2, 3).requires_grad_()
    kept = checkpoints if gradient == "aca" else None
    whole = aca_ext.solve(func, y0, TIMES, gradient=gradient, **how)
    part = aca_ext.solve(func, y0, TIMES, gradient=gradient, checkpoints=kept, callback=beyond(1.2), **how)
    assert not part.is_complete
    assert part.t.tolist() == [0.0, 0.5, 1.0]
    assert torch.equal(part.y, whole.y[:3])
    n = len(part.steps)
    assert torch.equal(part.steps, whole.steps[:n])
    assert part.t_reached == part.steps[-1, 1] > 1.2
    to_there = aca_ext.odeint(func, y0, [0.0, 0.5, 1.0, part.t_reached], gradient="direct", **how)
    assert relative_error(part.y_reached, to_there[-1]) <= 1e-13
    wanted = [y0, *func.parameters()]
    grads = torch.autograd.grad(part.y_reached.square().sum() + part.y[1].sum(), wanted)
    expected = torch.autograd.grad(to_there[-1].square().sum() + to_there[1].sum(), wanted)
    for grad, other in zip(grads, expected, strict=True):
        assert relative_error(grad, other) <= 1e-12


def test_adaptive_steps_resume_as_if_there_had_been_no_stop() -> None:
    func, y0 = Mlp(), sample(2, 3)
    whole = aca_ext.solve(func, y0, TIMES)
    part = aca_ext.solve(func, y0, TIMES, callback=lambda step: step.n_accepted == 3)
    assert len(part.steps) == 3
    while not part.is_complete:
        part = part.resume()  # the callback counts from zero again in each part
    assert torch.equal(part.y, whole.y)
    assert torch.equal(part.steps, whole.steps)


def test_fixed_steps_do_not_resume() -> None:
    part = aca_ext.solve(Mlp(), sample(2, 3), TIMES, method="rk4", callback=lambda step: step.n_steps == 2)
    assert (part.t_reached, len(part.y)) == (1.0, 3)
    with pytest.raises(ArgumentValueError, match="fixed steps cannot be resumed"):
        part.resume()


def test_stop_at_a_rejected_trial_keeps_the_state_before_it() -> None:
    y0 = sample(2, 3)
    part = aca_ext.solve(
        Mlp(), y0, TIMES, rtol=1e-9, atol=1e-9, options={"first_step": 3.0}, callback=lambda step: not step.is_accepted
    )
    assert part.t_reached == 0.0
    assert torch.equal(part.y_reached, y0)
    assert part.stats.n_rejected == 1
    assert not part.is_complete


def test_stop_after_the_last_step_is_no_stop() -> None:
    part = aca_ext.solve(Mlp(), sample(2, 3), TIMES, callback=lambda step: step.is_accepted and step.t_next == 3.0)
    assert part.is_complete
    assert len(part.y) == 7


@pytest.mark.parametrize("true", [True, np.bool_(True), torch.tensor(True)])
@pytest.mark.parametrize("false", [None, False, 1, "yes", np.bool_(False), torch.tensor(False), [True]])
def test_only_truth_values_stop(true: object, false: object) -> None:
    stopped = aca_ext.solve(Mlp(), sample(2, 3), TIMES, callback=lambda step: true)
    assert stopped.stats.n_steps == 1
    assert aca_ext.solve(Mlp(), sample(2, 3), TIMES, callback=lambda step: false).is_complete


def test_with_a_progress_bar() -> None:
    pytest.importorskip("tqdm")
    assert not aca_ext.solve(Mlp(), sample(2, 3), TIMES, callback=beyond(1.0), progress=True).is_complete


class TestRefusals:
    @pytest.mark.parametrize(
        "how",
        [
            {"gradient": "naive"},
            {"gradient": "adjoint"},
            {"options": {"batch": "independent"}},
            {"events": [aca_ext.Event(lambda t, y: y[0, 0] - 1e9)]},
            {"t": TIMES.clone().requires_grad_()},
        ],
    )
    def test_solves_that_cannot_end_early(self, how: dict[str, Any]) -> None:
        call = {"t": TIMES, **how}
        with pytest.raises(ArgumentValueError, match="callback returned True"):
            aca_ext.solve(Mlp(), sample(2, 3), callback=lambda step: True, **call)

    def test_functions_that_return_states_alone(self) -> None:
        with pytest.raises(ArgumentValueError, match=r"Only aca_ext\.solve"):
            aca_ext.odeint(Mlp(), sample(2, 3), TIMES, callback=lambda step: True)
        with pytest.raises(ArgumentValueError, match=r"Only aca_ext\.solve"):
            aca_ext.NeuralODE(Mlp(), callback=lambda step: True)(sample(2, 3))

    def test_the_backward_solve(self) -> None:
        y0: Tensor = sample(2, 3).requires_grad_()
        y = aca_ext.odeint(Mlp(), y0, TIMES, gradient="adjoint", adjoint_options={"callback": lambda step: True})
        with pytest.raises(ArgumentValueError, match="callback returned True"):
            y[-1].sum().backward()
