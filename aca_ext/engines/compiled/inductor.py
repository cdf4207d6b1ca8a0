"""Compilation of a traced graph to one C++ function on addresses, from Inductor's kernels without its Python wrapper.

Inductor turns a traced graph into C++ kernels, calls of matrix products, and a Python wrapper that allocates buffers
and makes the calls in order. Here the wrapper runs once, with stand-ins that record each call and its memory. The
recorded calls then become one C++ function of a table of addresses. Intermediate buffers lie at fixed places of one
workspace.
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

Traced = tuple[fx.GraphModule, list[Tensor], int]  # traced graph, example inputs, number of constant ones at their end

_libraries: list[Any] = []
LOCK = threading.RLock()  # stand-ins replace parts of Inductor for the whole process


class Program(NamedTuple):
    """A compiled function ``void(void** inputs, char* workspace, char* prepared)``; it keeps no state.

    Attributes:
        address: address of the function.
        prepare: address of ``void(void** inputs, char* prepared)``. It must run before the function, and again only
            if the contents of func's inputs changed.
        workspace_bytes: memory for intermediate results.
        prepared_bytes: memory that ``prepare`` fills.
    """

    address: int
    prepare: int
    workspace_bytes: int
    prepared_bytes: int


def compile_programs(*traced: Traced) -> list[Program]:
    """Compiles functional traced graphs into one library; a graph returns results by ``copy_`` to inputs at its end.

    Each graph comes with example inputs, which share no memory, and with the number of inputs at the end that do not
    change between runs.

    Raises:
        CompileError: a graph needs an operation that is neither a generated kernel nor a matrix product.
    """
    from torch._inductor.codecache import CppCodeCache

    with LOCK:
        source = Source()
        workspaces = [source.add(_record(graph, inputs), inputs, constant) for graph, inputs, constant in traced]
        with _inductor_settings():
            try:
                library = CppCodeCache.load(source.text())
            except OSError:  # incomplete file in torch's cache, its writer was killed: new text, new name
                library = CppCodeCache.load(f"{source.text()}\n// {time.time_ns()}\n")
    _libraries.append(library)  # never unloaded, since addresses of its functions may be in use
    programs: list[Program] = []
    for i in range(len(traced)):
        address, prepare = (
            ctypes.cast(getattr(library, f"{name}_{i}"), ctypes.c_void_p).value or 0 for name in ("program", "prepare")
        )
        prepared_bytes = ctypes.c_long.in_dll(library, f"prepared_bytes_{i}").value
        programs.append(Program(address, prepare, workspaces[i], prepared_bytes))
    return programs


def run_program(program: Program, inputs: Sequence[Tensor]) -> None:
    """Runs a program once on tensors laid out like its example inputs."""
    table = (ctypes.c_void_p * len(inputs))(*(x.data_ptr() for x in inputs))
    workspace = torch.empty(program.workspace_bytes, dtype=torch.uint8, device="cpu")
    prepared = torch.empty(program.prepared_bytes, dtype=torch.uint8, device="cpu")
    prepare = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(program.prepare)
    prepare(ctypes.addressof(table), prepared.data_ptr())
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(program.address)
    run(ctypes.addressof(table), workspace.data_ptr(), prepared.data_ptr())


class _Recorder(TorchDispatchMode):
    """Records the calls that a wrapper makes, and refuses torch operations other than matrix products and views."""

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
            f"func needs the operation {func}, for which Inductor generates no kernel. "
            'Use engine="eager", whose overhead is small next to such an operation.'
        )


_recorders: list[_Recorder] = []


class _Kernel:
    """Stand-in for a kernel in Inductor's wrapper; a call is recorded, not run."""

    def __init__(self, types: Sequence[str], source: str) -> None:
        self._types, self._source = tuple(types), source

    def __call__(self, *operands: Any) -> None:
        if not all(isinstance(x, Tensor) for x in operands):
            raise CompileError('func needs a kernel with sizes as operands, which is unsupported. Use engine="eager".')
        _recorders[-1].calls.append(Call(self._source, self._types, operands))


@contextmanager
def _inductor_settings() -> Iterator[None]:
    from torch._inductor import config

    settings = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "freezing": False,
        "max_autotune": False,
        "pattern_matcher": False,  # it would fuse products and sums into library calls
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
