"""A compiled library as functions of tensors."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.engines.ensemble.build import load
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Settings

_I64, _F64, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_CHUNKS_AT_ONCE = 64  # for each thread; between calls Python sees an interrupt
_CHUNKS_WATCHED = 4  # likewise, with a progress bar

# Words of an Outcome: counts of trial and accepted steps and the failure; t, h and error ratio where it happened; count
# of first slopes after jumps.
OUTCOME_WORDS = 7
# Words of NewtonCounts: Jacobians, factorisations and iterations; last step size, and last change of an iteration.
NEWTON_WORDS = 5


class _Controller(ctypes.Structure):
    _fields_ = [("order", ctypes.c_int)] + [
        (name, _F64) for name in ("safety", "ifactor", "dfactor", "pcoeff", "icoeff", "dcoeff", "min_step", "max_step")
    ]


class LibraryTask(ctypes.Structure):
    """A solve, as the Task of csrc/ensemble/task.h."""

    _fields_ = [
        ("controller", _Controller), ("first_step", _F64), ("max_num_steps", _I64), ("n_samples", _I64),
        ("n_times", _I64), ("times_step", _I64), ("times", _POINTER), ("n_stops", _I64), ("stops_step", _I64),
        ("stops", _POINTER), ("is_jump", _POINTER), ("rtol", _F64), ("atol", _F64),
        ("rtol_each", _POINTER), ("atol_each", _POINTER), ("forbids_error", _I64), ("y0", _POINTER),
        ("by_sample", _POINTER), ("shared", _POINTER), ("outputs", _POINTER), ("outcomes", _POINTER),
        ("newton_tolerance", _F64), ("newton_counts", _POINTER), ("ends", _POINTER),
    ]  # fmt: skip


_COTANGENTS = ("outputs", "y0", "by_sample", "shared", "most_slopes", "replay_faults")


class Cotangents(ctypes.Structure):
    """Addresses of cotangents, as in csrc/ensemble/task.h."""

    _fields_ = [(name, _POINTER) for name in _COTANGENTS]


class Keep(IntEnum):
    """Parts of the accepted steps that a solve records."""

    NOTHING = 0
    STEPS = 1
    STATES = 2  # and the steps
    CHECKPOINTS = 3  # some states, and no steps


class Record(ctypes.c_void_p):
    """Memory for accepted steps of a solve, freed with this object.

    Attributes:
        has_states: the states at which steps start are still there.
        has_steps: so are the steps.
    """

    has_states = has_steps = True


class Library:
    """The functions of a compiled source.

    Args:
        n_learnt: numbers that samples share and whose cotangents the library computes.
    """

    def __init__(self, source: str, n_learnt: int) -> None:
        self._functions = load(source)
        self.n_learnt = n_learnt
        f = self._functions
        f.chunk.restype = _I64
        f.new_record.restype, f.new_record.argtypes = _POINTER, [_I64, _I64, ctypes.c_int, _I64]
        f.free_record.argtypes = f.free_states.argtypes = [_POINTER]
        f.forward.argtypes = [_POINTER, _POINTER, _I64, _I64, ctypes.c_int]
        f.backward.argtypes = [_POINTER, _POINTER, _POINTER, _I64, _I64, ctypes.c_int]
        f.evaluate.argtypes = [_I64] + [_POINTER] * 9
        f.bounds.argtypes = [_POINTER, _I64, _I64, _POINTER]
        self._chunk = f.chunk()

    def chunks(self, n_samples: int) -> int:
        return -(-n_samples // self._chunk)

    def new_record(self, n_samples: int, keep: Keep, most: int) -> Record:
        """An empty record of accepted steps, or of at most so many checkpoints of each sample."""
        address = self._functions.new_record(n_samples, self.chunks(n_samples), int(keep), min(most, 2**62))
        record = Record(address)
        weakref.finalize(record, self._functions.free_record, address)
        return record

    def states_of(self, record: Record) -> Tensor:
        """A tensor with whose memory the states of the record are freed: autograd says when they are needed no more."""

        def free() -> None:
            record.has_states = False
            self._functions.free_states(record)

        return owner_of(free)  # which holds the record, so that this is freed after its states

    def forward(self, task: LibraryTask, record: Record, finished: Callable[[int], object] | None = None) -> None:
        """Solves, and tells ``finished`` how many more samples are done; raises MemoryError."""
        self._in_parts(task, lambda *part: self._functions.forward(ctypes.byref(task), record, *part), finished)

    def backward(self, task: LibraryTask, record: Record, to: Cotangents) -> None:
        """Transposes the recorded steps; raises MemoryError."""
        self._in_parts(
            task, lambda *part: self._functions.backward(ctypes.byref(task), record, ctypes.byref(to), *part)
        )

    def _in_parts(
        self, task: LibraryTask, run: Callable[..., int], finished: Callable[[int], object] | None = None
    ) -> None:
        threads, n = torch.get_num_threads(), self.chunks(task.n_samples)
        step = threads * (_CHUNKS_AT_ONCE if finished is None else _CHUNKS_WATCHED)
        for first in range(0, n, step):
            end = min(first + step, n)
            if not run(first, end, threads):
                raise MemoryError("no memory for the accepted steps of the samples")
            if finished is not None:
                finished(min(end * self._chunk, task.n_samples) - first * self._chunk)

    def evaluate(self, t: Tensor, y: Tensor, p: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """func at (t, y), each with a row for each sample, and the cotangents of y, p and w for that of its result."""
        k, gy, gp = torch.empty_like(y), torch.empty_like(y), torch.empty_like(p)
        gw = torch.zeros(self.n_learnt, dtype=torch.float64, device="cpu")
        self._functions.evaluate(len(y), *(x.data_ptr() for x in (t, y, p, w, g, k, gy, gp, gw)))
        return k, gy, gp, gw

    def bounds(self, record: Record, counts: Tensor) -> tuple[Tensor, ...]:
        """(count, 2) starts and ends of the accepted steps of each sample."""
        found = tuple(torch.empty(count, 2, dtype=torch.float64, device="cpu") for count in counts.tolist())
        for sample, to in enumerate(found):
            self._functions.bounds(record, sample, len(to), to.data_ptr())
        return found


def owner_of(free: Callable[[], None]) -> Tensor:
    """A tensor; ``free`` is called when its memory is freed."""
    memory = (ctypes.c_byte * 1)()
    weakref.finalize(memory, free)
    return torch.frombuffer(memory, dtype=torch.uint8)


class _Kept(NamedTuple):
    """A task without the addresses that differ between problems of the same settings.

    Attributes:
        made_of: the parts of the problem that it describes.
        held: tensors whose addresses the task contains.
    """

    made_of: tuple[Any, ...]
    task: LibraryTask
    held: tuple[Tensor, ...]


_kept: weakref.WeakKeyDictionary[Settings, _Kept] = weakref.WeakKeyDictionary()


def task_of(
    problem: BatchProblem, y0: Tensor, p: Tensor, w: Tensor, outputs: Tensor, outcomes: Tensor, held: list[Tensor]
) -> LibraryTask:
    """A solve as the library takes it; tensors made for it are added to ``held``, for as long as it is used."""
    kept = _kept.get(problem.settings)
    if kept is None or any(one is not other for one, other in zip(kept.made_of, _parts(problem), strict=True)):
        kept = _kept[problem.settings] = _new_task(problem, y0)
    held += kept.held
    task = LibraryTask.from_buffer_copy(kept.task)
    task.y0, task.by_sample, task.shared = y0.data_ptr(), p.data_ptr(), w.data_ptr()
    task.outputs, task.outcomes = outputs.data_ptr(), outcomes.data_ptr()
    return task


def _parts(problem: BatchProblem) -> tuple[Any, ...]:
    of_steps = problem.controller, problem.max_num_steps, problem.tolerance, problem.newton
    return *of_steps, problem.times_of_rows, problem.stops_of_rows


def _new_task(problem: BatchProblem, y0: Tensor) -> _Kept:
    controller, tolerance, held = problem.controller, problem.tolerance, list[Tensor]()
    assert controller is not None

    def of_elements(value: float | Tensor) -> int | None:
        if not isinstance(value, Tensor):
            return None
        held.append(value.expand(y0.shape).to(y0.dtype).contiguous())
        return held[-1].data_ptr()

    def rows(x: NDArray[Any]) -> tuple[int, int, int]:
        """Length of a row, distance to the next, and address of the first."""
        is_one_row = x.strides[0] == 0 or len(x) == 1
        held.append(torch.tensor(x[:1] if is_one_row else x, device=y0.device))
        return x.shape[1], 0 if is_one_row else x.shape[1], held[-1].data_ptr()

    stops = problem.stops_of_rows
    has_jumps = stops is not None and bool(stops.is_jump.any())
    rtol, atol = tolerance.rtol, tolerance.atol
    task = LibraryTask(
        _Controller(**controller.coefficients),
        controller.first_step or 0.0,
        problem.max_num_steps,
        len(y0),
        *rows(problem.times_of_rows),
        *rows(problem.last_times[:, None] if stops is None else stops.times),
        rows(stops.is_jump)[2] if stops is not None and has_jumps else None,
        0.0 if isinstance(rtol, Tensor) else rtol,
        0.0 if isinstance(atol, Tensor) else atol,
        of_elements(rtol),
        of_elements(atol),
        int(tolerance.forbids_error()),
        newton_tolerance=0.0 if problem.newton is None else problem.newton.tolerance,
    )
    return _Kept(_parts(problem), task, tuple(held))


def cotangents_to(
    outputs: Tensor, y0: Tensor, p: Tensor | None, w: Tensor, most_slopes: Tensor, replay_faults: Tensor
) -> Cotangents:
    """Addresses of the cotangents of the outputs, which the backward pass reads, and of its inputs, which it writes."""
    given = outputs, y0, p, w, most_slopes, replay_faults
    return Cotangents(*(None if x is None else x.data_ptr() for x in given))
