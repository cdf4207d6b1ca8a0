"""The emulated libraries, built once for all processes of a test run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from emulated_build import CSRC, build, patched
from emulation import Emulation
from filelock import FileLock
from planted_faults import PATCHES


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _built(folder: Path, name: str, csrc: Callable[[], Path]) -> Emulation:
    with FileLock(folder / f"{name}.lock"):
        library = folder / name / "emulated.so"
        return Emulation(library if library.exists() else build(csrc(), library.parent))


@pytest.fixture(scope="session")
def clean_build(build_folder: Path) -> Emulation:
    return _built(build_folder, "emulated_csrc", lambda: CSRC)


@pytest.fixture(scope="session")
def faulty_build(build_folder: Path) -> Emulation:
    return _built(build_folder, "faulty_csrc", lambda: patched(PATCHES, build_folder / "patched_csrc"))


@pytest.fixture
def cuda(clean_build: Emulation, request: pytest.FixtureRequest) -> Iterator[Emulation]:
    """The emulation with empty memory; fails the test if it observed an error."""
    clean_build.begin(seed=hash_of(request.node.name))
    yield clean_build
    assert clean_build.findings() == []


def hash_of(name: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(name))
