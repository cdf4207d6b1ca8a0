"""Capture of programs as CUDA graphs, and their repetition by the host or by a loop on the device.

Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aca_ext.engines.cuda_graph.control_block import (
    ControlBlock,
    device_loop,
    new_stream,
    obstacle_to_loop,
    restart_capture,
    supports_device_loops,
)
from aca_ext.errors import AcaError, GraphError

# With True the GPU decides how often a step is repeated; with False the host launches a number of steps ahead. Both
# make the same steps. Which is faster has not been measured yet.
DEVICE_LOOPS = False
_WARM_UPS = 2
_HINT = 'Use engine="eager", or change func.'
_PATIENCE = 60.0  # seconds
# Errors of a capture that was invalidated, perhaps by another thread that waited for the device: by their code in newer
# versions of torch, and by their text.
_INVALIDATED = (900, 901)
_INVALIDATED_TEXTS = ("not permitted when stream is capturing", "due to a previous error during capture")

Body = Callable[[], None]
Repeat = Callable[[int], None]  # repeats at least so many times; steps after the end of the solve have no effect


class Program(Protocol):
    """A body of operations that was captured once and can be launched again."""

    def launch(self, times: int = 1) -> None:
        """Launches it ``times`` times on the current stream, without waiting."""


class Capturer(Protocol):
    """Makes programs, and repetitions of them, on one device."""

    def capture(self, make_body: Callable[[], Body], reset: Callable[[], None]) -> Program: ...

    def repeat(self, first: Any, body: Any, block: ControlBlock) -> Repeat: ...

    def in_order(self) -> AbstractContextManager[None]: ...


class _Turns:
    """Shared state of the programs of one device: the stream of all captures, and an event at the end of the last use.

    cuBLAS has a workspace for each stream (32 MB on an H100), and programs captured on a stream use its workspace in
    every launch. A single stream needs a single workspace, so launches wait for all earlier ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.done, self.lock = new_stream(device), torch.cuda.Event(), threading.RLock()
        self._workspaces: Any = None
        with torch.cuda.device(device), suppress(AttributeError, RuntimeError):  # older torch, other allocator
            self._workspaces = torch.cuda.MemPool()

    def keeping_workspaces(self) -> AbstractContextManager[Any]:
        """Context of a warm-up, in which the workspaces of cuBLAS and cublasLt go into memory reserved for them."""
        return nullcontext() if self._workspaces is None else _Keeping(self._workspaces, self.stream.device)


class _Keeping(TorchDispatchMode):
    """Allocates the workspaces of cuBLAS and cublasLt, one for each thread that calls them, in ``pool``.

    torch frees the workspaces of a stream when any CUDA graph captured on it is destroyed (2.12 and newer), or when
    torch.compile captures CUDA graphs. Programs captured before still write to them, so their memory must be reserved.
    """

    def __init__(self, pool: Any, device: torch.device) -> None:
        super().__init__()
        self._pool, self._device = pool, device
        self._threads = set[int]()  # autograd has a thread of its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        thread = threading.get_ident()
        if thread not in self._threads:
            self._threads.add(thread)
            with suppress(RuntimeError), torch.cuda.use_mem_pool(self._pool, self._device):
                torch.cuda.current_blas_handle()  # makes the workspace if there is none
                x = torch.zeros(2, 2, device=self._device)
                torch.addmm(x[0], x, x)  # a product with a bias is one of cublasLt, which may have its own workspace
        return func(*args, **(kwargs or {}))


_turns_of = cache(_Turns)
_one_capture = threading.RLock()  # torch supports one capture at a time in a process, on all devices together


