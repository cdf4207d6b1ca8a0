"""A graph as one compiled function on addresses: what Inductor makes of it, without the wrapper around its kernels.

Inductor turns a graph into C++ kernels, calls of matrix products, and a Python wrapper that allocates buffers and calls
one after the other. Here the wrapper runs once, on stand-ins that note who is called with which memory. The kernels,
in that order, then become one C++ function of a table of addresses, with the buffers between them at fixed places of
one block of memory.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from aca_ext.compiled.lowerings import lowerings
from aca_ext.errors import CompileError

_ALIGNMENT = 64
_MAX_CONSTANT_BYTES = 1 << 16
Traced = tuple[fx.GraphModule, list[Tensor]]  # a graph and inputs like those to come

_libraries: list[Any] = []
_LOCK = threading.RLock()  # stand-ins are put into Inductor for the whole process
_C_TYPES = {torch.float32: "float", torch.float64: "double"}


@dataclass(frozen=True)
class Program:
    """A compiled function ``void(void** inputs, char* workspace)``; it keeps no state.

    Attributes:
        address: of the function.
        workspace_bytes: what it needs for intermediate results.
    """

    address: int
    workspace_bytes: int


def compile_programs(*traced: Traced) -> list[Program]:
    """Compiles functional graphs that write their results into inputs (by ``copy_`` at their end), all in one file.

    Each comes with tensors like the inputs to come, none sharing memory with another.

    Raises:
        CompileError: a graph needs an operation that is neither a generated kernel nor a matrix product.
    """
    from torch._inductor.codecache import CppCodeCache

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own modules
        source = _Source()
        workspaces = [source.add(_record(graph, inputs), inputs) for graph, inputs in traced]
        with _inductor_settings():
            try:
                library = CppCodeCache.load(source.text())
            except OSError:  # a file in torch's cache whose writer was killed: under another name it is made anew
                library = CppCodeCache.load(f"{source.text()}\n// {time.time_ns()}\n")
    _libraries.append(library)  # loaded for good: addresses of its functions may be in use
    programs: list[Program] = []
    for i, (graph, inputs) in enumerate(traced):
        address = ctypes.cast(getattr(library, f"program_{i}"), ctypes.c_void_p).value
        programs.append(Program(address or 0, workspaces[i]))
        _check(programs[i], graph, inputs)
    return programs


def _check(program: Program, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Raises CompileError where the program does not do to the inputs what the graph does."""
    expected, found = [x.clone() for x in inputs], [x.clone() for x in inputs]
    with torch.no_grad():
        graph(*expected)
    table = (ctypes.c_void_p * len(found))(*(x.data_ptr() for x in found))
    workspace = torch.empty(program.workspace_bytes, dtype=torch.uint8)
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(program.address)
    run(ctypes.addressof(table), workspace.data_ptr())
    for x, y in zip(expected, found, strict=True):
        if x.is_floating_point():
            tolerance = torch.finfo(x.dtype).eps ** 0.5
            scale = float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0
            # An error estimate may be rounding alone: no comparison below a hundredth.
            if torch.allclose(x, y, rtol=tolerance, atol=tolerance * max(scale, 0.01), equal_nan=True):
                continue
        elif torch.equal(x, y):
            continue
        raise CompileError(
            "what torch's compiler made of func does not compute what func does. "
            'Use engine="eager", and please report it.'
        )


@dataclass(frozen=True)
class _Call:
    """A kernel, given by its C++ source and argument types, or (source "") a product of operands (a, b, c)."""

    source: str
    types: tuple[str, ...]
    operands: tuple[Tensor, ...]

    @property
    def read_only(self) -> list[bool]:
        return [kind.startswith("const") for kind in self.types] if self.source else [True, True, False]


