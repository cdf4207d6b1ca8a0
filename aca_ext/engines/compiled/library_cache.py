"""Cache of compiled libraries on disk, shared by the processes of a user.

An entry is one file, whose name is a hash of everything that its code depends on. Its last bytes are a checksum of the
others, since loading a truncated library may end the process. Files are written beside their place and moved there, so
that processes which compile the same at the same time do not disturb each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from aca_ext.errors import CompileError

VARIABLE = "ACA_EXT_CACHE_DIR"
TORCH_LIBRARY = "libtorch_cpu.so"  # with functions of Sleef and BLAS
A_COMPILER = "a C++ compiler, by default g++ or the one that the environment variable CXX names"
_PACKAGE = Path(__file__).resolve().parents[2]
_SEAL_BYTES = hashlib.sha256().digest_size
_libraries: dict[str, ctypes.CDLL] = {}  # never unloaded, since addresses of their functions may be in use
_LOCK = threading.RLock()


def library(parts: Sequence[str], build: Callable[[Path], None]) -> ctypes.CDLL:
    """The library that depends on ``parts``; ``build`` writes it to a path if no intact entry exists.

    Raises:
        CompileError: a new library cannot be loaded.
        Those of ``build``.
    """
    name = _name(parts)
    with _LOCK:
        if name not in _libraries:
            path = folder() / f"{name}.so"
            if not _is_intact(path):
                path = _built(path, build)
            _libraries[name] = _loaded(path)
        return _libraries[name]


def forget(parts: Sequence[str]) -> None:
    """Deletes the library that depends on ``parts``; code of it that is in use stays loaded."""
    name = _name(parts)
    with _LOCK:
        _libraries.pop(name, None)
        (folder() / f"{name}.so").unlink(missing_ok=True)


def _name(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _is_intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > _SEAL_BYTES and content[-_SEAL_BYTES:] == _seal(content[:-_SEAL_BYTES])


def _seal(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


def _built(path: Path, build: Callable[[Path], None]) -> Path:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="new_") as scratch:
        new = Path(scratch) / path.name
        build(new)
        seal = _seal(new.read_bytes())
        with new.open("ab") as file:
            file.write(seal)
        os.replace(new, path)
    return path


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(
            f'engine="compiled" cannot load the library that it compiled: {error}. If programs may not be run from '
            f'that folder, name another one in the environment variable {VARIABLE}, or use engine="eager".'
        ) from error


def torch_library() -> ctypes.CDLL:
    """torch's library of functions for CPUs; OSError where it has another name."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / TORCH_LIBRARY))


def run_compiler(command: Sequence[str], source: str, to: Path, needs: str = A_COMPILER) -> str:
    """Compiles a source, by a command that names ``source_file(to)`` and ``to``, in the folder of ``to``.

    Returns what the compiler says.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    source_file(to).write_text(source)
    return run(command, to.parent, needs)


def run(command: Sequence[str], at: Path, needs: str = A_COMPILER) -> str:
    """Runs a compiler in a folder, and returns what it says.

    Raises:
        CompileError: there is no compiler, or it fails.
    """
    try:
        done = subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(
            f'engine="compiled" needs {needs}; {command[0]} cannot be run ({error}). Install it, or use engine="eager".'
        ) from error
    if done.returncode != 0:
        raise CompileError(
            f'The C++ compiler {command[0]} failed on the code made of func. Use engine="eager". It says: '
            f"{done.stderr[-2000:]}"
        )
    return done.stdout + done.stderr


def source_file(to: Path) -> Path:
    return to.with_suffix(".cpp")


def folder() -> Path:
    """The folder of the cache; one for this process alone if it cannot be written to."""
    path = _wanted_folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return _folder_of_process()
    return path if os.access(path, os.W_OK | os.X_OK) else _folder_of_process()


def _wanted_folder() -> Path:
    given, of_inductor = os.environ.get(VARIABLE), os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given).expanduser().absolute()
    # Inductor sets its variable itself, at its first use, to a folder that other users can create before us.
    if of_inductor and of_inductor != _default_of_inductor():
        return Path(of_inductor).absolute() / "aca_ext"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "aca_ext"


@cache
def _default_of_inductor() -> str:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.path.abspath(default_cache_dir())


@cache
def _folder_of_process() -> Path:
    kept = tempfile.TemporaryDirectory(prefix="aca_ext_")  # deleted at the end of the process
    _folder_of_process.kept = kept  # type: ignore[attr-defined]
    return Path(kept.name)


@cache
def origin() -> tuple[str, ...]:
    """Parts of every name: the package's sources, torch, the compiler, and the instructions of this processor."""
    sources = sorted(path for kind in ("*.py", "*.h") for path in _PACKAGE.rglob(kind))
    code = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    capability = torch.backends.cpu.get_cpu_capability()
    return code, torch.__version__, str(torch.version.git_version), _compiler(), capability, _processor()


def _compiler() -> str:
    """The C++ compiler, known by its file, since running it would take longer."""
    return file_state(os.path.realpath(shutil.which(os.environ.get("CXX", "g++")) or ""))


def file_state(path: str) -> str:
    """A text that changes with a file."""
    try:
        status = os.stat(path)
    except OSError:
        return path
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _processor() -> str:
    """The instructions of this processor, for which code is compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {flags}"
