"""Speed of an ensemble of eight million Lorenz systems on a GPU, relative to the speed of its memory.

float32, forward, state (3, 2^23), with fixed steps and with adaptive ones at the same tolerance. The floor is that of
``large_state``: the solver's evaluations of f, each at the time of f alone, plus the bytes that a step must read and
write, at the speed of a copy. torchdiffeq has no fixed steps of these methods: its options force equal steps, and it
still estimates their error. jax compiles f to one kernel.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import Parts, Settings, Table, first_line, interleave
from benchmarks.large_state import STAGES, WORKING_SET, arrays_per_step
from benchmarks.peers import jax_and_diffrax, jax_sees_a_gpu

TRAJECTORIES, QUICK_TRAJECTORIES = 1 << 23, 1 << 10
T_END = 0.25
STEPS = 25  # fixed
TOLERANCE = 1e-4
LOOSE = 1e3  # every step meets this tolerance
SIGMA, RHO, BETA = 10.0, 28.0, 8 / 3
COLUMNS = {
    "solver": ("solver", ""),
    "steps": ("steps", "d"),
    "f evals": ("n_f_evals", "d"),
    "ms": ("ms", ".1f"),
    "/ floor": ("over_floor", ".2f"),
    "/ eager": ("over_eager", ".2f"),
}


EAGER = "aca_ext eager"
Counts = tuple[int, int]  # trial steps, evaluations of f


class Lorenz(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        a, b, c = y.unbind()
        return torch.stack((SIGMA * (b - a), a * (RHO - c) - b, a * b - BETA * c))


def run(settings: Settings) -> Parts:
    n = QUICK_TRAJECTORIES if settings.quick else TRAJECTORIES
    torch.manual_seed(0)
    y0 = torch.randn(3, n, device=settings.device) + torch.tensor([[1.0], [1.0], [25.0]], device=settings.device)
    f_s, array_s = _speeds(y0, settings)
    for method in ("dopri5", "tsit5"):
        for adaptive in (False, True):
            yield from _measure(method, adaptive, y0, f_s, array_s, settings)


@torch.no_grad()
def _speeds(y0: Tensor, settings: Settings) -> tuple[float, float]:
    """Seconds of an evaluation of f, and of reading or writing one array."""
    arrays = [y0.clone() for _ in range(WORKING_SET)]
    pairs, f, t = list(pairwise(arrays)), Lorenz(), y0.new_zeros(())
    calls: dict[str, Callable[[], object]] = {
        "copies": lambda: [out.copy_(x) for x, out in pairs],
        "f": lambda: [f(t, x) for x in arrays],
    }
    with torch.no_grad():
        timings = interleave(calls, settings, threads=torch.get_num_threads(), seconds=2)
    return timings.best("f") / len(arrays), timings.best("copies") / len(pairs) / 2


def _measure(method: str, adaptive: bool, y0: Tensor, f_s: float, array_s: float, settings: Settings) -> Parts:
    func, runs = Lorenz(), dict[str, Callable[[], Counts]]()
    for name, make in SOLVERS.items():
        try:
            solve = make(method, adaptive, func, y0)
            solve()
        except Exception as error:
            yield f"{name}, {method}, is left out: {type(error).__name__}: {first_line(error)}"
        else:
            runs[name] = solve
    timings = interleave(runs, settings, threads=torch.get_num_threads(), seconds=3)
    steps = f"adaptive at {TOLERANCE:g}" if adaptive else f"{STEPS} fixed steps"
    speeds = f"f {1e3 * f_s:.2f} ms, copy {y0.nbytes / array_s / 1e9:.0f} GB/s"
    table = Table(f"{method}, {steps}, {y0.shape[1]} trajectories to T = {T_END:g} ({speeds})", COLUMNS)
    for name, solve in runs.items():
        n_steps, evaluations = solve()
        floor = evaluations * f_s + n_steps * arrays_per_step(method, adaptive) * array_s
        seconds = timings.median(name)
        table.rows.append(
            {
                "solver": name,
                "steps": n_steps,
                "n_f_evals": evaluations,
                "ms": 1e3 * seconds,
                "over_floor": seconds / floor,
                "over_eager": timings.ratio(name, EAGER) if EAGER in runs else None,
                "floor_ms": 1e3 * floor,
                "f_ms": 1e3 * f_s,
                "copy_gb_per_s": y0.nbytes / array_s / 1e9,
                "rounds": len(timings.samples[name]),
            }
        )
    if runs:
        yield table


def _ours(engine: str, method: str, adaptive: bool, func: Lorenz, y0: Tensor) -> Callable[[], Counts]:
    t = torch.tensor([0.0, T_END])
    settings: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE, "method": method, "engine": engine}
    if not adaptive:
        settings["options"] = {"step_size": T_END / STEPS}

    @torch.no_grad()
    def solve() -> Counts:
        stats = aca_ext.solve(func, y0, t, **settings).stats
        return stats.n_steps, stats.n_f_evals

    return solve


def _torchdiffeq(method: str, adaptive: bool, func: Lorenz, y0: Tensor) -> Callable[[], Counts]:
    import torchdiffeq

    t = torch.tensor([0.0, T_END], device=y0.device)
    settings: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE, "method": method}
    if not adaptive:
        step = T_END / STEPS
        settings |= {"rtol": LOOSE, "atol": LOOSE, "options": {"first_step": step, "max_step": step}}

    @torch.no_grad()
    def solve() -> Counts:
        func.calls = 0
        torchdiffeq.odeint(func, y0, t, **settings)
        return func.calls // STAGES, func.calls  # the quotient drops the one or two evaluations at the start

    return solve


def _diffrax(method: str, adaptive: bool, func: Lorenz, y0: Tensor) -> Callable[[], Counts]:
    jax, diffrax = jax_and_diffrax()
    if y0.is_cuda and not jax_sees_a_gpu():
        raise RuntimeError("jax sees no GPU")
    start = jax.device_put(y0.cpu().numpy(), jax.devices("gpu" if y0.is_cuda else "cpu")[0])

    def lorenz(t: Any, y: Any, args: Any) -> Any:
        a, b, c = y
        return jax.numpy.stack((SIGMA * (b - a), a * (RHO - c) - b, a * b - BETA * c))

    @jax.jit
    def end_and_steps(y: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lorenz),
            {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5}[method](),
            0.0,
            T_END,
            None if adaptive else T_END / STEPS,
            y,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
            if adaptive
            else diffrax.ConstantStepSize(),
        )
        return solution.ys[-1], solution.stats["num_steps"]

    def solve() -> Counts:
        n_steps = int(jax.block_until_ready(end_and_steps(start))[1])
        return n_steps, STAGES * n_steps + 1 + adaptive  # calls of a compiled f cannot be counted

    return solve


# Makers of solvers: from (method, adaptive, func, y0), a function that solves and returns its counts.
SOLVERS: dict[str, Callable[[str, bool, Lorenz, Tensor], Callable[[], Counts]]] = {
    EAGER: partial(_ours, "eager"),
    "aca_ext graph": partial(_ours, "graph"),
    "torchdiffeq odeint": _torchdiffeq,
    "diffrax, jit": _diffrax,
}
