"""Implicit Runge-Kutta methods: order, stiff problems, Newton's method, Jacobians, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aca_ext import odeint, solve
from aca_ext.errors import ArgumentValueError, CompileError, OptionError, SolveError, StepSizeError, UnknownNameError
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS, ROSENBROCK_METHODS
from aca_ext.solver.implicit.krylov import gmres
from aca_ext.solver.implicit.rosenbrock import _Start
from aca_ext.solver.implicit.scheme import implicit_scheme_of

METHODS: dict[str, Any] = {**IMPLICIT_METHODS, **ROSENBROCK_METHODS}
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
TIGHT = {"rtol": 1e-8, "atol": 1e-10}


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    made, back, used = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([back - made, made - back - used, used], -1)


def forced(t: Tensor, y: Tensor) -> Tensor:
    """y' = -50 (y - cos t) - sin t, whose solution from 1 is cos t."""
    return -50 * (y - torch.cos(t)) - torch.sin(t)


def logistic(t: Tensor, y: Tensor) -> Tensor:
    """Without a closed form for the stages: y' = cos(t)·y·(2 - y)."""
    return torch.cos(t) * y * (2 - y)


def logistic_solution(t: float) -> float:
    return 2 / (1 + math.exp(-2 * math.sin(t)))


Y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


class TestOrder:
    @pytest.mark.parametrize("method", METHODS)
    def test_of_fixed_steps(self, method: str) -> None:
        def error(n: int) -> float:
            y = odeint(logistic, ONE, times(0, 2), method=method, options={"step_size": 2 / n})
            return abs(y[-1].item() - logistic_solution(2.0))

        observed = math.log2(error(16) / error(32))
        assert observed == pytest.approx(METHODS[method].order, abs=0.45)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_of_dense_output(self, method: str) -> None:
        def error(n: int) -> float:
            grid = torch.linspace(0, 1, n + 1, dtype=torch.float64)
            options = {"first_step": 1 / n, "max_step": 1 / n, "ifactor": 1.0}
            options |= {} if method == "rodas5p" else {"newton_tol": 1e-9}
            inside = torch.cat([grid[:1], (grid[:-1] + 0.3 / n), grid[-1:]])
            y = odeint(logistic, ONE, inside, method=method, rtol=1e-2, atol=1e-2, options=options)
            exact = torch.tensor([[logistic_solution(t)] for t in inside.tolist()], dtype=torch.float64)
            return float((y - exact)[1:-1].abs().max())

        tableau = METHODS[method]
        assert tableau.dense_order is not None
        assert math.log2(error(8) / error(16)) > min(tableau.order, tableau.dense_order + 1) - 0.4