class CudaCapturer:
    """Capturer of CUDA graphs that share one pool of memory.

    A CUDA graph keeps its memory in the pool between launches. Graphs of one pool are never launched concurrently.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._turns = device, _turns_of(device)
        self._stream = self._turns.stream
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, make_body: Callable[[], Body], reset: Callable[[], None]) -> CudaProgram:
        """Captures the body that ``make_body`` returns; ``reset`` restores the memory that the body changes.

        The body runs a few times before the capture, so that its one-time initialisation is not captured.

        Raises:
            GraphError: the body contains an operation that cannot be captured.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            body = make_body()
            reset()
            with self._turns.keeping_workspaces():
                body()
            for _ in range(_WARM_UPS):
                reset()
                body()
            reset()
        torch.cuda.synchronize(self._device)
        try:
            graph = twice_if_invalidated(lambda: self._captured(body, current))
        except (AcaError, torch.cuda.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise GraphError(f"A step with func cannot be captured. {_HINT} CUDA reports: {error}") from error
        current.wait_stream(self._stream)
        return CudaProgram(graph)

    def _captured(self, body: Body, current: torch.cuda.Stream) -> Any:
        graph = _new_graph()
        # Restores the current stream, since a capture that fails to end leaves its own stream active.
        with torch.cuda.stream(current), held(_one_capture), _no_garbage_collection(), ExitStack() as capture:
            with torch.inference_mode(False):  # torch makes tensors that later captures write to
                capture.enter_context(
                    torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
                )
            self._run_captured(body)
        return graph

    def _run_captured(self, body: Body) -> None:
        try:
            body()
        except BaseException:
            restart_capture(self._stream)
            raise

    def repeat(self, first: CudaProgram | None, body: CudaProgram, block: ControlBlock) -> Repeat:
        """Returns a function that launches ``first`` once and then ``body`` repeatedly."""
        if not DEVICE_LOOPS:
            return _Ahead(first, body)
        try:
            return self._loop(first, body, block)
        except RuntimeError as error:
            return _Ahead(first, body, str(error))

    def _loop(self, first: CudaProgram | None, body: CudaProgram, block: ControlBlock) -> _Loop:
        if not (_keeps_graphs() and supports_device_loops()):
            raise RuntimeError("loops on the device need torch 2.8, and CUDA 12.4 in the build and in the driver")
        programs = [body] if first is None else [first, body]
        graphs = [program.graph.raw_cuda_graph() for program in programs]
        for graph in graphs:
            if obstacle := obstacle_to_loop(graph):
                raise RuntimeError(f"the captured step contains {obstacle}")
        before = 0 if first is None else graphs[0]
        return _Loop(device_loop(self._device.index or 0, before, graphs[-1], block.address), self._device, programs)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Orders the launches inside after all earlier ones on any stream, since programs reuse their memory."""
        turns, stream = self._turns, torch.cuda.current_stream(self._device)
        with held(turns.lock):
            stream.wait_event(turns.done)
            try:
                yield
            finally:
                turns.done.record(stream)


def twice_if_invalidated(capture: Callable[[], Any]) -> Any:
    """The result of ``capture``, which is called once more if CUDA invalidated the first capture.

    Another thread does that by ``torch.cuda.synchronize``; func does it too, and then the second capture fails as well.
    """
    try:
        return capture()
    except RuntimeError as error:
        text = str(error)
        if getattr(error, "error_code", None) not in _INVALIDATED and not any(x in text for x in _INVALIDATED_TEXTS):
            raise
    return capture()


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """Context that holds a lock, which a capture in another thread may hold for as long as it takes.

    A backward pass runs in a thread that torch has once per device. If the capture needs that thread, since func calls
    autograd, the two would wait for each other for ever; so a backward pass does not wait for long.

    Raises:
        GraphError: the lock was not free in time.
    """
    is_backward = torch._C._current_graph_task_id() != -1
    if not lock.acquire(timeout=_PATIENCE if is_backward else -1):
        raise GraphError(
            f"This backward pass waited {_PATIENCE:g} s for a capture in another thread, whose func calls autograd and "
            "may need the thread of this pass. Make one solve and its backward pass with each func before you start "
            'several threads, or use engine="eager".'
        )
    try:
        yield
    finally:
        lock.release()


class CudaProgram:
    """A captured CUDA graph; it refers to neither its body nor func, which would be a reference cycle."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def launch(self, times: int = 1) -> None:
        for _ in range(times):
            self.graph.replay()


class _Ahead:
    """Repetition by the host; ``obstacle`` is the reason why a requested loop on the device is not possible."""

    def __init__(self, first: CudaProgram | None, body: CudaProgram, obstacle: str = "") -> None:
        self._first, self._body, self.obstacle = first, body, obstacle

    def __call__(self, times: int) -> None:
        if self._first is not None:
            self._first.launch()
        self._body.launch(times)


class _Loop:
    """Repetition by a loop on the device; keeps the programs, whose memory it uses, alive."""

    def __init__(self, loop: Any, device: torch.device, programs: list[CudaProgram]) -> None:
        self._loop, self._device, self._programs = loop, device, programs

    def __call__(self, times: int) -> None:
        self._loop.launch(torch.cuda.current_stream(self._device).cuda_stream)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disables garbage collection: destroying another CUDA graph in this thread would break a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _keeps_graphs() -> bool:
    """Tells whether this torch gives access to captured CUDA graphs before instantiation (2.8 and newer)."""
    return hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph")


def _new_graph() -> Any:
    return torch.cuda.CUDAGraph(keep_graph=True) if _keeps_graphs() else torch.cuda.CUDAGraph()
