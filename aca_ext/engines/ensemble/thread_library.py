"""A compiled library whose lanes are threads of a GPU, as functions of tensors on it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.ensemble.cuda_build import load
from aca_ext.engines.ensemble.library import Cotangents, Keep, LibraryTask, owner_of
from aca_ext.errors import CompileError

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p
_STEPS_AT_FIRST = 48  # of a sample, for which there is memory before any solve was made
_STEPS_IN_PIECE = 16  # of the memory that a thread takes at once (csrc/ensemble/threads.cuh)
_MOST_SUMS = 2**27  # numbers in rows of sums, one row for each thread: 1 GiB


class _Arena(ctypes.Structure):
    _fields_ = [
        ("keep", _I64), ("memory", _POINTER), ("size", _I64), ("used", _POINTER), ("last", _POINTER)
    ]  # fmt: skip


class ThreadRecord:
    """Memory for accepted steps of a solve.

    Attributes:
        memory: of the steps and the states at their starts; None before the solve and once it is freed.
        used: bytes that the solve needed.
        last: address of the last step of each sample.
    """

    def __init__(self, n_samples: int, keep: Keep, device: torch.device) -> None:
        self.keep = keep
        self.last = torch.zeros(n_samples, dtype=torch.int64, device=device)
        self.used = torch.zeros(1, dtype=torch.int64, device=device)
        self.memory: Tensor | None = None

    @property
    def has_states(self) -> bool:
        return self.memory is not None

    @property
    def has_steps(self) -> bool:
        return self.memory is not None

    def free(self) -> None:
        self.memory = None

    def arena(self) -> _Arena:
        memory = self.memory
        size, address = (0, None) if memory is None else (memory.numel(), memory.data_ptr())
        return _Arena(int(self.keep), address, size, self.used.data_ptr(), self.last.data_ptr())


class ThreadLibrary:
    """The functions of a source compiled for a GPU, with the interface of ``Library``.

    Args:
        n_learnt: numbers that samples share and whose cotangents the library computes.
    """

    def __init__(self, source: str, n_learnt: int, device: torch.device) -> None:
        self._functions = f = load(source, device)
        self.n_learnt, self._device = n_learnt, device
        where = [_I64, ctypes.c_int, _POINTER]
        f.bytes_of_piece.restype = f.most_threads_forward.restype = f.most_threads_backward.restype = _I64
        f.most_threads_forward.argtypes = f.most_threads_backward.argtypes = [ctypes.c_int]
        f.name_of_error.restype = ctypes.c_char_p
        f.forward.argtypes = [_POINTER, _POINTER, *where]
        f.backward.argtypes = [_POINTER, _POINTER, _POINTER, *where]
        f.evaluate.argtypes = [_I64, *[_POINTER] * 9, *where]
        f.bounds.argtypes = [_POINTER, _POINTER, _POINTER, _POINTER, *where]
        self._pieces = _STEPS_AT_FIRST / _STEPS_IN_PIECE  # of memory that a sample needs

    def chunks(self, n_samples: int) -> int:
        """Rows of sums over samples that the backward pass makes, one for each of its threads."""
        most = self._most_threads(self._functions.most_threads_backward)
        return min(n_samples, most, max(_MOST_SUMS // max(self.n_learnt, 1), 1))

    def new_record(self, n_samples: int, keep: Keep, most: int) -> ThreadRecord:
        """An empty record of accepted steps.

        Raises:
            CompileError: checkpoints are wanted.
        """
        if keep is Keep.CHECKPOINTS:
            raise CompileError('checkpoints are not supported on a GPU. Leave them out, or use engine="eager".')
        return ThreadRecord(n_samples, keep, self._device)

    def states_of(self, record: ThreadRecord) -> Tensor:
        """A tensor with whose memory the states of the record are freed: autograd says when they are needed no more."""
        return owner_of(record.free)

    def forward(self, task: LibraryTask, record: ThreadRecord, finished: Callable[[int], object] | None = None) -> None:
        """Solves, again if there was too little memory for the steps; tells ``finished`` how many samples are done."""
        n = int(task.n_samples)
        threads = min(n, self._most_threads(self._functions.most_threads_forward))
        piece = self._functions.bytes_of_piece()
        if record.keep is not Keep.NOTHING:
            record.memory = self._memory(piece * (threads + math.ceil(n * self._pieces)))
        self._launch_forward(task, record, threads)
        needed = int(record.used)
        if record.memory is not None and needed > record.memory.numel():
            record.memory = None  # before there is more of it
            record.memory = self._memory(needed)
            record.used.zero_()
            record.last.zero_()
            self._launch_forward(task, record, threads)
        if record.keep is not Keep.NOTHING:
            self._pieces = 1.1 * needed / piece / n
        if finished is not None:
            finished(n)

    def _launch_forward(self, task: LibraryTask, record: ThreadRecord, threads: int) -> None:
        arena = record.arena()
        self._launch(self._functions.forward, ctypes.byref(task), ctypes.byref(arena), threads)

    def backward(self, task: LibraryTask, record: ThreadRecord, to: Cotangents) -> None:
        """Transposes the recorded steps."""
        arena, threads = record.arena(), self.chunks(task.n_samples)
        self._launch(self._functions.backward, ctypes.byref(task), ctypes.byref(arena), ctypes.byref(to), threads)

    def evaluate(self, t: Tensor, y: Tensor, p: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """func at (t, y), each with a row for each sample, and the cotangents of y, p and w for that of its result."""
        k, gy, gp, threads = torch.empty_like(y), torch.empty_like(y), torch.empty_like(p), self.chunks(len(y))
        gw = torch.zeros(threads, self.n_learnt, dtype=torch.float64, device=self._device)
        self._launch(self._functions.evaluate, len(y), *(x.data_ptr() for x in (t, y, p, w, g, k, gy, gp, gw)), threads)
        return k, gy, gp, gw.sum(0)

    def bounds(self, record: ThreadRecord, counts: Tensor) -> tuple[Tensor, ...]:
        """(count, 2) starts and ends of the accepted steps of each sample."""
        ends, arena = counts.cumsum(0), record.arena()
        found = torch.empty(int(ends[-1]), 2, dtype=torch.float64, device=self._device)
        count, end = counts.to(self._device), ends.to(self._device)
        operands = (ctypes.byref(arena), *(x.data_ptr() for x in (count, end, found)))
        self._launch(self._functions.bounds, *operands, len(counts))
        return found.cpu().split(counts.tolist())

    def _memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _most_threads(self, count: Callable[[int], int]) -> int:
        most = count(self._index())
        if most == 0:
            raise CompileError(f'{self._device} cannot run the code made of func. Use engine="eager".')
        return most

    def _launch(self, function: Callable[..., int], *operands: Any) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else None
        error = function(*operands, self._index(), stream)
        if error:
            reason = self._functions.name_of_error(error).decode()
            raise CompileError(f'CUDA does not start the code made of func: {reason}. Use engine="eager".')

    def _index(self) -> int:
        return self._device.index or 0
