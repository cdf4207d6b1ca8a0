"""Choice of the lanes."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from lanes_on_cpu import command_of_cpp, library_on_cpu

from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import trace_table
from aca_ext.engines.ensemble import build, plan, thread_library

# A GPU machine may have torch 2.11. There the engine refuses, since TorchDynamo does not notice that the default of an
# argument of func changed. .ci/gpu runs tests in which none does.
if "ACA_LANES_WITH_OLD_TORCH" in os.environ:
    compiled_engine._OLDEST_TORCH = (2, 11)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Function that chooses the lanes of the next solves."""

    def choose(kind: str) -> None:
        trace_table.tables.clear()  # with the plans that have other lanes
        monkeypatch.setattr(plan, "lanes_of", lambda _: kind)

    monkeypatch.setattr(build, "_command", lambda: tuple(command_of_cpp()))
    monkeypatch.setattr(build, "_vector_functions", dict)
    monkeypatch.setattr(thread_library, "load", library_on_cpu)
    return choose
