"""Three-body problem: with the physics known, ACA finds the masses and the future; NODE and LSTM only fit the past.

The orbits are seen for t in [0, 1] and predicted for t in [1, 2]. Masses, initial state, loss, Dopri5 at 1e-7 and the
schedule of Adam are those of the paper's code. An epoch is one gradient; L-BFGS with a line search needs far fewer. We
work in float64, with true orbits solved at 1e-12. The default fits 100 of the 1000 points, --full all. The measure is
the paper's in both: the sum over 1000 points. We do not have the paper's MSE of LSTM and NODE, so the table shows none.

With three unknown masses and a tolerance of 1e-7 all gradients find the same masses: the errors of adjoint and naive,
which the last table shows, are too small to matter. Beyond t = 1 the orbits are sensitive to any error, so that chance
decides which NODE is best there.
"""

import math
import time
from collections.abc import Callable
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
PAIRS = ((0, 0, 1), (1, 2, 2))
DECAY = 0.01  # factor by which the weight in the loss falls from t = 0 to t = 1

PAPER_SUM, PAPER_MASSES = 8.489e-5, "1.1000, 1.1000, 0.9000"
NODE_TOLERANCE, NODE_STEPS = 1e-5, 20_000
PER_UNIT = 1000  # points of the measured grid from t = 0 to t = 1


@dataclass(frozen=True)
class Size:
    n_points: int  # that a fit sees, in (0, end]
    end: float
    tolerance: float
    epochs: int  # largest number of gradients in a fit of the masses
    node_epochs: int
    lstm_epochs: int
    hidden: int
    gradient_tolerances: tuple[float, ...]


QUICK = Size(10, 0.5, 1e-5, 9, 3, 5, 8, (1e-3, 1e-6))
DEFAULT = Size(100, 1.0, 1e-7, 100, 150, 400, 50, (1e-3, 1e-5, 1e-7, 1e-9))
FULL = Size(1000, 1.0, 1e-7, 100, 1000, 4000, 100, (1e-3, 1e-5, 1e-7, 1e-9))


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


class NODE(nn.Module):
    """NODE: r' = K2·v, v' = a network of the augmented positions."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.force = nn.Sequential(nn.Linear(45, hidden), nn.Tanh(), nn.Linear(hidden, 9))
        nn.init.normal_(self.force[-1].weight, std=0.01)
        nn.init.zeros_(self.force[-1].bias)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([K2 * y[9:], self.force(augmented(y[:9]))])


class LSTM(nn.Module):
    """LSTM: the next displacement from the positions so far; with ``augment`` its inputs are those of NODE."""

    def __init__(self, hidden: int, augment: bool) -> None:
        super().__init__()
        self.augment = augment
        self.cell = nn.LSTM(45 if augment else 9, hidden)
        self.displacement = nn.Linear(hidden, 9)

    def forward(self, r: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        out, memory = self.cell(augmented(r) if self.augment else r, memory)
        return r + self.displacement(out) / 100, memory


def augmented(r: Tensor) -> Tensor:
    """Positions (..., 9) and, for each pair, d = r_j - r_i, d/|d|, d/|d|² and d/|d|³: (..., 45)."""
    r = r.unflatten(-1, (3, 3))
    d = r[..., PAIRS[1], :] - r[..., PAIRS[0], :]
    n = d.norm(dim=-1, keepdim=True)
    return torch.cat([r, d, d / n, d / n**2, d / n**3], -2).flatten(-2)


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


def positions(f: nn.Module, y0: Tensor, t: Tensor, tolerance: float, gradient: str = "aca", **options: Any) -> Tensor:
    how = {"rtol": tolerance, "atol": tolerance}
    if gradient == "torchdiffeq":
        from torchdiffeq import odeint_adjoint

        return odeint_adjoint(f, y0, t, **how)[:, :9]
    return aca_ext.odeint(f, y0, t, gradient=gradient, options=options, **how)[:, :9]


@torch_threads(1)  # more threads do not speed up operations this small
def run(settings: Settings) -> Report:
    size = settings.pick(QUICK, DEFAULT, FULL)
    problem = Problem(size, settings.device)
    fits: dict[tuple[str, str, str], Callable] = {}
    for name in (*three_gradients(), *_torchdiffeq()):
        fits["ODE", "L-BFGS", name] = partial(fit_masses, name, lbfgs)
    for name in settings.pick((), ("aca",), three_gradients()):
        fits["ODE", "Adam", name] = partial(fit_masses, name, adam)
    for name in three_gradients():
        fits["NODE", "Adam", name] = partial(fit_node, name)
    fits["LSTM", "Adam", "-"] = partial(fit_lstm, False)
    fits["LSTM, augmented", "Adam", "-"] = partial(fit_lstm, True)
    progress = Progress(settings, "three_body", {"size": vars(size), "fits": list(map(str, fits))})
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
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
    tables = [_masses_table(found, size), _prediction_table(found, problem), _gradient_table(errors)]
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


def lbfgs(f: nn.Module, loss: Callable[[], Tensor], epochs: int) -> list[float]:
    losses: list[float] = []
    optimizer = torch.optim.LBFGS(
        f.parameters(),
        max_iter=epochs,
        max_eval=epochs,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        return value

    optimizer.step(closure)
    return losses


def adam(f: nn.Module, loss: Callable[[], Tensor], epochs: int) -> list[float]:
    """Adam with the schedule of the paper's code."""
    optimizer = torch.optim.Adam(f.parameters(), lr=0.1 * 0.95, betas=(0.5, 0.5))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    return [_step(f, loss, optimizer, schedule) for _ in range(epochs)]


