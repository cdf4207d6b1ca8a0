"""Models of the three-body problem without physics, NODE and LSTM, and their training on the orbits of t in [0, 1]."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.paper.common import MissingError
from benchmarks.paper.three_body import K2, MASSES, PER_UNIT, POSITIONS, VELOCITIES, Gravity, lbfgs, positions

PAIRS = ((0, 0, 1), (1, 2, 2))
STRIDE = 10  # every tenth seen point is in the loss of a solve, and in one sequence of the LSTM
WINDOWS = (0.25, 0.5, 0.75, 1.0)
MOST_STEPS = 20_000  # of a prediction: an untrained future may drive two bodies into each other


@dataclass(frozen=True)
class Size:
    hidden: int
    adam: int  # gradients of each part of a training
    lbfgs: int
    solves: int  # for each window
    tolerance: float
    seeds: int
    engine: str


class Orbits:
    """The true orbits on a grid of 1000 points per unit of time; models see those of [0, 1]."""

    def __init__(self, device: torch.device) -> None:
        like = {"dtype": torch.float64, "device": device}
        self.y0 = torch.tensor((POSITIONS, VELOCITIES), **like).flatten()
        self.t = torch.linspace(0, 2, 2 * PER_UNIT + 1, **like)
        with torch.no_grad():
            self.r = positions(Gravity(torch.tensor(MASSES, **like)), self.y0, self.t, tolerance=1e-12)
        self.seen = self.r[: PER_UNIT + 1]

    def accelerations(self) -> Tensor:
        """dv/dt at the seen points, from a spline of degree 7 through them."""
        try:
            from scipy.interpolate import make_interp_spline
        except ImportError as missing:
            raise MissingError("The spline needs SciPy: pip install '.[paper]' in the repository's root.") from missing
        t = self.t[: PER_UNIT + 1].cpu().numpy()
        second = make_interp_spline(t, self.seen.cpu().numpy(), k=7).derivative(2)
        return torch.from_numpy(second(t)).to(self.seen) / K2


class NODE(nn.Module):
    """r' = K2·v, v' = a network of the augmented positions, which are standardized; without a hidden layer, linear."""

    mean: Tensor
    std: Tensor

    def __init__(self, seen: Tensor, hidden: int) -> None:
        super().__init__()
        inputs = augmented(seen)
        self.register_buffer("mean", inputs.mean(0))
        self.register_buffer("std", inputs.std(0))
        n = inputs.shape[-1]
        self.net = nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, 9)) if hidden else nn.Linear(n, 9)

    def force(self, r: Tensor) -> Tensor:
        return self.net((augmented(r) - self.mean) / self.std)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([K2 * y[9:], self.force(y[:9])])


class LSTM(nn.Module):
    """The next displacement from the positions so far; with ``augment`` its inputs are those of NODE."""

    def __init__(self, hidden: int, augment: bool) -> None:
        super().__init__()
        self.augment = augment
        self.cell = nn.LSTM(45 if augment else 9, hidden)
        self.displacement = nn.Linear(hidden, 9)

    def forward(self, r: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        out, memory = self.cell(augmented(r) if self.augment else r, memory)
        return r + self.displacement(out) / 10, memory


def augmented(r: Tensor) -> Tensor:
    """Positions (..., 9) and, for each pair, d = r_j - r_i, d/|d|, d/|d|² and d/|d|³: (..., 45)."""
    r = r.unflatten(-1, (3, 3))
    d = r[..., PAIRS[1], :] - r[..., PAIRS[0], :]
    n = d.norm(dim=-1, keepdim=True)
    return torch.cat([r, d, d / n, d / n**2, d / n**3], -2).flatten(-2)


def fit_node(gradient: str, hidden: bool, orbits: Orbits, size: Size) -> tuple[Tensor, list[float]]:
    """Predicted positions on the grid, NaN if the solve fails, and the loss over [0, 1] by gradient."""
    f = NODE(orbits.seen, size.hidden if hidden else 0).to(orbits.seen)
    target = orbits.accelerations()
    scale = target.std()

    def misfit() -> Tensor:
        return ((f.force(orbits.seen) - target) / scale).square().mean()

    def error_of_solve(end: float) -> Tensor:
        upto = slice(0, round(end * PER_UNIT) + 1, STRIDE)
        r = positions(f, orbits.y0, orbits.t[upto], size.tolerance, gradient, engine=size.engine)
        return (r - orbits.r[upto]).square().mean()

    adam(f, misfit, size.adam)
    lbfgs(f, misfit, size.lbfgs)
    losses = [lbfgs(f, partial(error_of_solve, end), size.solves) for end in WINDOWS][-1]
    with torch.no_grad():
        try:
            predicted = positions(f, orbits.y0, orbits.t, size.tolerance, options={"max_num_steps": MOST_STEPS})
        except aca_ext.errors.SolveError:
            predicted = torch.full_like(orbits.r, torch.nan)
    return predicted, losses


def fit_lstm(augment: bool, orbits: Orbits, size: Size) -> tuple[Tensor, list[float]]:
    """Trains to predict the next of the seen points; then predicts the rest from its own predictions."""
    f = LSTM(size.hidden, augment).to(orbits.seen)
    before, after = sequences(orbits.seen[:-STRIDE]), sequences(orbits.seen[STRIDE:])

    def misfit() -> Tensor:
        return (f(before)[0] - after).square().mean()

    adam(f, misfit, size.adam)
    losses = lbfgs(f, misfit, size.lbfgs + len(WINDOWS) * size.solves)
    with torch.no_grad():
        every = orbits.seen[::STRIDE]
        shown, memory = f(every[:-1, None])
        path = [every[:1, None], shown]
        r = every[-1:, None]
        for _ in range(PER_UNIT // STRIDE):
            r, memory = f(r, memory)
            path.append(r)
    coarse = torch.cat(path)[:, 0].T[None]
    return nn.functional.interpolate(coarse, len(orbits.r), mode="linear", align_corners=True)[0].T, losses


def sequences(r: Tensor) -> Tensor:
    """The (n, 9) points as ten interleaved sequences: (n / 10, 10, 9)."""
    n = len(r) // STRIDE
    return r[: n * STRIDE].unflatten(0, (n, STRIDE))


def adam(f: nn.Module, loss: Callable[[], Tensor], n: int) -> None:
    optimizer = torch.optim.Adam(f.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n)
    for _ in range(n):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
