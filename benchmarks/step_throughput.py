"""Accepted steps per second of each solver on small networks, and its overhead beyond f.

One CPU thread, float32, dopri5 at the workload's tolerance, all solvers in turn. ``/ f`` is time over n_f_evals calls
of f without gradient. ``/ floor`` is time over the least that an exact gradient from checkpoints takes: the forward
evaluations without gradient, and for each accepted step 6 × (f with its autograd graph, and its VJP). Errors are
relative, against float64. ``compile s`` is the time of the first call minus that of the second.
"""

import time
from functools import partial

import torch

from benchmarks import peers
from benchmarks.harness import Parts, Settings, Table, Timings, interleave
from benchmarks.workloads import Network, Problem, networks, reference, relative_error

STAGES = 6  # evaluations of f per accepted dopri5 step
FORWARD = {
    "solver": ("solver", ""),
    "f evals": ("n_f_evals", "d"),
    "accepted": ("accepted", "d"),
    "ms": ("ms", ".2f"),
    "steps/s": ("steps_per_s", ".0f"),
    "/ f": ("over_f", ".2f"),
    "/ aca": ("over_aca", ".2f"),
    "error": ("error", ".1e"),
    "compile s": ("compile_s", ".1f"),
}
BOTH = {
    **{heading: column for heading, column in FORWARD.items() if heading != "/ f"},
    "f evals": ("n_f_evals", "s"),
    "/ floor": ("over_floor", ".2f"),
    "gradient error": ("gradient_error", ".1e"),
}


def run(settings: Settings) -> Parts:
    solvers, skipped = peers.installed(device=settings.device)
    yield from skipped
    for workload in networks(settings):
        yield from _measure(workload, solvers, settings)


def _measure(workload: Network, solvers: list[peers.Solver], settings: Settings) -> list[Table]:
    problem = workload.problem(torch.float32, settings.device)
    runs, compile_s = {}, {}
    for solver in solvers:
        runs[solver.name] = solver.prepare(problem)
        compile_s[solver.name] = _first_call(runs[solver.name], problem)
    forward_names = [solver.name for solver in solvers if solver.own_forward]
    bare = {"f": partial(_f, problem), "f and VJP": partial(_f_and_vjp, problem)}
    forward = interleave(
        bare | {name: partial(peers.forward, runs[name]) for name in forward_names}, settings, seconds=3
    )
    both = interleave(
        bare | {name: partial(peers.forward_backward, run, problem) for name, run in runs.items()},
        settings,
        seconds=8,
    )
    title = f"{workload.name}, T = {workload.t_end:g}, tolerance {workload.tol:g}"
    bare_us = f"f {1e6 * forward.median('f'):.1f} µs, with graph and VJP {1e6 * both.median('f and VJP'):.1f} µs"
    tables = [
        Table(f"{title}: forward ({bare_us})", FORWARD),
        Table(f"{title}: forward and backward", BOTH),
    ]
    exact = reference(workload)
    for solver in solvers:
        counts, (y, g) = peers.count(solver, problem), peers.outcome(runs[solver.name], problem)
        error, gradient_error = relative_error(y, exact[0]), relative_error(g, exact[1])
        if solver.own_forward:
            row = _row(solver.name, forward, counts.accepted, counts.forward)
            first = compile_s[solver.name][0]
            tables[0].rows.append({**row, "n_f_evals": counts.forward, "error": error, "compile_s": first})
        row = _row(solver.name, both, counts.accepted, counts.forward_with_gradient + (counts.backward or 0))
        floor = counts.forward * both.median("f") + counts.accepted * STAGES * both.median("f and VJP")
        tables[1].rows.append(
            {
                **row,
                "n_f_evals": f"{counts.forward_with_gradient} + {'?' if counts.backward is None else counts.backward}",
                "compile_s": sum(compile_s[solver.name]),
                "over_floor": both.median(solver.name) / floor,
                "floor_ms": 1e3 * floor,
                "error": error,
                "gradient_error": gradient_error,
            }
        )
    return tables


def _row(name: str, timings: Timings, accepted: int, n_f_evals: int) -> dict[str, object]:
    return {
        "solver": name,
        "accepted": accepted,
        "ms": 1e3 * timings.median(name),
        "f_us": 1e6 * timings.median("f"),
        "f_and_vjp_us": 1e6 * timings.median("f and VJP"),
        "steps_per_s": accepted / timings.median(name),
        "over_f": timings.ratio(name, "f") / n_f_evals,
        "over_aca": timings.ratio(name, "aca_ext aca"),
        "rounds": len(timings.samples[name]),
    }


def _first_call(run: peers.Run, problem: Problem) -> tuple[float, float]:
    """Seconds of tracing and compiling: those of the first forward pass and gradient minus those of the second."""
    seconds = []
    for call in (partial(peers.forward, run), partial(peers.forward_backward, run, problem)):
        times = [time.perf_counter()]
        for _ in range(2):
            call()
            times.append(time.perf_counter())
        seconds.append(max(0.0, times[1] - times[0] - (times[2] - times[1])))
    return seconds[0], seconds[1]


def _f(problem: Problem) -> None:
    with torch.no_grad():
        problem.func(problem.time, problem.y0)


def _f_and_vjp(problem: Problem) -> None:
    slope = problem.func(problem.time, problem.y0)
    torch.autograd.grad(slope, [problem.y0, *problem.func.parameters()], problem.y0)
