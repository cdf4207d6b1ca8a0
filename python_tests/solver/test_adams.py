"""Methods of Adams: orders, formulas, gradients through the history of slopes, and the limits of their use."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, oscillate, rotated, sample
from torch import Tensor, nn

import aca_ext
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.errors import ArgumentValueError, ConvergenceWarning, OptionError, UnknownNameError
from aca_ext.numerics.adams import bashforth, moulton
from aca_ext.numerics.methods import METHODS

ADAMS = ["explicit_adams", "implicit_adams"]
EQUAL = torch.linspace(0, 1.2, 13, dtype=torch.float64)
POLICIES = [("aca", None), ("aca", 1), ("aca", 4), ("aca", "cpu"), ("direct", None), ("naive", None)]


class Driven(nn.Module):
    """A network whose slope depends on time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, y) * torch.cos(t) + torch.sin(y)


def by_hand(func: Any, y: Tensor, t: Tensor, method: str, max_order: int, n_iters: int) -> Tensor:
    """States at equal steps in plain PyTorch, with ``n_iters`` evaluations of the corrector in each."""
    h = t[1] - t[0]
    states, slopes = [y], list[Tensor]()
    for start, end in pairwise(t):
        k = func(start, y)
        slopes = [k, *slopes][: max_order - 1]
        if len(slopes) < 3:
            k2 = func(start + h / 3, y + h * k / 3)
            k3 = func(start + 2 * h / 3, y + h * (k2 - k / 3))
            k4 = func(end, y + h * (k - k2 + k3))
            y = y + h * (k + 3 * k2 + 3 * k3 + k4) / 8
        else:
            dy = h * sum(float(w) * f for w, f in zip(bashforth(len(slopes)), slopes, strict=True))
            for _ in range(n_iters if method == "implicit_adams" else 0):
                used = [func(end, y + dy), *slopes]
                dy = h * sum(float(w) * f for w, f in zip(moulton(len(slopes)), used, strict=True))
            if method == "implicit_adams":
                slopes = slopes[:-1]  # the corrector has not converged
            y = y + dy
        states.append(y)
    return torch.stack(states)


def exact_options(method: str, max_order: int) -> dict[str, Any]:
    """Settings with which the corrector always makes three iterations."""
    tight = {"rtol": 0.0, "atol": 1e-300} if method == "implicit_adams" else {}
    iters = {"max_iters": 3} if method == "implicit_adams" else {}
    return {"method": method, "options": {"max_order": max_order, **iters}, **tight}


class TestFormulas:
    def test_weights_are_the_printed_ones(self) -> None:
        """Hairer, Norsett & Wanner, Solving ODEs I, III.1, tables 1.1 and 1.2 as weights of slopes."""
        assert bashforth(4) == tuple(Fraction(n, 24) for n in (55, -59, 37, -9))
        assert moulton(3) == tuple(Fraction(n, 24) for n in (9, 19, -5, 1))

    @pytest.mark.parametrize("n_slopes", range(1, 12))
    def test_weights_integrate_polynomials_exactly(self, n_slopes: int) -> None:
        for power in range(n_slopes + 2):
            integral = Fraction(1, power + 1)
            predicted = sum(w * Fraction(-j) ** power for j, w in enumerate(bashforth(n_slopes)))
            corrected = sum(w * Fraction(1 - j) ** power for j, w in enumerate(moulton(n_slopes)))
            assert (predicted == integral) == (power < n_slopes)
            assert (corrected == integral) == (power <= n_slopes)

    @pytest.mark.parametrize(("max_order", "explicit", "implicit"), [(4, 3, 4), (5, 4, 5), (8, 4, 5)])
    @pytest.mark.parametrize("method", ADAMS)
    def test_order_of_a_solve(self, method: str, max_order: int, explicit: int, implicit: int) -> None:
        """The first steps bound the order: steps of rk4, and one with three slopes."""

        def func(t: Tensor, y: Tensor) -> Tensor:
            return oscillate(t, y) * torch.cos(t)

        order = explicit if method == "explicit_adams" else implicit
        truth = rotated(math.sin(2.0))
        found = []
        for n in (40, 80):
            options = {"step_size": 2.0 / n, "max_order": max_order}
            if method == "implicit_adams":
                options["max_iters"] = 50
            y = aca_ext.odeint(func, rotated(0.0), [0.0, 2.0], method=method, rtol=1e-14, atol=1e-14, options=options)
            found.append(float((y[-1] - truth).norm()))
        assert math.log2(found[0] / found[1]) == pytest.approx(order, abs=0.5)

    @pytest.mark.parametrize("name", ADAMS)
    def test_order_that_is_listed(self, name: str) -> None:
        assert METHODS[name].order == {"explicit_adams": 4, "implicit_adams": 5}[name]

    @pytest.mark.parametrize("method", ADAMS)
    @pytest.mark.parametrize("is_backward", [False, True])
    def test_steps_are_those_made_by_hand(self, method: str, is_backward: bool) -> None:
        func, y0, t = Driven(), sample(2, 3), EQUAL.flip(0) if is_backward else EQUAL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            y = aca_ext.odeint(func, y0, t, **exact_options(method, 6))
        assert relative_error(y, by_hand(func, y0, t, method, 6, 3)) <= 1e-14

    @pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
    @pytest.mark.parametrize("interp", [None, "linear", "cubic"])
    @pytest.mark.parametrize("perturb", [False, True])
    def test_values_are_torchdiffeqs(self, method: str, interp: str | None, perturb: bool) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint
        func, y0 = Driven(), sample(2, 3)
        options: dict[str, Any] = {"max_order": 7, "perturb": perturb}
        t = EQUAL
        if interp is not None:
            t, options = torch.tensor([0.0, 0.13, 0.71, 1.2], dtype=torch.float64), {**options, "step_size": 0.1}
            options["interp"] = interp
        call = {"method": method, "rtol": 1e-6, "atol": 1e-8, "options": options}
        assert relative_error(aca_ext.odeint(func, y0, t, **call), theirs(func, y0, t, **call)) <= 1e-13


