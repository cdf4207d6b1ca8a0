"""Compatibility with torchdiffeq: equal calls give equal results."""

from __future__ import annotations

import pytest
import torch
from autograd_reference import relative_error
from problems import CoupledMlp, LotkaVolterra, Mlp, sample
from torch import nn

import aca_ext
from aca_ext import torchdiffeq as drop_in

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


class TestTorchdiffeq:
    """Replacing ``from torchdiffeq import odeint`` gives the same solution, to tolerance, from the same call."""

    @pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
    @pytest.mark.parametrize("times", [[0.0, 0.5, 2.0], [2.0, 0.7, 0.0]])
    def test_adaptive(self, method: str, times: list[float]) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint
        t, func = torch.tensor(times, dtype=torch.float64), LotkaVolterra()
        y0 = torch.ones(2, dtype=torch.float64)
        tolerance, precision = {"adaptive_heun": (1e-4, 1e-2), "fehlberg2": (1e-5, 0.1)}.get(method, (1e-6, 1e-4))
        call = {"method": method, "rtol": tolerance, "atol": tolerance}
        call["options"] = {"max_num_steps": 10_000, "safety": 0.8}
        torch.testing.assert_close(aca_ext.odeint(func, y0, t, **call), theirs(func, y0, t, **call),
                                   rtol=precision, atol=precision)  # fmt: skip

    @pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
    def test_fixed(self, method: str) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint
        t, func = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), LotkaVolterra()
        y0 = torch.ones(2, dtype=torch.float64)
        for options in ({}, {"step_size": 0.125}):
            call = {"method": method, "options": options}
            torch.testing.assert_close(aca_ext.odeint(func, y0, t, **call), theirs(func, y0, t, **call),
                                       rtol=1e-12, atol=1e-13)  # fmt: skip

    @pytest.mark.parametrize("is_tuple", [False, True])
    def test_gradients(self, is_tuple: bool) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint_adjoint
        found = []
        for odeint in (aca_ext.odeint, theirs):
            func: nn.Module = CoupledMlp() if is_tuple else Mlp()
            y0 = [sample(4, 3).requires_grad_(), sample(3, seed=1).requires_grad_()][: 2 if is_tuple else 1]
            ys = odeint(
                func,
                tuple(y0) if is_tuple else y0[0],
                torch.tensor([0.0, 0.5, 1.5]),
                rtol=1e-9,
                atol=1e-9,
                method="dopri5",
                options={"first_step": 0.01},
                adjoint_rtol=1e-9,
                adjoint_atol=1e-9,
                adjoint_method="dopri5",
                adjoint_options={"first_step": 0.01},
                adjoint_params=tuple(func.parameters()),
            )
            assert isinstance(ys, tuple) == is_tuple
            parts = list(ys) if is_tuple else [ys]
            loss = sum(part.square().sum() for part in parts)
            found.append([*parts, *torch.autograd.grad(loss, [*y0, *func.parameters()])])
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-6

    @pytest.mark.parametrize("gradient", ["aca", "adjoint"])
    def test_keywords_of_the_adjoint_reach_it(self, gradient: str) -> None:
        counts = []
        for tolerance in (1e-3, 1e-9):
            y0 = sample(2, 3).requires_grad_()
            func = Mlp()
            calls = []
            func.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            y = aca_ext.odeint(func, y0, T, gradient=gradient, rtol=1e-5, atol=1e-5,
                               adjoint_rtol=tolerance, adjoint_atol=tolerance)  # fmt: skip
            calls.clear()
            y[-1].sum().backward()
            counts.append(len(calls))
        assert (counts[0] < counts[1]) == (gradient == "adjoint")

    def test_times_receive_the_same_gradient(self) -> None:
        theirs = pytest.importorskip("torchdiffeq").odeint_adjoint
        found = []
        for odeint in (aca_ext.odeint, theirs):
            t = torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64, requires_grad=True)
            odeint(Mlp(), sample(2, 3), t, rtol=1e-9, atol=1e-9).square().sum().backward()
            found.append(t.grad)
        assert relative_error(*found) <= 1e-6

    @pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
    def test_times_of_fixed_steps_receive_the_same_gradient(self, method: str) -> None:
        torchdiffeq = pytest.importorskip("torchdiffeq")
        found = []
        for odeint in (aca_ext.odeint, drop_in.odeint, torchdiffeq.odeint):
            t = torch.tensor([0.0, 0.5, 0.8, 1.5], dtype=torch.float64, requires_grad=True)
            odeint(Mlp(), sample(2, 3), t, method=method).square().sum().backward()
            found.append(t.grad)
        assert relative_error(found[0], found[2]) <= 1e-12
        assert relative_error(found[1], found[2]) <= 1e-12
