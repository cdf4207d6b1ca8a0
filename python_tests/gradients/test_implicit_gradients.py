"""Gradients of implicit steps against autograd through fully converged steps, and against finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

from aca_ext import Event, odeint, solve
from aca_ext.errors import ArgumentValueError, ReplayError
from aca_ext.numerics.implicit import ImplicitTableau, RosenbrockTableau
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS, ROSENBROCK_METHODS

METHODS = {name: tableau for name, tableau in IMPLICIT_METHODS.items() if isinstance(tableau, ImplicitTableau)}
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]


class Reaction(nn.Module):
    """Robertson's reaction with a rate that depends on time and one that is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.04, 1e3], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        made, back, used = self.p[0] * a * (1 + 0.5 * torch.sin(t)), self.p[1] * b * c, rate * b * b
        return torch.stack([back - made, made - back - used, used], -1)


def start() -> tuple[Reaction, Tensor, Tensor]:
    y0 = torch.tensor([1.0, 1e-5, 0.1], dtype=torch.float64, requires_grad=True)
    return Reaction(), y0, torch.tensor(1e5, dtype=torch.float64, requires_grad=True)


T = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
GRID = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.2, 2.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 1e3, -2.0], dtype=torch.float64)


def loss_of(ys: Tensor) -> Tensor:
    return ((ys[1] + ys[2].square()) * WEIGHTS).sum()


def reference(
    func: Any, y0: Tensor, steps: Sequence[tuple[float, float]], tableau: ImplicitTableau, times: Sequence[float]
) -> Tensor:
    """The states at ``times`` by Newton's method on all stages at once, converged, with a graph of two iterations."""
    a = torch.tensor([[float(x) for x in row] for row in tableau.a], dtype=torch.float64)
    b, c = ([float(x) for x in row] for row in (tableau.b, tableau.c))
    n, y, outputs = y0.numel(), y0, [y0]
    for t, t_next in steps:
        h = t_next - t
        at = [torch.tensor(t + c_i * h, dtype=torch.float64) for c_i in c]

        def newton(k: Tensor, y: Tensor = y, h: float = h, at: Sequence[Tensor] = tuple(at)) -> Tensor:
            states = y + h * a @ k
            slopes = torch.stack([func(*pair) for pair in zip(at, states, strict=True)])
            jacobians = [torch.func.jacrev(func, argnums=1)(*pair) for pair in zip(at, states, strict=True)]
            rows = [torch.cat([-h * a[i, j] * jacobians[i] for j in range(len(c))], 1) for i in range(len(c))]
            matrix = torch.eye(len(c) * n, dtype=torch.float64) + torch.cat(rows)
            return k + torch.linalg.solve(matrix, (slopes - k).reshape(-1)).reshape(k.shape)

        k = torch.zeros(len(c), n, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(30):
                before, k = k, newton(k)
                if torch.allclose(k, before, rtol=1e-10, atol=0):  # convergence is quadratic, and two more follow
                    break
        k = newton(newton(k))
        while len(outputs) < len(times) and times[len(outputs)] <= t_next:
            theta = (times[len(outputs)] - t) / (t_next - t)
            w = b if theta == 1 else tableau.dense_weights(theta)
            outputs.append(y + h * (torch.tensor(w, dtype=torch.float64) @ k))
        y = y + h * (torch.tensor(b, dtype=torch.float64) @ k)
    return torch.stack(outputs)


def rosenbrock_reference(
    func: Any, y0: Tensor, steps: Sequence[tuple[float, float]], tableau: RosenbrockTableau, times: Sequence[float]
) -> Tensor:
    """The states at ``times`` in the form of the theory, with the slopes of Hairer & Wanner, eq. (IV.7.4)."""

    def rows(matrix: Any) -> Tensor:
        return torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64)

    alpha, gammas, (b,) = rows(tableau.alpha), rows(tableau.gammas), rows([tableau.of_slopes(tableau.b)])
    y, outputs = y0, [y0]
    for t, t_next in steps:
        h, start = t_next - t, torch.tensor(t, dtype=torch.float64)
        by_time, by_state = torch.func.jacrev(func, argnums=(0, 1))(start, y)
        matrix = torch.eye(len(y), dtype=torch.float64) - h * gammas[0, 0] * by_state
        k: list[Tensor] = []
        for i in range(tableau.stages):
            state = y + sum((alpha[i, j] * k_j for j, k_j in enumerate(k)), 0 * y)
            before = sum((gammas[i, j] * k_j for j, k_j in enumerate(k)), 0 * y)
            right = h * func(start + float(tableau.c[i]) * h, state) + h * by_state @ before
            k.append(torch.linalg.solve(matrix, right + h * h * float(tableau.d[i]) * by_time))
        y = y + b @ torch.stack(k)
        if len(outputs) < len(times) and times[len(outputs)] == t_next:
            outputs.append(y)
    return torch.stack(outputs)


