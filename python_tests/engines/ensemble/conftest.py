"""Choice of the lanes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lanes_on_cpu import command_of_cpp, library_on_cpu

from aca_ext.engines.compiled import tracing
from aca_ext.engines.ensemble import build, plan, thread_library


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Function that chooses the lanes of the next solves."""

    def choose(kind: str) -> None:
        tracing._by_owner.clear()  # with the plans that have other lanes
        monkeypatch.setattr(plan, "lanes_of", lambda _: kind)

    monkeypatch.setattr(build, "_command", lambda: tuple(command_of_cpp()))
    monkeypatch.setattr(build, "_vector_functions", dict)
    monkeypatch.setattr(thread_library, "load", library_on_cpu)
    return choose
