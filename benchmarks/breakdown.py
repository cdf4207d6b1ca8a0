"""Breakdown of a solve on a GPU: launches, waits, kernels, and time in Python.

float32, dopri5. ``busy`` is the fraction of a solve's time in which the GPU works: the summed duration of its kernels
and copies, as PyTorch's profiler reports them, over the time of the solve without the profiler. Counts are per solve.
``launches`` are launches by the host; a whole CUDA graph is one. ``kernels`` includes those of trial steps launched in
vain. ``waits`` are host calls that wait for the GPU. ``own`` is the time of a function without the functions that it
calls, ``all`` the time with them; Python's profiler lengthens both. There is no such table for the backward pass, which
runs in another thread.
"""

import cProfile
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import profile, supported_activities

import aca_ext
from benchmarks.harness import Parts, Settings, Table, first_line, interleave
from benchmarks.workloads import W1, W3, Problem

SOLVES = 10  # under a profiler
KERNELS, FUNCTIONS = 15, 25  # rows of a table
WORKLOADS = (W3, W1)
ENGINES = ("eager", "graph")
COUNTS = {
    "engine": ("engine", ""),
    "pass": ("pass", ""),
    "µs": ("us", ".0f"),
    "busy": ("busy", ".2f"),
    "trial steps": ("trial_steps", "d"),
    "launches": ("launches", ".1f"),
    "kernels": ("kernels", ".1f"),
    "per trial step": ("kernels_per_step", ".1f"),
    "copies": ("copies", ".1f"),
    "waits": ("waits", ".1f"),
}
BY_KERNEL = {
    "kernel": ("short", ""),
    "per solve": ("per_solve", ".1f"),
    "µs each": ("us_each", ".2f"),
    "of GPU time": ("share", ".2f"),
}
BY_FUNCTION = {
    "function": ("function", ""),
    "per solve": ("per_solve", ".1f"),
    "own µs": ("own_us", ".1f"),
    "all µs": ("all_us", ".1f"),
}


def run(settings: Settings) -> Parts:
    # If the profiler's library is unloaded between two profiles, captured CUDA graphs break.
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    for workload in WORKLOADS:
        problem = workload.problem(torch.float32, settings.device)
        counts, kernels = Table(f"{workload.name}: a solve", COUNTS), list[Table]()
        for engine in ENGINES:
            try:
                for name, call in _passes(problem, engine).items():
                    row, by_kernel = _trace(call, settings)
                    steps = _solve(problem, engine).stats.n_steps
                    per_step = None if row["kernels"] is None else row["kernels"] / steps
                    counts.rows.append(
                        {"engine": engine, "pass": name, "trial_steps": steps, **row, "kernels_per_step": per_step}
                    )
                    kernels.append(Table(f"{workload.name}, {engine}, {name}: GPU time", BY_KERNEL, by_kernel))
            except Exception as error:
                yield f"aca_ext {engine} is left out: {type(error).__name__}: {first_line(error)}"
        yield counts
        yield from (table for table in kernels if table.rows)
        for engine in {row["engine"]: None for row in counts.rows}:
            yield _in_python(f"{workload.name}, {engine}, forward with gradient: aca_ext's functions", problem, engine)


def _solve(problem: Problem, engine: str) -> aca_ext.Solution:
    t = torch.tensor([0.0, problem.t_end])
    return aca_ext.solve(problem.func, problem.y0, t, rtol=problem.tol, atol=problem.tol, engine=engine)


def _passes(problem: Problem, engine: str) -> dict[str, Callable[[], object]]:
    @torch.no_grad()
    def forward() -> Tensor:
        return _solve(problem, engine).y

    return {"forward": forward, "both": lambda: problem.gradient(_solve(problem, engine).y[-1])}


def _trace(call: Callable[[], object], settings: Settings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counts per solve, and the kernels that take the most time."""
    seconds = interleave({"call": call}, settings, threads=torch.get_num_threads(), seconds=1).median("call")
    with profile(activities=supported_activities(), acc_events=True) as trace:
        for _ in range(SOLVES):
            call()
        if settings.device == "cuda":
            torch.cuda.synchronize()
    host, count, microseconds = Counter[str](), Counter[str](), Counter[str]()
    for event in trace.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            count[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us()
        elif event.name.startswith("cu"):  # a call of the CUDA runtime or driver
            host[event.name] += 1

    def calls(*words: str) -> float:
        return sum(n for name, n in host.items() if any(word in name for word in words)) / SOLVES

    total = microseconds.total()
    n_copies = sum(n for name, n in count.items() if name.startswith(("Memcpy", "Memset")))
    row = {
        "us": 1e6 * seconds,
        "busy": total / SOLVES / (1e6 * seconds) if total else None,
        "launches": calls("LaunchKernel", "GraphLaunch") if total else None,
        "kernels": (count.total() - n_copies) / SOLVES if total else None,
        "copies": n_copies / SOLVES if total else None,
        "waits": calls("Synchronize") - 1 / SOLVES if total else None,  # without the one above, after the last solve
        "host_calls": {name: n / SOLVES for name, n in host.most_common()},
    }
    kernels = [
        {
            "kernel": name,
            "short": name[:70],
            "per_solve": count[name] / SOLVES,
            "us_each": us / count[name],
            "share": us / total,
        }
        for name, us in microseconds.most_common(KERNELS)
    ]
    return row, kernels


def _in_python(title: str, problem: Problem, engine: str) -> Table:
    package, table = Path(aca_ext.__file__).parent, Table(title, BY_FUNCTION)
    call = partial(_solve, problem, engine)
    call()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(SOLVES):
        call()
    profiler.disable()
    profiler.create_stats()
    for (file, line, name), (_, n_calls, own, whole, _) in profiler.stats.items():
        if package in Path(file).parents:
            where = f"{Path(file).relative_to(package)}:{line} {name}"
            row = {"function": where, "per_solve": n_calls / SOLVES}
            table.rows.append(row | {"own_us": 1e6 * own / SOLVES, "all_us": 1e6 * whole / SOLVES})
    table.rows.sort(key=lambda row: -row["all_us"])
    del table.rows[FUNCTIONS:]
    return table
