"""Implicit methods on compiled lanes: steps, iterations and gradients of the eager engine, for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import DrivenMlp, sample
from test_ensemble import weighted
from torch import Tensor

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.ensemble import run as lanes_run

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

METHODS = ["kvaerno3", "kvaerno5", "trbdf2"]
BATCH = 11  # more than one bundle of lanes, and no multiple of one
OF_NEWTON = ("n_jacobians", "n_factorizations", "n_newton_iterations")
T = torch.tensor([0.0, 0.3, 0.31, 4.0, 40.0], dtype=torch.float64)


def robertson(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Robertson's reaction, whose rates belong to the sample; the first one depends on time."""
    a, b, c = y.unbind(-1)
    made, back = p[..., 0] * a * (1 + 0.5 * torch.sin(t[..., 0])), 1e4 * p[..., 1] * b * c
    used = 3e7 * b * b
    return torch.stack([back - made, made - back - used, used], -1)


def robertson_at_rest(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """The reaction with rates that do not change."""
    return robertson(torch.zeros_like(t), y, p)


def van_der_pol(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return torch.stack([v, p[..., 0] * ((1 - x * x) * v - x)], -1)


def hires(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    a, b, c, d, e, f, g, h = y.unbind(-1)
    bound, decayed = p[..., 0] * f * h, 1.81 * g
    slopes = (
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
        1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * (f + g),
        -bound + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        bound - decayed,
        decayed - bound,
    )
    return torch.stack(slopes, -1)


@dataclass(frozen=True)
class System:
    func: Callable[..., Tensor]
    y0: tuple[float, ...]
    p: Tensor  # a row for each sample, of different stiffness
    t: Tensor
    atol: float

    def inputs(self, n: int = BATCH) -> tuple[Tensor, Tensor]:
        y0 = torch.tensor(self.y0, dtype=torch.float64).repeat(n, 1)
        return y0.requires_grad_(), self.p[:n].clone().requires_grad_()


def rates(first: float, last: float, others: tuple[float, ...] = ()) -> Tensor:
    of_samples = torch.logspace(math.log10(first), math.log10(last), BATCH, dtype=torch.float64)[:, None]
    return torch.cat([of_samples, torch.tensor(others, dtype=torch.float64).expand(BATCH, -1)], 1)


SYSTEMS = {
    "robertson": System(robertson, (1.0, 0.0, 0.0), rates(0.002, 3.0, (1.0,)), T, 1e-8),
    "van_der_pol": System(van_der_pol, (2.0, -0.6), rates(1.0, 1e3), T[:4] / 4, 1e-6),
    "hires": System(hires, (1.0, 0, 0, 0, 0, 0, 0, 0.0057), rates(28.0, 2800.0), T, 1e-7),
}


def solve(engine: str, func: Any, y0: Any, t: Any, args: Any = (), **call: Any) -> aca_ext.Solution:
    options = {"batch": "independent"} | call.pop("options", {})
    call = {"method": "kvaerno5", "rtol": 1e-5, "atol": 1e-8} | call
    return aca_ext.solve(func, y0, t, args=args, options=options, engine=engine, **call)


def both(func: Any, y0: Any, t: Any, args: Any = (), **call: Any) -> tuple[aca_ext.Solution, aca_ext.Solution]:
    """The solution on lanes, and that of the eager engine, with the same steps and iterations."""
    lanes, eager = (solve(engine, func, y0, t, args, **call) for engine in ("compiled", "eager"))
    assert lanes.stats.compiled == "solve", lanes.stats.reason
    assert lanes.stats.n_steps.tolist() == eager.stats.n_steps.tolist()
    assert lanes.stats.n_accepted.tolist() == eager.stats.n_accepted.tolist()
    for name in OF_NEWTON:
        assert getattr(lanes.stats, name) == getattr(eager.stats, name)
    return lanes, eager


def gradients(solution: aca_ext.Solution, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(weighted(solution.y.nan_to_num()), inputs)


class TestSteps:
    # Each method on one system, and each system by one method: lanes have no code for a pair of them.
    @pytest.mark.parametrize(
        ("name", "method"),
        [*(("robertson", method) for method in METHODS), ("van_der_pol", "kvaerno5"), ("hires", "kvaerno5")],
    )
    def test_and_gradients_are_those_of_the_eager_engine(self, name: str, method: str) -> None:
        system = SYSTEMS[name]
        inputs = system.inputs()
        lanes, eager = both(system.func, inputs[0], system.t, inputs[1:], method=method, rtol=1e-3, atol=system.atol)
        assert lanes.stats.n_steps.max() > lanes.stats.n_steps.min()
        assert relative_error(lanes.y, eager.y) <= 1e-9
        for found, expected in zip(gradients(lanes, inputs), gradients(eager, inputs), strict=True):
            assert relative_error(found, expected) <= 1e-8

    @pytest.mark.parametrize("name", SYSTEMS)
    def test_of_a_sample_are_those_it_takes_alone_bit_for_bit(self, name: str) -> None:
        system = SYSTEMS[name]
        y0, p = system.inputs()  # with gradients, so that their library is that of the test above
        together = solve("compiled", system.func, y0, system.t, (p,))
        for i in (0, 4, BATCH - 1):
            alone = solve("compiled", system.func, y0[i : i + 1], system.t, (p[i : i + 1],))
            assert torch.equal(alone.y[:, 0], together.y[:, i])
            assert torch.equal(alone.steps[0], together.steps[i])

    def test_evaluations_are_those_of_the_samples_alone(self) -> None:
        system = SYSTEMS["robertson"]
        y0, p = (x.detach() for x in system.inputs())
        together = solve("compiled", system.func, y0, T, (p,))
        alone = [solve("eager", system.func, y0[i : i + 1], T, (p[i : i + 1],)) for i in range(BATCH)]
        assert together.stats.n_f_rows == sum(one.stats.n_f_evals for one in alone)
        assert together.stats.n_f_evals == max(one.stats.n_f_evals for one in alone)

    def test_of_many_samples_on_two_threads(self) -> None:
        system, n = SYSTEMS["robertson"], 700
        p = system.p[torch.arange(n) % BATCH].clone().requires_grad_()
        y0 = system.inputs(1)[0].detach().expand(n, -1)
        few = solve("compiled", system.func, y0[:BATCH], T, (p[:BATCH].detach(),))
        found = []
        for threads in (1, 2):
            with Threads(threads):
                many = solve("compiled", system.func, y0, T, (p,))
                found.append((many.y, *torch.autograd.grad(many.y.square().sum(), p)))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
        assert torch.equal(found[0][0][:, BATCH : 2 * BATCH], few.y)


class Threads:
    """Context with a number of threads."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._n)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


class TestGradients:
    @pytest.mark.parametrize("method", METHODS)
    def test_are_those_of_finite_differences(self, method: str) -> None:
        system = SYSTEMS["robertson"]
        y0, p = system.inputs(3)
        # Tight, since steps that follow the perturbed problem add their error to the difference.
        call: dict[str, Any] = {"method": method, "rtol": 1e-9 if method == "kvaerno5" else 1e-7, "atol": 1e-13}
        grad = torch.autograd.grad(solve("compiled", robertson, y0, T[:4], (p,), **call).y[-1, :, 2].sum(), p)[0]
        with torch.no_grad():
            for column in (0, 1):
                step = 1e-4 * p[:, column]
                ends = []
                for sign in (1, -1):
                    moved = p.detach().clone()
                    moved[:, column] += sign * step
                    ends.append(solve("compiled", robertson, y0, T[:4], (moved,), **call).y[-1, :, 2])
                expected = (ends[0] - ends[1]) / (2 * step)
                assert relative_error(grad[:, column], expected) <= (1e-3 if method == "trbdf2" else 1e-4)

    @pytest.mark.parametrize("newton_tol", [1e-1, 1e-7])
    def test_do_not_depend_on_the_tolerance_of_newtons_method(self, newton_tol: float) -> None:
        y0, p = SYSTEMS["robertson"].inputs()
        options = {"newton_tol": newton_tol}
        lanes, eager = both(robertson, y0, T, (p,), options=options)
        for found, expected in zip(gradients(lanes, (y0, p)), gradients(eager, (y0, p)), strict=True):
            assert relative_error(found, expected) <= 1e-8

    @pytest.mark.parametrize("method", METHODS)
    def test_of_long_solves_at_a_loose_tolerance(self, method: str) -> None:
        """Steps so long that the state before them is no start from which iterations find the same solution again."""
        p = torch.tensor([[0.04, 1.0]], dtype=torch.float64) * torch.logspace(-2, 1, 4, dtype=torch.float64)[:, None]
        y0, p = SYSTEMS["robertson"].inputs(4)[0], p.requires_grad_()
        t = torch.tensor([0.0, 1e11], dtype=torch.float64)
        lanes, eager = both(robertson_at_rest, y0, t, (p,), method=method, rtol=1e-3, atol=1e-9)
        weights = torch.tensor([1e8, 1e13, 1.0], dtype=torch.float64)  # about those of relative changes
        of_lanes, of_eager = (torch.autograd.grad((x.y[-1] * weights).sum(), (y0, p)) for x in (lanes, eager))
        for found, expected in zip(of_lanes, of_eager, strict=True):
            assert relative_error(found, expected) <= 1e-4

    def test_of_shared_parameters_and_networks(self) -> None:
        func, y0 = DrivenMlp(3, 8).double(), sample(BATCH, 3).requires_grad_()
        drive, rate = sample(3, seed=2).requires_grad_(), torch.tensor(0.5, dtype=torch.float64).requires_grad_()
        inputs = (y0, drive, rate, *func.parameters())
        lanes, eager = both(func, y0, T[:4] / 4, (drive, rate), rtol=1e-4)
        for found, expected in zip(gradients(lanes, inputs), gradients(eager, inputs), strict=True):
            assert relative_error(found, expected) <= 1e-8

    def test_of_the_times(self) -> None:
        y0, p = SYSTEMS["robertson"].inputs()
        found = []
        for engine in ("compiled", "eager"):
            t = T.clone().requires_grad_()
            found.append(gradients(solve(engine, robertson, y0, t, (p,)), (t, p)))
        for of_lanes, expected in zip(*found, strict=True):
            assert relative_error(of_lanes, expected) <= 1e-8

    def test_a_step_that_ends_elsewhere_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tasks = []
        make = lanes_run.task_of
        monkeypatch.setattr(lanes_run, "task_of", lambda *given: tasks.append(given[-1]) or make(*given))
        y0, p = SYSTEMS["robertson"].inputs()
        solution = solve("compiled", robertson, y0, T, (p,))
        ends = tasks[0][-1]  # the last tensor that the solve holds
        assert ends.shape == y0.shape
        assert torch.equal(ends, solution.y[-1])
        ends[3] += 1e-3
        with pytest.raises(errors.ReplayError, match="a step ended elsewhere"):
            gradients(solution, (y0, p))

    def test_second_ones_are_refused(self) -> None:
        y0, p = SYSTEMS["robertson"].inputs()
        y = solve("compiled", robertson, y0, T, (p,)).y
        with pytest.raises(errors.CompileError, match="no second derivatives"):
            torch.autograd.grad(y.sum(), p, create_graph=True)
