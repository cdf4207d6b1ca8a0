"""Compilation of generated C++ with the compiler that torch's compiler uses, and the libraries made of it."""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from aca_ext.engines.compiled.library_cache import (
    A_COMPILER,
    library,
    origin,
    run,
    run_compiler,
    source_file,
    torch_library,
)
from aca_ext.errors import CompileError

# Contraction would make a result depend on what the compiler sees around it; code says fma where it wants it.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
          "-fopenmp", "-fPIC", "-fvisibility=hidden", "-w")  # fmt: skip
_PARTS = "FORWARD", "BACKWARD"
_spare = ctypes.c_void_p()  # memory for records of all libraries, once there is one
_PACKAGE = Path(__file__).resolve().parents[2]


def load(source: str) -> Any:
    """The library of a source, from the cache on disk if it was compiled before.

    Raises:
        CompileError: there is no compiler, or it fails.
    """

    def build(to: Path) -> None:
        in_parts(_command(), (*_command(), "-shared"), source, to)

    found = library([*origin(), source, *_command(), state_of_headers()], build)
    _set_addresses(found)
    found.share_spare.restype, found.share_spare.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    _spare.value = found.share_spare(_spare)
    return found


def in_parts(
    compiler: Sequence[str], linker: Sequence[str], source: str, to: Path, needs: str = A_COMPILER
) -> list[str]:
    """Compiles the parts of a library (csrc/ensemble/exports.h) at the same time, and links them.

    Returns what the compiler says of each.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    objects = [to.with_name(f"{part}.o") for part in _PARTS]

    def compile_part(part: str, to: Path) -> str:
        command = [*compiler, f"-DACA_ONLY_{part}", "-c", str(source_file(to)), "-o", str(to)]
        return run_compiler(command, source, to, needs)

    with ThreadPoolExecutor(len(_PARTS)) as threads:
        said = list(threads.map(compile_part, _PARTS, objects))
    run([*linker, *map(str, objects), "-o", str(to)], to.parent, needs)
    return said


@cache
def _command() -> tuple[str, ...]:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompileError(f'{error}. Install a C++ compiler, or use engine="eager".') from error
    define = ("-DACA_SLEEF",) if _vector_functions() else ()
    return (compiler, *_FLAGS, *define, f"-I{headers()}")


# By width in bytes and size of a number, how the names of torch's functions of vectors (SLEEF) tell the kind of vector.
_VECTORS = {(64, 8): "d8", (64, 4): "f16", (32, 8): "d4", (32, 4): "f8"}


@cache
def _vector_functions() -> dict[tuple[str, str], int]:
    """Addresses of torch's functions of vectors, by their names in csrc/ensemble/lanes.h and the kind of vector.

    None where one is missing.
    """
    header = (headers() / "ensemble" / "lanes.h").read_text()
    functions = re.findall(r"^ACA_FUNCTION()\((\w+), (\w+)\)|^ACA_FUNCTION2\((\w+), (\w+), (\w+)\)", header, re.M)
    named = [(one or two, one or called, digits or digits2) for _, one, digits, two, called, digits2 in functions]
    try:
        library = torch_library()
        return {
            (name, kind): ctypes.cast(getattr(library, f"Sleef_{called}{kind}_{digits}"), ctypes.c_void_p).value or 0
            for name, called, digits in named
            for kind in _VECTORS.values()
        }
    except (OSError, AttributeError):
        return {}


def _set_addresses(library: Any) -> None:
    """Tells a library where the functions of vectors are that it calls."""
    wanted = _VECTORS.get((library.vector_bytes(), library.number_bytes()))
    for (name, kind), address in _vector_functions().items():
        if kind == wanted and hasattr(library, f"address_{name}"):
            ctypes.c_void_p.in_dll(library, f"address_{name}").value = address


@cache
def headers() -> Path:
    """The folder of csrc: in an installed package its own, in a source tree beside it."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "ensemble" / "library.h").exists():
            return folder
    raise CompileError("the C++ headers of aca_ext are missing (csrc/ensemble); install the package anew.")


@cache
def state_of_headers() -> str:
    folder = headers()
    files = sorted([*(folder / "ensemble").glob("*.*h"), *(folder / "control").glob("*.h")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
