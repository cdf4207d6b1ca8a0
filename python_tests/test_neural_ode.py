"""The module NeuralODE, and a solve inside a compiled model."""

from __future__ import annotations

import math

import pytest
import torch
from problems import LOOSE, Mlp, decay, sample
from torch import nn

import aca_ext
from aca_ext import errors


class TestNeuralODE:
    def test_is_odeint(self) -> None:
        func, y0 = Mlp(), sample(2, 3)
        times = (0.0, 0.3, 1.0)
        expected = aca_ext.odeint(func, y0, torch.tensor(times, dtype=torch.float64), **LOOSE)
        layer = aca_ext.NeuralODE(func, times, output="all", **LOOSE)
        assert layer.stats is None
        assert torch.equal(layer(y0), expected)
        assert layer.stats is not None
        assert layer.stats.n_accepted > 0
        assert torch.equal(aca_ext.NeuralODE(func, times, **LOOSE)(y0), expected[-1])
        assert torch.equal(layer(y0, t=(0.0, 1.0))[-1], expected[-1])

    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    def test_trains(self, gradient: str) -> None:
        model = nn.Sequential(aca_ext.NeuralODE(Mlp(), gradient=gradient, **LOOSE), nn.Linear(3, 1).double())
        assert len(list(model.parameters())) == 6
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        x = sample(16, 3)
        target = x.prod(1, keepdim=True)
        losses = []
        for _ in range(8):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_learns_its_times(self) -> None:
        t = nn.Parameter(torch.tensor([0.0, 0.5], dtype=torch.float64))
        layer = aca_ext.NeuralODE(decay, t)
        assert dict(layer.named_parameters())["t"] is t
        layer(torch.ones(1).double()).sum().backward()
        assert t.grad is not None
        assert t.grad[1].item() == pytest.approx(-math.exp(-0.5), rel=1e-5)

    def test_tuple_and_args(self) -> None:
        layer = aca_ext.NeuralODE(lambda t, y, rate: (-rate * y[0], y[0]), (0.0, 1.0))
        one, _ = layer((torch.ones(2), torch.zeros(2)), args=(0.5,))
        assert one.shape == (2,)
        assert one[0].item() == pytest.approx(math.exp(-0.5), rel=1e-5)

    def test_state_dict_and_copy(self) -> None:
        import copy
        import pickle

        layer = aca_ext.NeuralODE(Mlp(), (0.0, 1.0), **LOOSE)
        y = layer(sample(2, 3))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(sample(2, 3)), y)
        other = aca_ext.NeuralODE(Mlp(seed=1), (0.0, 1.0), **LOOSE)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(sample(2, 3)), y)

    def test_wrong_output(self) -> None:
        with pytest.raises(errors.ArgumentValueError, match=r'"end".*"all"'):
            aca_ext.NeuralODE(decay, output="last")


@pytest.mark.filterwarnings("default")  # torch's compiler warns
def test_a_model_is_compiled_around_its_solve() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), aca_ext.NeuralODE(lambda t, y: torch.sin(y) * t), torch.nn.Linear(3, 1)
    )
    x = torch.randn(4, 3)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="eager")
    found = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
