"""The timed problems: W1 to W3, small networks; W4, a large state."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import Settings


@dataclass(frozen=True)
class Problem:
    """dy/dt = func(t, y) from y0 at t = 0 to t_end with rtol = atol = tol."""

    func: nn.Module
    y0: Tensor
    t_end: float
    tol: float

    @property
    def time(self) -> Tensor:
        """Time 0 in the form in which f receives it."""
        return self.y0.new_zeros(())

    def gradient(self, y_end: Tensor) -> tuple[Tensor, ...]:
        """The gradient of sum(y_end) with respect to y0 and the parameters."""
        return torch.autograd.grad(y_end.sum(), [self.y0, *self.func.parameters()])


@dataclass(frozen=True)
class Workload:
    """A named problem, in any dtype and on any device."""

    name: str
    t_end: float
    tol: float

    def func(self) -> nn.Module:
        raise NotImplementedError

    def y0(self) -> Tensor:
        raise NotImplementedError

    def problem(self, dtype: torch.dtype, device: str, tol: float | None = None) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            func, y0 = self.func().to(device, dtype), self.y0().to(device, dtype)
        return Problem(func, y0.requires_grad_(), self.t_end, self.tol if tol is None else tol)


@dataclass(frozen=True)
class Network(Workload):
    """f is Linear, Softplus, Linear, Tanh, without t; y0 standard normal."""

    width: int
    hidden: int
    batch: int

    def func(self) -> nn.Module:
        layers = nn.Linear(self.width, self.hidden), nn.Softplus(), nn.Linear(self.hidden, self.width), nn.Tanh()
        return WithoutTime(nn.Sequential(*layers))

    def y0(self) -> Tensor:
        return torch.randn(self.batch, self.width)


@dataclass(frozen=True)
class Decay(Workload):
    """f = -y on one row of standard normal elements."""

    elements: int

    def func(self) -> nn.Module:
        return WithoutTime(Negation())

    def y0(self) -> Tensor:
        return torch.randn(1, self.elements)


class WithoutTime(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class Negation(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return -y


W1 = Network("W1 MLP 4-32-4, batch 64", t_end=100.0, tol=1e-6, width=4, hidden=32, batch=64)
W2 = Network("W2 MLP 64-128-64, batch 128", t_end=20.0, tol=1e-6, width=64, hidden=128, batch=128)
W3 = Network("W3 MLP 2-50-2, batch 1", t_end=25.0, tol=1e-6, width=2, hidden=50, batch=1)
W4 = Decay("W4 f = -y", t_end=1.0, tol=1e-6, elements=1 << 22)


def networks(settings: Settings) -> list[Network]:
    """W1 to W3; for a quick run only W1, over a tenth of its time span."""
    return [replace(W1, t_end=W1.t_end / 10)] if settings.quick else [W1, W2, W3]


@cache
def reference(workload: Workload) -> tuple[Tensor, Tensor]:
    """The end state and the gradient, flat, float64 on the CPU, from dopri8 at tolerance 1e-12."""
    problem = workload.problem(torch.float64, "cpu", tol=1e-12)
    t = torch.tensor([0.0, problem.t_end], dtype=torch.float64)
    y = aca_ext.odeint(problem.func, problem.y0, t, rtol=1e-12, atol=1e-12, method="dopri8", gradient="direct")[-1]
    return y.detach().flatten(), flat(problem.gradient(y))


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.detach().cpu().double().flatten() for x in tensors])


def relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())
