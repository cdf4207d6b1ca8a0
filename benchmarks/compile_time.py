"""Time of a process's first solve with its gradient, which compiles: whole-solve programs, lanes, and diffrax's jit.

Each measurement is a process of its own with one thread, in turns. The caches on disk are empty, except for ``again``:
that is a second process, which finds the programs of the first. Time starts after the imports of torch and aca_ext, or
of jax and diffrax, and ends with the gradient. What a solve imports by itself counts, such as torch's compiler.
``CPU s`` includes the C++ compiler. diffrax takes part where it is installed; jax keeps nothing on disk, which is its
default.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch

from benchmarks import lanes, peers
from benchmarks.harness import Parts, Settings, Table
from benchmarks.workloads import Network, networks

ROUNDS = 5
LANES = "lanes, Lotka-Volterra"
COMPILED, DIFFRAX = "aca_ext compiled", "diffrax, jit"
AGAIN = f"{COMPILED}, again"
OF_LANES = {COMPILED: lanes.COMPILED, DIFFRAX: "diffrax, vmap, jit"}
CACHES = ("ACA_EXT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
COLUMNS = {
    "solver": ("solver", ""),
    "CPU s": ("cpu_s", ".2f"),
    "s": ("seconds", ".2f"),
}

# CPU time and time of a first solve, in seconds.
Times = tuple[float, float]


def run(settings: Settings) -> Parts:
    solvers = [COMPILED, AGAIN]
    missing = peers.installed("diffrax")[1]
    yield from missing
    if not missing:
        solvers.append(DIFFRAX)
    # The tests measure the lanes, which a quick run leaves out.
    for workload in networks(settings) if settings.quick else (*networks(settings), None):
        title = LANES if workload is None else workload.name
        samples: dict[str, list[Times]] = {solver: [] for solver in solvers}
        for _ in range(1 if settings.quick else ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                for solver in solvers:
                    samples[solver].append(in_new_process(solver.removesuffix(", again"), workload, folder))
        table = Table(f"{title}, float32", COLUMNS)
        for solver, times in samples.items():
            cpu, seconds = zip(*times, strict=True)
            table.rows.append({"solver": solver, "cpu_s": median(cpu), "seconds": median(seconds), "samples": times})
        yield table


def in_new_process(solver: str, workload: Network | None, folder: str) -> Times:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, solver, workload, folder).result()


def _measure(solver: str, workload: Network | None, folder: str) -> Times:
    os.environ.update(dict.fromkeys(CACHES, folder))
    torch.set_num_threads(1)
    solve = _of_lanes(solver) if workload is None else _of_workload(solver, workload)
    cpu, start = _cpu_seconds(), time.perf_counter()
    solve()
    return _cpu_seconds() - cpu, time.perf_counter() - start


def _of_workload(solver: str, workload: Network) -> Callable[[], object]:
    problem = workload.problem(torch.float32, "cpu")
    found, _ = peers.installed(solver.partition(" ")[0].strip(","))
    run = next(one for one in found if one.name == solver).prepare(problem)
    return lambda: peers.forward_backward(run, problem)


def _of_lanes(solver: str) -> Callable[[], object]:
    system = next(lanes.systems(lanes.SAMPLES, torch.float32))
    solve = lanes.SOLVERS[OF_LANES[solver]](system)[1]
    assert solve is not None
    return solve


def _cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])
