"""Whole solves with engine="graph" in the emulation: captured steps, and loops over them in one launch.

Emulated CUDA kernels and graphs make all steps; func runs in torch, as a node of the graph. The results are those of
the eager engine but for rounding, since the error norms are summed in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_capture import EmulatedCapturer, emulated_engine
from emulation import Emulation
from problems import LotkaVolterra, VanDerPol
from torch import Tensor, nn

from aca_ext import solve
from aca_ext.engines.cuda_graph import plan_cache

SOLVES: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "tsit5": {"method": "tsit5"},
    "bosh3 with outputs": {"method": "bosh3", "times": [0.0, 0.1, 0.11, 0.5, 1.0]},
    "dopri8": {"method": "dopri8"},
    "backward in time": {"times": [1.0, 0.4, 0.0]},
    "float32": {"dtype": torch.float32, "rtol": 1e-3, "atol": 1e-4},
    "fixed steps": {"method": "rk4", "options": {"step_size": 0.1}},
    "rejections": {"options": {"first_step": 0.9, "ifactor": 10.0}, "func": VanDerPol(5.0)},
    "more steps than room": {"method": "bosh3", "options": {"max_step": 0.015}},
}


@pytest.fixture(params=[False, True], ids=["launched ahead", "device loops"])
def capturer(request: pytest.FixtureRequest, cuda: Emulation) -> Iterator[EmulatedCapturer]:
    with emulated_engine(cuda, device_loops=request.param) as capturer:
        yield capturer
        assert bool(capturer.n_loops) == request.param
    plan_cache._by_owner.clear()


def solved(engine_name: str, func: nn.Module, y0: Tensor, times: list[float], settings: dict[str, Any]) -> Any:
    y0 = y0.clone().requires_grad_()
    solution: Any = solve(func, y0, torch.tensor(times), engine=engine_name, **settings)
    grads = torch.autograd.grad(solution.y.sin().sum(), [y0, *func.parameters()])
    return [solution.y.detach(), solution.steps, *grads], solution.stats


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.inner(y * torch.cos(t))
        return result


@pytest.mark.parametrize("name", SOLVES)
def test_equal_those_of_the_eager_engine(capturer: EmulatedCapturer, name: str) -> None:
    settings: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7, **SOLVES[name]}
    dtype, times = settings.pop("dtype", torch.float64), settings.pop("times", [0.0, 1.0])
    func = settings.pop("func", LotkaVolterra()).to(dtype)
    y0 = torch.tensor([1.0, 1.5], dtype=dtype)
    expected, stats = solved("eager", func, y0, times, settings)
    for _ in range(2):
        found, found_stats = solved("graph", func, y0, times, settings)
        assert found_stats.n_accepted == stats.n_accepted
        assert found_stats.n_rejected == stats.n_rejected
        assert_close(found, expected, 1e-6 if dtype == torch.float64 else 1e-4)
    assert name != "rejections" or stats.n_rejected
    assert name != "more steps than room" or stats.n_accepted > 64


def test_of_a_network(capturer: EmulatedCapturer) -> None:
    net, times = Net(), [0.0, 0.3, 2.0]
    for _ in range(2):
        y0 = torch.randn(5, 3, dtype=torch.float64)
        settings: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
        expected, _ = solved("eager", net, y0, times, settings)
        found, _ = solved("graph", net, y0, times, settings)
        assert_close(found, expected, 1e-6)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)  # captured programs read the new values
    assert len(capturer.programs) == 4, "the second solve captured anew"


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
