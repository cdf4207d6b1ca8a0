from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

VERSION: str
CUDA_ARCHITECTURES: str
HAS_CUDA: bool
HAS_OPENMP: bool
MAX_TERMS: int
MAX_SEGMENTS: int
WORKSPACE_BYTES: int
CONTROL_BYTES: int
STEP_ENTRY_DOUBLES: int
H_TRIAL: int
SLOPE_WEIGHT: int

def use_torch(
    tensor: type[Tensor],
    parameter: type[Tensor],
    exchange_api: object,
    storage_uses: Callable[[int], int] | None,
    alone: tuple[Tensor, Tensor],
    /,
) -> None: ...
def is_surely_readable(x: Tensor, /) -> bool: ...
def own_result(function: Callable[..., Tensor | None], args: tuple[Any, ...], /) -> Tensor | None: ...

class Target:
    def __init__(self, backend: str, dtype: str, threads: int, device: int, stream: int, workspace: int) -> None: ...

class Slope:
    n_evals: int
    surroundings: AbstractContextManager[Any] | None
    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        like: Tensor,
        checked: Callable[[Any], Tensor],
        changed: Callable[[], None],
        is_grad_enabled: Callable[[], bool],
        versioned: bool,
    ) -> None: ...
    def __call__(self, t: Tensor, y: Tensor) -> Tensor: ...

class RunningSums:
    def __init__(self, totals: list[Tensor | None]) -> None: ...
    def add(self, terms: Sequence[Tensor | None]) -> bool: ...

class KnownTensors:
    def __init__(self, tensors: Iterable[Tensor], alone: int, /) -> None: ...
    def add(self, tensor: Tensor, /) -> None: ...
    def others(self, roots: Tensor | tuple[Tensor, ...], state: Tensor | None, /) -> list[Tensor] | None: ...
    def are_met_by(self, roots: Tensor | tuple[Tensor, ...], /) -> bool: ...

class Contents:
    def __init__(self, missing: object, /) -> None: ...
    def add(self, holder: Any, /) -> None: ...
    def add_container(self, holder: Any, /) -> None: ...
    def add_named(self, holder: Any, names: Sequence[str], /) -> None: ...
    def update(self) -> list[tuple[Any, Any, Any, Any]]: ...
    def changes(self) -> list[tuple[Any, Any, Any, Any]]: ...
    def order_of(self, holder: Any, /) -> list[Any]: ...
    def watch_tensors(self) -> None: ...
    def changed_tensors(self, accepts: bool, /) -> list[tuple[Tensor, bool, bool]]: ...
    def tensors(self) -> list[Tensor]: ...

class ModuleWalk:
    def __init__(self, atoms: Iterable[type], names: frozenset[str], /) -> None: ...
    def visit(
        self,
        module: nn.Module,
        seen: set[int],
        modules: list[nn.Module],
        places: list[Any],
        kinds: set[type],
        others: list[Any],
        contents: Contents,
        /,
    ) -> None: ...

class Controller:
    def __init__(
        self,
        order: int,
        safety: float,
        ifactor: float,
        dfactor: float,
        pcoeff: float,
        icoeff: float,
        dcoeff: float,
        min_step: float,
        max_step: float,
    ) -> None: ...

STATUSES: tuple[str, ...]

class SolveControl:
    status: str
    t: float
    h: float
    sign: float
    length: float
    ratio: float
    ratios: list[float]
    h_trial: float
    t_next: float
    is_accepted: bool
    due: tuple[int, int]
    n_steps: int
    n_accepted: int
    can_shrink: bool
    def __init__(
        self,
        controller: Controller,
        is_adaptive: bool,
        max_num_steps: int,
        times: Sequence[float],
        stops: Sequence[float],
    ) -> None: ...
    def propose(self) -> None: ...
    def judge(self, ratio: float, /) -> None: ...
    def resume(self) -> None: ...
    def position(self, output: int, /) -> float: ...

