"""method="auto": where it changes the method, what its steps are, and its gradients across the changes."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

from aca_ext import Event, Solution, odeint, replay, solve
from aca_ext.errors import ArgumentValueError, CompileError, OptionError, ReplayError, StepLimitError

EXPLICIT, IMPLICIT = 0, 1


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]])


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    made, back, used = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([back - made, made - back - used, used], -1)


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[0] * (1.5 - y[1]), y[1] * (y[0] - 3)])


class Pulse(nn.Module):
    """A nonlinear relaxation that is stiff between t = 1 and t = 2 only."""

    def __init__(self, peak: float = 3000.0) -> None:
        super().__init__()
        self.peak = nn.Parameter(torch.tensor(peak, dtype=torch.float64))
        self.pull = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        rate = 1 + self.peak * torch.exp(-(((t - 1.5) / 0.4) ** 8))
        x, v = y.unbind(-1)
        return torch.stack([-rate * (x - torch.cos(self.pull * t)) + 0.1 * v, -self.pull * v * x - 0.3 * v], -1)


Y0 = times(1.0, 0.5)
T = times(0.0, 0.7, 1.2, 1.6, 2.5, 4.0)
HOW: dict[str, Any] = {"method": "auto", "rtol": 1e-6, "atol": 1e-8}


def pattern(solution: Solution) -> list[int]:
    """The methods in the order of their use."""
    assert solution.plan is not None
    return [method for method, _ in groupby(solution.plan.record.formulas)]


class TestChoice:
    def test_van_der_pol_changes_there_and_back(self) -> None:
        """The end value is that of Hairer's test set, at t = 2000 in his scaling to t = 2."""
        solution = solve(van_der_pol, times(2, 0), times(0, 2000), method="auto", rtol=1e-7, atol=1e-9)
        assert pattern(solution) == [EXPLICIT, IMPLICIT] * 3
        assert solution.stats.n_accepted < 2000
        assert solution.y[-1, 0].item() == pytest.approx(1.706167732170483, rel=2e-6)
        counts = solution.stats.n_accepted_of
        assert sum(counts.values()) == solution.stats.n_accepted
        assert min(counts["dopri5"], counts["kvaerno5"]) > 50

    def test_robertson(self) -> None:
        """The end value at 1e11 is that of Hairer's test set."""
        solution = solve(robertson, times(1, 0, 0), times(0, 1e11), method="auto", rtol=1e-7, atol=1e-14)
        expected = times(0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050)
        torch.testing.assert_close(solution.y[-1], expected, rtol=1e-4, atol=0)
        assert pattern(solution) == [EXPLICIT, IMPLICIT]
        assert solution.stats.n_accepted < 1000

    @pytest.mark.parametrize("gradient", ["aca", "direct", "naive"])
    def test_steps_of_dopri5_where_nothing_is_stiff(self, gradient: str) -> None:
        y0 = times(1, 1).requires_grad_()
        solution, other = (
            solve(lotka_volterra, y0, times(0, 1, 7), method=method, gradient=gradient) for method in ("auto", "dopri5")
        )
        assert torch.equal(solution.steps, other.steps)
        assert torch.equal(solution.y, other.y)
        assert solution.stats.n_f_evals == other.stats.n_f_evals
        assert solution.stats.n_accepted_of == {"dopri5": len(other.steps), "kvaerno5": 0}
        found = [torch.autograd.grad(x.y[-1].sum(), y0)[0] for x in (solution, other)]
        assert torch.equal(*found)

    def test_outputs_inside_the_steps_of_both_methods(self) -> None:
        t = torch.linspace(0, 4, 41, dtype=torch.float64)
        with torch.no_grad():
            solution = solve(Pulse(), Y0, t, **HOW)
            exact = odeint(Pulse(), Y0, t, method="kvaerno5", rtol=1e-10, atol=1e-12)
        assert pattern(solution) == [EXPLICIT, IMPLICIT, EXPLICIT]
        assert (solution.y - exact).abs().max() < 5e-5
        assert not torch.isin(t[1:-1], solution.steps).all()

    def test_without_a_matrix_it_stays_implicit(self) -> None:
        """GMRES gives no norm of the Jacobian."""
        with torch.no_grad():
            solution = solve(Pulse(), Y0, T, options={"jacobian": "krylov"}, **HOW)
        assert pattern(solution) == [EXPLICIT, IMPLICIT]

    def test_the_units_of_components_do_not_matter(self) -> None:
        """The norm of the Jacobian that decides on the way back is relative to the tolerance."""
        units = times(1, 1e-7)
        pulse = Pulse()
        with torch.no_grad():
            solution = solve(pulse, Y0, T, **HOW)
            scaled = solve(
                lambda t, y: units * pulse(t, y / units), units * Y0, T, method="auto", rtol=1e-6, atol=1e-8 * units
            )
        assert pattern(scaled) == pattern(solution)
        torch.testing.assert_close(scaled.y / units, solution.y, rtol=1e-6, atol=1e-8)

    def test_events_in_the_steps_of_both_methods(self) -> None:
        events = [Event(lambda t, y: t - 1.5001), Event(lambda t, y: y[1] - 0.2)]
        with torch.no_grad():
            solution = solve(Pulse(), Y0, T, events=events, **HOW)
            exact = solve(Pulse(), Y0, T, events=events, method="kvaerno5", rtol=1e-10, atol=1e-12)
        assert pattern(solution) == [EXPLICIT, IMPLICIT, EXPLICIT]
        for found, expected in zip(solution.events, exact.events, strict=True):
            torch.testing.assert_close(found.t, expected.t, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.y, expected.y, rtol=0, atol=1e-4)

    def test_resumed_solves_take_the_same_steps(self) -> None:
        """Up to the Jacobian, which a resumed solve evaluates anew."""
        with torch.no_grad():
            whole = solve(Pulse(), Y0, T, options={"on_step_limit": "stop"}, **HOW)
            part = solve(Pulse(), Y0, T, options={"on_step_limit": "stop", "max_num_steps": 30}, **HOW)
            while not part.is_complete:
                part = part.resume(max_num_steps=7)
        assert part.stats.n_accepted_of["kvaerno5"] > 20
        assert part.stats.n_accepted == pytest.approx(whole.stats.n_accepted, rel=0.05)
        torch.testing.assert_close(part.y, whole.y, rtol=1e-5, atol=1e-7)


