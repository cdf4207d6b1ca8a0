"""``replay``: the steps of a solve as a function through which every transform and tracer passes."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from autograd_reference import relative_error
from problems import CoupledMlp, Mlp, sample
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import aca_ext
from aca_ext import errors

# Forward mode of PyTorch compiles decompositions by torch.jit, which warns that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

T = torch.tensor([0.0, 0.3, 0.4, 1.0], dtype=torch.float64)
BACK = torch.tensor([1.0, 0.7, -0.2], dtype=torch.float64)
KINDS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "dopri8": {"method": "dopri8"},
    "heun2, no slope to reuse": {"method": "adaptive_heun"},
    "fixed": {"method": "rk4", "options": {"step_size": 0.13}},
    "interpolated": {"method": "bosh3", "options": {"step_size": 0.13, "interp": "cubic"}},
    "jumps": {"options": {"jump_t": [0.35]}},
    "perturbed": {"method": "euler", "options": {"step_size": 0.25, "perturb": True}},
    "independent": {"options": {"batch": "independent"}},
    "independent dopri8": {"method": "dopri8", "options": {"batch": "independent"}},
    "direct": {"gradient": "direct"},
}
LOOSE = {"rtol": 1e-4, "atol": 1e-5}
NET = Mlp()


def solved(y0: Any, t: Tensor = T, func: Any = NET, **settings: Any) -> aca_ext.Solution:
    return aca_ext.solve(func, y0, t, **LOOSE | settings)


def spread(n: int = 4) -> Tensor:
    """A batch whose samples need different numbers of steps."""
    return sample(n, 3) * torch.linspace(0.1, 6, n, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("t", [T, BACK], ids=["forward", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_repeats_values_and_gradients(kind: str, t: Tensor) -> None:
    settings = KINDS[kind]
    if kind == "jumps" and t is BACK:
        settings = {"options": {"jump_t": [0.5]}}
    y0 = spread().requires_grad_()
    solution = solved(y0, t, **settings)
    again = aca_ext.replay(NET, solution, y0)
    assert relative_error(again.detach(), solution.y.detach()) <= 1e-13
    wanted, weight = [y0, *NET.parameters()], sample(*again.shape, seed=5)
    expected = torch.autograd.grad((solution.y * weight).sum(), wanted)
    for one, other in zip(torch.autograd.grad((again * weight).sum(), wanted), expected, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_perturbed_nodes_are_seen() -> None:
    """The case "perturbed" above differs if the times of the stages do."""
    seen: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(t.item())
        return -y

    solution = solved(sample(2), func=func, **KINDS["perturbed"])
    of_solve = list(seen)
    seen.clear()
    aca_ext.replay(func, solution, sample(2))
    assert seen == of_solve[-len(seen) :]
    assert 0.25 not in seen


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}], ids=str)
def test_tuple_and_complex_states(options: dict[str, Any]) -> None:
    def func(t: Tensor, y: Any) -> Any:
        one, two = y
        return -two.sum(-1, keepdim=True) * one, 1j * two * t

    y0 = (torch.complex(spread(), spread()), torch.complex(spread()[:, :2], spread()[:, 1:]))
    solution = solved(y0, func=func, options=options)
    for one, other in zip(aca_ext.replay(func, solution, y0), solution.y, strict=True):
        assert relative_error(torch.view_as_real(one), torch.view_as_real(other)) <= 1e-12


class Pair(NamedTuple):
    matrix: Tensor
    vector: Tensor


def test_a_namedtuple_stays_one() -> None:
    func, y0 = CoupledMlp(), Pair(sample(2, 3), sample(3))
    solution = solved(y0, func=func)
    again = aca_ext.replay(func, solution, y0)
    assert type(again) is Pair
    for one, other in zip(again, solution.y, strict=True):
        assert relative_error(one.detach(), other.detach()) <= 1e-13


def test_other_inputs_take_the_same_steps() -> None:
    solution, calls = solved(spread()), []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t.item())
        return -y * t

    aca_ext.replay(func, solution, sample(7, 2))
    first, n = list(calls), len(calls)
    calls.clear()
    aca_ext.replay(func, solution, 1e3 * sample(1))
    assert calls == first
    assert n == 6 * len(solution.steps)  # the slope at an end is the first of the next step, and the last is not needed


@pytest.mark.parametrize("kind", ["dopri5", "independent", "fixed"])
class TestTransforms:
    """Every transform against reverse mode, one output at a time."""

    @pytest.fixture
    def setting(self, kind: str) -> tuple[Any, Tensor, Tensor]:
        y0 = spread(2)
        solution = solved(y0, **KINDS[kind])

        def end(y: Tensor) -> Tensor:
            return aca_ext.replay(NET, solution, y)[2]

        return end, y0, torch.autograd.functional.jacobian(end, y0)

    def test_first_derivatives(self, setting: Any) -> None:
        end, y0, jacobian = setting
        v = sample(2, 3, seed=4)
        assert relative_error(jacrev(end)(y0), jacobian) <= 1e-12
        assert relative_error(jacfwd(end)(y0), jacobian) <= 1e-12
        assert relative_error(jvp(end, (y0,), (v,))[1], (jacobian * v).sum((2, 3))) <= 1e-12
        assert relative_error(vjp(end, y0)[1](v)[0], (jacobian * v[:, :, None, None]).sum((0, 1))) <= 1e-12
        assert relative_error(grad(lambda y: end(y).sum())(y0), jacobian.sum((0, 1))) <= 1e-12

    def test_second_derivatives(self, setting: Any) -> None:
        end, y0, _ = setting
        expected = torch.autograd.functional.hessian(lambda y: end(y).square().sum(), y0)
        assert relative_error(hessian(lambda y: end(y).square().sum())(y0), expected) <= 1e-11
        assert relative_error(jacrev(jacfwd(lambda y: end(y).square().sum()))(y0), expected) <= 1e-11

    def test_vmap(self, setting: Any) -> None:
        end, y0, _ = setting
        many = y0 + sample(3, 2, 3, seed=7)
        expected = torch.stack([end(y) for y in many])
        assert relative_error(vmap(end)(many), expected) <= 1e-13
        found = vmap(grad(lambda y: end(y).sum()))(many)
        expected = torch.stack([grad(lambda y: end(y).sum())(y) for y in many])
        assert relative_error(found, expected) <= 1e-12


def test_an_ensemble_of_parameters() -> None:
    nets, y0 = [Mlp(seed=i) for i in range(3)], spread()
    solution = solved(y0)
    params, _ = torch.func.stack_module_state(nets)
    found = vmap(lambda p: aca_ext.replay(NET, solution, y0, params=p))(params)
    assert relative_error(found, torch.stack([aca_ext.replay(net, solution, y0) for net in nets])) <= 1e-13


def exponential(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    return -rates * y


class TestFits:
    """y' = -rate·y, whose solution and derivatives are known: y(t; rate, y0) = y0·exp(-rate·t)."""

    rates = torch.tensor([0.6, 1.7], dtype=torch.float64)
    y0 = torch.tensor([2.0, 0.5], dtype=torch.float64)
    t = torch.linspace(0, 2, 9, dtype=torch.float64)

    def model(self) -> Any:
        tight = {"rtol": 1e-11, "atol": 1e-13, "method": "dopri8"}
        solution = aca_ext.solve(exponential, self.y0, self.t, args=(self.rates,), **tight)
        return lambda rates: aca_ext.replay(exponential, solution, self.y0, args=(rates,))

    def test_gauss_newton(self) -> None:
        """Converges to the rates that made the data, with Jacobians by forward mode."""
        truth = torch.tensor([0.7, 1.5], dtype=torch.float64)
        data, rates = self.y0 * torch.exp(-truth * self.t[:, None]), self.rates
        for _ in range(6):
            tight = {"rtol": 1e-11, "atol": 1e-13, "method": "dopri8"}
            solution = aca_ext.solve(exponential, self.y0, self.t, args=(rates,), **tight)

            def residual(rates: Tensor, solution: Any = solution) -> Tensor:
                return (aca_ext.replay(exponential, solution, self.y0, args=(rates,)) - data).reshape(-1)

            jacobian = jacfwd(residual)(rates)
            rates = rates - torch.linalg.lstsq(jacobian, residual(rates)[:, None]).solution[:, 0]
        assert relative_error(rates, truth) <= 1e-9

    def test_laplace(self) -> None:
        """The Hessian of a negative log-likelihood is the precision of the posterior."""
        model, sigma = self.model(), 0.1
        truth = self.y0 * torch.exp(-self.rates * self.t[:, None])
        precision = hessian(lambda rates: ((model(rates) - truth) / sigma).square().sum() / 2)(self.rates)
        slopes = -self.t[:, None] * truth / sigma  # at zero residuals the Hessian is that of Gauss-Newton
        assert relative_error(precision, torch.diag(slopes.square().sum(0))) <= 1e-8

    def test_sensitivities(self) -> None:
        jacobian = jacfwd(self.model())(self.rates)
        expected = torch.diag_embed(-self.t[:, None] * self.y0 * torch.exp(-self.rates * self.t[:, None]))
        assert relative_error(jacobian, expected) <= 1e-9


