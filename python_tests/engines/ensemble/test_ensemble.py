"""engine="compiled" for independent samples: the steps and gradients of the eager engine, whatever the neighbours."""

from __future__ import annotations

import math
import pickle
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from autograd_reference import relative_error, solve_over
from problems import DrivenMlp, sample
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

ADAPTIVE = [name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive]
INDEPENDENT = {"batch": "independent"}
T = torch.tensor([0.0, 0.3, 0.31, 1.0, 3.0], dtype=torch.float64)
CALL: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def lotka_volterra(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    prey, predators = y.unbind(-1)
    return torch.stack(
        (p[..., 0] * prey - p[..., 1] * prey * predators, p[..., 2] * prey * predators - p[..., 3] * predators), -1
    )


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y[:, :1], y[:, 1:]
    return torch.cat([v, mu * (1 - x * x) * v - x], 1)


def lorenz(t: Tensor, y: Tensor, rho: Tensor) -> Tensor:
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return torch.stack((10 * (b - a), a * (rho - c) - b, a * b - 8 / 3 * c), -1)


def epidemic(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    susceptible, infected, _ = y.split(1, -1)
    infections = rates[0] * susceptible * infected / y.sum(-1, keepdim=True)
    return torch.cat((-infections, infections - rates[1] * infected, rates[1] * infected), -1)


def robertson(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    slow, fast, back = (k * torch.tensor([0.04, 3e2, 1e2], dtype=y.dtype)).unbind(-1)
    return torch.stack((-slow * a + back * b * c, slow * a - back * b * c - fast * b * b, fast * b * b), -1)


SYSTEMS = {
    "lotka_volterra": (lotka_volterra, lambda n: (sample(n, 2).abs() + 0.3, sample(n, 4, seed=1).abs() + 0.3)),
    "van_der_pol": (van_der_pol, lambda n: (sample(n, 2) + 1, 10 ** torch.linspace(-1, 1.3, n).double()[:, None])),
    "lorenz": (lorenz, lambda n: (sample(n, 3) + 5, sample(n, seed=1) + 28)),
    "epidemic": (epidemic, lambda n: (sample(n, 3).abs() + 0.1, torch.tensor([1.5, 0.4], dtype=torch.float64))),
    "robertson": (robertson, lambda n: (sample(n, 3).abs() * 0.1 + 0.5, sample(n, 3, seed=1).abs() + 0.5)),
}  # fmt: skip


def inputs_of(name: str, n: int) -> tuple[Any, Tensor, Tensor]:
    func, make = SYSTEMS[name]
    y0, p = make(n)
    return func, y0.requires_grad_(), p.requires_grad_()


def weighted(y: Tensor) -> Tensor:
    return (y * sample(*y.shape, seed=3).to(y)).sum()


def solve(engine: str, func: Any, y0: Any, t: Any = T, args: Any = (), **call: Any) -> aca_ext.Solution:
    options = INDEPENDENT | call.pop("options", {})
    return aca_ext.solve(func, y0, t, args=args, options=options, engine=engine, **(CALL | call))


def check_like_eager(func: Any, y0: Tensor, inputs: list[Tensor], args: Any = (), t: Any = T, **call: Any) -> Any:
    """The same steps, outputs and gradients; returns the compiled solution."""
    eager, compiled = (solve(engine, func, y0, t, args, **call) for engine in ("eager", "compiled"))
    for count in ("n_steps", "n_accepted", "n_rejected"):
        assert torch.equal(getattr(eager.stats, count), getattr(compiled.stats, count))
    for one, other in zip(eager.steps, compiled.steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # of the float32 in step sizes
    ys = [sol.y if isinstance(sol.y, tuple) else (sol.y,) for sol in (eager, compiled)]
    for one, other in zip(*ys, strict=True):
        assert relative_error(other, one) <= 1e-7
    found = [torch.autograd.grad(sum(map(weighted, y)), inputs, allow_unused=True) for y in ys]
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert relative_error(other, one) <= 1e-6
    return compiled


class TestSystems:
    @pytest.mark.parametrize("name", SYSTEMS)
    def test_steps_and_gradients_are_those_of_the_eager_engine(self, name: str) -> None:
        func, y0, p = inputs_of(name, 21)
        compiled = check_like_eager(func, y0, [y0, p], (p,))
        assert compiled.stats.backend == "compiled"
        assert len(set(compiled.stats.n_steps.tolist())) > 1
        n_f_rows = (2 + 6 * compiled.stats.n_steps).sum()
        assert compiled.stats.n_f_rows == n_f_rows  # no more than what each sample needs

    @pytest.mark.parametrize("name", SYSTEMS)
    def test_gradients_are_exact_over_the_same_steps(self, name: str) -> None:
        func, y0, p = inputs_of(name, 11)
        sol = solve("compiled", func, y0, args=(p,))
        is_shared = len(p) != 11
        truth = torch.cat([
            solve_over(func, y0[i : i + 1], T.tolist(), sol.steps[i].tolist(), "dopri5",
                       (p if is_shared else p[i : i + 1],))
            for i in range(11)
        ], 1)  # fmt: skip
        assert relative_error(sol.y, truth) <= 1e-13
        found, expected = (torch.autograd.grad(weighted(y), [y0, p]) for y in (sol.y, truth))
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) <= 1e-12

    def test_gradients_are_those_of_finite_differences(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 3)
        call = {"rtol": 1e-11, "atol": 1e-11}
        (grad,) = torch.autograd.grad(weighted(solve("compiled", func, y0, args=(p,), **call).y), p)
        step, direction = 1e-6, sample(3, 4, seed=7)
        with torch.no_grad():
            ends = [weighted(solve("compiled", func, y0, args=(p + s * step * direction,), **call).y) for s in (1, -1)]
        assert math.isclose(float((ends[0] - ends[1]) / (2 * step)), float((grad * direction).sum()), rel_tol=1e-6)


class TestMethods:
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_gradients_are_exact(self, method: str) -> None:
        func = DrivenMlp()
        y0, drive = (sample(4, 3) * 2).requires_grad_(), sample(4, 3, seed=1).requires_grad_()
        rate = torch.tensor([[0.1], [1.0], [4.0], [9.0]], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([[0.0, 0.31, 0.32, 1.3], [0.0, 1.0, 1.1, 1.9], [1.0, 0.9, 0.5, 0.2], [2.0, 2.1, 2.2, 2.3]],
                         dtype=torch.float64)  # fmt: skip
        call = {"method": method, "rtol": 1e-3, "atol": 1e-4}
        wanted = [y0, drive, rate, *func.parameters()]
        sol = check_like_eager(func, y0, wanted, (drive, rate), t, **call)
        truth = torch.cat([
            solve_over(func, y0[i : i + 1], t[i].tolist(), sol.steps[i].tolist(), method,
                       (drive[i : i + 1], rate[i : i + 1]))
            for i in range(4)
        ], 1)  # fmt: skip
        sol = solve("compiled", func, y0, t, (drive, rate), **call)
        found, expected = (torch.autograd.grad(weighted(y), wanted) for y in (sol.y, truth))
        for grad, exact in zip(found, expected, strict=True):
            assert relative_error(grad, exact) <= 1e-12

    @pytest.mark.parametrize(
        "options",
        [{"first_step": 0.5}, {"max_step": 0.05}, {"min_step": 1e-4}, {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.4},
         {"pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.1}],
    )  # fmt: skip
    def test_options(self, options: dict[str, float]) -> None:
        func, y0, p = inputs_of("van_der_pol", 9)
        check_like_eager(func, y0, [y0, p], (p,), options=options)

    def test_float32(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 19)
        single = [x.detach().float().requires_grad_() for x in (y0, p)]
        call = {"rtol": 1e-3, "atol": 1e-3}
        sol, exact = (solve("compiled", func, y, args=(q,), **call) for y, q in (single, (y0, p)))
        assert sol.y.dtype == torch.float32
        assert (sol.stats.n_steps - exact.stats.n_steps).abs().max() <= 1
        eager = solve("eager", func, single[0], args=(single[1],), **call)
        same = sol.stats.n_steps == eager.stats.n_steps
        assert same.float().mean() > 0.9
        assert relative_error(sol.y[:, same], eager.y[:, same]) <= 1e-4
        found, expected = (torch.autograd.grad(weighted(s.y), single) for s in (sol, eager))
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one[same], other[same]) <= 1e-3

    def test_tolerances_by_element(self) -> None:
        func, y0, p = inputs_of("van_der_pol", 3)
        rtol = torch.tensor([[1e-3], [1e-5], [1e-7]], dtype=torch.float64)
        check_like_eager(func, y0, [y0, p], (p,), rtol=rtol)
        check_like_eager(func, y0, [y0, p], (p,), rtol=rtol, atol=torch.tensor([1e-3, 1e-6], dtype=torch.float64))

    def test_times(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 3)
        t = torch.tensor([[0.0, 0.5, 1.0], [2.0, 1.9, -0.5], [1.0, 1.1, 1.2]], dtype=torch.float64)
        check_like_eager(func, y0, [y0, p], (p,), t)
        assert torch.equal(solve("compiled", func, y0, [0.0], (p,)).y[0], y0)
        (grad,) = torch.autograd.grad(weighted(solve("compiled", func, y0, [0.0], (p,)).y), y0)
        assert torch.equal(grad, sample(1, 3, 2, seed=3)[0])

    @pytest.mark.parametrize("each", [False, True], ids=["common times", "times of each"])
    def test_gradient_of_times(self, each: bool) -> None:
        func, y0, p = inputs_of("lotka_volterra", 2)
        t = torch.tensor([[0.5, 0.9, 2.0], [1.0, 0.2, 0.1]], dtype=torch.float64)
        t = (t if each else t[0]).clone().requires_grad_()
        check_like_eager(func, y0, [y0, p, t], (p,), t)


class TestRepeatability:
    @pytest.fixture(autouse=True)
    def threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    def results(self, y0: Tensor, p: Tensor, shared: Tensor, threads: int = 1) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)

        def func(t: Tensor, y: Tensor, p: Tensor, shared: Tensor) -> Tensor:
            return van_der_pol(t, y, p) * torch.cos(shared * t)

        leaves = [x.detach().clone().requires_grad_() for x in (y0, p, shared)]
        sol = solve("compiled", func, leaves[0], args=tuple(leaves[1:]))
        return sol.y.detach(), *torch.autograd.grad(weighted_by_sample(sol.y), leaves)

    def test_is_bitwise_for_any_threads_order_and_neighbours(self) -> None:
        _, y0, p = inputs_of("van_der_pol", 1000)
        shared = torch.tensor(0.3, dtype=torch.float64)
        one = self.results(y0, p, shared)
        for x, other in zip(one, self.results(y0, p, shared, threads=2), strict=True):
            assert torch.equal(x, other)
        order = torch.randperm(1000)
        y, grad_y0, grad_p, grad_shared = self.results(y0[order], p[order], shared)
        assert torch.equal(y, one[0][:, order])
        assert torch.equal(grad_y0, one[1][order])
        assert torch.equal(grad_p, one[2][order])
        assert relative_error(grad_shared, one[3]) <= 1e-12  # a sum over the samples in their order
        for i in (0, 613, 999):
            rows = torch.tensor([i, (i + 7) % 1000])
            y, grad_y0, grad_p, _ = self.results(y0[rows], p[rows], shared)
            assert torch.equal(y[:, 0], one[0][:, i])
            assert torch.equal(grad_y0[0], one[1][i])
            assert torch.equal(grad_p[0], one[2][i])

    def test_a_retained_graph_and_what_is_edited(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 5)
        rates = p.detach().clone().requires_grad_()
        sol = solve("compiled", func, y0 * 1.0, args=(rates,))
        one = torch.autograd.grad(weighted(sol.y), (y0, rates), retain_graph=True)
        sol.y.detach().zero_()
        rates.data.fill_(math.nan)  # the gradient is that of the forward pass all the same
        for grad, again in zip(one, torch.autograd.grad(weighted(sol.y), (y0, rates)), strict=True):
            assert torch.equal(grad, again)

    def test_compiles_once(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 5)
        assert solve("compiled", func, y0, args=(p,)).stats.compile_seconds >= 0
        again = solve("compiled", func, y0 * 2, 2 * T, (p * 3,), rtol=1e-3)
        assert again.stats.compile_seconds == 0


def test_memory_is_bounded() -> None:
    func, y0, p = inputs_of("van_der_pol", 512)
    kept = []
    for i in range(60):
        if i == 20:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sol = solve("compiled", func, y0, args=(p,))
        weighted(sol.y).backward()
        kept.append(sol)  # with its steps, but not the states, which go with the graph
    n_bytes = int(sol.stats.n_accepted.sum()) * 8 * 9  # an entry and a state of two numbers
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < 40 * n_bytes
    kept.clear()
    for _ in range(40):
        solve("compiled", func, y0, args=(p,))
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 40 * n_bytes


def resident(which: str) -> int:
    """Memory of this process in bytes: now (VmRSS), or the largest since ``forget_peak`` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def forget_peak() -> int:
    """The memory of this process now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


class TestProgress:
    @pytest.mark.parametrize("n_samples", [3, 3000])
    def test_counts_samples(self, n_samples: int, capsys: pytest.CaptureFixture[str]) -> None:
        func, y0, p = inputs_of("lotka_volterra", n_samples)
        plain = solve("compiled", func, y0, args=(p,))
        capsys.readouterr()
        watched = solve("compiled", func, y0, args=(p,), progress=True)
        assert torch.equal(watched.y, plain.y)
        written = capsys.readouterr().err
        total = "3.00k" if n_samples == 3000 else "3.00"
        assert f"100%|██████████| {total}/{total} " in written
        assert len(watched.steps) == n_samples  # which are found by another solve
        weighted(watched.y).backward()
        assert not capsys.readouterr().err

    def test_names_the_package_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(errors.NotInstalledError, match="pip install tqdm"):
            solve("compiled", lambda t, y: -y, torch.ones(2, 1), progress=True)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is known on Linux only")
    def test_memory_does_not_grow_with_the_steps(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 50_000)
        with torch.no_grad():
            solve("compiled", func, y0, [0.0, 0.1], args=(p,), progress=True)
            before = forget_peak()
            sol = solve("compiled", func, y0, [0.0, 20.0], args=(p,), rtol=1e-6, progress=True)
        n_bytes = int(sol.stats.n_accepted.sum()) * 8 * 9  # an entry and a state of two numbers
        assert n_bytes > 2e8
        assert resident("VmHWM") - before < 0.2 * n_bytes


def weighted_by_sample(y: Tensor) -> Tensor:
    """A loss that gives each output the same weight whatever its place in the batch."""
    return (y * torch.linspace(0.3, 1.7, len(y), dtype=y.dtype)[:, None, None]).sum()


class TestFailures:
    def failing(self, error: type[errors.SolveError], func: Any, y0: Tensor, **call: Any) -> errors.SolveError:
        found = []
        for engine in ("eager", "compiled"):
            with pytest.raises(error) as raised:
                solve(engine, func, y0, **call)
            found.append(raised.value)
        eager, compiled = found
        assert compiled.sample == eager.sample
        assert str(compiled).partition(" (t=")[0] == str(eager).partition(" (t=")[0]
        return compiled

    def test_blow_up_names_the_sample(self) -> None:
        y0 = torch.tensor([[0.1], [2.0], [0.2]], dtype=torch.float64)
        error = self.failing(errors.SolveError, lambda t, y: y * y, y0)
        assert error.sample == 1
        assert 0.4 < error.t <= 0.5001

    def test_step_limit(self) -> None:
        y0 = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
        rates = torch.tensor([[1.0], [300.0]], dtype=torch.float64)
        error = self.failing(
            errors.StepLimitError, lambda t, y: torch.cos(rates * t), y0, options={"max_num_steps": 20}
        )
        assert error.sample == 1
        assert error.n_accepted + error.n_rejected == 20

    def test_func_or_state_that_is_not_finite(self) -> None:
        y0 = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64)
        error = self.failing(errors.NonFiniteError, lambda t, y: torch.sqrt(y), y0)
        assert error.sample == 1
        y0[2] = math.nan
        with pytest.raises(errors.NonFiniteError, match=r"sample 2 .*y0 holds NaN"):
            solve("compiled", lambda t, y: -y, y0)

    def test_no_tolerance(self) -> None:
        y0 = torch.ones(2, 2, dtype=torch.float64)
        atol = torch.tensor([[1e-3, 1e-3], [0.0, 1e-3]], dtype=torch.float64)
        error = self.failing(errors.StepSizeError, lambda t, y: torch.cos(3 * t) * y, y0, rtol=0.0, atol=atol)
        assert error.sample == 1
        assert "rtol and atol are both zero" in str(error)

    def test_samples_that_fail_as_nan(self) -> None:
        y0 = torch.tensor([[0.1], [2.0], [0.2], [math.nan], [0.3]], dtype=torch.float64, requires_grad=True)
        rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        own = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)

        def func(t: Tensor, y: Tensor, rate: Tensor, own: Tensor) -> Tensor:
            return rate * own * y * y

        sol = solve("compiled", func, y0, args=(rate, own), options={"on_failure": "nan"})
        assert [error.sample for error in sol.stats.failures] == [1, 3]
        assert [type(error) for error in sol.stats.failures] == [errors.StepSizeError, errors.NonFiniteError]
        good = [0, 2, 4]
        assert sol.y[:, [1, 3]].isnan().all()
        alone = solve("compiled", func, y0[good], args=(rate, own[good]))
        assert torch.equal(sol.y[:, good], alone.y)
        found, expected = (
            torch.autograd.grad(y.square().sum(), [y0, rate, own], retain_graph=True) for y in (sol.y[:, good], alone.y)
        )
        for grad, exact in zip(found, expected, strict=True):
            assert torch.equal(grad, exact)
        found = torch.autograd.grad(sol.y.square().nansum(), [y0, rate, own], allow_unused=True)
        for grad, exact in zip(found, expected, strict=True):
            assert torch.equal(grad, exact)

    def test_the_option_for_failures(self) -> None:
        y0 = torch.ones(2, 1, dtype=torch.float64)
        for engine, options, match in (
            ("compiled", {"on_failure": "none"}, '"raise"'),
            ("compiled", {"on_failure": "nan", "batch": "common"}, 'batch="independent"'),
        ):
            with pytest.raises(errors.OptionError, match=match):
                solve(engine, lambda t, y: -y, y0, options=options)
        t = T.clone().requires_grad_()
        with pytest.raises(errors.OptionError, match="require grad"):
            solve("compiled", lambda t, y: -y, y0, t, options={"on_failure": "nan"})


def test_pickled_statistics_hold_no_more_than_their_numbers() -> None:
    n = 1000
    func, y0, p = inputs_of("lotka_volterra", n)
    stats = solve("compiled", func, y0.detach(), args=(p.detach(),)).stats
    assert stats.compiled == "solve"
    assert len(pickle.dumps(stats)) < 3 * 8 * n + 4000  # n_steps, n_accepted and n_rejected
