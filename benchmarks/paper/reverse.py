"""Fig. 4 and 5: the adjoint's reverse solve leaves the forward trajectory, ACA's replay repeats it bit for bit.

The comparison is of the states that f receives in the backward pass, which ``Seen`` records. The van der Pol equation
and its tolerances are the paper's. Backward in time, its solutions outside the limit cycle go to infinity, and an
adjoint that strays there stops with an error. The picture's kernel is not published; here dy/dt = conv(y) is diffusion,
which no solver can reverse. The third part tests a consequence of the paper's theorem: a solve forward and back with
fixed steps of order p has an error of order p for odd p, and of order p + 1 for even p, where the leading terms cancel.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aca_ext
from benchmarks.harness import new_figure
from benchmarks.paper.common import Progress, Report, Settings, Table, bar, save_figure

TOLERANCES = {"rtol": 1e-3, "atol": 1e-6}  # ode45's defaults
GRADIENTS = ("aca", "adjoint", "naive", "direct")
ORDERS = {"midpoint": 2, "heun2": 2, "heun3": 3, "bosh3": 3, "rk4": 4, "rk4_classic": 4, "tsit5": 5, "dopri5": 5}
VAN_DER_POL_END, PICTURE_END, ROUND_TRIP_END = 20.0, 2.0, 2.0


class VanDerPol(nn.Module):
    """y1' = y2, y2' = (p - y1²)·y2 - y1."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.15, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y1, y2 = y.unbind(-1)
        return torch.stack((y2, (self.p - y1**2) * y2 - y1), -1)


