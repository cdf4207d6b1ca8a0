"""Three-body problem with known physics: every gradient finds the masses; at loose tolerances ACA's alone is right.

The orbits are seen for t in [0, 1] and predicted for t in [1, 2]. Masses, initial state, loss, Dopri5 at 1e-7 and the
schedule of Adam are those of the paper's code. An epoch is one gradient; L-BFGS with a line search needs far fewer. We
work in float64, with true orbits solved at 1e-12. The default fits 100 of the 1000 points, --full all. The measure is
the paper's in both: the sum over 1000 points. ``three_body_unknown`` is the part without physics.

With three unknown masses and a tolerance of 1e-7 all gradients find the same masses: the errors of adjoint and naive,
which the last table shows, are too small to matter.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import new_figure, torch_threads
from benchmarks.paper.common import Progress, Report, Settings, Table, bar, save_figure, three_gradients

K1, K2 = 0.20048437269236737, 7.2393238693203154
MASSES = (1.1, 1.1, 0.9)
POSITIONS = ((0.0, 0.2, 0.0), (0.5, 0.0, 0.5), (0.0, 0.0, 0.5))
VELOCITIES = ((0.0, 0.1, 0.0), (0.0, 0.0, 0.1), (0.1, 0.0, 0.0))
DECAY = 0.01  # factor by which the weight in the loss falls from t = 0 to t = 1

PAPER_SUM, PAPER_MASSES = 8.489e-5, "1.1000, 1.1000, 0.9000"
PER_UNIT = 1000  # points of the measured grid from t = 0 to t = 1


@dataclass(frozen=True)
class Size:
    n_points: int  # that a fit sees, in (0, end]
    end: float
    tolerance: float
    epochs: int  # largest number of gradients in a fit of the masses
    gradient_tolerances: tuple[float, ...]


QUICK = Size(10, 0.5, 1e-5, 9, (1e-3, 1e-6))
DEFAULT = Size(100, 1.0, 1e-7, 100, (1e-3, 1e-5, 1e-7, 1e-9))
FULL = Size(1000, 1.0, 1e-7, 100, (1e-3, 1e-5, 1e-7, 1e-9))


class Gravity(nn.Module):
    """ODE: r' = K2·v, v_i' = K1·Σ m_j (r_j - r_i) / |r_j - r_i|³, with unknown masses m."""

    def __init__(self, masses: Tensor) -> None:
        super().__init__()
        self.masses = nn.Parameter(masses.clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        r, v = y.view(2, 3, 3)
        apart = r.unsqueeze(0) - r.unsqueeze(1)
        squared = apart.square().sum(-1) + torch.eye(3, dtype=y.dtype, device=y.device)  # no body pulls itself
        pull = (self.masses[:, None] * apart * squared[..., None] ** -1.5).sum(1)
        return torch.stack([K2 * v, K1 * pull]).view(-1)


@dataclass
class Problem:
    """The orbits: the points that a fit sees, and the grid of 1000 points per unit of time that measures the fit."""

    size: Size
    device: torch.device
    y0: Tensor = field(init=False)
    t: Tensor = field(init=False)
    seen: Tensor = field(init=False)
    grid: Tensor = field(init=False)
    truth: Tensor = field(init=False)

    def __post_init__(self) -> None:
        like = {"dtype": torch.float64, "device": self.device}
        self.y0 = torch.tensor((POSITIONS, VELOCITIES), **like).flatten()
        self.t = torch.linspace(0, self.size.end, self.size.n_points + 1, **like)
        self.grid = torch.linspace(0, 2, 2 * PER_UNIT + 1, **like)
        solve = partial(positions, Gravity(torch.tensor(MASSES, **like)), self.y0, tolerance=1e-12)
        with torch.no_grad():
            self.seen, self.truth = solve(self.t), solve(self.grid)

    def loss(self, r: Tensor) -> Tensor:
        """The paper's loss: the mean over points of 0.01^t · Σ Δposition²."""
        return ((r - self.seen).square().sum(-1) * DECAY**self.t).mean()

    def masses_at_start(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (0.9 + 0.2 * torch.rand(3, dtype=torch.float64, generator=generator)).to(self.device)


def positions(f: nn.Module, y0: Tensor, t: Tensor, tolerance: float, gradient: str = "aca", **settings: Any) -> Tensor:
    how = {"rtol": tolerance, "atol": tolerance}
    if gradient == "torchdiffeq":
        from torchdiffeq import odeint_adjoint

        return odeint_adjoint(f, y0, t, **how)[:, :9]
    return aca_ext.odeint(f, y0, t, gradient=gradient, **how, **settings)[:, :9]


@torch_threads(1)  # more threads do not speed up operations this small
def run(settings: Settings) -> Report:
    size = settings.pick(QUICK, DEFAULT, FULL)
    problem = Problem(size, settings.device)
    fits: dict[tuple[str, str], Callable] = {}
    for name in (*three_gradients(), *_torchdiffeq()):
        fits["L-BFGS", name] = partial(fit_masses, name, lbfgs)
    for name in settings.pick((), ("aca",), three_gradients()):
        fits["Adam", name] = partial(fit_masses, name, adam)
    progress = Progress(settings, "three_body", {"size": vars(size), "fits": list(map(str, fits))})
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with bar(len(fits), "three_body") as ticks:
        for key, fit in fits.items():
            ticks.set_postfix_str(" ".join(key))
            result = progress.get(key)
            if result is None:
                torch.manual_seed(settings.seed)
                start = time.perf_counter()
                result = fit(problem, settings.seed)
                result["seconds"] = time.perf_counter() - start
                progress.put(key, result)
            found[key] = result
            ticks.update()
    errors = gradient_errors(problem, settings.seed)
    tables = [_masses_table(found, problem), _gradient_table(errors)]
    figure = _draw(settings, problem, found)
    progress.done()
    curves = [{"fit": " ".join(key), "losses": result["losses"]} for key, result in found.items()]
    values = {"size": vars(size), "curves": curves, "gradient_errors": errors}
    return Report("three_body", tables, [figure], values)


def fit_masses(gradient: str, minimize: Callable, problem: Problem, seed: int) -> dict[str, Any]:
    """Fits the masses. The result is the epoch with the least sum of squares, as in the paper's code."""
    f, size = Gravity(problem.masses_at_start(seed)), problem.size
    tried: list[Tensor] = []

    def loss() -> Tensor:
        tried.append(f.masses.detach().clone())
        return problem.loss(positions(f, problem.y0, problem.t, size.tolerance, gradient))

    losses = minimize(f, loss, size.epochs)
    unit = problem.grid[: PER_UNIT + 1]
    with torch.no_grad():
        sums = []
        for masses in tried:
            f.masses.copy_(masses)
            difference = positions(f, problem.y0, unit, size.tolerance) - problem.truth[: PER_UNIT + 1]
            sums.append(difference[1:].square().sum().item())
        best = min(range(len(sums)), key=sums.__getitem__)
        f.masses.copy_(tried[best])
        predicted = positions(f, problem.y0, problem.grid, size.tolerance)
    return {"losses": losses, "sums": sums, "best": best, "masses": tried[best].tolist(), "predicted": predicted.cpu()}


def lbfgs(f: nn.Module, loss: Callable[[], Tensor], n: int) -> list[float]:
    """At most ``n`` gradients; f keeps the best parameters. A solve that fails ends it. Returns all losses."""
    losses: list[float] = []
    best = {name: value.clone() for name, value in f.state_dict().items()}
    optimizer = torch.optim.LBFGS(
        f.parameters(),
        max_iter=n,
        max_eval=n,
        history_size=100,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        nonlocal best
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if not losses or value.item() < min(losses):
            best = {name: value.clone() for name, value in f.state_dict().items()}
        losses.append(value.item())
        return value

    with suppress(aca_ext.errors.SolveError):  # a trial of the line search drove two bodies into each other
        optimizer.step(closure)
    f.load_state_dict(best)
    return losses


def adam(f: nn.Module, loss: Callable[[], Tensor], epochs: int) -> list[float]:
    """Adam with the schedule of the paper's code."""
    optimizer = torch.optim.Adam(f.parameters(), lr=0.1 * 0.95, betas=(0.5, 0.5))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses


def gradient_errors(problem: Problem, seed: int) -> dict[str, list[float]]:
    """|dL/dm - direct| / |direct| at the initial masses, for each tolerance; direct is the exact discrete gradient."""
    f = Gravity(problem.masses_at_start(seed))

    def gradient(name: str, tolerance: float) -> Tensor:
        loss = problem.loss(positions(f, problem.y0, problem.t, tolerance, name))
        return torch.autograd.grad(loss, f.masses)[0]

    errors: dict[str, list[float]] = {"tolerance": [], **{name: [] for name in three_gradients()}}
    for tolerance in problem.size.gradient_tolerances:
        exact = gradient("direct", tolerance)
        errors["tolerance"].append(tolerance)
        for name in three_gradients():
            errors[name].append(((gradient(name, tolerance) - exact).norm() / exact.norm()).item())
    return errors


def _torchdiffeq() -> tuple[str, ...]:
    try:
        import torchdiffeq  # noqa: F401
    except ImportError:
        print("torchdiffeq is not installed: left out.")
        return ()
    return ("torchdiffeq",)


def _masses_table(found: dict, problem: Problem) -> Table:
    size, truth = problem.size, problem.truth.cpu()
    rows = [("paper's code: Adam", "aca", PAPER_SUM, "-", 84, PAPER_MASSES, None, "-")]
    for (optimizer, gradient), r in found.items():
        below = next((n + 1 for n, s in enumerate(r["sums"]) if s < PAPER_SUM), "never")
        masses = ", ".join(f"{m:.5f}" for m in r["masses"])
        future = (r["predicted"] - truth)[PER_UNIT + 1 :].square().mean().item()
        seconds = f"{r['seconds']:.0f}"
        rows.append((optimizer, gradient, r["sums"][r["best"]], below, r["best"] + 1, masses, future, seconds))
    columns = (
        "optimizer",
        "gradient",
        "sum of squares",
        "below 8.489e-5 at",
        "best epoch",
        "masses",
        "MSE of [1, 2]",
        "s",
    )
    return Table(
        "masses from the orbits of t in [0, 1]; true: 1.1, 1.1, 0.9",
        columns,
        rows,
        f"Sum over {PER_UNIT} points × 9 coordinates at the best epoch. An epoch is one gradient. torchdiffeq: its "
        f"adjoint. Fitted to {size.n_points} points of t in [0, {size.end:g}] at {size.tolerance:g}.",
    )


def _gradient_table(errors: dict[str, list[float]]) -> Table:
    return Table(
        "relative error of dL/dm against the discrete gradient, at the initial masses",
        ("gradient", *(f"tolerance {x:g}" for x in errors["tolerance"])),
        [(name, *(f"{x:.2g}" for x in errors[name])) for name in three_gradients()],
    )


def _draw(settings: Settings, problem: Problem, found: dict):
    figure = new_figure(13, 4.2)
    masses, errors = figure.subplots(1, 2)
    truth = problem.truth.cpu()
    for n, ((optimizer, gradient), r) in enumerate(found.items()):
        style = {"L-BFGS": "o", "Adam": ""}[optimizer] + ("-", "--", "-.", ":")[n % 4]
        look = {"color": f"C{n}", "label": f"{optimizer}, {gradient}"}
        epochs = range(1, len(r["sums"]) + 1)
        masses.semilogy(epochs, r["sums"], style, markersize=10 - 2 * n, fillstyle="none", **look)
        error = (r["predicted"] - truth).square().mean(-1).sqrt()
        errors.semilogy(problem.grid[1:].cpu(), error[1:].clamp(min=1e-12), style.strip("o"), **look)
    masses.axhline(PAPER_SUM, color="black", linestyle=":", label="paper, best")
    masses.set(xlabel="epoch", ylabel="sum of squares, t in [0, 1]", title="finding the masses")
    errors.axvline(1, color="black", linestyle=":")
    errors.set(xlabel="t", ylabel="RMS error of positions", title="seen until t = 1, predicted beyond")
    for axes in (masses, errors):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return save_figure(settings, figure, "three_body")
