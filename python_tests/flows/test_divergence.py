"""Fields with the change of log-density: against Jacobians in full, inside replays, engines and transforms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aca_ext
from aca_ext import flows
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, SlopeError, UnknownNameError

# PyTorch's own decompositions for forward mode, imported at its first use, call torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
DTYPE = torch.float64


class Network(nn.Module):
    """A small time-dependent network on samples of ``size`` elements."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        layers = nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, size)
        self.net = nn.Sequential(*layers).to(DTYPE)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * (1 + t)


def jacobians(func: Any, t: Tensor, y: Tensor) -> Tensor:
    """(batch, d, d) Jacobians of single samples, by autograd."""
    rows = [torch.autograd.functional.jacobian(lambda x: func(t, x[None])[0], sample) for sample in y]
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["reverse", "forward", None])
@pytest.mark.parametrize("size", [1, 3, 20])  # a loop over the elements, and one batched product for 20
def test_exact_rates_are_those_of_the_jacobian(mode: str | None, size: int) -> None:
    func, t, y = Network(size), torch.tensor(0.3, dtype=DTYPE), torch.randn(5, size, dtype=DTYPE)
    field = flows.with_divergence(func, penalties=("jacobian_norm", "kinetic_energy"), mode=mode)
    state = field.start(y)
    with torch.no_grad():
        k, change, norm, energy = field(t, state)
    full = jacobians(func, t, y)
    torch.testing.assert_close(k, func(t, y).detach())
    torch.testing.assert_close(change, -full.diagonal(dim1=1, dim2=2).sum(-1))
    torch.testing.assert_close(norm, full.square().sum((1, 2)))
    torch.testing.assert_close(energy, k.square().sum(1))
    assert [part.requires_grad for part in (k, change, norm, energy)] == [False] * 4
    assert [tuple(part.shape) for part in state] == [(5, size), (5,), (5,), (5,)]


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_shapes_of_batches_and_samples(mode: str) -> None:
    y = torch.randn(2, 3, 4, dtype=DTYPE)
    for batch_dims, shape in ((0, ()), (1, (2,)), (2, (2, 3)), (3, (2, 3, 4))):
        field = flows.with_divergence(lambda t, y: y.sin(), batch_dims=batch_dims, mode=mode)
        rate = field(torch.tensor(0.0), field.start(y))[1]
        torch.testing.assert_close(rate, -y.cos().sum(list(range(batch_dims, 3))) if batch_dims < 3 else -y.cos())
        assert rate.shape == shape


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_hutchinson_is_unbiased(noise: str, mode: str) -> None:
    func, t, y = Network(3), torch.tensor(0.3, dtype=DTYPE), torch.randn(2, 3, dtype=DTYPE)
    field = flows.with_divergence(
        func, "hutchinson", probes=20_000, noise=noise, penalties=("jacobian_norm",), mode=mode
    )
    probes = field.draw_probes(y)
    assert probes.shape == (2, 20_000, 3)
    with torch.no_grad():
        _, change, norm = field(t, field.start(y), probes)
    full = jacobians(func, t, y)
    symmetric = (full + full.mT) / 2
    variance = 2 * symmetric.square().sum((1, 2)) / 20_000  # of Gaussian probes; that of Rademacher probes is smaller
    error = change + full.diagonal(dim1=1, dim2=2).sum(-1)
    assert (error.abs() < 5 * variance.sqrt()).all()
    torch.testing.assert_close(norm, full.square().sum((1, 2)), rtol=0.1, atol=0)
    one = flows.with_divergence(func, "hutchinson", mode=mode)
    singles = one(t, one.start(y.expand(2, 3)), probes[:, :1])[1]
    assert not torch.allclose(singles, change)


def test_rademacher_probes_are_signs_from_the_generator() -> None:
    y = torch.zeros(4, 3, dtype=DTYPE)
    drawn = [
        flows.with_divergence(
            torch.sin, "hutchinson", probes=5, generator=torch.Generator().manual_seed(3)
        ).draw_probes(y)
        for _ in range(2)
    ]
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0].abs(), torch.ones(4, 5, 3, dtype=DTYPE))
    assert drawn[0].dtype is DTYPE


def gradients(field: flows.DivergenceField, y: Tensor, args: tuple[Any, ...] = (), **settings: Any) -> list[Tensor]:
    """End state and gradients of a loss that uses all components."""
    y = y.clone().requires_grad_()
    ends = [part[-1] for part in aca_ext.odeint(field, field.start(y), (0.0, 1.0), args=args, **TIGHT, **settings)]
    loss = sum(((i + 1) * part.square().sum() for i, part in enumerate(ends)), torch.zeros((), dtype=DTYPE))
    inputs = (y, *field.parameters())
    found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*(end.detach() for end in ends), *found]


