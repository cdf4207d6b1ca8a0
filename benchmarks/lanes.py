"""Speed of thousands of small problems, each with its own steps: known systems and networks, and two threads.

Lotka-Volterra, van der Pol and Lorenz, 2000 samples, and networks 2-50-2 and 4-32-4, 1000 samples; 11 outputs, dopri5,
one thread, forward, and forward and backward for starts and parameters. ``by hand`` is a loop over SIMD lanes in C++,
written for one system each (by_hand.cpp), without a gradient: what is possible. torchode and diffrax, under vmap and
jit, take part where they are installed. ``/ compiled`` is the median over the rounds of how much longer a solver takes
than the compiled engine in the same round. The last table has the compiled engine with one thread and two.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aca_ext
from benchmarks.harness import Parts, Settings, Table, first_line, interleave, torch_threads
from benchmarks.peers import jax_and_diffrax

SAMPLES, QUICK_SAMPLES = 2000, 50
NETWORKS = ((2, 50), (4, 32))  # numbers of a state and of hidden units
OUTPUTS = 11
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
COMPILED = "aca_ext compiled"
COLUMNS = {
    "solver": ("solver", ""),
    "forward ms": ("forward_ms", ".2f"),
    "/ compiled": ("forward_ratio", ".2f"),
    "forward and backward ms": ("both_ms", ".2f"),
    "both / compiled": ("both_ratio", ".2f"),
}
THREADS_COLUMNS = {
    "system": ("system", ""),
    "forward": ("forward_speedup", ".2f"),
    "forward and backward": ("both_speedup", ".2f"),
}


@dataclass(frozen=True)
class System:
    """A system of equations, and samples of it: ``func`` in PyTorch, ``in_jax`` of one sample, ``name`` in C++.

    The samples have parameters of their own, rows of p, or if ``is_shared`` all the same.
    """

    name: str
    func: Callable[[Tensor, Tensor, Tensor], Tensor]
    in_jax: Callable[[Any, Any, Any], Any]
    y0: Tensor
    p: Tensor
    t_end: float
    is_shared: bool = False

    def times(self) -> Tensor:
        return torch.linspace(0.0, self.t_end, OUTPUTS, dtype=torch.float64)


def lotka_volterra(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    x, z = y.unbind(-1)
    a, b, c, d = p.unbind(-1)
    return torch.stack((a * x - b * x * z, c * x * z - d * z), -1)


def van_der_pol(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return torch.stack((v, p[..., 0] * (1 - x * x) * v - x), -1)


def lorenz(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return torch.stack((10 * (b - a), a * (p[..., 0] - c) - b, a * b - 8 / 3 * c), -1)


def systems(n: int, dtype: torch.dtype) -> Iterator[System]:
    torch.manual_seed(0)
    yield System(
        "LotkaVolterra",
        lotka_volterra,
        lambda t, y, p: (p[0] * y[0] - p[1] * y[0] * y[1], p[2] * y[0] * y[1] - p[3] * y[1]),
        torch.rand(n, 2, dtype=dtype) * 3 + 0.5,
        torch.rand(n, 4, dtype=dtype) + 0.5,
        20.0,
    )
    yield System(
        "VanDerPol",  # stiffness 0.1 to 20
        van_der_pol,
        lambda t, y, p: (y[1], p[0] * (1 - y[0] * y[0]) * y[1] - y[0]),
        torch.rand(n, 2, dtype=dtype) * 2 + 0.5,
        torch.logspace(-1, 1.3, n, dtype=dtype)[:, None],
        20.0,
    )
    yield System(
        "Lorenz",
        lorenz,
        lambda t, y, p: (10 * (y[1] - y[0]), y[0] * (p[0] - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]),
        torch.randn(n, 3, dtype=dtype) + 5,
        torch.rand(n, 1, dtype=dtype) + 27.5,
        5.0,
    )


def network(sizes: tuple[int, int], n: int, dtype: torch.dtype) -> System:
    """A network with a layer of tanh, whose weights are one vector, less half of the state."""
    torch.manual_seed(0)
    size, hidden = sizes
    cut, end = size * hidden, 2 * size * hidden + hidden

    def layers(p: Any) -> tuple[Any, ...]:
        return (
            p[:cut].reshape(hidden, size),
            p[cut : cut + hidden],
            p[cut + hidden : end].reshape(size, hidden),
            p[end:],
        )

    def func(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        a, b, c, d = layers(p)
        return torch.tanh(y @ a.T + b) @ c.T + d - 0.5 * y

    def in_jax(t: Any, y: Any, p: Any) -> Any:
        from jax import numpy

        a, b, c, d = layers(p)
        return c @ numpy.tanh(a @ y + b) + d - 0.5 * y

    p = torch.cat([0.7 * torch.randn(end, dtype=dtype), torch.zeros(size, dtype=dtype)])
    return System(f"Network {size}-{hidden}-{size}", func, in_jax, 2 * torch.randn(n, size, dtype=dtype), p, 5.0, True)


# A solver of a system: what solves it, and what also finds the gradient, if it can.
Solver = Callable[[System], tuple[Callable[[], Any], Callable[[], Any] | None]]


def run(settings: Settings) -> Parts:
    for dtype in (torch.float64,) if settings.quick else (torch.float64, torch.float32):
        n = QUICK_SAMPLES if settings.quick else SAMPLES
        for system in _measured(settings, dtype, n, n // 2):
            yield from _measure(system, settings)
    yield from _threads(settings)


def _measured(settings: Settings, dtype: torch.dtype, n: int, n_networks: int) -> list[System]:
    """All systems; for a quick run the first and the first network."""
    last = 1 if settings.quick else None
    of_networks = [network(sizes, n_networks, dtype) for sizes in NETWORKS[:last]]
    return [*list(systems(n, dtype))[:last], *of_networks]


def _threads(settings: Settings) -> Parts:
    n = QUICK_SAMPLES if settings.quick else 20 * SAMPLES
    table = Table(f"{COMPILED}, one thread over two, {n} samples, float64", THREADS_COLUMNS)
    for system in _measured(settings, torch.float64, n, n // 20):
        row: dict[str, Any] = {"system": system.name}
        for kind, solve in zip(("forward", "both"), _ours("compiled")(system), strict=True):
            timing = interleave({f"{k}": partial(_with_threads, k, solve) for k in (1, 2)}, settings, seconds=10)
            row[f"{kind}_speedup"] = timing.ratio("1", "2")
        table.rows.append(row)
    yield table


def _with_threads(n: int, solve: Callable[[], Any]) -> None:
    with torch_threads(n):
        solve()


def _measure(system: System, settings: Settings) -> Parts:
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    for name, solver in SOLVERS.items():
        try:
            solve, solve_and_pull = solver(system)
            solve()
            if solve_and_pull is not None:
                solve_and_pull()
                both[name] = solve_and_pull
            forward[name] = solve
        except Exception as error:
            yield f"{name} is left out: {type(error).__name__}: {first_line(error)}"
    timings = interleave(forward, settings, seconds=15), interleave(both, settings, seconds=30)
    dtype = str(system.y0.dtype).removeprefix("torch.")
    tolerance = TOLERANCE[system.y0.dtype]
    title = f"{system.name}, {len(system.y0)} samples, {dtype}, T = {system.t_end:g}, tolerance {tolerance:g}"
    table = Table(title, COLUMNS)
    for name in forward:
        row: dict[str, Any] = {"solver": name}
        for kind, timing in zip(("forward", "both"), timings, strict=True):
            if name in timing.samples:
                row[f"{kind}_ms"] = 1e3 * timing.median(name)
                row[f"{kind}_ratio"] = timing.ratio(name, COMPILED) if COMPILED in timing.samples else None
        table.rows.append(row)
    yield table


def _ours(engine: str) -> Solver:
    def solver(system: System) -> tuple[Callable[[], Any], Callable[[], Any]]:
        y0, p = (x.clone().requires_grad_() for x in (system.y0, system.p))
        t, tol = system.times(), TOLERANCE[y0.dtype]

        def solve() -> Tensor:
            y = aca_ext.odeint(
                system.func, y0, t, args=(p,), rtol=tol, atol=tol, options={"batch": "independent"}, engine=engine
            )
            assert isinstance(y, Tensor)
            return y

        return torch.no_grad()(solve), lambda: torch.autograd.grad(solve().square().sum(), (y0, p))

    return solver


def _by_hand(system: System) -> tuple[Callable[[], Any], None]:
    if system.is_shared:
        raise LookupError("no network is written by hand")
    y0, p, tol = system.y0.contiguous(), system.p.contiguous(), TOLERANCE[system.y0.dtype]
    function = _library(system.name, y0.dtype).solve
    function.restype = ctypes.c_long
    out = torch.empty(OUTPUTS, *y0.shape, dtype=y0.dtype)

    def solve() -> Tensor:
        function(
            ctypes.c_long(len(y0)), *(ctypes.c_void_p(x.data_ptr()) for x in (y0, p)), ctypes.c_double(system.t_end),
            ctypes.c_long(OUTPUTS), ctypes.c_double(tol), ctypes.c_double(0.01), ctypes.c_void_p(out.data_ptr()),
        )  # fmt: skip
        return out

    return solve, None


@cache
def _library(name: str, dtype: torch.dtype) -> Any:
    kind, lanes = ("double", 8) if dtype == torch.float64 else ("float", 16)
    folder = Path(tempfile.mkdtemp())
    source, made = Path(__file__).with_name("by_hand.cpp"), folder / "by_hand.so"
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-w"]
    defined = [f"-DT={kind}", f"-DL={lanes}", f"-DSYSTEM={name}"]
    subprocess.run(["g++", *flags, *defined, str(source), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def _torchode(system: System) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torchode

    y0, p = (x.clone().requires_grad_() for x in (system.y0, system.p))
    tol = TOLERANCE[y0.dtype]
    term = torchode.ODETerm(lambda t, y, args: system.func(t, y, args), with_args=True, with_stats=False)
    solver = torchode.AutoDiffAdjoint(
        torchode.Dopri5(term=term),
        torchode.IntegralController(tol, tol, term=term),
        backprop_through_step_size_control=False,
    )
    times = system.times().to(y0.dtype).expand(len(y0), -1)

    def solve() -> Tensor:
        return solver.solve(torchode.InitialValueProblem(y0, t_eval=times), term, args=p).ys

    return torch.no_grad()(solve), lambda: torch.autograd.grad(solve().square().sum(), (y0, p))


def _diffrax(system: System) -> tuple[Callable[[], Any], Callable[[], Any]]:
    jax, diffrax = jax_and_diffrax()
    tol = TOLERANCE[system.y0.dtype]

    def precision() -> Any:
        return jax.enable_x64(system.y0.dtype == torch.float64)

    with precision():
        y0, p, t = (jax.numpy.asarray(x.to(system.y0.dtype).numpy()) for x in (system.y0, system.p, system.times()))

    def alone(y: Any, p: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: jax.numpy.asarray(system.in_jax(t, y, p))),
            diffrax.Dopri5(),
            t[0],
            t[-1],
            None,
            y,
            args=p,
            saveat=diffrax.SaveAt(ts=t),
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            max_steps=16384,
        ).ys

    together = jax.vmap(alone, in_axes=(0, None if system.is_shared else 0))
    solve = jax.jit(together)
    gradient = jax.jit(jax.grad(lambda y, p: (together(y, p) ** 2).sum(), argnums=(0, 1)))

    def run(function: Callable[..., Any]) -> Any:
        with precision():
            return jax.block_until_ready(function(y0, p))

    return partial(run, solve), partial(run, gradient)


SOLVERS: dict[str, Solver] = {
    COMPILED: _ours("compiled"),
    "aca_ext eager": _ours("eager"),
    "by hand": _by_hand,
    "torchode": _torchode,
    "diffrax, vmap, jit": _diffrax,
}