class Replayed(nn.Module):
    def __init__(self, solution: aca_ext.Solution) -> None:
        super().__init__()
        self.func, self.solution = NET, solution

    def forward(self, y: Tensor) -> Tensor:
        return aca_ext.replay(self.func, self.solution, y)


class TestTracers:
    @pytest.mark.filterwarnings("default")
    @pytest.mark.parametrize("kind", ["dopri5", "dopri8", "interpolated"])
    def test_compile_to_one_graph(self, kind: str) -> None:
        one, other = solved(spread(), **KINDS[kind]), solved(spread(), BACK, **KINDS[kind])
        compiled = torch.compile(lambda y, s: aca_ext.replay(NET, s, y), backend="eager", fullgraph=True)
        for solution in (one, other, one):  # the steps of a solution are constants; another one is compiled again
            y0 = spread().requires_grad_()
            y = compiled(y0, solution)
            assert relative_error(y.detach(), solution.y.detach()) <= 1e-13
            found = torch.autograd.grad(y.sum(), y0)[0]
            y0 = spread().requires_grad_()
            expected = torch.autograd.grad(aca_ext.replay(NET, solution, y0).sum(), y0)[0]
            assert relative_error(found, expected) <= 1e-13

    @pytest.mark.filterwarnings("default")
    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, strict: bool) -> None:
        solution = solved(spread())
        exported = torch.export.export(Replayed(solution), (spread(),), strict=strict).module()
        other = spread() + 1
        expected = aca_ext.replay(NET, solution, other)
        assert relative_error(exported(other).detach(), expected.detach()) <= 1e-13