class TestUnequalSteps:
    @pytest.mark.parametrize("method", ADAMS)
    def test_start_again_as_rk4(self, method: str) -> None:
        """A shorter last step, for which the formulas do not hold."""
        y0, t = rotated(0.0), torch.tensor([*torch.linspace(0, 1, 11).tolist(), 1.037], dtype=torch.float64)
        t[:-1] = torch.linspace(0, 1, 11, dtype=torch.float64)
        y = aca_ext.odeint(oscillate, y0, t, method=method, options={"max_order": 6})
        last = aca_ext.odeint(oscillate, y[-2], t[-2:], method="rk4")[-1]
        assert torch.equal(y[-1], last)

    def test_count_as_equal_within_the_rounding_of_the_times(self) -> None:
        t = torch.linspace(0, 1, 31)
        n_evals = []
        for times in (t, t.double(), torch.linspace(0, 1, 31, dtype=torch.float64)):
            n_evals.append(aca_ext.solve(oscillate, rotated(0.0), times, method="explicit_adams").stats.n_f_evals)
        assert n_evals == [36, 36, 36]  # one for each step, and three more in each of the first two

    def test_from_a_grid_in_float32(self) -> None:
        options = {"grid_constructor": lambda func, y0, t: torch.linspace(0, 1, 31)}
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        solution = aca_ext.solve(oscillate, rotated(0.0), t, method="explicit_adams", options=options)
        assert solution.stats.n_f_evals == 36


