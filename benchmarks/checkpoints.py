"""Cost of few checkpoints: memory and steps computed again for a long solve, against the fewest possible.

20 000 steps of dopri5 on a state of 256 doubles, forward and backward, each choice in a process of its own (Linux).
``states`` is the memory of those kept, ``process`` how much the process grew at most, the record of (t, h) included.
``again`` is how many steps were computed again per step of the solve; ``least`` the fewest of any schedule that keeps
as many states and knows the number of steps beforehand: (r·N - C(K + r, r - 1) - (N - 1)) / N for the smallest r with
N ≤ C(K + r, r) (Griewank & Walther, 2000).
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
EVALUATIONS = 6  # of f per replayed dopri5 step that is computed again, and per step replayed for its transpose
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
    for policy in POLICIES:
        with spawn.Pool(1) as pool:
            measured = pool.apply(_measure, (policy, n_steps, settings.device))
        gradients.append(measured.gradient)
        table.rows.append(measured.row | {"same_gradient": str(measured.gradient == gradients[0])})
    yield table


def _measure(policy: int | str | None, n_steps: int, device: str) -> Measured:
    torch.set_num_threads(1)
    _solve(policy, 20, device)  # what is loaded at the first use is no part of the growth
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    solution, y0, seconds = _solve(policy, n_steps, device)
    after = _resident("VmHWM")
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


def _resident(which: str) -> int:
    """Kilobytes of this process, now or at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def fewest(n_steps: int, capacity: int) -> int:
    """Steps computed again at least, where ``capacity`` states are kept, in reversing ``n_steps`` known beforehand."""
    r = 1
    while comb(capacity + r, r) < n_steps:
        r += 1
    return r * n_steps - comb(capacity + r, r - 1) - (n_steps - 1)
