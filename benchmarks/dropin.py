"""Time of the calls that torchdiffeq's examples make, by ``aca_ext.torchdiffeq`` and by torchdiffeq.

One CPU thread; small models of the same shapes, at the tolerances of the examples. Each call includes its backward pass
where the example has one: of ``odeint``, whose gradients are exact in both libraries, and of ``odeint_adjoint``.
``ratio`` is the median over the rounds of the time of aca_ext over that of torchdiffeq in the same round; ``f`` counts
the evaluations of func, replays and the adjoint's solve included. ``apart`` is the largest relative distance between
results or gradients of the two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext.torchdiffeq
from benchmarks.harness import Parts, Settings, Table, interleave
from benchmarks.workloads import relative_error

COLUMNS = {
    "call": ("call", ""),
    "function": ("function", ""),
    "aca_ext ms": ("ours_ms", ".2f"),
    "torchdiffeq ms": ("theirs_ms", ".2f"),
    "ratio": ("ratio", ".2f"),
    "aca_ext f": ("ours_f", "d"),
    "torchdiffeq f": ("theirs_f", "d"),
    "apart": ("apart", ".0e"),
}
INTERFACES = ("odeint", "odeint_adjoint")
EXACT = ("odeint",)
BOUNCES, OBSERVED = 3, 50


@dataclass(frozen=True)
class Call:
    """A call of an example.

    Attributes:
        func: the module that is solved.
        solve: the results of (torchdiffeq or its drop-in, the name of the function).
        interfaces: the functions that the example may use.
        wanted: tensors whose gradients the example takes, besides the parameters of ``func``; None for no gradients.
    """

    name: str
    func: nn.Module
    solve: Callable[[Any, str], list[Tensor]]
    interfaces: tuple[str, ...] = INTERFACES
    wanted: tuple[Tensor, ...] | None = ()

    def run(self, of: Any, interface: str) -> list[Tensor]:
        """The results, and the gradients of the sum of their squares."""
        if self.wanted is None:
            with torch.no_grad():
                return self.solve(of, interface)
        found = self.solve(of, interface)
        loss = torch.stack([x.square().sum() for x in found]).sum()
        inputs = [*self.wanted, *self.func.parameters()]
        return [*found, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


def run(settings: Settings) -> Parts:
    try:
        import torchdiffeq
    except ImportError:
        yield "Nothing is compared: torchdiffeq cannot be imported."
        return
    table = Table("Calls of torchdiffeq's examples", COLUMNS)
    for call in _calls(settings):
        for interface in call.interfaces:
            table.rows.append(_measure(call, interface, torchdiffeq, settings))
    yield table


def _measure(call: Call, interface: str, theirs: Any, settings: Settings) -> dict[str, Any]:
    libraries = {"ours": aca_ext.torchdiffeq, "theirs": theirs}
    results, evaluations = {}, {}
    for name, of in libraries.items():
        counts: list[None] = []
        handle = call.func.register_forward_hook(lambda *_, counts=counts: counts.append(None))
        results[name], evaluations[f"{name}_f"] = call.run(of, interface), len(counts)
        handle.remove()
    timings = interleave({name: partial(call.run, of, interface) for name, of in libraries.items()}, settings)
    apart = max(relative_error(x, y) for x, y in zip(*results.values(), strict=True))
    times = {f"{name}_ms": 1e3 * timings.median(name) for name in libraries}
    row = {"call": call.name, "function": interface, **times, "ratio": timings.ratio("ours", "theirs")}
    return {**row, **evaluations, "apart": apart}


def _calls(settings: Settings) -> list[Call]:
    torch.manual_seed(0)
    trajectories, length, images = (50, 0.1, 2) if settings.quick else (1000, 10.0, 16)
    return [*_demo(), _latent(trajectories), _flow(length), _ball(), _contact(), _images(images)]


class Spiral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for x in self.parameters():
            nn.init.normal_(x, std=0.1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y**3)


def _demo() -> list[Call]:
    """ode_demo: training on short pieces, and a test over all times."""
    func, t = Spiral(), torch.linspace(0, 25, 1000)
    batch, start = torch.randn(20, 1, 2), torch.tensor([[2.0, 0.0]])
    return [
        Call("demo, training", func, lambda of, how: [getattr(of, how)(func, batch, t[:10])]),
        Call("demo, test", func, lambda of, how: [getattr(of, how)(func, start, t)], wanted=None),
    ]


class Latent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 20), nn.ELU(), nn.Linear(20, 20), nn.ELU(), nn.Linear(20, 4))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def _latent(n: int) -> Call:
    """latent_ode: many trajectories at 100 times."""
    func, z0, t = Latent(), torch.randn(n, 4, requires_grad=True), torch.linspace(0, 2, 100)
    return Call("latent ODE", func, lambda of, how: [getattr(of, how)(func, z0, t)], wanted=(z0,))


class Flow(nn.Module):
    """A velocity whose weights are functions of time, and minus its divergence by autograd."""

    def __init__(self, width: int = 64, hidden: int = 32) -> None:
        super().__init__()
        self.width = width
        self.weights = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 7 * width))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            w, u, gate, b = self.weights(t.reshape(1, 1)).view(self.width, 7).split((2, 2, 2, 1), dim=1)
            hidden = torch.tanh(z @ w.T + b.T)
            dz = hidden @ (u * torch.sigmoid(gate)) / self.width
            parts = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return dz, -(parts[0] + parts[1])[:, None]


def _flow(length: float) -> Call:
    """cnf: densities by a flow backward in time."""
    func, t = Flow(), torch.tensor([length, 0.0])
    start, how = (torch.randn(512, 2), torch.zeros(512, 1)), {"rtol": 1e-5, "atol": 1e-5, "method": "dopri5"}
    return Call("flow", func, lambda of, name: [x[-1] for x in getattr(of, name)(func, start, t, **how)])


class Falling(nn.Module):
    """A ball above a floor, which is a part of the state so that torchdiffeq's gradients reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.gravity, self.floor = (nn.Parameter(torch.tensor([x])) for x in (9.8, 0.2))
        self.height, self.speed = (nn.Parameter(torch.tensor([x])) for x in (10.0, 0.0))

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state[1], -self.gravity, torch.zeros_like(state[2])

    def event(self, t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return state[0] - state[2]

    def start(self) -> tuple[Tensor, ...]:
        return self.height, self.speed, self.floor

    def reset(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state[0] + 1e-7, -0.8 * state[1], state[2]


TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def _ball() -> Call:
    """bouncing_ball: one solve for each bounce, float64 as in the tests of the example."""
    ball = Falling().double()

    def bounces(of: Any, name: str) -> list[Tensor]:
        state, t, found = ball.start(), torch.zeros(1, dtype=torch.float64), []
        for _ in range(BOUNCES):
            how = {"event_fn": ball.event, "odeint_interface": getattr(of, name), **TIGHT}
            t, ys = of.odeint_event(ball, state, t, **how)
            state = ball.reset(tuple(y[-1] for y in ys))
            found.append(t.reshape(1))
        return found

    return Call("bouncing ball", ball, bounces)


def _contact() -> Call:
    """learn_physics: a trajectory at given times between events, each interval solved again."""
    ball, times = Falling().double(), torch.linspace(0, 4, OBSERVED, dtype=torch.float64)

    def event(t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return torch.zeros_like(t) if t > times[-1] else ball.event(t, state)

    def trajectory(of: Any, name: str) -> list[Tensor]:
        state, t, found = ball.start(), torch.zeros((), dtype=torch.float64), []
        while t < times[-1]:
            end, ys = of.odeint_event(ball, state, t, event_fn=event, method="dopri5", **TIGHT)
            inside = times[(times > t) & (times <= end)]
            found.append(of.odeint(ball, state, torch.cat([t.reshape(1), inside]), **TIGHT)[0][1:])
            state, t = ball.reset(tuple(y[-1] for y in ys)), end
        return found

    return Call("learnt physics", ball, trajectory, EXACT)


class Block(nn.Module):
    """Two convolutions that see the time as a further channel, with normalisation."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels + 1, channels, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            y = torch.relu(norm(y))
            y = convolution(torch.cat([t.expand_as(y[:, :1]), y], 1))
        return self.norms[2](y)


def _images(n: int) -> Call:
    """odenet_mnist: one block of a network for images."""
    func, x, t = Block(), torch.randn(n, 64, 6, 6, requires_grad=True), torch.tensor([0.0, 1.0])
    how = {"rtol": 1e-3, "atol": 1e-3}
    return Call("images", func, lambda of, name: [getattr(of, name)(func, x, t, **how)[1]], wanted=(x,))
