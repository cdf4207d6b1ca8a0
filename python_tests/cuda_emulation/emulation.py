"""The emulated CUDA library in Python: device memory as numpy arrays, and the functions of ``_C`` on it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aca_ext import _C

DTYPES = {"float32": np.float32, "float64": np.float64}
MAX_TERMS: int = _C.MAX_TERMS
_address, _int64, _double = ctypes.c_size_t, ctypes.c_int64, ctypes.c_double


class Target(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("device", ctypes.c_int),
        ("stream", _address),
        ("workspace", _address),
    )


class Sum(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int), ("x", _address * MAX_TERMS), ("w", _double * MAX_TERMS))


class ErrorRatio(ctypes.Structure):
    _fields_ = (
        ("partial", _address),
        ("k", _address),
        ("w", _double),
        ("y0", _address),
        ("y1", _address),
        ("rtol", _double),
        ("atol", _double),
        ("rtol_each", _address),
        ("atol_each", _address),
    )


class Samples(ctypes.Structure):
    _fields_ = (("count", _int64), ("length", _int64), ("each", _address))


class DecidedStep(ctypes.Structure):
    _fields_ = (("control", _address), ("y", _address), ("stages", ctypes.c_int), ("k", _address * MAX_TERMS))


def _operation(*types: Any) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.POINTER(Target), *types)


class Backend(ctypes.Structure):
    _sum, _doubles, _bounds = ctypes.POINTER(Sum), ctypes.POINTER(_double), ctypes.POINTER(_int64)
    _rows, _ratio, _step = ctypes.POINTER(Samples), ctypes.POINTER(ErrorRatio), ctypes.POINTER(DecidedStep)
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("weighted_sum", _operation(_int64, _address, _address, _double, _sum)),
        ("solution_and_error", _operation(_int64, *[_address] * 3, _double, _sum, _doubles)),
        ("squared_error_ratio", _operation(ctypes.c_int, _bounds, _address, _ratio)),
        ("weighted_sum_rows", _operation(_rows, _address, _address, _sum)),
        ("solution_and_error_rows", _operation(_rows, *[_address] * 3, _sum, _doubles)),
        ("squared_error_ratio_rows", _operation(_rows, ctypes.c_int, _bounds, _address, _ratio)),
        ("write_scalars", _operation(ctypes.c_int, _address, _doubles)),
        ("write_control", _operation(_address, _address)),
        ("decide", _operation(_address, ctypes.c_int)),
        ("finish_step", _operation(_int64, _step, _address, _address)),
        ("restore_step", _operation(_int64, _step, _address, _address)),
    )


DECISIONS = ("start", "euler", "first", "next", "resume", "transpose")
Call = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Emulation:
    """One build of the library, with the functions of ``_C`` that take a ``Target`` of it.

    They differ from those of ``_C`` in that they check nothing and raise nothing; ``findings`` has what the emulation
    observed.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        functions: dict[str, tuple[Any, list[Any]]] = {
            "backend": (ctypes.POINTER(Backend), []),
            "control_bytes": (_int64, []),
            "begin": (None, [ctypes.c_uint64, ctypes.c_int]),
            "allocate_buffer": (_address, [_address, _address, ctypes.c_int]),
            "mark_written": (None, [_address, _address]),
            "release_buffers": (None, []),
            "take_findings": (ctypes.c_char_p, []),
            "new_stream": (_address, []),
            "delete_stream": (None, [_address]),
            "begin_capture": (None, [_address]),
            "end_capture": (_address, [_address]),
            "restart_capture": (None, [_address]),
            "launch_graph": (None, [_address]),
            "delete_graph": (None, [_address]),
            "record_call": (None, [_address, Call, ctypes.c_int]),
            "record_node": (None, [_address, ctypes.c_int, _address, _address]),
            "obstacle": (ctypes.c_char_p, [_address]),
            "new_loop": (_address, [_address] * 3),
            "launch_loop": (None, [_address, _address]),
            "delete_loop": (None, [_address]),
        }
        for name, (result, arguments) in functions.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self._on = self.library.backend().contents
        assert self.library.control_bytes() == _C.CONTROL_BYTES
        self._workspaces: dict[str, NDArray[Any]] = {}

    def begin(self, seed: int = 0, fault: int = 0) -> None:
        """Frees all memory, and chooses the order of the threads, and the planted fault that is active."""
        self.library.release_buffers()
        self.library.begin(seed, fault)
        self.library.take_findings()
        self.workspace = self.buffer(np.zeros(_C.WORKSPACE_BYTES, np.uint8))

    def findings(self) -> list[str]:
        """Errors since the last call: races, accesses beyond buffers or to memory never written, endless waits."""
        return self.library.take_findings().decode().splitlines()

    def buffer(self, values: NDArray[Any], offset: int = 0, *, is_written: bool = True) -> NDArray[Any]:
        """A copy in device memory, ``offset`` elements away from an aligned address; unwritten if it is an output."""
        address = self.library.allocate_buffer(values.nbytes, offset * values.itemsize, is_written)
        raw = (ctypes.c_char * values.nbytes).from_address(address)
        array: NDArray[Any] = np.ndarray(values.shape, values.dtype, raw)
        if is_written:
            array[...] = values
        return array

    def mark_written(self, array: NDArray[Any]) -> None:
        """Tells the emulation that Python wrote to an array that was allocated unwritten."""
        self.library.mark_written(address_of(array), array.nbytes)

    def target(self, dtype: str, stream: int = 0, workspace: int | None = None) -> Target:
        number = ("float32", "float64").index(dtype)
        return Target(number, 1, 0, stream, address_of(self.workspace) if workspace is None else workspace)

    def weighted_sum(self, on: Target, n: int, out: int, base: int, h: float, x: Any, w: Any) -> None:
        self._on.weighted_sum(on, n, out, base, h, _sum_of(x, w))

    def solution_and_error(
        self, on: Target, n: int, y1: int, error: int, y: int, h: float, x: Any, b: Any, e: Any
    ) -> None:
        self._on.solution_and_error(on, n, y1, error, y, h, _sum_of(x, b), _doubles(e))

    def squared_error_ratio(self, on: Target, bounds: Sequence[int], out: int, *ratio: Any) -> None:
        self._on.squared_error_ratio(on, len(bounds) - 1, _integers(bounds), out, ErrorRatio(*ratio))

    def weighted_sum_rows(
        self, on: Target, count: int, length: int, h: int, out: int, base: int, x: Any, w: Any
    ) -> None:
        self._on.weighted_sum_rows(on, Samples(count, length, h), out, base, _sum_of(x, w))

    def solution_and_error_rows(
        self, on: Target, count: int, length: int, h: int, y1: int, error: int, y: int, x: Any, b: Any, e: Any
    ) -> None:
        self._on.solution_and_error_rows(on, Samples(count, length, h), y1, error, y, _sum_of(x, b), _doubles(e))

    def squared_error_ratio_rows(
        self, on: Target, count: int, bounds: Sequence[int], w: int, out: int, partial: int, k: int, *others: Any
    ) -> None:
        rows, ratio = Samples(count, bounds[-1], w), ErrorRatio(partial, k, 0.0, *others)
        self._on.squared_error_ratio_rows(on, rows, len(bounds) - 1, _integers(bounds), out, ratio)

    def write_scalars(self, on: Target, out: int, values: Sequence[float]) -> None:
        self._on.write_scalars(on, len(values), out, _doubles(values))

    def write_control(self, on: Target, to: int, control: Any) -> None:
        host = np.zeros(_C.CONTROL_BYTES, np.uint8)
        _C.write_control(_C.Target("cpu", "float64", 1, 0, 0, 0), host.ctypes.data, control)
        self._on.write_control(on, to, host.ctypes.data)

    def decide(self, on: Target, control: int, decision: str) -> None:
        self._on.decide(on, control, DECISIONS.index(decision))

    def finish_step(self, on: Target, n: int, control: int, y: int, k: Any, y1: int, k_first: int) -> None:
        self._on.finish_step(on, n, DecidedStep(control, y, len(k), _addresses(k)), y1, k_first)

    def restore_step(self, on: Target, n: int, control: int, y: int, k: Any, g: int, inside: int) -> None:
        self._on.restore_step(on, n, DecidedStep(control, y, len(k), _addresses(k)), g, inside)


class EmulatedExtension:
    """``_C`` as the product sees it: functions called with an emulated ``Target`` run in the emulation."""

    def __init__(self, emulation: Emulation) -> None:
        self._emulation = emulation

    def __getattr__(self, name: str) -> Any:
        real, emulated = getattr(_C, name), getattr(self._emulation, name, None)
        return real if emulated is None else _chooses(real, emulated)


def _chooses(real: Callable[..., Any], emulated: Callable[..., Any]) -> Callable[..., Any]:
    return lambda on, *args: (emulated if isinstance(on, Target) else real)(on, *args)


def address_of(array: NDArray[Any] | None) -> int:
    return 0 if array is None else array.ctypes.data


def _addresses(x: Sequence[int]) -> Any:
    return (_address * MAX_TERMS)(*x)


def _sum_of(x: Sequence[int], w: Sequence[float]) -> Sum:
    assert len(x) == len(w)
    return Sum(len(x), _addresses(x), (_double * MAX_TERMS)(*w))


def _doubles(values: Sequence[float]) -> Any:
    return (_double * len(values))(*values)


def _integers(values: Sequence[int]) -> Any:
    return (_int64 * len(values))(*values)