class TestGradients:
    @pytest.mark.parametrize("method", ADAMS)
    @pytest.mark.parametrize(("gradient", "checkpoints"), POLICIES)
    @pytest.mark.filterwarnings("ignore::aca_ext.errors.ConvergenceWarning")
    def test_are_exact(self, method: str, gradient: str, checkpoints: Any) -> None:
        func, y0, weights = Driven(), sample(2, 3).requires_grad_(), sample(13, 2, 3, seed=4)
        wanted = [y0, *func.parameters()]
        how = {"gradient": gradient, "checkpoints": checkpoints, **exact_options(method, 6)}
        solution = aca_ext.solve(func, y0, EQUAL, **how)
        found = torch.autograd.grad((weights * solution.y).sum(), wanted)
        expected = torch.autograd.grad((weights * by_hand(func, y0, EQUAL, method, 6, 3)).sum(), wanted)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-12
        if (gradient, checkpoints) == ("aca", None):
            n_iters = 3 if method == "implicit_adams" else 0
            assert solution.stats.n_f_evals_backward == 2 * 4 + 10 * (1 + n_iters)

    @pytest.mark.parametrize("method", ADAMS)
    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    @pytest.mark.parametrize(("gradient", "checkpoints"), POLICIES[:5])
    def test_of_interpolated_states(self, method: str, interp: str, gradient: str, checkpoints: Any) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint
        func, y0 = Driven(), sample(2, 3).requires_grad_()
        t = torch.tensor([0.0, 0.13, 0.71, 0.75, 1.2], dtype=torch.float64)
        options = {"step_size": 0.1, "interp": interp, "max_order": 6}
        call: dict[str, Any] = {"method": method, "rtol": 1e-6, "atol": 1e-8, "options": options}
        ours = aca_ext.odeint(func, y0, t, gradient=gradient, checkpoints=checkpoints, **call)
        ys = ours, theirs(func, y0, t, **call)
        found, expected = (torch.autograd.grad(y.square().sum(), [y0, *func.parameters()]) for y in ys)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-12

    @pytest.mark.parametrize("method", ADAMS)
    def test_checkpoints_are_bitwise_the_same(self, method: str) -> None:
        found = []
        for checkpoints in (None, 1, 3, "cpu"):
            func, y0 = Driven(), sample(2, 3).requires_grad_()
            y = aca_ext.odeint(func, y0, EQUAL, method=method, rtol=1e-3, atol=1e-3, checkpoints=checkpoints)
            found.append(torch.autograd.grad(y.square().sum(), [y0, *func.parameters()]))
        for grads in found[1:]:
            assert all(map(torch.equal, grads, found[0]))

    @pytest.mark.parametrize("method", ADAMS)
    def test_second_derivatives(self, method: str) -> None:
        func, t = Driven(), EQUAL[:8]

        def solution(y0: Tensor) -> Tensor:
            return aca_ext.odeint(func, y0, t, method=method, rtol=1e-3, atol=1e-3, options={"max_order": 5})[1:]

        assert torch.autograd.gradgradcheck(solution, sample(1, 3).requires_grad_())

    @pytest.mark.parametrize("method", ADAMS)
    def test_of_the_requested_times_and_args(self, method: str) -> None:
        rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        t, options = EQUAL.clone().requires_grad_(), {"max_order": 5}
        how = {"args": (rate,), "method": method, "rtol": 1e-4, "atol": 1e-4, "options": options}
        y = aca_ext.odeint(lambda t, y, rate: -rate * y, torch.ones(1).double(), t, **how)
        y[-1].sum().backward()
        assert rate.grad.item() == pytest.approx(-1.2 * math.exp(-0.84), rel=1e-4)
        assert t.grad[-1].item() == pytest.approx(-0.7 * math.exp(-0.84), rel=1e-4)

    @pytest.mark.parametrize("method", ADAMS)
    def test_by_the_adjoint(self, method: str) -> None:
        found = []
        for gradient in ("aca", "adjoint"):
            func, y0 = Driven(), sample(2, 3).requires_grad_()
            t, options = [0.0, 1.2], {"step_size": 0.01, "max_order": 5}
            y = aca_ext.odeint(func, y0, t, method=method, gradient=gradient, options=options, rtol=1e-8, atol=1e-8)
            found.append(torch.autograd.grad(y[-1].square().sum(), [y0, *func.parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-5

    @pytest.mark.parametrize("method", ADAMS)
    @pytest.mark.parametrize("checkpoints", [None, 2])
    def test_repeat_dropout(self, method: str, checkpoints: int | None) -> None:
        found = []
        for gradient in ("aca", "direct"):
            torch.manual_seed(3)
            net, y0 = Mlp(), sample(2, 3).requires_grad_()
            func = lambda t, y, net=net: nn.functional.dropout(net(t, y), 0.3)  # noqa: E731
            kept = checkpoints if gradient == "aca" else None
            options = {"step_size": 0.1, "interp": "cubic", "max_order": 5}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                t = [0.0, 0.43, 1.2]
                y = aca_ext.odeint(func, y0, t, method=method, gradient=gradient, checkpoints=kept, options=options)
            found.append([y, *torch.autograd.grad(y.square().sum(), [y0, *net.parameters()])])
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    @pytest.mark.parametrize("method", ADAMS)
    def test_a_changed_func_is_noticed(self, method: str) -> None:
        scale = torch.ones(1, dtype=torch.float64)
        func, y0 = (lambda t, y: -scale * y), torch.ones(3, dtype=torch.float64, requires_grad=True)
        y = aca_ext.odeint(func, y0, EQUAL, method=method, rtol=1e-6)
        scale.data.fill_(1.001)
        with pytest.raises(aca_ext.errors.ReplayError, match="did not repeat"):
            y[-1].sum().backward()

    def test_slopes_that_are_the_state_itself(self) -> None:
        found = []
        for checkpoints in (None, 1, "cpu"):
            y0 = sample(3).requires_grad_()
            y = aca_ext.odeint(lambda t, y: y, y0, EQUAL, method="explicit_adams", checkpoints=checkpoints)
            found.append(torch.autograd.grad(y[-1].sum(), y0)[0])
            assert relative_error(y[-1], y0.detach() * math.exp(1.2)) <= 1e-4
        assert all(torch.equal(grad, found[0]) for grad in found)

    @pytest.mark.parametrize("method", ADAMS)
    def test_through_an_event(self, method: str) -> None:
        rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        event = aca_ext.Event(lambda t, y: y - 0.4, terminal=True)
        options = {"step_size": 0.01, "max_order": 5}
        solution = aca_ext.solve(
            lambda t, y: -rate * y, torch.ones(1).double(), [0.0, 10.0], method=method, options=options, events=[event]
        )
        (t,) = solution.events[0].t
        assert t.item() == pytest.approx(math.log(2.5) / 1.3, rel=1e-6)
        assert torch.autograd.grad(t, rate)[0].item() == pytest.approx(-math.log(2.5) / 1.3**2, rel=1e-5)

    @pytest.mark.parametrize("method", ADAMS)
    def test_of_complex_and_tuple_states(self, method: str) -> None:
        w = torch.tensor(0.3 + 0.8j, dtype=torch.complex128, requires_grad=True)
        y0 = torch.ones(2, dtype=torch.complex128), torch.zeros(1, dtype=torch.complex128)
        how = {"method": method, "rtol": 1e-4, "atol": 1e-4, "options": {"max_order": 5}}
        y = aca_ext.odeint(lambda t, y: (w * y[0], y[0].sum().reshape(1)), y0, EQUAL, **how)
        (grad,) = torch.autograd.grad(y[0][-1].abs().sum(), w)
        assert grad.real.item() == pytest.approx(2 * 1.2 * math.exp(0.36), rel=1e-4)
        assert abs(grad.imag.item()) < 1e-3


class TestConvergence:
    def test_of_the_corrector_is_warned_of_once(self) -> None:
        with pytest.warns(ConvergenceWarning, match="in 10 of 12 steps, first in the one from t=0.2") as found:
            aca_ext.odeint(lambda t, y: -3 * y, torch.ones(1), EQUAL, method="implicit_adams", options={"max_iters": 1})
        assert len(found) == 1
        assert found[0].filename == __file__

    def test_stops_the_iteration(self) -> None:
        n_evals = []
        for tolerance in (1e-2, 1e-12):
            options = {"max_iters": 50}
            solution = aca_ext.solve(
                oscillate, rotated(0.0), EQUAL, method="implicit_adams", rtol=0.0, atol=tolerance, options=options
            )
            n_evals.append(solution.stats.n_f_evals)
        assert n_evals[0] == 2 * 4 + 10 * 2
        assert n_evals[1] > 2 * n_evals[0]


class TestLimits:
    @pytest.mark.parametrize("max_order", [3, 13, 4.5, "5", True])
    def test_of_max_order(self, max_order: object) -> None:
        with pytest.raises(OptionError, match="from 4 to 12"):
            aca_ext.odeint(oscillate, rotated(0.0), EQUAL, method="explicit_adams", options={"max_order": max_order})

    @pytest.mark.parametrize("max_iters", [0, -1, 1.5, "2"])
    def test_of_max_iters(self, max_iters: object) -> None:
        with pytest.raises(OptionError, match="at least 1"):
            aca_ext.odeint(oscillate, rotated(0.0), EQUAL, method="implicit_adams", options={"max_iters": max_iters})

    @pytest.mark.parametrize(
        ("method", "option", "why"),
        [
            ("rk4", "max_order", "belongs to explicit_adams and implicit_adams"),
            ("dopri5", "max_order", "belongs to explicit_adams and implicit_adams"),
            ("explicit_adams", "max_iters", "belongs to implicit_adams"),
            ("rk4", "max_iters", "belongs to implicit_adams"),
            ("implicit_adams", "max_num_steps", "its steps are fixed"),
        ],
    )
    def test_options_of_other_methods(self, method: str, option: str, why: str) -> None:
        with pytest.raises(UnknownNameError, match=why):
            aca_ext.odeint(oscillate, rotated(0.0), EQUAL, method=method, options={option: 5})

    @pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")
    @pytest.mark.parametrize("method", ADAMS)
    def test_other_engines_say_why_not(self, method: str) -> None:
        compiled = aca_ext.solve(oscillate, rotated(0.0), EQUAL, method=method, engine="compiled")
        assert compiled.stats.compiled == ""
        assert method in compiled.stats.reason
        with pytest.raises(aca_ext.errors.GraphError, match=method):
            aca_ext.odeint(oscillate, rotated(0.0), EQUAL, method=method, engine="graph")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_recordings_say_no(self) -> None:
        with pytest.raises(ArgumentValueError, match="explicit_adams"):
            torch.jit.trace(lambda y: aca_ext.odeint(oscillate, y, EQUAL, method="explicit_adams"), rotated(0.0))
