"""Option ``compact``: finished samples are left out of func, and everything else stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import DrivenMlp, Mlp, sample
from test_independent import ADAPTIVE, oscillators, van_der_pol
from torch import Tensor

import aca_ext
from aca_ext import errors

INDEPENDENT = {"batch": "independent"}
COMPACT = INDEPENDENT | {"compact": True}
T = torch.tensor([0.0, 0.3, 0.31, 1.0, 3.0], dtype=torch.float64)
LOOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_states_steps_and_gradients_stay(method: str, gradient: str) -> None:
    y0, mu = oscillators(9, 30.0)
    found = []
    for options in (COMPACT, INDEPENDENT):
        sol = aca_ext.solve(
            van_der_pol, y0, T, args=(mu,), method=method, gradient=gradient, options=options, rtol=1e-3, atol=1e-3
        )
        grads = torch.autograd.grad((sol.y * sample(*sol.y.shape)).sum(), [y0, mu])
        found.append((sol, grads))
    (compact, grads), (whole, expected) = found
    assert torch.equal(compact.y, whole.y)
    for one, other in zip(compact.steps, whole.steps, strict=True):
        assert torch.equal(one, other)
    for grad, exact in zip(grads, expected, strict=True):
        assert relative_error(grad, exact) <= 1e-12
    assert compact.stats.n_f_rows < 0.7 * whole.stats.n_f_rows
    assert whole.stats.n_f_rows == 9 * whole.stats.n_f_evals


def test_the_rows_that_func_sees_are_counted() -> None:
    rows: list[int] = []

    def func(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        assert t.shape == (len(y), 1)
        rows.append(len(y))
        return van_der_pol(t, y, mu)

    y0, mu = oscillators(8, 100.0)
    with torch.no_grad():
        sol = aca_ext.solve(func, y0, T, args=(mu,), options=COMPACT, **LOOSE)
    assert sol.stats.n_f_evals == len(rows)
    assert sol.stats.n_f_rows == sum(rows)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] == 1


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_shared_parameters_ragged_times_and_learnt_times(gradient: str) -> None:
    func, y0, drive = DrivenMlp(), sample(4, 3).requires_grad_(), sample(4, 3, seed=1).requires_grad_()
    nan = float("nan")
    rate = torch.tensor([[0.1], [1.0], [4.0], [9.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0, 0.1, nan], [0, nan, nan], [0, 0.5, 3.0], [1.0, 0.5, -0.5]], dtype=torch.float64)
    t = t.requires_grad_()
    wanted = [y0, drive, rate, t, *func.parameters()]
    found = []
    for options in (COMPACT, INDEPENDENT):
        sol = aca_ext.solve(func, y0, t, args=(drive, rate), gradient=gradient, options=options, **LOOSE)
        found.append([sol.y.detach().nan_to_num(7.0), *torch.autograd.grad(sol.y.square().nansum(), wanted)])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_second_derivatives_of_a_tuple_state() -> None:
    net, y0 = Mlp(), (sample(4, 3).requires_grad_(), sample(4, seed=1).requires_grad_())
    rates = torch.tensor([0.1, 0.2, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    wanted = [*y0, rates, *net.parameters()]

    def func(t: Tensor, y: tuple[Tensor, Tensor], rates: Tensor) -> tuple[Tensor, Tensor]:
        return net(t, y[0]) * rates[:, None], torch.sin(y[1]) * rates

    found = []
    for options in (COMPACT, INDEPENDENT):
        ys = aca_ext.odeint(func, y0, T, args=(rates,), options=options, **LOOSE)
        first = torch.autograd.grad(ys[0].sin().sum() + ys[1].sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-11


def test_failed_samples_are_left_out_too() -> None:
    y0 = torch.tensor([[0.5], [3.0], [1.0], [9.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.4], dtype=torch.float64)
    sol = aca_ext.solve(lambda t, y: y * y, y0, t, options=COMPACT | {"on_failure": "nan"}, **LOOSE)
    assert [error.sample for error in sol.stats.failures] == [1, 3]
    whole = aca_ext.solve(lambda t, y: y * y, y0, t, options=INDEPENDENT | {"on_failure": "nan"}, **LOOSE)
    assert sol.stats.n_f_rows < whole.stats.n_f_rows
    one, other = (torch.autograd.grad(s.y.nansum(), y0)[0] for s in (sol, whole))
    assert torch.equal(sol.y.nan_to_num(7.0), whole.y.nan_to_num(7.0))
    assert relative_error(one, other) <= 1e-12


Y0 = torch.linspace(1, 2, 4, dtype=torch.float64).view(4, 1)
RATES = torch.tensor([[0.1], [0.2], [5.0], [50.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("func", "args", "match"),
    [
        (lambda t, y: RATES * torch.sin(RATES * y), (), "func fails on [12] of 4"),
        (lambda t, y: RATES[: len(y)] * torch.sin(RATES[: len(y)] * y), (), "another slope for sample [23]"),
        (lambda t, y: torch.sin(y * torch.arange(4)[: len(y), None] * 9), (), "another slope for sample 2"),
        (lambda t, y, a: torch.sin(y * a.sum()), (torch.ones(4),), "another slope for sample 2"),
    ],
    ids=["closure", "closure cut to length", "made to length", "shared with the length of the batch"],
)  # fmt: skip
def test_a_func_that_cannot_see_fewer_samples(func: Any, args: tuple[Tensor, ...], match: str) -> None:
    t = torch.tensor([[0.0, 0.1], [0.0, 0.2], [0.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    with pytest.raises(errors.OptionError, match=match):
        aca_ext.odeint(func, Y0, t, args=args, options=COMPACT, **LOOSE)


def test_the_option() -> None:
    with pytest.raises(errors.OptionError, match="True or False"):
        aca_ext.odeint(lambda t, y: -y, Y0, T, options=INDEPENDENT | {"compact": "yes"})
    with pytest.raises(errors.OptionError, match='batch="independent"'):
        aca_ext.odeint(lambda t, y: -y, Y0, T, options={"compact": True})
