"""Adapters of all solvers to one signature: dopri5 from 0 to t_end, with the package's defaults for everything else.

A package that is not installed is skipped. To add one, write a function that imports it and returns its solvers, and
name it in ``PACKAGES``.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import first_line
from benchmarks.workloads import Problem, flat


@dataclass(frozen=True)
class Run:
    """A solver set up for one problem.

    Attributes:
        solve: returns y(t_end), with an autograd graph if gradients are enabled.
        accepted: solves once more and returns the number of accepted steps.
        gradient: returns the gradient of ``Problem.gradient``; None if PyTorch's autograd computes it.
        tensors: converts the results of ``solve`` and ``gradient`` to tensors.
    """

    solve: Callable[[], Any]
    accepted: Callable[[], int]
    gradient: Callable[[], Any] | None = None
    tensors: Callable[[Any], Any] = lambda x: x


@dataclass(frozen=True)
class Solver:
    """A solver by name.

    ``own_forward`` is False if its forward pass without gradient is that of the previous solver in the list. ``count``
    is given for compiled solvers, which call f only while they trace it, so that its calls cannot be counted. Compiled
    solvers run on the CPU only, unless ``on_gpu`` is True.
    """

    name: str
    prepare: Callable[[Problem], Run]
    own_forward: bool = True
    count: Callable[[Problem, bool], "Counts"] | None = None
    on_gpu: bool = False

    @property
    def is_compiled(self) -> bool:
        return self.count is not None


@dataclass(frozen=True)
class Counts:
    """Accepted steps and evaluations of f: without gradient, and with it in either pass; None if unknown."""

    accepted: int
    forward: int
    forward_with_gradient: int
    backward: int | None


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
    return problem.gradient(run.solve()) if run.gradient is None else run.gradient()


def count(solver: Solver, problem: Problem, *, backward: bool = True) -> Counts:
    if solver.count is not None:
        return solver.count(problem, backward)
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
    return flat((run.tensors(run.solve()),)), flat(run.tensors(forward_backward(run, problem)))


def _times(problem: Problem) -> Tensor:
    return torch.tensor([0.0, problem.t_end], dtype=problem.y0.dtype, device=problem.y0.device)


def _aca_ext() -> list[Solver]:
    def solver_of(p: Problem, **how: str) -> Callable[[], aca_ext.Solution]:
        return partial(aca_ext.solve, p.func, p.y0, _times(p), rtol=p.tol, atol=p.tol, **how)

    def prepare(p: Problem, **how: str) -> Run:
        solve = solver_of(p, **how)
        return Run(lambda: solve().y[-1], lambda: solve().stats.n_accepted)

    def count_compiled(p: Problem, backward: bool) -> Counts:
        solution = solver_of(p, engine="compiled")()
        if backward:
            p.gradient(solution.y[-1])
        stats = solution.stats
        return Counts(stats.n_accepted, stats.n_f_evals, stats.n_f_evals, stats.n_f_evals_backward)

    return [
        Solver("aca_ext aca", prepare),
        Solver("aca_ext direct", partial(prepare, gradient="direct"), own_forward=False),
        Solver("aca_ext compiled", partial(prepare, engine="compiled"), count=count_compiled),
    ]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # all workloads share one code object, and so one count
    return torch.compile(function)


def _counted_as(other: Solver) -> Callable[[Problem, bool], Counts]:
    return lambda problem, backward: count(other, problem, backward=backward)


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

    def prepare_compiled(p: Problem) -> Run:
        return prepare(torchdiffeq.odeint, replace(p, func=_compiled(p.func)))

    eager = Solver("torchdiffeq odeint", partial(prepare, torchdiffeq.odeint))
    return [
        eager,
        Solver("torchdiffeq odeint, f compiled", prepare_compiled, count=_counted_as(eager)),
        Solver("torchdiffeq odeint_adjoint", partial(prepare, torchdiffeq.odeint_adjoint), own_forward=False),
    ]


def _torchode() -> list[Solver]:
    import torchode

    def prepare(p: Problem, compiled: bool = False) -> Run:
        term = torchode.ODETerm(p.func, with_stats=False)
        # Differentiates through the steps only, not their sizes: faster, and the same gradient as the other solvers'.
        solver = torchode.AutoDiffAdjoint(
            torchode.Dopri5(term=term),
            torchode.IntegralController(p.tol, p.tol, term=term),
            backprop_through_step_size_control=False,
        ).to(p.y0.device)
        start, end = _times(p)[:, None].expand(2, len(p.y0))
        problem = torchode.InitialValueProblem(p.y0, start, end)

        def accepted() -> int:
            return int(solver.solve(problem, term).stats["n_accepted"].max())

        solve = _compiled(solver.solve) if compiled else solver.solve
        return Run(lambda: solve(problem, term).ys[:, -1], accepted)

    eager = Solver("torchode AutoDiffAdjoint", prepare)
    # torchode supports torch.compile of the whole solve, which takes long to compile.
    return [eager, Solver("torchode, solve compiled", partial(prepare, compiled=True), count=_counted_as(eager))]


def _torch_diff_eq_pack() -> list[Solver]:
    from TorchDiffEqPack import odesolve_adjoint, odesolve_endtime

    def prepare(odesolve: Callable[..., Tensor], p: Problem) -> Run:
        def options() -> dict[str, object]:  # a new dict per call, since a solve changes it
            return {"method": "dopri5", "h": None, "t0": 0.0, "t1": p.t_end, "rtol": p.tol, "atol": p.tol}

        def accepted() -> int:
            solver = odesolve_endtime(p.func, p.y0, options(), return_solver=True)
            return len(solver.integrate(p.y0, 0.0, return_steps=True)[1])

        return Run(lambda: odesolve(p.func, p.y0, options()), accepted)

    return [
        Solver("TorchDiffEqPack odesolve_endtime", partial(prepare, odesolve_endtime)),
        Solver("TorchDiffEqPack odesolve_adjoint", partial(prepare, odesolve_adjoint), own_forward=False),
    ]


def _diffrax() -> list[Solver]:
    jax, diffrax = jax_and_diffrax()
    import numpy as np

    def precision(p: Problem) -> Any:
        return jax.enable_x64(True) if p.y0.dtype == torch.float64 else nullcontext()

    def operands(p: Problem) -> tuple[Any, ...]:
        device = jax.devices("gpu" if p.y0.is_cuda else "cpu")[0]
        tensors = (p.y0, *p.func.parameters())
        y0, *params = (jax.device_put(x.detach().cpu().numpy(), device) for x in tensors)
        return y0, params, p.tol

    @cache
    def compiled(func: nn.Module, t_end: float) -> tuple[Callable[..., Any], ...]:
        """The jitted end state, its gradient and the step counts, shared by all tolerances and dtypes."""

        def solve(y0: Any, params: Any, tol: Any) -> Any:
            return diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, params: _in_jax(jax, func, y, params)),
                diffrax.Dopri5(),
                0.0,
                t_end,
                None,
                y0,
                args=params,
                saveat=diffrax.SaveAt(t1=True),
                stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
                adjoint=diffrax.RecursiveCheckpointAdjoint(),
            )

        end = jax.jit(lambda *given: solve(*given).ys[-1])
        gradient = jax.jit(jax.grad(lambda *given: solve(*given).ys[-1].sum(), argnums=(0, 1)))
        return end, gradient, jax.jit(lambda *given: solve(*given).stats)

    def prepare(p: Problem) -> Run:
        with precision(p):
            given = operands(p)
        end, gradient, _ = compiled(p.func, p.t_end)

        def run(function: Callable[..., Any]) -> Any:
            with precision(p):
                return jax.block_until_ready(function(*given))

        def tensors(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(torch.from_numpy(np.array(part)) for part in (x[0], *x[1]))
            return torch.from_numpy(np.array(x))

        return Run(lambda: run(end), lambda: count_steps(p).accepted, lambda: run(gradient), tensors)

    def count_steps(p: Problem, _: bool = False) -> Counts:
        with precision(p):
            stats = compiled(p.func, p.t_end)[2](*operands(p))
        evaluations = 2 + 6 * int(stats["num_steps"])
        return Counts(int(stats["num_accepted_steps"]), evaluations, evaluations, None)

    return [Solver("diffrax, jit", prepare, count=count_steps, on_gpu=jax_sees_a_gpu())]


def jax_and_diffrax() -> tuple[Any, Any]:
    """The modules jax and diffrax, with the threads and the precision of the other solvers."""
    # To be set before jax starts: one thread, and no preallocation of the GPU's memory, which torch needs too.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import diffrax
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")  # torch's default
    return jax, diffrax


def jax_sees_a_gpu() -> bool:
    try:
        return bool(jax_and_diffrax()[0].devices("gpu"))
    except RuntimeError:
        return False


def _in_jax(jax: Any, func: nn.Module, y: Any, params: Any) -> Any:
    """f of a workload in jax, layer by layer."""
    following = iter(params)
    for layer in func.net if isinstance(func.net, nn.Sequential) else [func.net]:
        if isinstance(layer, nn.Linear):
            y = y @ next(following).T + next(following)
        elif isinstance(layer, nn.Softplus):
            y = jax.nn.softplus(y)
        elif isinstance(layer, nn.Tanh):
            y = jax.numpy.tanh(y)
        else:
            y = -y
    return y


PACKAGES = {
    "aca_ext": _aca_ext,
    "torchdiffeq": _torchdiffeq,
    "torchode": _torchode,
    "TorchDiffEqPack": _torch_diff_eq_pack,
    "diffrax": _diffrax,
}


def installed(*names: str, device: str = "cpu") -> tuple[list[Solver], list[str]]:
    """The solvers of the named packages (default: all), and a sentence for each that is left out.

    A package that fails during its setup is left out, and on a GPU so are the compiled solvers that do not run there.
    """
    solvers: list[Solver] = []
    skipped: list[str] = []
    for name in names or PACKAGES:
        try:
            solvers += PACKAGES[name]()
        except ImportError as error:
            skipped.append(f"{name} is skipped: module {error.name} cannot be imported.")
        except Exception as error:
            skipped.append(f"{name} is skipped: {type(error).__name__}: {first_line(error)}")
    if device != "cpu":
        on_cpu = [solver for solver in solvers if solver.is_compiled and not solver.on_gpu]
        skipped += [f"{solver.name} is skipped: here it runs on the CPU only." for solver in on_cpu]
        solvers = [solver for solver in solvers if solver not in on_cpu]
    return solvers, skipped