def loss_of(y: Tensor) -> Tensor:
    return (y[1:].square() * times(1.0, 2.0)).sum() + y[2:4].sum()


def gradients(func: Pulse, y0: Tensor, y: Tensor, **how: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(y), (y0, func.peak, func.pull), **how)


def worst(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(relative_error(one, other) for one, other in zip(found, expected, strict=True))


class TestGradients:
    @pytest.mark.parametrize("gradient", ["aca", "direct", "naive"])
    def test_agree_with_finite_differences(self, gradient: str) -> None:
        func, y0 = Pulse(), Y0.clone().requires_grad_()
        solution = solve(func, y0, T, gradient=gradient, **HOW)
        assert pattern(solution) == [EXPLICIT, IMPLICIT, EXPLICIT]
        found = gradients(func, y0, solution.y)
        for i, x in enumerate((y0, func.peak, func.pull)):
            values = []
            with torch.no_grad():
                before = x.clone()
                for factor in (1.0001, 0.9999):
                    x.copy_(factor * before)
                    values.append(loss_of(odeint(func, y0, T, method="kvaerno5", rtol=1e-10, atol=1e-12)).item())
                x.copy_(before)
            along = (found[i] * before).sum().item()
            assert along == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3, abs=1e-5)

    @pytest.mark.parametrize("checkpoints", [5, "cpu"])
    def test_are_the_same_with_few_checkpoints(self, checkpoints: int | str) -> None:
        func, y0 = Pulse(), Y0.clone().requires_grad_()
        options = {"newton_tol": 1e-7}
        found = [
            gradients(func, y0, odeint(func, y0, T, checkpoints=policy, options=options, **HOW))
            for policy in (checkpoints, None)
        ]
        assert worst(*found) < 1e-8

    def test_with_few_checkpoints_and_the_default_tolerance_of_newton(self) -> None:
        func, y0 = Pulse(), Y0.clone().requires_grad_()
        found = [gradients(func, y0, odeint(func, y0, T, checkpoints=policy, **HOW)) for policy in (4, None)]
        assert worst(*found) < 1e-5

    def test_aca_is_direct(self) -> None:
        func, y0 = Pulse(), Y0.clone().requires_grad_()
        options = {"newton_tol": 1e-8}
        found = [
            gradients(func, y0, odeint(func, y0, T, gradient=gradient, options=options, **HOW))
            for gradient in ("aca", "direct")
        ]
        assert worst(*found) < 1e-7

    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    def test_second_derivatives(self, gradient: str) -> None:
        def first(pull: float) -> tuple[Tensor, Pulse]:
            func = Pulse()
            func.pull.data.fill_(pull)
            y = odeint(func, Y0, T, gradient=gradient, method="auto", rtol=1e-5, atol=1e-7)
            return torch.autograd.grad(loss_of(y), func.pull, create_graph=True)[0], func

        g, func = first(0.8)
        (second,) = torch.autograd.grad(g, func.pull, retain_graph=True)
        ahead, back = first(0.8001)[0], first(0.7999)[0]
        assert second.item() == pytest.approx(((ahead - back) / 2e-4).item(), rel=1e-2)
        with pytest.raises(ArgumentValueError, match="third derivatives would be wrong"):
            torch.autograd.grad(g, func.pull, create_graph=True)

    def test_adjoint_is_near(self) -> None:
        func, y0 = Pulse(30.0), Y0.clone().requires_grad_()
        found = [gradients(func, y0, odeint(func, y0, T, gradient=gradient, **HOW)) for gradient in ("adjoint", "aca")]
        assert worst(*found) < 1e-3

    @pytest.mark.parametrize("peak", [3000.0, 1.0])
    def test_a_changed_func_is_noticed(self, peak: float) -> None:
        func, y0 = Pulse(peak), Y0.clone().requires_grad_()
        y = odeint(func, y0, T, **HOW)
        func.pull.data *= 1.01
        with pytest.raises(ReplayError, match="did not repeat the forward pass"):
            gradients(func, y0, y)

    def test_of_the_time_of_an_event(self) -> None:
        func = Pulse()
        event = Event(lambda t, y: y[1] - 0.2, terminal=True)
        solution = solve(func, Y0, T, events=[event], **HOW)
        (found,) = torch.autograd.grad(solution.events[0].t[0], func.pull)
        ends = []
        for pull in (0.801, 0.799):
            func.pull.data.fill_(pull)
            with torch.no_grad():
                ends.append(solve(func, Y0, T, events=[event], method="auto", rtol=1e-9, atol=1e-11).events[0].t[0])
        assert found.item() == pytest.approx(((ends[0] - ends[1]) / 0.002).item(), rel=1e-3)