@pytest.mark.parametrize("batch", [{}, {"batch": "independent"}])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_replay_repeats_the_solve(kind: str, mode: str, batch: dict[str, str]) -> None:
    field = flows.with_divergence(Network(), kind, penalties=("kinetic_energy", "jacobian_norm"), mode=mode)
    y = torch.randn(4, 2, dtype=DTYPE)
    args = (field.draw_probes(y),) if kind == "hutchinson" else ()
    found = [gradients(field, y, args, gradient=name, options=batch) for name in ("aca", "direct")]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert all(part.abs().sum() > 0 for part in found[0][:-1])


@pytest.mark.parametrize("batch", [{}, {"batch": "independent"}])
@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
def test_compiled_engine(kind: str, batch: dict[str, str]) -> None:
    field = flows.with_divergence(Network(), kind, penalties=("kinetic_energy", "jacobian_norm"))
    y = torch.randn(4, 2, dtype=DTYPE)
    args = (field.draw_probes(y),) if kind == "hutchinson" else ()
    solved = aca_ext.solve(field, field.start(y), (0.0, 1.0), args=args, engine="compiled", options=batch)
    assert solved.stats.compiled == "solve", solved.stats.reason
    found = [gradients(field, y, args, engine=name, options=batch) for name in ("eager", "compiled")]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_transforms_take_forward_mode() -> None:
    field = flows.with_divergence(lambda t, y, a: torch.sin(a * y), batch_dims=0)

    def change(y: Tensor, a: Tensor) -> Tensor:
        return aca_ext.odeint(field, field.start(y), (0.0, 1.0), args=(a,), **TIGHT)[1][-1]

    y, a = torch.randn(3, 2, dtype=DTYPE), torch.tensor(0.7, dtype=DTYPE)
    found = torch.vmap(torch.func.grad(change), in_dims=(0, None))(y, a)
    for sample, gradient in zip(y, found, strict=True):
        sample = sample.clone().requires_grad_()
        expected = torch.autograd.grad(change(sample, a), sample)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_second_derivatives() -> None:
    func = Network(1)
    field = flows.with_divergence(func)

    def change(y: Tensor) -> Tensor:
        return aca_ext.odeint(field, field.start(y), (0.0, 1.0), **TIGHT, options={"n_steps": 3})[1][-1]

    y = torch.randn(2, 1, dtype=DTYPE, requires_grad=True)
    assert torch.autograd.gradgradcheck(change, y)


