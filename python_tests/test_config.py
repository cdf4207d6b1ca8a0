"""Build information of config(), and the import of the uncompiled source folder."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import aca_ext
from aca_ext import _C

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "aca_ext"
in_uncompiled_source = pytest.mark.skipif(
    any(SOURCE.glob("_C*.so")) or any(SOURCE.glob("_C*.pyd")),
    reason="the source folder holds a compiled _C, as an editable install puts it there",
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


class TestConfig:
    def test_keys(self) -> None:
        assert {"aca_ext", "torch", "cpu kernels", "cuda kernels"} <= aca_ext.config().keys()
        assert all(isinstance(value, str) and value for value in aca_ext.config().values())

    def test_versions(self) -> None:
        config = aca_ext.config()
        assert config["aca_ext"] == aca_ext.__version__ == importlib.metadata.version("aca_ext")
        assert config["torch"] == torch.__version__

    @pytest.mark.usefixtures("threads")
    @pytest.mark.skipif(not _C.HAS_OPENMP, reason="built without OpenMP")
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_cpu_kernels_tell_instruction_set_and_threads(self, count: int) -> None:
        torch.set_num_threads(count)
        assert aca_ext.config()["cpu kernels"] == f"{_C.cpu_instruction_set()}, {count} thread(s)"
        assert _C.cpu_instruction_set() in ("portable", "avx2", "avx512")

    def test_cuda_kernels_tell_whether_they_were_built(self) -> None:
        told = aca_ext.config()["cuda kernels"]
        assert told.startswith(f"built for {_C.CUDA_ARCHITECTURES}; " if _C.HAS_CUDA else "not built")
        assert bool(_C.CUDA_ARCHITECTURES) == _C.HAS_CUDA
        assert _C.cuda_device_count() >= 0

    def test_show_config_prints_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        aca_ext.show_config()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(aca_ext.config())
        for line, (name, value) in zip(lines, aca_ext.config().items(), strict=True):
            assert line.startswith(name)
            assert line.endswith(value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of loaded libraries")
@pytest.mark.skipif(not _C.HAS_OPENMP, reason="built without OpenMP")
def test_one_openmp_runtime_is_loaded() -> None:
    program = (
        "import aca_ext, torch; torch.set_num_threads(2); "
        "aca_ext.odeint(lambda t, y: -y, torch.ones(100_000), torch.tensor([0.0, 1.0])); "
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp.so' in line or 'omp-' in line})"
    )
    run = run_python("-c", program)
    assert run.returncode == 0, run.stderr
    (runtime,) = run.stdout.split()  # two would start twice as many threads as there are cores
    assert Path(runtime).is_relative_to(Path(torch.__file__).parent.parent)


@in_uncompiled_source
class TestSourceFolder:
    def test_tests_run_on_the_installed_package(self) -> None:
        assert Path(aca_ext.__file__).parent != SOURCE

    def test_without_an_installed_package_says_what_to_do(self) -> None:
        # -S removes site-packages from the path, -I everything else that could hold the package.
        run = run_python("-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import aca_ext")
        assert run.returncode == 1
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith("aca_ext.errors.NotCompiledError: ")
        assert str(SOURCE) in last
        assert "pip install ." in last

    def test_hands_over_to_the_installed_package(self) -> None:
        program = (
            "import aca_ext, aca_ext.errors as errors; "
            "print(aca_ext.__file__, errors.__file__, *aca_ext.config(), sep='|')"
        )
        run = run_python("-c", program)
        assert run.returncode == 0, run.stderr
        package, ops, *keys = run.stdout.strip().split("|")
        assert Path(package).parent == Path(ops).parent == Path(aca_ext.__file__).parent
        assert keys == list(aca_ext.config())
