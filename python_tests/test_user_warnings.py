"""Warnings: given once, only if they help, and attributed to the line of the user's call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from problems import CoupledMlp, Mlp, sample
from torch import nn

import aca_ext
from aca_ext import errors

INDEPENDENT = {"batch": "independent"}


def given(call: Any) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return seen


class TestTimeResolution:
    @pytest.mark.parametrize(
        ("start", "length", "dtype", "is_poor"),
        [
            (1.7e9, 3600.0, torch.float32, True),
            (-1.7e9, 3600.0, torch.complex64, True),
            (1.7e9, -3600.0, torch.float32, True),
            (1.7e9, 3600.0, torch.float64, False),
            (1.7e9, 3600.0, torch.complex128, False),
            (0.0, 1e9, torch.float32, False),
            (1000.0, 10.0, torch.float32, False),
            (2020.0, 3.0, torch.float32, False),
            (2020.0, 0.1, torch.float32, True),
            (0.0, 1.0, torch.bfloat16, False),
            (20.0, 1.0, torch.bfloat16, True),
        ],
    )
    @pytest.mark.parametrize("options", [{}, {"step_size": 1.0}, INDEPENDENT])
    def test_where_times_are_poorly_resolved(
        self, start: float, length: float, dtype: torch.dtype, is_poor: bool, options: dict[str, Any]
    ) -> None:
        t = torch.tensor([start, start + length], dtype=torch.float64)
        options = {"step_size": abs(length) / 4} if "step_size" in options else options
        y0 = torch.ones(2, 1, dtype=dtype)
        seen = given(lambda: aca_ext.odeint(lambda t, y: 0 * y, y0, t, rtol=0.1, atol=0.1, options=options))
        assert [w.category for w in seen] == [errors.TimeResolutionWarning] * is_poor
        if is_poor:
            assert "Shift t" in str(seen[0].message)
            assert seen[0].filename == __file__

    def test_small_steps_count(self) -> None:
        def poor(n: int) -> int:
            t = torch.linspace(1000.0, 1010.0, n, dtype=torch.float64)
            return len(given(lambda: aca_ext.odeint(lambda t, y: -y, torch.ones(1), t, method="euler")))

        assert (poor(11), poor(10001)) == (0, 1)

    def test_of_the_sample_that_is_worst(self) -> None:
        t = torch.tensor([[0.0, 1.0], [1.7e9, 1.7e9 + 60]], dtype=torch.float64)
        call = lambda: aca_ext.odeint(lambda t, y: 0 * y, torch.ones(2, 1), t, options=INDEPENDENT)  # noqa: E731
        assert [w.category for w in given(call)] == [errors.TimeResolutionWarning]

    def test_not_of_backward_solves_and_resumed_parts(self) -> None:
        t = torch.linspace(1000, 1010, 101, dtype=torch.float64)
        y0 = torch.ones(1, requires_grad=True)
        assert not given(lambda: aca_ext.odeint(lambda t, y: -y, y0, t, gradient="adjoint")[-1].sum().backward())


class TestBatchStatistics:
    def field(self, norm: nn.Module) -> Any:
        net = nn.Sequential(nn.Linear(3, 3), norm).double()
        return lambda t, y: net(y)

    def test_once_for_each_module(self) -> None:
        func = self.field(nn.BatchNorm1d(3))
        seen = given(lambda: [aca_ext.odeint(func, sample(8, 3), [0.0, 1.0], rtol=1e-2) for _ in range(3)])
        assert [w.category for w in seen] == [errors.BatchStatisticsWarning]
        assert "GroupNorm" in str(seen[0].message)
        assert seen[0].filename == __file__

    @pytest.mark.parametrize(
        "norm",
        [nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3).eval(), nn.GroupNorm(1, 3)],
    )
    def test_not_of_what_is_recommended(self, norm: nn.Module) -> None:
        assert not given(lambda: aca_ext.odeint(self.field(norm), sample(8, 3), [0.0, 1.0], rtol=1e-2))


class TestUnregisteredParameters:
    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    def test_once_for_each_layer(self, gradient: str) -> None:
        net, rate = Mlp(), torch.ones((), dtype=torch.float64, requires_grad=True)
        layer = aca_ext.NeuralODE(lambda t, y: rate * net(t, y), gradient=gradient, rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            assert not given(lambda: layer(sample(2, 3)))
        seen = given(lambda: [layer(sample(2, 3)) for _ in range(2)])
        assert [w.category for w in seen] == [errors.UnregisteredParameterWarning]
        assert "5 parameters" in str(seen[0].message)
        assert seen[0].filename == __file__

    def test_of_a_tuple_state(self) -> None:
        net = CoupledMlp()
        seen = given(lambda: aca_ext.NeuralODE(lambda t, y: net(t, y))((sample(4, 3), sample(3))))
        assert len(seen) == 1

    def test_not_where_none_is_missing(self) -> None:
        net, y0 = Mlp(), sample(2, 3).requires_grad_()
        assert not given(lambda: aca_ext.NeuralODE(net)(y0))
        assert not given(lambda: aca_ext.NeuralODE(lambda t, y: -y)(y0))
        assert not given(lambda: aca_ext.NeuralODE(lambda t, y: -y)(2 * y0))
        assert not given(lambda: aca_ext.NeuralODE(lambda t, y, rate: -rate * y)(y0, args=(y0.sum(),)))
        assert not given(lambda: aca_ext.NeuralODE(net.forward, params=list(net.parameters()))(y0))
        t = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert not given(lambda: aca_ext.NeuralODE(lambda t, y: -y, t)(y0))

    def test_not_of_parameters_that_the_layer_holds_otherwise(self) -> None:
        net = Mlp()
        layer = aca_ext.NeuralODE(lambda t, y: net(t, y))
        layer.net = net
        assert not given(lambda: layer(sample(2, 3)))


def test_no_warning_says_the_same_twice_by_default() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        for _ in range(3):
            aca_ext.odeint(lambda t, y: 0 * y, torch.ones(1), [1.7e9, 1.7e9 + 60], rtol=1e-2)
    assert len(seen) == 1
