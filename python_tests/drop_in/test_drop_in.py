"""``aca_ext.torchdiffeq.odeint`` beside torchdiffeq's: arguments, options, states, callbacks, dense output."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import namedtuple
from functools import partial
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import LotkaVolterra, Mlp, sample
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import aca_ext
import aca_ext.torchdiffeq as ours
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, TimeError
from aca_ext.torchdiffeq.names import IMPLICIT

theirs = pytest.importorskip("torchdiffeq")
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
ADAPTIVE = ["dopri5", "dopri8", "tsit5", "bosh3", "fehlberg2", "adaptive_heun"]
Y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)


def decay(t: Tensor, y: Any) -> Any:
    return -y * (1 + 0.1 * t)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_same(call: Any, *, tolerance: float = 1e-12) -> None:
    one, other = call(ours), call(theirs)
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class TestFixedSteps:
    @pytest.mark.parametrize("method", FIXED)
    @pytest.mark.parametrize("interp", [None, "linear", "cubic"])
    @pytest.mark.parametrize("t", [(0.0, 0.35, 0.7, 1.0), (1.0, 0.62, 0.0)])
    def test_interpolate_between_the_nodes(self, method: str, interp: str | None, t: tuple[float, ...]) -> None:
        options = {"step_size": 0.3} if interp is None else {"step_size": 0.3, "interp": interp}
        assert_same(lambda of: of.odeint(LotkaVolterra(), Y0, times(*t), method=method, options=options))

    @pytest.mark.parametrize("interp", ["linear", "cubic"])
    def test_gradients_of_interpolated_states(self, interp: str) -> None:
        found = []
        for of in (ours, theirs):
            func, y0 = Mlp(), sample(4, 3).requires_grad_()
            options = {"step_size": 0.3, "interp": interp}
            ys = of.odeint(func, y0, times(0.0, 0.35, 1.0), method="rk4", options=options)
            found.append(torch.autograd.grad(ys.square().sum(), [y0, *func.parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-10

    def test_grid_constructor_makes_all_the_nodes(self) -> None:
        def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
            return torch.linspace(t[0], t[-1], 4, dtype=torch.float64)

        options = {"grid_constructor": grid}
        assert_same(lambda of: of.odeint(decay, Y0, times(0.0, 0.4, 1.0), method="euler", options=options))

    @pytest.mark.parametrize("t", [(0.0, 0.5, 1.0), (1.0, 0.0)])
    @pytest.mark.parametrize("method", FIXED)
    def test_perturb_moves_the_stages_at_the_ends_of_steps(self, method: str, t: tuple[float, ...]) -> None:
        seen: list[list[float]] = []
        for of in (ours, theirs):
            seen.append([])

            def func(t: Tensor, y: Tensor) -> Tensor:
                seen[-1].append(t.item())
                return -y * t

            with torch.no_grad():
                of.odeint(func, Y0, times(*t), method=method, options={"step_size": 0.5, "perturb": True})
        assert not {0.0, 0.5, 1.0} & set(seen[0])
        assert set(seen[0]) == set(seen[1])

    def test_perturb_keeps_the_gradient_exact(self) -> None:
        found = []
        for gradient in ("aca", "direct"):
            func, y0 = Mlp(), sample(4, 3).requires_grad_()
            how = {"method": "rk4", "options": {"step_size": 0.25, "perturb": True}, "gradient": gradient}
            ys = aca_ext.odeint(func, y0, times(0.0, 1.0), **how)
            found.append(torch.autograd.grad(ys.square().sum(), [y0, *func.parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_a_jump_at_a_node_is_seen_from_inside_the_steps(self) -> None:
        def jump(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t < 0.5, torch.ones_like(y), -torch.ones_like(y))

        options = {"step_size": 0.5, "perturb": True}
        ys = ours.odeint(jump, torch.zeros(1, dtype=torch.float64), times(0.0, 1.0), method="heun2", options=options)
        assert ys[-1].item() == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        t = torch.linspace(0, 1, 9, dtype=dtype)
        assert_same(lambda of: of.odeint(lambda t, y: -y, Y0.to(dtype), t, method="euler"), tolerance=1e-2)


class TestAdaptiveSteps:
    @pytest.mark.parametrize("method", [method for method in ADAPTIVE if method != "tsit5"])
    @pytest.mark.parametrize("t", [(0.0, 0.5, 2.0), (2.0, 0.7, 0.0)])
    def test_values(self, method: str, t: tuple[float, ...]) -> None:
        how = {"method": method, "rtol": 1e-6, "atol": 1e-6}
        assert_same(lambda of: of.odeint(LotkaVolterra(), Y0, times(*t), **how), tolerance=1e-3)

    def test_step_size_is_ignored_with_a_warning(self) -> None:
        stiff = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(stiff.weight, -10.0)
        y0 = torch.ones(1, dtype=torch.float64)
        options = {"step_size": 1, "max_iters": 100}
        with pytest.warns(UserWarning, match="step_size.*max_iters"):
            ys = ours.odeint(lambda t, y: stiff(y), y0, times(0.0, 1.0), rtol=1e-6, atol=1e-6, options=options)
        assert abs(ys[-1].item() - 4.54e-5) < 1e-6

    @pytest.mark.parametrize("options", [{"min_step": 0.5}, {"min_step": 0.5, "max_step": 0.6}])
    def test_a_step_of_min_step_is_accepted(self, options: dict[str, float]) -> None:
        counts = []
        for of in (ours, theirs):
            func = Mlp()
            func.register_forward_hook(lambda *_, calls=counts: calls.append(None))
            counts.clear()
            ys = of.odeint(func, sample(4, 3), times(0.0, 4.0), rtol=1e-12, atol=1e-12, options=options)
            assert torch.isfinite(ys).all()
            assert len(counts) < 70

    def test_min_step_is_an_error_without_the_option(self) -> None:
        with pytest.raises(aca_ext.errors.StepSizeError):
            aca_ext.odeint(Mlp(), sample(4, 3), times(0.0, 4.0), rtol=1e-12, atol=1e-12, options={"min_step": 0.5})

    def test_gradient_of_steps_accepted_at_min_step(self) -> None:
        found = []
        for gradient in ("aca", "direct"):
            func, y0 = Mlp(), sample(4, 3).requires_grad_()
            options = {"min_step": 0.5, "on_min_step": "accept"}
            ys = aca_ext.odeint(func, y0, times(0.0, 4.0), options=options, gradient=gradient)
            found.append(torch.autograd.grad(ys.square().sum(), [y0, *func.parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_the_step_limit_holds_for_each_interval(self) -> None:
        how = {"rtol": 1e-9, "atol": 1e-9, "options": {"max_num_steps": 30}}
        t = torch.linspace(0, 10, 41, dtype=torch.float64)
        n_steps = aca_ext.solve(LotkaVolterra(), Y0, t, rtol=1e-9, atol=1e-9).stats.n_steps
        assert n_steps > 30
        assert_same(lambda of: of.odeint(LotkaVolterra(), Y0, t, **how), tolerance=1e-6)
        with pytest.raises(aca_ext.errors.StepLimitError):
            ours.odeint(LotkaVolterra(), Y0, t[[0, -1]], **how)

    def test_the_last_step_ends_at_the_last_time(self) -> None:
        latest = []
        for of in (ours, theirs):
            seen: list[float] = []
            with torch.no_grad():
                of.odeint(lambda t, y, seen=seen: (seen.append(float(t)), -y)[1], Y0, times(0.0, 1.0))
            latest.append(max(seen))
        assert latest[0] == 1.0 < latest[1]

    def test_a_step_of_min_step_that_is_not_finite(self) -> None:
        with pytest.raises(aca_ext.errors.NonFiniteError):
            ours.odeint(lambda t, y: y / (t - 0.5).clamp(max=0), Y0, times(0.0, 1.0), options={"min_step": 0.3})

    def test_dtype_is_accepted(self) -> None:
        how = {"options": {"dtype": torch.float32}}
        assert_same(lambda of: of.odeint(decay, Y0, times(0.0, 1.0), rtol=1e-4, **how), tolerance=1e-3)
        with pytest.raises(aca_ext.errors.OptionError, match="dtype"):
            ours.odeint(decay, Y0, times(0.0, 1.0), options={"dtype": "float32"})

    @pytest.mark.parametrize("name", ["grid_points", "eps", "max_order", "step_sise"])
    def test_unknown_options_warn(self, name: str) -> None:
        with pytest.warns(UserWarning, match=name):
            ys = ours.odeint(decay, Y0, times(0.0, 1.0), options={name: 1})
        assert torch.equal(ys, ours.odeint(decay, Y0, times(0.0, 1.0)))

    def test_gradients_are_exact(self) -> None:
        found = []
        for of in (ours, theirs):
            func, y0 = Mlp(), sample(4, 3).requires_grad_()
            ys = of.odeint(func, y0, times(0.0, 0.5, 1.5), rtol=1e-10, atol=1e-10)
            found.append(torch.autograd.grad(ys.square().sum(), [y0, *func.parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-8


class TestTolerances:
    @pytest.mark.parametrize("make", [lambda x: [x], lambda x: torch.tensor([x]), lambda x: [x, 2 * x]])
    def test_of_a_tensor_state(self, make: Any) -> None:
        how = {"rtol": make(1e-5), "atol": make(1e-6)}
        ys = ours.odeint(decay, Y0, times(0.0, 1.0), **how)
        how = {name: torch.as_tensor(value) for name, value in how.items()}
        torch.testing.assert_close(ys, theirs.odeint(decay, Y0, times(0.0, 1.0), **how), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("second", [1e20, torch.full((6,), 1e-3)])
    def test_of_a_tuple_state(self, second: Any) -> None:
        y0 = (Y0, torch.ones(2, 3, dtype=torch.float64))

        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return -y[0], y[1].cos()

        how = {"rtol": [1e-6, second], "atol": (1e-6, second)}
        assert_same(lambda of: of.odeint(func, y0, times(0.0, 1.0), **how)[0], tolerance=1e-5)

    def test_of_the_wrong_number(self) -> None:
        with pytest.raises(aca_ext.errors.ToleranceError, match="3 entries"):
            ours.odeint(lambda t, y: y, (Y0, Y0), times(0.0, 1.0), rtol=[1e-3] * 3)


class TestStates:
    def test_tuples_of_mixed_dtype_and_slopes_of_other_shapes(self) -> None:
        y0 = (torch.ones(2, 3), torch.ones(2, dtype=torch.float64))

        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> list[Tensor]:
            return [-y[0].reshape(6), y[1].cos()[:, None]]

        found = [of.odeint(func, y0, times(0.0, 1.0)) for of in (ours, theirs)]
        for one, other in zip(*found, strict=True):
            assert one.dtype == other.dtype == torch.float64
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

    def test_slopes_of_another_dtype(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y.double()

        for method in ("euler", "dopri5"):
            found = [of.odeint(func, Y0.float(), times(0.0, 1.0), method=method) for of in (ours, theirs)]
            assert found[0].dtype == torch.float32
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)

    def test_slopes_of_another_shape_stay_an_error(self) -> None:
        with pytest.raises(aca_ext.errors.SlopeError):
            ours.odeint(lambda t, y: y.sum(), Y0, times(0.0, 1.0))

    def test_namedtuples(self) -> None:
        Pair = namedtuple("Pair", "a b")
        y = ours.odeint(lambda t, y: (-y.a, y.b), Pair(Y0, Y0), times(0.0, 1.0))
        assert type(y) is Pair

    def test_times_that_require_grad_later(self) -> None:
        found = []
        for of in (ours, theirs):
            t = times(0.0, 0.5, 1.0)
            t.requires_grad_()
            of.odeint(decay, Y0, t, rtol=1e-10, atol=1e-10)[-1].sum().backward()
            found.append(t.grad)
        assert relative_error(found[0][-1], found[1][-1]) <= 1e-6

    @pytest.mark.parametrize("call", ["odeint", "odeint_adjoint"])
    def test_modules_behave_as_in_a_solve_without_the_drop_in(self, call: str) -> None:
        """Random numbers are replayed, and statistics of batch normalisation move as they do in aca_ext.odeint."""
        found = []
        for odeint in (getattr(ours, call), partial(aca_ext.odeint, gradient="aca" if call == "odeint" else "adjoint")):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.2)).double()
            nn.init.ones_(net[0].weight)
            nn.init.zeros_(net[0].bias)

            class Net(nn.Module):
                def __init__(self, net: nn.Module) -> None:
                    super().__init__()
                    self.net = net

                def forward(self, t: Tensor, y: Tensor) -> Tensor:
                    return self.net(y)

            y0, func = sample(8, 3).requires_grad_(), Net(net)
            with pytest.warns(aca_ext.errors.BatchStatisticsWarning):
                ys = odeint(func, y0, times(0.0, 0.4), rtol=1e-2, atol=1e-2, options={"min_step": 0.0})
            grads = torch.autograd.grad(ys.square().sum(), [y0, *func.parameters()])
            found.append([ys, *grads, *func.buffers()])
        torch.testing.assert_close(*found)

    def test_one_time(self) -> None:
        for method in ours.SOLVERS:
            assert torch.equal(ours.odeint(decay, Y0, times(1.0), method=method), Y0[None])

    def test_counting_closures(self) -> None:
        calls: list[float] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            calls.append(float(t))
            return -y

        with torch.no_grad():
            ours.odeint(func, Y0, times(0.0, 1.0), method="euler", options={"step_size": 0.1})
        assert len(calls) == 10

    def test_errors(self) -> None:
        with pytest.raises(ArgumentTypeError, match="t is of type list"):
            ours.odeint(decay, Y0, [0.0, 1.0])  # type: ignore[arg-type]
        with pytest.raises(TimeError):
            ours.odeint(decay, Y0, times(0.0, 1.0, 0.5))
        with pytest.raises(ArgumentTypeError, match="options"):
            ours.odeint(decay, Y0, times(0.0, 1.0), options=[1])  # type: ignore[arg-type]


class _Watched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float, Any, float]] = []

    def forward(self, t: Tensor, y: Any) -> Any:
        return y * (1 - y) if isinstance(y, Tensor) else tuple(part * (1 - part) for part in y)

    def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.calls.append(("step", float(t0), y0, float(dt)))

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.calls.append(("accept", float(t0), y0, float(dt)))

    def callback_reject_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.calls.append(("reject", float(t0), y0, float(dt)))


class TestCallbacks:
    @pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, 0.0)])
    @pytest.mark.parametrize("is_tuple", [False, True])
    def test_of_adaptive_steps(self, t: tuple[float, ...], is_tuple: bool) -> None:
        found = []
        for of in (ours, theirs):
            func = _Watched()
            of.odeint(func, (Y0, Y0) if is_tuple else Y0, times(*t), options={"first_step": 0.9})
            found.append(func.calls)
        assert {kind for kind, *_ in found[0]} == {"step", "accept", "reject"}
        kinds = [kind for kind, *_ in found[0]]
        assert kinds[::2] == ["step"] * (len(kinds) // 2)
        n = kinds.index("accept") + 2  # up to the first accepted step, and to where the next one starts
        assert kinds[:n] == [kind for kind, *_ in found[1][:n]]
        for one, other in zip(found[0][:n], found[1][:n], strict=True):
            assert one[1] == pytest.approx(other[1], rel=1e-2)
            assert one[3] == pytest.approx(other[3], rel=1e-2)
            torch.testing.assert_close(one[2], other[2], rtol=1e-2, atol=1e-2)

    def test_of_fixed_steps(self) -> None:
        found = []
        for of in (ours, theirs):
            func = _Watched()
            with pytest.warns(UserWarning, match="callback_accept_step"):
                of.odeint(func, Y0, times(0.0, 1.0), method="rk4", options={"step_size": 0.25})
            found.append(func.calls)
        assert [kind for kind, *_ in found[0]] == ["step"] * 4
        torch.testing.assert_close([list(c[1:]) for c in found[0]], [list(c[1:]) for c in found[1]])

    def test_of_solve_receives_the_state(self) -> None:
        seen: list[aca_ext.Step] = []
        y0 = (Y0.clone().requires_grad_(), Y0)
        aca_ext.solve(lambda t, y: (-y[0], y[1]), y0, times(0.0, 1.0), callback=seen.append)
        torch.testing.assert_close(seen[0].y, (Y0, Y0))
        assert not seen[0].y[0].requires_grad

    def test_of_a_batch_receive_the_state(self) -> None:
        seen: list[aca_ext.Step] = []
        options = {"batch": "independent"}
        aca_ext.solve(lambda t, y: -y, Y0[:, None], times(0.0, 1.0), options=options, callback=seen.append)
        assert torch.equal(seen[0].y, Y0[:, None])


class TestDense:
    @pytest.mark.parametrize("method", ADAPTIVE)
    @pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, 0.0)])
    def test_is_the_dense_output_of_the_solve(self, method: str, ends: tuple[float, float]) -> None:
        how = {"method": method, "rtol": 1e-5, "atol": 1e-5}
        t = torch.linspace(*ends, 17, dtype=torch.float64)
        y = ours.odeint_dense(LotkaVolterra(), Y0, *times(*ends), **how)
        torch.testing.assert_close(y(t), aca_ext.odeint(LotkaVolterra(), Y0, t, **how), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(y(t[3]), y(t)[3])

    def test_values(self) -> None:
        y, other = (of.odeint_dense(LotkaVolterra(), Y0, *times(0.0, 2.0)) for of in (ours, theirs))
        for t in times(0.1, 0.7, 1.9):
            torch.testing.assert_close(y(t), other(t), rtol=1e-6, atol=1e-6)

    def test_is_differentiable(self) -> None:
        def value(y0: Tensor, t: Tensor) -> Tensor:
            return ours.odeint_dense(decay, y0, *times(0.0, 1.0), options={"first_step": 0.1})(t)

        assert torch.autograd.gradcheck(value, (Y0.clone().requires_grad_(), times(0.33, 0.9).requires_grad_()))

    def test_of_a_tuple(self) -> None:
        y = ours.odeint_dense(lambda t, y: (-y[0], y[1]), (Y0, Y0), 0.0, 1.0)
        torch.testing.assert_close(y(1.0), (Y0 * torch.e**-1, Y0 * torch.e), rtol=1e-6, atol=1e-6)

    def test_errors(self) -> None:
        with pytest.raises(TimeError, match="beyond"):
            ours.odeint_dense(decay, Y0, 0.0, 1.0)(1.5)
        with pytest.raises(ArgumentValueError, match="adaptive"):
            ours.odeint_dense(decay, Y0, 0.0, 1.0, method="rk4")


class TestInstall:
    def test_can_be_undone(self) -> None:
        before = sys.modules["torchdiffeq"]
        undo = ours.install()
        try:
            import torchdiffeq
            from torchdiffeq._impl.odeint import SOLVERS

            assert torchdiffeq.odeint is ours.odeint
            assert SOLVERS is ours.SOLVERS
        finally:
            undo()
        assert sys.modules["torchdiffeq"] is before
        assert "torchdiffeq._impl.odeint" in sys.modules

    def test_where_torchdiffeq_was_never_imported(self) -> None:
        code = (
            "import aca_ext.torchdiffeq, sys; assert 'torchdiffeq' not in sys.modules; aca_ext.torchdiffeq.install()\n"
            "from torchdiffeq import odeint, odeint_adjoint, odeint_event, odeint_dense\n"
            "import torchdiffeq._impl.odeint; print(odeint.__module__, torchdiffeq.__version__)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert found.stdout.startswith("aca_ext.torchdiffeq")


def test_nothing_warns_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.odeint(decay, Y0, times(0.0, 1.0))
        ours.odeint(decay, Y0, times(0.0, 1.0), method="rk4", options={"step_size": 0.1})
        ours.odeint_adjoint(Mlp(), sample(4, 3), times(0.0, 1.0))


class TestOptionsOfSolve:
    """The options that the drop-in is made of, in ``aca_ext.odeint`` itself."""

    @pytest.mark.parametrize("gradient", ["direct", "naive"])
    @pytest.mark.parametrize("options", [{"interp": "cubic"}, {"interp": "linear", "perturb": True}])
    @pytest.mark.parametrize("method", ["heun3", "dopri5"])
    def test_gradients_agree(self, gradient: str, options: dict[str, Any], method: str) -> None:
        found = []
        for name in ("aca", gradient):
            func, y0, t = Mlp(), sample(4, 3).requires_grad_(), times(0.0, 0.37, 1.0).requires_grad_()
            ys = aca_ext.odeint(func, y0, t, method=method, options={"step_size": 0.15, **options}, gradient=name)
            found.append(torch.autograd.grad(ys.square().sum(), [y0, t, *func.parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_a_few_checkpoints(self) -> None:
        found = []
        for checkpoints in (None, 2):
            func, y0 = Mlp(), sample(4, 3).requires_grad_()
            options = {"step_size": 0.1, "interp": "cubic", "perturb": True}
            how = {"method": "rk4", "options": options, "checkpoints": checkpoints}
            ys = aca_ext.odeint(func, y0, times(0.0, 0.37, 1.0), **how)
            found.append(torch.autograd.grad(ys.square().sum(), [y0, *func.parameters()]))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"interp": "linear"}, "fixed steps"),
            ({"perturb": True}, "fixed steps"),
            ({"step_size": 0.1, "interp": "spline"}, "interp"),
            ({"step_size": 0.1, "interp": ["linear"]}, "interp"),
            ({"step_size": 0.1, "perturb": 2}, "perturb"),
            ({"step_size": 0.1, "on_min_step": "accept"}, "adaptive steps"),
            ({"on_min_step": "ignore"}, "on_min_step"),
            ({"on_min_step": "accept", "batch": "independent"}, "on_min_step"),
        ],
    )
    def test_wrong_ones(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentValueError, match=message):
            aca_ext.odeint(decay, Y0, times(0.0, 1.0), options=options)

    @pytest.mark.parametrize("options", [{"interp": "linear"}, {"perturb": True}])
    def test_are_no_part_of_recordings_and_captures(self, options: dict[str, Any]) -> None:
        how = {"method": "rk4", "options": {"step_size": 0.3, **options}}
        with pytest.raises(aca_ext.errors.GraphError, match="options"):
            aca_ext.odeint(Mlp(), sample(4, 3), times(0.0, 1.0), engine="graph", **how)
        with pytest.raises(ArgumentValueError, match="interp or perturb"):
            make_fx(lambda y0: aca_ext.odeint(decay, y0, (0.0, 1.0), **how))(Y0)

    @pytest.mark.parametrize("steps", [{"step_size": 0.25}, {"step_size": 0.1}])
    def test_nodes_that_are_requested_are_not_interpolated(self, steps: dict[str, float]) -> None:
        t = torch.linspace(0, 1, 5)  # 0.25 and its multiples, of float32
        calls: list[Any] = []
        options = {**steps, "interp": "linear"}
        solution = aca_ext.solve(decay, Y0, t, method="euler", options=options, callback=calls.append)
        assert len(calls) == round(1 / steps["step_size"])
        is_node = torch.isclose((t / steps["step_size"]).round() * steps["step_size"], t)
        landed = aca_ext.odeint(decay, Y0, t[is_node], method="euler", options=steps)
        torch.testing.assert_close(solution.y[is_node], landed)


class TestImplicitMethods:
    @pytest.mark.parametrize("method", IMPLICIT)
    def test_take_steps_from_one_requested_time_to_the_next(self, method: str) -> None:
        """As in torchdiffeq, trbdf2 too. Its release on PyPI has none of these methods to compare with."""
        t = times(0.0, 0.35, 0.7, 1.0)
        func = LotkaVolterra()
        expected = aca_ext.odeint(func, Y0, t, method=method, options={"grid_constructor": lambda func, y0, t: t})
        torch.testing.assert_close(ours.odeint(func, Y0, t, method=method), expected, rtol=0, atol=0)
        finer = ours.odeint(func, Y0, t, method=method, options={"step_size": 0.01})
        torch.testing.assert_close(finer, ours.odeint(func, Y0, t), rtol=0.02, atol=0.01)

    @pytest.mark.parametrize("perturb", [True, False])
    @pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
    @pytest.mark.parametrize("method", IMPLICIT)
    def test_evaluate_func_where_a_step_starts(self, method: str, interface: str, perturb: bool) -> None:
        """At the node, or with ``perturb`` at the next number inside the step; also in the adjoint's solve."""
        at: list[float] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            at.append(t.item())
            return -y

        params: dict[str, Any] = {"adjoint_params": ()} if interface == "odeint_adjoint" else {}
        y0, options = Y0.clone().requires_grad_(), {"step_size": 0.5, "perturb": perturb}
        y = getattr(ours, interface)(func, y0, times(0.0, 1.0), method=method, options=options, **params)
        assert all((node in at) is not perturb for node in (0.0, 0.5))
        if params:
            at.clear()
            y.sum().backward()
            assert all((node in at) is not perturb for node in (0.5, 1.0))
