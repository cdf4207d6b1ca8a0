"""Speed of a solve with a large state, relative to the speed of memory.

W4, float32, forward, two threads. The floor of one evaluation is the time of f plus the time to move a sixth of the
bytes of a dopri5 step at the speed of a copy. Both are the best of several runs over as many arrays as a step uses. The
bytes are those of the stage sums, of the solution with its partial error, and of the error norm, each operand read or
written once. ``/ floor`` is time over n_f_evals times the floor.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from aca_ext import METHODS
from benchmarks import peers
from benchmarks.harness import Parts, Settings, Table, interleave
from benchmarks.workloads import W4, Problem

THREADS = 2
STAGES = 6  # evaluations of f per dopri5 step
WORKING_SET = 11  # arrays of a step: two states, seven slopes, stage state, error
COLUMNS = {
    "solver": ("solver", ""),
    "f evals": ("n_f_evals", "d"),
    "accepted": ("accepted", "d"),
    "ms": ("ms", ".1f"),
    "ms per eval": ("ms_per_eval", ".2f"),
    "/ floor": ("over_floor", ".2f"),
}


def run(settings: Settings) -> Parts:
    workload = replace(W4, elements=1 << 16) if settings.quick else W4
    problem = workload.problem(torch.float32, settings.device)
    solvers, skipped = peers.installed(device=settings.device)
    yield from skipped
    solvers = [solver for solver in solvers if not solver.is_compiled]
    solvers = [solver for solver in solvers if solver.own_forward]
    runs = {solver.name: solver.prepare(problem) for solver in solvers}
    arrays = [problem.y0.detach().clone() for _ in range(WORKING_SET)]
    pairs = list(pairwise(arrays))
    machine = interleave(
        {"copies": partial(_copies, pairs), "f evaluations": partial(_f_evaluations, problem, pairs)},
        settings,
        threads=THREADS,
        seconds=3,
    )
    cases = {name: partial(peers.forward, run) for name, run in runs.items()}
    timings = interleave(cases, settings, threads=THREADS, seconds=15)

    f, per_array = machine.best("f evaluations") / len(pairs), machine.best("copies") / len(pairs) / 2
    floor = f + arrays_per_step() / STAGES * per_array
    bandwidth = arrays[0].nbytes / per_array / 1e9
    title = f"{workload.name}, {workload.elements} elements, T = {workload.t_end:g}, tolerance {workload.tol:g}"
    parts = f"copy {bandwidth:.1f} GB/s, f {1e3 * f:.2f} ms, floor {1e3 * floor:.2f} ms per evaluation"
    table = Table(f"{title}: {parts}", COLUMNS)
    for solver in solvers:
        counts, seconds = peers.count(solver, problem, backward=False), timings.median(solver.name)
        table.rows.append(
            {
                "solver": solver.name,
                "n_f_evals": counts.forward,
                "accepted": counts.accepted,
                "ms": 1e3 * seconds,
                "ms_per_eval": 1e3 * seconds / counts.forward,
                "over_floor": seconds / (counts.forward * floor),
                "floor_ms_per_eval": 1e3 * floor,
                "f_ms": 1e3 * f,
                "copy_gb_per_s": bandwidth,
                "rounds": len(timings.samples[solver.name]),
            }
        )
    yield table


def _copies(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for x, out in pairs:
        out.copy_(x)


def _f_evaluations(problem: Problem, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for x, _ in pairs:
        problem.func(problem.time, x)


def arrays_per_step(method: str = "dopri5", adaptive: bool = True) -> int:
    """Number of arrays that a step reads or writes outside f."""
    tableau = METHODS[method]
    stage_sums = sum(2 + sum(w != 0 for w in row) for row in tableau.a[1:STAGES])  # base, slopes, result
    solution = 2 + sum(w != 0 for w in tableau.b)  # base, slopes, result
    error_and_norm = 1 + 4  # partial error; its norm reads it, the last slope, both states
    return stage_sums + solution + (error_and_norm if adaptive else 0)
