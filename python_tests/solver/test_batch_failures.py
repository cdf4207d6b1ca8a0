"""Samples of a batch that fail with option ``on_failure="nan"``: the others go on as if they were not there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor

import aca_ext
from aca_ext import errors

NAN_ON_FAILURE = {"batch": "independent", "on_failure": "nan"}
INDEPENDENT = {"batch": "independent"}
T = torch.tensor([0.0, 0.1, 0.25, 0.4], dtype=torch.float64)
CALL: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
NAN = math.nan


def blow_up(t: Tensor, y: Tensor, rate: Tensor, own: Tensor) -> Tensor:
    """y' = y², which blows up at 1 / y0; where y is negative, the slope is NaN."""
    return rate * own * y * y + 0 * torch.sqrt(y)


def compare(func: Any, y0: Tensor, args: tuple[Tensor, ...], wanted: list[Tensor], bad: list[int], **call: Any) -> Any:
    """Checks the samples that do not fail against a solve without the others; ``args[1]`` has a row for each."""
    sol = aca_ext.solve(func, y0, T, args=args, **CALL, **{"options": NAN_ON_FAILURE, **call})
    good = [i for i in range(len(y0)) if i not in bad]
    shared, *own = args
    call.pop("options", None)
    alone = aca_ext.solve(func, y0[good], T, args=(shared, *(a[good] for a in own)), options=INDEPENDENT, **CALL)
    assert [error.sample for error in sol.stats.failures] == bad
    assert sol.y[:, bad].isnan().all()
    assert torch.equal(sol.y[:, good], alone.y)
    for i, one in zip(good, alone.steps, strict=True):
        assert torch.equal(sol.steps[i], one)
    for loss in (lambda y: y.square().nansum(), lambda y: torch.where(y.isnan(), 0.0, y.sin()).sum()):
        found, expected = (torch.autograd.grad(loss(y), wanted, retain_graph=True) for y in (sol.y, alone.y))
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) <= 1e-12
            if len(grad) == len(y0):
                assert (grad[bad] == 0).all()
    return sol