def gradients(ys: Tensor, inputs: Sequence[Tensor], **how: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(ys), inputs, **how))


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_error(one, other) for one, other in zip(found, expected, strict=True))


class TestFixedSteps:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("gradient", ["aca", "direct", "naive"])
    def test_agree_with_autograd_through_converged_steps(self, method: str, gradient: str) -> None:
        func, y0, rate = start()
        options = {"grid_constructor": lambda func, y0, t: GRID}
        ys = odeint(func, y0, T, method=method, options=options, args=(rate,), gradient=gradient)
        steps = list(zip(GRID[:-1].tolist(), GRID[1:].tolist(), strict=True))
        expected = reference(lambda t, y: func(t, y, rate), y0, steps, METHODS[method], T.tolist())
        torch.testing.assert_close(ys, expected, rtol=1e-11, atol=1e-14)
        inputs = (y0, func.p, rate)
        assert worst(gradients(ys, inputs), gradients(expected, inputs)) < 1e-10

    @pytest.mark.parametrize("method", ["kvaerno3", "radauIIA5", "implicit_midpoint"])
    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    def test_second_derivatives(self, method: str, gradient: str) -> None:
        func, y0, rate = start()
        inputs = (y0, func.p, rate)
        options = {"grid_constructor": lambda func, y0, t: GRID}
        steps = list(zip(GRID[:-1].tolist(), GRID[1:].tolist(), strict=True))

        def second(ys: Tensor) -> list[Tensor]:
            first = gradients(ys, inputs, create_graph=True)
            along = [(g * x.detach()).sum() for g, x in zip(first, inputs, strict=True)]
            return list(torch.autograd.grad(torch.stack(along).sum(), inputs))

        ys = odeint(func, y0, T, method=method, options=options, args=(rate,), gradient=gradient)
        expected = reference(lambda t, y: func(t, y, rate), y0, steps, METHODS[method], T.tolist())
        assert worst(second(ys), second(expected)) < 1e-9


