"""Steps per second of whole solves on a GPU, by engine, next to torchdiffeq and diffrax.

float32, dopri5 at the workload's tolerance, all solvers in turn, matrix products in full precision in jax too. Times
are measured on the host, from the call until the device is done. aca_ext gets t on the CPU, its preferred place,
torchdiffeq on the device. ``/ odeint`` is the speedup over torchdiffeq's odeint, ``apart`` the largest difference of
the end state from the eager engine's. ``capture s`` is the time of the captures in the first graph solve. ``launched
for nothing`` is the number of launched trial steps, per solve, that the solve did not need; here every solve has
another initial state. ``rounds`` is the number of times that the host read the solve's status. Loops on the device, the
alternative to steps launched ahead, are measured last, so that a hang spoils nothing else. ``solve_rate_short`` is the
part of this that takes the least time.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import aca_ext
from aca_ext.engines.cuda_graph import captures as programs
from benchmarks import peers
from benchmarks.harness import Parts, Settings, Table, Timings, first_line, interleave
from benchmarks.workloads import W1, W2, W3, Network, Problem

SOLVES = 20  # from different starts, to count launches
BASE = "torchdiffeq odeint"
COLUMNS = {
    "solver": ("solver", ""),
    "accepted": ("accepted", "d"),
    "ms": ("ms", ".3f"),
    "steps/s": ("steps_per_s", ".0f"),
    "/ odeint": ("speedup", ".1f"),
    "/ diffrax": ("over_diffrax", ".1f"),
    "apart": ("apart", ".1e"),
    "capture s": ("capture_s", ".3f"),
}
LAUNCHES = {
    "workload": ("workload", ""),
    "solves": ("solves", "d"),
    "trial steps": ("trial_steps", ".1f"),
    "launched for nothing": ("wasted", ".1f"),
    "rounds": ("rounds", ".2f"),
}
LOOPS = {
    "workload": ("workload", ""),
    "pass": ("pass", ""),
    "ahead ms": ("ahead_ms", ".3f"),
    "loop ms": ("loop_ms", ".3f"),
    "ahead / loop": ("speedup", ".2f"),
}
PASSES = {"forward": "forward", "both": "forward and backward"}
EAGER, GRAPH, LOOP = "aca_ext eager", "aca_ext graph", "aca_ext graph, device loop"
DIFFRAX = "diffrax, jit"
# Flags that choose the parts of a program that become CUDA graphs; a JAX release knows one of the three.
COMMAND_BUFFERS = (
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE",
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUDNN,CUSTOM_CALL,CONDITIONALS",
    "--xla_gpu_graph_level=3",
)


@dataclass
class Case:
    """One solver: its two passes, and the number of accepted steps."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    accepted: int
    end: Tensor
    capture_s: tuple[float, float] | None = None


@dataclass
class Cases:
    of: dict[str, Case] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, make: Callable[[], Case]) -> None:
        """Adds the case if it runs, else a note with the reason."""
        try:
            case = make()
            case.forward()
            case.both()
        except Exception as error:
            self.notes.append(f"{name} is left out: {type(error).__name__}: {first_line(error)}")
        else:
            self.of[name] = case


def workloads(settings: Settings) -> list[Network]:
    found = [W1, W3]
    for batch in (256, 8192):
        found.append(replace(W2, name=f"MLP 64-128-64, batch {batch}", batch=batch))
    if settings.quick:
        found = [replace(w, t_end=w.t_end / 10, batch=min(w.batch, 8)) for w in found]
    return found


def run(settings: Settings) -> Parts:
    captured: dict[Network, Problem] = {}
    yield from rates(workloads(settings), ("torchdiffeq", "diffrax"), settings, captured)
    if captured:
        yield from _launches(captured)
    if settings.device == "cuda" and not settings.quick:
        yield _with_command_buffers()
    if captured:
        yield from _loops(captured, settings)


