"""Lanes as CUDA that nvcc compiles; the last tests run on a GPU, where there is one."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from lanes_on_cpu import library_on_cpu
from test_ensemble_threads import CASES, solved

from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import library_cache
from aca_ext.engines.ensemble import build, cuda_build, thread_library

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")


@pytest.fixture
def nvcc() -> Iterator[str]:
    command = cuda_build.compiler_command("sm_90")[0]
    if shutil.which(command) is None:
        pytest.skip("there is no nvcc")
    return command


class TestCuda:
    """Generated sources as CUDA."""

    @pytest.mark.parametrize("case", ["lotka_volterra", "torch.func.grad", "step_t"])
    def test_compiles_without_warnings(
        self, nvcc: str, kinds: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
    ) -> None:
        library, report = self.compiled(case, kinds, monkeypatch, tmp_path / "found.so")
        kernels = re.findall(r"properties for .*?\d([A-Z]\w+?)OfThread.*\n\s*(\d+) bytes stack", report)
        stacks = {name: int(size) for name, size in kernels}
        assert {"Forward", "Backward", "Evaluation", "Bounds"} == set(stacks)
        if case == "lotka_volterra":  # the state of a sample is in registers
            assert stacks["Backward"] == 0
            assert stacks["Forward"] < 200  # of which 72 are for steps that find no memory
        assert library.bytes_of_piece() > 0
        if not torch.cuda.is_available():
            monkeypatch.setattr(thread_library, "load", lambda *_: library)
            with pytest.raises(errors.CompileError, match="cuda:0 cannot run"):
                thread_library.ThreadLibrary("", 0, torch.device("cuda", 0)).chunks(5)

    def compiled(
        self, case: str, kinds: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, to: Path
    ) -> tuple[Any, str]:
        """The source of a case compiled for a GPU, warnings as errors, and the report about registers."""
        sources: list[str] = []

        def load(source: str, device: torch.device) -> Any:
            sources.append(source)
            return library_on_cpu(source, device)

        kinds("threads")
        monkeypatch.setattr(thread_library, "load", load)
        solved(case)
        command = [*cuda_build.compiler_command("sm_90"), "-Werror", "all-warnings", "-Xptxas", "-v"]
        report = build.in_parts(command, cuda_build.linker_command(command[0]), sources[0], to)
        return ctypes.CDLL(str(to)), "".join(report)

    def test_names_what_is_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
        monkeypatch.setenv(library_cache.VARIABLE, str(tmp_path))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        with pytest.raises(errors.CompileError, match=r"needs nvcc .* CUDACXX"):
            cuda_build.load("", torch.device("cuda", 0))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    @pytest.mark.parametrize("case", CASES)
    def test_has_the_steps_of_the_cpu(self, nvcc: str, case: str) -> None:
        (of_cpu, *expected), (of_gpu, *found) = solved(case), solved(case, device="cuda")
        assert torch.equal(of_gpu.stats.n_accepted, of_cpu.stats.n_accepted)
        assert relative_error(of_gpu.y.cpu().nan_to_num(), of_cpu.y.nan_to_num()) <= 1e-7
        for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            assert relative_error(one.cpu(), other) <= 1e-6
        _, *again = solved(case, device="cuda")
        for one, other in zip([*again[0], *again[1]], [*found[0], *found[1]], strict=True):
            assert torch.equal(one, other)
