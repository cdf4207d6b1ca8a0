"""Speed of each kernel, by size and number of operands, next to the same operation in plain torch.

float32, torch's default number of threads. GB/s counts each operand once. The kernels write sums and solutions into
existing memory; plain torch allocates. A GPU also runs float64, with states of 256 MB. There, ``/ copy`` is GB/s over
the GB/s of a copy, ``without base`` are the sums of the transpose, and ``no wait`` is the error norm without the wait
for its result.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from aca_ext.kernels.fused import Tolerance, TorchOperations, operations_for, row_operations_for
from benchmarks.harness import Parts, Settings, Table, interleave

SIZES = [1, 1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 22]
SIZES_QUICK = [1, 1 << 12]
CUDA_SIZES = [1, 1 << 12, 1 << 20]
CUDA_LARGE_BYTES, CUDA_LARGE_BYTES_QUICK = 1 << 28, 1 << 20
OPERANDS = range(1, 14)
SLOPES_OF_SOLUTION = 6
SECONDS_PER_SIZE = 3
COLUMNS = {
    "operation": ("operation", ""),
    "operands": ("operands", "d"),
    "elements": ("elements", "d"),
    "µs": ("us", ".2f"),
    "GB/s": ("gb_per_s", ".2f"),
    "torch µs": ("torch_us", ".2f"),
    "torch / kernel": ("speedup", ".2f"),
}
CUDA_COLUMNS = COLUMNS | {"/ copy": ("over_copy", ".3f")}
# (name, operands read, arrays read or written, call)
Call = tuple[str, int, int, Callable[[], object]]


def run(settings: Settings) -> Parts:
    sizes = SIZES if settings.device == "cpu" else CUDA_SIZES
    for n in SIZES_QUICK if settings.quick else sizes:
        yield _measure(n, settings)
    if settings.device == "cuda":
        large = CUDA_LARGE_BYTES_QUICK if settings.quick else CUDA_LARGE_BYTES
        for dtype in (torch.float32, torch.float64):
            yield _measure(large // dtype.itemsize, settings, dtype)


def _measure(n: int, settings: Settings, dtype: torch.dtype = torch.float32) -> Table:
    x = [torch.randn(n, device=settings.device, dtype=dtype) for _ in range(1 + max(OPERANDS))]
    tolerance = Tolerance(1e-6, 1e-6, [0, n])
    kernels, plain = operations_for(x[0], tolerance), TorchOperations(x[0], tolerance)
    out = torch.empty_like(x[0])
    arrays: dict[tuple[str, int], int] = {}
    cases: dict[str, Callable[[], object]] = {}
    is_on_gpu = settings.device == "cuda"
    for which, ops, to in (("kernel", kernels, out), ("torch", plain, None)):
        for name, operands, n_arrays, call in _calls(ops, x, to, is_on_gpu):
            arrays[name, operands] = n_arrays
            cases[f"{which} {name} {operands}"] = call
    if is_on_gpu:
        arrays["copy", 1] = 2
        cases["kernel copy 1"] = cases["torch copy 1"] = partial(out.copy_, x[0])
        arrays["error_norm, no wait", 4] = 4
        cases["kernel error_norm, no wait 4"] = _norm_alone(x, tolerance)
    threads = torch.get_num_threads()
    timings = interleave(cases, settings, threads=threads, seconds=SECONDS_PER_SIZE)
    where = f"{n} elements of {str(dtype).removeprefix('torch.')}" if is_on_gpu else f"{n} elements"
    title = f"{where}, backend {kernels.backend}, {threads} CPU thread(s)"
    table = Table(title, CUDA_COLUMNS if is_on_gpu else COLUMNS)
    copy_s = timings.median("kernel copy 1") if is_on_gpu else None
    for (name, operands), n_arrays in arrays.items():
        kernel, torch_ = (f"{which} {name} {operands}" for which in ("kernel", "torch"))
        seconds = timings.median(kernel)
        row = {
            "operation": name,
            "operands": operands,
            "elements": n,
            "us": 1e6 * seconds,
            "gb_per_s": n_arrays * x[0].nbytes / seconds / 1e9,
            "torch_us": 1e6 * timings.median(torch_) if torch_ in cases else None,
            "speedup": timings.ratio(torch_, kernel) if torch_ in cases else None,
        }
        table.rows.append(row if copy_s is None else row | {"over_copy": n_arrays / seconds / (2 / copy_s)})
    return table


def _calls(ops: TorchOperations, x: list[Tensor], out: Tensor | None, with_transpose: bool) -> Iterator[Call]:
    base, *slopes = x
    for m in OPERANDS:
        weights = tuple(0.1 * (j + 1) for j in range(m))
        yield "weighted_sum", m, m + 2, partial(ops.weighted_sum, base, 0.1, slopes[:m], weights, out)
        if with_transpose:
            yield "without base", m, m + 1, partial(ops.weighted_sum, None, 0.1, slopes[:m], weights, out)
    m = SLOPES_OF_SOLUTION
    weights = tuple(0.1 * (j + 1) for j in range(m))
    call = partial(ops.solution_and_error, base, 0.1, slopes[:m], weights, weights[::-1], out)
    yield "solution_and_error", m, m + 3, call
    yield "error_norm", 4, 4, partial(ops.error_norm, base, slopes[0], 0.1, slopes[1], slopes[2])


def _norm_alone(x: list[Tensor], tolerance: Tolerance) -> Callable[[], object]:
    """The error norm with its sums left on the device, as in captured steps."""
    rows = row_operations_for(x[0].unsqueeze(0), tolerance)
    w = torch.full((1, 1), 0.1, dtype=torch.float64, device=x[0].device)
    return partial(rows._squared_error_ratios, x[0], x[1], w, x[2], x[3])
