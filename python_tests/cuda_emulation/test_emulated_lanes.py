"""Solves of independent samples whose lanes are emulated threads of a GPU: the kernels' launch, indices and memory."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_build import build_lanes
from emulation import Emulation
from problems import sample
from torch import Tensor

import aca_ext
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import trace_table
from aca_ext.engines.ensemble import plan, thread_library

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")


def oscillator(t: Tensor, y: Tensor, own: Tensor, common: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return torch.stack((v, own[:, 0] * (1 - x * x) * v - common * x), -1)


def solved(n: int) -> tuple[aca_ext.Solution, list[Tensor]]:
    y0, own = sample(n, 2), sample(n, 1, seed=1).abs() * 3
    leaves = [x.requires_grad_() for x in (y0, own, torch.tensor(1.3, dtype=torch.float64))]
    sol = aca_ext.solve(
        oscillator,
        leaves[0],
        [0.0, 0.4, 2.0],
        rtol=1e-5,
        atol=1e-6,
        args=tuple(leaves[1:]),
        options={"batch": "independent"},
        engine="compiled",
    )
    weights = sample(*sol.y.shape, seed=3)
    return sol, list(torch.autograd.grad((sol.y * weights).sum(), leaves))


@pytest.mark.parametrize("n", [100, 250])  # fewer samples than threads, which do not fill their blocks, and more
def test_steps_and_gradients_are_those_of_the_cpu(
    n: int, cuda: Emulation, build_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(source: str, _: torch.device) -> Any:
        emulated = build_folder / "emulated_csrc" / "emulated.so"
        return ctypes.CDLL(str(build_lanes(source, emulated, tmp_path)))

    trace_table.tables.clear()
    expected, of_cpu = solved(n)
    trace_table.tables.clear()
    monkeypatch.setattr(plan, "lanes_of", lambda _: "threads")
    monkeypatch.setattr(thread_library, "load", load)
    monkeypatch.setattr(thread_library, "_STEPS_AT_FIRST", 0)  # so that threads take pieces until there are none
    found, of_gpu = solved(n)
    assert torch.equal(found.y, expected.y)
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(of_gpu[:2], of_cpu[:2], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(of_gpu[2], of_cpu[2], rtol=1e-12, atol=0)
    again, once_more = solved(n)
    assert torch.equal(again.y, found.y)
    for one, other in zip(once_more, of_gpu, strict=True):  # sums in the same order, in whatever order threads run
        assert torch.equal(one, other)
    trace_table.tables.clear()
