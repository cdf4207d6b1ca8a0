"""Monitoring a long solve: a callback sees every step, and the solve stops and resumes."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from aca_ext import Solution, Step, solve
from aca_ext.examples.result import Result

MOON = 0.012277471  # mass of the moon in that of earth and moon
PERIOD = 17.0652165601579625588917206249
START = (0.994, 0.0, 0.0, -2.00158510637908252240537862224)


def orbit(t: Tensor, y: Tensor) -> Tensor:
    """Arenstorf's orbit: a satellite between earth and moon, in coordinates that turn with them."""
    x1, x2, v1, v2 = y.unbind()
    earth = ((x1 + MOON) ** 2 + x2**2) ** 1.5
    moon = ((x1 - 1 + MOON) ** 2 + x2**2) ** 1.5
    a1 = x1 + 2 * v2 - (1 - MOON) * (x1 + MOON) / earth - MOON * (x1 - 1 + MOON) / moon
    a2 = x2 - 2 * v1 - (1 - MOON) * x2 / earth - MOON * x2 / moon
    return torch.stack((v1, v2, a1, a2))


class Monitor:
    """A callback that records every trial step and reports once in a while."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.t: list[float] = []
        self.h: list[float] = []
        self.accepted: list[bool] = []

    def __call__(self, step: Step) -> None:
        self.t.append(step.t)
        self.h.append(step.h)
        self.accepted.append(step.is_accepted)
        if step.n_steps % self.every == 0:
            print(f"t = {step.t:7.4f}   step size {step.h:.1e}   {step.n_rejected} of {step.n_steps} trials rejected")


def run(quick: bool = False) -> Result:
    """Follows the orbit in portions of trial steps; between them a program could save its work or give up."""
    monitor = Monitor(100)
    y0 = torch.tensor(START, dtype=torch.float64)
    t = torch.linspace(0.0, (0.05 if quick else 1.0) * PERIOD, 500, dtype=torch.float64)
    options = {"max_num_steps": 20 if quick else 200, "on_step_limit": "stop"}
    solution = solve(orbit, y0, t, rtol=1e-9, atol=1e-9, options=options, callback=monitor)
    portions = 1
    while not solution.is_complete:
        print(f"stopped at t = {solution.t_reached:.4f}, with {len(solution.t)} of {len(t)} outputs; resuming")
        solution = solution.resume()  # the same steps as without the stop, bit for bit
        portions += 1
    numbers = {
        "portions": float(portions), "trial steps": float(len(monitor.t)), "smallest step": min(monitor.h),
        "largest step": max(monitor.h), "distance to the start": float((solution.y[-1] - y0).norm()),
    }  # fmt: skip
    return Result(numbers, draw(solution, monitor))


def draw(solution: Solution, monitor: Monitor) -> Figure:
    """Draws the orbit, and the size of every trial step over time."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    plane, sizes = figure.subplots(1, 2)
    plane.plot(*solution.y[:, :2].T)
    plane.plot([-MOON, 1 - MOON], [0, 0], "o", color="0.4")
    plane.annotate("earth", (-MOON, 0.07))
    plane.annotate("moon", (1 - MOON, 0.07))
    plane.set(aspect="equal", title="Orbit of a satellite")
    for kind, label, color in ((True, "accepted", "C0"), (False, "rejected", "C3")):
        chosen = [i for i, accepted in enumerate(monitor.accepted) if accepted is kind]
        sizes.semilogy([monitor.t[i] for i in chosen], [monitor.h[i] for i in chosen], ".", color=color, label=label)
    sizes.set(xlabel="t", ylabel="step size", title="Trial steps, as the callback saw them")
    sizes.legend()
    return figure
