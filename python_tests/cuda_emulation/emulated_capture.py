"""Captures of the graph engine in the emulation: kernels and operations of torch become nodes of emulated graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from emulated_control import emulated_blocks
from emulation import Call, Emulation
from torch.utils._python_dispatch import TorchDispatchMode

from aca_ext.engines.cuda_graph import captures, engine
from aca_ext.engines.cuda_graph.control_block import ControlBlock
from aca_ext.problem.state import tensors_in
from aca_ext.vector_field import gradient_sums

Body = Callable[[], None]


class _Recorded(TorchDispatchMode):
    """Records the operations of torch as nodes of the capture; a launch repeats them into the same memory.

    It keeps all tensors of the body alive, as the memory pool of a CUDA graph does.
    """

    def __init__(self, cuda: Emulation, stream: int) -> None:
        super().__init__()
        self._cuda, self._stream = cuda, stream
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._call = Call(self._repeat)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._cuda.library.record_call(self._stream, self._call, len(self._operations))
        self._operations.append((func, args, kwargs or {}, result))
        return result

    def _repeat(self, number: int) -> None:
        func, args, kwargs, result = self._operations[number]
        with torch.no_grad():
            again = func(*args, **kwargs)
            for to, x in zip(_tensors(result), _tensors(again), strict=True):
                if to.data_ptr() != x.data_ptr():
                    to.detach().copy_(x)


def _tensors(result: Any) -> list[torch.Tensor]:
    return list(tensors_in(result if isinstance(result, (tuple, list)) else (result,)))


class EmulatedProgram:
    """A captured graph, with the memory that it uses."""

    def __init__(self, cuda: Emulation, graph: int, recorded: _Recorded) -> None:
        self._cuda, self.graph, self._recorded = cuda, graph, recorded

    def launch(self, times: int = 1) -> None:
        for _ in range(times):
            self._cuda.library.launch_graph(self.graph)


class EmulatedCapturer:
    """The counterpart of ``CudaCapturer``."""

    def __init__(self, cuda: Emulation, stream: int) -> None:
        self._cuda, self._stream = cuda, stream
        self.programs: list[EmulatedProgram] = []
        self.n_loops = 0

    def capture(self, make_body: Callable[[], Body], reset: Body) -> EmulatedProgram:
        body = make_body()
        reset()
        body()
        reset()
        recorded = _Recorded(self._cuda, self._stream)
        self._cuda.library.begin_capture(self._stream)
        with recorded:
            body()
        graph = self._cuda.library.end_capture(self._stream)
        self.programs.append(EmulatedProgram(self._cuda, graph, recorded))
        return self.programs[-1]

    def repeat(
        self, first: EmulatedProgram | None, body: EmulatedProgram, block: ControlBlock
    ) -> Callable[[int], None]:
        def ahead(times: int) -> None:
            if first is not None:
                first.launch()
            body.launch(times)

        if not captures.DEVICE_LOOPS:
            return ahead
        assert self._cuda.library.obstacle(body.graph) == b""
        loop = self._cuda.library.new_loop(0 if first is None else first.graph, body.graph, block.address)
        self.n_loops += 1
        return lambda times: self._cuda.library.launch_loop(loop, self._stream)

    def in_order(self) -> AbstractContextManager[None]:
        return nullcontext()


@contextmanager
def emulated_engine(cuda: Emulation, *, device_loops: bool) -> Iterator[EmulatedCapturer]:
    """Context in which engine="graph" takes states on the CPU and solves in the emulation."""
    stream = cuda.library.new_stream()
    capturer = EmulatedCapturer(cuda, stream)
    with (
        emulated_blocks(cuda, stream, torch_writes=True),
        patch.object(engine, "DEVICES", ("cpu",)),
        patch.object(engine, "capturer_for", lambda device: capturer),
        patch.object(captures, "DEVICE_LOOPS", device_loops),
        # On a GPU torch adds gradients, which is recorded.
        patch.object(gradient_sums, "running_sums", lambda totals: None),
    ):
        yield capturer
    cuda.library.delete_stream(stream)
