"""engine="compiled" by compiled evaluations of func: the steps, outputs and gradients of the eager engine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from autograd_reference import relative_error
from problems import sample
from torch import Tensor, nn

from aca_ext import Event, NeuralODE, odeint, solve
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.errors import CompileError, NonFiniteError, ReplayError, SlopeError

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

D = torch.float64
T = torch.tensor([0.0, 0.2, 0.5], dtype=D)
TOLERANCES: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "method": "bosh3"}
W = sample(4, 4, seed=5).requires_grad_()
GRID, VALUES = torch.linspace(0, 1, 5, dtype=D), sample(5, seed=6)
REASON = "no program, for a test"


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles evaluations alone, whatever their time, by a backend that is quick: all but Inductor."""
    from torch._dynamo.backends.debugging import aot_eager

    from aca_ext.engines.compiled import compiled_graph, graph_check
    from aca_ext.engines.ensemble import engine as ensemble_engine

    for module in (compiled_engine, ensemble_engine):
        monkeypatch.setattr(module, "obstacle_to_programs", lambda *_, **__: REASON)
    monkeypatch.setattr(graph_check, "is_worthwhile", lambda *_: True)
    monkeypatch.setattr(compiled_graph, "backend", aot_eager)


def both(
    func: Any, y0: Any, t: Any = T, inputs: tuple[Tensor, ...] = (), compiled: str = "evaluations", **settings: Any
) -> Any:
    """Solves with both engines and asserts equal steps, outputs, counts and gradients of y0 and ``inputs``."""
    leaves = [x.requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    modules = func.parameters() if isinstance(func, nn.Module) else ()
    wanted = [*leaves, *(p for p in modules if p.requires_grad), *inputs]
    found = []
    for engine in ("compiled", "eager"):
        torch.manual_seed(0)
        solution = solve(func, y0, t, engine=engine, **{**TOLERANCES, **settings})
        parts = solution.y if isinstance(solution.y, tuple) else (solution.y,)
        grads = torch.autograd.grad(sum(x.abs().square().sum() for x in parts), wanted, allow_unused=True)
        found.append((solution, parts, grads))
    (ours, y, grads), (eager, expected, exact) = found
    assert ours.stats.compiled == compiled, ours.stats.reason
    assert (ours.stats.reason == "") == (compiled == "solve")
    rounding = {torch.float32: 1e-4}.get(y[0].real.dtype, 1e-10)
    bounds = [x if isinstance(x, tuple) else (x,) for x in (ours.steps, eager.steps)]
    for one, other in zip(*bounds, strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)
    for count in ("n_f_evals", "n_steps", "n_f_evals_backward"):
        one, other = (getattr(solution.stats, count) for solution in (ours, eager))
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, count
    for one, other in [*zip(y, expected, strict=True), *zip(grads, exact, strict=True)]:
        assert (one is None) == (other is None)
        if one is not None:
            assert relative_error(one, other) < rounding
    return ours


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos() * 1.01  # not the derivative, so that its use can be seen


def energy(y: Tensor) -> Tensor:
    return torch.tanh(y @ W).square().sum()


def by_autograd(t: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        y = y.requires_grad_(True)
        return -torch.autograd.grad(energy(y), y, create_graph=True)[0]


def attention(t: Tensor, y: Tensor) -> Tensor:
    q, k = (y @ W).unsqueeze(0), y.unsqueeze(0)
    return F.scaled_dot_product_attention(q, k, k)[0]


def checkpointed(t: Tensor, y: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda y: torch.tanh(y @ W), y, use_reentrant=False)


def looked_up(t: Tensor, y: Tensor) -> Tensor:
    i = torch.searchsorted(GRID, t.reshape(1)).clamp(max=4)
    return y * VALUES[i] @ W


def along_complex(t: Tensor, y: Tensor) -> Tensor:
    z = torch.view_as_complex(y.reshape(3, 2, 2)) * (1j - 0.2) * torch.exp(1j * t)
    return torch.view_as_real(z).reshape(3, 4) @ W


class Conv(nn.Module):
    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.GELU(), nn.Conv1d(3, 2, 1))
        self.to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(t)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.cell = nn.GRUCell(4, 4).double()
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).double()
        self.norm, self.drop = nn.BatchNorm1d(4).double(), nn.Dropout(0.3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drop(self.norm(self.cell(self.normed(y), y)))


FIELDS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "fft": lambda t, y: torch.fft.irfft(torch.fft.rfft(y @ W) * 1j, n=4),
    "cumsum": lambda t, y: y.cumsum(-1) @ W,
    "linear solve": lambda t, y: torch.linalg.solve(3 * torch.eye(4, dtype=D) + W, y.T).T,
    "roll": lambda t, y: (y.roll(1, -1) - 2 * y + y.roll(-1, -1)) @ W,
    "searchsorted": looked_up,
    "complex": along_complex,
    "autograd.Function": lambda t, y: Straight.apply(y) @ W,
    "checkpoint": checkpointed,
    "autograd": by_autograd,
    "torch.func": lambda t, y: -torch.func.grad(energy)(y),
    "indices": lambda t, y: y[:, torch.tensor([1, 0, 3, 2])] @ W,
    "sort": lambda t, y: y.sort(-1).values @ W,
    "matrix exponential": lambda t, y: y @ torch.linalg.matrix_exp(W),
    "einsum": lambda t, y: torch.einsum("bi,ij->bj", y, W),
    "its argument": lambda t, y: y,
    "no state": lambda t, y: (W[:3] * t).cos(),
}
UNTRACED: dict[str, Callable[..., Any]] = {
    "sparse": lambda t, y: torch.sparse.mm(SPARSE, (y @ W).T).T,
    "branch": lambda t, y: y @ W if y.sum() > 0 else -y @ W,
    "dropout": lambda t, y: F.dropout(y @ W, 0.5),
    "item": lambda t, y: y @ W * VALUES[int(torch.searchsorted(GRID, t))],
}
SPARSE = (sample(4, 4, seed=8) * (sample(4, 4, seed=9) > 0)).to_sparse_coo()


