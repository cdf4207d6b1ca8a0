"""Batches of independent problems: every sample against a solve of that sample alone, gradients against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from autograd_reference import relative_error, solve_over
from problems import DrivenMlp, Mlp, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors

ADAPTIVE = [name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive]
INDEPENDENT = {"batch": "independent"}
COUNTS = ("n_steps", "n_accepted", "n_rejected")
T = torch.tensor([0.0, 0.3, 0.31, 1.0, 3.0], dtype=torch.float64)


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y[:, :1], y[:, 1:]
    return torch.cat([v, mu * (1 - x * x) * v - x], 1)


def oscillators(count: int, stiffest: float) -> tuple[Tensor, Tensor]:
    mu = torch.logspace(0, math.log10(stiffest), count, dtype=torch.float64).view(-1, 1).requires_grad_()
    return torch.tensor([2.0, 0.0], dtype=torch.float64).repeat(count, 1).requires_grad_(), mu


def as_alone(func: Any, y0: Tensor, t: Tensor, args: tuple[Tensor, ...] = (), **call: Any) -> list[aca_ext.Solution]:
    """Solutions of every sample as a batch of one, with its own rows of ``args``."""
    times = t if t.dim() == 2 else t.expand(len(y0), -1)
    return [
        aca_ext.solve(func, y0[i : i + 1], times[i], args=tuple(a[i : i + 1] for a in args), **call)
        for i in range(len(y0))
    ]


def check_against_alone(together: aca_ext.Solution, alone: list[aca_ext.Solution]) -> None:
    for i, one in enumerate(alone):
        assert torch.equal(together.steps[i], one.steps)
        assert relative_error(together.y[:, i], one.y[:, 0]) <= 1e-13  # outputs inside steps round differently
        for count in COUNTS:
            assert getattr(together.stats, count)[i] == getattr(one.stats, count)


class TestSteps:
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_are_those_of_each_sample_alone(self, method: str) -> None:
        y0, mu = oscillators(5, 20.0)
        call = {"method": method, "rtol": 1e-3, "atol": 1e-3}
        with torch.no_grad():
            together = aca_ext.solve(van_der_pol, y0, T, args=(mu,), options=INDEPENDENT, **call)
            check_against_alone(together, as_alone(van_der_pol, y0, T, (mu,), **call))

    def test_van_der_pol_with_stiffness_1_to_100(self) -> None:
        y0, mu = oscillators(12, 100.0)
        call = {"rtol": 1e-5, "atol": 1e-6}
        with torch.no_grad():
            together = aca_ext.solve(van_der_pol, y0, T, args=(mu,), options=INDEPENDENT, **call)
            alone = as_alone(van_der_pol, y0, T, (mu,), **call)
            common = aca_ext.solve(van_der_pol, y0, T, args=(mu,), **call)
        check_against_alone(together, alone)
        stats = together.stats
        assert stats.n_steps.max() > 10 * stats.n_steps.min()
        assert (stats.n_steps == stats.n_accepted + stats.n_rejected).all()
        # Two evaluations for the first slope and step, then six per step: as many as the stiffest sample takes alone.
        assert stats.n_f_evals == 2 + 6 * stats.n_steps.max().item()
        assert stats.n_f_rows == stats.n_f_evals * 12
        assert common.stats.n_accepted > stats.n_accepted.min()

    @pytest.mark.parametrize(
        "options",
        [{"first_step": 0.5}, {"max_step": 0.05}, {"min_step": 1e-4}, {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.4},
         {"pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.1}],
    )  # fmt: skip
    def test_options(self, options: dict[str, float]) -> None:
        y0, mu = oscillators(4, 10.0)
        call = {"rtol": 1e-4, "atol": 1e-4}
        with torch.no_grad():
            together = aca_ext.solve(van_der_pol, y0, T, args=(mu,), options=INDEPENDENT | options, **call)
            check_against_alone(together, as_alone(van_der_pol, y0, T, (mu,), options=options, **call))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
    @pytest.mark.parametrize("shape", [(3,), (3, 1), (4, 2, 3), (1, 5), (0, 2), (2, 0)])
    def test_shapes_and_dtypes(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        y0 = (sample(*shape) + 1).to(dtype)
        rates = torch.linspace(0.1, 3.0, max(1, shape[0]))[: shape[0]].view(-1, *(1,) * (len(shape) - 1))

        def func(t: Tensor, y: Tensor) -> Tensor:
            assert t.shape == (shape[0], *(1,) * (len(shape) - 1))
            assert t.dtype == (y.real.dtype if y.is_complex() else y.dtype)
            assert y.shape == shape
            return -y * rates.to(t) * (1 + t)

        t = torch.tensor([0.0, 0.5, 2.0])
        y = aca_ext.odeint(func, y0, t, rtol=1e-5, atol=1e-6, options=INDEPENDENT)
        assert y.shape == (3, *shape)
        assert y.dtype == dtype
        exact = y0 * torch.exp(-rates * 4.0)
        torch.testing.assert_close(y[-1], exact.to(dtype), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_runs_without_kernels(self, dtype: torch.dtype) -> None:
        sol = aca_ext.solve(lambda t, y: -y, torch.ones(3, 2, dtype=dtype), [0.0, 1.0], rtol=0.05, atol=0.05,
                            options=INDEPENDENT)  # fmt: skip
        assert sol.stats.backend == "reference"
        assert (sol.y[-1] - math.exp(-1)).abs().max() < 0.05

    @pytest.mark.parametrize("make",
                             [lambda: sample(3, 4).T, lambda: sample(8, 3)[::2], lambda: sample(1, 3).expand(4, 3),
                              lambda: sample(4, 2, 5, 3).to(memory_format=torch.channels_last)])  # fmt: skip
    def test_layouts(self, make: Any) -> None:
        y0 = make()

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(y + t)

        together = aca_ext.solve(func, y0, T, rtol=1e-5, atol=1e-5, options=INDEPENDENT)
        for i, one in enumerate(as_alone(func, y0.contiguous(), T, rtol=1e-5, atol=1e-5)):
            torch.testing.assert_close(together.y[:, i], one.y[:, 0], rtol=1e-12, atol=1e-12)

    def test_batch_of_one_time(self) -> None:
        y0 = sample(3, 2)
        sol = aca_ext.solve(lambda t, y: y, y0, [0.0], options=INDEPENDENT)
        assert torch.equal(sol.y[0], y0)
        assert [len(steps) for steps in sol.steps] == [0, 0, 0]

    def test_times_of_every_sample(self) -> None:
        y0, mu = oscillators(3, 5.0)
        t = torch.tensor([[0.0, 0.5, 1.0], [2.0, 1.9, -0.5], [1.0, 1.1, 1.2]], dtype=torch.float64)

        def func(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
            return van_der_pol(t, y, mu) * torch.cos(t)

        with torch.no_grad():
            together = aca_ext.solve(func, y0, t, args=(mu,), rtol=1e-5, atol=1e-5, options=INDEPENDENT)
            check_against_alone(together, as_alone(func, y0, t, (mu,), rtol=1e-5, atol=1e-5))
        assert together.y.shape == (3, 3, 2)

    def test_tuple_state(self) -> None:
        y0 = (sample(4, 3), sample(4, seed=1), sample(4, 2, 2, seed=2))
        rates = torch.linspace(0.5, 8.0, 4, dtype=torch.float64)

        def func(t: Tensor, y: tuple[Tensor, ...], rates: Tensor) -> tuple[Tensor, ...]:
            assert t.shape == (len(rates), 1, 1)
            a, b, c = y
            return -rates[:, None] * a * b[:, None], torch.sin(b) * rates - a.mean(1), torch.sin(c) * torch.cos(t)

        call = {"rtol": (1e-5, 1e-4, 1e-3), "atol": 1e-6}
        together = aca_ext.solve(func, y0, T, args=(rates,), options=INDEPENDENT, **call)
        for i in range(4):
            part = tuple(x[i : i + 1] for x in y0)

            def alone(t: Tensor, y: tuple[Tensor, ...], i: int = i) -> tuple[Tensor, ...]:
                return func(t.view(1, 1, 1), y, rates[i : i + 1])

            one = aca_ext.solve(alone, part, T, **call)
            assert torch.equal(one.steps, together.steps[i])
            for x, x_one in zip(together.y, one.y, strict=True):
                torch.testing.assert_close(x[:, i], x_one[:, 0], rtol=1e-13, atol=1e-13)

    def test_tolerances_by_element(self) -> None:
        y0, mu = oscillators(3, 5.0)
        rtol = torch.tensor([[1e-3], [1e-5], [1e-7]], dtype=torch.float64)
        with torch.no_grad():
            together = aca_ext.solve(van_der_pol, y0, T, args=(mu,), rtol=rtol, atol=1e-6, options=INDEPENDENT)
            for i in range(3):
                one = aca_ext.solve(
                    van_der_pol, y0[i : i + 1], T, args=(mu[i : i + 1],), rtol=rtol[i : i + 1], atol=1e-6
                )
                assert torch.equal(together.steps[i], one.steps)

    def test_a_layer(self) -> None:
        layer = aca_ext.NeuralODE(Mlp(), options=INDEPENDENT)
        y0 = sample(5, 3)
        assert layer(y0).shape == (5, 3)
        assert layer.stats.n_steps.shape == (5,)


def weighted(y: Tensor, rows: slice = slice(None)) -> Tensor:
    return (y * sample(*y.shape, seed=3))[rows].sum()


class TestGradients:
    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_against_autograd_over_the_steps_of_each_sample(self, method: str, gradient: str) -> None:
        func = DrivenMlp()
        y0 = (sample(4, 3) * 2).requires_grad_()
        drive = sample(4, 3, seed=1).requires_grad_()
        rate = torch.tensor([[0.1], [1.0], [4.0], [9.0]], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([[0.0, 0.31, 0.32, 1.3], [0.0, 1.0, 1.1, 1.9], [1.0, 0.9, 0.5, 0.2], [2.0, 2.1, 2.2, 2.3]],
                         dtype=torch.float64)  # fmt: skip
        call = {"method": method, "rtol": 1e-3, "atol": 1e-4}
        sol = aca_ext.solve(func, y0, t, args=(drive, rate), gradient=gradient, options=INDEPENDENT, **call)
        wanted = [y0, drive, rate, *func.parameters()]
        truth = torch.cat(
            [
                solve_over(func, y0[i : i + 1], t[i].tolist(), sol.steps[i].tolist(), method,
                           (drive[i : i + 1], rate[i : i + 1]))
                for i in range(4)
            ],
            1,
        )  # fmt: skip
        assert relative_error(sol.y, truth) <= 1e-13
        found, expected = (torch.autograd.grad(weighted(y), wanted) for y in (sol.y, truth))
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) <= 1e-12
        assert len({len(steps) for steps in sol.steps}) > 1

    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    def test_are_those_of_each_sample_alone(self, gradient: str) -> None:
        y0, mu = oscillators(6, 100.0)
        call = {"rtol": 1e-5, "atol": 1e-6, "gradient": gradient}
        together = aca_ext.solve(van_der_pol, y0, T, args=(mu,), options=INDEPENDENT, **call)
        one_by_one = torch.cat([one.y for one in as_alone(van_der_pol, y0, T, (mu,), **call)], 1)
        found, expected = (torch.autograd.grad(weighted(y), [y0, mu]) for y in (together.y, one_by_one))
        for grad, exact in zip(found, expected, strict=True):
            for i in range(6):  # per sample, since their gradients differ by orders of magnitude
                assert relative_error(grad[i], exact[i]) <= 1e-12

    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    @pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2), slice(3, 5)])
    def test_of_losses_at_some_times(self, rows: slice, gradient: str) -> None:
        func, y0 = Mlp(), sample(3, 3).requires_grad_()
        sol = aca_ext.solve(func, y0, T, rtol=1e-4, atol=1e-4, gradient=gradient, options=INDEPENDENT)
        truth = torch.cat([solve_over(func, y0[i : i + 1], T.tolist(), sol.steps[i].tolist(), "dopri5")
                           for i in range(3)], 1)  # fmt: skip
        wanted = [y0, *func.parameters()]
        found, expected = (torch.autograd.grad(weighted(y, rows), wanted, allow_unused=True) for y in (sol.y, truth))
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, torch.zeros_like(grad) if exact is None else exact) <= 1e-12

    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    def test_second_derivatives(self, gradient: str) -> None:
        func, y0 = Mlp(), (sample(3, 3) * torch.tensor([[1.0], [3.0], [9.0]])).requires_grad_()
        wanted = [y0, *func.parameters()]
        sol = aca_ext.solve(func, y0, T, rtol=1e-3, atol=1e-3, gradient=gradient, options=INDEPENDENT)
        truth = torch.cat([solve_over(func, y0[i : i + 1], T.tolist(), sol.steps[i].tolist(), "dopri5")
                           for i in range(3)], 1)  # fmt: skip

        def second(y: Tensor) -> list[Tensor | None]:
            first = torch.autograd.grad(weighted(y.tanh()), wanted, create_graph=True)
            return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)]

        for grad, exact in zip(second(sol.y), second(truth), strict=True):
            assert exact is not None
            assert relative_error(grad, exact) <= 1e-11

    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    @pytest.mark.parametrize("each", [False, True], ids=["common times", "times of each"])
    def test_of_times(self, each: bool, gradient: str) -> None:
        rates = torch.tensor([[0.3], [-0.6]], dtype=torch.float64)
        t = torch.tensor([[0.5, 0.9, 2.0], [1.0, 0.2, 0.1]], dtype=torch.float64)
        t = (t if each else t[0]).clone().requires_grad_()
        y0 = torch.ones(2, 1, dtype=torch.float64)
        y = aca_ext.odeint(
            lambda t, y: rates * y, y0, t, gradient=gradient, rtol=1e-11, atol=1e-12, options=INDEPENDENT
        )
        (grad,) = torch.autograd.grad(weighted(y), t)
        u = t.detach().clone().requires_grad_()
        exact = torch.exp(rates * ((u if each else u.expand(2, 3)) - (u[:, :1] if each else u[:1])))
        (expected,) = torch.autograd.grad(weighted(exact.T.unsqueeze(-1)), u)
        assert relative_error(grad, expected) <= 1e-8

    def test_of_a_tuple_state_and_a_closure(self) -> None:
        net = Mlp()
        y0 = (sample(3, 3).requires_grad_(), sample(3, 1, seed=1).requires_grad_())
        found = []
        for gradient in ("aca", "direct"):
            ys = aca_ext.odeint(lambda t, y: (net(t, y[0]) * y[1], -y[1] * t), y0, T, rtol=1e-4, atol=1e-4,
                                gradient=gradient, options=INDEPENDENT)  # fmt: skip
            found.append(torch.autograd.grad(weighted(ys[0]) + weighted(ys[1]), [*y0, *net.parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_a_retained_graph_and_what_is_edited(self) -> None:
        y0 = sample(3, 3).requires_grad_()
        start = y0 * 1.0
        sol = aca_ext.solve(Mlp(), start, T, rtol=1e-4, atol=1e-4, options=INDEPENDENT)
        one = torch.autograd.grad(weighted(sol.y), y0, retain_graph=True)[0]
        sol.y.detach().zero_()
        assert torch.equal(one, torch.autograd.grad(weighted(sol.y), y0)[0])

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_of_a_named_tensor_reach_it_through_what_was_made_of_it_before(self, create_graph: bool) -> None:
        leaf, y0 = sample(3).requires_grad_(), sample(4, 3)
        found: list[Tensor] = []
        for gradient in ("aca", "direct"):
            named = 2 * leaf
            rate = named.exp()
            settings: dict[str, Any] = {"gradient": gradient, "options": INDEPENDENT}
            y = aca_ext.odeint(lambda t, y, r=rate, w=named: w - r * y, y0, T, params=[named], **settings)
            found += torch.autograd.grad(y[-1].square().sum(), named, create_graph=create_graph)
            if create_graph:
                found += torch.autograd.grad(found[-1].square().sum(), leaf)
        half = len(found) // 2
        for one, other in zip(found[:half], found[half:], strict=True):
            assert relative_error(one, other) <= 1e-12

    @pytest.mark.parametrize("gradient", ["naive", "adjoint"])
    def test_other_gradients_are_refused(self, gradient: str) -> None:
        with pytest.raises(errors.ArgumentValueError, match="one of aca, direct"):
            aca_ext.odeint(Mlp(), sample(2, 3), T, gradient=gradient, options=INDEPENDENT)

    def test_checkpoints_are_refused(self) -> None:
        with pytest.raises(errors.ArgumentValueError, match="keeps every state"):
            aca_ext.odeint(Mlp(), sample(2, 3), T, checkpoints=3, options=INDEPENDENT)


class TestRefusals:
    @pytest.mark.parametrize("has_graph", [True, False])
    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    @pytest.mark.parametrize("is_learnt", [True, False])
    def test_samples_that_depend_on_one_another(self, gradient: str, is_learnt: bool, has_graph: bool) -> None:
        layer, y0 = nn.Linear(3, 3).double(), sample(4, 3).requires_grad_(is_learnt)
        with torch.set_grad_enabled(has_graph), pytest.raises(errors.ArgumentValueError, match="depend on one another"):
            aca_ext.odeint(lambda t, y: layer(y) + y.mean(0), y0, T, gradient=gradient, options=INDEPENDENT)

    def test_a_func_without_a_derivative_is_not_refused(self) -> None:
        class Halved(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, y: Tensor) -> Tensor:
                return -y / 2

        y = aca_ext.odeint(lambda t, y: Halved.apply(y), sample(4, 3), T, options=INDEPENDENT)
        torch.testing.assert_close(y[-1], sample(4, 3) * math.exp(-1.5), rtol=1e-5, atol=1e-7)

    def test_the_look_at_dependences_has_no_side_effects(self) -> None:
        func, y0 = Mlp(), sample(4, 3)
        for gradient in ("aca", "direct"):
            found = aca_ext.solve(func, y0, T, gradient=gradient, options=INDEPENDENT)
            with torch.no_grad():
                other = aca_ext.solve(func, y0, T, options=INDEPENDENT)
            assert not other.y.requires_grad
            assert torch.equal(found.y, other.y)

    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    def test_the_look_at_dependences_calls_no_hook_of_the_initial_state(self, gradient: str) -> None:
        seen: list[Tensor] = []
        y0 = sample(4, 3).requires_grad_()
        y0.register_hook(seen.append)
        y = aca_ext.odeint(Mlp(), y0, T, gradient=gradient, options=INDEPENDENT)
        assert not seen
        y[-1].sum().backward()
        assert len(seen) == 1
        assert torch.equal(seen[0], y0.grad)

    @pytest.mark.parametrize("has_graph", [True, False])
    def test_samples_that_come_to_depend_on_one_another(self, has_graph: bool) -> None:
        gate, y0 = nn.Parameter(torch.zeros(())), sample(4, 3)
        with torch.set_grad_enabled(has_graph):
            aca_ext.odeint(gated := lambda t, y: -y + gate * y.mean(0), y0, T, options=INDEPENDENT)
            with torch.no_grad():
                gate.fill_(0.1)
            with pytest.raises(errors.ArgumentValueError, match="depend on one another"):
                aca_ext.odeint(gated, y0, T, options=INDEPENDENT)

    @pytest.mark.parametrize(
        ("settings", "error", "match"),
        [
            ({"options": {"batch": "own"}}, errors.OptionError, '"independent"'),
            ({"options": INDEPENDENT | {"norm": torch.max}}, errors.OptionError, "norm is not available"),
            ({"options": INDEPENDENT | {"step_t": [0.5]}}, errors.OptionError, "engine=\"compiled\""),
            ({"options": INDEPENDENT | {"jump_t": [0.5]}}, errors.OptionError, "engine=\"compiled\""),
            ({"options": INDEPENDENT | {"frist_step": 1}}, errors.UnknownNameError, "first_step"),
            ({"options": INDEPENDENT, "method": "rk4"}, errors.UnknownNameError, "batch"),
            ({"options": INDEPENDENT | {"step_size": 0.1}}, errors.UnknownNameError, "batch"),
            ({"options": INDEPENDENT, "y0": torch.ones(())}, errors.ArgumentValueError, "first dimension"),
            ({"options": INDEPENDENT, "y0": torch.ones(()) * 1j}, errors.ArgumentValueError, "first dimension"),
            ({"options": INDEPENDENT, "y0": (torch.ones(2), torch.ones(3))}, errors.ArgumentValueError, "are equal"),
            ({"options": INDEPENDENT, "t": torch.zeros(3, 2)}, errors.TimeError, "not repeat|t\\[0\\]"),
            ({"options": INDEPENDENT, "t": torch.tensor([[0.0, 1.0]])}, errors.TimeError, "batch of 2"),
            ({"options": INDEPENDENT, "t": torch.tensor([[0.0, 1.0, 2.0], [0, 2, 1]])}, errors.TimeError, r"t\[1\]"),
            ({"options": INDEPENDENT, "t": torch.tensor([[0.0, 1.0], [math.nan, 1.0]])}, errors.TimeError, r"t\[1\]"),
            ({"options": INDEPENDENT, "t": torch.zeros(0, 2)}, errors.TimeError, "for all samples"),
            ({"options": INDEPENDENT, "t": "now"}, errors.TimeError, "type str"),
            ({"t": torch.tensor([[0.0, 1.0], [0.0, 2.0]])}, errors.TimeError, "independent"),
        ],
    )  # fmt: skip
    def test_arguments(self, settings: dict[str, Any], error: type[Exception], match: str) -> None:
        call = {"y0": torch.ones(2, 3), "t": [0.0, 1.0]} | settings
        with pytest.raises(error, match=match):
            aca_ext.odeint(lambda t, y: y, call.pop("y0"), call.pop("t"), **call)

    @pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")
    def test_batch_normalisation(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        y0 = sample(4, 3)
        for gradient in ("aca", "direct"):
            with pytest.raises(errors.ArgumentValueError, match=r"module\.eval"):
                aca_ext.odeint(lambda t, y: net(y), y0, T, gradient=gradient, options=INDEPENDENT)
        net.eval()
        assert aca_ext.odeint(lambda t, y: net(y), y0, T, options=INDEPENDENT).requires_grad

    def test_random_numbers(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y * (1 + 1e-9 * torch.rand_like(y))

        y0 = sample(4, 3).requires_grad_()
        with pytest.raises(errors.ArgumentValueError, match="random numbers"):
            aca_ext.odeint(func, y0, T, options=INDEPENDENT, rtol=1e-3)
        assert aca_ext.odeint(func, y0, T, options=INDEPENDENT, rtol=1e-3, gradient="direct").requires_grad


class TestFailures:
    def test_the_step_limit_names_the_sample(self) -> None:
        y0, mu = oscillators(4, 50.0)
        with pytest.raises(errors.StepLimitError, match=r"sample 1 \(and 2 more\) .*50 trial steps") as caught:
            aca_ext.odeint(van_der_pol, y0, T, args=(mu,), options=INDEPENDENT | {"max_num_steps": 50})
        assert caught.value.sample == 1
        assert caught.value.n_accepted + caught.value.n_rejected == 50

    def test_a_blow_up_names_the_sample(self) -> None:
        y0 = torch.tensor([[0.1], [3.0], [2.0]], dtype=torch.float64)  # y' = y² blows up at 1 / y0
        with pytest.raises(errors.SolveError, match="sample 1") as caught:
            aca_ext.odeint(lambda t, y: y * y, y0, [0.0, 0.4], options=INDEPENDENT, rtol=1e-6, atol=1e-6)
        assert caught.value.t == pytest.approx(1 / 3, rel=1e-3)

    def test_nan_names_the_sample(self) -> None:
        y0 = torch.tensor([[1.0], [math.nan], [2.0]])
        with pytest.raises(errors.NonFiniteError, match=r"sample 1 .*y0 holds NaN"):
            aca_ext.odeint(lambda t, y: -y, y0, [0.0, 1.0], options=INDEPENDENT)
        with pytest.raises(errors.NonFiniteError, match=r"sample 2 .*func returned NaN"):
            aca_ext.odeint(lambda t, y: torch.where(y == 2, math.nan, -y), y0.nan_to_num(), [0.0, 1.0],
                           options=INDEPENDENT)  # fmt: skip

    def test_a_zero_tolerance_names_the_sample(self) -> None:
        rtol = torch.tensor([[1e-4], [0.0]], dtype=torch.float64)
        y0 = torch.ones(2, 1, dtype=torch.float64)
        with pytest.raises(errors.StepSizeError, match=r"sample 1 .*both zero"):
            aca_ext.odeint(lambda t, y: torch.sin(y), y0, [1.0, 2.0], rtol=rtol, atol=0.0, options=INDEPENDENT)

    def test_a_finished_sample_is_not_looked_at(self) -> None:
        """func is still evaluated at the end of a finished sample, but the result there is ignored."""
        t = torch.tensor([[0.0, 1.0], [0.0, 5.0]], dtype=torch.float64)

        def func(t: Tensor, y: Tensor) -> Tensor:
            late = (t[1] > 2).expand_as(y) & (torch.arange(2).view(2, 1) == 0)
            return torch.where(late, math.nan, -y)

        y0 = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
        y = aca_ext.odeint(func, y0, t, options=INDEPENDENT, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(y[-1, :, 0], torch.exp(-t[:, 1]), rtol=1e-6, atol=1e-8)
