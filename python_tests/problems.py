"""Standard test problems with known end values: DETEST, orbits, oscillators and small networks.

Also small slopes, tensors and checks that several test files share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.numerics.methods import METHODS
from aca_ext.numerics.tableau import Tableau

LOOSE = {"rtol": 1e-3, "atol": 1e-4}
RUNGE_KUTTA = [name for name, method in METHODS.items() if type(method) is Tableau]  # explicit
REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("reference_values.json").read_text())


def numbers(values: list[str]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


@dataclass(frozen=True)
class KnownEnd:
    """An initial value problem from t = 0 whose state at ``t_end`` is known to quadruple precision."""

    name: str
    func: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, ...]

    @property
    def y0(self) -> Tensor:
        return torch.tensor(self.start, dtype=torch.float64)

    @property
    def times(self) -> Tensor:
        return torch.tensor([0.0, float(REFERENCE["end_values"][self.name]["t_end"])], dtype=torch.float64)

    @property
    def y_end(self) -> Tensor:
        return numbers(REFERENCE["end_values"][self.name]["y"])


class Exponential(nn.Module):
    """y' = k y, whose gradient is known: y(T) = y0 exp(kT)."""

    def __init__(self, k: float = 0.2) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([k], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.p * y


class LotkaVolterra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b, c, d = self.p.unbind()
        prey, predator = y.unbind()
        return torch.stack([a * prey - b * prey * predator, d * prey * predator - c * predator])


class VanDerPol(nn.Module):
    """y1' = y2, y2' = (p - y1²) y2 - y1, as in the ACA paper's code; with p = 1 the common form with mu = 1."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y1, y2 = y.unbind()
        return torch.stack([y2, (self.p[0] - y1 * y1) * y2 - y1])


class ThreeBody(nn.Module):
    """The ACA paper's three-body problem: 9 positions, then 9 velocities; the parameters are the masses."""

    K1, K2 = 0.20048437269236737, 7.2393238693203154
    START = (
        *(0.0, 0.2, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.5),
        *(0.0, 0.1, 0.0, 0.0, 0.0, 0.1, 0.1, 0.0, 0.0),
    )

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.1, 1.1, 0.9], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        r, v = y[:9].view(3, 3), y[9:].view(3, 3)
        apart = r.unsqueeze(0) - r.unsqueeze(1)
        cubed = (apart.square().sum(-1) + torch.eye(3, dtype=y.dtype)).pow(1.5)
        pull = (self.p.unsqueeze(-1) * apart / cubed.unsqueeze(-1)).sum(1)
        return torch.cat([(self.K2 * v).reshape(-1), (self.K1 * pull).reshape(-1)])


def arenstorf(t: Tensor, y: Tensor) -> Tensor:
    mu = 0.012277471
    x1, x2, v1, v2 = y.unbind()
    d1, d2 = ((x1 + mu).square() + x2 * x2).pow(1.5), ((x1 - 1 + mu).square() + x2 * x2).pow(1.5)
    a1 = x1 + 2 * v2 - (1 - mu) * (x1 + mu) / d1 - mu * (x1 - 1 + mu) / d2
    a2 = x2 - 2 * v1 - (1 - mu) * x2 / d1 - mu * x2 / d2
    return torch.stack([v1, v2, a1, a2])


def brusselator(t: Tensor, y: Tensor) -> Tensor:
    y1, y2 = y.unbind()
    return torch.stack([1 + y1 * y1 * y2 - 4 * y1, 3 * y1 - y1 * y1 * y2])


def _b1(t: Tensor, y: Tensor) -> Tensor:
    y1, y2 = y.unbind()
    return torch.stack([2 * (y1 - y1 * y2), y1 * y2 - y2])


