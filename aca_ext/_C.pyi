from collections.abc import Callable, Sequence

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

class Stepper:
    def __init__(
        self,
        on: Target,
        n: int,
        rows: tuple[tuple[Sequence[int], Sequence[float]], ...],
        solution: tuple[Sequence[int], Sequence[float], Sequence[float] | None],
        fsal: bool,
        empty_state: Callable[[], Tensor],
        empty_times: Callable[[], Tensor],
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
def write_scalars(on: Target, out: int, values: Sequence[float], /) -> None: ...