class BatchControl:
    status: NDArray[np.intc]
    t: NDArray[np.float64]
    h: NDArray[np.float64]
    ratio: NDArray[np.float64]
    h_trial: NDArray[np.float64]
    t_next: NDArray[np.float64]
    is_accepted: NDArray[np.intc]
    t_start: NDArray[np.float64]
    first_due: NDArray[np.int64]
    end_due: NDArray[np.int64]
    n_steps: NDArray[np.int64]
    n_accepted: NDArray[np.int64]
    def __init__(
        self, controller: Controller, first_step: float, max_num_steps: int, times: NDArray[np.float64]
    ) -> None: ...
    def propose_euler_steps(self, norm_y: NDArray[np.float64], norm_f: NDArray[np.float64], /) -> None: ...
    def choose_first_steps(self, norm_change: NDArray[np.float64], /) -> None: ...
    def propose(self) -> None: ...
    def judge(self, ratios: NDArray[np.float64], /) -> None: ...
    def retry(self) -> None: ...

class Stepper:
    def __init__(
        self,
        on: Target,
        n: int,
        c: Sequence[float],
        rows: tuple[tuple[Sequence[int], Sequence[float]], ...],
        solution: tuple[Sequence[int], Sequence[float], Sequence[float] | None, float],
        fsal: bool,
        states: Callable[[], Sequence[Tensor]],
        times: Callable[[], Sequence[Tensor]],
        norm: tuple[Sequence[int], Tensor, float, float, int, int] | None,
    ) -> None: ...
    def step(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        t: Sequence[float],
        y: Tensor,
        h: float,
        k_first: Tensor | None,
        out: Tensor | None,
        /,
    ) -> tuple[Tensor, list[Tensor], Tensor | None, float | None]: ...
    def choose_first_step(
        self, f: Callable[[Tensor, Tensor], Tensor], control: SolveControl, y: Tensor, k: Tensor, /
    ) -> bool: ...
    def run_steps(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        control: SolveControl,
        slot: Callable[[], Tensor] | None,
        accept: Callable[[], None] | None,
        y: Tensor,
        k: Tensor | None,
        rows: tuple[Tensor, ...],
        /,
    ) -> tuple[
        Tensor, Tensor | None, list[tuple[float, float, float, int, int]], tuple[Tensor, list[Tensor]] | None
    ]: ...
    def vjp(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        pull_back: Callable[[Tensor, Tensor, Tensor], Tensor | None],
        admit: Callable[[Tensor], Tensor],
        compare: Callable[[Tensor, Sequence[Tensor]], None] | None,
        y_next: Tensor | None,
        t: Sequence[float],
        y: Tensor,
        h: float,
        outputs: Sequence[tuple[Sequence[float], Tensor]],
        /,
    ) -> Tensor: ...

# Addresses of a function and of its preparation, bytes of its workspace and of what is prepared.
_Code = tuple[int, int, int, int]

class CompiledSpecification:
    forward_bytes: int

    def __init__(
        self,
        on: Target,
        n: int,
        c: Sequence[float],
        fsal: bool,
        dense: Sequence[Sequence[float]],
        rtol: float,
        atol: float,
        rtol_each: int,
        atol_each: int,
        bounds: Sequence[int],
        control: Controller,
        first_step: float,
        is_adaptive: bool,
        times: Sequence[float],
        stops: Sequence[float],
        jumps: Sequence[float],
        max_num_steps: int,
        slope: _Code,
        step: _Code,
    ) -> None: ...
    def backward_bytes(self, end_only: _Code | None, inside: _Code | None, /) -> int: ...

class CompiledLoop:
    n_accepted: int
    t: float
    h: float
    error_ratio: float
    n_inside: int

    def __init__(self, specification: CompiledSpecification, /) -> None: ...
    def solve(
        self,
        memory: int,
        inputs: Sequence[int],
        y0: int,
        outputs: int,
        slots: Callable[[], tuple[int, int]] | None,
        /,
    ) -> tuple[int, int, int, int]: ...
    def transpose(
        self,
        end_only: _Code | None,
        inside: _Code | None,
        memory: int,
        inputs: Sequence[int],
        gradient_bytes: Sequence[int],
        grad_outputs: int,
        grad_y0: int,
        /,
    ) -> None: ...
    def accepted_steps(self) -> list[tuple[float, float, float, list[tuple[int, float]]]]: ...
    def bounds(self) -> bytearray: ...

