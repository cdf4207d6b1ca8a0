"""A batch of Robertson's problems with different rates: independent samples, diffrax under vmap, and one by one.

The reference is SciPy's Radau at a tight tolerance, for a few of the problems. Where problems are solved one by one,
only the first few are timed, and the time is scaled to the batch.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import aca_ext
from benchmarks.harness import Parts, Settings, Table, first_line
from benchmarks.peers import jax_and_diffrax
from benchmarks.stiff_problems import ROBERTSON, StiffProblem

COUNT, QUICK_COUNT = 1000, 20
N_SINGLE, N_CHECKED = 10, 5
RTOL = 1e-6
PROBLEM = replace(ROBERTSON, t_end=1e5)
COLUMNS = {
    "solver": ("solver", ""),
    "problems": ("problems", "d"),
    "timed": ("timed", "d"),
    "error": ("error", ".1e"),
    "fewest steps": ("fewest_steps", "d"),
    "most steps": ("most_steps", "d"),
    "s": ("seconds", ".3f"),
}

# End states of the problems, and the steps of each.
Outcome = tuple[np.ndarray, np.ndarray]


def batch(settings: Settings) -> Parts:
    count = QUICK_COUNT if settings.quick else COUNT
    rates = np.tile(np.array(PROBLEM.parameters), (count, 1))
    rates[:, 0] *= np.logspace(-2, 1, count)
    # Spread over the batch, so that those solved one by one stand for all of them.
    checked = np.linspace(0, count - 1, N_CHECKED).astype(int)
    singles = np.linspace(0, count - 1, N_SINGLE).astype(int)
    table = Table(f"{count} Robertson problems with first rates over three decades, to t = {PROBLEM.t_end:g}", COLUMNS)
    exact = np.stack([_reference(p) for p in rates[checked]])
    solvers: dict[str, tuple[Callable[[np.ndarray], Outcome], bool]] = dict(_own())
    try:
        solvers |= _diffrax()
    except ImportError as error:
        yield f"{first_line(error)}: left out."
    for name, (solve, is_single) in solvers.items():
        of_solver = singles if is_single else np.arange(count)
        try:
            (ends, steps), seconds = _timed(solve, rates[of_solver])
        except Exception as error:  # a solver that fails is a result, too
            yield f"{name}: {type(error).__name__}: {first_line(error)}"
            continue
        both = [(list(of_solver).index(i), j) for j, i in enumerate(checked) if i in of_solver]
        errors = [_of(p).error(ends[i], RTOL) for i, j in both for p in [exact[j]]]
        row = {"solver": name, "problems": count, "timed": len(of_solver), "error": max(errors)}
        row |= {"fewest_steps": int(steps.min()), "most_steps": int(steps.max())}
        table.rows.append(row | {"seconds": seconds * count / len(of_solver)})
    yield table


def _of(end: np.ndarray) -> StiffProblem:
    return replace(PROBLEM, end=tuple(end))


def _timed(solve: Callable[[np.ndarray], Outcome], rates: np.ndarray) -> tuple[Outcome, float]:
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


def _own() -> dict[str, tuple[Callable[[np.ndarray], Outcome], bool]]:
    how: dict[str, Any] = {"method": "kvaerno5", "rtol": RTOL, "atol": PROBLEM.atol(RTOL), "engine": "eager"}
    t = torch.tensor([0.0, PROBLEM.t_end], dtype=torch.float64)

    def func(t: torch.Tensor, y: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return PROBLEM.slope(t, y, p.unbind(-1), torch, *PROBLEM.constants)

    def together(rates: np.ndarray) -> Outcome:
        y0, p = torch.tensor(PROBLEM.y0, dtype=torch.float64).repeat(len(rates), 1), torch.from_numpy(rates)
        with torch.no_grad():
            found = aca_ext.solve(func, y0, t, args=(p,), options={"batch": "independent"}, **how)
        return found.y[-1].numpy(), found.stats.n_accepted.numpy()

    def singly(rates: np.ndarray) -> Outcome:
        y0 = torch.tensor(PROBLEM.y0, dtype=torch.float64)
        with torch.no_grad():
            found = [aca_ext.solve(func, y0, t, args=(p,), **how) for p in torch.from_numpy(rates)]
        return np.stack([one.y[-1].numpy() for one in found]), np.array([one.stats.n_accepted for one in found])

    return {"aca_ext kvaerno5, independent": (together, False), "aca_ext kvaerno5, one by one": (singly, True)}


def _diffrax() -> dict[str, tuple[Callable[[np.ndarray], Outcome], bool]]:
    jax, diffrax = jax_and_diffrax()
    import jax.numpy as jnp

    def alone(p: Any) -> Any:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: PROBLEM.slope(t, y, p, jnp, *PROBLEM.constants)),
            diffrax.Kvaerno5(),
            0.0,
            PROBLEM.t_end,
            None,
            jnp.array(PROBLEM.y0),
            args=p,
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=PROBLEM.atol(RTOL)),
            max_steps=100_000,
        )
        return found.ys[-1], found.stats["num_accepted_steps"]

    def on_batch(function: Callable[[Any], Any]) -> Callable[[np.ndarray], Outcome]:
        def solve(rates: np.ndarray) -> Outcome:
            with jax.enable_x64(True):
                ends, steps = function(jnp.array(rates))
                return np.asarray(ends), np.asarray(steps)

        return solve

    compiled = jax.jit(alone)

    def one_by_one(rates: Any) -> Any:
        found = [compiled(p) for p in rates]
        return jnp.stack([end for end, _ in found]), jnp.stack([steps for _, steps in found])

    return {
        "diffrax Kvaerno5, vmap, jit": (on_batch(jax.jit(jax.vmap(alone))), False),
        "diffrax Kvaerno5, vmap, no jit": (on_batch(jax.vmap(alone)), False),
        "diffrax Kvaerno5, jit, one by one": (on_batch(one_by_one), True),
    }
