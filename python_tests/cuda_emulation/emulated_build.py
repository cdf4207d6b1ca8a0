"""Builds csrc's CUDA sources as a shared library for the CPU, together with the stand-in for CUDA's runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
SOURCES = ("kernels/cuda.cu", "kernels/control_cuda.cu", "cuda_graph/loop_graph.cu")
COMPILER = os.environ.get("CXX", "c++")
# Announces every access to memory in csrc's code to the runtime, which checks it.
_ANNOUNCED = ["-fsanitize=thread"]
_FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-D__CUDACC__",
    "-D__CUDA_ARCH__=900",
    "-w",
    "-include",
    "cuda_runtime.h",
]

# What C++ does not know of CUDA's language, and how it is said to the runtime.
_LAUNCH = re.compile(r"(\w+(?:<\w+>)?)<<<(.+?)>>>\(", re.DOTALL)
_SHARED = re.compile(r"__shared__ (\w+) (\w+)(\[[^\]]+\])?;")
_ADDRESS = re.compile(r"reinterpret_cast<void\*>\(&(\w+)\)")

Patch = tuple[str, str, str]  # path in csrc, text, and its replacement


def as_cpp(source: str) -> str:
    """CUDA source text as C++ on top of the runtime."""
    lines = source.splitlines()
    for i, line in enumerate(lines):
        lines[i] = _SHARED.sub(rf"auto& \2 = emulation::shared<\1\3, {i + 1}>();", line)
    text = _LAUNCH.sub(r"emulation::Launch(\2).of([](auto... a) { \1(a...); })(", "\n".join(lines))
    return _ADDRESS.sub(r"emulation::entry<&\1>()", text)


def patched(patches: Sequence[Patch], to: Path) -> Path:
    """A copy of csrc in which each text has been replaced; a text that is not there exactly once is an error."""
    shutil.copytree(CSRC, to, dirs_exist_ok=True)
    for name, text, replacement in patches:
        path = to / name
        before = path.read_text()
        assert before.count(text) == 1, f"{name} has {before.count(text)} times: {text}"
        path.write_text(before.replace(text, replacement))
    return to


def build(csrc: Path, to: Path) -> Path:
    """Compiles the CUDA sources in ``csrc`` and the runtime; returns the path of the library."""
    to.mkdir(parents=True, exist_ok=True)
    include = [f"-I{HERE / 'runtime'}", f"-I{csrc}"]
    jobs = []
    for name in SOURCES:
        cpp = to / (Path(name).stem + "_cu.cpp")
        cpp.write_text(as_cpp((csrc / name).read_text()))
        jobs.append([COMPILER, *_FLAGS, *_ANNOUNCED, *include, "-c", str(cpp), "-o", f"{cpp}.o"])
    for cpp in sorted((HERE / "runtime").glob("*.cpp")):
        jobs.append([COMPILER, *_FLAGS, *include, "-c", str(cpp), "-o", str(to / f"{cpp.stem}.o")])
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(_run, jobs))
    library = to / "emulated.so"
    _run([COMPILER, "-shared", *(job[-1] for job in jobs), "-o", str(library)])
    return library


def build_lanes(source: str, emulated: Path, to: Path) -> Path:
    """Compiles the generated source of a solve of independent samples, on top of a library that ``build`` made."""
    to.mkdir(parents=True, exist_ok=True)
    shutil.copytree(CSRC, to / "csrc", dirs_exist_ok=True)
    driver = to / "csrc" / "ensemble" / "threads.cuh"
    driver.write_text(as_cpp(driver.read_text()))
    cpp, library = to / "lanes.cpp", to / "lanes.so"
    cpp.write_text(f"#include <cuda_runtime.h>\n{source}")
    include = [f"-I{HERE / 'runtime'}", f"-I{to / 'csrc'}"]
    _run([COMPILER, *_FLAGS, *_ANNOUNCED, *include, "-c", str(cpp), "-o", f"{cpp}.o"])
    _run([COMPILER, "-shared", f"{cpp}.o", str(emulated), f"-Wl,-rpath,{emulated.parent}", "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
