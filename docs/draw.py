"""Draws the figures of the documentation: ``python docs/draw.py`` writes them into docs/images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from aca_ext import Step, solve

IMAGES = Path(__file__).resolve().parent / "images"
SPAN = (0.0, 6.0)


def oscillator(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The van der Pol oscillator with stiffness 5, whose jumps make the step size change."""
    x, v = y.unbind()
    return torch.stack((v, 5 * (1 - x * x) * v - x))


def passes_of_aca() -> Any:
    """The trials of a solve, its checkpoints, and the steps that the backward pass replays."""
    trials: list[Step] = []
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    solve(oscillator, y0, SPAN, method="bosh3", rtol=2e-2, atol=2e-2, callback=trials.append)
    smooth = torch.linspace(*SPAN, 400, dtype=torch.float64)
    exact = solve(oscillator, y0, smooth)
    figure: Any = Figure(figsize=(8, 5.2), layout="constrained")
    states, forward, backward = figure.subplots(3, 1, sharex=True, height_ratios=(4, 2, 2))
    states.plot(smooth, exact.y[:, 0], color="0.75", label="solution")
    accepted = [trial for trial in trials if trial.is_accepted]
    states.plot(
        [s.t for s in accepted], [s.y[0].item() for s in accepted], "o", color="C0", label="checkpoints (t, h, y)"
    )
    states.set(ylabel="first component of y", title="Forward pass: keep the accepted steps")
    states.legend()
    for i, trial in enumerate(trials):
        color = "C0" if trial.is_accepted else "C3"
        forward.annotate("", (trial.t + trial.h, i), (trial.t, i), arrowprops={"arrowstyle": "->", "color": color})
    forward.plot([], [], color="C0", label="accepted")
    forward.plot([], [], color="C3", label="rejected")
    forward.set(ylabel="trial", ylim=(len(trials), -1))
    forward.legend(loc="lower left")
    for i, step in enumerate(reversed(accepted)):
        backward.annotate("", (step.t, i), (step.t + step.h, i), arrowprops={"arrowstyle": "->", "color": "C2"})
        backward.plot(step.t, i, "o", color="C0", markersize=4)
    backward.set(ylabel="replayed step", xlabel="t", ylim=(len(accepted), -1))
    backward.set_title(
        "Backward pass: replay each accepted step from its checkpoint, last step first", fontsize="medium"
    )
    return figure


def main() -> None:
    """Writes every figure."""
    IMAGES.mkdir(exist_ok=True)
    passes_of_aca().savefig(IMAGES / "aca.png", dpi=90)


if __name__ == "__main__":
    main()
