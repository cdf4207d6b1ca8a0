"""The funcs that lanes take, each against the eager engine, and those that they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import sample
from test_ensemble import INDEPENDENT, check_like_eager
from torch import Tensor, nn
from torch.nn import functional

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

BATCH = 5
T = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)


def start(*shape: int) -> Tensor:
    return (sample(BATCH, *shape).abs() % 1 + 0.5).requires_grad_()


def learnt(*shape: int) -> Tensor:
    return (sample(*shape, seed=1).abs() % 1 + 0.1).requires_grad_()


def check(func: Any, y0: Any, args: tuple[Tensor, ...] = (), others: Any = ()) -> None:
    parts = y0 if isinstance(y0, tuple) else (y0,)
    check_like_eager(func, y0, [*parts, *args, *others], args, T)


def functions(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Each function of one number or two, of a component of its own."""
    x = [part.clone() for part in y.split(1, -1)]
    found = [f(x[i]) for i, f in enumerate(ONE)] + [f(x[len(ONE) + i], p) for i, f in enumerate(TWO)]
    return 0.1 * torch.cat(found, -1)


ONE: list[Callable[[Tensor], Tensor]] = [
    torch.exp, torch.exp2, torch.expm1, torch.log, torch.log2, torch.log10, torch.log1p, torch.sin, torch.cos,
    torch.sinh, torch.cosh, torch.tanh, torch.asinh, torch.atan, torch.sqrt, torch.rsqrt, torch.reciprocal,
    torch.abs, torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc, torch.sigmoid, torch.relu, torch.erf,
    torch.erfc, torch.square, lambda x: torch.asin(0.3 * x), lambda x: torch.acos(0.3 * x),
    lambda x: torch.tan(0.5 * x), lambda x: torch.atanh(0.3 * x), lambda x: torch.acosh(x + 1),
    lambda x: x**3, lambda x: x**-2, lambda x: x**2.5,
    lambda x: x**0.5, lambda x: x**0, lambda x: 2.0**x, lambda x: 3 - x, lambda x: x / 3, lambda x: 1 / x,
    lambda x: x.clamp(0.6, 0.9), lambda x: x.clamp(min=0.8), lambda x: x.clamp(max=0.8), functional.softplus,
    functional.gelu, functional.silu, functional.elu, functional.leaky_relu, functional.hardtanh, functional.mish,
    lambda x: -x.detach() * x, lambda x: torch.where(x > 0.8, x, 2 * x), lambda x: (x > 0.8).to(x) * x,
    lambda x: x * ((x > 0.7) & ~(x > 0.9) | (x == 1)), lambda x: torch.nan_to_num(x), lambda x: x % 0.7,
    lambda x: torch.div(x, 0.3, rounding_mode="floor"), lambda x: torch.div(-x, 0.4, rounding_mode="trunc"),
]  # fmt: skip
TWO: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.mul, torch.maximum, torch.minimum, torch.atan2, torch.hypot, torch.pow, torch.remainder,
    lambda x, p: p**x, lambda x, p: torch.sub(x, p, alpha=2), lambda x, p: p / x, lambda x, p: torch.lerp(x, p, 0.3),
    lambda x, p: torch.addcmul(x, x, p, value=0.5), lambda x, p: torch.addcdiv(x, x, p), lambda x, p: p.exp() * x,
    lambda x, p: torch.where(p > 0.5, x, -x),
    lambda x, p: x.clamp(p, 2 * p), lambda x, p: x.clamp(min=p), lambda x, p: functional.softplus(p) * x,
]  # fmt: skip


def test_functions_of_numbers() -> None:
    check(functions, start(len(ONE) + len(TWO)), (learnt(BATCH, 1),))


def test_kinks_have_the_derivatives_of_pytorch() -> None:
    y0 = torch.tensor([[0.0, 1.0, 2.0, 1.0, 1.0, 0.0, 2.0, 2.0]], dtype=torch.float64).expand(2, -1)

    def func(t: Tensor, y: Tensor) -> Tensor:
        a, b, c, d, e, f, g, h = y.unbind(-1)
        return torch.stack(
            (a.abs(), torch.maximum(b, d), c.clamp(max=2.0), torch.minimum(d, b), e.relu(), f.relu(),
             torch.stack((g, h)).amax(0), g**0), -1
        )  # fmt: skip

    leaf = y0.clone().requires_grad_()
    options = INDEPENDENT | {"first_step": 0.5}
    grads = [
        torch.autograd.grad(
            aca_ext.odeint(func, leaf, [0.0, 1e-3], rtol=1e3, atol=1e3, options=options, engine=engine)[-1].sum(), leaf
        )[0]
        for engine in ("eager", "compiled")
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


class Reducing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def often(self, y: Tensor) -> Tensor:
        return (y > 1.2).any(-1, keepdim=True) | (y > 0.2).all(-1, True)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        spread = (
            y.var(-1, keepdim=True)
            + y.std(-1, keepdim=True, correction=0)
            + torch.linalg.vector_norm(y, dim=-1)[:, None]
        )
        extremes = y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True) + y.prod(-1, keepdim=True)
        return -0.1 * (
            spread
            + extremes
            + y.cumsum(-1)
            + self.often(y) * y.cumprod(-1)
            + y.mean(-1, True)
            + self.norm(y)
            + y.softmax(-1)
        )


