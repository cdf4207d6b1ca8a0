"""Error against steps, evaluations, factorisations and time of implicit methods, on seven stiff problems and a batch.

One CPU thread, float64. Errors are those of the published end values, in units of the tolerance (and, as ``error``,
times rtol). The time is that of the second of two solves without gradient, or of the first if it takes long. SciPy does
not count the evaluations of f for its Jacobians.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

import aca_ext
from benchmarks.harness import Parts, Result, Settings, Table, first_line, new_figure, torch_threads
from benchmarks.peers import jax_and_diffrax
from benchmarks.stiff_batch import batch
from benchmarks.stiff_comparison import JIT, NO_JIT, REFERENCE_TOLERANCES, at_equal_error
from benchmarks.stiff_problems import E5, HIRES, OREGONATOR, POLLUTION, PROBLEMS, ROBERTSON, StiffFunction, StiffProblem

OWN_METHODS = ("kvaerno5", "rodas5p", "kvaerno3", "trbdf2")
TOLERANCES = (1e-4, 1e-6, 1e-8)
LONGEST_SOLVE = 8.0  # seconds; lower tolerances are then left out, and the whole ends within about ten minutes
QUICK = (ROBERTSON, OREGONATOR, HIRES, E5, POLLUTION)
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
GRADIENT_COLUMNS = {
    "method": ("solver", ""),
    "tolerance": ("tolerance", ".0e"),
    "error of the gradient": ("error", ".1e"),
    "steps": ("steps", "d"),
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
        for problem in QUICK if settings.quick else PROBLEMS:
            yield from _work(problem, solvers, TOLERANCES[:1] if settings.quick else TOLERANCES)
        for problem in (HIRES,) if settings.quick else (ROBERTSON, HIRES, POLLUTION):
            yield from _gradients(problem, TOLERANCES[1:2] if settings.quick else TOLERANCES)
        yield from batch(settings)


def _work(problem: StiffProblem, solvers: dict[str, Solver], tolerances: tuple[float, ...]) -> Parts:
    table = Table(problem.name, COLUMNS)
    for name, prepare in solvers.items():
        for rtol in tolerances:
            try:
                outcome, seconds = _timed(prepare(problem, rtol))
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


def _timed(solve: Solve) -> tuple[Outcome, float]:
    """A solve and its seconds: those of a second one, since the first may compile, unless the first takes too long."""
    for _ in range(2):
        start = time.perf_counter()
        outcome = solve()
        seconds = time.perf_counter() - start
        if seconds > LONGEST_SOLVE:
            break
    return outcome, seconds


def _own() -> dict[str, Solver]:
    def prepare(method: str, problem: StiffProblem, rtol: float) -> Solve:
        func, y0, t = StiffFunction(problem), torch.tensor(problem.y0, dtype=torch.float64), _times(problem)

        def solve() -> Outcome:
            with torch.no_grad():
                return _outcome(_solve(func, y0, t, problem, method, rtol))

        return solve

    return {f"aca_ext {name}": partial(prepare, name) for name in OWN_METHODS}


def _times(problem: StiffProblem) -> torch.Tensor:
    return torch.tensor([0.0, problem.t_end], dtype=torch.float64)


def _solve(func: Any, y0: torch.Tensor, t: torch.Tensor, problem: StiffProblem, method: str, rtol: float) -> Any:
    # The Brusselator would get Krylov iterations, which are far slower there: they have no preconditioner.
    options = {} if problem.bandwidth is None else {"jacobian": "dense"}
    return aca_ext.solve(func, y0, t, rtol=rtol, atol=problem.atol(rtol), method=method, options=options)


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


def _gradients(problem: StiffProblem, tolerances: tuple[float, ...]) -> Parts:
    title = f"{problem.name}: gradient of sum(y / end) by the logarithms of the rates, against finite differences"
    table = Table(title, GRADIENT_COLUMNS)
    exact = _finite_differences(problem)
    for method in OWN_METHODS:
        for rtol in tolerances if method == "kvaerno5" else tolerances[:2]:
            start = time.perf_counter()
            try:
                found, steps = _gradient(problem, method, rtol)
            except Exception as error:
                yield f"{problem.name}, gradient by {method}: {type(error).__name__}: {first_line(error)}"
                break
            ms = 1e3 * (time.perf_counter() - start)
            error_of = float(np.abs(found - exact).max() / np.abs(exact).max())
            table.rows.append({"solver": method, "tolerance": rtol, "error": error_of, "ms": ms, "steps": steps})
    yield table


def _gradient(problem: StiffProblem, method: str, rtol: float) -> tuple[np.ndarray, int]:
    func, y0 = StiffFunction(problem), torch.tensor(problem.y0, dtype=torch.float64)
    solution = _solve(func, y0, _times(problem), problem, method, rtol)
    loss = (solution.y[-1] / torch.tensor(problem.end, dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(loss, func.p)
    return (gradient * func.p).detach().numpy(), solution.stats.n_accepted


def _finite_differences(problem: StiffProblem, step: float = 1e-3) -> np.ndarray:
    """Central differences of order 4, of SciPy's Radau at a tight tolerance: correct to about 1e-8."""
    from scipy.integrate import solve_ivp

    def loss(index: int, change: float) -> float:
        p = tuple(rate * (1 + change) if i == index else rate for i, rate in enumerate(problem.parameters))
        slope, rtol = replace(problem, parameters=p).for_numpy(), 1e-10
        span, y0 = (0.0, problem.t_end), np.array(problem.y0)
        found = solve_ivp(slope, span, y0, method="Radau", rtol=rtol, atol=1e-4 * problem.atol(rtol))
        return float(np.sum(found.y[:, -1] / np.array(problem.end)))

    def derivative(index: int) -> float:
        near, far = (loss(index, h) - loss(index, -h) for h in (step, 2 * step))
        return (8 * near - far) / (12 * step)

    return np.array([derivative(i) for i in range(len(problem.parameters))])


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