class _Recorder(TorchDispatchMode):
    """Collects the calls of a wrapper's run; whatever torch operation it needs passes through here."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.mm.out, torch.ops.aten.bmm.out) and args[0].dtype in _C_TYPES:
            self.calls.append(_Call("", (), (args[0], args[1], kwargs["out"])))
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
        _recorders[-1].calls.append(_Call(self._source, self._types, operands))


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


def _record(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> list[_Call]:
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


class _Source:
    """The C++ of one or more programs."""

    def __init__(self) -> None:
        self._kernels: dict[str, str] = {}
        self._constants: list[str] = []
        self._programs: list[str] = []

    def add(self, calls: Sequence[_Call], inputs: Sequence[Tensor]) -> int:
        """Adds a program and returns the bytes of its workspace."""
        places, workspace_bytes, constants = _places(calls, inputs)
        for storage in constants:
            name = f"constant_{len(self._constants)}"
            values = ", ".join(map(str, bytes(storage.tolist())))
            self._constants.append(f"alignas({_ALIGNMENT}) static unsigned char {name}[] = {{{values}}};")
            places[storage.data_ptr()] = f"(char*){name}"
        body: list[str] = []
        for call in calls:
            offsets = [x.storage_offset() * x.element_size() for x in call.operands]
            at = [
                f"{places[x.untyped_storage().data_ptr()]} + {n}" for x, n in zip(call.operands, offsets, strict=True)
            ]
            if call.source:
                name = self._kernels.setdefault(call.source, f"kernel_{len(self._kernels)}")
                operands = ", ".join(f"({kind})({place})" for kind, place in zip(call.types, at, strict=True))
                body.append(f"{name}({operands});")
            else:
                body.append(_matmul(call.operands, at))
        lines = "\n    ".join(body)
        head = f'extern "C" void program_{len(self._programs)}(char** in, char* workspace)'
        self._programs.append(f"{head}\n{{\n    {lines}\n}}\n")
        return workspace_bytes

    def text(self) -> str:
        kernels: list[str] = []
        headers: dict[str, None] = {}
        for source, name in self._kernels.items():
            lines = source.splitlines()
            headers.update((line, None) for line in lines if line.startswith("#include"))
            code = "\n".join(line for line in lines if not line.startswith("#include"))
            kernels.append(re.sub(r'extern "C"\s+void\s+kernel\(', f"static void {name}(", code))
        matmul = Path(__file__).with_name("matmul.h").read_text().replace("#pragma once", "")
        return "\n".join([*headers, matmul, *self._constants, *kernels, *self._programs])


def _places(calls: Sequence[_Call], inputs: Sequence[Tensor]) -> tuple[dict[int, str], int, list[torch.UntypedStorage]]:
    """Where each storage lies: an input, or a part of the workspace that is its own from its first use to its last.

    Also the bytes of the workspace, and the storages without a place: constants, read without having been written.
    """
    places = {x.untyped_storage().data_ptr(): f"in[{i}]" for i, x in enumerate(inputs)}
    uses: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    constants: dict[int, torch.UntypedStorage] = {}
    for n, call in enumerate(calls):
        for x, is_read_only in zip(call.operands, call.read_only, strict=True):
            memory = x.untyped_storage()
            address = memory.data_ptr()
            if address in places or address in constants:
                continue
            if address not in uses and is_read_only:
                constants[address] = memory
                continue
            uses.setdefault(address, []).append(n)
            sizes[address] = -(-memory.nbytes() // _ALIGNMENT) * _ALIGNMENT
    if sum(memory.nbytes() for memory in constants.values()) > _MAX_CONSTANT_BYTES:
        raise CompileError('func makes large constant tensors. Make them once, outside of it, or use engine="eager".')
    taken: list[tuple[int, int, int, int]] = []  # first use, last use, start, end
    for address, used in sorted(uses.items(), key=lambda item: -sizes[item[0]]):
        start = 0
        for _, _, low, high in sorted((t for t in taken if t[0] <= used[-1] and used[0] <= t[1]), key=lambda t: t[2]):
            if start + sizes[address] <= low:
                break
            start = max(start, high)
        taken.append((used[0], used[-1], start, start + sizes[address]))
        places[address] = f"workspace + {start}"
    return places, max((end for *_, end in taken), default=0), list(constants.values())


def _matmul(operands: Sequence[Tensor], at: Sequence[str]) -> str:
    a, b, _ = operands
    kind = _C_TYPES[a.dtype]
    (m, k), n = a.shape[-2:], b.shape[-1]
    strides = ", ".join(str(s) for x in operands for s in x.stride()[-2:])
    name = f"aca::matmul<{kind}, {m}, {n}, {k}, {strides}>"
    if a.dim() == 2:
        return f"{name}((const {kind}*)({at[0]}), (const {kind}*)({at[1]}), ({kind}*)({at[2]}));"
    steps = [x.stride(0) * x.element_size() for x in operands]
    moved = [f"{place} + i * {step}" for place, step in zip(at, steps, strict=True)]
    call = f"{name}((const {kind}*)({moved[0]}), (const {kind}*)({moved[1]}), ({kind}*)({moved[2]}));"
    return f"for (long i = 0; i < {a.shape[0]}; ++i) {call}"
