"""Series of different lengths in one batch: times padded with NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import DrivenMlp, Mlp, sample
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

INDEPENDENT = {"batch": "independent"}
NAN = math.nan
is_refused = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")
LOOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
SERIES = [[0.0, 0.4, 1.7], [0.5, 0.3], [1.0], [0.0, 0.1, 0.2, 0.25, 3.0]]


def padded(series: list[list[float]] = SERIES, length: int = 6) -> Tensor:
    return torch.tensor([times + [NAN] * (length - len(times)) for times in series], dtype=torch.float64)


def alone(func: Any, y0: Tensor, t: Tensor, i: int, args: tuple[Tensor, ...], **call: Any) -> aca_ext.Solution:
    times = t[i][~t[i].isnan()]
    return aca_ext.solve(func, y0[i : i + 1], times, args=tuple(a[i : i + 1] for a in args), **call)


def loss_of(y: Tensor, i: int) -> Tensor:
    """A loss of the states of sample ``i``, (T, \\*state)."""
    return (y * sample(*y.shape, seed=i)).sum() + y[-1].square().sum()


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_states_steps_and_gradients_are_those_of_each_series_alone(gradient: str) -> None:
    func, y0, t = DrivenMlp(), sample(4, 3).requires_grad_(), padded().requires_grad_()
    drive, rate = sample(4, 3, seed=1).requires_grad_(), sample(4, 1, seed=2).requires_grad_()
    call = {**LOOSE, "gradient": gradient}
    together = aca_ext.solve(func, y0, t, args=(drive, rate), options=INDEPENDENT, **call)
    assert together.y.shape == (6, 4, 3)
    wanted = [y0, drive, rate, t, *func.parameters()]
    loss, expected = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, times in enumerate(SERIES):
        one = alone(func, y0, t, i, (drive, rate), **call)
        n = len(times)
        assert torch.allclose(together.steps[i], one.steps, rtol=1e-12)
        assert together.stats.n_accepted[i] == one.stats.n_accepted
        assert relative_error(together.y[:n, i], one.y[:, 0]) <= 1e-12
        assert together.y[n:, i].isnan().all()
        assert not together.y[:n, i].isnan().any()
        loss = loss + loss_of(together.y[:n, i], i)
        expected = expected + loss_of(one.y[:, 0], i)
    found, exact = torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted)
    for one_grad, other in zip(found, exact, strict=True):
        assert relative_error(one_grad, other) <= 1e-12
    assert (found[3][padded().isnan()] == 0).all()


@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("learnt", [False, True], ids=["fixed times", "learnt times"])
def test_cotangents_of_padded_times_are_ignored_even_if_nan(gradient: str, learnt: bool) -> None:
    """The loss of whoever forgets the mask in the difference, and takes it in the mean."""
    func, y0, t = Mlp(), sample(4, 3).requires_grad_(), padded().requires_grad_(learnt)
    wanted = [y0, *func.parameters(), *([t] if learnt else [])]
    grads = []
    for spoils in (False, True):
        y = aca_ext.odeint(func, y0, t, gradient=gradient, options=INDEPENDENT, **LOOSE)
        seen = ~t.detach().T.isnan()
        squares = y.square() if spoils else torch.where(seen[..., None], y, 0.0).square()
        grads.append(torch.autograd.grad(torch.where(seen[..., None], squares, 0.0).sum(), wanted))
    for one, other in zip(*grads, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_second_derivatives(gradient: str) -> None:
    func, y0, t = Mlp(), sample(4, 3).requires_grad_(), padded()
    wanted = [y0, *func.parameters()]

    def second(losses: list[Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(sum(losses), wanted, create_graph=True)
        return [*torch.autograd.grad(sum(g.square().sum() for g in first), wanted)]

    together = aca_ext.odeint(func, y0, t, gradient=gradient, options=INDEPENDENT, **LOOSE)
    found = second([loss_of(together[: len(times), i], i) for i, times in enumerate(SERIES)])
    one_by_one = [alone(func, y0, t, i, (), gradient=gradient, **LOOSE).y[:, 0] for i in range(4)]
    for one, other in zip(found, second([loss_of(y, i) for i, y in enumerate(one_by_one)]), strict=True):
        assert relative_error(one, other) <= 1e-11


def test_the_gradient_of_times_is_the_slope() -> None:
    rates = torch.tensor([[0.3], [-0.6]], dtype=torch.float64)
    t = padded([[0.5, 0.9, 2.0], [1.0, 0.2]], 3).requires_grad_()
    y0 = torch.ones(2, 1, dtype=torch.float64)
    y = aca_ext.odeint(lambda t, y: rates * y, y0, t, rtol=1e-11, atol=1e-12, options=INDEPENDENT)
    (grad,) = torch.autograd.grad(torch.nansum(y), t)
    exact = torch.exp(rates * (t.detach() - t.detach()[:, :1]))
    slopes = rates * exact
    slopes[:, 0] = -slopes[:, 1:].nansum(1)
    assert torch.allclose(grad, slopes.nan_to_num(0.0), rtol=1e-8)


@pytest.mark.parametrize("kind", ["tuple", "complex"])
def test_states_of_every_form(kind: str) -> None:
    t = padded([[0.0, 1.0, 2.0], [0.0, 1.5]], 3)
    if kind == "complex":
        y0: Any = (sample(2, 2) + 1j * sample(2, 2, seed=1)).requires_grad_()
        ys = aca_ext.odeint(lambda t, y: 1j * y, y0, t, options=INDEPENDENT, **LOOSE)
        assert ys[2, 1].isnan().all()
        assert torch.allclose(ys[1, 1], y0[1] * torch.exp(torch.tensor(1.5j)), rtol=1e-3)
        torch.nansum(torch.view_as_real(ys)).backward()
        assert torch.isfinite(torch.view_as_real(y0.grad)).all()
        return
    y0 = (sample(2, 3).requires_grad_(), sample(2, seed=1).requires_grad_())
    ys = aca_ext.odeint(lambda t, y: (-y[0], torch.cos(t.flatten()) * y[1]), y0, t, options=INDEPENDENT, **LOOSE)
    for y, start in zip(ys, y0, strict=True):
        assert y[2, 1].isnan().all()
        assert not y[:, 0].isnan().any()
        (grad,) = torch.autograd.grad(torch.nansum(y), start, retain_graph=True)
        assert torch.isfinite(grad).all()


def test_a_batch_of_single_times_takes_no_step() -> None:
    y0 = sample(2, 3)
    solution = aca_ext.solve(Mlp(), y0, padded([[0.0], [1.0]], 2), options=INDEPENDENT)
    assert torch.equal(solution.y[0], y0)
    assert solution.y[1].isnan().all()
    assert solution.stats.n_f_evals == 0
    assert [len(steps) for steps in solution.steps] == [0, 0]


def test_a_sample_of_one_time_is_not_looked_at() -> None:
    """It may have a state that nothing can be solved from, and times that float32 cannot tell apart."""
    y0 = torch.tensor([[NAN], [1.0]])
    with torch.no_grad():
        y = aca_ext.odeint(lambda t, y: -y, y0, padded([[1e9], [0.0, 1.0]], 2), options=INDEPENDENT)
    assert y[1, 1].item() == pytest.approx(math.exp(-1))
    assert y[:, 0].isnan().all()


@pytest.mark.parametrize("start", [0.0, NAN])
def test_a_sample_of_one_time_spoils_no_gradient(start: float) -> None:
    y0 = torch.tensor([[start], [1.0]], dtype=torch.float64, requires_grad=True)
    rate = torch.ones(1, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.0, NAN], [0.0, 0.5]], dtype=torch.float64)

    def derivatives(y0: Tensor, t: Tensor) -> list[Tensor]:
        ys = aca_ext.odeint(lambda t, y: -rate * torch.sqrt(y), y0, t, rtol=1e-6, options=INDEPENDENT)
        assert isinstance(ys, Tensor)
        grads = torch.autograd.grad(ys[-1, -1].sum(), [y0, rate], create_graph=True)
        (second,) = torch.autograd.grad(grads[1].sum(), rate)
        plain = torch.autograd.grad(ys[-1, -1].sum(), [y0, rate])
        return [grads[0][-1], grads[1], second, plain[0][-1], plain[1]]

    alone = y0.detach()[1:].requires_grad_()
    torch.testing.assert_close(derivatives(y0, t), derivatives(alone, t[1:]), rtol=1e-12, atol=1e-12)


def test_times_as_lists() -> None:
    solution = aca_ext.solve(lambda t, y: -y, torch.ones(2, 1), [[0.0, NAN], [0.0, 1.0]], options=INDEPENDENT)
    assert solution.t.shape == (2, 2)
    assert solution.y[:, 0, 0].isnan().tolist() == [False, True]
    assert solution.y[1, 1].item() == pytest.approx(math.exp(-1))


@pytest.mark.parametrize(
    ("series", "match"),
    [
        ([[0.0, 1.0, 2.0], [0.0, NAN, 2.0]], r"sample 1, t\[1\], are wrong: t\[1\] is NaN, and a time follows"),
        ([[NAN, 1.0, 2.0], [0.0, 1.0, NAN]], r"sample 0, .*t\[0\] is NaN, and a time follows"),
        ([[0.0, 1.0, 2.0], [NAN, NAN, NAN]], r"sample 1, .*all of them are NaN"),
        ([[0.0, 1.0, NAN], [0.0, math.inf, NAN]], r"sample 1, .*t\[1\] is inf"),
        ([[0.0, 1.0, 1.0], [1.0, 0.0, 2.0]], r"sample 0 \(and of 1 more\), .*must not repeat"),
    ],
)
def test_times_that_are_refused(series: list[list[float]], match: str) -> None:
    with pytest.raises(errors.TimeError, match=match):
        aca_ext.odeint(lambda t, y: -y, torch.ones(2, 1), torch.tensor(series), options=INDEPENDENT)


def test_without_a_batch_padding_is_refused() -> None:
    with pytest.raises(errors.TimeError, match="must be finite"):
        aca_ext.odeint(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0, NAN], options=INDEPENDENT)


@pytest.mark.parametrize("engine", [pytest.param("compiled", marks=is_refused), "auto"])
def test_other_engines_agree(engine: str) -> None:
    y0, t = sample(2, 1), padded([[0.0], [0.0, 1.0]], 2)
    call: dict[str, Any] = {"options": INDEPENDENT, "rtol": 1e-6, "atol": 1e-8}
    found, expected = (aca_ext.odeint(lambda t, y: -y, y0, t, engine=name, **call) for name in (engine, "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
