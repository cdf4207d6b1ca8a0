"""Models of the experiments on the hopper, and their training, which can be saved midway and continued."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.paper.hopper_data import N_DIMS, WINDOW, Batch, shown_points, times

TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}
NOISE = 1e-3  # standard deviation of an observation, in the ELBO
LEARNING_RATE, LR_DECAY = 0.01, 0.999  # decays to a tenth


@dataclass(frozen=True)
class Size:
    n_rollouts: int  # four fifths of them for training
    iterations: int
    batch: int
    loss_points: int  # number of the 100 points in the loss of an iteration
    latent: int
    units: int  # of each layer of f
    layers: int
    recurrent: int  # units of the encoder and of the RNNs


class Model(nn.Module):
    """Base of the models; its networks work on states standardized by the training set's mean and deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, train: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", train.mean((0, 1)))
        self.register_buffer("std", train.std((0, 1)))

    def standardized(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def restored(self, x: Tensor) -> Tensor:
        return self.mean + self.std * x


class Slope(nn.Module):
    """dz/dt = net(z), an attribute of its model, so that what the solver caches for it serves every solve."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        widths = [size.latent, *[size.units] * (size.layers + 1), size.latent]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.net = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z)


class LatentODE(Model):
    """z(0) ~ N(mean, std²) from a GRU that reads the shown points backwards; z' = f(z); the state is linear in z.

    Attributes:
        stats: counts of the last solve.
    """

    stats: Any = None

    def __init__(self, train: Tensor, size: Size, gradient: str, engine: str = "eager") -> None:
        super().__init__(train)
        self.gradient, self.engine = gradient, engine
        self.read = nn.GRU(N_DIMS + 1, size.recurrent)
        self.start = nn.Sequential(nn.Linear(size.recurrent, 50), nn.Tanh(), nn.Linear(50, 2 * size.latent))
        self.f = Slope(size)
        self.decode = nn.Linear(size.latent, N_DIMS)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = self.standardized(batch.x).gather(1, batch.shown[..., None].expand(-1, -1, N_DIMS))
        gaps = times(batch.shown.diff(dim=1, prepend=torch.zeros_like(batch.shown[:, :1])))
        _, h = self.read(torch.cat([x, gaps[..., None]], -1).transpose(0, 1).flip(0))
        mean, std = self.start(h[0]).chunk(2, -1)
        return mean, std.abs()

    def decoded(self, z0: Tensor, points: Tensor) -> Tensor:
        """States (n, len(points), 14) at the increasing indices ``points``; z0 is at the point before index 0."""
        t = times(torch.cat([points.new_tensor([-1]), points]))
        solution = aca_ext.solve(self.f, z0, t, gradient=self.gradient, engine=self.engine, **TOLERANCES)
        self.stats = solution.stats
        return self.restored(self.decode(solution.y[1:])).transpose(0, 1)

    def loss(self, batch: Batch, points: Tensor, noise: Tensor) -> Tensor:
        """The ELBO with Gaussian observations, in units of the squared error."""
        mean, std = self.encode(batch)
        error = (self.decoded(mean + std * noise, points) - batch.x[:, points]).square().mean()
        divergence = 0.5 * (mean.square() + std.square() - 1) - (std + 1e-8).log()
        return error + 2 * NOISE**2 * divergence.mean()

    def forward(self, batch: Batch) -> Tensor:
        return self.decoded(self.encode(batch)[0], torch.arange(WINDOW, device=batch.x.device))


class Recurrent(Model):
    """Predicts each point from those before it, and reads its own prediction at points that are not shown."""

    def __init__(self, train: Tensor, size: Size, cell: Callable[[int, int], nn.RNNCellBase]) -> None:
        super().__init__(train)
        self.size = size
        self.cell = cell(N_DIMS + 1, size.recurrent)
        self.decode = nn.Sequential(nn.Linear(size.recurrent, size.units), nn.Tanh(), nn.Linear(size.units, N_DIMS))

    def forward(self, batch: Batch) -> Tensor:
        is_shown = torch.zeros_like(batch.x[..., :1]).scatter(1, batch.shown[..., None], 1.0)
        h, predictions = batch.x.new_zeros(len(batch.x), self.size.recurrent), []
        for x, seen in zip(self.standardized(batch.x).unbind(1), is_shown.unbind(1), strict=True):
            predictions.append(self.decode(h))
            h = self.cell(torch.cat([seen * x + (1 - seen) * predictions[-1], seen], -1), h)
        return self.restored(torch.stack(predictions, 1))

    def loss(self, batch: Batch, points: Tensor, noise: Tensor) -> Tensor:
        return (self(batch) - batch.x)[:, points].square().mean()


class Training:
    """A model with its optimizer and its stream of random batches, which can be saved midway.

    Attributes:
        losses: one float per iteration.
        seconds, cpu_seconds: sums over all iterations, by the wall's clock and by the process's.
        evaluations: of f, forward and backward, in all iterations; 0 for a model without f.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        train: Tensor,
        size: Size,
        percent: int,
        seed: int,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ) -> None:
        torch.manual_seed(seed)
        self.model = build().to(train.device)
        self.optimizer = optimizer(self.model.parameters())
        self.random = torch.Generator().manual_seed(seed)
        self.train, self.size, self.percent = train, size, percent
        self.losses: list[float] = []
        self.seconds = self.cpu_seconds = 0.0
        self.evaluations = 0

    def step(self) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        size, device = self.size, self.train.device
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * max(LR_DECAY ** len(self.losses), 0.1)
        which = torch.randint(len(self.train), (size.batch,), generator=self.random)
        shown = shown_points(size.batch, self.percent, self.random)
        points = torch.randperm(WINDOW, generator=self.random)[: size.loss_points].sort().values
        noise = torch.randn(size.batch, size.latent, generator=self.random)
        self.optimizer.zero_grad()
        batch = Batch(self.train[which.to(device)], shown.to(device))
        loss = self.model.loss(batch, points.to(device), noise.to(device))
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        if isinstance(self.model, LatentODE):
            self.evaluations += self.model.stats.n_f_evals + (self.model.stats.n_f_evals_backward or 0)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "losses": self.losses,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "evaluations": self.evaluations,
        }

    def continue_from(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.cpu_seconds, self.evaluations = state["cpu_seconds"], state["evaluations"]
