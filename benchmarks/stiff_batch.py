"""A batch of Robertson's problems with different rates: independent samples, diffrax under vmap, and one by one.

The reference is SciPy's Radau at a tight tolerance, for a few of the problems. Where problems are solved one by one,
only the first few are timed, and the time is scaled to the batch. Solvers of whole batches in compiled code run at
several tolerances, so that they can be compared at equal error, and with the gradient of the starts and rates too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import aca_ext
from benchmarks.harness import Parts, Settings, Table, first_line
from benchmarks.peers import jax_and_diffrax
from benchmarks.stiff_problems import ROBERTSON, StiffProblem

# Problems of the batch, those that are solved one by one, and those whose errors are measured.
COUNTS, QUICK_COUNTS = (1000, 10, 5), (6, 2, 2)
RTOL, OTHERS = 1e-6, (1e-4, 1e-5)
PROBLEM = replace(ROBERTSON, t_end=1e5)
COLUMNS = {
    "solver": ("solver", ""),
    "tolerance": ("tolerance", ".0e"),
    "problems": ("problems", "d"),
    "timed": ("timed", "d"),
    "error": ("error", ".1e"),
    "fewest steps": ("fewest_steps", "d"),
    "most steps": ("most_steps", "d"),
    "s": ("seconds", ".3f"),
    "s with gradient": ("seconds_both", ".3f"),
}

# End states of the problems, and the steps of each.
Outcome = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class BatchSolver:
    """A solver of problems with given rates.

    Attributes:
        is_single: it solves them one by one.
        pull: solves, and finds the gradient of the sum of the squared ends; None if that is not measured.
    """

    solve: Callable[[np.ndarray], Outcome]
    rtol: float = RTOL
    is_single: bool = False
    pull: Callable[[np.ndarray], Any] | None = None


def batch(settings: Settings) -> Parts:
    count, n_single, n_checked = QUICK_COUNTS if settings.quick else COUNTS
    rates = np.tile(np.array(PROBLEM.parameters), (count, 1))
    rates[:, 0] *= np.logspace(-2, 1, count)
    # Spread over the batch, so that those solved one by one stand for all of them.
    checked = np.linspace(0, count - 1, n_checked).astype(int)
    singles = np.linspace(0, count - 1, n_single).astype(int)
    table = Table(f"{count} Robertson problems with first rates over three decades, to t = {PROBLEM.t_end:g}", COLUMNS)
    exact = np.stack([_reference(p) for p in rates[checked]])
    solvers = _own()
    try:
        solvers |= _diffrax()
    except ImportError as error:
        yield f"{first_line(error)}: left out."
    for name, solver in solvers.items():
        of_solver = singles if solver.is_single else np.arange(count)
        try:
            (ends, steps), seconds = _timed(solver.solve, rates[of_solver])
            both = None if solver.pull is None else _timed(solver.pull, rates[of_solver])[1]
        except Exception as error:  # a solver that fails is a result, too
            yield f"{name}: {type(error).__name__}: {first_line(error)}"
            continue
        pairs = [(list(of_solver).index(i), j) for j, i in enumerate(checked) if i in of_solver]
        errors = [_of(p).error(ends[i], RTOL) for i, j in pairs for p in [exact[j]]]
        row: dict[str, Any] = {"solver": name, "tolerance": solver.rtol, "problems": count, "timed": len(of_solver)}
        row |= {"error": max(errors), "seconds_both": both}
        row |= {"fewest_steps": int(steps.min()), "most_steps": int(steps.max())}
        table.rows.append(row | {"seconds": seconds * count / len(of_solver)})
    yield table


def _of(end: np.ndarray) -> StiffProblem:
    return replace(PROBLEM, end=tuple(end))


def _timed(solve: Callable[[np.ndarray], Any], rates: np.ndarray) -> tuple[Any, float]:
    """The results of a solve, and the seconds of a second one, since the first may compile."""
    solve(rates)
    start = time.perf_counter()
    return solve(rates), time.perf_counter() - start


def _reference(p: np.ndarray) -> np.ndarray:
    from scipy.integrate import solve_ivp

    slope = replace(PROBLEM, parameters=tuple(p)).for_numpy()
    span, atol = (0.0, PROBLEM.t_end), 1e-4 * PROBLEM.atol(RTOL)
    end: np.ndarray = solve_ivp(slope, span, np.array(PROBLEM.y0), method="Radau", rtol=1e-10, atol=atol).y[:, -1]
    return end


def _own() -> dict[str, BatchSolver]:
    eager = "aca_ext kvaerno5, eager, independent"
    found = {f"aca_ext kvaerno5, lanes, {rtol:.0e}": _independent("compiled", rtol) for rtol in (*OTHERS, RTOL)}
    return found | {eager: _independent("eager", RTOL), "aca_ext kvaerno5, one by one": _one_by_one()}


def _func(t: torch.Tensor, y: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return PROBLEM.slope(t, y, p.unbind(-1), torch, *PROBLEM.constants)


def _settings(rtol: float) -> dict[str, Any]:
    return {"method": "kvaerno5", "rtol": rtol, "atol": PROBLEM.atol(rtol)}


def _independent(engine: str, rtol: float) -> BatchSolver:
    t = [0.0, PROBLEM.t_end]

    def solution(y0: torch.Tensor, p: torch.Tensor) -> Any:
        options = {"batch": "independent"}
        return aca_ext.solve(_func, y0, t, args=(p,), options=options, engine=engine, **_settings(rtol))

    def inputs(rates: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(PROBLEM.y0, dtype=torch.float64).repeat(len(rates), 1), torch.from_numpy(rates)

    def solve(rates: np.ndarray) -> Outcome:
        with torch.no_grad():
            found = solution(*inputs(rates))
        return found.y[-1].numpy(), found.stats.n_accepted.numpy()

    def pull(rates: np.ndarray) -> Any:
        y0, p = (x.clone().requires_grad_() for x in inputs(rates))
        return torch.autograd.grad(solution(y0, p).y[-1].square().sum(), (y0, p))

    return BatchSolver(solve, rtol, pull=pull)


def _one_by_one() -> BatchSolver:
    def solve(rates: np.ndarray) -> Outcome:
        y0 = torch.tensor(PROBLEM.y0, dtype=torch.float64)
        t = torch.tensor([0.0, PROBLEM.t_end], dtype=torch.float64)
        with torch.no_grad():
            found = [
                aca_ext.solve(_func, y0, t, args=(p,), engine="eager", **_settings(RTOL))
                for p in torch.from_numpy(rates)
            ]
        return np.stack([one.y[-1].numpy() for one in found]), np.array([one.stats.n_accepted for one in found])

    return BatchSolver(solve, is_single=True)


def _diffrax() -> dict[str, BatchSolver]:
    name = "diffrax Kvaerno5"
    found = {f"{name}, vmap, jit, {rtol:.0e}": _under_vmap(rtol) for rtol in (*OTHERS, RTOL)}
    return found | {f"{name}, vmap, no jit": _under_vmap(RTOL, has_jit=False), f"{name}, jit, one by one": _singly()}


def _alone(rtol: float) -> Callable[[Any, Any], Any]:
    _, diffrax = jax_and_diffrax()
    import jax.numpy as jnp

    def alone(y: Any, p: Any) -> Any:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: PROBLEM.slope(t, y, p, jnp, *PROBLEM.constants)),
            diffrax.Kvaerno5(),
            0.0,
            PROBLEM.t_end,
            None,
            y,
            args=p,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=PROBLEM.atol(rtol)),
            max_steps=16_384,
        )
        return found.ys[-1], found.stats["num_accepted_steps"]

    return alone


def _under_vmap(rtol: float, has_jit: bool = True) -> BatchSolver:
    jax, _ = jax_and_diffrax()
    together = jax.vmap(_alone(rtol))
    gradient = jax.jit(jax.grad(lambda y, p: (together(y, p)[0] ** 2).sum(), argnums=(0, 1)))
    pull = (lambda rates: _on(jax, gradient, rates)) if has_jit else None
    return BatchSolver(_outcome_of(jax, jax.jit(together) if has_jit else together), rtol, pull=pull)


def _singly() -> BatchSolver:
    jax, _ = jax_and_diffrax()
    compiled = jax.jit(_alone(RTOL))

    def one_by_one(y: Any, p: Any) -> Any:
        found = [compiled(*one) for one in zip(y, p, strict=True)]
        return jax.numpy.stack([end for end, _ in found]), jax.numpy.stack([steps for _, steps in found])

    return BatchSolver(_outcome_of(jax, one_by_one), is_single=True)


def _on(jax: Any, function: Callable[[Any, Any], Any], rates: np.ndarray) -> Any:
    with jax.enable_x64(True):
        y0 = jax.numpy.tile(jax.numpy.array(PROBLEM.y0), (len(rates), 1))
        return jax.block_until_ready(function(y0, jax.numpy.array(rates)))


def _outcome_of(jax: Any, function: Callable[[Any, Any], Any]) -> Callable[[np.ndarray], Outcome]:
    def solve(rates: np.ndarray) -> Outcome:
        ends, steps = _on(jax, function, rates)
        return np.asarray(ends), np.asarray(steps)

    return solve
