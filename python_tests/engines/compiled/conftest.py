"""Fixtures of the tests of the compiled engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from aca_ext.engines.compiled import library_cache


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache of compiled libraries, which this test uses alone."""
    monkeypatch.setenv(library_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(library_cache, "_libraries", {})
    return tmp_path / "cache"
