"""Cost of few checkpoints: memory and recomputed steps of a long solve, against the fewest possible.

20 000 steps of dopri5 on a state of 256 doubles, forward and backward, each policy in a process of its own (Linux).
``states`` is the memory of the checkpoints, ``process`` the largest growth of the process, which includes the record of
(t, h). ``again`` is the number of recomputed steps per step of the solve. ``least`` is the smallest such number for as
many checkpoints, if the number of steps is known beforehand: (r·N - C(K + r, r - 1) - (N - 1)) / N for the smallest r
with N ≤ C(K + r, r) (Griewank & Walther, 2000).
"""

import multiprocessing
import time
from dataclasses import dataclass
from math import comb, inf
from pathlib import Path

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import Parts, Settings, Table

STEPS, QUICK_STEPS = 20_000, 500
WIDTH = 256
POLICIES = (None, 30, 300, "cpu")
EVALUATIONS = 6  # of f per recomputed dopri5 step, and per step replayed for its transpose
COLUMNS = {
    "checkpoints": ("checkpoints", ""),
    "states MB": ("states_mb", ".2f"),
    "process MB": ("process_mb", ".0f"),
    "again": ("again", ".3f"),
    "least": ("least", ".3f"),
    "forward s": ("forward_s", ".1f"),
    "backward s": ("backward_s", ".1f"),
    "same gradient": ("same_gradient", ""),
}


class Driven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.p * torch.cos(t) * y


@dataclass
class Measured:
    row: dict[str, object]
    gradient: list[float]


def run(settings: Settings) -> Parts:
    n_steps = QUICK_STEPS if settings.quick else STEPS
    table = Table(f"{n_steps} steps, {WIDTH} doubles", COLUMNS)
    spawn = multiprocessing.get_context("spawn")
    gradients = []
    for policy in POLICIES[:2] if settings.quick else POLICIES:
        with spawn.Pool(1) as pool:
            measured = pool.apply(_measure, (policy, n_steps, settings.device))
        gradients.append(measured.gradient)
        table.rows.append(measured.row | {"same_gradient": str(measured.gradient == gradients[0])})
    yield table


def _measure(policy: int | str | None, n_steps: int, device: str) -> Measured:
    torch.set_num_threads(1)
    _solve(policy, 20, device)  # loads everything that the first solve loads, which must not count as growth
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    solution, y0, seconds = _solve(policy, n_steps, device)
    after = resident("VmHWM")
    stats = solution.stats
    kept = min(policy, n_steps) if isinstance(policy, int) else n_steps
    again = (stats.n_f_evals_backward - EVALUATIONS * n_steps) / EVALUATIONS / n_steps
    row = {
        "checkpoints": str(policy),
        "n_accepted": stats.n_accepted,
        "states_mb": kept * WIDTH * 8 / 1e6,
        "process_mb": (after - before) / 1e3,
        "again": again,
        "least": fewest(n_steps, policy) / n_steps if isinstance(policy, int) else 0.0,
        "forward_s": seconds[0],
        "backward_s": seconds[1],
        "n_f_evals": stats.n_f_evals,
        "n_f_evals_backward": stats.n_f_evals_backward,
    }
    return Measured(row, y0.grad.tolist())


def _solve(policy: int | str | None, n_steps: int, device: str) -> tuple[aca_ext.Solution, Tensor, tuple[float, float]]:
    h = 1e-3
    func = Driven().to(device)
    y0 = torch.linspace(1.0, 2.0, WIDTH, dtype=torch.float64, device=device).requires_grad_()
    t = torch.tensor([0.0, h * n_steps], dtype=torch.float64)
    options = {"first_step": h, "max_step": h, "max_num_steps": inf}
    start = time.perf_counter()
    solution = aca_ext.solve(func, y0, t, options=options, checkpoints=policy)
    middle = time.perf_counter()
    solution.y[-1].sum().backward()
    return solution, y0, (middle - start, time.perf_counter() - middle)


def resident(which: str) -> int:
    """Memory of this process in kilobytes: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def fewest(n_steps: int, capacity: int) -> int:
    """Smallest number of recomputed steps in reversing ``n_steps``, known beforehand, with ``capacity`` checkpoints."""
    r = 1
    while comb(capacity + r, r) < n_steps:
        r += 1
    return r * n_steps - comb(capacity + r, r - 1) - (n_steps - 1)
