"""Module buffers that func updates, such as BatchNorm's statistics: only accepted evaluations move them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from autograd_reference import relative_error
from problems import LOOSE, Mlp, sample
from torch import Tensor, nn

import aca_ext

pytestmark = pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)

# first_step far too large: the first trials are rejected.
REJECTING = {"rtol": 1e-6, "atol": 1e-6, "options": {"first_step": 1.0}}


class Normalised(nn.Module):
    """A slope with BatchNorm, which in training mode updates buffers in every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, self.norm(y)) * 3

    def statistics(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self.named_buffers()}


def replayed_statistics(steps: Sequence[tuple[float, float]], y0: Tensor) -> dict[str, Tensor]:
    """Statistics after one evaluation of each stage of the accepted steps; the first stage is the previous last one."""
    func = Normalised()
    tableau = aca_ext.METHODS["dopri5"]
    a = [[float(x) for x in row] for row in tableau.a]
    y, k = y0, []
    with torch.no_grad():
        for i, (t, t_next) in enumerate(steps):
            h = t_next - t
            k = [func(torch.tensor(t, dtype=torch.float64), y)] if i == 0 else [k[-1]]
            for row in a[1:]:
                stage = y + sum((h * w) * k_j for w, k_j in zip(row, k, strict=True))
                k.append(func(torch.tensor(t, dtype=torch.float64), stage))
            y = stage
    return func.statistics()


@pytest.mark.parametrize("first_step", [None, 1.0])
@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_batchnorm_statistics_move_on_accepted_stages_alone(gradient: str, first_step: float | None) -> None:
    y0 = sample(16, 3).requires_grad_()
    func = Normalised()
    options = {} if first_step is None else {"first_step": first_step}
    sol = aca_ext.solve(func, y0, T, gradient=gradient, rtol=1e-6, atol=1e-6, options=options)
    assert first_step is None or sol.stats.n_rejected > 0
    after_forward = func.statistics()
    assert int(after_forward["norm.num_batches_tracked"]) == 1 + 6 * sol.stats.n_accepted
    for name, expected in replayed_statistics(sol.steps.tolist(), y0).items():
        torch.testing.assert_close(after_forward[name], expected, rtol=1e-12, atol=1e-14)
    sol.y.sum().backward()
    for name, expected in after_forward.items():
        assert torch.equal(func.statistics()[name], expected)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_batchnorm_statistics_with_a_gradient_of_time(gradient: str) -> None:
    func = Normalised()
    t = T.clone().requires_grad_()
    sol = aca_ext.solve(func, sample(16, 3), t, gradient=gradient, rtol=1e-6, atol=1e-6)
    assert int(func.norm.num_batches_tracked) == 1 + 6 * sol.stats.n_accepted
    sol.y.square().sum().backward()
    assert int(func.norm.num_batches_tracked) == 1 + 6 * sol.stats.n_accepted


class Holder:
    """An object that is not a module, but holds one in a list."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [module]

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        return self.parts[0](t, y)

    __call__ = slope


def through_a_global(t: Tensor, y: Tensor) -> Tensor:
    return GLOBAL[0](t, y)


GLOBAL: list[nn.Module] = []
WRAPPINGS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "lambda": lambda module: lambda t, y: module(t, y),
    "lambda of a lambda": lambda module: (lambda inner: lambda t, y: inner(t, y))(lambda t, y: module(t, y)),
    "partial": lambda module: functools.partial(lambda module, t, y: module(t, y), module),
    "default value": lambda module: lambda t, y, module=module: module(t, y),
    "bound method of the module": lambda module: module.forward,
    "bound method of an object": lambda module: Holder(module).slope,
    "callable object": Holder,
    "global": lambda module: (GLOBAL.clear(), GLOBAL.append(module), through_a_global)[-1],
}


@pytest.mark.parametrize("gradient", ["aca", "direct"])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_batchnorm_behind_a_callable(name: str, gradient: str) -> None:
    module = Normalised()
    func = WRAPPINGS[name](module)
    sol = aca_ext.solve(func, sample(16, 3).requires_grad_(), T, gradient=gradient, **REJECTING)
    assert sol.stats.n_rejected > 0
    assert int(module.norm.num_batches_tracked) == 1 + 6 * sol.stats.n_accepted
    after_forward = module.statistics()
    sol.y.sum().backward()
    for buffer, expected in zip(module.buffers(), after_forward.values(), strict=True):
        assert torch.equal(buffer, expected)


def test_batchnorm_in_evaluation_mode() -> None:
    func = Normalised().eval()
    before = func.statistics()
    aca_ext.odeint(func, sample(16, 3), T, **LOOSE).sum().backward()
    for name, expected in before.items():
        assert torch.equal(func.statistics()[name], expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batchnorm_gradient(create_graph: bool) -> None:
    found = []
    for gradient in ("aca", "direct"):
        func, y0 = Normalised(), sample(16, 3).requires_grad_()
        y = aca_ext.odeint(func, y0, T, gradient=gradient, **REJECTING)
        found.append(torch.autograd.grad(y.square().sum(), [y0, *func.parameters()], create_graph=create_graph))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-11
