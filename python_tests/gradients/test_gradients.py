"""Gradients: every method, gradient and pattern of outputs against autograd over the same accepted steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error, solve_over
from problems import LOOSE, RUNGE_KUTTA, CoupledMlp, DrivenMlp, Mlp, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors

ADAPTIVE = [name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive]
STEPS = {"step_size": 0.2}
EXACT = ("aca", "direct", "naive")  # on fixed steps, without a search for the step size

# Requested times, and the outputs (rows of the solution) that the loss reads.
PATTERNS: dict[str, tuple[list[float], list[int]]] = {
    "end": ([0.0, 1.3], [1]),
    "several": ([0.0, 0.11, 0.23, 0.5, 0.77, 1.3], [0, 1, 2, 3, 4, 5]),
    "within one step": ([0.0, 0.601, 0.602, 0.603, 0.604, 1.3], [1, 2, 3, 4, 5]),
    "decreasing": ([1.3, 0.9, 0.41, 0.4, 0.0], [1, 2, 3, 4]),
    "one time": ([0.3], [0]),
    "loss at one inner time": ([0.0, 0.3, 0.6, 1.3], [1]),
    "loss at the start alone": ([0.0, 0.3, 1.3], [0]),
    "negative times": ([-2.0, -1.5, -0.7], [1, 2]),
}


def driven() -> tuple[DrivenMlp, Tensor, tuple[Tensor, Tensor]]:
    func = DrivenMlp()
    y0 = sample(2, 3).requires_grad_()
    args = (sample(3, seed=1).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True))
    return func, y0, args


def loss_of(y: Tensor, rows: list[int]) -> Tensor:
    weights = sample(*y.shape, seed=2)
    return sum(((weights[i] * y[i]).sum() + y[i].square().mean() for i in rows), torch.zeros((), dtype=y.dtype))


def compare(method: str, gradient: str, pattern: str, **settings: Any) -> None:
    times, rows = PATTERNS[pattern]
    func, y0, args = driven()
    wanted = [y0, *args, *func.parameters()]
    sol = aca_ext.solve(
        func, y0, torch.tensor(times, dtype=torch.float64), method=method, gradient=gradient, args=args, **settings
    )
    truth = solve_over(func, y0, times, sol.steps.tolist(), method, args)
    assert relative_error(sol.y, truth) <= 1e-13
    found = torch.autograd.grad(loss_of(sol.y, rows), wanted, allow_unused=True)
    expected = torch.autograd.grad(loss_of(truth, rows), wanted, allow_unused=True)
    for grad, exact in zip(found, expected, strict=True):
        if exact is None:
            assert grad is None or not grad.any()
        else:
            assert relative_error(grad, exact) <= 1e-12


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps(method: str, gradient: str, pattern: str) -> None:
    compare(method, gradient, pattern, **LOOSE)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("gradient", EXACT)
@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_fixed_steps(method: str, gradient: str, pattern: str) -> None:
    compare(method, gradient, pattern, options=STEPS)


def test_patterns_put_outputs_inside_steps() -> None:
    """Ensures that the comparisons above reach dense output."""
    func, y0, args = driven()
    for pattern in ("within one step", "decreasing"):
        times = torch.tensor(PATTERNS[pattern][0], dtype=torch.float64)
        steps = aca_ext.solve(func, y0, times, args=args, **LOOSE).steps
        low, high = steps.min(1).values, steps.max(1).values
        inside = (times[:, None] > low) & (times[:, None] < high)
        assert inside.sum(0).max() >= 2


def test_rejected_steps_leave_no_trace_in_the_gradient() -> None:
    func, y0, args = driven()
    times = [0.0, 0.5, 1.3]
    t = torch.tensor(times, dtype=torch.float64)
    sol = aca_ext.solve(func, y0, t, args=args, options={"first_step": 1.3}, rtol=1e-9, atol=1e-9)
    assert sol.stats.n_rejected > 0
    truth = solve_over(func, y0, times, sol.steps.tolist(), "dopri5", args)
    wanted = [y0, *args, *func.parameters()]
    found, expected = (torch.autograd.grad(loss_of(y, [1, 2]), wanted) for y in (sol.y, truth))
    for grad, exact in zip(found, expected, strict=True):
        assert relative_error(grad, exact) <= 1e-12


@pytest.mark.parametrize("settings", [LOOSE, {"options": STEPS}, {"rtol": 1e-9, "atol": 1e-9}])
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solution_is_bitwise_the_same_with_and_without_gradient(
    method: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    if method in ("adaptive_heun", "fehlberg2"):
        settings = {**settings, "rtol": 1e-3}
    func, y0 = Mlp(dtype=dtype), sample(2, 3).to(dtype).requires_grad_()
    t = torch.tensor([0.0, 0.11, 0.23, 1.0], dtype=torch.float64)
    if dtype is torch.float32 and "rtol" in settings:
        settings = {**settings, "rtol": max(settings["rtol"], 1e-5), "atol": 1e-6}
    with torch.no_grad():
        plain = aca_ext.solve(func, y0, t, method=method, **settings)
    for gradient in ("aca", "direct", "adjoint"):
        sol = aca_ext.solve(func, y0, t, method=method, gradient=gradient, **settings)
        assert sol.y.requires_grad
        assert torch.equal(sol.y, plain.y)
        assert torch.equal(sol.steps, plain.steps)
        assert sol.stats == plain.stats


def test_gradient_is_bitwise_repeatable() -> None:
    def gradients() -> list[Tensor]:
        func, y0, args = driven()
        y = aca_ext.odeint(func, y0, torch.tensor([0.0, 0.4, 1.3]), args=args, **LOOSE)
        return list(torch.autograd.grad(y.square().sum(), [y0, *args, *func.parameters()]))

    for one, other in zip(gradients(), gradients(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_tuple_state(gradient: str) -> None:
    func = CoupledMlp()
    y0 = (sample(4, 3).requires_grad_(), sample(3, seed=1).requires_grad_())
    wanted = [*y0, *func.parameters()]
    times = [0.0, 0.31, 0.32, 1.5]
    sol = aca_ext.solve(func, y0, torch.tensor(times, dtype=torch.float64), gradient=gradient, **LOOSE)
    truth = solve_over(func, y0, times, sol.steps.tolist(), "dopri5")
    found, expected = (
        torch.autograd.grad(loss_of(y[0], [1, 2, 3]) + loss_of(y[1], [0, 1]), wanted) for y in (sol.y, truth)
    )
    for grad, exact in zip(found, expected, strict=True):
        assert relative_error(grad, exact) <= 1e-12


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_complex_state(gradient: str) -> None:
    w = torch.complex(sample(3, 3), sample(3, 3, seed=1)).requires_grad_()
    y0 = torch.complex(sample(2, 3, seed=2), sample(2, 3, seed=3)).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert not t.is_complex()
        return torch.tanh(y @ w) * 1j + y.conj() * t

    times = [0.0, 0.1, 0.6]
    sol = aca_ext.solve(func, y0, torch.tensor(times, dtype=torch.float64), gradient=gradient, **LOOSE)
    truth = solve_over(func, y0, times, sol.steps.tolist(), "dopri5")
    found, expected = (torch.autograd.grad(y.abs().square().sum() + y[1].real.sum(), [y0, w]) for y in (sol.y, truth))
    for grad, exact in zip(found, expected, strict=True):
        assert relative_error(torch.view_as_real(grad), torch.view_as_real(exact)) <= 1e-12


@pytest.mark.parametrize("method", ["dopri5", "kvaerno3"])
@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_an_embedding_with_sparse_gradients(gradient: str, method: str) -> None:
    layer, table, y0, t = Mlp(), sample(5, 3, seed=4), sample(2, 3), torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = []
    for is_sparse in (True, False):
        embedding = nn.Embedding.from_pretrained(table, freeze=False, sparse=is_sparse)
        rates = lambda t, y, rows=embedding: layer(t, y) * rows(torch.tensor([3, 1]))  # noqa: E731
        aca_ext.odeint(rates, y0, t, method=method, gradient=gradient).square().sum().backward()
        assert embedding.weight.grad is not None
        found.append(embedding.weight.grad.to_dense())
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:Sparse C")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_adjoint_gradients_of_sparse_parameters_are_sparse(layout: torch.layout) -> None:
    weights = (torch.eye(3) + torch.diag(torch.ones(2), 1)).double()
    y0, t = sample(3, 2), torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = []
    for w in (weights.to_sparse(layout=layout).requires_grad_(), weights.requires_grad_()):
        y = aca_ext.odeint(lambda t, y, w=w: -w @ y, y0, t, gradient="adjoint")
        found += torch.autograd.grad(y.square().sum(), w)
    assert found[0].layout == layout
    assert relative_error(found[0].to_dense(), found[1]) <= 1e-12


@pytest.mark.parametrize("gradient", ["naive", "adjoint"])
def test_inexact_gradients_converge(gradient: str) -> None:
    func, y0, args = driven()
    wanted = [y0, *args, *func.parameters()]
    t = torch.tensor([0.0, 0.3, 0.6, 1.3], dtype=torch.float64)

    def gradients(kind: str, tolerance: float) -> list[Tensor]:
        y = aca_ext.odeint(func, y0, t, gradient=kind, rtol=tolerance, atol=tolerance, args=args)
        return list(torch.autograd.grad(loss_of(y, [0, 1, 3]), wanted))

    exact = gradients("aca", 1e-12)
    errors = [
        max(relative_error(g, e) for g, e in zip(gradients(gradient, tolerance), exact, strict=True))
        for tolerance in (1e-3, 1e-6, 1e-9)
    ]
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 10
    assert errors[2] < 1e-5


def test_naive_differentiates_the_step_size_search() -> None:
    func, y0, args = driven()
    t = torch.tensor([0.0, 1.3], dtype=torch.float64)
    found = {
        kind: torch.autograd.grad(
            aca_ext.odeint(func, y0, t, gradient=kind, args=args, method="bosh3", rtol=1e-2, atol=1e-2)[-1].sum(), y0
        )[0]
        for kind in ("naive", "aca", "direct")
    }
    assert relative_error(found["direct"], found["aca"]) <= 1e-12
    assert 1e-10 < relative_error(found["naive"], found["aca"]) < 0.1


def checkable(gradient: str, method: str, options: dict[str, Any]) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    net = Mlp(2, 3)
    names = [name for name, _ in net.named_parameters()]

    def func(t: Tensor, y: Tensor, drive: Tensor, *weights: Tensor) -> Tensor:
        slope = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (t, y))
        return slope * torch.cos(t) + drive * y

    def solved(y0: Tensor, drive: Tensor, *weights: Tensor) -> Tensor:
        t = torch.tensor([0.0, 0.13, 0.5], dtype=torch.float64)
        settings = {"method": method, "gradient": gradient, "options": options, "rtol": 1.0, "atol": 1.0}
        return aca_ext.odeint(func, y0, t, args=(drive, *weights), **settings)

    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]
    return solved, (sample(2).requires_grad_(), sample(2, seed=1).requires_grad_(), *weights)


# With tolerances of 1 and a step that may not grow, a perturbation does not change the grid of adaptive steps.
GRIDS = {"fixed": {"step_size": 0.2}, "adaptive": {"first_step": 0.2, "max_step": 0.2}}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("method", ["bosh3", "dopri5"])
def test_gradcheck(method: str, gradient: str, grid: str) -> None:
    assert torch.autograd.gradcheck(*checkable(gradient, method, GRIDS[grid]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_gradgradcheck(gradient: str, grid: str) -> None:
    assert torch.autograd.gradgradcheck(*checkable(gradient, "bosh3", GRIDS[grid]), rtol=1e-6, atol=1e-8)


def test_gradgradcheck_of_a_module_and_a_tuple_state() -> None:
    func = CoupledMlp(2, 3)

    def solved(matrix: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        return aca_ext.odeint(func, (matrix, vector), torch.tensor([0.0, 0.3, 0.5]), options=STEPS, method="bosh3")

    inputs = (sample(2, 2).requires_grad_(), sample(2, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(solved, inputs)
    assert torch.autograd.gradgradcheck(solved, inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_second_derivatives_are_exact(gradient: str, pattern: str) -> None:
    times, rows = PATTERNS[pattern]
    func, y0, args = driven()
    wanted = [y0, *args, *func.parameters()]
    t = torch.tensor(times, dtype=torch.float64)
    sol = aca_ext.solve(func, y0, t, gradient=gradient, args=args, **LOOSE)
    truth = solve_over(func, y0, times, sol.steps.tolist(), "dopri5", args)

    def second(y: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        first = torch.autograd.grad(loss_of(y, rows), wanted, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() + g.sum() for g in first if g is not None)
        assert isinstance(penalty, Tensor)
        return list(first), list(torch.autograd.grad(penalty, wanted, allow_unused=True))

    for found, expected in zip(second(sol.y), second(truth), strict=True):
        for grad, exact in zip(found, expected, strict=True):
            if exact is None:
                assert grad is None or not grad.any()
            else:
                assert relative_error(grad, exact) <= 1e-11


@pytest.mark.parametrize("gradient", EXACT)
def test_third_derivatives(gradient: str) -> None:
    k = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    t = torch.tensor([0.0, 2.0], dtype=torch.float64)
    y = aca_ext.odeint(lambda t, y, k: k * y, y0, t, args=(k,), gradient=gradient, rtol=1e-11, atol=1e-12)
    value = y[-1].sum()
    for order in range(1, 4):
        (value,) = torch.autograd.grad(value, k, create_graph=True)
        assert value.item() == pytest.approx(2.0**order * math.exp(0.6), rel=1e-7)


def test_adjoint_refuses_second_derivatives_rather_than_losing_them() -> None:
    func, y0, t = Mlp(), sample(2, 3).requires_grad_(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = aca_ext.odeint(func, y0, t, gradient="adjoint", rtol=1e-6, atol=1e-6)
    plain = torch.autograd.grad(y[-1].sum(), [y0, *func.parameters()], retain_graph=True)
    grads = torch.autograd.grad(y[-1].sum(), [y0, *func.parameters()], create_graph=True)
    for one, other in zip(plain, grads, strict=True):
        assert torch.equal(one, other)
    for wanted in (y0, next(func.parameters())):
        for grad in grads:
            with pytest.raises(errors.ArgumentValueError, match="no second derivatives"):
                torch.autograd.grad((grad * grad).sum(), wanted, retain_graph=True, allow_unused=True)


def shared_history(case: str) -> tuple[Mlp, Tensor, dict[str, Any]]:
    func = DrivenMlp() if case == "arg" else Mlp()
    func.encoder = torch.nn.Linear(2, 3, dtype=torch.float64)
    with torch.no_grad():
        func.encoder.weight.copy_(sample(3, 2, seed=4))
        func.encoder.bias.copy_(sample(3, seed=5))
    context = torch.tanh(func.encoder(sample(2, seed=6))).exp()
    if case == "arg":
        return func, sample(3), {"args": (context, context.sum())}
    if case == "y0":
        return func, context, {}
    if case == "y0 through a weight of func":
        return func, torch.tanh(func.net(sample(3))).exp(), {}
    func.context = context
    plain = func.forward
    func.forward = lambda t, y: plain(t, y) * func.context
    return func, sample(3), {}


SHARED = ["arg", "y0", "y0 through a weight of func", "attribute of the module"]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("gradient", ["aca", "adjoint"])
@pytest.mark.parametrize("case", SHARED)
def test_inputs_that_share_history_with_parameters(case: str, gradient: str, create_graph: bool) -> None:
    if gradient == "adjoint" and create_graph:
        pytest.skip("the adjoint has no second derivatives")
    found = {}
    for kind in (gradient, "direct"):
        func, y0, settings = shared_history(case)
        t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
        y = aca_ext.odeint(func, y0, t, gradient=kind, rtol=1e-9, atol=1e-9, **settings)
        wanted = [*func.encoder.parameters(), *func.net.parameters()]
        loss = y[1:].square().sum()
        found[kind] = torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True)
        if create_graph:
            penalty = sum(g.square().sum() for g in found[kind] if g is not None)
            found[kind] += torch.autograd.grad(penalty, wanted, allow_unused=True)
    for grad, exact in zip(found[gradient], found["direct"], strict=True):
        if exact is None:
            assert grad is None or not grad.any()
        else:
            assert relative_error(grad, exact) <= (1e-6 if gradient == "adjoint" else 1e-11)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_of_every_time_is_analytic(gradient: str, sign: float) -> None:
    k = 0.7 * sign
    t = (sign * torch.tensor([0.5, 0.9, 1.0, 2.0], dtype=torch.float64)).requires_grad_()
    y0 = torch.ones(2, dtype=torch.float64)
    weights = torch.tensor([0.4, -1.0, 2.0, 3.0], dtype=torch.float64)
    y = aca_ext.odeint(lambda t, y: k * y, y0, t, gradient=gradient, rtol=1e-11, atol=1e-12)
    (weights * y[:, 0]).sum().backward()
    exact = weights * k * torch.exp(k * (t.detach() - t.detach()[0]))
    exact[0] = -exact[1:].sum()
    assert relative_error(t.grad, exact) <= 1e-8


@pytest.mark.parametrize("gradient", ["aca", "direct", "naive"])
def test_gradient_of_times_converges(gradient: str) -> None:
    func, y0, args = driven()
    y0 = y0.detach()
    step = 1e-5

    def value(t: Tensor, tolerance: float, kind: str = gradient) -> Tensor:
        return loss_of(aca_ext.odeint(func, y0, t, args=args, gradient=kind, rtol=tolerance, atol=tolerance), [1, 2, 3])

    t = torch.tensor([0.1, 0.4, 0.8, 1.3], dtype=torch.float64)
    with torch.no_grad():
        shifts = step * torch.eye(4, dtype=torch.float64)
        exact = torch.stack([(value(t + s, 1e-13) - value(t - s, 1e-13)) / (2 * step) for s in shifts])
    errors = []
    for tolerance in (1e-3, 1e-6, 1e-10):
        leaf = t.requires_grad_()
        (grad,) = torch.autograd.grad(value(leaf, tolerance), leaf)
        errors.append(relative_error(grad, exact))
    assert errors[1] < errors[0] / 10
    assert errors[2] < 1e-7


@pytest.mark.parametrize("gradient", EXACT)
def test_second_derivatives_of_times(gradient: str) -> None:
    k = 0.7
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    y = aca_ext.odeint(lambda t, y: k * y, y0, t, gradient=gradient, rtol=1e-11, atol=1e-12)
    (first,) = torch.autograd.grad(y[-1].sum(), t, create_graph=True)
    end = math.exp(k)
    assert first.tolist() == pytest.approx([-k * end, 0.0, k * end], rel=1e-8)
    for i, row in ((0, [k * k * end, 0.0, -k * k * end]), (2, [-k * k * end, 0.0, k * k * end])):
        (second,) = torch.autograd.grad(first[i], t, retain_graph=True)
        assert second.tolist() == pytest.approx(row, rel=1e-8)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_times_do_not_change_the_other_gradients(gradient: str) -> None:
    func, y0, args = driven()
    wanted = [y0, *args, *func.parameters()]
    found = []
    for requires_grad in (False, True):
        t = torch.tensor([0.0, 0.3, 1.3], dtype=torch.float64, requires_grad=requires_grad)
        y = aca_ext.odeint(func, y0, t, gradient=gradient, args=args, **LOOSE)
        found.append((y.detach(), torch.autograd.grad(loss_of(y, [0, 1, 2]), wanted)))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert relative_error(one, other) <= 1e-12


def test_float32_times_receive_float32_gradients() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    y = aca_ext.odeint(Mlp(), sample(2, 3), t)
    y[-1].sum().backward()
    assert t.grad is not None
    assert t.grad.dtype == torch.float32
    assert t.grad[0] != 0
    assert t.grad[1] == 0
    assert t.grad[2] != 0


@pytest.mark.parametrize("times", [[0.0, 1.3], [0.0, 1.3, 2.6], [1.3, 0.0]])
@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_forward_evaluations(gradient: str, times: list[float]) -> None:
    func, y0, args = driven()
    for first_step, before_first in ((None, 2), (0.05, 1)):
        options = {} if first_step is None else {"first_step": first_step}
        stats = aca_ext.solve(
            func, y0, torch.tensor(times), args=args, gradient=gradient, options=options, rtol=1e-6, atol=1e-8
        ).stats
        assert stats.n_steps == stats.n_accepted + stats.n_rejected
        assert stats.n_f_evals == before_first + 6 * stats.n_steps


@pytest.mark.parametrize(("times", "most"), [([0.0, 4.0], 6), ([0.0, 0.5, 1.0, 1.1, 2.7, 4.0], 7)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_evaluations(times: list[float], most: int, create_graph: bool) -> None:
    func, y0, args = driven()
    calls = []
    func.register_forward_hook(lambda *_: calls.append(1))
    sol = aca_ext.solve(func, y0, torch.tensor(times), args=args, rtol=1e-6, atol=1e-8)
    assert len(calls) == sol.stats.n_f_evals
    assert sol.stats.n_f_evals_backward is None
    calls.clear()
    torch.autograd.grad(sol.y.sum(), y0, create_graph=create_graph)
    # Two more, since func keeps ``calls``, on which its derivatives might depend.
    assert len(calls) - 2 == sol.stats.n_f_evals_backward
    most = 7 if create_graph else most
    assert 6 * sol.stats.n_accepted <= sol.stats.n_f_evals_backward <= most * sol.stats.n_accepted


def test_backward_skips_the_steps_behind_the_last_output_with_a_cotangent() -> None:
    func, y0, args = driven()
    sol = aca_ext.solve(func, y0, torch.tensor([0.0, 0.1, 4.0]), args=args, rtol=1e-6, atol=1e-8)
    whole = sol.stats.n_accepted
    torch.autograd.grad(sol.y[1].sum(), y0)
    assert sol.stats.n_f_evals_backward is not None
    assert sol.stats.n_f_evals_backward <= 7 * whole


def test_direct_needs_no_evaluation_backward() -> None:
    func, y0, args = driven()
    calls = []
    func.register_forward_hook(lambda *_: calls.append(1))
    y = aca_ext.odeint(func, y0, torch.tensor([0.0, 1.0]), args=args, gradient="direct", **LOOSE)
    calls.clear()
    y.sum().backward()
    assert not calls


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_backward_twice_with_retained_graph(gradient: str) -> None:
    func, y0, args = driven()
    y = aca_ext.odeint(func, y0, torch.tensor([0.0, 0.3, 1.0]), args=args, gradient=gradient, **LOOSE)
    (one,) = torch.autograd.grad(y[-1].sum(), y0, retain_graph=True)
    (other,) = torch.autograd.grad(y[-1].sum(), y0)
    assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y[-1].sum(), y0)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_only_what_requires_grad_receives_one(gradient: str) -> None:
    func, y0, args = driven()
    func.requires_grad_(False)
    y = aca_ext.odeint(func, y0.detach(), torch.tensor([0.0, 1.0]), args=(args[0], args[1].detach()), gradient=gradient)
    y.sum().backward()
    assert args[0].grad is not None
    assert args[1].grad is None
    assert y0.grad is None
    y = aca_ext.odeint(func, y0, torch.tensor([0.0, 1.0]), args=(args[0].detach(), 0.3), gradient=gradient)
    y.sum().backward()
    assert y0.grad is not None


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_no_graph_where_nothing_requires_grad(gradient: str) -> None:
    func, y0, _ = driven()
    func.requires_grad_(False)
    args = (sample(3), 0.2)
    assert not aca_ext.odeint(func, y0.detach(), torch.tensor([0.0, 1.0]), args=args, gradient=gradient).requires_grad
    with torch.no_grad():
        assert not aca_ext.odeint(func, y0, torch.tensor([0.0, 1.0]), args=args, gradient=gradient).requires_grad


def test_inference_mode() -> None:
    func, y0, args = driven()
    t = torch.tensor([0.0, 0.4, 1.0])
    with torch.inference_mode():
        inside = aca_ext.odeint(func, y0, t, args=args, **LOOSE)
    with torch.no_grad():
        assert torch.equal(aca_ext.odeint(func, y0, t, args=args, **LOOSE), inside)


def test_two_solves_in_a_row_share_a_parameter() -> None:
    func = Mlp()
    y0 = sample(2, 3).requires_grad_()
    found = []
    for gradient in ("aca", "direct"):
        t = torch.tensor([0.0, 0.7], dtype=torch.float64)
        y = aca_ext.odeint(func, y0, t, gradient=gradient, **LOOSE)[-1]
        y = aca_ext.odeint(func, torch.tanh(y), t, gradient=gradient, **LOOSE)[-1]
        found.append(torch.autograd.grad(y.square().sum(), [y0, *func.parameters()]))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_a_solve_inside_the_slope_of_another() -> None:
    inner = Mlp()
    found = []
    for gradient in ("aca", "direct"):

        def func(t: Tensor, y: Tensor, gradient: str = gradient) -> Tensor:
            return aca_ext.odeint(inner, y, torch.tensor([0.0, 0.3]), gradient=gradient, options=STEPS)[-1]

        y0 = sample(2, 3).requires_grad_()
        y = aca_ext.odeint(func, y0, torch.tensor([0.0, 0.5]), gradient=gradient, method="bosh3", **LOOSE)
        found.append(torch.autograd.grad(y[-1].square().sum(), [y0, *inner.parameters()]))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}], ids=["together", "independent"])
def test_hooks_between_solves_are_given_tensors(options: dict[str, Any]) -> None:
    """Also with create_graph=True, where the gradient of the second solve does not continue into the first."""
    found = []
    for gradient in ("aca", "direct"):
        w = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
        y = torch.ones(3, 2, dtype=torch.float64)
        for _ in range(2):
            func = lambda t, y, w=w: torch.tanh(w * y)  # noqa: E731
            y = aca_ext.odeint(func, y, [0.0, 1.0], gradient=gradient, options=options)[-1]
            y.register_hook(lambda g: g * 1.0)
        (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        found.append((g, *torch.autograd.grad(g.square().sum(), w)))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-10
