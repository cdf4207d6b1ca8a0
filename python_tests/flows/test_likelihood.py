"""Log-densities and samples of flows: Gaussians in closed form, directions of time, settings, and two moons."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

import aca_ext
from aca_ext import flows
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, OptionError, TimeError

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
DTYPE = torch.float64
PENALTIES = ("kinetic_energy", "jacobian_norm")

# PyTorch's own decompositions for forward mode, imported at its first use, call torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def standard(size: int = 2, dtype: torch.dtype = DTYPE) -> Independent:
    return Independent(Normal(torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)), 1)


class Linear(nn.Module):
    """dy/dt = A y + b, which carries Gaussians to Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.3, -0.8], [0.5, -0.4]], dtype=DTYPE))
        self.b = nn.Parameter(torch.tensor([0.2, -0.1], dtype=DTYPE))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.a.T + self.b

    def density(self, t: float, scale: Tensor) -> MultivariateNormal:
        """That of a Gaussian with standard deviation ``scale`` after a time t."""
        augmented = torch.cat([torch.cat([self.a, self.b[:, None]], 1), torch.zeros(1, 3, dtype=DTYPE)])
        flow = torch.matrix_exp(t * augmented)
        spread = flow[:2, :2] * scale
        return MultivariateNormal(flow[:2, 2], spread @ spread.T)