class Diffusion(nn.Module):
    """dy/dt = conv(y): each color of a picture spreads to the four neighbours, periodic."""

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        self.kernel = nn.Parameter(kernel.repeat(3, 1, 1, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return F.conv2d(F.pad(y, (1, 1, 1, 1), mode="circular"), self.kernel, groups=3)


class Seen(nn.Module):
    """f that records every time and state that it receives."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f
        self.states: list[tuple[float, Tensor]] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.states.append((t.item(), y.detach().cpu().clone()))
        return self.f(t, y)

    def take(self) -> list[tuple[float, Tensor]]:
        taken, self.states = self.states, []
        return taken


def run(settings: Settings) -> Report:
    size, counts = settings.pick((32, (32, 64)), (128, (32, 64, 128, 256)), (384, (32, 64, 128, 256, 512)))
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, device=settings.device)
    picture = _picture(size).to(settings.device)
    progress = Progress(settings, "reverse", {"size": size, "counts": counts})
    units = {
        "van der Pol": lambda: _compare(VanDerPol().to(settings.device), y0, VAN_DER_POL_END),
        "picture": lambda: _compare(Diffusion().to(settings.device), picture, PICTURE_END),
        **{name: lambda name=name: _round_trip(name, y0, counts) for name in ORDERS},
    }
    found = {}
    with bar(len(units), "reverse") as ticks:
        for key, unit in units.items():
            found[key] = progress.get(key)
            if found[key] is None:
                found[key] = unit()
                progress.put(key, found[key])
            ticks.update()

    tables = [
        _table(f"van der Pol, y(0) = (2, 0), T = {VAN_DER_POL_END:g}, dopri5, 1e-3, 1e-6", y0, found["van der Pol"]),
        _table(
            f"picture of {size} x {size}, dy/dt = conv(y), T = {PICTURE_END:g}, same solver", picture, found["picture"]
        ),
        _order_table({name: found[name] for name in ORDERS}, counts),
    ]
    figures = [
        _draw_trajectories(settings, found["van der Pol"], y0, {name: found[name] for name in ORDERS}, counts),
        _draw_pictures(settings, found["picture"], picture.cpu()),
    ]
    progress.done()
    round_trips = {"steps": counts, "errors": {name: found[name] for name in ORDERS}}
    return Report("reverse", tables, figures, {"round trips": round_trips})


def _picture(size: int) -> Tensor:
    """A flower, (1, 3, size, size) in 0..1, bundled with scikit-learn."""
    from sklearn.datasets import load_sample_image

    flower = load_sample_image("flower.jpg")[:384, 128:512]
    pixels = torch.from_numpy(flower.copy()).to(torch.float64).permute(2, 0, 1)[None] / 255
    return F.avg_pool2d(pixels, 384 // size)


def _compare(f: nn.Module, y0: Tensor, end: float) -> dict:
    """Compares the states that f receives in each gradient method's backward pass with those of the forward pass."""
    seen = Seen(f)
    found = {}
    for gradient in GRADIENTS:
        start = y0.clone().requires_grad_()
        solution = aca_ext.solve(seen, start, (0.0, end), gradient=gradient, **TOLERANCES)
        forward = seen.take()
        try:
            grads = torch.autograd.grad((solution.y[-1] ** 2).sum(), (start, *f.parameters()))
        except aca_ext.errors.SolveError as error:
            grads, failed_at = None, error.t
        else:
            failed_at = None
        backward = seen.take()
        met = [y for t, y in backward if t == 0]  # the adjoint evaluates f there in the last stage of its last step
        known = {_bits(x) for x in forward}
        found[gradient] = {
            "evaluations": len(backward),
            "repeated": sum(_bits(x) in known for x in backward),
            "start": met[-1] if met else None,
            "end": solution.y[-1].detach().cpu(),
            "gradient": None if grads is None else torch.cat([g.flatten() for g in grads]).cpu(),
            "failed at": failed_at,
            "times": torch.tensor([t for t, _ in backward], dtype=torch.float64),
            "states": torch.stack([y for _, y in backward]) if backward and y0.numel() < 100 else None,
        }
    for name, odeint in _odeints().items():
        found[name] = {"start": _there_and_back(odeint, f, y0, end)}
    return found


def _bits(x: tuple[float, Tensor]) -> tuple[float, bytes]:
    return x[0], x[1].numpy().tobytes()


def _odeints() -> dict[str, Callable[..., Tensor]]:
    found = {"reverse solve": aca_ext.odeint}
    try:
        import torchdiffeq
    except ImportError:
        print("torchdiffeq is not installed: left out.")
    else:
        found["reverse solve, torchdiffeq"] = torchdiffeq.odeint
    return found


@torch.no_grad()
def _there_and_back(odeint: Callable[..., Tensor], f: nn.Module, y0: Tensor, end: float) -> Tensor | None:
    """y(0) by a solve backward in time from the solution's end; None if that solve fails."""
    times = torch.tensor([0.0, end], dtype=y0.dtype, device=y0.device)
    y_end = odeint(f, y0, times, **TOLERANCES)[-1]
    try:
        return odeint(f, y_end, times.flip(0), **TOLERANCES)[-1].cpu()
    except (aca_ext.errors.SolveError, AssertionError):  # torchdiffeq asserts that its step does not underflow
        return None


def _round_trip(method: str, y0: Tensor, counts: tuple[int, ...]) -> list[float]:
    """|y(0) recovered - y(0)| after n fixed steps forward and n back, for each n in ``counts``."""
    f, errors = VanDerPol().to(y0.device), []
    for n in counts:
        options = {"step_size": ROUND_TRIP_END / n}
        with torch.no_grad():
            there = aca_ext.odeint(f, y0, (0.0, ROUND_TRIP_END), method=method, options=options)[-1]
            back = aca_ext.odeint(f, there, (ROUND_TRIP_END, 0.0), method=method, options=options)[-1]
        errors.append((back - y0).norm().item())
    return errors


def _table(title: str, y0: Tensor, found: dict) -> Table:
    exact = found["direct"]["gradient"]
    y0, rows = y0.cpu(), []
    for name, r in found.items():
        off = None if r["start"] is None else (r["start"] - y0).abs().max().item()
        gradient = r.get("gradient")
        error = None if gradient is None else ((gradient - exact).norm() / exact.norm()).item()
        rows.append((name, r.get("evaluations"), r.get("repeated"), _met(r), off, error))
    columns = ("", "backward evaluations", "on forward states", "y(0) met", "off y(0)", "gradient error")
    note = (
        "On forward states: evaluations at a time and state of the forward pass, bitwise. y(0) met: the first two\n"
        "numbers of the state at t = 0 in the backward pass; off: its largest difference from y(0). Gradient error:\n"
        "relative to the discrete gradient. naive and direct do not evaluate f in the backward pass. Reverse solve:\n"
        "odeint forward, then back."
    )
    return Table(title, columns, rows, note)


def _met(r: dict) -> str:
    """Text of the first two numbers of the state at t = 0, or of the place where the solve stopped."""
    if r["start"] is not None:
        return ", ".join(f"{x:.4f}" for x in r["start"].flatten()[:2].tolist())
    if r.get("evaluations") == 0:
        return "-"
    return "stopped" if r.get("failed at") is None else f"stopped at t = {r['failed at']:.2f}"


def _order_table(errors: dict[str, list[float]], counts: tuple[int, ...]) -> Table:
    rows = []
    for name, p in ORDERS.items():
        slope = -np.polyfit(np.log(counts), np.log(errors[name]), 1)[0]
        stepwise = ", ".join(f"{math.log2(a / b):.2f}" for a, b in pairwise(errors[name]))
        rows.append((name, p, _predicted(p), f"{slope:.2f}", stepwise, errors[name][-1]))
    columns = ("", "order p", "predicted", "round trip's order", "from each halving", "smallest error")
    title = f"round trip on van der Pol, T = {ROUND_TRIP_END:g}, {counts[0]} to {counts[-1]} fixed steps"
    return Table(title, columns, rows, "Predicted: p for odd p, p + 1 for even p.")


def _predicted(p: int) -> int:
    return p + 1 if p % 2 == 0 else p


def _draw_trajectories(settings: Settings, found: dict, y0: Tensor, errors: dict, counts: tuple[int, ...]):
    figure = new_figure(11, 4.2)
    over_time, orders = figure.subplots(1, 2, width_ratios=(3, 2))
    t = torch.linspace(0, VAN_DER_POL_END, 400, dtype=torch.float64)
    f = VanDerPol().to(y0.device)
    with torch.no_grad():
        there = aca_ext.odeint(f, y0, t, **TOLERANCES)
        back = aca_ext.odeint(f, there[-1], t.flip(0), **TOLERANCES)
    over_time.plot(t.numpy(), there[:, 0].cpu().numpy(), color="black", label="forward solve")
    over_time.plot(t.flip(0).numpy(), back[:, 0].cpu().numpy(), "--", color="C2", label="reverse solve")
    # A step takes six evaluations. ACA's first is at the checkpoint. The adjoint's last is at the end of a step; its
    # first two choose the first step.
    for name, first, style in (("adjoint", 1, "C1x"), ("aca", 0, "C0.")):
        times, states = found[name]["times"][first::6], found[name]["states"][first::6]
        over_time.plot(times.numpy(), states[:, 0].numpy(), style, label=f"{name}: steps of the backward pass")
    over_time.set(xlabel="t", ylabel="y1", title="van der Pol", ylim=(-3, 5))
    over_time.legend(fontsize=8, ncols=2, loc="upper center")
    for i, (name, p) in enumerate(ORDERS.items()):
        label = f"{name}, p = {p}: order {_predicted(p)}"
        orders.loglog(counts, errors[name], "o-" if i % 2 else "s--", color=f"C{p}", markersize=4, label=label)
    orders.set(xlabel="steps", ylabel="|error of y(0)|", title="Round trip, fixed steps")
    orders.set_xticks(counts, list(map(str, counts)))
    orders.minorticks_off()
    orders.set_ylim(bottom=min(map(min, errors.values())) * 1e-5)
    orders.legend(fontsize=7, ncols=2, loc="lower center")
    for axes in (over_time, orders):
        axes.grid(alpha=0.3)
    return save_figure(settings, figure, "reverse")


def _draw_pictures(settings: Settings, found: dict, picture: Tensor):
    figure = new_figure(11, 3.2)
    shown = {
        "y(0)": picture,
        f"y({PICTURE_END:g}), forward": found["aca"]["end"],
        "y(0) as the adjoint meets it": found["adjoint"]["start"],
        "y(0) as ACA meets it": found["aca"]["start"],
    }
    for axes, (title, pixels) in zip(figure.subplots(1, 4), shown.items(), strict=True):
        axes.imshow(pixels[0].clamp(0, 1).permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return save_figure(settings, figure, "reverse_picture")