def _b2(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, y3 = y.unbind()
    return torch.stack([y2 - y1, y1 - 2 * y2 + y3, y2 - y3])


def _b3(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, _ = y.unbind()
    return torch.stack([-y1, y1 - y2 * y2, y2 * y2])


def _b4(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, y3 = y.unbind()
    r = (y1 * y1 + y2 * y2).sqrt()
    return torch.stack([-y2 - y1 * y3 / r, y1 - y2 * y3 / r, y1 / r])


def _b5(t: Tensor, y: Tensor) -> Tensor:
    y1, y2, y3 = y.unbind()
    return torch.stack([y2 * y3, -y1 * y3, -0.51 * y1 * y2])


def _e1(t: Tensor, y: Tensor) -> Tensor:
    y1, y2 = y.unbind()
    return torch.stack([y2, -(y2 / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y1)])


def _e2(t: Tensor, y: Tensor) -> Tensor:
    y1, y2 = y.unbind()
    return torch.stack([y2, (1 - y1 * y1) * y2 - y1])


def _e3(t: Tensor, y: Tensor) -> Tensor:
    y1, y2 = y.unbind()
    return torch.stack([y2, y1**3 / 6 - y1 + 2 * torch.sin(2.78535 * t)])


def _e4(t: Tensor, y: Tensor) -> Tensor:
    _, y2 = y.unbind()
    return torch.stack([y2, 0.032 - 0.4 * y2 * y2])


def _e5(t: Tensor, y: Tensor) -> Tensor:
    _, y2 = y.unbind()
    return torch.stack([y2, (1 + y2 * y2).sqrt() / (25 - t)])


# DETEST: Hull, Enright, Fellen & Sedgwick, SIAM J. Numer. Anal. 9 (1972), classes A, B and E.
KNOWN_ENDS = {
    problem.name: problem
    for problem in (
        KnownEnd("A1", lambda t, y: -y, (1.0,)),
        KnownEnd("A2", lambda t, y: -(y**3) / 2, (1.0,)),
        KnownEnd("A3", lambda t, y: y * torch.cos(t), (1.0,)),
        KnownEnd("A4", lambda t, y: y / 4 * (1 - y / 20), (1.0,)),
        KnownEnd("A5", lambda t, y: (y - t) / (y + t), (4.0,)),
        KnownEnd("B1", _b1, (1.0, 3.0)),
        KnownEnd("B2", _b2, (2.0, 0.0, 1.0)),
        KnownEnd("B3", _b3, (1.0, 0.0, 0.0)),
        KnownEnd("B4", _b4, (3.0, 0.0, 0.0)),
        KnownEnd("B5", _b5, (0.0, 1.0, 1.0)),
        KnownEnd("E1", _e1, (0.671396707141803, 0.0954005144474744)),
        KnownEnd("E2", _e2, (2.0, 0.0)),
        KnownEnd("E3", _e3, (0.0, 0.0)),
        KnownEnd("E4", _e4, (30.0, 0.0)),
        KnownEnd("E5", _e5, (0.0, 0.0)),
        KnownEnd("brusselator", brusselator, (1.5, 3.0)),
        KnownEnd("van_der_pol", VanDerPol(1.0), (2.0, 0.0)),
        KnownEnd("lotka_volterra", LotkaVolterra(), (1.0, 1.0)),
        KnownEnd("arenstorf", arenstorf, (0.994, 0.0, 0.0, -2.00158510637908252240537862224)),
        KnownEnd("three_body", ThreeBody(), ThreeBody.START),
    )
}


@dataclass(frozen=True)
class KnownGradient:
    """A problem whose loss at the end has a gradient known to quadruple precision; the parameter is ``func.p``."""

    name: str
    make: Callable[[], nn.Module]
    start: tuple[float, ...]
    t_end: float
    count: int  # the loss is the sum of squares of this many components

    @property
    def y0(self) -> Tensor:
        return torch.tensor(self.start, dtype=torch.float64, requires_grad=True)

    @property
    def times(self) -> Tensor:
        return torch.tensor([0.0, self.t_end], dtype=torch.float64)

    def expected(self, what: str) -> Tensor:
        value = REFERENCE["gradients"][self.name][what]
        return numbers(value if isinstance(value, list) else [value])


KNOWN_GRADIENTS = {
    problem.name: problem
    for problem in (
        KnownGradient("exponential", Exponential, (1.0,), 10.0, 1),
        KnownGradient("lotka_volterra", LotkaVolterra, (1.0, 1.0), 10.0, 2),
        KnownGradient("van_der_pol", lambda: VanDerPol(0.15), (2.0, 0.0), 20.0, 2),
        KnownGradient("three_body", ThreeBody, ThreeBody.START, 1.0, 9),
    )
}


class Mlp(nn.Module):
    """A small smooth network as slope, with values of moderate size; equal arguments give equal weights."""

    def __init__(self, width: int = 3, hidden: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)).to(dtype)
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(p.shape[-1]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class DrivenMlp(Mlp):
    """A network that also depends on time and on two arguments, a vector and a number."""

    def forward(self, t: Tensor, y: Tensor, drive: Tensor, rate: Tensor) -> Tensor:
        return self.net(y + drive) * torch.cos(2 * t) - rate * y * t


class CoupledMlp(Mlp):
    """A network on a tuple state of a matrix and a vector that act on each other."""

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        matrix, vector = y
        return self.net(matrix) * torch.cos(t) + vector, matrix.mean(0) - vector * t


def sample(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64; equal arguments give equal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def oscillate(t: Tensor, y: Tensor) -> Tensor:
    """Harmonic oscillator, whose solution is a rotation by the angle t."""
    return torch.stack([y[1], -y[0]])


def rotated(t: float) -> Tensor:
    return torch.tensor([math.cos(t), -math.sin(t)], dtype=torch.float64)


def check_chain(steps: Tensor, t: Tensor) -> None:
    """Asserts that steps lead from the first time to the last without gaps, all in one direction."""
    assert steps.dtype == torch.float64
    assert steps.device.type == "cpu"
    assert steps[0, 0] == t[0]
    assert steps[-1, 1] == t[-1]
    assert torch.equal(steps[1:, 0], steps[:-1, 1])
    assert ((steps[:, 1] - steps[:, 0]) * torch.sign(t[-1] - t[0]) > 0).all()


def leaf(*shape: int, seed: int = 1) -> Tensor:
    return sample(*shape, seed=seed).requires_grad_()
