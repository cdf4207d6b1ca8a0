"""TorchScript as func: scripted, traced and frozen modules and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import LOOSE, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::aca_ext.errors.BatchStatisticsWarning"
)


class Field(nn.Module):
    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3).double()
        self.norm = nn.BatchNorm1d(3).double() if normalised else nn.Identity()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(y))) * torch.cos(t)


def driven(t: Tensor, y: Tensor) -> Tensor:
    return torch.sin(y) * t


EXAMPLE = (torch.zeros((), dtype=torch.float64), sample(2, 3))
FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "scripted": torch.jit.script,
    "traced": lambda module: torch.jit.trace(module, EXAMPLE),
    "behind a lambda": lambda module: (lambda scripted: lambda t, y: scripted(t, y))(torch.jit.script(module)),
}
SOLVES: dict[str, dict[str, Any]] = {
    **{gradient: {"gradient": gradient} for gradient in aca_ext.GRADIENTS},
    "thinned": {"checkpoints": 2},
    "independent": {"options": {"batch": "independent"}},
    "independent direct": {"options": {"batch": "independent"}, "gradient": "direct"},
}

# The steps of the adjoint's backward solve depend on the number and the order of the parameters in its state.
TOLERANCE = {"adjoint": 1e-6}


def result_of(func: Any, wanted: list[Tensor], **call: Any) -> list[Tensor]:
    y0 = sample(4, 3).requires_grad_()
    y = aca_ext.odeint(func, y0, [0.0, 0.4, 1.0], **LOOSE, **call)
    return [y, *torch.autograd.grad(y.square().sum(), [y0, *wanted])]


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("form", FORMS)
def test_modules_solve_as_eager_ones(form: str, solve: str) -> None:
    module = Field()
    wanted = list(module.parameters())
    expected = result_of(module, wanted, **SOLVES[solve])
    for one, other in zip(result_of(FORMS[form](module), wanted, **SOLVES[solve]), expected, strict=True):
        assert relative_error(one, other) <= TOLERANCE.get(solve, 1e-11)


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("form", ["frozen", "scripted function", "traced function"])
def test_code_without_parameters(form: str, solve: str) -> None:
    module = Field().eval()
    func, same = {
        "frozen": lambda: (torch.jit.freeze(torch.jit.script(module)), module),
        "scripted function": lambda: (torch.jit.script(driven), driven),
        "traced function": lambda: (torch.jit.trace(driven, EXAMPLE), driven),
    }[form]()
    for one, other in zip(result_of(func, [], **SOLVES[solve]), result_of(same, [], **SOLVES[solve]), strict=True):
        assert relative_error(one, other) <= TOLERANCE.get(solve, 1e-11)


def test_second_derivatives() -> None:
    found = []
    for make in (lambda module: module, torch.jit.script):
        module = Field()
        func, weight, y0 = make(module), module.linear.weight, sample(2, 3)
        y = aca_ext.odeint(func, y0, [0.0, 1.0], **LOOSE)[-1]
        (grad,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    assert relative_error(*found) <= 1e-11


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_batch_statistics_move_on_accepted_evaluations_alone(gradient: str) -> None:
    found = []
    for make in (lambda module: module, torch.jit.script):
        module = Field(normalised=True)
        options = {"first_step": 1.0}
        sol = aca_ext.solve(make(module), sample(8, 3), [0.0, 1.0], gradient=gradient, options=options, **LOOSE)
        sol.y.square().sum().backward()
        assert int(module.norm.num_batches_tracked) == 1 + 6 * sol.stats.n_accepted
        found.append([module.norm.running_mean, module.linear.weight.grad])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-10


def test_hooks_on_parameters_that_a_replay_cannot_reach() -> None:
    func = torch.jit.script(Field())
    func.linear.weight.register_hook(lambda g: None)
    for gradient in ("aca", "direct"):
        y = aca_ext.odeint(func, sample(2, 3), [0.0, 1.0], gradient=gradient, **LOOSE)[-1]
        if gradient == "direct":
            assert torch.autograd.grad(y.sum(), func.linear.weight)[0].abs().sum() > 0
        else:
            with pytest.raises(errors.ArgumentTypeError, match="TorchScript"):
                y.sum().backward()


def test_layer() -> None:
    layer = aca_ext.NeuralODE(torch.jit.script(Field()), **LOOSE)
    layer(sample(2, 3)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert len(list(layer.parameters())) == 2
