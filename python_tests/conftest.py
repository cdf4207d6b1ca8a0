"""What every test starts from: one thread, the same random numbers, and the benchmarks importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Behind the installed packages, among them aca_ext, whose source folder lies there too.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# The tensors are small; on a busy machine, waking a second thread for them takes most of the time.
torch.set_num_threads(1)

pytest.register_assert_rewrite("operands", "problems")


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
