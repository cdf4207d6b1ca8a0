"""One adapter per solver, all of one signature: dopri5 from 0 to t_end, everything else as the package has it.

A package that is not installed is skipped. To add one, write a function that imports it and returns its solvers, and
name it in ``PACKAGES``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.workloads import Problem, flat


@dataclass(frozen=True)
class Run:
    """A solver set up for one problem.

    Attributes:
        solve: returns y(t_end), with a graph where gradients are enabled.
        accepted: solves once more and returns the number of accepted steps.
    """

    solve: Callable[[], Tensor]
    accepted: Callable[[], int]


@dataclass(frozen=True)
class Solver:
    """``own_forward`` is False where, without gradient, it runs the forward pass of the solver before it."""

    name: str
    prepare: Callable[[Problem], Run]
    own_forward: bool = True


@dataclass(frozen=True)
class Counts:
    """Accepted steps, evaluations of f without gradient, and with gradient in the two passes."""

    accepted: int
    forward: int
    forward_with_gradient: int
    backward: int


class Counted(nn.Module):
    """f that counts its evaluations, and the steps that torchdiffeq reports to it."""

    def __init__(self, func: nn.Module) -> None:
        super().__init__()
        self.func, self.calls, self.accepted = func, 0, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.func(t, y)

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1


def forward(run: Run) -> Tensor:
    with torch.no_grad():
        return run.solve()


def forward_backward(run: Run, problem: Problem) -> tuple[Tensor, ...]:
    return problem.gradient(run.solve())


def count(solver: Solver, problem: Problem, *, backward: bool = True) -> Counts:
    func = Counted(problem.func)
    run = solver.prepare(Problem(func, problem.y0, problem.t_end, problem.tol))
    forward(run)
    plain = func.calls
    with_gradient = in_backward = 0
    if backward:
        y = run.solve()
        with_gradient = func.calls - plain
        problem.gradient(y)
        in_backward = func.calls - plain - with_gradient
    with torch.no_grad():
        accepted = run.accepted()
    return Counts(accepted, plain, with_gradient, in_backward)


def outcome(run: Run, problem: Problem) -> tuple[Tensor, Tensor]:
    """The end state and the gradient, flat, float64 on the CPU."""
    y = run.solve()
    return flat((y,)), flat(problem.gradient(y))


def _times(problem: Problem) -> Tensor:
    return torch.tensor([0.0, problem.t_end], dtype=problem.y0.dtype, device=problem.y0.device)


def _aca_ext() -> list[Solver]:
    def prepare(gradient: str, p: Problem) -> Run:
        solve = partial(aca_ext.solve, p.func, p.y0, _times(p), rtol=p.tol, atol=p.tol, gradient=gradient)
        return Run(lambda: solve().y[-1], lambda: solve().stats.n_accepted)

    return [
        Solver("aca_ext aca", partial(prepare, "aca")),
        Solver("aca_ext direct", partial(prepare, "direct"), own_forward=False),
    ]


def _torchdiffeq() -> list[Solver]:
    import torchdiffeq

    def prepare(odeint: Callable[..., Tensor], p: Problem) -> Run:
        def solve() -> Tensor:
            return odeint(p.func, p.y0, t, rtol=p.tol, atol=p.tol, method="dopri5")[-1]

        def accepted() -> int:
            counted = Counted(p.func)
            torchdiffeq.odeint(counted, p.y0, t, rtol=p.tol, atol=p.tol, method="dopri5")
            return counted.accepted

        t = _times(p)
        return Run(solve, accepted)

    return [
        Solver("torchdiffeq odeint", partial(prepare, torchdiffeq.odeint)),
        Solver("torchdiffeq odeint_adjoint", partial(prepare, torchdiffeq.odeint_adjoint), own_forward=False),
    ]


def _torchode() -> list[Solver]:
    import torchode

    def prepare(p: Problem) -> Run:
        term = torchode.ODETerm(p.func, with_stats=False)
        # Without a gradient through the step size control: faster, and the gradient that the others compute.
        solver = torchode.AutoDiffAdjoint(
            torchode.Dopri5(term=term),
            torchode.IntegralController(p.tol, p.tol, term=term),
            backprop_through_step_size_control=False,
        ).to(p.y0.device)
        start, end = _times(p)[:, None].expand(2, len(p.y0))
        problem = torchode.InitialValueProblem(p.y0, start, end)

        def accepted() -> int:
            return int(solver.solve(problem, term).stats["n_accepted"].max())

        return Run(lambda: solver.solve(problem, term).ys[:, -1], accepted)

    return [Solver("torchode AutoDiffAdjoint", prepare)]


def _torch_diff_eq_pack() -> list[Solver]:
    from TorchDiffEqPack import odesolve_adjoint, odesolve_endtime

    def prepare(odesolve: Callable[..., Tensor], p: Problem) -> Run:
        def options() -> dict[str, object]:  # anew for each call, which changes it
            return {"method": "dopri5", "h": None, "t0": 0.0, "t1": p.t_end, "rtol": p.tol, "atol": p.tol}

        def accepted() -> int:
            solver = odesolve_endtime(p.func, p.y0, options(), return_solver=True)
            return len(solver.integrate(p.y0, 0.0, return_steps=True)[1])

        return Run(lambda: odesolve(p.func, p.y0, options()), accepted)

    return [
        Solver("TorchDiffEqPack odesolve_endtime", partial(prepare, odesolve_endtime)),
        Solver("TorchDiffEqPack odesolve_adjoint", partial(prepare, odesolve_adjoint), own_forward=False),
    ]


PACKAGES = {
    "aca_ext": _aca_ext,
    "torchdiffeq": _torchdiffeq,
    "torchode": _torchode,
    "TorchDiffEqPack": _torch_diff_eq_pack,
}


def installed(*names: str) -> tuple[list[Solver], list[str]]:
    """The solvers of the named packages, by default of all, and a sentence for each that cannot be imported."""
    solvers: list[Solver] = []
    skipped: list[str] = []
    for name in names or PACKAGES:
        try:
            solvers += PACKAGES[name]()
        except ImportError as error:
            skipped.append(f"{name} is skipped: module {error.name} cannot be imported.")
    return solvers, skipped