def test_inference_mode_has_the_same_values() -> None:
    field, y = flows.with_divergence(Network()), torch.randn(4, 2, dtype=DTYPE)
    with torch.inference_mode():
        found = aca_ext.odeint(field, field.start(y), (0.0, 1.0))
    for one, other in zip(found, aca_ext.odeint(field, field.start(y), (0.0, 1.0)), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


def test_forward_evaluations_record_no_graph() -> None:
    seen = []

    class Watched(Network):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            k = super().forward(t, y)
            return _Note.apply(k, seen)  # type: ignore[no-untyped-call]

    field, y = flows.with_divergence(Watched()), torch.randn(4, 2, dtype=DTYPE)
    solution = aca_ext.solve(field, field.start(y), (0.0, 1.0))
    assert len(seen) == 2 * solution.stats.n_f_evals
    assert sum(seen) == 2  # the products of the first evaluation, which is made with a graph


class _Note(torch.autograd.Function):
    """The identity; notes whether each product through it records a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[bool]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(torch.is_grad_enabled())
        return g.clone(), None


class TestFields:
    """Fields of unusual form."""

    @pytest.mark.parametrize("mode", ["reverse", "forward"])
    def test_constant(self, mode: str) -> None:
        y, t = torch.randn(3, 2, dtype=DTYPE), torch.tensor(0.0)
        bias = torch.randn(2, dtype=DTYPE, requires_grad=True)
        for func in (lambda t, y: torch.ones_like(y), lambda t, y: bias.expand_as(y), lambda t, y: y):
            field = flows.with_divergence(func, mode=mode)
            rate = field(t, field.start(y))[1]
            assert torch.equal(rate, torch.full((3,), -2.0 if func(t, y) is y else 0.0, dtype=DTYPE))

    def test_that_is_a_gradient(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            x = y if y.requires_grad else y.detach().requires_grad_()
            return torch.autograd.grad(-x.pow(4).sum(), x, create_graph=True)[0]

        y = torch.randn(3, 2, dtype=DTYPE) / 4
        field = flows.with_divergence(func)
        found = [gradients(field, y, gradient=name) for name in ("aca", "direct")]
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
        rate = field(torch.tensor(0.0), field.start(y))[1]
        torch.testing.assert_close(rate.detach(), 12 * y.square().sum(1))

    def test_dropout_repeats_in_the_replay(self) -> None:
        class Dropping(Network):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return nn.functional.dropout(super().forward(t, y), 0.5)

        field, y = flows.with_divergence(Dropping()), torch.randn(4, 2, dtype=DTYPE)
        found = []
        for name in ("aca", "direct"):
            torch.manual_seed(1)
            found.append(gradients(field, y, gradient=name, options={"n_steps": 4}))
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)

    def test_owns_the_module(self) -> None:
        func = Network()
        field = flows.with_divergence(func, "hutchinson", generator=torch.Generator().manual_seed(0))
        assert list(field.parameters()) == list(func.parameters())
        other = copy.deepcopy(field)
        assert torch.equal(other.draw_probes(torch.zeros(3, 2)), field.draw_probes(torch.zeros(3, 2)))
        assert "kind='hutchinson', probes=1" in repr(field)


def torch_sin(t: Tensor, y: Tensor) -> Tensor:
    return y.sin()


class _Unary(nn.Module):
    """A network that ignores time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"kind": "trace"}, UnknownNameError, "exact, hutchinson"),
            ({"probes": 2}, ArgumentValueError, "draws nothing"),
            ({"kind": "hutchinson", "probes": 0}, ArgumentValueError, "at least 1"),
            ({"kind": "hutchinson", "probes": True}, ArgumentValueError, "at least 1"),
            ({"kind": "hutchinson", "noise": "normal"}, UnknownNameError, "gaussian"),
            ({"penalties": ("energy",)}, UnknownNameError, "kinetic_energy"),
            ({"penalties": "kinetic_energy"}, ArgumentTypeError, "tuple of names"),
            ({"batch_dims": -1}, ArgumentValueError, "at least 0"),
            ({"mode": "backward"}, UnknownNameError, "reverse"),
            ({"func": 3}, ArgumentTypeError, "give a function"),
            ({"func": flows.with_divergence(torch.sin)}, ArgumentTypeError, "DivergenceField"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            flows.with_divergence(**{"func": Network(), **settings})

    def test_states(self) -> None:
        field = flows.with_divergence(Network(), batch_dims=2)
        with pytest.raises(ArgumentValueError, match="batch_dims=0"):
            field.start(torch.zeros(3))
        for y in (torch.zeros(3, 2, dtype=torch.complex64), torch.zeros(3, 2, dtype=torch.int64), [1.0], None):
            with pytest.raises(ArgumentTypeError, match="real numbers"):
                field.start(y)  # type: ignore[arg-type]

    def test_batch_normalisation(self) -> None:
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        for func in (lambda t, y: net(y), _Unary(net)):
            net.train()
            with pytest.raises(ArgumentValueError, match="BatchNorm1d"):
                flows.with_divergence(func).start(torch.zeros(3, 2))
            net.eval()
            assert len(flows.with_divergence(func).start(torch.zeros(3, 2))) == 2

    def test_transforms(self) -> None:
        y, t = torch.randn(3, 2), torch.tensor(0.0)
        field = flows.with_divergence(torch_sin, mode="reverse")
        with pytest.raises(ArgumentValueError, match='mode="forward"'):
            torch.func.jvp(lambda y: field(t, field.start(y))[1], (y,), (y,))
        field = flows.with_divergence(torch_sin)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(y, y)
            with pytest.raises(ArgumentTypeError, match=r"torch\.func\.jvp"):
                field(t, field.start(dual))
        tangent = torch.func.jvp(lambda y: field(t, field.start(y))[1], (y,), (y,))[1]
        torch.testing.assert_close(tangent, (y.sin() * y).sum(1))

    def test_probes(self) -> None:
        y, times = torch.zeros(3, 2, dtype=DTYPE), (0.0, 1.0)
        field = flows.with_divergence(Network(), "hutchinson")
        with pytest.raises(ArgumentValueError, match="draw_probes"):
            aca_ext.odeint(field, field.start(y), times)
        with pytest.raises(ArgumentValueError, match=r"shape \(1, 1, 2\)"):
            aca_ext.odeint(field, field.start(y), times, args=(field.draw_probes(y[:1]),))
        with pytest.raises(ArgumentValueError, match=r"shape \(3, 0, 2\)"):
            aca_ext.odeint(field, field.start(y), times, args=(y[:, None][:, :0],))
        with pytest.raises(ArgumentValueError, match="has no probes"):
            flows.with_divergence(Network()).draw_probes(y)

    def test_slopes(self) -> None:
        y, t = torch.zeros(3, 2), torch.tensor(0.0)
        for func, message in (
            (lambda t, y: y[:, :1], r"shape \(3, 1\)"),
            (lambda t, y: y.double(), "dtype torch.float64"),
            (lambda t, y: (y,), "type tuple"),
        ):
            field = flows.with_divergence(func)
            with pytest.raises(SlopeError, match=message):
                field(t, field.start(y))
