"""Time and memory of a million Lorenz systems on compiled lanes, without a gradient and with a progress bar.

float64, dopri5, tolerance 1e-6, two threads if there are as many, each row in a process of its own (Linux). ``process``
is the growth of the process to its peak, tracing included; ``held`` is what the caller holds at the end: starts,
parameters and outputs. The time is that of a second solve, which compiles nothing. The growth should not depend on the
length of the solve, and so on the number of steps.
"""

import multiprocessing
import os
import time
from pathlib import Path

import torch

import aca_ext
from benchmarks.checkpoints import resident
from benchmarks.harness import Parts, Settings, Table
from benchmarks.lanes import lorenz

SAMPLES, QUICK_SAMPLES = 1_000_000, 20_000
LENGTHS, QUICK_LENGTHS = (1.0, 5.0), (0.1,)
COLUMNS = {
    "T": ("t_end", "g"),
    "steps of a sample": ("mean_steps", ".0f"),
    "s": ("seconds", ".2f"),
    "us of a sample": ("us_of_sample", ".2f"),
    "process MB": ("process_mb", ".0f"),
    "held MB": ("held_mb", ".0f"),
}


def run(settings: Settings) -> Parts:
    n = QUICK_SAMPLES if settings.quick else SAMPLES
    table = Table(f"Lorenz, {n} samples, forward, one output", COLUMNS)
    spawn = multiprocessing.get_context("spawn")
    for t_end in QUICK_LENGTHS if settings.quick else LENGTHS:
        with spawn.Pool(1) as pool:
            table.rows.append(pool.apply(_measure, (n, t_end)))
    yield table


def _measure(n: int, t_end: float) -> dict[str, float]:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
    y0, p = torch.randn(n, 3, dtype=torch.float64) + 5, torch.rand(n, 1, dtype=torch.float64) + 27.5

    def solve(n: int, progress: bool) -> aca_ext.Solution:
        with torch.no_grad():
            return aca_ext.solve(
                lorenz, y0[:n], (0.0, t_end), args=(p[:n],), rtol=1e-6, atol=1e-6,
                options={"batch": "independent"}, engine="compiled", progress=progress,
            )  # fmt: skip

    solve(100, progress=False)  # loads the compiler, whose memory must not count as growth
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    solve(n, progress=False)  # compiles for this batch
    start = time.perf_counter()
    solution = solve(n, progress=True)
    seconds = time.perf_counter() - start
    return {
        "t_end": t_end,
        "mean_steps": float(solution.stats.n_steps.double().mean()),
        "seconds": seconds,
        "us_of_sample": 1e6 * seconds / n,
        "process_mb": (resident("VmHWM") - before) / 1e3,
        "held_mb": (y0.nbytes + p.nbytes + solution.y.nbytes) / 1e6,
    }
