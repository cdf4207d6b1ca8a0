"""Flows whose samples are trees of tensors: the same numbers as for one tensor with all elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from aca_ext import flows, solve
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, SlopeError

# PyTorch's own decompositions for forward mode, imported at its first use, call torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

DTYPE = torch.float64
SETTINGS = {"rtol": 1e-7, "atol": 1e-9}
TIMES = (0.0, 1.0)
Tree = dict[str, Any]


def split(y: Tensor) -> Tree:
    """(batch, 7) as a tree of positions (batch, 2, 2) and two others."""
    return {"position": y[:, :4].reshape(-1, 2, 2), "others": (y[:, 4], y[:, 5:])}


def joined(y: Tree) -> Tensor:
    return torch.cat([y["position"].flatten(1), y["others"][0][:, None], y["others"][1]], 1)


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 7)).to(DTYPE)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=DTYPE))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * (1 + t)


class OfTree(nn.Module):
    def __init__(self, velocity: Velocity) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, t: Tensor, y: Tree) -> Tree:
        return split(self.velocity(t.reshape(-1, 1) if t.dim() else t, joined(y)))


class Base:
    """A distribution of trees."""

    def __init__(self) -> None:
        self.flat = Independent(Normal(torch.zeros(7, dtype=DTYPE), torch.ones(7, dtype=DTYPE)), 1)

    def log_prob(self, z: Tree) -> Tensor:
        return self.flat.log_prob(joined(z))

    def sample(self, shape: tuple[int]) -> Tree:
        return split(self.flat.sample(shape))


def data() -> Tensor:
    return torch.randn(5, 7, dtype=DTYPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", flows.divergence.KINDS)
@pytest.mark.parametrize("settings", [{}, {"error_norm": "state"}, {"options": {"batch": "independent"}}], ids=str)
def test_likelihood_is_that_of_vectors(kind: str, settings: dict[str, Any]) -> None:
    velocity, x = Velocity(), data().requires_grad_()
    penalties = flows.divergence.PENALTIES
    of_tree, of_vectors = (flows.with_divergence(f, kind, penalties=penalties) for f in (OfTree(velocity), velocity))
    if kind == "hutchinson":
        torch.manual_seed(0)
        settings = {**settings, "probes": of_tree.draw_probes(split(x))}
        assert settings["probes"].shape == (5, 1, 7)
    found = flows.likelihood(of_tree, split(x), TIMES, Base(), **settings, **SETTINGS)
    expected = flows.likelihood(of_vectors, x, TIMES, Base().flat, **settings, **SETTINGS)
    assert set(found.z) == {"position", "others"}
    tolerance = {"rtol": 1e-3, "atol": 1e-3}  # the largest norm of the components chooses other steps
    torch.testing.assert_close(found.log_prob, expected.log_prob, **tolerance)
    torch.testing.assert_close(joined(found.z), expected.z, **tolerance)
    torch.testing.assert_close(found.penalties, expected.penalties, **tolerance)
    inputs = (x, *velocity.parameters())
    grads = [torch.autograd.grad(one.log_prob.sum(), inputs) for one in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_fixed_steps_of_engines(engine: str) -> None:
    velocity, x = Velocity(), data()
    settings = {"engine": engine, "method": "rk4", "options": {"n_steps": 4}}
    found = flows.log_prob(OfTree(velocity), split(x), TIMES, Base(), **settings)
    expected = flows.log_prob(velocity, x, TIMES, Base().flat, **{**settings, "engine": "eager"})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_samples() -> None:
    velocity, z = Velocity(), data()
    found = flows.sample(OfTree(velocity), split(z), TIMES, **SETTINGS)
    torch.testing.assert_close(joined(found), flows.sample(velocity, z, TIMES, **SETTINGS), rtol=1e-4, atol=1e-4)
    drawn, density = flows.sample_and_log_prob(OfTree(velocity), 3, TIMES, Base(), rtol=1e-8, atol=1e-8)
    assert drawn["position"].shape == (3, 2, 2)
    again = flows.log_prob(OfTree(velocity), drawn, TIMES, Base(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(again, density, rtol=1e-5, atol=1e-5)


def test_inside_transforms() -> None:
    func, x = OfTree(Velocity()), data()
    settings = {"method": "rk4", "options": {"n_steps": 4}}
    found = torch.func.grad(lambda x: flows.log_prob(func, split(x), TIMES, Base(), **settings).sum())(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(flows.log_prob(func, split(x), TIMES, Base(), **settings).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_norm_of_the_state() -> None:
    field = flows.with_divergence(OfTree(Velocity()))
    state = field.start(split(data()))
    solution = solve(field, state, TIMES, options={"norm": flows.state_norm}, **SETTINGS)
    assert solution.y[1].shape == (2, 5)
    found = flows.state_norm((split(data()), torch.full((5,), torch.inf)))
    torch.testing.assert_close(found, data().square().mean().sqrt())


class TestErrors:
    @pytest.mark.parametrize(
        ("y", "error", "match"),
        [
            ({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)}, ArgumentValueError, r"y\['b'\].*leading dimensions"),
            ({"a": torch.zeros(3, 2), "b": torch.zeros(3, 2, dtype=DTYPE)}, ArgumentValueError, "share their dtype"),
            ({"a": torch.zeros(3, 2), "b": torch.zeros(())}, ArgumentValueError, "batch_dims=0"),
            (
                {"a": torch.zeros(3, 2), "b": torch.zeros(3, dtype=torch.int64)},
                ArgumentTypeError,
                r"y\['b'\] is torch.i",
            ),
            ({}, ArgumentValueError, "empty"),
        ],
    )
    def test_states(self, y: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            flows.log_prob(lambda t, y: y, y, TIMES, Base())

    def test_slopes(self) -> None:
        y = {"a": torch.zeros(3, 2), "b": torch.zeros(3)}
        for func, message in (
            (lambda t, y: y["a"], "func's output"),
            (lambda t, y: {"a": y["a"], "b": y["a"]}, r"func's output\['b'\] has shape \(3, 2\)"),
        ):
            with pytest.raises(SlopeError, match=message):
                flows.log_prob(func, y, TIMES, Base())

    def test_a_base_of_single_components(self) -> None:
        class Sum:
            def log_prob(self, z: Tree) -> Tensor:
                return -z["a"].square()

        y = {"a": torch.zeros(3, 2), "b": torch.zeros(3)}
        with pytest.raises(ArgumentValueError, match="add up those of the components"):
            flows.log_prob(lambda t, y: y, y, TIMES, Sum())
