"""Compilation of generated C++ with the compiler that torch's compiler uses, and the libraries made of it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aca_ext.errors import CompileError

# Contraction would make a result depend on what the compiler sees around it; code says fma where it wants it.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
          "-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-w")  # fmt: skip
_PACKAGE = Path(__file__).resolve().parents[2]
_libraries: dict[str, Any] = {}  # loaded for good


def load(source: str) -> Any:
    """The library of a source, from the cache on disk if it was compiled before.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    parts = [source, *_command(), _state_of_headers(), _machine()]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    if name not in _libraries:
        path = _folder() / f"{name}.so"
        if not path.exists():
            _compile(source, path)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # a file whose writer was killed
            _compile(source, path)
            library = ctypes.CDLL(str(path))
        _set_addresses(library)
        _libraries[name] = library
    return _libraries[name]


def _compile(source: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file, made = Path(folder) / "lanes.cpp", Path(folder) / "lanes.so"
        file.write_text(source)
        command = [*_command(), str(file), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise CompileError(
                f'engine="compiled" needs a C++ compiler; {command[0]} cannot be run ({error}). Install one, name it '
                'in the environment variable CXX, or use engine="eager".'
            ) from error
        if done.returncode != 0:
            raise CompileError(
                f'The C++ compiler {command[0]} failed on the code made of func. Use engine="eager". It says: '
                f"{done.stderr[-2000:]}"
            )
        os.replace(made, path)


@cache
def _command() -> tuple[str, ...]:
    from torch._inductor.cpp_builder import get_cpp_compiler

    define = ("-DACA_SLEEF",) if _vector_functions() else ()
    return (get_cpp_compiler(), *_FLAGS, *define, f"-I{_headers()}")


@cache
def _machine() -> str:
    """The instructions of this processor, for which code is compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {flags}"


# By width in bytes and size of a number, how the names of torch's functions of vectors (SLEEF) tell the kind of vector.
_VECTORS = {(64, 8): "d8", (64, 4): "f16", (32, 8): "d4", (32, 4): "f8"}


@cache
def _vector_functions() -> dict[tuple[str, str], int]:
    """Addresses of torch's functions of vectors, by their names in csrc/ensemble/lanes.h and the kind of vector.

    None where one is missing.
    """
    header = (_headers() / "ensemble" / "lanes.h").read_text()
    functions = re.findall(r"^ACA_FUNCTION()\((\w+), (\w+)\)|^ACA_FUNCTION2\((\w+), (\w+), (\w+)\)", header, re.M)
    named = [(one or two, one or called, digits or digits2) for _, one, digits, two, called, digits2 in functions]
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return {
            (name, kind): ctypes.cast(getattr(library, f"Sleef_{called}{kind}_{digits}"), ctypes.c_void_p).value or 0
            for name, called, digits in named
            for kind in _VECTORS.values()
        }
    except (OSError, AttributeError):
        return {}


def _set_addresses(library: Any) -> None:
    """Tells a library where the functions of vectors are that it calls."""
    width = library.vector_bytes()
    kinds = _VECTORS.get((width, library.number_bytes())), _VECTORS.get((width, 8))
    for (name, kind), address in _vector_functions().items():
        for symbol, wanted in zip((f"address_{name}", f"address_{name}_of_doubles"), kinds, strict=True):
            if kind == wanted and hasattr(library, symbol):
                ctypes.c_void_p.in_dll(library, symbol).value = address


@cache
def _headers() -> Path:
    """The folder of csrc: in an installed package its own, in a source tree beside it."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "ensemble" / "library.h").exists():
            return folder
    raise CompileError("the C++ headers of aca_ext are missing (csrc/ensemble); install the package anew.")


@cache
def _state_of_headers() -> str:
    folder = _headers()
    files = sorted([*(folder / "ensemble").glob("*.h"), *(folder / "control").glob("*.h")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@cache
def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir()) / "aca_ext"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
