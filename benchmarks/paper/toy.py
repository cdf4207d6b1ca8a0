"""Fig. 6: on dy/dt = k·y with L = y(T)², ACA's gradient is exact for the discrete solution, the adjoint's is not.

The exact values are dL/dy0 = 2·y0·e^(2kT) and dL/dk = 2·T·y0²·e^(2kT). The paper gives neither y0, k, the tolerance nor
its step-size control; y0 = 1, k = 0.2, Dopri5 and 1e-4 come nearest to its ACA row. ACA's error against the exact value
is the discretization error of the forward solve. It changes by tens of percent with the constants of the step-size
control, so two controls are shown. Unlike in the paper, the adjoint's dL/dy0 is nearer to the exact value than ACA's;
``CAPTION`` says why. Its dL/dk is the worst of the three. The methods differ clearly in the error against the gradient
of the discrete solution, y(T) = y0·Π P(k·h_n) with P the stability polynomial of the method.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

import aca_ext
from benchmarks.harness import new_figure
from benchmarks.paper.common import Progress, Report, Settings, Table, bar, save_figure, three_gradients

K, TOLERANCE = 0.2, 1e-4
CAPTION = (
    "Why a gradient that is exact for the discrete solution may lie farther from the continuous one: the forward solve "
    "ends at e^(kT)·(1 + ε). The gradient of its square has the relative error (1 + ε)² - 1, ε once from y(T) and "
    "once from dy(T)/dy0. The adjoint takes y(T), with its ε, but solves for dy(T)/dy0 anew, backward in time with "
    "other steps and another error δ: (1 + ε)·(1 + δ) - 1. Here both solve the same linear equation, and where "
    "|δ| < |ε| the adjoint is nearer. That is no merit of its gradient: an optimizer lowers the "
    "discrete loss, of which ACA's is the gradient."
)
Gradients = tuple[float, float, Tensor | None]  # dL/dy0, dL/dk, bounds of the accepted steps or None if unknown
Solve = Callable[[Tensor, Tensor, float], Gradients]  # of y0, k and T

PAPER_T = (12.0, 14.0, 16.0, 18.0, 19.5)
PAPER = {  # |error of dL/dy0|, read off the figure
    "aca": (0.012, 0.035, 0.09, 0.23, 0.485),
    "adjoint": (0.02, 0.04, 0.125, 0.37, 0.80),
    "naive": (0.025, 0.055, 0.145, 0.41, 0.97),
}
CONTROLS = {"default": {}, "ifactor 2": {"ifactor": 2.0}}


def run(settings: Settings) -> Report:
    times = sorted({*PAPER_T, *torch.linspace(12, 19.5, settings.pick(4, 61, 301), dtype=torch.float64).tolist()})
    solvers = {(name, control): _ours(name, CONTROLS[control]) for control in CONTROLS for name in three_gradients()}
    solvers |= _torchdiffeq()
    progress = Progress(settings, "toy", {"times": times, "solvers": list(map(str, solvers))})
    found = {solver: [] for solver in solvers}
    with bar(len(solvers) * len(times), "toy") as ticks:
        for solver, solve in solvers.items():
            row = progress.get(solver)
            if row is None:
                row = [_errors(solve, end, settings.device) for end in times]
                progress.put(solver, row)
            found[solver] = row
            ticks.update(len(times))

    at_paper_times = [times.index(end) for end in PAPER_T]
    paper = [("paper", name, "?", *PAPER[name]) for name in three_gradients()]
    tables = [
        _table(
            "|error of dL/dy0|, exact value 2·e^(2kT)",
            found,
            0,
            at_paper_times,
            paper,
            _beside_paper(found, at_paper_times),
        ),
        _parts(found, at_paper_times),
        _table("|error of dL/dk|, exact value 2·T·e^(2kT)", found, 1, at_paper_times, []),
        _table("relative error of dL/dy0 against the discrete gradient", found, 2, at_paper_times, []),
        _table("relative error of dL/dk against the discrete gradient", found, 3, at_paper_times, []),
    ]
    figure = _draw(settings, times, found)
    progress.done()
    errors = [{"solver": " ".join(solver), "T": times, "errors": rows} for solver, rows in found.items()]
    return Report("toy", tables, [figure], {"k": K, "tolerance": TOLERANCE, "errors": errors})


def _ours(gradient: str, options: dict[str, float]) -> Solve:
    def solve(y0: Tensor, k: Tensor, end: float) -> Gradients:
        solution = aca_ext.solve(
            lambda t, y: k * y, y0, (0.0, end), rtol=TOLERANCE, atol=TOLERANCE, gradient=gradient, options=options
        )
        grad_y0, grad_k = torch.autograd.grad(solution.y[-1] ** 2, (y0, k))
        return grad_y0.item(), grad_k.item(), solution.steps

    return solve


def _torchdiffeq() -> dict[tuple[str, str], Solve]:
    try:
        import torchdiffeq
    except ImportError:
        print("torchdiffeq is not installed: left out.")
        return {}

    def solve(y0: Tensor, k: Tensor, end: float, adjoint: bool) -> Gradients:
        how = {"rtol": TOLERANCE, "atol": TOLERANCE}
        t = torch.tensor([0.0, end], dtype=y0.dtype, device=y0.device)
        if adjoint:
            y = torchdiffeq.odeint_adjoint(lambda t, y: k * y, y0, t, adjoint_params=(k,), **how)[-1]
        else:
            y = torchdiffeq.odeint(lambda t, y: k * y, y0, t, **how)[-1]
        grad_y0, grad_k = torch.autograd.grad(y**2, (y0, k))
        return grad_y0.item(), grad_k.item(), None

    return {
        ("adjoint", "torchdiffeq"): partial(solve, adjoint=True),
        ("backprop", "torchdiffeq"): partial(solve, adjoint=False),
    }


def _errors(solve: Solve, end: float, device: torch.device) -> tuple[float | None, ...]:
    """|error| of dL/dy0 and dL/dk against the exact values, then their relative error against the discrete gradient.

    Last ε of the forward solve and δ of the backward one, relative errors as in ``CAPTION``.
    """
    y0 = torch.tensor(1.0, dtype=torch.float64, device=device, requires_grad=True)
    k = torch.tensor(K, dtype=torch.float64, device=device, requires_grad=True)
    grad_y0, grad_k, steps = solve(y0, k, end)
    exact_y0 = 2 * math.exp(2 * K * end)
    errors = abs(grad_y0 - exact_y0), abs(grad_k - end * exact_y0)
    if steps is None:
        return *errors, None, None, None, None
    discrete_y0, discrete_k = discrete_gradient(steps)
    forward = math.sqrt(discrete_y0 / exact_y0)
    backward = grad_y0 / exact_y0 / forward
    return *errors, abs(grad_y0 / discrete_y0 - 1), abs(grad_k / discrete_k - 1), forward - 1, backward - 1


def discrete_gradient(steps: Tensor) -> tuple[float, float]:
    """dL/dy0 and dL/dk of y(T) = Π P(k·h_n), with the accepted ``steps`` (n, 2) taken as constants."""
    p = stability_polynomial("dopri5")
    dp = [i * c for i, c in enumerate(p)][1:]
    y, dlog_y = 1.0, 0.0
    for start, end in steps.tolist():
        z = K * (end - start)
        value = _evaluate(p, z)
        y *= value
        dlog_y += (end - start) * _evaluate(dp, z) / value
    return 2 * y**2, 2 * y**2 * dlog_y


def stability_polynomial(method: str) -> list[float]:
    """Coefficients, constant first, of P(z) = 1 + z·bᵀ(I + zA + z²A² + …)·1. On y' = k·y a step is y → P(k·h)·y."""
    tableau = aca_ext.METHODS[method]
    v, p = [Fraction(1)] * len(tableau.b), [Fraction(1)]
    while any(v):
        p.append(sum(b * x for b, x in zip(tableau.b, v, strict=True)))
        v = [sum((a * x for a, x in zip(row, v, strict=False)), Fraction(0)) for row in tableau.a]
    return [float(c) for c in p]