@pytest.mark.parametrize("engine", ["compiled"])
@pytest.mark.parametrize("options", [{}, {"batch": "independent"}], ids=str)
def test_solutions_of_other_engines(engine: str, options: dict[str, Any]) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y * y.abs() * torch.cos(3 * t)

    y0 = spread()
    solution = solved(y0, func=func, engine=engine, options=options)
    assert relative_error(aca_ext.replay(func, solution, y0), solution.y) <= 1e-12
    loaded = pickle.loads(pickle.dumps(solution))
    assert relative_error(aca_ext.replay(func, loaded, y0), solution.y) <= 1e-12


@pytest.mark.parametrize("kind", ["dopri5", "independent"])
def test_a_pickled_solution(kind: str) -> None:
    solution = solved(spread(), **KINDS[kind])
    loaded = pickle.loads(
        pickle.dumps(
            aca_ext.Solution(solution.t, solution.y.detach(), solution.steps, solution.stats, plan=solution.plan)
        )
    )
    assert torch.equal(aca_ext.replay(NET, loaded, spread()), aca_ext.replay(NET, solution, spread()))


def test_a_resumed_solution() -> None:
    y0 = spread()
    solution = solved(y0, options={"max_num_steps": 3, "on_step_limit": "stop", "jump_t": [0.35]})
    while not solution.is_complete:
        assert relative_error(aca_ext.replay(NET, solution, y0).detach(), solution.y.detach()) <= 1e-13
        solution = solution.resume()
    solution = solution.resume([1.3])
    assert len(solution.y) == len(T) + 1
    assert relative_error(aca_ext.replay(NET, solution, y0).detach(), solution.y.detach()) <= 1e-13


class TestEvents:
    def test_that_end_the_solve(self) -> None:
        y0 = sample(2)
        event = aca_ext.Event(lambda t, y: t - 0.35, terminal=True)
        solution = solved(y0, func=lambda t, y: -y, events=[event])
        again = aca_ext.replay(lambda t, y: -y, solution, y0)
        assert len(again) == 2
        assert relative_error(again, solution.y) <= 1e-13

    def test_resets_are_refused(self) -> None:
        event = aca_ext.Event(lambda t, y: t - 0.35, reset=lambda t, y: 2 * y)
        solution = solved(sample(2), func=lambda t, y: -y, events=[event])
        with pytest.raises(errors.ArgumentValueError, match="reset"):
            aca_ext.replay(lambda t, y: -y, solution, sample(2))


