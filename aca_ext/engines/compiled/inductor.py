"""Compilation of a traced graph to one C++ function on addresses, from Inductor's kernels without its Python wrapper.

Inductor turns a traced graph into C++ kernels, calls of matrix products, and a Python wrapper that allocates buffers
and makes the calls in order. Here the wrapper runs once, with stand-ins that record each call and its memory. The
recorded calls then become one C++ function of a table of addresses. Intermediate buffers lie at fixed places of one
workspace.
"""

from __future__ import annotations

import ctypes
import platform
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from aca_ext.engines.compiled.cpp_source import C_TYPES, Call, Source, with_own_vectors
from aca_ext.engines.compiled.library_cache import TORCH_LIBRARY, forget, library, origin, run_compiler, source_file
from aca_ext.engines.compiled.lowerings import lowerings
from aca_ext.engines.compiled.shortcuts import shortcuts, templates_compiled_when_used
from aca_ext.errors import CompileError


class Recipe(NamedTuple):
    """A program to be compiled.

    Attributes:
        record: returns the calls that the program makes, on the memory of ``inputs`` and on new memory.
        inputs: example inputs, which share no memory.
        constant: number of inputs at the end that do not change between runs.
        inlines: kernels may be copied to where they are called, which makes short programs faster, and long ones slow
            to compile.
    """

    record: Callable[[], list[Call]]
    inputs: Sequence[Tensor]
    constant: int
    inlines: bool


_WITH_OWN_VECTORS = {"CPU_CAPABILITY_AVX2", "CPU_CAPABILITY_AVX512"}  # definitions among the flags of the compiler
_BEYOND_OWN_VECTORS = ".template cast<int", "c10::"  # the most frequent ones

_SLOW_WORDS = {"-g1", "-Wall", "-pedantic", "-ltorch", "-ltorch_cpu", "-ltorch_python"}
_VECTORS_OF_FLOATS = {"avx512", "avx2"}

Wrapper = Callable[[list[Tensor]], Sequence[Tensor]]

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


def compile_programs(known_by: Sequence[str] | None, trace: Callable[[], Sequence[Recipe]]) -> list[Program]:
    """Programs from the cache on disk, or compiled into one library from the recipes that ``trace`` returns.

    Args:
        known_by: texts that determine the programs; None if only their source does.

    Raises:
        CompileError: a graph needs an operation that is neither a generated kernel nor a matrix product.
    """
    with LOCK:
        if known_by is None:
            source = _source(trace())
            found = library([*origin(), source], lambda path: _compile(source, path))
        else:
            found = library([*origin(), *known_by], lambda path: _build(trace, path))
    return [_program(found, i) for i in range(_constant(found, "programs"))]


def forget_programs(known_by: Sequence[str]) -> None:
    """Deletes programs that proved wrong from the cache on disk, so that they are compiled again."""
    forget([*origin(), *known_by])


def _build(trace: Callable[[], Sequence[Recipe]], to: Path) -> None:
    """Writes the library of the recipes, for the best vector instructions that the processor has.

    Inductor would first compile a test for each set of instructions, which takes longer than the library. If the
    compiler or torch does not know the best set, the library is built again, from tests.
    """
    with _untested_instructions():
        source = _source(trace())
        try:
            _compile(source, to)
            ctypes.CDLL(str(to))
            return
        except (CompileError, OSError):
            pass
    _compile(_source(trace()), to)


@contextmanager
def _untested_instructions() -> Iterator[None]:
    """Makes Inductor choose the best vectors of this processor that hold floats, without a test by the compiler."""
    from torch._inductor import cpu_vec_isa

    needed = ("valid_vec_isa_list", "supported_vec_isa_list", "x86_isa_checker")
    if platform.machine() not in ("x86_64", "AMD64") or not all(_has(cpu_vec_isa, name) for name in needed):
        yield
        return
    # Others are these with instructions for bfloat16, int8 and matrices. The truth value of each is its test.
    names = _VECTORS_OF_FLOATS & set(cpu_vec_isa.x86_isa_checker())
    kinds: list[Any] = [type(isa) for isa in cpu_vec_isa.supported_vec_isa_list if str(isa) in names]
    untested = [type(kind.__name__, (kind,), {"__bool__": lambda self: True})() for kind in kinds]
    original = cpu_vec_isa.valid_vec_isa_list
    setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: untested)  # noqa: B010
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = original


