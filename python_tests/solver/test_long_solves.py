"""Long solves: with a callback or a progress bar, stopped at the step limit, and resumed as if never stopped."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from autograd_reference import relative_error, solve_over
from problems import CoupledMlp, DrivenMlp, Mlp, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors

pytestmark = pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")

ADAPTIVE = [name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive]
TIMES = [0.0, 0.11, 0.5, 1.3, 2.0]
STOP = {"on_step_limit": "stop"}


class Dropping(Mlp):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(t, y), 0.1, training=True)


class Normalised(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(self.norm(y)) * torch.cos(t)


def as_tuple(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def in_parts(func: Any, y0: Any, times: list[float], limit: int, **call: Any) -> tuple[aca_ext.Solution, int]:
    """A solve in parts of at most ``limit`` trial steps, and the number of its parts."""
    options = call.pop("options", {}) | STOP | {"max_num_steps": limit}
    sol = aca_ext.solve(func, y0, torch.tensor(times, dtype=torch.float64), options=options, **call)
    parts = 1
    while not sol.is_complete:
        assert sol.t_reached < times[-1] if times[-1] > times[0] else sol.t_reached > times[-1]
        assert len(sol.t) == as_tuple(sol.y)[0].shape[0] < len(times)
        sol = sol.resume()
        parts += 1
    return sol, parts


CASES: dict[str, Any] = {
    **{name: lambda name=name: (DrivenMlp(), sample(2, 3), {"method": name, "rtol": 1e-3}) for name in ADAPTIVE},
    "rejections": lambda: (DrivenMlp(), sample(2, 3), {"options": {"first_step": 1.3, "max_step": 0.3}}),
    "pid": lambda: (DrivenMlp(), sample(2, 3), {"options": {"pcoeff": 0.2, "icoeff": 0.4, "dcoeff": 0.1}}),
    "jumps": lambda: (DrivenMlp(), sample(2, 3), {"options": {"jump_t": [0.3, 0.9], "step_t": [0.7], "max_step": 0.1}}),
    "tuple": lambda: (CoupledMlp(), (sample(4, 3), sample(3)), {}),
    "dropout": lambda: (Dropping(), sample(4, 3), {"rtol": 0.3, "atol": 0.3, "options": {"max_step": 0.1}}),
    "dropout without fsal": lambda: (
        *(Dropping(), sample(4, 3)),
        {"rtol": 0.3, "atol": 0.3, "method": "adaptive_heun", "options": {"max_step": 0.1}},
    ),
    "batch norm": lambda: (Normalised(), sample(4, 3), {"options": {"max_step": 0.2}}),
    "thinned": lambda: (DrivenMlp(), sample(2, 3), {"checkpoints": 2}),
    "channels last": lambda: (
        *(lambda t, y: -y * t, sample(2, 3, 4, 5).to(memory_format=torch.channels_last), {"rtol": 1e-9}),
    ),
}


class TestResume:
    @pytest.mark.parametrize("gradient", ["aca", "direct", "none"])
    @pytest.mark.parametrize("limit", [1, 3, 7])
    @pytest.mark.parametrize("case", CASES)
    def test_is_bitwise_the_solve_that_never_stopped(self, case: str, limit: int, gradient: str) -> None:
        found = []
        parts = 0
        for is_whole in (True, False):
            torch.manual_seed(0)
            func, y0, call = CASES[case]()
            call = {"rtol": 1e-5, "atol": 1e-6} | call
            leaves = [y.requires_grad_(gradient != "none") for y in as_tuple(y0)]
            if isinstance(func, DrivenMlp):
                call["args"] = (sample(3, seed=1).requires_grad_(gradient != "none"), 0.4)
                leaves.append(call["args"][0])
            if gradient == "direct":
                call.pop("checkpoints", None)
                call["gradient"] = "direct"
            with torch.set_grad_enabled(gradient != "none"):
                if is_whole:
                    sol = aca_ext.solve(func, y0, torch.tensor(TIMES, dtype=torch.float64), **call)
                else:
                    sol, parts = in_parts(func, y0, TIMES, limit, **call)
            ys = as_tuple(sol.y)
            result = [sol.t, sol.steps, *ys, torch.get_rng_state()]
            result += [torch.tensor([getattr(sol.stats, n) for n in ("n_steps", "n_accepted", "n_rejected")])]
            if isinstance(func, nn.Module):
                result += [b.clone() for b in func.buffers()]
            grads: tuple[Tensor, ...] = ()
            if gradient != "none":
                leaves += func.parameters() if isinstance(func, nn.Module) else []
                grads = torch.autograd.grad(sum((y * sample(*y.shape, seed=2)).sum() for y in ys), leaves)
            found.append((result, grads, sol))
        (whole, whole_grads, _), (joined, grads, sol) = found
        assert parts == -(-sol.stats.n_steps // limit)
        for one, other in zip(joined, whole, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(grads, whole_grads, strict=True):
            assert relative_error(one, other) <= 1e-12  # the sums have another order
        assert as_tuple(sol.y)[0][-1].stride() == as_tuple(CASES[case]()[1])[0].stride()

    def test_gradient_against_autograd_over_the_steps_of_all_parts(self) -> None:
        func, y0 = Mlp(), sample(2, 3).requires_grad_()
        sol, parts = in_parts(func, y0, TIMES, 4, rtol=1e-9, atol=1e-9)
        assert parts > 2
        truth = solve_over(func, y0, TIMES, sol.steps.tolist(), "dopri5")
        wanted = [y0, *func.parameters()]
        for grad, exact in zip(
            *(torch.autograd.grad((y * sample(*y.shape)).sum(), wanted) for y in (sol.y, truth)), strict=True
        ):
            assert relative_error(grad, exact) <= 1e-12

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_goes_on_beyond_its_end(self, sign: float) -> None:
        """The steps are those of one solve in which the first end is a requested time to land on."""
        func, y0 = Mlp(), sample(2, 3).requires_grad_()
        first = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64) * sign
        further = torch.tensor([1.5, 2.5], dtype=torch.float64) * sign
        call = {"rtol": 1e-7, "atol": 1e-7}
        sol = aca_ext.solve(func, y0, first, options=STOP, **call)
        assert sol.is_complete
        assert sol.t_reached == sign
        assert torch.equal(sol.y_reached, sol.y[-1])
        longer = sol.resume(further)
        whole = aca_ext.solve(func, y0, torch.cat([first, further]), options={"step_t": [sign]}, **call)
        assert torch.equal(longer.t, whole.t)
        assert torch.equal(longer.y, whole.y)
        assert torch.equal(longer.steps, whole.steps)
        assert torch.equal(*(torch.autograd.grad(s.y[-1].sum(), y0)[0] for s in (longer, whole)))

    def test_a_partial_solution_has_gradients_of_its_own(self) -> None:
        func, y0 = Mlp(), sample(2, 3).requires_grad_()
        sol = aca_ext.solve(func, y0, TIMES, rtol=1e-6, atol=1e-6, options=STOP | {"max_num_steps": 5})
        assert not sol.is_complete
        times = [*sol.t.tolist(), sol.t_reached]
        truth = solve_over(func, y0, times, sol.steps.tolist(), "dopri5")
        for found, expected in ((sol.y, truth[:-1]), (sol.y_reached, truth[-1])):
            one, other = (torch.autograd.grad(y.square().sum(), y0, retain_graph=True)[0] for y in (found, expected))
            assert relative_error(one, other) <= 1e-12

    def test_the_limit_may_change(self) -> None:
        sol = aca_ext.solve(Mlp(), sample(2, 3), TIMES, options=STOP | {"max_num_steps": 2})
        assert sol.stats.n_steps == 2
        assert sol.resume(max_num_steps=1).stats.n_steps == 3
        assert sol.resume(max_num_steps=1000).is_complete
        assert sol.stats.n_steps == 2  # resuming leaves the first solution unchanged

    def test_refusals(self) -> None:
        y0 = sample(2, 3)
        plain = aca_ext.solve(Mlp(), y0, TIMES)
        assert plain.is_complete
        with pytest.raises(errors.ArgumentValueError, match="on_step_limit"):
            plain.resume([3.0])
        done = aca_ext.solve(Mlp(), y0, TIMES, options=STOP)
        with pytest.raises(errors.ArgumentValueError, match="give further times"):
            done.resume()
        with pytest.raises(errors.TimeError, match="direction of the solve"):
            done.resume([1.0])
        with pytest.raises(errors.ArgumentTypeError, match="requires grad"):
            done.resume(torch.tensor([3.0], requires_grad=True))
        with pytest.raises(errors.OptionError, match='"stop"'):
            aca_ext.solve(Mlp(), y0, TIMES, options={"on_step_limit": "pause"})
        with pytest.raises(errors.UnknownNameError, match="adaptive steps"):
            aca_ext.solve(Mlp(), y0, TIMES, method="rk4", options=STOP)
        with pytest.raises(errors.OptionError, match="not available"):
            aca_ext.solve(Mlp(), y0, TIMES, options=STOP | {"batch": "independent"})
        for gradient in ("naive", "adjoint"):
            with pytest.raises(errors.OptionError, match="on_step_limit"):
                aca_ext.solve(Mlp(), y0, TIMES, gradient=gradient, options=STOP)
        with pytest.raises(errors.OptionError, match="on_step_limit"):
            aca_ext.solve(Mlp(), y0, torch.tensor([0.0, 1.0], requires_grad=True), options=STOP)

    def test_a_part_without_an_accepted_step(self) -> None:
        y0 = torch.ones(2, requires_grad=True)
        options = STOP | {"max_num_steps": 1, "first_step": 100.0}
        sol = aca_ext.solve(lambda t, y: -y * y, y0, [0.0, 100.0], options=options)
        assert (sol.stats.n_accepted, sol.t_reached, sol.t.tolist(), sol.is_complete) == (0, 0.0, [0.0], False)
        assert torch.equal(sol.y_reached, y0)
        while not sol.is_complete:
            sol = sol.resume(max_num_steps=1)
        (grad,) = torch.autograd.grad(sol.y[-1].sum(), y0)
        torch.testing.assert_close(grad, torch.full((2,), 1 / 101**2), rtol=1e-3, atol=0.0)


class TestCallback:
    @pytest.mark.parametrize("gradient", [*aca_ext.GRADIENTS, "none"])
    def test_sees_every_trial_step(self, gradient: str) -> None:
        steps: list[aca_ext.Step] = []
        func, y0 = Mlp(), sample(2, 3).requires_grad_()
        call = {"rtol": 1e-6, "atol": 1e-6, "options": {"first_step": 1.5}}
        with torch.set_grad_enabled(gradient != "none"):
            call["gradient"] = "aca" if gradient == "none" else gradient
            plain = aca_ext.solve(func, y0, TIMES, **call)
            sol = aca_ext.solve(func, y0, TIMES, callback=steps.append, **call)
        assert torch.equal(sol.y, plain.y)
        assert sol.stats == plain.stats
        assert len(steps) == sol.stats.n_steps
        assert [(s.t, s.t_next) for s in steps if s.is_accepted] == [tuple(s) for s in sol.steps.tolist()]
        assert all((s.error_ratio <= 1) == s.is_accepted for s in steps)
        assert sum(not s.is_accepted for s in steps) == sol.stats.n_rejected > 0
        last = steps[-1]
        assert (last.n_steps, last.n_accepted, last.n_rejected) == (
            sol.stats.n_steps, sol.stats.n_accepted, sol.stats.n_rejected)  # fmt: skip
        assert [s.n_f_evals for s in steps] == sorted(s.n_f_evals for s in steps)

    def test_of_a_fixed_grid(self) -> None:
        steps: list[aca_ext.Step] = []
        sol = aca_ext.solve(Mlp(), sample(2, 3), TIMES, method="rk4", callback=steps.append)
        assert [(s.t, s.t_next) for s in steps] == [tuple(s) for s in sol.steps.tolist()]
        assert all(math.isnan(s.error_ratio) for s in steps)
        assert [s.n_steps for s in steps] == [1, 2, 3, 4]
        assert sol.stats.n_steps == 4

    def test_of_independent_samples(self) -> None:
        steps: list[aca_ext.Step] = []
        y0 = sample(3, 3) * torch.tensor([[1.0], [5.0], [20.0]])
        sol = aca_ext.solve(Mlp(), y0, TIMES, callback=steps.append, options={"batch": "independent"})
        for i in range(3):
            taken = [(s.t[i].item(), s.t_next[i].item()) for s in steps if s.is_accepted[i]]
            assert taken == [tuple(s) for s in sol.steps[i].tolist()]
        assert torch.equal(steps[-1].n_steps, sol.stats.n_steps)

    def test_may_end_the_solve(self) -> None:
        def give_up(step: aca_ext.Step) -> None:
            if step.n_steps == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            aca_ext.odeint(Mlp(), sample(2, 3), TIMES, callback=give_up)

    def test_must_be_callable(self) -> None:
        with pytest.raises(errors.ArgumentTypeError, match="callback"):
            aca_ext.odeint(Mlp(), sample(2, 3), TIMES, callback=3)

    def test_of_a_layer(self) -> None:
        steps: list[aca_ext.Step] = []
        aca_ext.NeuralODE(Mlp(), callback=steps.append)(sample(2, 3))
        assert steps


class TestProgress:
    @pytest.mark.parametrize("options", [{}, {"batch": "independent"}, {"step_size": 0.1}], ids=str)
    def test_fills_in_units_of_time(self, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("tqdm")
        seen: list[aca_ext.Step] = []
        plain = aca_ext.odeint(Mlp(), sample(2, 3), TIMES, options=options)
        y = aca_ext.odeint(Mlp(), sample(2, 3), TIMES, options=options, progress=True, callback=seen.append)
        assert torch.equal(y, plain)
        assert seen
        written = capsys.readouterr()
        assert "100%" in written.err
        assert "t: 2/2" in written.err
        assert f"steps={len(seen)}" in written.err
        assert not written.out

    def test_of_a_solve_backward_in_time(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("tqdm")
        aca_ext.odeint(Mlp(), sample(2, 3), [3.0, -1.0], progress=True)
        assert "t: 4/4" in capsys.readouterr().err

    def test_names_the_package_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(errors.NotInstalledError, match="pip install tqdm"):
            aca_ext.odeint(Mlp(), sample(2, 3), TIMES, progress=True)
        assert issubclass(errors.NotInstalledError, ImportError)
