"""Table 1: growth of computation, memory and depth of the autograd graph with layers, steps, and trials per step.

N_f layers in f, N_t accepted steps, N_r steps of the reverse solve, m trials per step, s evaluations per trial (6 with
Dopri5). Each number is varied alone. An exponent is fitted on logarithmic axes, and another to the paper's formula at
the same points. ``Trials``, a norm that decides which trials are accepted, sets N_t and m.

Computation is the number of passes through a layer: forward and, for the gradient, backward. ACA and the adjoint also
evaluate f in the backward pass. Memory is the peak of tensors allocated in both passes. Depth is the longest chain of
autograd nodes. For naive and direct it is that of the whole graph. ACA and the adjoint keep the graph of one step or
one evaluation at a time; there, it is the sum over all evaluations in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import aca_ext
from aca_ext.tensor_memory import TensorMemory
from benchmarks.harness import new_figure
from benchmarks.paper.common import Progress, Report, Settings, Table, bar, save_figure

S = 6
H = 0.01  # length of an accepted step
MEASURES = ("forward", "backward", "memory", "depth")
FORMULAS: dict[str, dict[str, Callable[[int, int, float], float]]] = {
    "aca": {
        "forward": lambda n_f, n_t, m: n_f * n_t * m,
        "backward": lambda n_f, n_t, m: n_f * n_t,
        "memory": lambda n_f, n_t, m: S * n_f + n_t,
        "depth": lambda n_f, n_t, m: n_f * n_t,
    },
    "direct": {
        "forward": lambda n_f, n_t, m: n_f * n_t * m,
        "backward": lambda n_f, n_t, m: n_f * n_t,
        "memory": lambda n_f, n_t, m: n_f * n_t,
        "depth": lambda n_f, n_t, m: n_f * n_t,
    },
    "adjoint": {  # with N_r = N_t and m trials per step in the reverse solve too
        "forward": lambda n_f, n_t, m: n_f * n_t * m,
        "backward": lambda n_f, n_t, m: n_f * n_t * m,
        "memory": lambda n_f, n_t, m: n_f,
        "depth": lambda n_f, n_t, m: n_f * n_t,
    },
    "naive": dict.fromkeys(MEASURES, lambda n_f, n_t, m: n_f * n_t * m),
}


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement."""

    n_f: int
    n_t: int
    m: int


class Layers(nn.Module):
    """f: n_f layers tanh(w·y), which counts passes and depths. A wide state makes activations dominate the memory."""

    def __init__(self, n_f: int, device: torch.device) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(n_f, dtype=torch.float64, device=device))
        self.forward_passes = self.backward_passes = self.depth = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        given = y
        for w in self.w.unbind():
            y = torch.tanh(w * y)
            self.forward_passes += 1
            if y.requires_grad:
                y.register_hook(self._count)
        if given.is_leaf and y.requires_grad:
            self.depth += depth_of(y)  # a separate autograd graph: a replay by ACA or an evaluation by the adjoint
        return y

    def _count(self, grad: Tensor) -> None:
        self.backward_passes += 1


class Trials:
    """Error norm that accepts every m-th trial, with steps of length H, and the last of n_t steps at once."""

    def __init__(self, n_t: int, m: int, differentiable: bool = False) -> None:
        self.regular, self.m, self.n, self.differentiable = m * (n_t - 1), m, 0, differentiable
        rejected = 2.0
        shrinkage = 0.9 * rejected ** (-1 / 5)
        accepted = (0.9 * shrinkage ** (m - 1)) ** 5  # the next step grows by the factor that rejections shrank it
        self.sizes = (accepted, rejected)
        self.first_step = H / shrinkage ** (m - 1)
        self.end = H * (n_t - 1) + 0.99 * self.first_step

    def __call__(self, error: Tensor | tuple[Tensor, ...]) -> Tensor:
        first = error if isinstance(error, Tensor) else error[0]
        if not self.differentiable:
            first = first.detach()
        size = first.pow(2).mean().sqrt() + 1e-300
        self.n += 1
        is_rejected = self.n <= self.regular and self.n % self.m != 0
        return size / size.detach() * self.sizes[is_rejected]


def run(settings: Settings) -> Report:
    # Checkpoints are allocated in blocks of 32 states of this width; N_t + 1 states fill whole blocks.
    n_f, n_t, m = settings.pick(
        ((2, 4, 8), (31, 63), (1, 2)),
        ((4, 8, 16, 32), (31, 63, 127), (1, 2, 3, 4)),
        ((4, 8, 16, 32, 64, 128), (31, 63, 127, 255, 511), (1, 2, 3, 4, 5)),
    )
    middle = settings.pick(Point(2, 31, 1), Point(8, 31, 2), Point(8, 31, 2))
    width = 4096
    sweeps = {
        "N_f": [Point(n, middle.n_t, middle.m) for n in n_f],
        "N_t": [Point(middle.n_f, n, middle.m) for n in n_t],
        "m": [Point(middle.n_f, middle.n_t, n) for n in m],
    }
    points = dict.fromkeys([middle, *(point for sweep in sweeps.values() for point in sweep)])
    progress = Progress(settings, "cost", {"points": list(map(str, points)), "width": width})
    found: dict[tuple[str, Point], dict[str, float]] = {}
    with bar(len(FORMULAS) * len(points), "cost") as ticks:
        for point in points:
            for gradient in FORMULAS:
                costs = progress.get((gradient, point))
                if costs is None:
                    costs = _measure(gradient, point, width, settings.device)
                    progress.put((gradient, point), costs)
                found[gradient, point] = costs
                ticks.update()
    tables = [_costs(found, middle), *(_exponents(found, name, sweep) for name, sweep in sweeps.items())]
    figure = _draw(settings, found, sweeps)
    progress.done()
    measured = [{"gradient": gradient, **vars(point), **costs} for (gradient, point), costs in found.items()]
    return Report("cost", tables, [figure], {"width": width, "measured": measured})