def _source(recipes: Sequence[Recipe]) -> str:
    source = Source()
    for recipe in recipes:
        source.add(recipe.record(), recipe.inputs, recipe.constant, inlines=recipe.inlines)
    return source.text()


def _program(found: ctypes.CDLL, i: int) -> Program:
    address, prepare = (
        ctypes.cast(getattr(found, f"{name}_{i}"), ctypes.c_void_p).value or 0 for name in ("program", "prepare")
    )
    return Program(address, prepare, _constant(found, f"workspace_bytes_{i}"), _constant(found, f"prepared_bytes_{i}"))


def _constant(found: ctypes.CDLL, name: str) -> int:
    return ctypes.c_long.in_dll(found, name).value


def _compile(source: str, to: Path) -> None:
    """Compiles C++ with the compiler and the flags of Inductor."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with _inductor_settings():
        options = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu")
        command = CppBuilder(name="new", sources=source_file(to).name, BuildOption=options).get_command_line()
    words = shlex.split(command)
    words[words.index("-o") + 1] = str(to)
    if _WITH_OWN_VECTORS.intersection(words) and not any(part in source for part in _BEYOND_OWN_VECTORS):
        try:
            run_compiler(_for_own_vectors(words, to), with_own_vectors(source), to)
            return
        except CompileError:
            pass  # the kernels need more of torch's header
    run_compiler(words, source, to)


def _for_own_vectors(words: Sequence[str], to: Path) -> list[str]:
    """The compiler's command, but linked to an empty library in place of torch's, whose names take long to read.

    At load time its name finds torch's library, which has the functions of Sleef and BLAS.
    """
    empty = to.with_name(TORCH_LIBRARY)
    run_compiler(
        [words[0], "-shared", "-nostdlib", f"-Wl,-soname,{TORCH_LIBRARY}", "-o", str(empty), source_file(empty).name],
        "",
        empty,
    )
    kept = [word for word in words if word not in _SLOW_WORDS]
    return [*kept, "-w", "-Wl,--no-as-needed", str(empty)]


def run_program(program: Program, inputs: Sequence[Tensor]) -> None:
    """Runs a program once on tensors laid out like its example inputs."""
    table = (ctypes.c_void_p * len(inputs))(*(x.data_ptr() for x in inputs))
    workspace = torch.empty(program.workspace_bytes, dtype=torch.uint8, device="cpu")
    prepared = torch.empty(program.prepared_bytes, dtype=torch.uint8, device="cpu")
    prepare = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(program.prepare)
    prepare(ctypes.addressof(table), prepared.data_ptr())
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(program.address)
    run(ctypes.addressof(table), workspace.data_ptr(), prepared.data_ptr())


class Recorder(TorchDispatchMode):
    """Records the calls that wrappers make, and refuses torch operations other than matrix products and views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def run(self, wrapper: Wrapper, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Records the calls of a wrapper, and returns the results that it allocated."""
        _recorders.append(self)
        try:
            with torch.no_grad(), self:
                return wrapper(list(inputs))
        finally:
            _recorders.pop()

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


_recorders: list[Recorder] = []


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
        "graph_partition": False,  # for CUDA graphs
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


def whole_program(graph: fx.GraphModule, inputs: Sequence[Tensor], constant: int) -> Recipe:
    """The program of one graph, which is functional and returns results by ``copy_`` to inputs at its end."""

    def record() -> list[Call]:
        recorder = Recorder()
        recorder.run(wrapper_of(graph, inputs), inputs)
        return recorder.calls

    return Recipe(record, inputs, constant, inlines=False)


def wrapper_of(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Wrapper:
    """Inductor's wrapper of a functional graph, for ``Recorder.run``; it empties the list that it is called with."""
    with templates_compiled_when_used():
        from torch._inductor import async_compile
        from torch._inductor.compile_fx import compile_fx_inner

    AsyncCompile: Any = async_compile.AsyncCompile  # noqa: N806
    original = AsyncCompile.cpp_pybinding
    AsyncCompile.cpp_pybinding = lambda self, types, source, *_: _Kernel(types, source)
    try:
        with torch.no_grad(), _inductor_settings(), lowerings(), shortcuts():
            wrapper: Wrapper = compile_fx_inner(graph, list(inputs))
            return wrapper
    finally:
        AsyncCompile.cpp_pybinding = original
