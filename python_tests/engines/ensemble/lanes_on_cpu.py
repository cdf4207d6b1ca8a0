"""Libraries whose lanes are threads, compiled for the CPU, where a loop stands for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aca_ext.engines.compiled import library_cache
from aca_ext.engines.ensemble import build


def command_of_cpp() -> list[str]:
    """The C++ compiler without torch's functions of vectors, which differ from those of C++ in the last bits.

    It optimises less, which takes half the time and changes no result.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    flags = ["-O1" if flag == "-O3" else flag for flag in build._FLAGS]
    return [get_cpp_compiler(), *flags, f"-I{build.headers()}"]


def library_on_cpu(source: str, _: torch.device) -> Any:
    def compile_to(to: Path) -> None:
        library_cache.run_compiler(
            [*command_of_cpp(), "-shared", str(library_cache.source_file(to)), "-o", str(to)], source, to
        )

    parts = [*library_cache.origin(), source, *command_of_cpp(), build.state_of_headers()]
    return library_cache.library(parts, compile_to)