class Control:
    fsal: bool
    segments: int
    error_last: float
    n_states: int
    n_blocks: int
    row_bytes: int
    sizes: int
    sums: int
    stage_times: int
    weights: int
    outputs: int
    grad_outputs: int
    steps: int
    step: int
    status: str
    t: float
    h: float
    ratio: float
    n_steps: int
    n_accepted: int
    can_shrink: bool
    is_unfinished: bool

    @overload
    def __init__(
        self, dtype: str, controller: Controller, first_step: float, is_adaptive: bool, max_num_steps: int
    ) -> None: ...
    @overload
    def __init__(self, raw: bytes, /) -> None: ...
    def set_first_step(self, h: float, /) -> None: ...
    def set_times(self, first: float, last: float, times: int, n_times: int, stops: int, n_stops: int, /) -> None: ...
    def set_tableau(self, c: Sequence[float], dense: Sequence[Sequence[float]], /) -> None: ...
    def add_block(self, address: int, states: int, /) -> None: ...

class LoopGraph:
    def __init__(self, device: int, first: int, body: int, control: int, /) -> None: ...
    def launch(self, stream: int, /) -> None: ...
    @staticmethod
    def is_supported() -> bool: ...

def obstacle_to_loop(graph: int, /) -> str: ...
def restart_capture(device: int, stream: int, /) -> None: ...
def new_stream(device: int, /) -> int: ...
def write_control(on: Target, to: int, source: Control, /) -> None: ...
def decide(on: Target, control: int, decision: str, /) -> None: ...
def finish_step(on: Target, n: int, control: int, y: int, k: Sequence[int], y1: int, k_first: int, /) -> None: ...
def restore_step(on: Target, n: int, control: int, y: int, k: Sequence[int], g: int, inside: int, /) -> None: ...
def cpu_instruction_set() -> str: ...
def cuda_device_count() -> int: ...
def weighted_sum(
    on: Target, n: int, out: int, base: int, h: float, x: Sequence[int], w: Sequence[float], /
) -> None: ...
def solution_and_error(
    on: Target,
    n: int,
    y1: int,
    error: int,
    y: int,
    h: float,
    x: Sequence[int],
    b: Sequence[float],
    error_weight: Sequence[float],
    /,
) -> None: ...
def squared_error_ratio(
    on: Target,
    bounds: Sequence[int],
    out: int,
    partial: int,
    k: int,
    w: float,
    y0: int,
    y1: int,
    rtol: float,
    atol: float,
    rtol_each: int,
    atol_each: int,
    /,
) -> None: ...
def weighted_sum_rows(
    on: Target, count: int, length: int, h: int, out: int, base: int, x: Sequence[int], w: Sequence[float], /
) -> None: ...
def solution_and_error_rows(
    on: Target,
    count: int,
    length: int,
    h: int,
    y1: int,
    error: int,
    y: int,
    x: Sequence[int],
    b: Sequence[float],
    error_weight: Sequence[float],
    /,
) -> None: ...
def squared_error_ratio_rows(
    on: Target,
    count: int,
    bounds: Sequence[int],
    w: int,
    out: int,
    partial: int,
    k: int,
    y0: int,
    y1: int,
    rtol: float,
    atol: float,
    rtol_each: int,
    atol_each: int,
    /,
) -> None: ...

class Checksums:
    def __init__(self, sizes: Sequence[int]) -> None: ...
    def __call__(self, addresses: list[int]) -> bytes: ...

def write_scalars(on: Target, out: int, values: Sequence[float], /) -> None: ...
def relative_changes(on: Target, count: int, length: int, change: int, state: int, /) -> list[float]: ...

class StageSystem:
    def __init__(
        self,
        on: Target,
        blocks: int,
        m: int,
        jacobians: Sequence[int],
        a: Sequence[Sequence[float]],
        h: float,
        h_each: int,
        /,
    ) -> None: ...
    def solve(self, r: Sequence[int], out: Sequence[int], transposed: bool, /) -> None: ...
    def correct(
        self, slopes: Sequence[int], z: Sequence[int], next: Sequence[int], change: Sequence[int], /
    ) -> None: ...

class StageIterations:
    def __init__(
        self, on: Target, n: int, like: Tensor, allocate: Callable[[], Sequence[Tensor]], norm: tuple[Any, ...], /
    ) -> None: ...
    def iterate(
        self,
        system: StageSystem,
        f: Callable[[Tensor, Tensor], Tensor],
        t: Sequence[Tensor],
        base: Sequence[Tensor],
        z: Sequence[Tensor],
        y: Tensor | None,
        /,
    ) -> tuple[list[Tensor], Any]: ...