class TestStarts:
    @pytest.mark.parametrize("method", ["kvaerno5", "kvaerno3", "trbdf2"])
    def test_continue_the_polynomial_through_earlier_slopes(self, method: str) -> None:
        """Exact for slopes of degree 0, 1 and 2 at stages that have one, two and three nodes before them."""
        scheme = implicit_scheme_of(METHODS[method], estimate_error=True)
        of_stage = {i: dict(group.starts[0]) for group in scheme.groups if group.a for i in group.stages}
        assert set(of_stage) == set(range(1, len(scheme.a)))
        for i, weights in of_stage.items():
            assert max(weights) < i
            for degree in range(min(i, 3) if method == "kvaerno5" else 1):
                found = sum(w * scheme.c[j] ** degree for j, w in weights.items())
                assert found == pytest.approx(scheme.a[i][i] * scheme.c[i] ** degree, rel=1e-12)

    @pytest.mark.parametrize("method", ["kvaerno5", "trbdf2"])
    def test_save_iterations(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Iterations that start from the last slope alone take more."""

        def iterations() -> int:
            found = solve(logistic, ONE, times(0, 3), method=method, rtol=1e-8, atol=1e-8)
            return int(found.stats.n_newton_iterations)

        counted = iterations()
        scheme = implicit_scheme_of(METHODS[method], True)  # cached by its arguments as they are given
        for group in scheme.groups[1:]:
            last = group.stages.start - 1
            monkeypatch.setitem(vars(group), "starts", (((last, scheme.a[last + 1][last + 1]),),))
        assert counted < 0.95 * iterations()


@pytest.mark.parametrize(("method", "tolerance"), [("radau5", 1e-2), ("kvaerno5", 30 * 1e-6), ("trbdf2", 30 * 1e-6)])
def test_default_tolerance_of_newtons_method(method: str, tolerance: float) -> None:
    def iterations(**options: float) -> int:
        found = solve(logistic, ONE, times(0, 3), method=method, rtol=1e-6, atol=1e-6, options=options)
        return int(found.stats.n_newton_iterations)

    assert iterations() == iterations(newton_tol=tolerance) != iterations(newton_tol=tolerance / 100)


class TestRosenbrock:
    def test_products_with_the_jacobian_are_differentiable_and_search_no_graph_before_the_step(self) -> None:
        before = times(0.5, 1.5).requires_grad_()
        joint = (before * times(2.0, 1.0)).view(1, 2)
        start = _Start(joint, joint[:, :1].sin() * joint[:, 1:])  # f(y, t) = t·sin(y) at y = 1, t = 1.5
        direction = times(3.0, 0.25).view(1, 2)
        y, t = torch.ones(()).double(), 1.5
        expected = 3 * t * y.cos() + 0.25 * y.sin()
        for _ in range(2):
            product = start.product(direction)
            assert product.item() == pytest.approx(expected.item(), rel=1e-14)
        (found,) = torch.autograd.grad(product.sum(), before)
        by_y, by_t = -3 * t * y.sin() + 0.25 * y.cos(), 3 * y.cos()
        torch.testing.assert_close(found, torch.stack([2 * by_y, by_t]), rtol=1e-14, atol=0)
        # A backward pass stops at inputs that come later in the graph than all of this.
        assert start._pulled[0].grad_fn is not None
        assert start._pulled[0].grad_fn.next_functions[0][0] is start.k.grad_fn


class TestStiffProblems:
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_robertson(self, method: str) -> None:
        """The end value at 1e11 is that of Hairer's test set."""
        solution = solve(robertson, Y0, times(0, 1e11), method=method, rtol=1e-5, atol=1e-9)
        end = times(0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050)
        assert ((solution.y[-1] - end).abs() / (1e-4 + end)).max() < 1e-4
        assert solution.stats.n_steps < 1000
        if method == "rodas5p":
            assert solution.stats.n_jacobians == solution.stats.n_steps
            return
        assert 0 < solution.stats.n_jacobians < solution.stats.n_accepted
        assert solution.stats.n_newton_iterations < solution.stats.n_f_evals < 30 * solution.stats.n_steps

    def test_step_whose_iterations_fail_is_halved(self) -> None:
        """The Oregonator, where most rejected steps are such; by a fifth, more steps would be taken."""

        def oregonator(t: Tensor, y: Tensor) -> Tensor:
            a, b, c = y.unbind()
            return torch.stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)])

        def steps(**options: float) -> int:
            how: dict[str, Any] = {"method": "kvaerno5", "rtol": 1e-3, "atol": 1e-9, "options": options}
            return int(solve(oregonator, times(1, 2, 3), times(0, 30), **how).stats.n_accepted)

        assert steps() == steps(dfactor=0.5) < 0.8 * steps(dfactor=0.2)

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_van_der_pol(self, method: str) -> None:
        """mu = 1000; the end value is that of the Bari test set."""

        def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
            return torch.stack([y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]])

        y0 = times(2.0, 0.0)
        solution = solve(van_der_pol, y0, times(0, 2000), method=method, rtol=1e-5, atol=1e-8)
        assert solution.y[-1, 0].item() == pytest.approx(VAN_DER_POL, rel=2e-3)
        assert solution.stats.n_steps < 2500

    @pytest.mark.parametrize("method", METHODS)
    def test_large_fixed_steps_are_stable(self, method: str) -> None:
        y = odeint(forced, ONE, times(0, 6), method=method, options={"step_size": 0.25})
        assert (y[-1] - math.cos(6)).abs().max() < (0.05 if METHODS[method].order == 1 else 0.02)

    def test_float32(self) -> None:
        y0, t = Y0.float(), torch.tensor([0.0, 100.0])
        y = odeint(robertson, y0, t, method="kvaerno5", rtol=1e-4, atol=1e-8)
        exact = odeint(robertson, Y0, t, method="kvaerno5", rtol=1e-9, atol=1e-13)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=1e-8)

    @pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "radauIIA5"])
    def test_inference_mode_and_empty_states(self, method: str) -> None:
        how: dict[str, Any] = {"method": method}
        how |= {"options": {"step_size": 5e-4}} if method == "radauIIA5" else {"rtol": 1e-4, "atol": 1e-8}
        t = times(0, 5e-3) if method == "radauIIA5" else times(0, 10)
        expected = solve(robertson, Y0, t, **how)
        with torch.inference_mode():
            found = solve(robertson, Y0.clone(), t, **how)
        torch.testing.assert_close(found.y.clone(), expected.y, rtol=0, atol=0)
        assert found.stats.n_steps == expected.stats.n_steps
        nothing = torch.empty(0, 3, dtype=torch.float64, requires_grad=True)
        y = odeint(robertson, nothing, t, **how)
        assert y.shape == (2, 0, 3)
        y.sum().backward()
        assert nothing.grad is not None

    def test_states_of_any_form(self) -> None:
        """Tuple, complex and channels-last states give the numbers of a flat real state."""
        exact = odeint(robertson, Y0, times(0, 1, 10), method="kvaerno3")

        def of_tuple(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            slope = robertson(t, torch.cat([y[0].reshape(1), y[1]]))
            return slope[0].reshape(()), slope[1:]

        first, rest = odeint(of_tuple, (Y0[0], Y0[1:]), times(0, 1, 10), method="kvaerno3", options={"norm": _rms})
        torch.testing.assert_close(torch.cat([first.unsqueeze(-1), rest], -1), exact, rtol=1e-9, atol=1e-12)
        turning = odeint(lambda t, y: 1j * y - y, ONE * (1 + 0j), times(0, 1), method="kvaerno5", **TIGHT)
        torch.testing.assert_close(turning[-1], torch.exp((1j - 1) * ONE), rtol=1e-6, atol=1e-8)
        image = torch.rand(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
        weights = torch.arange(60, dtype=torch.float64).view(3, 4, 5) / 10
        y = odeint(lambda t, y: -weights * y, image, times(0, 1), method="kvaerno5", **TIGHT)
        torch.testing.assert_close(y[-1], image * torch.exp(-weights), rtol=1e-5, atol=1e-8)


def _rms(y: Any) -> Tensor:
    flat = torch.cat([part.reshape(-1) for part in y])
    return flat.square().mean().sqrt()


VAN_DER_POL = 1.706167732170483


FIXED_EVALUATIONS = {"implicit_euler": 7, "implicit_midpoint": 9, "gl4": 13, "gl6": 20, "radauIIA5": 17, "sdirk2": 10}


class TestStartOfNewton:
    """The slope at the start of a fixed step takes the place of the first evaluations of its stages."""

    @pytest.mark.parametrize("method", FIXED_EVALUATIONS)
    def test_saves_an_iteration(self, method: str) -> None:
        """A linear func: each group of stages is evaluated once, at its solution."""
        a = torch.tensor([[-1.0, 2.0], [-2.0, -1.0]], dtype=torch.float64)
        options = {"step_size": 0.25}
        solution = solve(lambda t, y: y @ a, times(1, 1), times(0, 1), method=method, options=options)
        stats = solution.stats
        groups = 2 if method == "sdirk2" else 1
        assert 4 * groups <= stats.n_newton_iterations <= 4 * groups + 1
        assert stats.n_f_evals <= FIXED_EVALUATIONS[method]

    @pytest.mark.parametrize("method", FIXED_EVALUATIONS)
    def test_need_not_be_finite(self, method: str) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t == 0, math.nan, -y)

        options = {"step_size": 0.125}
        y = odeint(func, ONE, times(0, 1), method=method, options=options)
        expected = odeint(lambda t, y: -y, ONE, times(0, 1), method=method, options=options)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)


