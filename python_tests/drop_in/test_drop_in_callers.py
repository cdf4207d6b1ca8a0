"""Calls of torchdiffeq as public programs make them, with the drop-in in its place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, sample
from torch import Tensor, nn

import aca_ext
import aca_ext.torchdiffeq as ours
from aca_ext.errors import ConvergenceWarning

theirs = pytest.importorskip("torchdiffeq")


@pytest.fixture
def installed() -> Iterator[None]:
    undo = ours.install()
    yield
    undo()


def both(call: Any, *, tolerance: float = 1e-6) -> None:
    """Compares the results of a call, tensors in a tuple, by both libraries."""
    for one, other in zip(call(ours), call(theirs), strict=True):
        assert relative_error(one, other) <= tolerance


class TestFlowMatching:
    """Samplers and likelihoods along a learnt velocity."""

    @pytest.mark.parametrize("options", [{"step_size": 0.05}, {}])
    @pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5"])
    def test_a_sampler_on_a_grid_of_times(self, method: str, options: dict[str, Any]) -> None:
        velocity, x = Mlp(), sample(4, 3)
        options = options if method != "dopri5" else {}

        def call(of: Any) -> tuple[Tensor, ...]:
            with torch.no_grad():
                grid = torch.tensor([0.0, 0.5, 1.0])
                ys = of.odeint(velocity, x, grid, method=method, options=options, atol=1e-7, rtol=1e-7)
            return (ys,)

        both(call)

    def test_a_likelihood_backward_in_time_with_autograd_inside(self) -> None:
        velocity, x = Mlp(), sample(4, 3)

        def divergence(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                y = state[0].requires_grad_()  # in place, as they do
                v = velocity(t, y)
                parts = [torch.autograd.grad(v[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(3)]
            return v.detach(), torch.stack(parts).sum(0).detach()

        def call(of: Any) -> tuple[Tensor, ...]:
            with torch.no_grad():
                start = x.clone(), torch.zeros(4, dtype=torch.float64)
                return of.odeint(divergence, start, torch.tensor([1.0, 0.0]), method="rk4", options={"step_size": 0.1})

        both(call)

    def test_half_precision_by_fixed_steps(self) -> None:
        x, t = torch.randn(2, 3).half(), torch.linspace(0, 1, 9).half()

        def call(of: Any) -> tuple[Tensor, ...]:
            return (of.odeint(lambda t, y: -y * t, x, t, method="euler").float(),)

        both(call, tolerance=2e-3)

    def test_a_closure_that_counts(self) -> None:
        n = 0

        def velocity(t: Tensor, y: Tensor) -> Tensor:
            nonlocal n
            n += 1
            return -y

        ours.odeint(velocity, sample(3), torch.tensor([0.0, 1.0]), method="dopri5", options={}, atol=1e-5, rtol=1e-5)
        assert n > 6

    def test_the_table_of_solvers(self, installed: None) -> None:
        from torchdiffeq._impl.odeint import SOLVERS

        assert {"dopri5", "euler", "midpoint", "rk4", "fixed_adams", "scipy_solver"} <= set(SOLVERS)


class TestDiffusion:
    @pytest.mark.parametrize("method", ["dopri5", "bosh3"])
    def test_tolerances_as_lists_for_a_tensor(self, method: str) -> None:
        func, t, tolerances = Mlp(), torch.tensor([0.0, 1.0]), {"atol": [1e-7], "rtol": [1e-7]}
        both(lambda of: (of.odeint(func, sample(2, 3), t, method=method, **tolerances),), tolerance=1e-5)

    def test_a_likelihood_with_a_tuple_state_and_autograd_in_func(self) -> None:
        net, x = Mlp(), sample(4, 3)
        v = torch.randint(0, 2, x.shape).double() * 2 - 1

        def func(sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                y = state[0].detach().requires_grad_()
                d = net(sigma, y)
                grad = torch.autograd.grad((d * v).sum(), y)[0]
            return d.detach(), (v * grad).flatten(1).sum(1)

        def call(of: Any) -> tuple[Tensor, ...]:
            start, t = (x, x.new_zeros([4])), x.new_tensor([0.01, 2.0])
            return of.odeint(func, start, t, atol=1e-8, rtol=1e-8, method="dopri5")

        both(call)


class Control(nn.Module):
    """A path through given points, with its slopes as a buffer that was computed from them."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.register_buffer("points", points)
        self.register_buffer("slopes", points[1:] - points[:-1])

    def derivative(self, t: Tensor) -> Tensor:
        return self.slopes[int(t.clamp(0, len(self.slopes) - 1))]