@pytest.mark.usefixtures("no_programs")
class TestFields:
    @pytest.mark.parametrize("name", FIELDS)
    def test_that_people_write(self, name: str) -> None:
        both(FIELDS[name], sample(3, 4) / 3, inputs=(W,))

    @pytest.mark.parametrize("name", UNTRACED)
    def test_that_run_uncompiled(self, name: str) -> None:
        settings = {"options": {"step_size": 0.1}}
        solution = both(UNTRACED[name], sample(3, 4) / 3, inputs=(W,), compiled="", **settings)
        cause = {"dropout": "random numbers", "item": "failed on func"}.get(name, "cannot be traced")
        assert cause in solution.stats.reason

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_convolutions(self, dtype: torch.dtype) -> None:
        both(Conv(dtype), sample(3, 2, 5).to(dtype))


class Wave(nn.Module):
    """A func of one line, quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.3, 0.4], dtype=D))
        self.register_buffer("shift", torch.tensor(0.1, dtype=D))
        self.scale, self.n = 1.0, 0

    def forward(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        self.n += 1
        y = y if not args else y * args[0]
        return self.scale * torch.sin(self.p[0] * y + t) - self.p[1] * y.cumsum(-1) + self.shift


class Counted(Wave):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(t, y, *args)


@cache
def shared() -> Wave:
    """One func for all tests that do not change it, so that it is compiled once."""
    return Wave()


def coupled(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return y[1] @ W[:3, :3], -y[0].cumsum(-1).sin()


@pytest.mark.usefixtures("no_programs")
class TestSolves:
    @pytest.fixture
    def func(self) -> Wave:
        return shared()

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"checkpoints": 3},
            {"checkpoints": "cpu"},
            {"gradient": "direct"},
            {"gradient": "naive"},
            {"gradient": "adjoint"},
            {"options": {"step_size": 0.1}},
            {"options": {"step_size": 0.15, "interp": "cubic"}},
            {"options": {"jump_t": [0.3], "norm": lambda y: y.abs().max()}},
            {"options": {"on_step_limit": "stop"}},
            {"options": {"batch": "independent"}},
            {"options": {"batch": "independent"}, "gradient": "direct"},
            {"events": [Event(lambda t, y: y[0, 0] - 0.05, reset=lambda t, y: -y)]},
        ],
        ids=lambda settings: " ".join((*settings, *settings.get("options", ()))) or "defaults",
    )
    def test_take_the_arguments_of_the_eager_engine(self, func: Wave, settings: dict[str, Any]) -> None:
        assert both(func, sample(2, 3) / 3, **settings).stats.reason == REASON

    def test_tuple_and_complex_states(self) -> None:
        both(coupled, (sample(2, 3) / 3, sample(2, 3, seed=1)), inputs=(W,))
        both(lambda t, y: 1j * y.cumsum(-1) * W[0, 0], sample(3).to(torch.complex128), inputs=(W,))

    @pytest.mark.parametrize("gradient", ["aca", "direct", "naive"])
    def test_second_derivatives(self, func: Wave, gradient: str) -> None:
        y0, found = (sample(2, 3) / 3).requires_grad_(), []
        for engine in ("compiled", "eager"):
            y = odeint(func, y0, T, engine=engine, gradient=gradient, **TOLERANCES)
            grads = torch.autograd.grad(y.square().sum(), [y0, func.p], create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [y0, func.p]))
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs) < 1e-10

    def test_times_args_and_named_params_receive_gradients(self, func: Wave) -> None:
        a = torch.tensor(0.7, dtype=D).requires_grad_()
        for params in (None, ()):
            found = []
            for engine in ("compiled", "eager"):
                t = T.clone().requires_grad_()
                y = odeint(func, sample(2, 3) / 3, t, engine=engine, args=(a,), params=params, **TOLERANCES)
                found.append(torch.autograd.grad(y.square().sum(), [a, t, func.p], allow_unused=True))
            assert (found[0][2] is None) == (params == ())
            for ours, theirs in zip(*found, strict=True):
                assert ours is theirs is None or relative_error(ours, theirs) < 1e-10  # type: ignore[arg-type]

    def test_callback_and_bar(self, func: Wave, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("tqdm")
        found = []
        for engine in ("compiled", "eager"):
            seen: list[Any] = []
            y = odeint(func, sample(2, 3), T, engine=engine, callback=seen.append, progress=True, **TOLERANCES)
            found.append([(step.t, step.t_next, step.n_f_evals) for step in seen])
            assert torch.equal(seen[0].y, y[0])
        assert found[0] == found[1]
        assert "100%" in capsys.readouterr().err

    def test_a_callback_that_changes_func_is_an_error(self) -> None:
        func = Wave()
        with pytest.raises(CompileError, match="callback changed"):
            odeint(
                func, sample(2, 3), T, engine="compiled", callback=lambda _: setattr(func, "scale", 2.0), **TOLERANCES
            )

    def test_that_stop_go_on(self, func: Wave) -> None:
        settings: dict[str, Any] = {**TOLERANCES, "options": {"on_step_limit": "stop", "max_num_steps": 2}}
        found = []
        for engine in ("compiled", "eager"):
            solution = solve(func, sample(2, 3), T, engine=engine, **settings)
            while not solution.is_complete:
                solution = solution.resume()
            found.append(solution)
        assert found[0].stats.compiled == "evaluations"
        assert relative_error(found[0].y, found[1].y) < 1e-10  # type: ignore[arg-type]

    def test_without_gradients_and_with_one_time(self, func: Wave) -> None:
        with torch.no_grad():
            solution = solve(func, sample(2, 3), T, engine="compiled", **TOLERANCES)
        assert solution.stats.compiled == "evaluations"
        assert relative_error(solution.y, odeint(func, sample(2, 3), T, **TOLERANCES)) < 1e-10  # type: ignore[arg-type]
        assert torch.equal(odeint(func, sample(2, 3), [0.0], engine="compiled")[0], sample(2, 3))

    def test_counters_count_evaluations(self) -> None:
        func = Counted()
        solution = solve(func, sample(2, 3), T, engine="compiled", **TOLERANCES)
        assert solution.stats.compiled == "evaluations"
        assert func.n == func.calls == solution.stats.n_f_evals
        func.calls += 5  # must not matter: the slope does not depend on it
        solution.y.sum().backward()
        assert func.n == func.calls - 5 == solution.stats.n_f_evals + solution.stats.n_f_evals_backward

    def test_in_half_precision(self, func: Wave) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            solution = both(lambda t, y: torch.tanh(y @ W.float()), sample(3, 4).float(), inputs=(W,))
        assert solution.y.dtype == torch.float32
        unlike = odeint(lambda t, y: torch.tanh(y @ W.float()), sample(3, 4).float(), T, **TOLERANCES)
        assert relative_error(solution.y, unlike) > 1e-4

    def test_a_start_that_is_not_finite_decides_nothing(self) -> None:
        func = Wave()
        with pytest.raises(NonFiniteError):
            odeint(func, torch.full((2, 3), torch.nan, dtype=D), T, engine="compiled")
        assert solve(func, sample(2, 3), T, engine="compiled", **TOLERANCES).stats.compiled == "evaluations"

    def test_a_slope_of_another_shape_is_the_error_of_func(self) -> None:
        with pytest.raises(SlopeError, match="shape"):
            odeint(lambda t, y: y.sum(), sample(3), T, engine="compiled")

    def test_a_layer(self, func: Wave) -> None:
        layer = NeuralODE(func, T, engine="compiled", **TOLERANCES)
        assert relative_error(layer(sample(2, 3)), NeuralODE(func, T, **TOLERANCES)(sample(2, 3))) < 1e-10
        assert layer.stats is not None
        assert layer.stats.compiled == "evaluations"


@pytest.mark.usefixtures("no_programs")
class TestChanges:
    """Changes of func between solves, and between a forward and its backward pass."""

    def test_between_solves(self) -> None:
        func, y0 = Wave(), sample(2, 3)
        for change in ("", "parameter", "shape", "frozen", "buffer"):
            if change == "parameter":
                func.p = nn.Parameter(torch.tensor([0.3, 0.2], dtype=D))
            elif change == "shape":
                y0 = sample(5, 3)
            elif change == "frozen":
                func.p.requires_grad_(False)
            elif change == "buffer":
                func.shift.fill_(0.3)
            stats = both(func, y0).stats
            assert (stats.compile_seconds > 0) == (change in ("", "shape", "frozen")), change

    @pytest.mark.parametrize(
        "factor",
        [
            lambda n: 2.0 if n in {4, 7} else 1.0,
            lambda n: 2.0 if isinstance(n, int) and n % 2 == 0 else 1.0,
        ],
        ids=["set", "type"],
    )
    def test_of_numbers_for_which_a_tensor_cannot_stand(self, factor: Callable[[int], float]) -> None:
        n = {"n": 2}

        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y * factor(n["n"])

        for n["n"] in (1, 3, 4):  # in traces after the first, a tensor stands for n
            both(func, torch.ones(2, dtype=torch.float64))

    def test_of_numbers_compile_once_more(self) -> None:
        func = Wave()
        for i in range(4):
            func.scale = 1 + 0.1 * i
            seconds = both(func, sample(2, 3)).stats.compile_seconds
            assert (seconds > 0) == (i < 2)

    def test_of_shapes_end_in_func_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from aca_ext.engines.compiled import evaluations

        monkeypatch.setattr(evaluations, "_MAX_GRAPHS", 2)
        func = Wave()
        found = [solve(func, sample(n), [0.0, 0.1], engine="compiled", **TOLERANCES).stats for n in (1, 2, 3, 1)]
        assert [stats.compiled for stats in found] == ["evaluations", "evaluations", "", "evaluations"]
        assert "compiled 2 times" in found[2].reason

    @pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")
    def test_of_the_training_mode(self) -> None:
        """In training, batch statistics change and dropout draws: func itself is evaluated, with the same masks."""
        func, fixed = Recurrent(), {**TOLERANCES, "options": {"step_size": 0.1}}
        for mode in (True, False, True):
            func.train(mode)
            before = {name: x.clone() for name, x in func.state_dict().items()}
            found = []
            for engine in ("compiled", "eager"):
                torch.manual_seed(3)
                func.load_state_dict(before)
                y = odeint(func, sample(3, 4), T, engine=engine, **fixed)
                grads = torch.autograd.grad(y.square().sum(), list(func.parameters()))
                found.append([y, *grads, *func.buffers()])
            for ours, theirs in zip(*found, strict=True):
                assert relative_error(ours.double(), theirs.double()) < 1e-10
        assert solve(func.eval(), sample(3, 4), T, engine="compiled", **fixed).stats.compiled == "evaluations"
        reason = solve(func.train(), sample(3, 4), T, engine="compiled", **fixed).stats.reason
        assert "random numbers" in reason

    def test_before_the_backward_pass(self) -> None:
        func, y0 = Wave(), sample(2, 3)
        expected = torch.autograd.grad(odeint(func, y0, T, **TOLERANCES).sum(), func.p)[0]
        y = odeint(func, y0, T, engine="compiled", **TOLERANCES)
        old, func.scale, func.shift = func.shift, 7.0, torch.ones((), dtype=D)
        assert relative_error(torch.autograd.grad(y.sum(), func.p, retain_graph=True)[0], expected) < 1e-10
        old.add_(1)
        with pytest.raises(ReplayError, match="written to"):
            y.sum().backward(retain_graph=True)
        with torch.no_grad():
            func.p.mul_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestByInductor:
    def test_convolutions_and_attention(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Compiling leaves no trace: no warning, no log, the same random numbers."""
        from aca_ext.engines.compiled import graph_check

        monkeypatch.setattr(compiled_engine, "obstacle_to_programs", lambda *_: REASON)
        monkeypatch.setattr(graph_check, "is_worthwhile", lambda *_: True)
        mixed, conv = nn.MultiheadAttention(4, 2, batch_first=True).double(), Conv()

        def func(t: Tensor, y: Tensor) -> Tensor:
            z = conv(t, y.reshape(3, 2, 2))
            return mixed(y[None], y[None], y[None], need_weights=False)[0][0] + z.reshape(3, 4).roll(1, -1)

        drawn = torch.get_rng_state()
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            stats = solve(func, sample(3, 4) / 3, T, engine="compiled", **TOLERANCES).stats
            assert torch.equal(torch.get_rng_state(), drawn)
            both(func, sample(3, 4) / 3, inputs=(*mixed.parameters(), *conv.parameters()))
        of_machine = "torch.utils.cpp_extension"  # says that there is no GPU
        assert not [x for x in caplog.records if x.levelno >= logging.WARNING and x.name != of_machine]
        assert stats.compile_seconds > 0

    def test_only_if_it_is_faster(self, monkeypatch: pytest.MonkeyPatch, no_programs: None) -> None:
        from aca_ext.engines.compiled import graph_check

        times: list[tuple[float, float]] = []

        def is_worthwhile(of_compiled: float, of_func: float) -> bool:
            times.append((of_compiled, of_func))
            return False

        monkeypatch.setattr(graph_check, "is_worthwhile", is_worthwhile)
        func = Wave()
        for _ in range(2):
            assert "not faster" in both(func, sample(2, 3), compiled="").stats.reason
        assert len(times) == 1
        assert min(times[0]) > 0


def test_second_derivatives_with_times_that_require_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aca_ext.engines.compiled.graph_check.is_worthwhile", lambda *_: True)
    w = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    found = []
    for engine in ("compiled", "eager"):
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
        y0 = torch.ones_like(w, requires_grad=True)
        settings = {"checkpoints": 2, "engine": engine, **TOLERANCES}
        y = odeint(lambda t, y: torch.tanh(w * y) * torch.cos(t) - y**2, y0, t, **settings)
        first = torch.autograd.grad(y[-1].square().sum(), (y0, w, t), create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), (y0, w, t)))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-9
