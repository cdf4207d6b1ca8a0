"""How fast is each kernel, by size and number of operands, next to the same operation in plain torch?

float32, torch's default number of threads. GB/s counts each operand once. The kernels write sums and solutions into
memory that is there already; plain torch allocates.
"""

from functools import partial

import torch

from aca_ext.ops import Tolerance, TorchOperations, operations_for
from benchmarks.harness import Result, Settings, Table, interleave

SIZES = [1, 1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 22]
SIZES_QUICK = [1, 1 << 12]
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


def run(settings: Settings) -> Result:
    return Result([_measure(n, settings) for n in (SIZES_QUICK if settings.quick else SIZES)])


def _measure(n: int, settings: Settings) -> Table:
    x = [torch.randn(n, device=settings.device) for _ in range(1 + max(OPERANDS))]
    tolerance = Tolerance(1e-6, 1e-6, [0, n])
    kernels, plain = operations_for(x[0], tolerance), TorchOperations(x[0], tolerance)
    arrays: dict[tuple[str, int], int] = {}
    cases = {}
    for which, ops, out in (("kernel", kernels, torch.empty_like(x[0])), ("torch", plain, None)):
        for name, operands, n_arrays, call in _calls(ops, x, out):
            arrays[name, operands] = n_arrays
            cases[f"{which} {name} {operands}"] = call
    threads = torch.get_num_threads()
    timings = interleave(cases, settings, threads=threads, seconds=SECONDS_PER_SIZE)
    table = Table(f"{n} elements, backend {kernels.backend}, {threads} CPU thread(s)", COLUMNS)
    for (name, operands), n_arrays in arrays.items():
        kernel, torch_ = (f"{which} {name} {operands}" for which in ("kernel", "torch"))
        seconds = timings.median(kernel)
        table.rows.append(
            {
                "operation": name,
                "operands": operands,
                "elements": n,
                "us": 1e6 * seconds,
                "gb_per_s": n_arrays * x[0].nbytes / seconds / 1e9,
                "torch_us": 1e6 * timings.median(torch_),
                "speedup": timings.ratio(torch_, kernel),
            }
        )
    return table


def _calls(ops: TorchOperations, x: list[torch.Tensor], out: torch.Tensor | None):
    """(name, operands read, arrays read or written, call) of each case."""
    base, *slopes = x
    for m in OPERANDS:
        weights = tuple(0.1 * (j + 1) for j in range(m))
        yield "weighted_sum", m, m + 2, partial(ops.weighted_sum, base, 0.1, slopes[:m], weights, out)
    m = SLOPES_OF_SOLUTION
    weights = tuple(0.1 * (j + 1) for j in range(m))
    call = partial(ops.solution_and_error, base, 0.1, slopes[:m], weights, weights[::-1], out)
    yield "solution_and_error", m, m + 3, call
    yield "error_norm", 4, 4, partial(ops.error_norm, base, slopes[0], 0.1, slopes[1], slopes[2])
