"""Bouncing ball: impacts are events with a reset, and their times teach how elastic the ball is."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from aca_ext import Event, Solution, solve
from aca_ext.examples.result import Result

T = torch.linspace(0.0, 6.0, 300, dtype=torch.float64)


def fall(t: Tensor, y: Tensor, drag: Tensor) -> Tensor:
    """Height and speed of a ball in air."""
    _, speed = y.unbind()
    return torch.stack((speed, -9.81 - drag * speed * speed.abs()))


def throw(restitution: Tensor, drag: Tensor) -> Solution:
    """Drops the ball from ten metres; at each impact its speed is turned round and damped."""
    impact = Event(
        lambda t, y: y[0],  # height zero ...
        direction=-1,  # ... from above
        reset=lambda t, y: torch.stack((torch.zeros_like(y[0]), -restitution * y[1])),
    )
    start = torch.tensor([10.0, 0.0], dtype=torch.float64)
    return solve(fall, start, T, args=(drag,), events=[impact], rtol=1e-6, atol=1e-8)


def run(quick: bool = False) -> Result:
    """Finds restitution and drag from the times of the first three impacts."""
    torch.manual_seed(0)
    with torch.no_grad():
        truth = throw(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64))
        heard = truth.events[0].t[:3]
    unknown = torch.tensor([0.7, 0.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2 if quick else 6):  # Newton's method for least squares, with the Jacobian row by row
        flight = throw(*unknown)
        found = flight.events[0].t[:3]
        rows = [torch.autograd.grad(time, unknown, retain_graph=True)[0] for time in found]
        with torch.no_grad():
            unknown += torch.linalg.lstsq(torch.stack(rows), (heard - found)[:, None]).solution[:, 0]
    with torch.no_grad():
        flight = throw(*unknown)
    error = (flight.events[0].t[:3] - heard).abs().max().item()
    numbers = {"restitution": unknown[0].item(), "drag": unknown[1].item(), "error of the times": error}
    return Result(numbers, draw(truth, flight))


def draw(truth: Solution, flight: Solution) -> Figure:
    """Draws the height over time, with the impacts that were heard."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    with torch.no_grad():
        first = throw(torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    axes.plot(T, truth.y[:, 0], color="0.8", linewidth=5, label="true")
    axes.plot(T, first.y[:, 0], ":", label="first guess")
    axes.plot(T, flight.y[:, 0], label="found")
    heard = truth.events[0].t[:3]
    axes.plot(heard, torch.zeros_like(heard), "kv", label="impacts that were heard")
    axes.set(xlabel="t [s]", ylabel="height [m]")
    axes.legend()
    return figure