class TestJacobians:
    def func(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([robertson(t, one) for one in y.unbind(0)]) * (1 + t)

    @pytest.mark.parametrize("jacobian", ["block", "krylov"])
    def test_give_the_same_solution(self, jacobian: str) -> None:
        y0 = torch.stack([Y0, torch.tensor([0.9, 0.0, 0.1], dtype=torch.float64)])
        how: dict[str, Any] = {"method": "kvaerno5", "rtol": 1e-4, "atol": 1e-10}
        one = odeint(self.func, y0, times(0, 10), options={"newton_tol": 1e-6}, **how)
        other = odeint(self.func, y0, times(0, 10), options={"jacobian": jacobian, "newton_tol": 1e-6}, **how)
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-13)

    def test_by_a_function_of_the_user(self) -> None:
        calls = []

        def jacobian(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
            calls.append(t)
            return -k * torch.eye(2, dtype=torch.float64)

        k = torch.tensor(100.0, dtype=torch.float64)
        y = odeint(
            lambda t, y, k: -k * y, torch.ones(2, dtype=torch.float64), times(0, 0.1), method="kvaerno5",
            args=(k,), options={"jacobian": jacobian}, **TIGHT,
        )  # fmt: skip
        assert calls
        torch.testing.assert_close(y[-1], math.exp(-10) * torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=1e-9)

    def test_of_a_func_that_is_hard_to_batch(self) -> None:
        """More elements than the loop over columns takes, and an operation that decides by a value."""

        def func(t: Tensor, y: Tensor) -> Tensor:
            rate = 40.0 if float(y.detach().sum()) > 1 else 20.0
            return -rate * y + _Custom.apply(y)

        y = odeint(func, torch.ones(20, dtype=torch.float64), times(0, 1), method="kvaerno3")
        assert torch.isfinite(y).all()

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_of_a_func_that_does_not_use_the_state(self, method: str) -> None:
        k = torch.arange(1.0, 4.0, dtype=torch.float64, requires_grad=True)
        y = odeint(lambda t, y: k * torch.cos(t), torch.zeros(3, dtype=torch.float64), times(0, 2), method=method)
        torch.testing.assert_close(y[-1].detach(), k.detach() * math.sin(2.0), rtol=1e-4, atol=0.0)
        (grad,) = torch.autograd.grad(y[-1].sum(), k)
        assert grad.tolist() == pytest.approx([math.sin(2.0)] * 3, rel=1e-4)

    def test_gmres_solves_to_rounding(self) -> None:
        matrix = torch.randn(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        matrix = torch.eye(60, dtype=torch.float64) + 0.05 * matrix
        r = torch.linspace(-1, 1, 60, dtype=torch.float64)
        x, error = gmres(lambda v: matrix @ v, r, 1e-14)
        assert error < 1e-14
        torch.testing.assert_close(matrix @ x, r, rtol=1e-12, atol=1e-12)
        r[3] = math.nan
        found, error = gmres(lambda v: matrix @ v, r, 1e-14)
        assert found.isnan().all()
        assert math.isnan(error)


class _Custom(torch.autograd.Function):
    """A function without a batched form."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * float(g.abs().sum() >= 0)


class TestFailures:
    def test_of_newton_on_a_fixed_grid(self) -> None:
        with pytest.raises(SolveError, match=r"Newton's method did not solve.*last change was"):
            odeint(lambda t, y: y * y + 1, ONE, times(0, 10), method="implicit_euler", options={"step_size": 10.0})

    def test_of_newton_at_every_step_size(self) -> None:
        def jumping(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(y > 0.5, -1.0, 1e9) + 0 * y

        with pytest.raises(StepSizeError, match="Newton's method"):
            odeint(jumping, ONE, times(0, 1), method="kvaerno3", options={"min_step": 1e-6})

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"jacobian": "sparse"}, UnknownNameError, "dense, block, krylov"),
            ({"jacobian": "block"}, OptionError, "first dimension counts samples"),
            ({"newton_tol": 0.0}, OptionError, "newton_tol is 0.0"),
            ({"jacobian": lambda t, y: torch.ones(2)}, OptionError, "must return the derivative"),
        ],
    )
    def test_of_options(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            odeint(robertson, Y0, times(0, 1), method="kvaerno3", options=options)

    @pytest.mark.parametrize("options", [{"jacobian": "krylov"}, {"newton_tol": 1e-3}])
    def test_of_options_of_rodas5p(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match="makes no Newton iterations"):
            odeint(robertson, Y0, times(0, 1), method="rodas5p", options=options)

    def test_options_of_newton_belong_to_implicit_methods(self) -> None:
        with pytest.raises(UnknownNameError, match="for implicit methods"):
            odeint(robertson, Y0, times(0, 1e-3), options={"newton_tol": 1e-3})

    def test_other_engines_refuse(self) -> None:
        with pytest.raises(CompileError, match=r"the given method \('radauIIA5'\). Use engine=\"eager\""):
            odeint(robertson, Y0, times(0, 1), method="radauIIA5", engine="compiled", options={"step_size": 0.1})
        options = {"batch": "independent"}
        with pytest.raises(CompileError, match=r"the given method \('rodas5p'\)"):
            odeint(robertson, Y0[None], times(0, 1), method="rodas5p", engine="compiled", options=options)

    @pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")
    @pytest.mark.parametrize("make", [lambda: torch.nn.Dropout(0.5), lambda: torch.nn.BatchNorm1d(3)])
    def test_of_a_func_that_is_not_repeatable(self, make: Callable[[], torch.nn.Module]) -> None:
        layer = make().double()
        y0 = torch.rand(4, 3, dtype=torch.float64)
        with pytest.raises(ArgumentValueError, match="have no solution"):
            odeint(lambda t, y: -layer(y), y0, times(0, 1), method="kvaerno3")
        layer.eval()
        assert torch.isfinite(odeint(lambda t, y: -layer(y), y0, times(0, 1), method="kvaerno3")).all()
