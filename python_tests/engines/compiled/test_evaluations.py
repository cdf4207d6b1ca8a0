"""engine="compiled" by compiled evaluations of func: the steps, outputs and gradients of the eager engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from autograd_reference import relative_error
from problems import sample
from torch import Tensor, nn

from aca_ext import Event, NeuralODE, odeint, solve
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.errors import CompileError, ReplayError, SlopeError

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

D = torch.float64
T = torch.tensor([0.0, 0.2, 0.5], dtype=D)
TOLERANCES: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "method": "bosh3"}
W = sample(4, 4, seed=5).requires_grad_()
GRID, VALUES = torch.linspace(0, 1, 5, dtype=D), sample(5, seed=6)
REASON = "no program, for a test"


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles evaluations alone, whatever their time, by a backend that is quick: all but Inductor."""
    from torch._dynamo.backends.debugging import aot_eager

    from aca_ext.engines.compiled import compiled_graph, graph_check
    from aca_ext.engines.ensemble import engine as ensemble_engine

    for module in (compiled_engine, ensemble_engine):
        monkeypatch.setattr(module, "obstacle_to_programs", lambda *_, **__: REASON)
    monkeypatch.setattr(graph_check, "is_worthwhile", lambda *_: True)
    monkeypatch.setattr(compiled_graph, "backend", aot_eager)


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes compiled evaluations, whatever their time."""
    from aca_ext.engines.compiled import graph_check

    monkeypatch.setattr(graph_check, "is_worthwhile", lambda *_: True)


def both(
    func: Any, y0: Any, t: Any = T, inputs: tuple[Tensor, ...] = (), compiled: str = "evaluations", **settings: Any
) -> Any:
    """Solves with both engines and asserts equal steps, outputs, counts and gradients of y0 and ``inputs``."""
    leaves = [x.requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    modules = list(func.parameters()) if isinstance(func, nn.Module) else []
    wanted = [*leaves, *modules, *inputs]
    found = []
    for engine in ("compiled", "eager"):
        torch.manual_seed(0)
        solution = solve(func, y0, t, engine=engine, **{**TOLERANCES, **settings})
        parts = solution.y if isinstance(solution.y, tuple) else (solution.y,)
        grads = torch.autograd.grad(sum(x.abs().square().sum() for x in parts), wanted, allow_unused=True)
        found.append((solution, parts, grads))
    (ours, y, grads), (eager, expected, exact) = found
    assert ours.stats.compiled == compiled, ours.stats.reason
    assert (ours.stats.reason == "") == (compiled == "solve")
    rounding = {torch.float32: 1e-4}.get(y[0].real.dtype, 1e-10)
    bounds = [x if isinstance(x, tuple) else (x,) for x in (ours.steps, eager.steps)]
    for one, other in zip(*bounds, strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)
    for count in ("n_f_evals", "n_steps", "n_f_evals_backward"):
        assert torch.equal(*(torch.as_tensor(getattr(s.stats, count)) for s in (ours, eager))), count
    for one, other in [*zip(y, expected, strict=True), *zip(grads, exact, strict=True)]:
        assert (one is None) == (other is None)
        if one is not None:
            assert relative_error(one, other) < rounding
    return ours


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos() * 1.01  # not the derivative, so that its use can be seen


def energy(y: Tensor) -> Tensor:
    return torch.tanh(y @ W).square().sum()


def by_autograd(t: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        y = y.requires_grad_(True)
        return -torch.autograd.grad(energy(y), y, create_graph=True)[0]


def attention(t: Tensor, y: Tensor) -> Tensor:
    q, k = (y @ W).unsqueeze(0), y.unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, k)[0]


def checkpointed(t: Tensor, y: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda y: torch.tanh(y @ W), y, use_reentrant=False)


def looked_up(t: Tensor, y: Tensor) -> Tensor:
    i = torch.searchsorted(GRID, t.reshape(1)).clamp(max=4)
    return y * VALUES[i] @ W


def along_complex(t: Tensor, y: Tensor) -> Tensor:
    z = torch.view_as_complex(y.reshape(3, 2, 2)) * (1j - 0.2) * torch.exp(1j * t)
    return torch.view_as_real(z).reshape(3, 4) @ W


class Conv(nn.Module):
    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.GELU(), nn.Conv1d(3, 2, 1))
        self.to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(t)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.cell = nn.GRUCell(4, 4).double()
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).double()
        self.norm, self.drop = nn.BatchNorm1d(4).double(), nn.Dropout(0.3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drop(self.norm(self.cell(self.normed(y), y)))


FIELDS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "fft": lambda t, y: torch.fft.irfft(torch.fft.rfft(y @ W) * 1j, n=4),
    "cumsum": lambda t, y: y.cumsum(-1) @ W,
    "linear solve": lambda t, y: torch.linalg.solve(3 * torch.eye(4, dtype=D) + W, y.T).T,
    "roll": lambda t, y: (y.roll(1, -1) - 2 * y + y.roll(-1, -1)) @ W,
    "searchsorted": looked_up,
    "complex": along_complex,
    "autograd.Function": lambda t, y: Straight.apply(y) @ W,
    "checkpoint": checkpointed,
    "autograd": by_autograd,
    "torch.func": lambda t, y: -torch.func.grad(energy)(y),
    "indices": lambda t, y: y[:, torch.tensor([1, 0, 3, 2])] @ W,
    "sort": lambda t, y: y.sort(-1).values @ W,
    "matrix exponential": lambda t, y: y @ torch.linalg.matrix_exp(W),
    "einsum": lambda t, y: torch.einsum("bi,ij->bj", y, W),
    "its argument": lambda t, y: y,
    "no state": lambda t, y: (W[:3] * t).cos(),
}
UNTRACED: dict[str, Callable[..., Any]] = {
    "sparse": lambda t, y: torch.sparse.mm(SPARSE, (y @ W).T).T,
    "branch": lambda t, y: y @ W if y.sum() > 0 else -y @ W,
    "dropout": lambda t, y: F.dropout(y @ W, 0.5),
    "item": lambda t, y: y @ W * VALUES[int(torch.searchsorted(GRID, t))],
}
SPARSE = (sample(4, 4, seed=8) * (sample(4, 4, seed=9) > 0)).to_sparse_coo()


@pytest.mark.usefixtures("no_programs")
class TestFields:
    @pytest.mark.parametrize("name", FIELDS)
    def test_that_people_write(self, name: str) -> None:
        both(FIELDS[name], sample(3, 4) / 3, inputs=(W,))

    @pytest.mark.parametrize("name", UNTRACED)
    def test_that_run_uncompiled(self, name: str) -> None:
        solution = both(UNTRACED[name], sample(3, 4) / 3, inputs=(W,), compiled="")
        assert {"dropout": "random numbers"}.get(name, "cannot be traced") in solution.stats.reason

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_convolutions(self, dtype: torch.dtype) -> None:
        both(Conv(dtype), sample(3, 2, 5).to(dtype))
