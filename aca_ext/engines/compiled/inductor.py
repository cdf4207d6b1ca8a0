"""A graph as one compiled function on addresses: what Inductor makes of it, without the wrapper around its kernels.

Inductor turns a graph into C++ kernels, calls of matrix products, and a Python wrapper that allocates buffers and calls
one after the other. Here the wrapper runs once, on stand-ins that note who is called with which memory. The kernels,
in that order, then become one C++ function of a table of addresses, with the buffers between them at fixed places of
one block of memory.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from aca_ext.engines.compiled.cpp_source import C_TYPES, Call, Source
from aca_ext.engines.compiled.lowerings import lowerings
from aca_ext.errors import CompileError

Traced = tuple[fx.GraphModule, list[Tensor], int]  # a graph, inputs like those to come, how many of them stay

_libraries: list[Any] = []
_LOCK = threading.RLock()  # stand-ins are put into Inductor for the whole process


class Program(NamedTuple):
    """A compiled function ``void(void** inputs, char* workspace, char* prepared)``; it keeps no state.

    Attributes:
        address: of the function.
        prepare: of ``void(void** inputs, char* prepared)``, which is to run before it, once while func's inputs stay
            as they are.
        workspace_bytes: what it needs for intermediate results.
        prepared_bytes: and for what is prepared.
    """

    address: int
    prepare: int
    workspace_bytes: int
    prepared_bytes: int


def compile_programs(*traced: Traced) -> list[Program]:
    """Compiles functional graphs that write their results into inputs (by ``copy_`` at their end), all in one file.

    Each comes with tensors like the inputs to come, none sharing memory with another, and with the number of those at
    the end that stay as they are from one run to the next.

    Raises:
        CompileError: a graph needs an operation that is neither a generated kernel nor a matrix product.
    """
    from torch._inductor.codecache import CppCodeCache

    with _LOCK:
        source = Source()
        workspaces = [source.add(_record(graph, inputs), inputs, constant) for graph, inputs, constant in traced]
        with _inductor_settings():
            try:
                library = CppCodeCache.load(source.text())
            except OSError:  # a file in torch's cache whose writer was killed: under another name it is made anew
                library = CppCodeCache.load(f"{source.text()}\n// {time.time_ns()}\n")
    _libraries.append(library)  # loaded for good: addresses of its functions may be in use
    programs: list[Program] = []
    for i in range(len(traced)):
        address, prepare = (
            ctypes.cast(getattr(library, f"{name}_{i}"), ctypes.c_void_p).value or 0 for name in ("program", "prepare")
        )
        prepared_bytes = ctypes.c_long.in_dll(library, f"prepared_bytes_{i}").value
        programs.append(Program(address, prepare, workspaces[i], prepared_bytes))
    return programs


def run_program(program: Program, inputs: Sequence[Tensor]) -> None:
    """Runs a program once on tensors laid out like those that it was compiled for."""
    table = (ctypes.c_void_p * len(inputs))(*(x.data_ptr() for x in inputs))
    workspace = torch.empty(program.workspace_bytes, dtype=torch.uint8, device="cpu")
    prepared = torch.empty(program.prepared_bytes, dtype=torch.uint8, device="cpu")
    prepare = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(program.prepare)
    prepare(ctypes.addressof(table), prepared.data_ptr())
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(program.address)
    run(ctypes.addressof(table), workspace.data_ptr(), prepared.data_ptr())


class _Recorder(TorchDispatchMode):
    """Collects the calls of a wrapper's run; whatever torch operation it needs passes through here."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.mm.out, torch.ops.aten.bmm.out) and args[0].dtype in C_TYPES:
            self.calls.append(Call("", (), (args[0], args[1], kwargs["out"])))
            return kwargs["out"]
        if func in (torch.ops.aten.as_strided.default, torch.ops.aten.view.default, torch.ops.aten.detach.default):
            return func(*args, **kwargs)
        raise CompileError(
            f"func needs the operation {func}, which Inductor does not turn into code of its own. "
            'Use engine="eager", whose overhead is small next to such an operation.'
        )


_recorders: list[_Recorder] = []


class _Kernel:
    """Stands in for a kernel in Inductor's wrapper."""

    def __init__(self, types: Sequence[str], source: str) -> None:
        self._types, self._source = tuple(types), source

    def __call__(self, *operands: Any) -> None:
        if not all(isinstance(x, Tensor) for x in operands):
            raise CompileError('func needs a kernel with sizes among its operands. Use engine="eager".')
        _recorders[-1].calls.append(Call(self._source, self._types, operands))


@contextmanager
def _inductor_settings() -> Iterator[None]:
    from torch._inductor import config

    settings = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "freezing": False,
        "max_autotune": False,
        "pattern_matcher": False,  # it would join products and sums into operations that are dispatched
        "size_asserts": False,
        "cpu_backend": "cpp",
        "cpp_wrapper": False,
        "cpp.enable_floating_point_contract_flag": "fast",
        "cpp.threads": torch.get_num_threads(),
    }
    with config.patch({name: value for name, value in settings.items() if _has(config, name)}):
        yield


def _has(config: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def _record(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Call]:
    from torch._inductor import async_compile
    from torch._inductor.compile_fx import compile_fx_inner

    AsyncCompile: Any = async_compile.AsyncCompile  # noqa: N806
    original = AsyncCompile.cpp_pybinding
    AsyncCompile.cpp_pybinding = lambda self, types, source, *_: _Kernel(types, source)
    recorder = _Recorder()
    try:
        with torch.no_grad(), _inductor_settings(), lowerings():
            wrapper: Any = compile_fx_inner(graph, list(inputs))
            _recorders.append(recorder)
            try:
                with recorder:
                    wrapper(list(inputs))
            finally:
                _recorders.pop()
    finally:
        AsyncCompile.cpp_pybinding = original
    return recorder.calls