def adam_for_networks(f: nn.Module, loss: Callable[[], Tensor], epochs: int) -> list[float]:
    optimizer = torch.optim.Adam(f.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    return [_step(f, loss, optimizer, schedule, largest=1.0) for _ in range(epochs)]


def _step(f: nn.Module, loss: Callable[[], Tensor], optimizer: Any, schedule: Any, largest: float = math.inf) -> float:
    optimizer.zero_grad()
    value = loss()
    value.backward()
    nn.utils.clip_grad_norm_(f.parameters(), largest)
    optimizer.step()
    schedule.step()
    return value.item()


def fit_node(gradient: str, problem: Problem, seed: int) -> dict[str, Any]:
    f = NODE(problem.size.hidden).to(problem.y0)
    solve = partial(positions, f, problem.y0, tolerance=NODE_TOLERANCE, gradient=gradient)
    losses = adam_for_networks(f, lambda: problem.loss(solve(problem.t)), problem.size.node_epochs)
    with torch.no_grad():
        try:
            predicted = solve(problem.grid, max_num_steps=NODE_STEPS)
        except aca_ext.errors.SolveError:  # beyond its training, the network may drive two bodies into each other
            predicted = torch.full_like(problem.truth, torch.nan)
    return {"losses": losses, "predicted": predicted.cpu()}


def fit_lstm(augment: bool, problem: Problem, seed: int) -> dict[str, Any]:
    """Trains to predict the next of the seen points; then predicts the rest from its own predictions."""
    f = LSTM(problem.size.hidden, augment).to(problem.y0)
    seen = problem.seen
    losses = adam_for_networks(
        f, lambda: (f(seen[:-1])[0] - seen[1:]).square().sum(-1).mean(), problem.size.lstm_epochs
    )
    with torch.no_grad():
        shown, memory = f(seen[:-1])
        r, path = seen[-1:], [seen[:1], shown]
        step = problem.size.end / problem.size.n_points
        for _ in range(round((2 - problem.size.end) / step)):
            r, memory = f(r, memory)
            path.append(r)
    at = torch.cat(path)
    return {"losses": losses, "predicted": _between(at, len(problem.grid)).cpu()}


def _between(path: Tensor, n: int) -> Tensor:
    """Linear interpolation of ``path`` at ``n`` points; both are equally spaced over the same time."""
    return nn.functional.interpolate(path.T[None], n, mode="linear", align_corners=True)[0].T


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


def _masses_table(found: dict, size: Size) -> Table:
    rows = [("ODE, paper's code", "Adam", "aca", PAPER_SUM, "-", 84, PAPER_MASSES, "-")]
    for (model, optimizer, gradient), r in found.items():
        if model == "ODE":
            below = next((n + 1 for n, s in enumerate(r["sums"]) if s < PAPER_SUM), "never")
            masses = ", ".join(f"{m:.5f}" for m in r["masses"])
            rows.append(
                (model, optimizer, gradient, r["sums"][r["best"]], below, r["best"] + 1, masses, f"{r['seconds']:.0f}")
            )
    return Table(
        "masses from the orbits of t in [0, 1]; true: 1.1, 1.1, 0.9",
        ("", "optimizer", "gradient", "sum of squares", "below 8.489e-5 at", "best epoch", "masses", "s"),
        rows,
        f"Sum over {PER_UNIT} points × 9 coordinates at the best epoch. An epoch is one gradient. torchdiffeq: its "
        f"adjoint. Fitted to {size.n_points} points of t in [0, {size.end:g}] at {size.tolerance:g}.",
    )


def _prediction_table(found: dict, problem: Problem) -> Table:
    truth = problem.truth.cpu()
    rows = []
    for (model, optimizer, gradient), r in found.items():
        squared = (r["predicted"] - truth).square().mean(-1)
        parts = squared[1 : PER_UNIT + 1], squared[PER_UNIT + 1 :], squared[1:]
        mses = [None if part.isnan().any() else f"{part.mean().item():.3g}" for part in parts]
        rows.append((model, optimizer, gradient, *mses, f"{r['seconds']:.0f}"))
    return Table(
        "MSE of the predicted positions",
        ("", "optimizer", "gradient", "seen, t in [0, 1]", "future, t in [1, 2]", "[0, 2]", "s"),
        rows,
        "While LSTM is shown the orbits, it predicts one point ahead; then it continues from its own predictions.",
    )


def _gradient_table(errors: dict[str, list[float]]) -> Table:
    return Table(
        "relative error of dL/dm against the discrete gradient, at the initial masses",
        ("gradient", *(f"tolerance {x:g}" for x in errors["tolerance"])),
        [(name, *(f"{x:.2g}" for x in errors[name])) for name in three_gradients()],
    )


def _draw(settings: Settings, problem: Problem, found: dict):
    figure = new_figure(13, 9)
    above, below = figure.subfigures(2, 1, height_ratios=(5, 4))
    truth = problem.truth.cpu()
    shown = {"ODE, ACA": ("ODE", "L-BFGS", "aca"), "NODE, ACA": ("NODE", "Adam", "aca")}
    shown["LSTM, augmented"] = ("LSTM, augmented", "Adam", "-")
    low, high = truth.reshape(-1, 3).amin(0), truth.reshape(-1, 3).amax(0)
    box = torch.stack([low, high], 1)
    panels = above.subplots(1, 3, subplot_kw={"projection": "3d"})
    for axes, (name, key) in zip(panels, shown.items(), strict=True):
        axes.set(title=name, **{f"{axis}lim": limits for axis, limits in zip("xyz", box.tolist(), strict=True)})
        axes.tick_params(labelsize=7)
        axes.set_box_aspect(None, zoom=0.85)
        for body in range(3):
            where = slice(3 * body, 3 * body + 3)
            axes.plot(*truth[:, where].T.numpy(), color=f"C{body}", linewidth=3, alpha=0.3)
            predicted = found[key]["predicted"][:, where].clone()
            predicted[((predicted < low) | (predicted > high)).any(-1)] = torch.nan  # 3D axes do not clip
            axes.plot(*predicted[: PER_UNIT + 1].T.numpy(), color=f"C{body}", linewidth=1)
            axes.plot(*predicted[PER_UNIT:].T.numpy(), color=f"C{body}", linewidth=1, linestyle="--")
    above.suptitle("thick: true; thin: model, seen until t = 1; dashed: predicted until t = 2; only inside the box")
    masses, errors = below.subplots(1, 2)
    for n, ((model, optimizer, gradient), r) in enumerate(found.items()):
        if model == "ODE":
            style = {"L-BFGS": "o", "Adam": ""}[optimizer] + ("-", "--", "-.", ":")[n % 4]
            epochs = range(1, len(r["sums"]) + 1)
            label = f"{optimizer}, {gradient}"
            masses.semilogy(
                epochs, r["sums"], style, color=f"C{n}", markersize=10 - 2 * n, label=label, fillstyle="none"
            )
    masses.axhline(PAPER_SUM, color="black", linestyle=":", label="paper, best")
    masses.set(xlabel="epoch", ylabel="sum of squares, t in [0, 1]", title="ODE: finding the masses")
    for name, key in shown.items():
        error = (found[key]["predicted"] - truth).square().mean(-1).sqrt()
        errors.semilogy(problem.grid[1:].cpu(), error[1:].clamp(min=1e-12), label=name)
    errors.axvline(1, color="black", linestyle=":")
    errors.set(xlabel="t", ylabel="RMS error of positions", title="seen until t = 1, predicted beyond")
    for axes in (masses, errors):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return save_figure(settings, figure, "three_body")
