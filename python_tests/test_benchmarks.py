"""Benchmarks for a GPU, run on the CPU with a stand-in for captured CUDA graphs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graph_engine import Caller

import aca_ext
from aca_ext.engines.cuda_graph import captures as programs
from aca_ext.engines.cuda_graph import engine
from benchmarks import breakdown, compile_time, convolution, ensemble, flows, solve_rate, solve_rate_short
from benchmarks.harness import Settings, Table, print_table
from benchmarks.workloads import W3

SHORT = replace(W3, t_end=1.0)


class Loop(programs._Loop):
    def __init__(self, repeat: Any) -> None:
        self.repeat = repeat

    def __call__(self, times: int) -> None:
        self.repeat(times)


class LoopingCaller(Caller):
    def repeat(self, *args: Any) -> Any:
        repeat = super().repeat(*args)
        return Loop(repeat) if programs.DEVICE_LOOPS else repeat


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (breakdown, ["eager   forward", "graph   forward", "cuda_graph/engine.py", "solver/loop.py"]),
        (convolution, ["aca_ext eager", "aca_ext graph"]),
        (ensemble, ["aca_ext eager", "aca_ext graph"]),
        (solve_rate, ["aca_ext eager", "aca_ext graph", "launched for nothing", "ahead / loop"]),
        (solve_rate_short, ["aca_ext eager", "aca_ext graph", "torchdiffeq odeint"]),
    ],
    ids=lambda x: x.__name__.rpartition(".")[2] if hasattr(x, "__name__") else "",
)
def test_runs_with_every_engine(
    module: Any, found: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "DEVICES", ("cpu",))
    monkeypatch.setattr(engine, "capturer_for", lambda device: LoopingCaller([]))
    monkeypatch.setattr(solve_rate, "workloads", lambda settings: [SHORT])
    monkeypatch.setattr(breakdown, "WORKLOADS", [SHORT])
    monkeypatch.setattr(solve_rate_short, "WORKLOADS", [SHORT])
    monkeypatch.setitem(sys.modules, "diffrax", None)  # left out: it takes long to compile
    for part in module.run(Settings(quick=True)):
        if isinstance(part, Table):
            assert part.rows
            print_table(part)
        else:
            assert not part.startswith("aca_ext"), part
    printed = capsys.readouterr().out
    assert [text for text in found if text not in printed] == []


def test_each_measured_process_compiles_into_the_cache_that_it_is_given(tmp_path: Path) -> None:
    cpu, seconds = compile_time.in_new_process(compile_time.COMPILED, None, str(tmp_path))
    assert cpu > 0
    assert seconds > 0
    (library,) = tmp_path.rglob("*.so")
    compiled = library.stat().st_mtime_ns
    compile_time.in_new_process(compile_time.COMPILED, None, str(tmp_path))  # as for "again"
    assert [(one, one.stat().st_mtime_ns) for one in tmp_path.rglob("*.so")] == [(library, compiled)]


def test_the_trace_by_hand_of_the_benchmark_of_flows() -> None:
    """All solvers of the benchmark have the same density to maximise."""
    velocity, x = flows.HyperNetwork(8), flows.circles(6, torch.Generator().manual_seed(0))
    by_hand = flows.by_hand(aca_ext.odeint, velocity)(x)
    torch.testing.assert_close(by_hand, flows.with_divergence(velocity, "eager")(x))
    assert by_hand.shape == (6,)
