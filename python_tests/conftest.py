"""Setup of every test: one thread, the same random numbers, and the benchmarks on the import path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# At the end of the path, so that aca_ext is imported as installed and not from its source folder here.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# The tensors are small; on a busy machine, waking a second thread would take most of the time.
torch.set_num_threads(1)

MOST_PROCESSES = 8  # each takes over a gigabyte: it imports torch and may run a C++ compiler

pytest.register_assert_rewrite("operands", "problems")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs whole folders in one process per core, and single files or tests in this process.

    The command line takes precedence: ``-n 0`` runs everything in one process. This is a hook and not ``addopts``,
    because pytest refuses ``-n`` if pytest-xdist is not installed. ``worksteal`` keeps neighbouring tests together,
    which share fixtures and compiled programs.
    """
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.pluginmanager.hasplugin("xdist") or config.option.numprocesses is not None:
        return
    if all(Path(argument).is_dir() for argument in config.args):
        config.option.numprocesses = "auto"
        config.option.maxprocesses = config.option.maxprocesses or MOST_PROCESSES
        config.option.dist = "worksteal"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_fault_on_the_device() -> Iterator[None]:
    """Waits for the GPU after each test that used it, so that a fault there ends the file at the test that made it.

    CUDA reports a fault in a kernel at some later call, and every call after it fails too.
    """
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"The test left a fault on the device, which no later test can clear: {error}", returncode=1)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device for which this build has kernels."""
    from operands import NO_CUDA

    if request.param == "cuda" and NO_CUDA is not None:
        pytest.skip(NO_CUDA)
    return request.param


@pytest.fixture
def no_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs func uncompiled where engine="compiled" has no program of the whole solve, which is quicker to test."""
    from aca_ext.engines.compiled import engine

    monkeypatch.setattr(engine, "_solve_by_evaluations", lambda: engine.solve_uncompiled)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache of compiled libraries, which this test uses alone."""
    from aca_ext.engines.compiled import library_cache

    monkeypatch.setenv(library_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(library_cache, "_libraries", {})
    return tmp_path / "cache"
