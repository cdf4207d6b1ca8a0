"""Error against steps, evaluations, factorisations and time of implicit methods, on seven stiff problems and a batch.

One CPU thread, float64. Errors are those of the published end values, in units of the tolerance (and, as ``error``,
times rtol). The time is that of the second of two solves without gradient, or of the first if it takes long. The last
table tells which goals are met. SciPy does not count the evaluations of f for its Jacobians.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Parts, Result, Settings, Table, first_line, new_figure, torch_threads
from benchmarks.peers import jax_and_diffrax
from benchmarks.stiff_batch import batch
from benchmarks.stiff_comparison import JIT, NO_JIT, REFERENCE_TOLERANCES, at_equal_error
from benchmarks.stiff_goals import goals
from benchmarks.stiff_gradients import OWN_METHODS, gradients, solution_by, times_of
from benchmarks.stiff_problems import HIRES, POLLUTION, PROBLEMS, ROBERTSON, StiffFunction, StiffProblem

COMPILED_METHODS = ("kvaerno5", "kvaerno3")
MOST_COMPILED = 32  # components of a state that is solved in compiled code
TOLERANCES = (1e-4, 1e-6, 1e-8)
LONGEST_SOLVE = 8.0  # seconds; lower tolerances are then left out, and the whole ends within about ten minutes
LONGEST_COMPILATION = 30.0
# Robertson's problem up to t = 40, with the values that the documentation of LSODE prints.
QUICK = (replace(ROBERTSON, t_end=40.0, end=(7.158e-1, 9.185e-6, 2.842e-1)),)
QUICK_GRADIENT = replace(HIRES, t_end=0.1)  # its end values are then weights like any others
COLUMNS = {
    "solver": ("solver", ""),
    "tolerance": ("tolerance", ".0e"),
    "error": ("error", ".1e"),
    "tolerances": ("in_tolerances", ".1f"),
    "steps": ("steps", "d"),
    "rejected": ("rejected", "d"),
    "f": ("f_evals", "d"),
    "Jacobians": ("jacobians", "d"),
    "LU": ("factorizations", "d"),
    "ms": ("ms", ".1f"),
}


@dataclass(frozen=True)
class Outcome:
    """The end state of a solve, and its counts by the keys of ``COLUMNS``."""

    y_end: np.ndarray
    counts: dict[str, Any]


Solve = Callable[[], Outcome]
# A solver sets a problem up at a tolerance.
Solver = Callable[[StiffProblem, float], Solve]


def run(settings: Settings) -> Parts:
    solvers: dict[str, Solver] = {}
    for found in (_own, _scipy, _diffrax):
        try:
            solvers |= found()
        except ImportError as error:
            yield f"{first_line(error)}: left out."
    with torch_threads(1):
        rows: dict[str, list[dict[str, Any]]] = {}
        for problem in QUICK if settings.quick else PROBLEMS:
            for part in _work(problem, solvers, TOLERANCES[:1] if settings.quick else TOLERANCES):
                if isinstance(part, Table):
                    rows.setdefault(problem.name, []).extend(part.rows)
                yield part
        for problem in (QUICK_GRADIENT,) if settings.quick else (ROBERTSON, HIRES, POLLUTION):
            yield from gradients(problem, TOLERANCES[1:2] if settings.quick else TOLERANCES)
        for part in batch(settings):
            yield part
            if isinstance(part, Table):
                yield goals(rows, part.rows)


def _work(problem: StiffProblem, solvers: dict[str, Solver], tolerances: tuple[float, ...]) -> Parts:
    table = Table(problem.name, COLUMNS)
    for name, prepare in solvers.items():
        if name.endswith(", compiled") and len(problem.y0) > MOST_COMPILED:
            continue
        for rtol in tolerances:
            try:
                outcome, seconds = _timed(prepare(problem, rtol), compiles=name.endswith((", jit", ", compiled")))
            except Exception as error:  # a solver that fails is a result, too
                yield f"{problem.name}, {name}, tolerance {rtol:g}: {type(error).__name__}: {first_line(error)}"
                continue
            counts = {key: int(count) for key, count in outcome.counts.items()}
            error = problem.error(outcome.y_end, rtol)
            row = {"solver": name, "tolerance": rtol, "error": error, "in_tolerances": error / rtol}
            table.rows.append(row | {"ms": 1e3 * seconds} | counts)
            if seconds > LONGEST_SOLVE:
                yield f"{problem.name}, {name}: no solve below tolerance {rtol:g}, which took {seconds:.0f} s."
                break
    yield table
    if "SciPy Radau" in solvers:
        curve = [_error_and_steps(problem, solvers["SciPy Radau"], rtol) for rtol in REFERENCE_TOLERANCES]
        yield at_equal_error(problem, table.rows, curve)


def _error_and_steps(problem: StiffProblem, prepare: Solver, rtol: float) -> tuple[float, int]:
    try:
        outcome = prepare(problem, rtol)()
    except ArithmeticError:  # no solution at this tolerance, hence no point of the curve
        return np.nan, 0
    return problem.error(outcome.y_end, rtol), outcome.counts["steps"]


def _timed(solve: Solve, compiles: bool) -> tuple[Outcome, float]:
    """A solve and its seconds: those of a second one, unless the first takes long, and longer than it may compile."""
    for _ in range(2):
        start = time.perf_counter()
        outcome = solve()
        seconds = time.perf_counter() - start
        if seconds > LONGEST_SOLVE + compiles * LONGEST_COMPILATION:
            break
    return outcome, seconds


def _own() -> dict[str, Solver]:
    def prepare(method: str, engine: str, problem: StiffProblem, rtol: float) -> Solve:
        func, y0, t = StiffFunction(problem), torch.tensor(problem.y0, dtype=torch.float64), times_of(problem)

        def run() -> Outcome:
            with torch.no_grad():
                solution = solution_by(func, y0, t, problem, method, rtol, engine)
            if engine == "compiled" and solution.stats.compiled != "solve":
                raise ArithmeticError(solution.stats.reason)
            return _outcome(solution)

        return run

    compiled = {f"aca_ext {name}, compiled": partial(prepare, name, "compiled") for name in COMPILED_METHODS}
    return {f"aca_ext {name}": partial(prepare, name, "eager") for name in OWN_METHODS} | compiled


def _outcome(solution: Any) -> Outcome:
    stats = solution.stats
    counts = {
        "steps": stats.n_accepted,
        "rejected": stats.n_rejected,
        "f_evals": stats.n_f_evals,
        "jacobians": stats.n_jacobians,
        "factorizations": stats.n_factorizations,
    }
    return Outcome(solution.y[-1].detach().numpy(), counts)


def _scipy() -> dict[str, Solver]:
    from scipy.integrate import solve_ivp
    from scipy.sparse import diags

    def prepare(method: str, problem: StiffProblem, rtol: float) -> Solve:
        bands: dict[str, Any] = {}
        if problem.bandwidth is not None and method == "LSODA":
            bands = {"lband": problem.bandwidth, "uband": problem.bandwidth}
        elif problem.bandwidth is not None:
            n, offsets = len(problem.y0), range(-problem.bandwidth, problem.bandwidth + 1)
            bands = {"jac_sparsity": diags([1.0] * len(offsets), list(offsets), shape=(n, n))}
        given = {"method": method, "rtol": rtol, "atol": problem.atol(rtol), **bands}

        def solve() -> Outcome:
            found = solve_ivp(problem.for_numpy(), (0.0, problem.t_end), np.array(problem.y0), **given)
            if not found.success:
                raise ArithmeticError(found.message)
            counts = {"steps": len(found.t) - 1, "f_evals": found.nfev, "jacobians": found.njev}
            return Outcome(found.y[:, -1], counts | ({} if method == "LSODA" else {"factorizations": found.nlu}))

        return solve

    return {f"SciPy {method}": partial(prepare, method) for method in ("Radau", "BDF", "LSODA")}


def _diffrax() -> dict[str, Solver]:
    jax, diffrax = jax_and_diffrax()
    import jax.numpy as jnp

    def prepare(compiles: bool, method: str, problem: StiffProblem, rtol: float) -> Solve:
        def solve(y0: Any, p: Any) -> Any:
            return diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, p: problem.slope(t, y, p, jnp, *problem.constants)),
                getattr(diffrax, method)(),
                0.0,
                problem.t_end,
                None,
                y0,
                args=p,
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=problem.atol(rtol)),
                max_steps=100_000,
            )

        function = jax.jit(solve) if compiles else solve

        def outcome() -> Outcome:
            with jax.enable_x64(True):
                found = function(jnp.array(problem.y0), jnp.array(problem.parameters))
                y_end, stats = np.asarray(found.ys[-1]), found.stats
            counts = {"steps": stats["num_accepted_steps"], "rejected": stats["num_rejected_steps"]}
            return Outcome(y_end, counts)

        return outcome

    return {
        JIT: partial(prepare, True, "Kvaerno5"),
        NO_JIT: partial(prepare, False, "Kvaerno5"),
        "diffrax Kvaerno3, jit": partial(prepare, True, "Kvaerno3"),
    }


def draw(result: Result):
    """Draws work-precision diagrams: error against time, and against accepted steps, a column per problem."""
    tables = [table for table in result.tables if table.columns is COLUMNS and table.rows]
    names = list(dict.fromkeys(row["solver"] for table in tables for row in table.rows))
    figure = new_figure(3.2 * len(tables), 7.0)
    panels = figure.subplots(2, len(tables), squeeze=False)
    for column, table in enumerate(tables):
        for axes, (key, label) in zip(
            panels[:, column], (("ms", "time [ms]"), ("steps", "accepted steps")), strict=True
        ):
            for i, name in enumerate(names):
                own = [row for row in table.rows if row["solver"] == name]
                style = "o-" if name.startswith("aca_ext") else "x--"
                points = [row[key] for row in own], [row["error"] for row in own]
                axes.loglog(*points, style, color=f"C{i}", label=name)
            axes.set(xlabel=label, title=table.title if key == "ms" else "")
            axes.tick_params(which="both", labelsize=6)
            _label_whole_decades(axes)
            axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("error")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _label_whole_decades(axes: Any) -> None:
    """Ends both axes at powers of ten and labels only these: the labels between them would overlap."""
    for axis, limits, set_limits in (
        (axes.xaxis, axes.get_xlim(), axes.set_xlim),
        (axes.yaxis, axes.get_ylim(), axes.set_ylim),
    ):
        low, high = np.log10(limits)
        set_limits(10.0 ** np.floor(low), 10.0 ** np.ceil(high))
        axis.set_minor_formatter("")