def rates(
    of: Sequence[Network], packages: Sequence[str], settings: Settings, captured: dict[Network, Problem]
) -> Parts:
    """Measures each workload with every engine and with the packages; ``captured`` receives those that have graphs."""
    for workload in of:
        problem = workload.problem(torch.float32, settings.device)
        cases = _cases(problem, packages)
        yield from cases.notes
        if cases.of:
            yield from _measure(workload, cases.of, settings)
        if GRAPH in cases.of:
            captured[workload] = problem


def _cases(problem: Problem, packages: Sequence[str]) -> Cases:
    cases = Cases()
    cases.add(EAGER, partial(_ours, problem, "eager"))
    cases.add(GRAPH, partial(_ours, problem, "graph"))
    solvers, skipped = peers.installed(*packages, device=problem.y0.device.type)
    cases.notes += skipped
    for solver in solvers:
        if solver.name in (BASE, DIFFRAX):
            cases.add(solver.name, partial(_theirs, problem, solver))
    return cases


def _loops(problems: dict[Network, Problem], settings: Settings) -> Parts:
    table = Table("Loops on the device against steps that are launched ahead", LOOPS)
    for workload, problem in problems.items():
        cases = Cases()
        cases.add(GRAPH, partial(_ours, problem, "graph"))
        cases.add(LOOP, partial(_ours, problem, "graph", device_loops=True))
        yield from cases.notes
        if len(cases.of) < 2:
            continue
        for name, title in PASSES.items():
            calls = {which: getattr(case, name) for which, case in cases.of.items()}
            timings = interleave(calls, settings, threads=torch.get_num_threads(), seconds=1)
            table.rows.append(
                {
                    "workload": workload.name,
                    "pass": title,
                    "ahead_ms": 1e3 * timings.median(GRAPH),
                    "loop_ms": 1e3 * timings.median(LOOP),
                    "speedup": timings.ratio(GRAPH, LOOP),
                }
            )
    if table.rows:
        yield table


def _ours(problem: Problem, engine: str, device_loops: bool = False) -> Case:
    t = torch.tensor([0.0, problem.t_end])
    settings: dict[str, Any] = {"rtol": problem.tol, "atol": problem.tol, "engine": engine}

    def solve() -> aca_ext.Solution:
        return aca_ext.solve(problem.func, problem.y0, t, **settings)

    def forward() -> Tensor:
        with _device_loops(device_loops), torch.no_grad():
            return solve().y[-1]

    def both() -> tuple[Tensor, ...]:
        with _device_loops(device_loops):
            return problem.gradient(solve().y[-1])

    with _device_loops(device_loops):
        first = _seconds(solve)
        capture = first[0].stats.compile_seconds, max(0.0, _seconds(both)[1] - _seconds(both)[1])
        if engine == "graph" and device_loops:
            _check_loops(problem)
    return Case(
        forward, both, first[0].stats.n_accepted, first[0].y[-1].detach(), capture if engine == "graph" else None
    )


def _check_loops(problem: Problem) -> None:
    from aca_ext.engines.cuda_graph import plan_cache

    *_, plan = plan_cache._by_owner.of(problem.func)._plans.values()
    if not isinstance(plan._solve, programs._Loop):
        reason = getattr(plan._solve, "obstacle", "no loop was requested")
        raise RuntimeError(f"steps were launched ahead instead of looped on the device: {reason}")


def _theirs(problem: Problem, solver: peers.Solver) -> Case:
    run = solver.prepare(problem)
    return Case(
        partial(peers.forward, run),
        partial(peers.forward_backward, run, problem),
        run.accepted() if solver.count is not None else peers.count(solver, problem, backward=False).accepted,
        run.tensors(run.solve()).detach(),
    )


@contextmanager
def _device_loops(value: bool) -> Iterator[None]:
    before, programs.DEVICE_LOOPS = programs.DEVICE_LOOPS, value
    try:
        yield
    finally:
        programs.DEVICE_LOOPS = before


