"""Times padded with NaN on compiled lanes: each sample as it is solved alone, and as the eager engine solves it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from autograd_reference import relative_error, solve_over
from problems import DrivenMlp, sample
from test_ensemble import INDEPENDENT, inputs_of, lotka_volterra, solve
from test_ensemble_stops import switched
from torch import Tensor

import aca_ext
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.problem.sample_times import last_times_of
from aca_ext.problem.stops import stops_of

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

NAN = math.nan
MOST = 5  # times of a sample
# Steps whose sizes do not depend on rounding, so that both engines take bitwise the same ones.
FIXED: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2, "options": {"first_step": 0.0625, "max_step": 0.0625}}
SETTINGS = pytest.mark.parametrize("settings", [{}, {"checkpoints": 2}], ids=["all states", "checkpoints"])


def padded(n: int, width: int = MOST + 1) -> Tensor:
    """Times of ``n`` samples, which have 1, 2, ..., MOST times in turn; every third sample runs backwards."""
    i = torch.arange(n)[:, None]
    times = torch.tensor([0.0, 0.31, 0.32, 1.3, 2.0, 3.1], dtype=torch.float64)[:width] * (1 + 0.01 * (i % 7))
    times = torch.where(i % 3 == 2, 0.4 - times, times)
    return torch.where(torch.arange(width) > i % MOST, NAN, times)


def loss_of(y: Tensor, i: int) -> Tensor:
    """A loss of the outputs of sample ``i`` that it has, (T, \\*state)."""
    return (y * sample(7, *y.shape[1:], seed=i)[: len(y)].to(y)).sum()


def loss(y: Tensor, t: Tensor) -> Tensor:
    """The sum of the losses of all samples, without the padding."""
    return torch.stack([loss_of(y[: int(n), i], i) for i, n in enumerate((~t.isnan()).sum(1))]).sum()


def check_padding(y: Tensor, t: Tensor) -> None:
    is_padding = t.detach().T.isnan()
    assert y[is_padding].isnan().all()
    assert not y[~is_padding].isnan().any()


def check_like_eager(
    func: Any, y0: Tensor, t: Tensor, args: tuple[Tensor, ...], learnt: list[Tensor], **call: Any
) -> None:
    """Steps, outputs and gradients of the eager engine, to rounding."""
    at_once = {**call, "checkpoints": None}
    lanes, eager = solve("compiled", func, y0, t, args, **call), solve("eager", func, y0, t, args, **at_once)
    assert lanes.stats.compiled == "solve"
    check_padding(lanes.y, t)
    for one, other in zip(lanes.steps, eager.steps, strict=True):
        assert torch.equal(one, other)
    seen = ~t.detach().T.isnan()
    assert relative_error(lanes.y[seen], eager.y[seen]) <= 1e-12
    found, expected = (torch.autograd.grad(loss(sol.y, t), learnt) for sol in (lanes, eager))
    for grad, exact in zip(found, expected, strict=True):
        assert relative_error(grad, exact) <= 1e-12


class TestLikeEager:
    @SETTINGS
    @pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2", "dopri8"])
    def test_own_and_shared_parameters_and_times(self, method: str, settings: dict[str, Any]) -> None:
        func, n = DrivenMlp(), 13
        y0, drive = sample(n, 3).requires_grad_(), sample(n, 3, seed=1).requires_grad_()
        rate, t = sample(n, 1, seed=2).abs().requires_grad_(), padded(n).requires_grad_()
        learnt = [y0, drive, rate, t, *func.parameters()]
        check_like_eager(func, y0, t, (drive, rate), learnt, method=method, **FIXED, **settings)
        check_like_eager(func, y0, t.detach(), (drive, rate), [x for x in learnt if x is not t], method=method, **FIXED,
                         **settings)  # fmt: skip

    @pytest.mark.parametrize("length", range(1, MOST + 1))
    def test_each_length_beside_the_longest(self, length: int) -> None:
        func, y0, p = inputs_of("lotka_volterra", 3)
        t = padded(MOST)[[MOST - 1]].repeat(3, 1)
        t[1, length:] = NAN
        check_like_eager(func, y0, t, (p,), [y0, p], **FIXED)

    def test_steps_that_are_chosen_by_the_error(self) -> None:
        """Their sizes are rounded to float32, after sums in another order."""
        func, y0, p = inputs_of("lotka_volterra", 21)
        t = padded(21)
        lanes, eager = (solve(engine, func, y0, t, (p,)) for engine in ("compiled", "eager"))
        check_padding(lanes.y, t)
        for count in ("n_steps", "n_accepted", "n_rejected"):
            assert torch.equal(getattr(lanes.stats, count), getattr(eager.stats, count))
        for one, other in zip(lanes.steps, eager.steps, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        found, expected = (torch.autograd.grad(loss(sol.y, t), [y0, p]) for sol in (lanes, eager))
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) <= 1e-6


class TestEachSampleAlone:
    @SETTINGS
    def test_is_bitwise_the_same(self, settings: dict[str, Any]) -> None:
        func, y0, p = inputs_of("lotka_volterra", 301)  # more than share a chunk
        t = padded(301)
        sol = solve("compiled", func, y0, t, (p,), **settings)
        check_padding(sol.y, t)
        grads = torch.autograd.grad(loss(sol.y, t), [y0, p])
        assert sol.stats.n_f_rows == ((2 + 6 * sol.stats.n_steps) * (t.isnan().sum(1) < MOST)).sum()
        for i in (0, 1, 2, 3, 4, 28, 149, 299):
            times, twice = t[i][~t[i].isnan()], [i, i]  # the parameters of a single sample would be shared ones
            alone = solve("compiled", func, y0[twice], times, (p[twice],), **settings)
            assert torch.equal(sol.y[: len(times), i], alone.y[:, 0])
            assert torch.equal(sol.steps[i], alone.steps[0])
            assert sol.stats.n_steps[i] == alone.stats.n_steps[0]
            found = torch.autograd.grad(loss_of(alone.y[:, 0], i), [y0, p], allow_unused=True)
            for grad, own in zip(grads, found, strict=True):
                assert torch.equal(grad[i], torch.zeros_like(grad[i]) if own is None else own[i])

    def test_gradients_are_exact_over_the_steps(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 11)
        t = padded(11)
        sol = solve("compiled", func, y0, t, (p,))
        truth = torch.zeros((), dtype=torch.float64)
        for i in range(11):
            times = t[i][~t[i].isnan()].tolist()
            y = solve_over(func, y0[i : i + 1], times, sol.steps[i].tolist(), "dopri5", (p[i : i + 1],))
            truth = truth + loss_of(y[:, 0], i)
        found, expected = (torch.autograd.grad(x, [y0, p]) for x in (loss(sol.y, t), truth))
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) <= 1e-12

    def test_float32(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 19)
        t, single = padded(19), [x.detach().float().requires_grad_() for x in (y0, p)]
        sol = solve("compiled", func, single[0], t, (single[1],), rtol=1e-3, atol=1e-3)
        check_padding(sol.y, t)
        grads = torch.autograd.grad(loss(sol.y, t), single)
        for i in range(19):
            alone = solve(
                "compiled", func, single[0][[i]], t[i][~t[i].isnan()], (single[1][[i]],), rtol=1e-3, atol=1e-3
            )
            assert torch.equal(sol.y[: len(alone.y), i], alone.y[:, 0])
            (own,) = torch.autograd.grad(loss_of(alone.y[:, 0], i), [single[0]])
            assert torch.equal(grads[0][i], own[i])


class TestStops:
    @SETTINGS
    @pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
    def test_jumps_and_further_stops(self, method: str, settings: dict[str, Any]) -> None:
        """A stop beyond the end of a sample has no effect on it."""
        n, at = 11, torch.tensor([0.25, 1.1], dtype=torch.float64)
        y0, p, t = sample(n, 2).requires_grad_(), (sample(n, 2, seed=1).abs() + 0.5).requires_grad_(), padded(11)
        options = {"jump_t": torch.cat([at, torch.tensor([NAN])]).expand(n, -1), "step_t": [0.5]}
        sol = solve("compiled", switched, y0, t, (p, at), options=options, method=method, **settings)
        check_padding(sol.y, t)
        for i in range(n):
            times = t[i][~t[i].isnan()]
            call = {"rtol": 1e-5, "atol": 1e-6, "method": method, "options": {"jump_t": at, "step_t": [0.5]}}
            alone = aca_ext.solve(switched, y0[[i]], times, args=(p[[i]], at), **call)
            assert sol.stats.n_steps[i] == alone.stats.n_steps
            inside = {x for x in (0.25, 0.5, 1.1) if min(times) < x < max(times)}
            assert inside == {0.25, 0.5, 1.1} & {x for step in sol.steps[i].tolist() for x in step}
            torch.testing.assert_close(sol.steps[i], alone.steps, rtol=1e-6, atol=1e-9)  # of the float32 in step sizes
            assert relative_error(sol.y[: len(times), i], alone.y[:, 0]) <= 1e-7
            found = torch.autograd.grad(loss_of(sol.y[: len(times), i], i), (y0, p), retain_graph=True)
            exact = torch.autograd.grad(loss_of(alone.y[:, 0], i), (y0, p), allow_unused=True)
            for grad, other in zip(found, exact, strict=True):
                expected = torch.zeros_like(grad) if other is None else other
                torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)

    def test_common_times_have_common_stops(self) -> None:
        """One row, however many samples there are."""
        common = np.broadcast_to(np.array([0.0, 1.0, 2.0]), (1000, 3))
        for times, n_rows in ((common, 1), (padded(MOST).numpy(), MOST)):
            stops = stops_of({"step_t": [0.2, 0.5]}, times[:, 0], last_times_of(times))
            assert stops is not None
            assert stops.times.shape == (n_rows, 3)
            assert np.array_equal(stops.times[:, -1], last_times_of(times)[:n_rows])


class TestCotangents:
    @SETTINGS
    def test_those_of_padded_times_are_ignored_even_if_nan(self, settings: dict[str, Any]) -> None:
        """The loss of whoever forgets the mask in the difference, and takes it in the mean."""
        func, n = DrivenMlp(), 9
        y0, drive, rate = sample(n, 3).requires_grad_(), sample(n, 3, seed=1), sample(n, 1, seed=2)
        grads = []
        for spoils in (False, True):
            t = padded(n).requires_grad_()
            y = solve("compiled", func, y0, t, (drive, rate), **settings).y
            seen = ~t.detach().T.isnan()[..., None]
            squares = y.square() if spoils else torch.where(seen, y, 0.0).square()
            grads.append(torch.autograd.grad(torch.where(seen, squares, 0.0).sum(), [y0, t, *func.parameters()]))
        for one, other in zip(*grads, strict=True):
            assert torch.isfinite(one).all()
            assert torch.equal(one, other)


class TestForms:
    def test_a_state_of_parts(self) -> None:
        y0 = (sample(2, 3).requires_grad_(), sample(2, seed=1).requires_grad_())
        t = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.5, NAN]], dtype=torch.float64)
        call: dict[str, Any] = {"options": INDEPENDENT, "rtol": 1e-6, "atol": 1e-8}
        found = []
        for engine in ("compiled", "eager"):
            ys = aca_ext.odeint(lambda t, y: (-y[0], torch.cos(t.flatten()) * y[1]), y0, t, engine=engine, **call)
            assert ys[0][2, 1].isnan().all()
            assert ys[1][2, 1].isnan()
            found.append([*ys, *torch.autograd.grad(sum(y.square().nansum() for y in ys), y0)])
        for lanes, eager in zip(*found, strict=True):
            torch.testing.assert_close(lanes, eager, rtol=1e-6, atol=1e-9, equal_nan=True)

    def test_without_a_gradient_and_with_a_bar(self, capsys: pytest.CaptureFixture[str]) -> None:
        func, y0, p = inputs_of("lotka_volterra", 7)
        t = padded(7)
        with torch.no_grad():
            plain = solve("compiled", func, y0, t, (p,))
            watched = solve("compiled", func, y0, t, (p,), progress=True)
        check_padding(plain.y, t)
        assert torch.equal(watched.y.nan_to_num(), plain.y.nan_to_num())
        assert "7.00/7.00" in capsys.readouterr().err

    def test_for_any_number_of_threads(self) -> None:
        _, y0, p = inputs_of("lotka_volterra", 600)
        before, t, found = torch.get_num_threads(), padded(600), []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                y = solve("compiled", lotka_volterra, y0, t, (p,)).y
                found.append([y.nan_to_num(), *torch.autograd.grad(y.square().nansum(), [y0, p])])
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, *found))
