"""Compilation of generated sources by nvcc, for the GPU that runs them.

nvcc and not NVRTC, which torch brings along: NVRTC has no headers of C++, launches through another interface, and
compiles no host code, so that nothing here could be the same as for the CPU.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from aca_ext.engines.compiled.library_cache import file_state, library, origin
from aca_ext.engines.ensemble.build import headers, in_parts, state_of_headers

# Without contraction, as on the CPU: code says fma where it wants it. Generated code has variables that nothing uses.
_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-x", "cu",
          "-diag-suppress=177,550")  # fmt: skip
_NEEDS = "nvcc of the CUDA toolkit (12.0 or newer) on PATH, or named in the environment variable CUDACXX"


def load(source: str, device: torch.device) -> Any:
    """The library of a source for a device, from the cache on disk if it was compiled before.

    Raises:
        CompileError: nvcc is missing, or it fails.
    """
    major, minor = torch.cuda.get_device_capability(device)
    command = compiler_command(f"sm_{major}{minor}")

    def build(to: Path) -> None:
        in_parts(command, linker_command(command[0]), source, to, _NEEDS)

    return library([*origin(), file_state(command[0]), source, *command, state_of_headers()], build)


def compiler_command(architecture: str) -> tuple[str, ...]:
    """nvcc with its options, for an architecture such as "sm_90"."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return (nvcc, *_FLAGS, f"-arch={architecture}", f"-I{headers()}")


def linker_command(nvcc: str) -> tuple[str, ...]:
    return (nvcc, "-shared")