def test_every_kind_of_failure() -> None:
    y0 = torch.tensor([[0.5], [3.0], [1.0], [NAN], [2.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    rate = torch.ones(1, dtype=torch.float64, requires_grad=True)
    own = torch.ones(6, 1, dtype=torch.float64, requires_grad=True)
    sol = compare(blow_up, y0, (rate, own), [y0, rate, own], [1, 3, 5])
    kinds = [type(error) for error in sol.stats.failures]
    assert issubclass(kinds[0], errors.SolveError)
    assert kinds[1:] == [errors.NonFiniteError, errors.NonFiniteError]
    assert "sample 3 with dopri5 stopped: y0 holds NaN" in str(sol.stats.failures[1])
    assert sol.stats.failures[0].t == pytest.approx(1 / 3, rel=1e-3)
    assert sol.steps[1][-1, 1] == pytest.approx(1 / 3, rel=1e-3)


def stiff(t: Tensor, y: Tensor, rate: Tensor, own: Tensor) -> Tensor:
    return torch.sin(rate) - own * torch.sin(own * y)


@pytest.mark.parametrize("method", ["dopri5", "fehlberg2", "tsit5"])
def test_the_step_limit(method: str) -> None:
    y0 = sample(4, 2).requires_grad_()
    rate = torch.ones(2, dtype=torch.float64, requires_grad=True)
    own = torch.tensor([[1.0], [300.0], [2.0], [500.0]], dtype=torch.float64, requires_grad=True)
    options = NAN_ON_FAILURE | {"max_num_steps": 150}
    sol = aca_ext.solve(stiff, y0, T, args=(rate, own), method=method, options=options, **CALL)
    assert [type(error) for error in sol.stats.failures] == [errors.StepLimitError] * 2
    assert sol.stats.n_steps[[1, 3]].tolist() == [150, 150]
    good = [0, 2]
    alone = aca_ext.solve(stiff, y0[good], T, args=(rate, own[good]), method=method, options=INDEPENDENT, **CALL)
    assert torch.equal(sol.y[:, good], alone.y)
    found, expected = (torch.autograd.grad(y.square().nansum(), [y0, rate, own]) for y in (sol.y, alone.y))
    for grad, exact in zip(found, expected, strict=True):
        assert relative_error(grad, exact) <= 1e-12


def test_min_step_and_a_zero_tolerance() -> None:
    rtol = torch.tensor([[1e-4], [0.0]], dtype=torch.float64)
    y0 = torch.ones(2, 1, dtype=torch.float64)
    y = aca_ext.solve(lambda t, y: torch.sin(y), y0, [1.0, 2.0], rtol=rtol, atol=0.0, options=NAN_ON_FAILURE)
    (error,) = y.stats.failures
    assert isinstance(error, errors.StepSizeError)
    assert "both zero" in str(error)
    assert y.y[:, 0].isfinite().all()


def test_second_derivatives() -> None:
    y0 = torch.tensor([[0.5], [3.0], [1.0]], dtype=torch.float64, requires_grad=True)
    rate = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def second(y0: Tensor, options: dict[str, str]) -> list[Tensor]:
        y = aca_ext.odeint(lambda t, y: rate * y * y, y0, T, options=options, **CALL)
        first = torch.autograd.grad(y.sin().nansum(), [y0, rate], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [y0, rate])]

    alone = y0.detach()[[0, 2]].requires_grad_()
    for grad, exact in zip(second(y0, NAN_ON_FAILURE), second(alone, INDEPENDENT), strict=True):
        if len(grad) == 3:
            assert grad[1].item() == 0
        assert relative_error(grad[[0, 2]] if len(grad) == 3 else grad, exact) <= 1e-12


def test_when_all_samples_fail_all_gradients_are_zero() -> None:
    net, y0 = Mlp(), torch.full((2, 3), NAN, dtype=torch.float64, requires_grad=True)
    sol = aca_ext.solve(net, y0, T, options=NAN_ON_FAILURE)
    assert sol.y.isnan().all()
    assert len(sol.stats.failures) == 2
    for grad in torch.autograd.grad(sol.y.nansum(), [y0, *net.parameters()]):
        assert (grad == 0).all()


def test_a_network_without_gradients_and_with_ragged_times() -> None:
    net, y0 = Mlp(), sample(3, 3)
    y0[1, 1] = math.inf
    t = torch.tensor([[0.0, 1.0, NAN], [0.0, 1.0, 2.0], [0.0, 0.5, 0.6]], dtype=torch.float64)
    with torch.no_grad():
        y = aca_ext.odeint(net, y0, t, options=NAN_ON_FAILURE)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isnan().any(2).tolist() == [[False, False], [False, False], [True, False]]


def test_parameters_that_spoil_shared_gradients_are_an_error() -> None:
    own = torch.tensor([[1.0], [NAN]], dtype=torch.float64)
    rate = torch.ones(1, dtype=torch.float64, requires_grad=True)
    y = aca_ext.odeint(lambda t, y: -rate * own * y, torch.ones(2, 1).double(), T, options=NAN_ON_FAILURE)
    assert y[:, 1].isnan().all()
    with pytest.raises(errors.ReplayError, match="sample 1 failed"):
        torch.autograd.grad(y[:, 0].sum(), rate)


def test_what_the_option_excludes() -> None:
    y0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(errors.OptionError, match='takes gradient="aca"'):
        aca_ext.odeint(lambda t, y: -y, y0, T, gradient="direct", options=NAN_ON_FAILURE)
    with pytest.raises(errors.OptionError, match="require grad"):
        aca_ext.odeint(lambda t, y: -y, y0, T.clone().requires_grad_(), options=NAN_ON_FAILURE)
