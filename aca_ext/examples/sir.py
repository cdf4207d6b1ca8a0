"""Epidemic with a lockdown: contacts are a control from data, and steps end at its jumps."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from aca_ext import Interpolation, odeint
from aca_ext.examples.result import Result

DAYS = torch.arange(0.0, 121.0, 10.0, dtype=torch.float64)
T = torch.linspace(0.0, 120.0, 61, dtype=torch.float64)
Y0 = torch.tensor([0.999, 0.001, 0.0], dtype=torch.float64)  # susceptible, infected, recovered


def contacts(lockdown_day: int) -> Interpolation:
    """Contacts relative to normal: a lockdown of fifty days, then a slow return; constant for ten days each."""
    level = torch.ones_like(DAYS)
    level[(lockdown_day <= DAYS) & (lockdown_day + 50 > DAYS)] = 0.3
    level[lockdown_day + 50 <= DAYS] = 0.6
    return Interpolation(DAYS, level[:, None], kind="constant")


class Epidemic(nn.Module):
    """The SIR model. Infection and recovery are learnt by their logarithms, so that they stay positive."""

    def __init__(self, infection: float, recovery: float, control: Interpolation) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.tensor([infection, recovery], dtype=torch.float64).log())
        self.control = control

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        infection, recovery = self.log_rates.exp()
        s, i, _ = y.unbind()
        new, gone = infection * self.control.evaluate(t)[0] * s * i, recovery * i
        return torch.stack((-new, new - gone, gone))

    def course(self) -> Tensor:
        """States at the times T, (T, 3). The options make steps end where the contacts jump."""
        return odeint(self, Y0, T, rtol=1e-6, atol=1e-8, options=self.control.solver_options)


def run(quick: bool = False) -> Result:
    """Fits both rates to noisy cases; then asks how a lockdown ten days earlier would have gone."""
    torch.manual_seed(0)
    with torch.no_grad():
        truth = Epidemic(0.35, 0.1, contacts(30)).course()
    cases = truth[:, 1] * (1 + 0.1 * torch.randn(len(T), dtype=torch.float64))

    model = Epidemic(0.3, 0.15, contacts(30))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(5 if quick else 150):
        optimizer.zero_grad()
        loss = (model.course()[:, 1].log() - cases.log()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    infection, recovery = model.log_rates.detach().exp().tolist()
    with torch.no_grad():
        fitted = model.course()
        earlier = Epidemic(infection, recovery, contacts(20)).course()
    numbers = {
        "first loss": losses[0], "last loss": losses[-1], "infection": infection, "recovery": recovery,
        "peak": fitted[:, 1].max().item(), "peak, lockdown ten days earlier": earlier[:, 1].max().item(),
    }  # fmt: skip
    return Result(numbers, draw(cases, fitted, earlier))


def draw(cases: Tensor, fitted: Tensor, earlier: Tensor) -> Figure:
    """Draws the infected over time, above the contacts."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    infected, control = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    infected.plot(T, cases, ".", color="0.6", label="cases")
    infected.plot(T, fitted[:, 1], label="fit, lockdown on day 30")
    infected.plot(T, earlier[:, 1], "--", label="lockdown on day 20")
    infected.set(ylabel="infected", title="Epidemic with a lockdown")
    infected.legend()
    for day, style in ((30, "-"), (20, "--")):
        control.plot(T, contacts(day).evaluate(T)[:, 0], style, drawstyle="steps-post")
    control.set(xlabel="day", ylabel="contacts", ylim=(0, 1.1))
    return figure