class TestRefusals:
    @pytest.mark.parametrize("option", ["step_t", "jump_t"])
    def test_stops_of_independent_samples(self, option: str) -> None:
        func = lambda t, y: -y * t  # noqa: E731
        options = {"batch": "independent", option: [0.5]}
        solution = solved(spread(), func=func, options=options, engine="compiled")
        with pytest.raises(errors.ArgumentValueError, match="jump_t"):
            aca_ext.replay(func, solution, spread())

    def test_methods_that_are_not_explicit(self) -> None:
        for method in ("kvaerno5", "fixed_adams"):
            options = {"step_size": 0.1} if method == "fixed_adams" else {}
            solution = solved(spread(), method=method, options=options)
            with pytest.raises(errors.ArgumentValueError, match="implicit or multistep"):
                aca_ext.replay(NET, solution, spread())

    def test_random_numbers(self) -> None:
        func = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).double()
        slope = lambda t, y: func(y)  # noqa: E731
        solution = solved(spread(), func=slope)
        with pytest.raises(errors.ArgumentValueError, match="random"):
            aca_ext.replay(slope, solution, spread())
        func.eval()
        solution = solved(spread(), func=slope)
        func.train()
        with pytest.raises(errors.ArgumentValueError, match="random"):
            aca_ext.replay(slope, solution, spread())

    @pytest.mark.parametrize("source", ["numpy", "numpy later", "python", "generator", "held method", "state"])
    def test_random_numbers_from_elsewhere(self, source: str) -> None:
        generator, draw_one, old = np.random.default_rng(0), random.Random(0).random, np.random.RandomState(0)
        draw: dict[str, Callable[[Tensor], float]] = {
            "numpy": lambda t: np.random.rand(),
            "numpy later": lambda t: np.random.rand() if t > 0.5 else 0.0,
            "python": lambda t: random.random(),
            "generator": lambda t: generator.random(),
            "held method": lambda t: draw_one(),
            "state": lambda t: old.rand(),
        }

        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y * (1 + draw[source](t))

        solution = solved(spread(), func=func, options={"step_size": 0.25})
        with pytest.raises(errors.ArgumentValueError, match="func draws random numbers from NumPy"):
            aca_ext.replay(func, solution, spread())

    @pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")
    def test_batch_normalisation_in_training(self) -> None:
        class Slope(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return self.norm(y)

        func = Slope()
        solution = solved(spread(), func=func)
        with pytest.raises(errors.ArgumentValueError, match="BatchNorm1d in training"):
            aca_ext.replay(func, solution, spread())

    def test_a_state_changed_in_place(self) -> None:
        solution = solved(spread())
        with pytest.raises(errors.SlopeError, match="in place"):
            aca_ext.replay(lambda t, y: y.mul_(2), solution, spread())
        with pytest.raises(errors.SlopeError, match="in place"):
            vmap(lambda y: aca_ext.replay(lambda t, y: y.mul_(2), solution, y))(spread())

    def test_arguments(self) -> None:
        solution, rows = solved(spread()), solved(spread(), options={"batch": "independent"})
        cases: list[tuple[type[Exception], str, Any]] = [
            (errors.ArgumentTypeError, "give a callable", lambda: aca_ext.replay(1, solution, spread())),
            (errors.ArgumentTypeError, "give the Solution", lambda: aca_ext.replay(NET, spread(), spread())),
            (errors.ArgumentTypeError, "Convert y0", lambda: aca_ext.replay(NET, solution, spread().float())),
            (errors.ArgumentValueError, "batch of 4", lambda: aca_ext.replay(NET, rows, spread(3))),
            (errors.ArgumentTypeError, "dict", lambda: aca_ext.replay(NET, solution, spread(), params=[1])),
            (
                errors.ArgumentTypeError,
                "nn.Module",
                lambda: aca_ext.replay(lambda t, y: y, solution, spread(), params={"a": sample(1)}),
            ),
            (
                errors.ArgumentValueError,
                "does not have",
                lambda: aca_ext.replay(NET, solution, spread(), params={"a": sample(1)}),
            ),
            (errors.SlopeError, "shape", lambda: aca_ext.replay(lambda t, y: y[0], solution, spread())),
        ]
        for error, match, call in cases:
            with pytest.raises(error, match=match):
                call()


def test_params_of_a_module() -> None:
    other, solution = Mlp(seed=3), solved(spread())
    found = aca_ext.replay(NET, solution, spread(), params=dict(other.named_parameters()))
    expected = functional_call(Replayed(solution), {f"func.{n}": p for n, p in other.named_parameters()}, (spread(),))
    assert torch.equal(found, expected)
    assert torch.equal(found, aca_ext.replay(other, solution, spread()))


@pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")
def test_refuses_to_train_a_batch_normalisation_that_a_function_holds() -> None:
    norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return norm(y)

    y0 = sample(4, 3)
    solution = aca_ext.solve(func, y0, [0.0, 1.0], method="rk4", options={"step_size": 0.5})
    before = norm.state_dict()["running_mean"].clone()
    with pytest.raises(errors.ArgumentValueError, match="BatchNorm1d in training mode"):
        aca_ext.replay(func, solution, y0)
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]