def _measure(gradient: str, point: Point, width: int, device: torch.device) -> dict[str, float]:
    f = Layers(point.n_f, device)
    y0 = torch.linspace(0.5, 1.0, width, dtype=torch.float64, device=device).requires_grad_()
    trials = Trials(point.n_t, point.m, differentiable=gradient == "naive")
    reverse_trials = Trials(point.n_t, point.m)

    with TensorMemory() as memory:
        solution = aca_ext.solve(
            f, y0, (0.0, trials.end), gradient=gradient,
            options={"norm": trials, "first_step": trials.first_step},
            adjoint_options={"norm": reverse_trials, "first_step": reverse_trials.first_step},
        )  # fmt: skip
        loss = solution.y[-1].sum()
        forward_passes = f.forward_passes
        whole = depth_of(loss) if gradient in ("naive", "direct") else 0
        torch.autograd.grad(loss, (y0, f.w))
    return {
        "accepted": solution.stats.n_accepted,
        "trials": solution.stats.n_steps,
        "forward": forward_passes,
        "replayed": f.forward_passes - forward_passes,
        "backward": f.backward_passes,
        "memory": memory.peak / (y0.numel() * y0.element_size()),
        "depth": whole or f.depth,
    }


def depth_of(y: Tensor) -> int:
    """Number of autograd nodes on the longest path from ``y`` to a leaf."""
    depths: dict[Any, int] = {}
    stack = [y.grad_fn]
    while stack:
        node = stack[-1]
        below = [child for child, _ in node.next_functions if child is not None]
        waiting = [child for child in below if child not in depths]
        if waiting:
            stack.extend(waiting)
        else:
            depths[stack.pop()] = 1 + max((depths[child] for child in below), default=0)
    return depths[y.grad_fn]


def _costs(found: dict[tuple[str, Point], dict[str, float]], point: Point) -> Table:
    columns = ("", "forward passes", "evaluated again", "backward passes", "peak memory / state", "graph depth")
    rows = []
    for gradient in FORMULAS:
        costs = found[gradient, point]
        counts = (costs["forward"], costs["replayed"], costs["backward"])
        rows.append((gradient, *counts, f"{costs['memory']:.0f}", costs["depth"]))
    return Table(f"costs of one gradient at N_f = {point.n_f}, N_t = {point.n_t}, m = {point.m}", columns, rows)


def _exponents(found: dict[tuple[str, Point], dict[str, float]], name: str, sweep: list[Point]) -> Table:
    """Measured exponents, each followed by that of the paper's formula at the same points."""
    sizes = [getattr(point, name.lower()) for point in sweep]
    rows = []
    for gradient, formulas in FORMULAS.items():
        row = [gradient]
        for measure in MEASURES:
            costs = [found[gradient, point] for point in sweep]
            formula = [formulas[measure](p.n_f, c["accepted"], c["trials"] / c["accepted"])
                       for p, c in zip(sweep, costs, strict=True)]  # fmt: skip
            row += [_slope(sizes, [c[measure] for c in costs]), _slope(sizes, formula)]
        rows.append(tuple(row))
    columns = [""] + [x for measure in MEASURES for x in (measure, "paper")]
    note = (
        "The solver's own states and autograd nodes do not grow with N_f, so that the exponents of memory and depth "
        "are below the formula's.\nThe adjoint's depth includes the graphs of rejected trials, the formula's does not."
    )
    return Table(f"exponents of {name} = {', '.join(map(str, sizes))}", tuple(columns), rows, note)


def _slope(sizes: list[int], costs: list[float]) -> float:
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 2) + 0.0  # no -0.0


def _draw(settings: Settings, found: dict[tuple[str, Point], dict[str, float]], sweeps: dict[str, list[Point]]):
    figure = new_figure(12, 8)
    grid = figure.subplots(len(sweeps), len(MEASURES), sharex="row", sharey="col")
    titles = ("layer passes, forward", "layer passes, backward", "peak memory / state", "graph depth")
    for axes_row, (name, sweep) in zip(grid, sweeps.items(), strict=True):
        sizes = [getattr(point, name.lower()) for point in sweep]
        for axes, measure in zip(axes_row, MEASURES, strict=True):
            for gradient, style in zip(FORMULAS, ("o-", "s--", "^-", "v:"), strict=True):
                axes.loglog(sizes, [found[gradient, point][measure] for point in sweep], style, label=gradient)
            axes.set_xticks(sizes, list(map(str, sizes)))
            axes.minorticks_off()
            axes.set_xlabel(name)
            axes.grid(alpha=0.3)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    grid[0][0].legend()
    return save_figure(settings, figure, "cost")