def oscillation(a: Tensor, method: str, gradient: str, options: dict[str, Any]) -> Tensor:
    """Distance at t = 1 of a nonlinear oscillator with frequency ``a``; all of its derivatives are of order 1."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([a * y[1], -a * a * y[0] * (1 + y[0] * y[1]) + torch.sin(t)])

    y0 = torch.tensor([1.2, 0.3], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    how: dict[str, Any] = {"method": method, "gradient": gradient, "rtol": 1e-7, "atol": 1e-9, "options": options}
    return odeint(func, y0, t, **how)[-1].square().sum()


@pytest.mark.parametrize("gradient", ["aca", "direct", "naive"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("implicit_euler", {"step_size": 1.0}),
        ("radauIIA5", {"step_size": 0.5}),
        ("kvaerno5", {"step_size": 0.5}),
        ("kvaerno5", {}),
        ("rodas5p", {"step_size": 0.5}),
        ("rodas5p", {}),
    ],
)
class TestOrdersOfDerivatives:
    def derivatives(self, at: float, *how: Any, n: int) -> list[Tensor]:
        """The first ``n`` derivatives."""
        a = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        found = [oscillation(a, *how)]
        for order in range(1, n + 1):
            found += torch.autograd.grad(found[-1], a, create_graph=order < n)
        return found

    def test_first_and_second_agree_with_finite_differences(
        self, method: str, options: dict[str, Any], gradient: str
    ) -> None:
        at, d = 0.7, 1e-3
        how = method, gradient, options
        _, first, second = self.derivatives(at, *how, n=2)
        ahead, back = (self.derivatives(at + e, *how, n=1) for e in (d, -d))
        assert first.item() == pytest.approx(((ahead[0] - back[0]) / (2 * d)).item(), rel=1e-3)
        assert second.item() == pytest.approx(((ahead[1] - back[1]) / (2 * d)).item(), rel=1e-3)

    def test_third_are_refused(self, method: str, options: dict[str, Any], gradient: str) -> None:
        with pytest.raises(ArgumentValueError, match="third derivatives would be wrong"):
            self.derivatives(0.7, method, gradient, options, n=3)


class TestAdaptiveSteps:
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_agree_with_autograd_through_converged_steps(self, method: str) -> None:
        """The outputs lie inside steps."""
        func, y0, rate = start()
        how: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-7, "options": {"newton_tol": 1e-9}}
        solution = solve(func, y0, T, method=method, args=(rate,), **how)
        steps = solution.steps.tolist()
        expected = reference(lambda t, y: func(t, y, rate), y0, steps, METHODS[method], T.tolist())
        inputs = (y0, func.p, rate)
        assert worst(gradients(solution.y, inputs), gradients(expected, inputs)) < 1e-9

    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_default_accuracy_of_newton_is_within_the_tolerance(self, method: str) -> None:
        func, y0, rate = start()
        solution = solve(func, y0, T, method=method, args=(rate,), rtol=1e-4, atol=1e-8)
        expected = reference(lambda t, y: func(t, y, rate), y0, solution.steps.tolist(), METHODS[method], T.tolist())
        inputs = (y0, func.p, rate)
        assert worst(gradients(solution.y, inputs), gradients(expected, inputs)) < 1e-5

    def test_agree_with_finite_differences(self) -> None:
        func, y0, rate = start()
        how: dict[str, Any] = {"method": "kvaerno5", "rtol": 1e-8, "atol": 1e-12}
        (found,) = torch.autograd.grad(loss_of(odeint(func, y0, T, args=(rate,), **how)), rate)
        with torch.no_grad():
            ahead, back = (loss_of(odeint(func, y0, T, args=(rate * f,), **how)) for f in (1.001, 0.999))
        assert found.item() == pytest.approx(((ahead - back) / (0.002 * rate.detach())).item(), rel=1e-5)

    @pytest.mark.parametrize("jacobian", ["krylov", "nearly"])
    def test_are_those_of_func_with_any_jacobian(self, jacobian: str) -> None:
        """A matrix that is only near the derivative changes the iterations, not the gradient."""
        func, y0, rate = start()

        def nearly(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
            return 1.1 * torch.func.jacrev(lambda y: func(t, y, rate))(y)

        how: dict[str, Any] = {"method": "kvaerno5", "rtol": 1e-4, "atol": 1e-8, "args": (rate,)}
        options = {"newton_tol": 1e-7, "jacobian": nearly if jacobian == "nearly" else jacobian}
        solution = solve(func, y0, T, options=options, **how)
        expected = reference(
            lambda t, y: func(t, y, rate), y0, solution.steps.tolist(), METHODS["kvaerno5"], T.tolist()
        )
        inputs = (y0, func.p, rate)
        assert worst(gradients(solution.y, inputs), gradients(expected, inputs)) < 1e-8

    def test_replay_needs_little_more_evaluations_than_the_solve(self) -> None:
        """It starts from polynomials through the ends of the steps, with the Jacobians that the gradient needs."""
        func, y0, rate = start()
        solution = solve(func, y0, T, method="kvaerno5", rtol=1e-6, atol=1e-10, args=(rate,))
        solution.y[-1].sum().backward()
        stats = solution.stats
        assert stats.n_f_evals_backward is not None
        assert stats.n_f_evals_backward < 1.5 * stats.n_f_evals

    def test_of_a_block_diagonal_batch(self) -> None:
        func, y0, rate = start()
        batch = torch.stack([y0, 2 * y0, 0.5 * y0])
        how: dict[str, Any] = {"method": "kvaerno3", "rtol": 1e-4, "atol": 1e-8, "args": (rate,)}
        found = []
        for jacobian in ("dense", "block"):
            ys = odeint(func, batch, T, options={"jacobian": jacobian, "newton_tol": 1e-7}, **how)
            found.append(torch.autograd.grad((ys[-1] * WEIGHTS).sum(), (y0, func.p, rate), retain_graph=True))
        assert worst(found[0], found[1]) < 1e-9

    def test_with_few_checkpoints(self) -> None:
        func, y0, rate = start()
        how: dict[str, Any] = {"method": "kvaerno5", "args": (rate,), "rtol": 1e-4, "options": {"newton_tol": 1e-8}}
        found = []
        for checkpoints in (None, 3, "cpu"):
            ys = odeint(func, y0, T, checkpoints=checkpoints, **how)
            found.append(gradients(ys, (y0, func.p, rate)))
        assert worst(found[1], found[0]) < 1e-9
        assert worst(found[2], found[0]) == 0

    def test_adjoint_is_near(self) -> None:
        """On a problem that is not stiff: the adjoint solves the state backward, which stiffness makes unstable."""
        func, y0, _ = start()
        func.p.data[1] = 1.0
        rate = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        found = []
        for gradient in ("aca", "adjoint"):
            ys = odeint(func, y0, T, method="kvaerno5", args=(rate,), gradient=gradient, rtol=1e-7, atol=1e-10)
            found.append(gradients(ys, (y0, func.p, rate)))
        assert worst(found[1], found[0]) < 1e-3

    def test_of_times_and_events(self) -> None:
        func, y0, rate = start()
        t = T.clone().requires_grad_()
        ys = odeint(func, y0, t, method="kvaerno5", args=(rate,), rtol=1e-6, atol=1e-9)
        (found,) = torch.autograd.grad(ys[2].sum(0), t, torch.ones(()))
        assert abs(found[2] - func(t[2], ys[2], rate).sum()) < 1e-12
        event = Event(lambda t, y: y[0] - 0.999, terminal=True)
        solution = solve(func, y0, T, method="kvaerno5", args=(rate,), rtol=1e-7, atol=1e-10, events=[event])
        time, state = solution.events[0].t[0], solution.events[0].y[0]
        (found,) = torch.autograd.grad(time, rate, retain_graph=True)
        with torch.no_grad():
            ends = [
                solve(func, y0, T, method="kvaerno5", args=(rate * f,), rtol=1e-8, atol=1e-11, events=[event])
                for f in (1.01, 0.99)
            ]
            expected = (ends[0].events[0].t[0] - ends[1].events[0].t[0]) / (0.02 * rate)
        assert state[0].item() == pytest.approx(0.999, abs=1e-8)
        assert found.item() == pytest.approx(expected.item(), rel=1e-3)

    def test_of_second_order(self) -> None:
        """The repeated solve is that of the forward pass only up to the default accuracy of Newton's method."""
        func, y0, rate = start()
        ys = odeint(func, y0, T, method="kvaerno5", args=(rate,), rtol=1e-6, atol=1e-10)
        (first,) = torch.autograd.grad(loss_of(ys), rate, create_graph=True)
        (second,) = torch.autograd.grad(first, rate)
        how: dict[str, Any] = {"method": "kvaerno5", "rtol": 1e-7, "atol": 1e-11}
        ends = [(rate.detach() * f).requires_grad_() for f in (1.01, 0.99)]
        slopes = [torch.autograd.grad(loss_of(odeint(func, y0, T, args=(x,), **how)), x)[0] for x in ends]
        assert second.item() == pytest.approx(((slopes[0] - slopes[1]) / (0.02 * rate.detach())).item(), rel=0.003)

    @pytest.mark.parametrize("independent", [False, True])
    @pytest.mark.parametrize("method", ["kvaerno3", "kvaerno5", "trbdf2"])
    def test_of_very_stiff_steps_are_not_of_rounding(self, method: str, independent: bool) -> None:
        """Robertson's reaction to t = 1e11, where products of step size and Jacobian reach 1e14."""

        def func(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
            a, b, c = y.unbind(-1)
            made, back, used = k[0] * a, k[1] * b * c, k[2] * b * b
            return torch.stack((back - made, made - back - used, used), -1)

        k = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        y0, options = (y0[None], {"batch": "independent"}) if independent else (y0, {})
        span = torch.tensor([0.0, 1e11], dtype=torch.float64)
        end = odeint(func, y0, span, args=(k,), method=method, rtol=1e-3, atol=1e-9, options=options)[-1]
        loss = (end / end.detach()).sum()
        found = torch.autograd.grad(loss, k)[0] * k.detach()
        expected = torch.tensor([-3.0, 3.0, -2.0], dtype=torch.float64)  # of finite differences of SciPy's Radau
        assert relative_error(found, expected) <= 0.05

    def test_a_changed_func_is_noticed(self) -> None:
        func, y0, rate = start()
        ys = odeint(func, y0, T, method="kvaerno5", args=(rate,))
        func.p.data[0] *= 1.5
        with pytest.raises(ReplayError, match="did not repeat the forward pass"):
            gradients(ys, (y0, func.p, rate))


class TestRodas5p:
    @pytest.mark.parametrize("gradient", ["aca", "direct", "naive"])
    def test_agrees_with_autograd_through_its_formula(self, gradient: str) -> None:
        func, y0, rate = start()
        grid, t = 0.01 * GRID, 0.01 * T  # larger steps of a linearly implicit method leave the domain
        options = {"grid_constructor": lambda func, y0, t: grid}
        ys = odeint(func, y0, t, method="rodas5p", options=options, args=(rate,), gradient=gradient)
        steps = list(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))
        tableau = ROSENBROCK_METHODS["rodas5p"]
        expected = rosenbrock_reference(lambda t, y: func(t, y, rate), y0, steps, tableau, t.tolist())
        torch.testing.assert_close(ys, expected, rtol=1e-11, atol=1e-14)
        inputs = (y0, func.p, rate)
        first = [gradients(x, inputs, create_graph=True) for x in (ys, expected)]
        assert worst(*first) < 1e-10
        along = [torch.stack([(g * x.detach()).sum() for g, x in zip(one, inputs, strict=True)]).sum() for one in first]
        assert worst(*(torch.autograd.grad(one, inputs) for one in along)) < 1e-9

    def test_agrees_with_finite_differences_on_adaptive_steps(self) -> None:
        """With an output inside a step."""
        func, y0, rate = start()
        how: dict[str, Any] = {"method": "rodas5p", "rtol": 1e-8, "atol": 1e-12}
        (found,) = torch.autograd.grad(loss_of(odeint(func, y0, T, args=(rate,), **how)), rate)
        with torch.no_grad():
            ahead, back = (loss_of(odeint(func, y0, T, args=(rate * f,), **how)) for f in (1.001, 0.999))
        assert found.item() == pytest.approx(((ahead - back) / (0.002 * rate.detach())).item(), rel=1e-5)


def test_float32_with_a_tolerance_near_rounding() -> None:
    """Newton's method ends at rounding there, and so far may the repeated steps be from the forward pass."""
    k = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -50 * k * (y - torch.cos(t)) * (1 + y * y)

    for method, rtol in (("kvaerno5", 1e-5), ("kvaerno3", 1e-4)):
        y = odeint(func, torch.ones(3), [0.0, 0.5, 2.0], method=method, rtol=rtol, atol=1e-3 * rtol)
        (grad,) = torch.autograd.grad(y.sum(), k)
        assert torch.isfinite(grad).all()