def _seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    """Result and duration of the call, including its work on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _measure(workload: Network, cases: dict[str, Case], settings: Settings) -> Parts:
    problem = f"{workload.name}, T = {workload.t_end:g}, tolerance {workload.tol:g}"
    for i, (passes, title) in enumerate(PASSES.items()):
        calls = {name: getattr(case, passes) for name, case in cases.items()}
        timings = interleave(calls, settings, threads=torch.get_num_threads(), seconds=3)
        table = Table(f"{problem}: {title}", COLUMNS)
        for name, case in cases.items():
            table.rows.append(
                {
                    "solver": name,
                    "accepted": case.accepted,
                    "ms": 1e3 * timings.median(name),
                    "steps_per_s": case.accepted / timings.median(name),
                    "speedup": _times_faster(timings, name, BASE),
                    "over_diffrax": _times_faster(timings, name, DIFFRAX),
                    "apart": float((case.end.cpu() - cases[EAGER].end.cpu()).abs().max()) if EAGER in cases else None,
                    "capture_s": None if case.capture_s is None else case.capture_s[i],
                    "rounds": len(timings.samples[name]),
                }
            )
        yield table


def _times_faster(timings: Timings, name: str, other: str) -> float | None:
    return timings.ratio(other, name) if other in timings.samples else None


def _launches(problems: dict[Network, Problem]) -> Parts:
    table = Table("Trial steps that were launched ahead", LAUNCHES)
    for workload, problem in problems.items():
        try:
            table.rows.append({"workload": workload.name, **_count_launches(problem)})
        except Exception as error:
            yield f"{workload.name}, launches: {type(error).__name__}: {first_line(error)}"
    if table.rows:
        yield table


def _count_launches(problem: Problem) -> dict[str, Any]:
    """Trial steps launched and needed by solves from different initial states, as in training."""
    t = torch.tensor([0.0, problem.t_end])
    launched = rounds = taken = 0
    program = programs.CudaProgram.launch

    def counted(self: Any, times: int | None = None) -> None:
        nonlocal launched, rounds
        if times is not None:  # the program that begins a solve is launched without a number
            launched += times
            rounds += 1
        program(self, times or 1)

    programs.CudaProgram.launch = counted  # type: ignore[method-assign]
    try:
        with torch.no_grad(), _device_loops(False):
            for i in range(SOLVES):
                y0 = problem.y0 * (0.5 + i / SOLVES)
                solution = aca_ext.solve(problem.func, y0, t, rtol=problem.tol, atol=problem.tol, engine="graph")
                if solution.stats.compile_seconds:  # the check of a new capture launches steps, too
                    raise RuntimeError("a solve captured again although a plan for it exists")
                taken += solution.stats.n_steps
    finally:
        programs.CudaProgram.launch = program  # type: ignore[method-assign]
    return {
        "solves": SOLVES,
        "trial_steps": taken / SOLVES,
        "wasted": (launched - taken) / SOLVES,
        "rounds": rounds / SOLVES,
    }


def _with_command_buffers() -> Table | str:
    """Times of diffrax on the first workload without and with command buffers, each in its own process.

    Returns a sentence with the reason if neither runs.
    """
    rows: list[dict[str, Any]] = []
    wrong = ""
    for flags in ("--xla_gpu_enable_command_buffer=", *COMMAND_BUFFERS):
        if len(rows) == 2:
            break
        environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.solve_rate"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=45,
                check=True,
            )
            rows.append({"flags": flags, **json.loads(done.stdout.splitlines()[-1])})
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            wrong = wrong or (said[-1][:300] if said else repr(error))
    if not rows:
        return f"diffrax with command buffers is left out: {wrong}"
    columns = {"XLA_FLAGS": ("flags", ""), "forward ms": ("forward_ms", ".3f")}
    return Table(f"diffrax, jit, by command buffers: {W1.name}, forward", columns, rows)


def _diffrax_alone() -> dict[str, float]:
    solvers, skipped = peers.installed("diffrax", device="cuda")
    if not solvers:
        raise SystemExit("\n".join(skipped))
    run = solvers[0].prepare(W1.problem(torch.float32, "cuda"))
    timings = interleave({"diffrax": partial(peers.forward, run)}, Settings("cuda"), seconds=2)
    return {"forward_ms": 1e3 * timings.median("diffrax")}


if __name__ == "__main__":
    print(json.dumps(_diffrax_alone()))