def test_reductions_within_a_sample() -> None:
    func = Reducing().double()
    check(func, start(4), others=list(func.parameters()))


def in_place(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    k = torch.zeros_like(y)
    k[:, 0] = y[:, 1]
    k[:, 1:] = -p * y[:, :2]
    k[..., [0, 2]] += torch.sin(t)
    return k


def moving(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    ring = y.roll(1, -1) - 2 * y + torch.roll(y, -1, 1)
    padded = functional.pad(y[:, 1:-1], (1, 1))
    picked = y[:, [2, 0, 1]] + y.flip(-1) + y.view(-1, 3, 1).squeeze(2).unsqueeze(-1).expand(-1, -1, 2).sum(-1)
    table = torch.arange(3, dtype=y.dtype) * torch.tril(torch.ones(3, 3, dtype=y.dtype))[2]
    turned = torch.linalg.cross(y, table.expand_as(y))
    return p * (ring + padded) - picked + turned - torch.gather(y, 1, torch.zeros(len(y), 1, dtype=torch.int64))


@pytest.mark.parametrize("func", [in_place, moving])
def test_parts_of_the_state(func: Any) -> None:
    check(func, start(3), (learnt(BATCH, 1),))


@pytest.mark.parametrize("sizes", [(3, 8, 3), (2, 50, 2), (4, 80, 70, 4)])
def test_networks(sizes: tuple[int, ...]) -> None:
    layers = [part for i, n in enumerate(sizes[1:]) for part in (nn.Linear(sizes[i], n), nn.Tanh())][:-1]
    net = nn.Sequential(*layers).double()
    check(lambda t, y: net(y) - torch.sin(t) * y, start(sizes[0]), others=list(net.parameters()))


def test_a_network_of_time_with_weight_norm() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.SiLU(), nn.Linear(8, 2)).double()
    check(lambda t, y: net(torch.cat([y, t], -1)), start(2), others=list(net.parameters()))


def test_frozen_and_chosen_parameters() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].requires_grad_(False)
    check(lambda t, y: net(y), start(2), others=list(net[2].parameters()))
    y = aca_ext.odeint(lambda t, y: net(y), start(2), T, params=[net[2].bias], options=INDEPENDENT, engine="compiled")
    grads = torch.autograd.grad(y.sum(), [net[2].bias, net[2].weight], allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None


MATRIX, SQUARE = learnt(3, 3), learnt(BATCH, BATCH)


@pytest.mark.parametrize(
    ("func", "shape", "args"),
    [
        (lambda t, y: torch.tanh(y @ MATRIX) - y, (4, 3), ()),
        (lambda t, y: torch.tanh(MATRIX @ y) - t * y, (3, 2), ()),
        (lambda t, y, a: torch.einsum("bij,bj->bi", a, y) - y, (3,), (learnt(BATCH, 3, 3),)),
        (lambda t, y, a: (a @ y[..., None])[..., 0] - y * y, (3,), (learnt(BATCH, 3, 3),)),
        (lambda t, y: -y @ y.mT - torch.tanh(y), (3, 3), ()),
        (lambda t, y: torch.tanh(y @ SQUARE) - y * SQUARE, (BATCH,), ()),  # one matrix, and one row for each sample
    ],
    ids=["right", "left", "einsum", "batched", "own", "as large as the batch"],
)
def test_matrix_products(func: Any, shape: tuple[int, ...], args: tuple[Tensor, ...]) -> None:
    used = [x for x in (MATRIX, SQUARE) if any(x is value for value in (func.__globals__[n] for n in
            ("MATRIX", "SQUARE") if n in func.__code__.co_names))]  # fmt: skip
    check(func, start(*shape), args, used)


def test_tuples_and_scalar_samples() -> None:
    def func(t: Tensor, y: tuple[Tensor, ...], p: Tensor) -> tuple[Tensor, ...]:
        q, v = y
        return v.sum((-1, -2)) - q * p, -v * q[:, None, None] * t

    check(func, (start(), start(2, 2)), (learnt(BATCH),))
    check(lambda t, y, p: -p * y + t, start(), (learnt(BATCH),))


def test_what_belongs_to_samples_and_what_they_share() -> None:
    numbers = torch.arange(BATCH, dtype=torch.float64)[:, None]
    flags = numbers > 2

    def func(t: Tensor, y: Tensor, p: Tensor, q: Tensor, r: Tensor, many: Tensor) -> Tensor:
        own = torch.where(flags, p.exp(), -p.flip(0)) + 0.1 * numbers + 0.1 * torch.arange(BATCH)[:, None]
        padded = functional.pad(q[:1], (0, 1), value=5.0)  # no number of q
        own = own + 0.01 * padded + torch.ones(2, dtype=torch.int64).view(torch.float64)
        own = own * (torch.arange(BATCH) > 1).unsqueeze(-1) - p[2] + 0.1 * many[:, 1] - many.sum(1)
        return own * y + functional.softplus(q) * torch.sin(t) + r.sum() * y.sum(-1, keepdim=True)

    check(func, start(2), (learnt(BATCH, 2), learnt(2), learnt(7), learnt(BATCH, 3, 2)))


def test_a_batch_of_one() -> None:
    y0, p = learnt(1, 2), learnt(1, 1)
    check_like_eager(lambda t, y, p: -p * y * t + y.mean() + y[0], y0, [y0, p], (p,), T)


def test_derivatives_inside() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def hamiltonian(t: Tensor, y: Tensor) -> Tensor:
        grad = torch.func.grad(lambda z: net(z).sum())(y)
        return torch.cat([grad[:, 2:], -grad[:, :2]], -1)

    def dissipative(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            (grad,) = torch.autograd.grad(net(y).sum(), y, create_graph=True)
        return -grad

    for func in (hamiltonian, dissipative):
        weights = [p for name, p in net.named_parameters() if name != "2.bias"]
        check(func, start(4), others=weights)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return -y


def test_counters_are_kept_up() -> None:
    func = Counting()
    with torch.no_grad():
        sol = aca_ext.solve(func, start(2), T, options=INDEPENDENT, engine="compiled")
    assert func.calls == sol.stats.n_f_evals


SHARED = torch.tensor([[3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "func",
    [
        lambda t, y: y - y.mean(0),
        lambda t, y: y / y.sum(),
        lambda t, y: y - y[0],
        lambda t, y: y - y[:1],
        lambda t, y: y.flip(0),
        lambda t, y: y.roll(1, 0),
        lambda t, y: y.cumsum(0),
        lambda t, y: y @ (y.T @ y),
        lambda t, y: (y[:, None] - y[None]).sum(1),
        lambda t, y: y.reshape(2, BATCH).T,
        lambda t, y: y[torch.arange(BATCH - 1, -1, -1)],
        lambda t, y: y - torch.cat([y[1:], y[:1]]),
        lambda t, y: y.softmax(0),
        lambda t, y: y * t.amax(),
    ],
)
def test_samples_that_depend_on_one_another_are_refused(func: Any) -> None:
    with pytest.raises(errors.CompileError, match="samples alike"):
        aca_ext.odeint(func, start(2), T, options=INDEPENDENT, engine="compiled")


def random(t: Tensor, y: Tensor) -> Tensor:
    return y * torch.rand(1)


def without_gradient(t: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        k = y * 2
    return k


def branching(t: Tensor, y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("func", "match"),
    [
        (random, "random"),
        (without_gradient, "no_grad"),
        (branching, "traced"),
        (lambda t, y: torch.fft.fft(y).real, "."),
        (lambda t, y: y.sort(-1)[0], "sort"),
        (lambda t, y: functional.conv1d(y[:, None], torch.ones(1, 1, 3).double(), padding=1)[:, 0], "convolution"),
        (lambda t, y: y.to(torch.float32).double(), "float32"),
        (lambda t, y: torch.linalg.solve(torch.eye(2).double() + y[:, :, None] * y[:, None], y), "."),
    ],
)
@pytest.mark.usefixtures("no_evaluations")
def test_what_lanes_do_not_have_is_named(func: Any, match: str) -> None:
    with torch.no_grad():
        found, expected = (
            aca_ext.solve(func, start(2), T, options=INDEPENDENT, rtol=0.1, atol=0.1, engine=engine)
            for engine in ("compiled", "eager")
        )
    assert found.stats.compiled == ""
    assert re.search(match, found.stats.reason)
    if func is not random:
        torch.testing.assert_close(found.y, expected.y)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gradient": "direct"}, "gradient"),
        ({"callback": print}, "callback"),
        ({"y0": torch.ones(2, 2, dtype=torch.complex128)}, "complex"),
        ({"y0": torch.ones(2, 2, dtype=torch.float16), "rtol": 0.1}, "float16"),
    ],
)
@pytest.mark.usefixtures("no_evaluations")
def test_arguments_that_lanes_do_not_take(settings: dict[str, Any], match: str) -> None:
    call = {"y0": start(2), "options": INDEPENDENT, "engine": "compiled"} | settings
    y0 = call.pop("y0")
    assert match in aca_ext.solve(lambda t, y: -y, y0, T.float(), **call).stats.reason
    alone = {**INDEPENDENT, "step_t": torch.tensor([0.5])}  # for lanes only
    with pytest.raises(errors.CompileError, match=f"need compiled lanes.*{match}"):
        aca_ext.solve(lambda t, y: -y, y0, T.float(), **{**call, "options": alone})


def test_second_derivatives_are_refused() -> None:
    y0 = start(2)
    y = aca_ext.odeint(lambda t, y: -y * y, y0, T, options=INDEPENDENT, engine="compiled")
    with pytest.raises(errors.CompileError, match="second derivatives"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


@pytest.mark.parametrize("func", [lambda t, y: y[:, :1], lambda t, y: (y, y), lambda y, t: y, lambda t, y: 3])
def test_a_slope_that_is_none(func: Any) -> None:
    with pytest.raises(errors.AcaError) as expected:
        aca_ext.odeint(func, start(2), T, options=INDEPENDENT)
    with pytest.raises(type(expected.value)):
        aca_ext.odeint(func, start(2), T, options=INDEPENDENT, engine="compiled")


@pytest.mark.usefixtures("no_evaluations")
def test_code_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from aca_ext.engines.ensemble import operations, rules

    for factor, k in ((1.001, "{g}"), (1.0, None)):  # a wrong value, and a wrong gradient
        text = f"maximum({{0}}, {{1}}) * K({factor})"
        monkeypatch.setitem(rules.RULES, torch.ops.aten.maximum, rules._each(operations.Operation(text, ("{g}", k))))
        stats = aca_ext.solve(
            lambda t, y, f=factor: torch.maximum(y, (1 + f) * y), start(2), T, options=INDEPENDENT, engine="compiled"
        ).stats
        assert "does not compute what func does" in stats.reason


@pytest.mark.usefixtures("no_evaluations")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from aca_ext.engines.ensemble import build

    monkeypatch.setattr(build, "_command", lambda: ("no-such-compiler",))
    stats = aca_ext.solve(lambda t, y: -1.2345 * y, start(2), T, options=INDEPENDENT, engine="compiled").stats
    assert "no-such-compiler cannot be run" in stats.reason


@pytest.mark.usefixtures("no_evaluations")
def test_without_a_compiler_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    from aca_ext.engines.ensemble import build

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    monkeypatch.setattr(build, "_command", build._command.__wrapped__)  # without its cache
    stats = aca_ext.solve(lambda t, y: -1.2346 * y, start(2), T, options=INDEPENDENT, engine="compiled").stats
    assert "No working C++ compiler" in stats.reason


def test_numbers_that_change_compile_once_more_at_most() -> None:
    seconds = []
    for rate in (0.5, 0.6, 0.7, 0.8):
        sol = aca_ext.solve(lambda t, y, rate=rate: -rate * y, start(2), T, options=INDEPENDENT, engine="compiled")
        exact = start(2) * torch.exp(-rate * T).view(-1, 1, 1)
        torch.testing.assert_close(sol.y, exact, rtol=1e-6, atol=0)
        seconds.append(sol.stats.compile_seconds)
    assert seconds[2:] == [0.0, 0.0]


def test_a_layer_is_trained_with_batches_of_any_size() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(y)

    layer = aca_ext.NeuralODE(Slope(), options=INDEPENDENT, engine="compiled", rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for size in (7, 7, 5, 7, 7, 7, 3, 7, 7, 7):
        x = sample(size, 2).float()
        optimizer.zero_grad()
        loss = (layer(x) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        if size == 7:
            losses.append(loss.item())
    assert losses[-1] < losses[0]