class Controlled(nn.Module):
    def __init__(self, control: Control) -> None:
        super().__init__()
        self.control, self.net = control, nn.Linear(3, 6, dtype=torch.float64)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.net(z)).view(*z.shape, 2) @ self.control.derivative(t)


class TestControlledEquations:
    @pytest.mark.parametrize("is_leaf", [True, False])
    @pytest.mark.parametrize("adjoint", [True, False])
    @pytest.mark.parametrize("how", [{"method": "rk4", "options": {"step_size": 0.5}}, {"options": {"jump_t": [1, 2]}}])
    def test_gradients_reach_the_control(self, how: dict[str, Any], adjoint: bool, is_leaf: bool) -> None:
        """Points as a named parameter, of which func uses only what was computed from them."""
        t = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
        if "jump_t" in how["options"]:
            how = {"options": {"jump_t": torch.tensor([1.0, 2.0], dtype=torch.float64)}}

        def call(of: Any) -> tuple[Tensor, ...]:
            torch.manual_seed(1)
            leaf = sample(4, 2).requires_grad_()
            points = leaf if is_leaf else 1.5 * leaf
            func, z0 = Controlled(Control(points)), sample(3)
            params = {"adjoint_params": (*func.net.parameters(), points)} if adjoint else {}
            solve = of.odeint_adjoint if adjoint else of.odeint
            ys = solve(func=func, y0=z0, t=t, rtol=1e-9, atol=1e-9, **how, **params)
            return ys, *torch.autograd.grad(ys.square().sum(), [leaf, *func.net.parameters()])

        both(call, tolerance=1e-5)

    def test_named_params_of_exact_gradients_too(self) -> None:
        leaf = sample(4, 2).requires_grad_()
        found = []
        for named in (False, True):
            points = 1.5 * leaf
            func = Controlled(Control(points))
            torch.manual_seed(0)
            nn.init.normal_(func.net.weight)
            nn.init.zeros_(func.net.bias)
            params = {"params": (*func.net.parameters(), points)} if named else {}
            options = {"step_size": 0.25}
            y = aca_ext.odeint(func, sample(3), [0.0, 3.0], method="rk4", options=options, **params)
            (grad,) = torch.autograd.grad(y[-1].square().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), leaf)
            found.append((grad, second))
        for one, other in zip(*found, strict=True):
            assert one.abs().max() > 1e-3
            assert relative_error(one, other) <= 1e-12


