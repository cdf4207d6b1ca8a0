"""Captured programs and what repeats them: a CUDA graph launched many times in a row, or a loop that the GPU runs by
itself. Nothing here has run on a GPU yet.
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
    obstacle_to_loop,
    restart_capture,
    supports_device_loops,
)
from aca_ext.errors import AcaError, GraphError

# Whether the GPU decides by itself how often a step is repeated, instead of the host launching it so often ahead. Both
# take the same steps; which is faster has not been measured yet.
DEVICE_LOOPS = False
_WARM_UPS = 2
_HINT = 'Use engine="eager", or change func.'

Body = Callable[[], None]
Repeat = Callable[[int], None]  # at least so often, if the control block does not say that it is enough


class Program(Protocol):
    """Something captured once and repeated."""

    def launch(self, times: int = 1) -> None:
        """Runs it so many times on the current stream, without waiting."""


class Capturer(Protocol):
    """Makes programs, and loops of them, on one device."""

    def capture(self, make_body: Callable[[], Body], reset: Callable[[], None]) -> Program: ...

    def repeat(self, first: Any, body: Any, block: ControlBlock) -> Repeat: ...

    def in_order(self) -> AbstractContextManager[None]: ...


class _Turns:
    """Shared state of the programs of one device: the stream that they are captured on, and the end of the last.

    cuBLAS keeps a workspace for each stream (32 MB on an H100), and what was captured there goes on using it. So that
    there is one alone, there is one stream, and whoever launches programs waits for whoever did so before.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.done, self.lock = torch.cuda.Stream(device), torch.cuda.Event(), threading.RLock()
        self._workspaces: Any = None
        with torch.cuda.device(device), suppress(AttributeError, RuntimeError):  # not in every torch and allocator
            self._workspaces = torch.cuda.MemPool()

    def keeping_workspaces(self) -> AbstractContextManager[Any]:
        """Around a warm-up: what cuBLAS works in, on this stream, is in memory that nothing else ever gets."""
        return nullcontext() if self._workspaces is None else _Keeping(self._workspaces, self.stream.device)


class _Keeping(TorchDispatchMode):
    """Has cuBLAS's workspaces, one for each thread that works, in ``pool``.

    torch gives those of a stream back when any graph that was captured on it is destroyed (2.12 and newer), or when
    torch.compile captures graphs of its own, while programs captured before go on writing to them.
    """

    def __init__(self, pool: Any, device: torch.device) -> None:
        super().__init__()
        self._pool, self._device = pool, device
        self._threads = set[int]()  # that of autograd is another one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        thread = threading.get_ident()
        if thread not in self._threads:
            self._threads.add(thread)
            with suppress(RuntimeError), torch.cuda.use_mem_pool(self._pool, self._device):
                torch.cuda.current_blas_handle()  # makes the workspace where there is none
        return func(*args, **(kwargs or {}))


_turns_of = cache(_Turns)
_one_capture = threading.RLock()  # at a time in a process is what torch supports, whatever the device


class CudaCapturer:
    """CUDA graphs that share one pool of memory.

    What they hold in that memory is theirs from one launch to the next; those that share it are never launched at the
    same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._turns = device, _turns_of(device)
        self._stream = self._turns.stream
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, make_body: Callable[[], Body], reset: Callable[[], None]) -> CudaProgram:
        """The body that ``make_body`` returns, captured. ``reset`` puts back what the body changes.

        The body runs a few times before, so that what it sets up once is there.

        Raises:
            GraphError: it does what cannot be captured.
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
        graph = _new_graph()
        try:
            # The stream, since a capture that fails to end would leave its own behind.
            with torch.cuda.stream(current), _one_capture, _no_garbage_collection(), ExitStack() as capture:
                with torch.inference_mode(False):  # torch makes tensors that it writes to at all later captures
                    capture.enter_context(
                        torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
                    )
                self._run_captured(body)
        except (AcaError, torch.cuda.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise GraphError(f"A step with func cannot be captured. {_HINT} CUDA says: {error}") from error
        current.wait_stream(self._stream)
        return CudaProgram(graph)

    def _run_captured(self, body: Body) -> None:
        try:
            body()
        except BaseException:
            restart_capture(self._stream)
            raise

    def repeat(self, first: CudaProgram | None, body: CudaProgram, block: ControlBlock) -> Repeat:
        """``first``, then ``body`` again and again."""
        if not DEVICE_LOOPS:
            return _Ahead(first, body)
        try:
            return self._loop(first, body, block)
        except RuntimeError as error:
            return _Ahead(first, body, str(error))

    def _loop(self, first: CudaProgram | None, body: CudaProgram, block: ControlBlock) -> _Loop:
        if not (_keeps_graphs() and supports_device_loops()):
            raise RuntimeError("loops on the device take torch 2.8, and CUDA 12.4 in the build and in the driver")
        programs = [body] if first is None else [first, body]
        graphs = [program.graph.raw_cuda_graph() for program in programs]
        for graph in graphs:
            if obstacle := obstacle_to_loop(graph):
                raise RuntimeError(f"the captured step holds {obstacle}")
        before = 0 if first is None else graphs[0]
        return _Loop(device_loop(self._device.index or 0, before, graphs[-1], block.address), self._device, programs)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """After what was launched before, on whatever stream: programs use the same memory each time."""
        turns, stream = self._turns, torch.cuda.current_stream(self._device)
        with turns.lock:
            stream.wait_event(turns.done)
            try:
                yield
            finally:
                turns.done.record(stream)


class CudaProgram:
    """A captured graph. It holds neither its body nor func, which may be what keeps it."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def launch(self, times: int = 1) -> None:
        for _ in range(times):
            self.graph.replay()


class _Ahead:
    """Launches one after another. ``obstacle``: why not a loop on the device, where one was asked for."""

    def __init__(self, first: CudaProgram | None, body: CudaProgram, obstacle: str = "") -> None:
        self._first, self._body, self.obstacle = first, body, obstacle

    def __call__(self, times: int) -> None:
        if self._first is not None:
            self._first.launch()
        self._body.launch(times)


class _Loop:
    """A loop on the device, with the programs whose memory it works in."""

    def __init__(self, loop: Any, device: torch.device, programs: list[CudaProgram]) -> None:
        self._loop, self._device, self._programs = loop, device, programs

    def __call__(self, times: int) -> None:
        self._loop.launch(torch.cuda.current_stream(self._device).cuda_stream)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A captured graph that is destroyed by the way, in the same thread, would spoil a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _keeps_graphs() -> bool:
    """Tells whether this torch hands out captured graphs before they are instantiated (2.8 and newer)."""
    return hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph")


def _new_graph() -> Any:
    return torch.cuda.CUDAGraph(keep_graph=True) if _keeps_graphs() else torch.cuda.CUDAGraph()