class TestReplay:
    def test_of_explicit_steps(self) -> None:
        y0 = times(1, 1)
        solution = solve(lotka_volterra, y0, times(0, 1, 3), method="auto")
        torch.testing.assert_close(replay(lotka_volterra, solution, y0), solution.y, rtol=1e-13, atol=0)

    def test_of_implicit_steps_is_refused(self) -> None:
        with torch.no_grad():
            solution = solve(Pulse(), Y0, T, **HOW)
        with pytest.raises(ArgumentValueError, match="steps of method 'auto'"):
            replay(Pulse(), solution, Y0)


class TestRefusals:
    @pytest.mark.parametrize("name", ["step_size", "n_steps"])
    def test_of_fixed_steps(self, name: str) -> None:
        with pytest.raises(OptionError, match="'auto' changes its method"):
            odeint(lotka_volterra, times(1, 1), times(0, 1), method="auto", options={name: 1})

    def test_of_independent_samples(self) -> None:
        with pytest.raises(OptionError, match="'auto' changes it"):
            odeint(Pulse(), Y0.expand(3, 2), T, method="auto", options={"batch": "independent"})

    def test_of_the_compiled_engine(self) -> None:
        with pytest.raises(CompileError, match="method"):
            odeint(Pulse(), Y0, T, method="auto", engine="compiled")

    def test_of_dense_solutions_and_transforms(self) -> None:
        with pytest.raises(ArgumentValueError, match="method='auto'"):
            solve(Pulse(), Y0, T, method="auto", dense=True)
        with pytest.raises(ArgumentValueError, match="'auto' is not available inside a function transform"):
            torch.func.jacrev(lambda y: odeint(lotka_volterra, y, times(0, 1), method="auto"))(times(1, 1))

    def test_of_random_numbers(self) -> None:
        with pytest.raises(ArgumentValueError, match="draws random numbers"):
            odeint(lambda t, y: -y * torch.rand(()), times(1, 1), times(0, 1), method="auto")


class TestAdvice:
    @pytest.mark.parametrize("method", ["dopri5", "tsit5"])
    def test_of_an_explicit_method_at_the_limit_of_stability(self, method: str) -> None:
        with pytest.raises(StepLimitError, match=r'The problem looks stiff here.*Use method="auto"'):
            odeint(van_der_pol, times(2, 0), times(0, 2000), method=method, options={"max_num_steps": 400})

    @pytest.mark.parametrize("method", ["dopri5", "bosh3"])
    def test_of_a_solve_that_shows_no_stiffness(self, method: str) -> None:
        """With many steps for their accuracy; bosh3 has no estimate."""
        with pytest.raises(StepLimitError, match='If the problem is stiff, use method="auto"'):
            odeint(lotka_volterra, times(1, 1), times(0, 20), method=method, options={"max_num_steps": 20})

    def test_costs_no_counted_evaluation(self) -> None:
        with pytest.raises(StepLimitError) as error:
            odeint(lotka_volterra, times(1, 1), times(0, 20), options={"max_num_steps": 20})
        assert error.value.n_f_evals == 2 + 6 * 20