class TestGraphs:
    @pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
    def test_adams_with_a_step_of_one_and_its_iterations(self, method: str) -> None:
        def call(of: Any) -> tuple[Tensor, ...]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options = {"step_size": 1, "max_iters": 100, "max_order": 5}
                t = torch.tensor([0.0, 6.0], dtype=torch.float64)
                return (of.odeint(lambda t, y: -0.1 * y, sample(3), t, method=method, options=options, rtol=1e-9),)

        both(call, tolerance=1e-12)

    def test_dopri5_warns_of_them(self) -> None:
        with pytest.warns(UserWarning, match="max_iters"):
            ours.odeint_adjoint(
                Mlp(), sample(2, 3), torch.tensor([0.0, 3.0]), method="dopri5",
                options={"step_size": 1, "max_iters": 100}, adjoint_method="dopri5",
                adjoint_options={"step_size": 1, "max_iters": 100}, atol=1e-6, rtol=1e-6,
            )  # fmt: skip

    @pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
    def test_adams_of_a_low_order_is_rk4(self, method: str) -> None:
        func, y0, t = Mlp(), sample(2, 3).requires_grad_(), torch.linspace(0, 1, 6, dtype=torch.float64)
        options = {"max_order": 3, "max_iters": 2}
        with pytest.warns(UserWarning, match="below 4"):
            y = ours.odeint_adjoint(func, y0, t, method=method, options=options)
        assert torch.equal(y, ours.odeint(func, y0, t, method="rk4"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y[-1].sum().backward()

    def test_warns_where_the_corrector_does_not_converge(self) -> None:
        t = torch.linspace(0, 1, 6)
        with pytest.warns(ConvergenceWarning):
            ours.odeint(lambda t, y: -5 * y, torch.ones(2), t, method="implicit_adams", options={"max_iters": 1})

    @pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
    def test_the_adjoint_by_adams(self, method: str) -> None:
        def call(of: Any) -> tuple[Tensor, ...]:
            func, y0 = Mlp(), sample(2, 3).requires_grad_()
            t = torch.linspace(0, 1, 21, dtype=torch.float64)
            options = {"max_order": 5}
            ys = of.odeint_adjoint(func, y0, t, method=method, options=options, rtol=1e-6, atol=1e-6)
            return ys, *torch.autograd.grad(ys[-1].square().sum(), [y0, *func.parameters()])

        both(call, tolerance=1e-5)


class Regularised(nn.Module):
    """A velocity with its energy as a 0-d component of the state, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.end = Mlp(), nn.Parameter(torch.tensor(1.1, dtype=torch.float64))
        self.register_buffer("n_evals", torch.tensor(0.0))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.n_evals += 1
        dy = self.net(t, state[0])
        return dy, dy.square().mean()


class TestRegularisedFlow:
    @pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
    def test_a_learnt_end_with_a_0d_component_and_a_buffer_that_counts(self, interface: str) -> None:
        def call(of: Any) -> tuple[Tensor, ...]:
            torch.manual_seed(2)
            flow, x = Regularised(), sample(4, 3).requires_grad_()
            t = torch.stack([torch.zeros((), dtype=torch.float64), flow.end**2])
            start = x, torch.zeros((), dtype=torch.float64)
            y, energy = getattr(of, interface)(flow, start, t, atol=1e-9, rtol=1e-9, method="dopri5")
            grads = torch.autograd.grad(y[-1].square().sum() + energy[-1], [x, flow.end, *flow.net.parameters()])
            assert flow.n_evals > 0
            return y, energy, *grads

        both(call)


class TestOthers:
    def test_limits_and_the_precision_of_times(self) -> None:
        options = {"min_step": 1e-5, "max_num_steps": 1000, "dtype": torch.float32}

        class Counted(Mlp):
            n = 0

            def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
                self.n += 1

        func = Counted()
        ours.odeint(func, sample(2, 3), torch.tensor([0.0, 1.0]), method="dopri5", options=options)
        assert func.n > 3

    @pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
    def test_events_of_a_tuple_state_by_a_vector_of_functions(self, interface: str) -> None:
        level = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)

        class Decay(nn.Module):
            def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return tuple(-y for y in state)

        def event(t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
            return torch.stack([state[0].sum() - level[0], state[1].sum() - level[1]])

        start = torch.ones(1).double(), torch.ones(1).double()
        time, states = ours.odeint_event(
            Decay(), start, torch.tensor(0.0, dtype=torch.float64), event_fn=event,
            odeint_interface=getattr(ours, interface), method="rk4", options={"step_size": 0.01},
        )  # fmt: skip
        assert time.item() == pytest.approx(0.22314355, rel=1e-3)  # by linear interpolation, as there
        assert [tuple(part.shape) for part in states] == [(2, 1), (2, 1)]
        (grad,) = torch.autograd.grad(time, level)
        assert grad.tolist() == pytest.approx([0.0, -1.25], rel=1e-2)

    def test_what_func_holds_is_found_through_the_drop_in(self) -> None:
        """A generator of func's own, whose numbers the backward pass repeats."""
        generator = torch.Generator().manual_seed(3)
        w = torch.ones(3, dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return w * y * torch.rand(3, generator=generator, dtype=torch.float64)

        found = []
        for solve in (ours.odeint, theirs.odeint):
            generator.manual_seed(3)
            y = solve(func, sample(3), torch.linspace(0, 1, 6, dtype=torch.float64), method="euler")
            found.append(torch.autograd.grad(y[-1].sum(), w)[0])
        assert relative_error(*found) <= 1e-12
