from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

VERSION: str
CUDA_ARCHITECTURES: str
HAS_CUDA: bool
HAS_OPENMP: bool
MAX_TERMS: int
MAX_SEGMENTS: int
WORKSPACE_BYTES: int

class Target:
    def __init__(self, backend: str, dtype: str, threads: int, device: int, stream: int, workspace: int) -> None: ...

class Slope:
    n_evals: int
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
        norm: tuple[Sequence[int], int, float, float, int, int] | None,
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
    ) -> tuple[Tensor, list[Tensor], Tensor | None]: ...
    def leap(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        controller: Controller,
        error_norm: Callable[[], float],
        slot: Callable[[], Tensor] | None,
        accept: Callable[[], None] | None,
        start: tuple[float, float, Tensor, Tensor | None, Sequence[float]],
        until: float,
        trials: int,
        /,
    ) -> tuple[
        tuple[float, float, Tensor, Tensor | None, list[float]],
        list[tuple[float, float, float]],
        int,
        float | None,
    ]: ...
    def walk(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        slot: Callable[[], Tensor] | None,
        accept: Callable[[], None] | None,
        start: tuple[Tensor, Tensor | None],
        grid: Sequence[float],
        outputs: Sequence[Tensor | None],
        /,
    ) -> tuple[Tensor, Tensor | None]: ...
    def vjp(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        pull_back: Callable[[Tensor, Tensor, Tensor], Tensor | None],
        admit: Callable[[Tensor], Tensor],
        check: Callable[[Tensor], None] | None,
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
        times: Sequence[float],
        stops: Sequence[float],
        jumps: Sequence[float],
        grid: Sequence[float],
        max_num_steps: int,
        slope: _Code,
        step: _Code,
    ) -> None: ...
    def backward_bytes(self, end_only: _Code | None, inside: _Code | None, /) -> int: ...

class CompiledLoop:
    n_accepted: int
    n_steps: int
    n_rejected: int
    n_f_evals: int
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
    ) -> int: ...
    def transpose(
        self,
        end_only: _Code | None,
        inside: _Code | None,
        memory: int,
        inputs: Sequence[int],
        grad_outputs: int,
        g: int,
        g_next: int,
        /,
    ) -> int: ...
    def accepted_steps(self) -> list[tuple[float, float, float, list[tuple[int, float]]]]: ...
    def bounds(self) -> bytearray: ...

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
def write_scalars(on: Target, out: int, values: Sequence[float], /) -> None: ...