@pytest.mark.parametrize("times", [(0.0, 1.5), (1.5, 0.0), (-0.5, 0.2, 1.0)])
@pytest.mark.parametrize("gradient", ["aca", "direct", "adjoint"])
def test_gaussian_in_closed_form(times: tuple[float, ...], gradient: str) -> None:
    func, x = Linear(), torch.randn(7, 2, dtype=DTYPE, requires_grad=True)
    scale = torch.tensor(0.7, dtype=DTYPE, requires_grad=True)
    base = Independent(Normal(torch.zeros(2, dtype=DTYPE), scale.expand(2)), 1)
    found = flows.log_prob(func, x, times, base, gradient=gradient, **TIGHT)
    expected = func.density(times[-1] - times[0], scale).log_prob(x)
    assert found.shape == (7,)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    weights = torch.linspace(1, 2, 7, dtype=DTYPE)
    inputs = (x, scale, *func.parameters())
    of_both = [torch.autograd.grad(value @ weights, inputs) for value in (found, expected)]
    for one, other in zip(*of_both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_gradient_of_times() -> None:
    func, x = Linear(), torch.randn(3, 2, dtype=DTYPE)
    t = torch.tensor([0.0, 1.0], dtype=DTYPE, requires_grad=True)
    flows.log_prob(func, x, t, standard(), **TIGHT).sum().backward()
    end = torch.tensor(1.0, dtype=DTYPE, requires_grad=True)
    func.density(end, torch.tensor(1.0, dtype=DTYPE)).log_prob(x).sum().backward()  # type: ignore[arg-type]
    assert t.grad is not None
    assert end.grad is not None
    torch.testing.assert_close(t.grad, torch.stack([-end.grad, end.grad]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_density_of_samples_is_that_of_the_data(kind: str) -> None:
    func = Linear()
    field = flows.with_divergence(func, kind, **({} if kind == "exact" else {"probes": 4}))
    z = torch.randn(5, 2, dtype=DTYPE, requires_grad=True)
    probes = None if kind == "exact" else field.draw_probes(z)
    x, density = flows.sample_and_log_prob(field, z, (0.0, 1.0), standard(), probes=probes, **TIGHT)
    torch.testing.assert_close(flows.sample(field, z, (0.0, 1.0), **TIGHT), x)
    again = flows.likelihood(field, x, (0.0, 1.0), standard(), probes=probes, **TIGHT)
    torch.testing.assert_close(again.log_prob, density, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(again.z, z, rtol=1e-7, atol=1e-7)
    if kind == "exact":
        expected = func.density(1.0, torch.tensor(1.0, dtype=DTYPE)).log_prob(x)
        torch.testing.assert_close(density, expected, rtol=1e-7, atol=1e-7)
    assert torch.autograd.grad(x.sum(), z)[0].abs().sum() > 0


def test_hutchinson_estimates_the_density() -> None:
    func, x = Linear(), torch.randn(1, 2, dtype=DTYPE).expand(4000, 2)
    field = flows.with_divergence(func, "hutchinson", generator=torch.Generator().manual_seed(2))
    found = flows.log_prob(field, x, (0.0, 1.0), standard())
    expected = func.density(1.0, torch.tensor(1.0, dtype=DTYPE)).log_prob(x[:1])
    assert abs(found.mean() - expected) < 4 * found.std() / 4000**0.5
    assert found.std() > 0.01


@pytest.mark.parametrize("gradient", ["aca", "direct"])
def test_probes_are_drawn_once_a_solve(gradient: str) -> None:
    seen: list[Tensor] = []

    class Watched(flows.DivergenceField):
        def draw_probes(self, y: Tensor) -> Tensor:
            seen.append(super().draw_probes(y))
            return seen[-1]

    field = Watched(Linear(), "hutchinson", 1, "gaussian", None, (), 1, None)
    x = torch.randn(3, 2, dtype=DTYPE)
    first, second = (flows.log_prob(field, x, (0.0, 1.0), standard(), gradient=gradient) for _ in range(2))
    state = torch.get_rng_state()
    first.sum().backward()
    assert len(seen) == 2
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.allclose(first, second)
    again = flows.log_prob(field, x, (0.0, 1.0), standard(), probes=seen[0], gradient=gradient)
    assert torch.equal(again, first)


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_gradient_with_replay_is_the_direct_one(kind: str) -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.Softplus(), nn.Linear(16, 2)).to(DTYPE)
    context = torch.randn(6, 1, dtype=DTYPE, requires_grad=True)
    field = flows.with_divergence(lambda t, y, c: net(torch.cat([y, c * t], 1)), kind, penalties=PENALTIES)
    x = torch.randn(6, 2, dtype=DTYPE)
    probes = field.draw_probes(x) if kind == "hutchinson" else None
    found = []
    for gradient in ("aca", "direct"):
        result = flows.likelihood(field, x, (0.0, 1.0), standard(), args=(context,), probes=probes, gradient=gradient)
        loss = -result.log_prob.mean() + sum(penalty.mean() for penalty in result.penalties.values())
        found.append(torch.autograd.grad(loss, [context, *net.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [(0.0, 2.0), (2.0, 0.0)])
def test_penalties_are_integrals_of_positive_rates(times: tuple[float, float]) -> None:
    func, x = Linear(), torch.randn(3, 2, dtype=DTYPE)
    with torch.no_grad():
        func.a.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))  # a rotation, on which both rates are constant
        func.b.zero_()
    field = flows.with_divergence(func, penalties=PENALTIES)
    found = flows.likelihood(field, x, times, standard(), **TIGHT)
    assert list(found.penalties) == list(PENALTIES)
    torch.testing.assert_close(found.penalties["kinetic_energy"], 2 * x.square().sum(1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.penalties["jacobian_norm"], torch.full((3,), 4.0, dtype=DTYPE))
    torch.testing.assert_close(found.log_prob, standard().log_prob(x), rtol=1e-7, atol=1e-7)
    assert found.stats.n_accepted > 0


def test_times_of_single_samples() -> None:
    func, x = Linear(), torch.randn(2, 2, dtype=DTYPE)
    t = torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=DTYPE)
    options = {"batch": "independent"}
    field = flows.with_divergence(func, penalties=PENALTIES)
    found = flows.likelihood(field, x, t, standard(), options=options, **TIGHT)
    for i, times in enumerate(t):
        alone = flows.likelihood(field, x[i : i + 1], times, standard(), **TIGHT)
        torch.testing.assert_close(found.log_prob[i], alone.log_prob[0], rtol=1e-7, atol=1e-7)
        for name in PENALTIES:
            assert alone.penalties[name] > 0
            torch.testing.assert_close(found.penalties[name][i], alone.penalties[name][0], rtol=1e-7, atol=1e-7)


def test_transforms_of_a_likelihood() -> None:
    func, x, times = Linear(), torch.randn(3, 2, dtype=DTYPE), (0.0, 1.0)
    expected = func.density(1.0, torch.tensor(1.0, dtype=DTYPE))
    scores = torch.linalg.solve(expected.covariance_matrix, (expected.mean - x).T).T
    jacobian = torch.func.jacfwd(lambda x: flows.log_prob(func, x, times, standard(), **TIGHT))(x)
    torch.testing.assert_close(jacobian.sum(1), scores, rtol=1e-6, atol=1e-6)
    field = flows.with_divergence(func, batch_dims=0)
    found = torch.vmap(lambda x: flows.log_prob(field, x, times, standard(), **TIGHT))(x)
    torch.testing.assert_close(found, expected.log_prob(x), rtol=1e-7, atol=1e-7)
    estimate = flows.with_divergence(func, "hutchinson", batch_dims=0)
    probes = torch.ones(3, 1, 2, dtype=DTYPE)
    one = torch.vmap(lambda x, e: flows.log_prob(estimate, x, times, standard(), probes=e, **TIGHT))(x, probes)
    batched = flows.with_divergence(func, "hutchinson")
    other = flows.log_prob(batched, x, times, standard(), probes=probes, **TIGHT)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_error_norm_of_the_state_alone() -> None:
    class Stretching(nn.Module):
        """Samples stand still, while the density oscillates fast: y' = y sin(50 t) at y = 0."""

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return y * torch.sin(50 * t)

    func, x = Stretching(), torch.zeros(2, 1, dtype=DTYPE)
    field, times = flows.with_divergence(func), (0.0, 1.0)
    counts = {}
    for norm in ("all", "state"):
        result = flows.likelihood(field, x, times, standard(1), error_norm=norm, rtol=1e-6, atol=1e-6)
        counts[norm] = result.stats.n_accepted
    assert counts["state"] * 3 < counts["all"]
    x = torch.randn(4, 1, dtype=DTYPE)
    of_tolerance = flows.likelihood(field, x, times, standard(1), error_norm="state", rtol=1e-6, atol=1e-6)
    options = {"norm": flows.state_norm}
    of_norm = flows.likelihood(field, x, times, standard(1), options=options, rtol=1e-6, atol=1e-6)
    alone = aca_ext.solve(func, x, times[::-1], rtol=1e-6, atol=1e-6)
    assert of_tolerance.stats.n_accepted == of_norm.stats.n_accepted == alone.stats.n_accepted
    torch.testing.assert_close(of_tolerance.log_prob, of_norm.log_prob, rtol=1e-12, atol=1e-12)


def test_samples_have_the_moments_of_the_flow() -> None:
    func = Linear()
    base = MultivariateNormal(torch.zeros(2, dtype=DTYPE), torch.eye(2, dtype=DTYPE))
    x, density = flows.sample_and_log_prob(func, 4000, (0.0, 1.0), base, rtol=1e-6, atol=1e-6)
    expected = func.density(1.0, torch.tensor(1.0, dtype=DTYPE))
    assert x.shape == (4000, 2)
    torch.testing.assert_close(density, expected.log_prob(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.mean(0), expected.mean, rtol=0, atol=0.08)
    torch.testing.assert_close(x.T.cov(), expected.covariance_matrix, rtol=0, atol=0.15)
    loc = torch.zeros(2, dtype=DTYPE, requires_grad=True)
    flows.sample(func, 3, (0.0, 1.0), MultivariateNormal(loc, torch.eye(2, dtype=DTYPE))).sum().backward()
    assert loc.grad is not None


def moons(n: int) -> Tensor:
    """Two interleaved half circles with noise, float32 of mean 0."""
    angle, upper = torch.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2)


def test_two_moons_are_learnt() -> None:
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(torch.cat([y, t.expand(len(y), 1)], 1))

    field, base = flows.with_divergence(Field()), standard(dtype=torch.float32)
    settings: dict[str, Any] = {"method": "rk4", "options": {"n_steps": 6}}
    optimizer = torch.optim.Adam(field.parameters(), lr=0.02)
    held_out = moons(500)

    def loss(x: Tensor) -> Tensor:
        return -flows.log_prob(field, x, (0.0, 1.0), base, **settings).mean()

    with torch.no_grad():
        before = float(loss(held_out))
    for _ in range(50):
        optimizer.zero_grad()
        loss(moons(128)).backward()
        optimizer.step()
    with torch.no_grad():
        after, exact = float(loss(held_out)), -flows.log_prob(field, held_out, (0.0, 1.0), base).mean()
    gaussian = MultivariateNormal(held_out.mean(0), held_out.T.cov())
    assert after < min(before, -gaussian.log_prob(held_out).mean()) - 0.2  # a linear flow cannot be that good
    assert abs(after - exact) < 0.02
    grid = torch.cartesian_prod(torch.linspace(-4, 4, 81), torch.linspace(-4, 4, 81))
    with torch.no_grad():
        total = flows.log_prob(field, grid, (0.0, 1.0), base, **settings).exp().sum() * 0.1**2
    assert abs(total - 1) < 0.05


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda f, x, b: flows.log_prob(f, x, (0.0, 1.0), Normal(0.0, 1.0)), ArgumentValueError, "Independent"),
            (lambda f, x, b: flows.log_prob(f, x, (0.0, 1.0), 3), ArgumentTypeError, "log_prob"),
            (lambda f, x, b: flows.log_prob(f, x, (0.0,), b), TimeError, "no end"),
            (lambda f, x, b: flows.log_prob(f, x, torch.tensor(1.0), b), TimeError, "no end"),
            (
                lambda f, x, b: flows.log_prob(f, x, torch.tensor([[0.0, 1.0], [0.0, torch.nan], [0.0, 1.0]]), b),
                TimeError,
                "holds NaN",
            ),
            (lambda f, x, b: flows.log_prob(f, x, "01", b), TimeError, "type str"),
            (lambda f, x, b: flows.log_prob(f, x.cfloat(), (0.0, 1.0), b), ArgumentTypeError, "real numbers"),
            (lambda f, x, b: flows.log_prob(f, x, (0.0, 1.0), b, probes=x), ArgumentValueError, "is exact"),
            (lambda f, x, b: flows.log_prob(f, x, (0.0, 1.0), b, error_norm="y"), ArgumentValueError, "all, state"),
            (
                lambda f, x, b: flows.log_prob(f, x, (0.0, 1.0), b, error_norm="state", atol=(1e-3, 1e-3)),
                ArgumentValueError,
                "of y alone",
            ),
            (
                lambda f, x, b: flows.log_prob(f, x, (0.0, 1.0), b, options={"on_step_limit": "stop"}),
                OptionError,
                "flows.likelihood",
            ),
            (
                lambda f, x, b: flows.log_prob(f, x, (0.0, 1.0), b, callback=lambda step: True),
                ArgumentValueError,
                "callback returned True",
            ),
            (
                lambda f, x, b: flows.sample(f, x, (0.0, 1.0), output_fn=lambda t, y: y),
                ArgumentValueError,
                "output_fn",
            ),
            (lambda f, x, b: flows.sample(f, x, (0.0, 1.0), dense=True), ArgumentValueError, "dense"),
            (
                lambda f, x, b: flows.sample(
                    f, x, (0.0, 1.0), events=[aca_ext.Event(lambda t, y: y[0, 0], terminal=True)]
                ),
                ArgumentValueError,
                "terminal",
            ),
            (lambda f, x, b: flows.sample(f, 0, (0.0, 1.0), b), ArgumentTypeError, "number of samples"),
            (lambda f, x, b: flows.sample(f, 3, (0.0, 1.0)), ArgumentTypeError, "sample"),
            (lambda f, x, b: flows.sample_and_log_prob(f, x, (0.0, 1.0), None), ArgumentTypeError, "log_prob"),
        ],
    )
    def test_arguments(self, call: Callable[..., Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call(Linear(), torch.zeros(3, 2, dtype=DTYPE), standard())


def test_a_single_sample_without_a_batch() -> None:
    with pytest.raises(ArgumentValueError, match="x\\[None\\], or a field"):
        flows.log_prob(lambda t, y: y, torch.zeros(2, dtype=DTYPE), (0.0, 1.0), standard())


def test_func_whose_arguments_are_swapped() -> None:
    def func(y: Tensor, t: Tensor) -> Tensor:
        return y * t

    with pytest.raises(ArgumentTypeError, match="time first"):
        flows.log_prob(func, torch.zeros(3, 2, dtype=DTYPE), (0.0, 1.0), standard())


def compilations(func: Callable[..., Any], n: int = 3, **settings: Any) -> int:
    """Number of likelihoods that compiled something, of ``n`` with the gradients of the eager engine."""
    x, found = torch.randn(4, 2, dtype=DTYPE), []
    for _ in range(n):
        both = [flows.likelihood(func, x, (0.0, 1.0), standard(), engine=e, **settings) for e in ("eager", "compiled")]
        assert both[1].stats.compiled == "solve", both[1].stats.reason
        values = [(one.log_prob, *torch.autograd.grad(one.log_prob.sum(), list(weights_of(func)))) for one in both]
        for eager, compiled in zip(*values, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)
        found.append(both[1].stats.compile_seconds > 0)
    return sum(found)


def weights_of(func: Any) -> Any:
    module = func.func if isinstance(func, flows.DivergenceField) else func
    return module.parameters() if isinstance(module, nn.Module) else [module.__closure__[0].cell_contents]


class TestCompiledLikelihoods:
    def test_compile_once(self) -> None:
        assert compilations(Linear()) == 1

    def test_of_a_function_defined_anew_compile_once(self) -> None:
        def flow(rate: float) -> Callable[..., Tensor]:
            a = torch.full((2,), rate, dtype=DTYPE, requires_grad=True)
            return lambda t, y: torch.sin(a * y)

        assert [compilations(flow(rate), n=1) for rate in (0.3, 0.5, 0.7)] == [1, 0, 0]

    def test_of_different_fields_around_one_func_are_those_of_each(self) -> None:
        func, x = Linear(), torch.randn(2, 2, dtype=DTYPE)
        for penalties, mode in (((), None), (("kinetic_energy",), None), (("jacobian_norm",), None), ((), "forward")):
            compilations(flows.with_divergence(func, penalties=penalties, mode=mode), n=1)
        of_both = [flows.sample(func, x, (0.0, 1.0), engine=engine) for engine in ("eager", "compiled")]
        torch.testing.assert_close(*of_both, rtol=1e-9, atol=1e-9)

    def test_do_not_keep_func(self) -> None:
        func = Linear()
        compilations(func, n=1)
        gone = weakref.ref(func)
        del func
        gc.collect()
        assert gone() is None
