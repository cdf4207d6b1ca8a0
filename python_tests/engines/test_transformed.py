"""Solves inside torch.func: derivatives against reverse mode, vmap against loops over samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import aca_ext
from aca_ext import errors, odeint

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

T = torch.tensor([0.0, 0.3, 0.35, 1.0], dtype=torch.float64)
LOOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "dopri8, direct": {"method": "dopri8", "gradient": "direct"},
    "heun": {"method": "adaptive_heun"},
    "independent": {"options": {"batch": "independent"}},
    "fixed": {"method": "rk4", "options": {"step_size": 0.13}},
    "interpolated": {"method": "bosh3", "options": {"step_size": 0.13, "interp": "cubic"}},
}
NET = Mlp()


def spread(n: int = 4) -> Tensor:
    """States whose solves need different steps."""
    return sample(n, 3) * torch.linspace(0.1, 9, n, dtype=torch.float64)[:, None]


def many(n: int = 3) -> Tensor:
    return torch.stack([spread() * 2.0**i for i in range(n)])


def solver(kind: str, func: Any = NET) -> Callable[[Tensor], Tensor]:
    return lambda y: odeint(func, y, T, **LOOSE | KINDS[kind])


def loop(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return torch.stack([f(*parts) for parts in zip(*inputs, strict=True)]).detach()


@pytest.mark.parametrize("kind", KINDS)
class TestDerivatives:
    def test_first(self, kind: str) -> None:
        solve, y0, v = solver(kind), spread(), sample(4, 3, seed=4)
        jacobian = torch.autograd.functional.jacobian(solve, y0)
        pulled = sample(4, 4, 3, seed=5)
        assert relative_error(jacrev(solve)(y0), jacobian) <= 1e-12
        assert relative_error(jacfwd(solve)(y0), jacobian) <= 1e-12
        value, tangent = jvp(solve, (y0,), (v,))
        assert relative_error(value.detach(), solve(y0).detach()) <= 1e-12
        assert relative_error(tangent.detach(), (jacobian * v).sum((-2, -1))) <= 1e-12
        value, pull_back = vjp(solve, y0)
        assert relative_error(value.detach(), solve(y0).detach()) <= 1e-12
        assert (
            relative_error(pull_back(pulled)[0].detach(), (jacobian * pulled[..., None, None]).sum((0, 1, 2))) <= 1e-12
        )
        assert relative_error(grad(lambda y: solve(y).sum())(y0).detach(), jacobian.sum((0, 1, 2))) <= 1e-12

    def test_vmap_is_a_loop(self, kind: str) -> None:
        solve, ys = solver(kind), many()
        assert relative_error(vmap(solve)(ys).detach(), loop(solve, ys)) <= 1e-12
        assert relative_error(vmap(solve, 1, 2)(ys.movedim(0, 1)).detach().movedim(2, 0), loop(solve, ys)) <= 1e-12
        assert relative_error(vmap(solve, chunk_size=2)(ys).detach(), loop(solve, ys)) <= 1e-12

    def test_vmap_of_grad(self, kind: str) -> None:
        slope = grad(lambda y: solver(kind)(y).square().sum())
        assert relative_error(vmap(slope)(many()).detach(), loop(slope, many())) <= 1e-12

    def test_grad_of_vmap(self, kind: str) -> None:
        ys, solve = many(), solver(kind)
        found = grad(lambda y: vmap(solve)(y).square().sum())(ys)
        assert relative_error(found.detach(), loop(grad(lambda y: solve(y).square().sum()), ys)) <= 1e-12


@pytest.mark.parametrize("kind", ["dopri5", "independent", "fixed"])
def test_hessians(kind: str) -> None:
    def value(y: Tensor) -> Tensor:
        return solver(kind)(y).square().sum()

    expected = torch.autograd.functional.hessian(value, spread(2))
    assert relative_error(hessian(value)(spread(2)).detach(), expected) <= 1e-11
    assert relative_error(jacrev(jacrev(value))(spread(2)).detach(), expected) <= 1e-11
    assert relative_error(jacfwd(jacfwd(value))(spread(2)).detach(), expected) <= 1e-11
    found = vmap(hessian(value))(torch.stack([spread(2), 2 * spread(2)]))
    assert relative_error(found[0].detach(), expected) <= 1e-11


def test_each_sample_has_its_own_steps() -> None:
    rates = torch.tensor([0.1, 5.0, 40.0], dtype=torch.float64)
    stats: list[Any] = []

    def solve(rate: Tensor) -> Tensor:
        solution = aca_ext.solve(lambda t, y: -rate * y, torch.ones(2, dtype=torch.float64), T, **LOOSE)
        stats.append(solution.stats)
        return solution.y

    vmap(solve)(rates)
    (batch,) = stats
    stats.clear()
    loop(solve, rates)
    assert batch.n_accepted.tolist() == [one.n_accepted for one in stats]
    assert batch.n_rejected.tolist() == [one.n_rejected for one in stats]
    assert len(set(batch.n_accepted.tolist())) == 3


class TestClosuresAndArguments:
    """func uses tensors of the transforms that y0 does not show."""

    rates = torch.tensor([0.3, 2.0, 9.0], dtype=torch.float64)
    y0 = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def through_closure(self, rate: Tensor) -> Tensor:
        return odeint(lambda t, y: -rate * y * y, self.y0.abs(), T, **LOOSE)

    def through_args(self, rate: Tensor) -> Tensor:
        return odeint(lambda t, y, rate: -rate * y * y, self.y0.abs(), T, args=(rate,), **LOOSE)

    def seen_late(self, rate: Tensor) -> Tensor:
        """The first evaluation does not use the rate."""
        calls = itertools.count()
        return odeint(lambda t, y: -y * y * (rate if next(calls) else 1.0), self.y0.abs(), T, **LOOSE)

    @pytest.mark.parametrize("way", ["through_closure", "through_args"])
    def test_derivatives(self, way: str) -> None:
        solve = getattr(self, way)
        expected = torch.stack([torch.autograd.functional.jacobian(solve, rate) for rate in self.rates])
        assert relative_error(vmap(jacfwd(solve))(self.rates), expected) <= 1e-12
        assert relative_error(vmap(jacrev(solve))(self.rates), expected) <= 1e-12
        assert relative_error(vmap(solve)(self.rates), loop(solve, self.rates)) <= 1e-12

    def test_a_batch_that_the_first_slope_does_not_show(self) -> None:
        """The solve starts again with samples, instead of taking the steps of one of them."""
        found = vmap(self.seen_late)(self.rates)
        assert found.shape == (3, 4, 2)
        assert relative_error(found[:, -1], self.y0.abs() / (1 + self.rates[:, None] * self.y0.abs())) <= 1e-3

    def test_two_levels_of_which_one_is_in_a_closure(self) -> None:
        scales = torch.tensor([1.0, 3.0], dtype=torch.float64)

        def solve(rate: Tensor, scale: Tensor) -> Tensor:
            return odeint(lambda t, y: -rate * y * y, scale * self.y0.abs(), T, **LOOSE)

        expected = torch.stack([torch.stack([solve(r, s) for s in scales]) for r in self.rates])
        assert relative_error(vmap(lambda r: vmap(lambda s: solve(r, s))(scales))(self.rates), expected) <= 1e-12
        mixed = vmap(lambda r: grad(lambda s: vmap(lambda q: solve(r, s * q))(scales).sum())(scales[0]))(self.rates)
        expected = torch.stack(
            [sum(grad(lambda s, q=q, r=r: solve(r, s * q).sum())(scales[0]) for q in scales) for r in self.rates]
        )
        assert relative_error(mixed, expected) <= 1e-12

    def test_parameters_of_an_ensemble(self) -> None:
        nets = [Mlp(seed=i) for i in range(3)]
        params, buffers = stack_module_state(nets)

        def solve(params: Any, buffers: Any, y: Tensor) -> Tensor:
            return odeint(lambda t, y: functional_call(nets[0], (params, buffers), (t, y)), y, T, **LOOSE)

        ys = many()
        expected = torch.stack([odeint(net, y, T, **LOOSE) for net, y in zip(nets, ys, strict=True)])
        found = vmap(solve)(params, buffers, ys)
        assert relative_error(found.detach(), expected.detach()) <= 1e-12
        grads = vmap(grad(lambda *inputs: solve(*inputs).square().sum()))(params, buffers, ys)
        for i, net in enumerate(nets):
            value = odeint(net, ys[i], T, **LOOSE).square().sum()
            for (name, _), one in zip(
                net.named_parameters(), torch.autograd.grad(value, list(net.parameters())), strict=True
            ):
                assert relative_error(grads[name][i].detach(), one) <= 1e-12

    def test_a_graph_outside_of_the_transform(self) -> None:
        """Parameters of autograd proper receive their gradient through vmap."""
        ys = many()
        found = torch.autograd.grad(vmap(solver("dopri5"))(ys).square().sum(), list(NET.parameters()))
        value = sum(solver("dopri5")(y).square().sum() for y in ys)
        for one, other in zip(found, torch.autograd.grad(value, list(NET.parameters())), strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_a_layer(self) -> None:
        layer = aca_ext.NeuralODE(NET, T, **LOOSE)
        assert relative_error(vmap(layer)(many()).detach(), loop(layer, many())) <= 1e-12
        params = {name: 1.1 * p.detach() for name, p in layer.named_parameters()}
        found = grad(lambda p: functional_call(layer, p, (spread(),)).square().sum())(params)
        for name, p in params.items():
            p.requires_grad_()
            (expected,) = torch.autograd.grad(functional_call(layer, params, (spread(),)).square().sum(), p)
            assert relative_error(found[name].detach(), expected) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}], ids=str)
def test_tuple_and_complex_states(options: dict[str, Any]) -> None:
    def solve(one: Tensor, other: Tensor) -> Any:
        return odeint(
            lambda t, y: (-y[0] * t, 1j * y[1].sum(-1, keepdim=True) * y[1]), (one, other), T, options=options
        )

    ones = torch.complex(many(), many(4)[1:])
    others = torch.complex(sample(3, 4, 2), sample(3, 4, 2, seed=2))
    for found, i in zip(vmap(solve)(ones, others), range(2), strict=True):
        expected = loop(lambda one, other, i=i: solve(one, other)[i], ones, others)
        assert relative_error(torch.view_as_real(found), torch.view_as_real(expected)) <= 1e-12


def test_times_that_decrease_and_times_of_samples() -> None:
    ys = many()
    back = lambda y: odeint(NET, y, T.flip(0), **LOOSE)  # noqa: E731
    assert relative_error(vmap(back)(ys).detach(), loop(back, ys)) <= 1e-12
    times = torch.stack([T, 2 * T, -T, T.flip(0)])
    own = lambda y: odeint(NET, y, times, options={"batch": "independent"}, **LOOSE)  # noqa: E731
    assert relative_error(vmap(own)(ys).detach(), loop(own, ys)) <= 1e-12
    jacobian = torch.autograd.functional.jacobian(own, ys[0])
    assert relative_error(jacfwd(own)(ys[0]).detach(), jacobian) <= 1e-12


def test_what_func_keeps_has_its_derivative() -> None:
    """The evaluations that choose the steps leave nothing behind, so that func computes it again."""

    class Keeping:
        def __init__(self) -> None:
            self.rate: Tensor | None = None
            self.calls = 0

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            if self.rate is None:
                self.rate = y.sum()
            return -self.rate * y

    def value(y: Tensor, **settings: Any) -> Tensor:
        return odeint(Keeping(), y, T, **LOOSE | settings).sum()

    expected = torch.autograd.functional.jacobian(lambda y: value(y, gradient="direct"), spread().abs())
    assert relative_error(grad(value)(spread().abs()), expected) <= 1e-12
    assert relative_error(jacfwd(value)(spread().abs()), expected) <= 1e-12


def test_inference_mode() -> None:
    with torch.inference_mode():
        ys = many()
        assert relative_error(vmap(solver("dopri5"))(ys), loop(solver("dopri5"), ys)) <= 1e-12
        solution = aca_ext.solve(NET, spread(), T, dense=True, **LOOSE)
        assert relative_error(solution(T), solution.y) <= 1e-12
        assert relative_error(aca_ext.replay(NET, solution, spread()), solution.y) <= 1e-12


def test_a_single_time() -> None:
    assert torch.equal(vmap(lambda y: odeint(NET, y, T[:1]))(many()), many()[:, None])


def test_replay_and_steps_of_a_solution_inside_grad() -> None:
    plain = aca_ext.solve(NET, spread(), T, **LOOSE)

    def value(y: Tensor) -> Tensor:
        solution = aca_ext.solve(NET, y, T, **LOOSE)
        assert torch.equal(solution.steps, plain.steps)
        assert (solution.stats.n_accepted, solution.stats.n_rejected) == (
            plain.stats.n_accepted,
            plain.stats.n_rejected,
        )
        return aca_ext.replay(NET, solution, y).sum()

    assert (
        relative_error(grad(value)(spread()).detach(), grad(lambda y: solver("dopri5")(y).sum())(spread()).detach())
        <= 1e-12
    )


class TestErrors:
    def test_a_failing_sample_is_named(self) -> None:
        rates = torch.tensor([1.0, -1.0], dtype=torch.float64)
        with pytest.raises(errors.SolveError, match="sample 1"):
            vmap(lambda r: odeint(lambda t, y: -r * y * y, torch.ones(1, dtype=torch.float64), (0.0, 2.0)))(rates)

    @pytest.mark.parametrize("randomness", ["same", "different", "error"])
    def test_random_numbers(self, randomness: str) -> None:
        def solve(y: Tensor) -> Tensor:
            return odeint(lambda t, y: y * torch.rand(()), y, T)

        with pytest.raises((errors.ArgumentValueError, RuntimeError), match="random"):
            vmap(solve, randomness=randomness)(many())
        with pytest.raises(errors.ArgumentValueError, match="random"):
            grad(lambda y: solve(y).sum())(spread())

    def test_random_numbers_of_a_generator_that_func_holds(self) -> None:
        generator = torch.Generator()

        def func(t: Tensor, y: Tensor) -> Tensor:
            return y * torch.rand((), generator=generator, dtype=y.dtype)

        with pytest.raises(errors.ArgumentValueError, match="random"):
            grad(lambda y: odeint(func, y, T).sum())(spread())

    @pytest.mark.parametrize("later", [False, True])
    def test_random_numbers_of_numpy(self, later: bool) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y * (np.random.rand() if not later or t > 0.5 else 1.0)

        with pytest.raises(errors.ArgumentValueError, match="func draws random numbers from NumPy"):
            grad(lambda y: odeint(func, y, T, rtol=1e-2).sum())(spread())

    def test_a_tensor_that_func_writes_into(self) -> None:
        total = torch.zeros(3, dtype=torch.float64)

        def func(t: Tensor, y: Tensor) -> Tensor:
            total.add_(1.0)
            return -y

        with forward_ad.dual_level(), pytest.raises(errors.ArgumentValueError, match="writes into"):
            odeint(func, forward_ad.make_dual(spread(), spread()), T)

    def test_batch_normalisation_in_training(self) -> None:
        class Slope(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return self.norm(y)

        with pytest.raises(errors.ArgumentValueError, match="BatchNorm1d in training"):
            grad(lambda y: odeint(Slope(), y, T).sum())(spread())

    @pytest.mark.parametrize(
        "settings",
        [
            {"options": {"jump_t": [0.5]}},
            {"options": {"step_t": [0.5]}},
            {"options": {"norm": lambda x: x.abs().max()}},
            {"options": {"on_min_step": "accept"}},
            {"options": {"grid_constructor": lambda f, y, t: t}},
            {"engine": "compiled"},
            {"options": {"batch": "independent", "compact": True}},
            {"method": "kvaerno5"},
            {"checkpoints": 3},
            {"callback": print},
            {"progress": True},
            {"events": [aca_ext.Event(lambda t, y: t - 0.5)]},
            {"output_fn": lambda t, y: y},
        ],
        ids=lambda settings: " ".join(map(str, (*settings, *settings.get("options", ())))),
    )
    def test_what_is_not_available(self, settings: dict[str, Any]) -> None:
        with pytest.raises(errors.ArgumentValueError, match="not available inside a function transform"):
            grad(lambda y: odeint(NET, y, T, **settings).sum())(spread())

    def test_times_and_tolerances_of_a_transform(self) -> None:
        with pytest.raises(errors.ArgumentTypeError, match="t is inside"):
            grad(lambda t: odeint(NET, spread(), t).sum())(T)
        learnt, y0 = T.clone().requires_grad_(), spread()
        with pytest.raises(errors.ArgumentTypeError, match="t requires grad"):
            grad(lambda y: odeint(NET, y, learnt).sum())(spread())
        with pytest.raises(errors.ArgumentTypeError, match="rtol is inside"):
            vmap(lambda r: odeint(NET, y0, T, rtol=r))(torch.tensor([1e-3, 1e-4]))

    def test_constants_made_inside_are_times_and_tolerances(self) -> None:
        def value(y: Tensor) -> Tensor:
            t, rtol = torch.linspace(0, 1, 3, dtype=torch.float64), torch.full((3,), 1e-4, dtype=torch.float64)
            return odeint(NET, y, 2 * t, rtol=rtol, atol=1e-5).sum()

        y0 = spread().requires_grad_()
        assert relative_error(grad(value)(spread()), torch.autograd.grad(value(y0), y0)[0]) <= 1e-12
        with pytest.raises(errors.ArgumentTypeError, match="t is inside"):
            jvp(value, (spread(),), (spread(),))

    def test_a_state_changed_in_place(self) -> None:
        with pytest.raises(errors.SlopeError, match="in place"):
            vmap(lambda y: odeint(lambda t, y: y.mul_(-1), y, T))(many())
        with pytest.raises(errors.SlopeError, match="in place"):
            grad(lambda y: odeint(lambda t, y: y.mul_(-1), y, T).sum())(spread())

    def test_a_slope_of_another_shape(self) -> None:
        with pytest.raises(errors.SlopeError, match="shape"):
            vmap(lambda y: odeint(lambda t, y: y[:1], y, T))(many())
