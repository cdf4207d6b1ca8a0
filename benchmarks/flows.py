"""Training of a continuous normalizing flow: time of an iteration, and likelihood after equally many.

The setting of torchdiffeq's example of a flow: two circles, batches of 512 points, a network whose weights a second
network computes from the time, dopri5 at tolerance 1e-5, times from 0 (base) to 10 (data), Adam. All solvers start from
the same weights and see the same batches. One CPU thread; an iteration of each solver in turn; CPU time.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import aca_ext
from aca_ext import flows
from benchmarks.harness import Parts, Settings, Table, torch_threads

TIMES = (0.0, 10.0)
TOLERANCES = {"rtol": 1e-5, "atol": 1e-5}
COLUMNS = {
    "solver": ("solver", ""),
    "divergence": ("divergence", ""),
    "ms per iteration": ("ms", ".1f"),
    "/ torchdiffeq adjoint": ("ratio", ".2f"),
    "first iteration s": ("first_s", ".2f"),
    "loss before": ("before", ".3f"),
    "loss after": ("after", ".3f"),
}
BASELINE = "torchdiffeq odeint_adjoint"


class HyperNetwork(nn.Module):
    """Velocity (t, y): the mean of ``width`` neurons, whose weights another network computes from the time."""

    def __init__(self, width: int, hidden: int = 32, dim: int = 2) -> None:
        super().__init__()
        self.sizes = [width * dim, width * dim, width * dim, width]
        self.weights = nn.Sequential(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, sum(self.sizes))
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        inner, outer, gate, bias = self.weights(t.reshape(1)).split(self.sizes)
        dim = y.shape[-1]
        neurons = torch.tanh(y @ inner.view(dim, -1) + bias)  # (batch, width)
        return neurons @ (outer * torch.sigmoid(gate)).view(-1, dim) / len(bias)


class WithTrace(nn.Module):
    """The state (y, log-density), with the trace of the Jacobian by a reverse pass for each element of a sample."""

    def __init__(self, velocity: nn.Module) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = state[0].requires_grad_()
            k = self.velocity(t, y)
            rows = [torch.autograd.grad(k[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(y.shape[1])]
        return k, -torch.stack(rows).sum(0)


def circles(n: int, generator: torch.Generator) -> Tensor:
    """Points near circles of radius 1 and 1/2, (n, 2)."""
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    radius = torch.where(torch.arange(n) % 2 == 0, 1.0, 0.5)
    points = radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    return points + 0.06 * torch.randn(n, 2, generator=generator)


BASE = MultivariateNormal(torch.zeros(2), 0.1 * torch.eye(2))
LogProb = Callable[[Tensor], Tensor]


def by_hand(odeint: Callable[..., tuple[Tensor, ...]], velocity: nn.Module, **settings: object) -> LogProb:
    """The log-density by a solver of (y, log-density), with ``WithTrace``."""
    func = WithTrace(velocity)
    times = torch.tensor(TIMES).flip(0)

    def log_prob(x: Tensor) -> Tensor:
        y, change = odeint(func, (x, x.new_zeros(len(x))), times, method="dopri5", **TOLERANCES, **settings)
        return BASE.log_prob(y[-1]) - change[-1]

    return log_prob


def with_divergence(velocity: nn.Module, engine: str) -> LogProb:
    field = flows.with_divergence(velocity)

    def log_prob(x: Tensor) -> Tensor:
        found = flows.likelihood(field, x, TIMES, BASE, engine=engine, **TOLERANCES)
        _check_compiled(engine, found.stats)
        return found.log_prob

    return log_prob


def _own_odeint(*args: object, engine: str, **settings: object) -> tuple[Tensor, ...]:
    solution = aca_ext.solve(*args, engine=engine, **settings)
    _check_compiled(engine, solution.stats)
    return solution.y


def _check_compiled(engine: str, stats: aca_ext.Stats) -> None:
    """Raises if the compiled engine fell back to evaluations of func as it is, whose time would be that of eager."""
    if engine == "compiled" and stats.compiled != "solve":
        raise RuntimeError(f"not compiled: {stats.reason}")


def solvers() -> dict[tuple[str, str], Callable[[nn.Module], LogProb]]:
    """For each solver and way to the divergence a function that makes the log-density of a velocity."""
    found: dict[tuple[str, str], Callable[[nn.Module], LogProb]] = {}
    if find_spec("torchdiffeq") is not None:
        import torchdiffeq

        found[BASELINE, "by hand"] = lambda net: by_hand(torchdiffeq.odeint_adjoint, net)
        found["torchdiffeq odeint", "by hand"] = lambda net: by_hand(torchdiffeq.odeint, net)
    for engine in ("eager", "compiled"):
        name = f"aca_ext {engine}"
        found[name, "by hand"] = lambda net, engine=engine: by_hand(_own_odeint, net, engine=engine)
        found[name, "with_divergence"] = lambda net, engine=engine: with_divergence(net, engine)
    return found


class Training:
    """A flow in training, with the CPU time of each iteration."""

    def __init__(self, make: Callable[[nn.Module], LogProb], seed: int, width: int) -> None:
        torch.manual_seed(seed)
        velocity = HyperNetwork(width)
        self.log_prob = make(velocity)
        self._optimizer = torch.optim.Adam(velocity.parameters(), lr=3e-3)
        self._exact = with_divergence(velocity, "eager")  # measures every solver by the same one
        self.seconds: list[float] = []

    def iterate(self, x: Tensor) -> None:
        start = time.process_time()
        self._optimizer.zero_grad()
        (-self.log_prob(x).mean()).backward()
        self._optimizer.step()
        self.seconds.append(time.process_time() - start)

    def loss(self, x: Tensor) -> float:
        with torch.no_grad():
            return -self._exact(x).mean().item()


def run(settings: Settings) -> Parts:
    n_iterations, n, width, seeds = (2, 32, 8, (0,)) if settings.quick else (60, 512, 64, (0, 1))
    if find_spec("torchdiffeq") is None:
        yield "torchdiffeq is not installed, so it is left out."
    test = circles(2 * n, torch.Generator().manual_seed(1))
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    with torch_threads(1):
        for seed in seeds:
            trainings = {name: Training(make, seed, width) for name, make in solvers().items()}
            before = {name: training.loss(test) for name, training in trainings.items()}
            batches = torch.Generator().manual_seed(100 + seed)
            for _ in range(n_iterations):
                x = circles(n, batches)
                for training in trainings.values():
                    training.iterate(x.clone())
            for name, training in trainings.items():
                found = {"before": before[name], "after": training.loss(test), "first_s": training.seconds[0]}
                rows.setdefault(name, []).append({**found, **_times(training, trainings.get((BASELINE, "by hand")))})
    table = Table(f"{n_iterations} iterations with batches of {n}, means over {len(seeds)} seeds", COLUMNS)
    for (solver, divergence), of_seeds in rows.items():
        means = {key: fmean(row[key] for row in of_seeds) for key in of_seeds[0]}
        after = {f"after, seed {seed}": row["after"] for seed, row in zip(seeds, of_seeds, strict=True)}
        table.rows.append({"solver": solver, "divergence": divergence, **means, **after})
    yield table


def _times(training: Training, baseline: Training | None) -> dict[str, float]:
    """Median of an iteration, without the first, and the median of its ratios to the baseline's."""
    own = training.seconds[1:]
    times = {"ms": 1e3 * median(own)}
    if baseline is not None:
        times["ratio"] = median(a / b for a, b in zip(own, baseline.seconds[1:], strict=True))
    return times
