"""Common start of every test: one thread, the same random numbers, and the benchmarks importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Behind the installed packages, among them aca_ext, whose source folder lies there too.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# The tensors are small; on a busy machine, waking a second thread for them takes most of the time.
torch.set_num_threads(1)

MOST_PROCESSES = 8  # each imports torch and may run a C++ compiler: over a gigabyte

pytest.register_assert_rewrite("operands", "problems")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Gives a run of whole folders one process for each core; files and tests that are named run in this process.

    The command line takes precedence: ``-n 0`` runs all in one process. This is a hook and no ``addopts``, because
    pytest refuses ``-n`` where pytest-xdist is not installed. ``worksteal`` keeps neighbouring tests together, which
    share fixtures and compiled programs.
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


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that has kernels here."""
    from operands import NO_CUDA

    if request.param == "cuda" and NO_CUDA is not None:
        pytest.skip(NO_CUDA)
    return request.param