def _evaluate(coefficients: list[float], z: float) -> float:
    return math.fsum(c * z**i for i, c in enumerate(coefficients))


def _beside_paper(found: dict, at: list[int]) -> str:
    """Comparison of ACA's row with the paper's, for each control."""
    parts = []
    for control in CONTROLS:
        ratios = [found["aca", control][n][0] / paper for n, paper in zip(at, PAPER["aca"], strict=True)]
        parts.append(f"{min(ratios):.2f} to {max(ratios):.2f} ({control})")
    return f"ACA, ours over the paper's: {', '.join(parts)}. The paper's numbers are read off its figure."


def _table(title: str, found: dict, i: int, at: list[int], first: list[tuple], note: str = "") -> Table:
    rows = list(first)
    for (name, control), errors in found.items():
        if errors[0][i] is not None:
            who, control = ("torchdiffeq", "default") if control == "torchdiffeq" else ("ours", control)
            rows.append((who, name, control, *(f"{errors[n][i]:.3g}" for n in at)))
    return Table(title, ("", "gradient", "step control", *(f"T = {end:g}" for end in PAPER_T)), rows, note)


def _parts(found: dict, at: list[int]) -> Table:
    """The errors of the forward and backward solves, whose product with (1 + ε) makes the error of dL/dy0."""
    rows = []
    for control in CONTROLS:
        for label, name, i in (("ε, forward solve", "aca", 4), ("δ of aca", "aca", 5), ("δ of adjoint", "adjoint", 5)):
            rows.append((label, control, *(f"{found[name, control][n][i]:.2e}" for n in at)))
    columns = ("relative error", "step control", *(f"T = {end:g}" for end in PAPER_T))
    return Table("errors of the solves that make up dL/dy0", columns, rows, CAPTION)


def _draw(settings: Settings, times: list[float], found: dict):
    figure = new_figure(13, 4.2)
    exact_y0, exact_k, discrete = figure.subplots(1, 3)
    for n, name in enumerate(three_gradients()):
        errors = list(zip(*found[name, "default"], strict=True))
        color = f"C{n}"
        exact_y0.semilogy(times, errors[0], color=color, label=name)
        exact_y0.semilogy(PAPER_T, PAPER[name], "o", color=color, markerfacecolor="none", label=f"{name}, paper")
        exact_k.semilogy(times, errors[1], color=color, label=name)
        for i, style, of in ((2, "-", "y0"), (3, ":", "k")):
            visible = [max(e, 1e-17) for e in errors[i]]  # zero has no place on a logarithmic axis
            discrete.semilogy(times, visible, style, color=color, label=f"{name}, dL/d{of}")
    exact_y0.set(title="dL/dy0 against the exact value", ylabel="|error|")
    exact_k.set(title="dL/dk against the exact value", ylabel="|error|")
    discrete.set(title="against the discrete gradient", ylabel="relative error", ylim=(1e-18, 1e3))
    for axes in (exact_y0, exact_k, discrete):
        axes.set_xlabel("T")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2)
    return save_figure(settings, figure, "toy")
