"""engine="compiled" against the eager engine: equal steps and gradients; its cache and its refusals."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
from autograd_reference import relative_error, solve_over
from problems import CoupledMlp, DrivenMlp, Mlp, sample
from torch import Tensor, nn

from aca_ext import NeuralODE, Solution, odeint, solve
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import trace_table
from aca_ext.errors import (
    AcaError,
    ArgumentTypeError,
    ArgumentValueError,
    CompileError,
    NonFiniteError,
    ReplayError,
    SlopeError,
    StepLimitError,
    StepSizeError,
    TimeError,
    ToleranceError,
    UnknownNameError,
)
from aca_ext.vector_field import function_cache as owners

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

TIMES = torch.tensor([0.0, 0.3, 1.0, 2.0], dtype=torch.float64)
TOLERANCES: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
# Compiling takes most of the time here: 2 to 5 s of one core for each new program, which torch caches on disk, and 15 s
# for the first one without that cache, since torch then probes the compiler and the CPU. So tests in which the method
# does not matter use one with few stages.
SHORT = "bosh3"


class Wave(nn.Module):
    """A func of one line, quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([1.3, 0.4], dtype=torch.float64))
        self.scale = 1.0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.scale * torch.sin(self.p[0] * y + t) - self.p[1] * y


@cache
def shared() -> Wave:
    """One func for all tests that do not change it, so that its programs are compiled once."""
    return Wave()


def gradients(solution: Any, inputs: list[Tensor]) -> list[Tensor | None]:
    parts = solution.y if isinstance(solution.y, tuple) else (solution.y,)
    loss = sum((part * part).sum() for part in parts)
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def compare(
    func: Callable[..., Any], y0: Any, t: Any, method: str = "dopri5", args: tuple[Any, ...] = (), **settings: Any
) -> Any:
    """Solves with both engines and asserts equal steps, outputs and counts, and the gradient of the accepted steps."""
    leaves = [*(y0 if isinstance(y0, tuple) else (y0,)), *(a for a in args if isinstance(a, Tensor))]
    inputs = [x.requires_grad_() for x in leaves] + (list(func.parameters()) if isinstance(func, nn.Module) else [])
    settings = {**TOLERANCES, **settings}
    compiled = solve(func, y0, t, method=method, args=args, engine="compiled", **settings)
    eager = solve(func, y0, t, method=method, args=args, **settings)
    assert compiled.steps.shape == eager.steps.shape
    torch.testing.assert_close(compiled.steps, eager.steps, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(_parts(compiled.y), _parts(eager.y), strict=True):
        assert relative_error(ours, theirs) < 1e-8
    found = gradients(compiled, inputs)
    gradients(eager, inputs)
    for count in ("n_f_evals", "n_steps", "n_accepted", "n_rejected", "n_f_evals_backward"):
        assert getattr(compiled.stats, count) == getattr(eager.stats, count), count
    times = t.tolist() if isinstance(t, Tensor) else t
    exact = solve_over(func, y0, times, compiled.steps.tolist(), method, args)
    for ours, theirs in zip(_parts(compiled.y), _parts(exact), strict=True):
        assert relative_error(ours, theirs) < 1e-12
    exact_loss = sum((part * part).sum() for part in _parts(exact))
    for ours, theirs in zip(found, torch.autograd.grad(exact_loss, inputs, allow_unused=True), strict=True):
        if theirs is not None:
            assert relative_error(ours, theirs) < 1e-12
    return compiled


def _parts(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


class TestSteps:
    @pytest.mark.parametrize("method", ["heun_euler", "bosh3", "tsit5", "dopri5", "dopri8"])
    def test_adaptive_methods_are_those_of_the_eager_engine(self, method: str) -> None:
        name = {"heun_euler": "adaptive_heun"}.get(method, method)
        solution = compare(shared(), sample(3), torch.linspace(0, 2, 101).double(), name)  # outputs inside all steps
        assert solution.stats.n_accepted > 3

    @pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
    def test_fixed_steps_are_those_of_the_eager_engine(self, method: str) -> None:
        solution = compare(shared(), sample(3), TIMES, method, options={"step_size": 0.25})
        assert solution.stats.n_accepted == 9

    def test_decreasing_times(self) -> None:
        compare(shared(), sample(3), TIMES.flip(0))

    def test_network_on_a_matrix(self) -> None:
        solution = compare(Mlp(3, 20), sample(17, 3), TIMES, SHORT)
        assert solution.stats.backend == "compiled"
        assert solution.stats.compile_seconds > 0

    def test_large_products(self) -> None:
        w = sample(500, 500) / 500

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ w.T)

        compare(func, sample(9, 500), [0.0, 0.1], "euler")

    def test_arguments_and_time(self) -> None:
        args = sample(3, seed=1), torch.tensor(0.3).double()
        compare(DrivenMlp(3, 4), sample(2, 3), TIMES[[0, 3]], SHORT, args=args)

    def test_tuple_state(self) -> None:
        compare(CoupledMlp(3, 4), (sample(2, 3), sample(3, seed=1)), TIMES[[0, 3]], SHORT)

    def test_tolerance_for_each_element(self) -> None:
        rtol, atol = torch.tensor([1e-4, 1e-5, 1e-6]), torch.tensor(1e-6).expand(3)
        compare(shared(), sample(3), TIMES, SHORT, rtol=rtol, atol=atol)

    def test_jumps_and_stops(self) -> None:
        func = shared()
        solution = solve(
            func, sample(3), TIMES, **TOLERANCES, engine="compiled", options={"jump_t": [0.5], "step_t": [1.5]}
        )
        eager = solve(func, sample(3), TIMES, **TOLERANCES, options={"jump_t": [0.5], "step_t": [1.5]})
        torch.testing.assert_close(solution.steps, eager.steps, rtol=1e-6, atol=1e-6)
        assert solution.stats.n_f_evals == eager.stats.n_f_evals
        assert {0.5, 1.5} <= set(solution.steps[:, 1].tolist())

    def test_controller_with_memory(self) -> None:
        compare(shared(), sample(3), TIMES, options={"pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.1, "first_step": 0.5})

    def test_single_precision(self) -> None:
        func = Mlp(3, 8, dtype=torch.float32)
        y0 = sample(5, 3).float()
        ours, theirs = (odeint(func, y0, TIMES, **TOLERANCES, engine=e) for e in ("compiled", "eager"))
        assert ours.dtype == torch.float32
        assert relative_error(ours, theirs) < 1e-5

    def test_constants_in_func(self) -> None:
        def rotation(t: Tensor, y: Tensor) -> Tensor:
            turn = torch.tensor([[0.0, 1.0, 0.3], [-1.0, 0.1, 0.2], [0.4, 0.0, -1.0]], dtype=torch.float64)
            return y @ turn + torch.arange(3) / 10 * torch.cos(t)

        compare(rotation, sample(2, 3), [0.0, 1.0], SHORT)

    def test_one_time_is_the_start(self) -> None:
        solution = solve(shared(), sample(3), [1.0], engine="compiled")
        assert torch.equal(solution.y, sample(1, 3))
        assert solution.stats.n_steps == 0

    def test_softplus_and_tanh_are_exact_over_their_whole_range(self) -> None:
        y0 = torch.cat([torch.linspace(-60, 60, 4001), torch.logspace(-12, 0, 999), torch.tensor([0.0])]).double()
        for function in (torch.tanh, nn.functional.softplus):
            step = odeint(lambda t, y, f=function: f(y), y0, [0.0, 1.0], method="euler", engine="compiled")[1]
            exact = y0 + function(y0)
            assert ((step - exact).abs() <= 4e-16 * (y0.abs() + function(y0).abs())).all()


class TestGradients:
    def test_of_times(self) -> None:
        func, y0 = shared(), sample(3)
        found = []
        for engine in ("compiled", "eager"):
            t = TIMES.clone().requires_grad_()
            (grad,) = torch.autograd.grad(odeint(func, y0, t, **TOLERANCES, engine=engine).square().sum(), t)
            found.append(grad)
        assert relative_error(found[0], found[1]) < 1e-9

    def test_create_graph_gives_second_derivatives(self) -> None:
        func, y0 = shared(), sample(3).requires_grad_()
        found = []
        for engine in ("compiled", "eager"):
            y = odeint(func, y0, TIMES, **TOLERANCES, engine=engine)
            grads = torch.autograd.grad(y.square().sum(), [y0, func.p], create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), [y0, func.p]))
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs) < 1e-9

    def test_second_derivatives_start_where_the_solve_did(self) -> None:
        func, y0 = shared(), sample(3)
        y = odeint(func, y0, TIMES, **TOLERANCES, engine="compiled")
        expected = torch.autograd.grad(y.square().sum(), func.p, create_graph=True)[0]
        y0.add_(1.0)
        assert torch.equal(torch.autograd.grad(y.square().sum(), func.p, create_graph=True)[0], expected)
        y0.requires_grad_()
        y = odeint(func, y0, TIMES, **TOLERANCES, engine="compiled")
        y0.data.add_(1.0)
        with pytest.raises(ReplayError, match="y0 has changed since the forward pass"):
            torch.autograd.grad(y.square().sum(), func.p, create_graph=True)

    def test_only_of_named_params(self) -> None:
        func = shared()
        y = odeint(func, sample(3).requires_grad_(), TIMES, **TOLERANCES, engine="compiled", params=())
        y.sum().backward()
        assert func.p.grad is None

    def test_of_what_a_closure_holds(self) -> None:
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        settings: dict[str, Any] = {**TOLERANCES, "method": SHORT}
        found = [
            torch.autograd.grad(odeint(lambda t, y: -w * y, sample(3), TIMES[[0, 3]], **settings, engine=e).sum(), w)[0]
            for e in ("compiled", "eager")
        ]
        assert relative_error(found[0], found[1]) < 1e-9

    def test_parameter_changed_before_backward_is_an_error(self) -> None:
        func = shared()
        y = odeint(func, sample(3), TIMES, **TOLERANCES, engine="compiled")
        with torch.no_grad():
            func.p.mul_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_memory_is_that_of_the_accepted_states(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sums all allocations that the engine makes in a solve and its backward pass."""
        func, y0 = shared(), sample(20_000).requires_grad_()
        allocated: list[int] = []

        def counting(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def counted(*args: Any, **kwargs: Any) -> Tensor:
                result = allocate(*args, **kwargs)
                allocated.append(result.numel() * result.element_size())
                return result

            return counted

        for name in ("empty", "empty_strided", "empty_like", "zeros_like"):
            monkeypatch.setattr(torch, name, counting(getattr(torch, name)))
        totals, counts = [], []
        for end in (10.0, 40.0, 10.0, 40.0):  # the first solve to each end compiles
            allocated.clear()
            solution = solve(func, y0, [0.0, end], **TOLERANCES, method=SHORT, engine="compiled")
            solution.y[-1].sum().backward()
            totals.append(sum(allocated) / (y0.numel() * 8))
            counts.append(solution.stats.n_accepted)
        block = 1 + (1 << 20) / (y0.numel() * 8)  # number of states that are allocated ahead
        assert counts[3] > 2 * counts[2]
        assert totals[3] - totals[2] <= counts[3] - counts[2] + block


class TestCache:
    def test_parameter_updates_do_not_compile(self) -> None:
        func, y0 = Wave(), sample(3)
        optimizer = torch.optim.SGD(func.parameters(), lr=0.1)
        for i in range(3):
            solution = solve(func, y0, TIMES, **TOLERANCES, engine="compiled")
            solution.y.square().sum().backward()
            assert i == 0 or solution.stats.compile_seconds == 0
            assert relative_error(solution.y, odeint(func, y0, TIMES, **TOLERANCES)) < 1e-9
            optimizer.step()

    def test_what_changes_func_compiles_anew(self) -> None:
        func, y0 = Wave(), sample(3)
        for change in ("", "scale", "frozen", "new parameter", "shape"):
            if change == "scale":
                func.scale = 0.5
            elif change == "frozen":
                func.p.requires_grad_(False)
            elif change == "new parameter":
                func.p = nn.Parameter(torch.tensor([0.2, 0.1], dtype=torch.float64))
            elif change == "shape":
                y0 = sample(4)
            settings: dict[str, Any] = {**TOLERANCES, "method": SHORT}
            solution = solve(func, y0, TIMES, **settings, engine="compiled")
            assert relative_error(solution.y, odeint(func, y0, TIMES, **settings)) < 1e-9, change

    def test_what_is_solved_may_change_between_solves(self) -> None:
        """A repeated solve takes shortened checks, which must notice each of these changes."""
        func, y0, t = Wave(), sample(3), TIMES[[0, 3]].clone()
        for name in ("", "y0", "t", "y0.requires_grad", "no_grad", "dtype of t", "strides", "tolerance", "method"):
            settings: dict[str, Any] = {**TOLERANCES, "method": SHORT}
            if name == "y0":
                y0.mul_(0.5)
            elif name == "t":
                t.add_(0.1)
            elif name == "y0.requires_grad":
                y0.requires_grad_()
            elif name == "dtype of t":
                t = t.float()
            elif name == "strides":
                y0 = sample(3, 2).t()
            elif name == "tolerance":
                settings["rtol"] = 1e-3
            elif name == "method":
                settings["method"] = "adaptive_heun"
            with torch.set_grad_enabled(name != "no_grad"):
                solution = solve(func, y0, t, **settings, engine="compiled")
                expected = solve(func, y0, t, **settings)
            assert relative_error(solution.y, expected.y) < 1e-9, name
            assert solution.steps.shape == expected.steps.shape, name
            assert solution.y.requires_grad == expected.y.requires_grad, name
            if solution.y.requires_grad:
                inputs = [y0, func.p] if y0.requires_grad else [func.p]
                for ours, theirs in zip(gradients(solution, inputs), gradients(expected, inputs), strict=True):
                    assert ours is not None, name
                    assert theirs is not None, name
                    assert relative_error(ours, theirs) < 1e-8, name

    @pytest.mark.usefixtures("no_evaluations")
    def test_a_repeated_solve_checks_its_arguments(self) -> None:
        func, y0, t = shared(), sample(3), TIMES[[0, 3]].clone()
        settings: dict[str, Any] = {**TOLERANCES, "engine": "compiled"}
        for _ in range(2):
            odeint(func, y0, t, **settings)
        with pytest.raises(TimeError, match="repeat"):
            odeint(func, y0, t.flip(0)[[0, 0]], **settings)
        with pytest.raises(ToleranceError, match="rtol"):
            odeint(func, y0, t, **{**settings, "rtol": -1.0})
        with pytest.raises(ArgumentTypeError, match="callable"):
            odeint(3, y0, t, **settings)  # type: ignore[arg-type]
        with pytest.raises(ArgumentTypeError, match="args"):
            odeint(func, y0, t, args=3, **settings)  # type: ignore[arg-type]
        with pytest.raises(ArgumentValueError, match="transform"):
            torch.func.vmap(lambda y: odeint(func, y, t, **settings))(sample(2, 3))
        with torch.autocast("cpu"):
            assert "autocast" in solve(func, y0, t, **settings).stats.reason
        seen: list[Any] = []
        assert "callback" in solve(func, y0, t, callback=seen.append, **settings).stats.reason
        assert len(seen) > 0

    def test_a_repeated_solution_is_like_any_other(self) -> None:
        func, y0 = shared(), sample(3)
        with torch.no_grad():
            first, repeated = (solve(func, y0, TIMES, **TOLERANCES, engine="compiled") for _ in range(2))
        for other in (repeated, pickle.loads(pickle.dumps(repeated)), copy.deepcopy(repeated), replace(repeated)):
            assert isinstance(other, Solution)
            assert torch.equal(other.steps, first.steps)  # type: ignore[arg-type]
            assert torch.equal(other.y, first.y)  # type: ignore[arg-type]
            assert other.stats.n_accepted == first.stats.n_accepted
            assert other.is_complete
            assert "steps=" in repr(other)

    def test_a_lambda_made_anew_finds_its_graph(self) -> None:
        net = Wave()
        for i in range(2):
            solution = solve(lambda t, y: net(t, y), sample(3), TIMES, engine="compiled")
            assert (solution.stats.compile_seconds > 0) == (i == 0)

    def test_does_not_keep_func(self) -> None:
        func = Wave()
        solve(func, sample(3), TIMES, **TOLERANCES, engine="compiled").y.sum().backward()
        gone = weakref.ref(func)
        del func
        gc.collect()
        assert gone() is None

    def test_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(owners, "_MAX_OWNERS", 2)
        kept = [Wave() for _ in range(3)]
        for func in kept:
            solve(func, sample(3), TIMES, **TOLERANCES, engine="compiled")
        assert len(trace_table.tables) <= 2

    def test_more_shapes_than_graphs_are_kept(self) -> None:
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        func = Wave()
        with torch._dynamo.config.patch({limit: 2}):
            for n in range(1, 4):
                y = odeint(func, sample(n), [0.0, 0.1], method="euler", engine="compiled")
                assert torch.allclose(y[1], sample(n) + 0.1 * func(torch.zeros(()), sample(n)))


class Branch(nn.Module):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -y if y.sum() > 0 else y


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def _module(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    net = net.double()
    return lambda t, y: net(y)


@pytest.mark.usefixtures("no_evaluations")
class TestObstacles:
    """Reasons why no program holds a whole solve."""

    @pytest.mark.parametrize(
        ("func", "cause"),
        [
            (Branch(), "cannot be traced as one graph"),
            (_module(nn.Dropout(0.5)), "random numbers"),
            (_module(nn.BatchNorm1d(3)), "in place"),
            (lambda t, y: Straight.apply(y), "autograd.Function"),
            (lambda t, y: torch.linalg.solve(torch.eye(2).double(), y), "operation"),
        ],
        ids=["branch", "dropout", "batch norm", "custom backward", "library call"],
    )
    @pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")
    def test_in_func_are_named(self, func: Any, cause: str) -> None:
        for _ in range(2):
            stats = solve(
                func, sample(2, 3), TIMES, engine="compiled", method="euler", options={"step_size": 0.5}
            ).stats
            assert stats.compiled == ""
            assert cause in stats.reason
            assert 'engine="eager"' not in stats.reason

    @pytest.mark.parametrize("gradient", ["direct", "naive", "adjoint"])
    def test_other_gradients(self, gradient: str) -> None:
        assert gradient in self.reason(gradient=gradient)

    def test_a_norm(self) -> None:
        assert "norm" in self.reason(options={"norm": lambda x: x.abs().max()})

    def test_complex_states_and_autocast(self) -> None:
        y0 = sample(3).to(torch.complex128)
        assert "complex" in solve(lambda t, y: 1j * y, y0, TIMES, engine="compiled").stats.reason
        with torch.autocast("cpu"):
            assert "autocast" in self.reason()

    @staticmethod
    def reason(**settings: Any) -> str:
        stats = solve(shared(), sample(3), TIMES, engine="compiled", **settings).stats
        assert isinstance(stats.reason, str)
        return stats.reason


class TestRefusals:
    def test_of_an_unknown_engine(self) -> None:
        with pytest.raises(UnknownNameError, match="compiled"):
            odeint(shared(), sample(3), TIMES, engine="compile")

    def test_errors_of_func_are_its_own(self) -> None:
        def broken(t: Tensor, y: Tensor) -> Tensor:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            odeint(broken, sample(3), TIMES, engine="compiled")
        with pytest.raises(SlopeError, match="shape"):
            odeint(lambda t, y: y.sum(), sample(3), TIMES, engine="compiled")


class TestFailures:
    """Solves that cannot reach the end fail at the same time and with the same error as in the eager engine."""

    @pytest.mark.parametrize(
        ("func", "end", "options", "error"),
        [
            (lambda t, y: y * y, 2.0, {}, (StepSizeError, NonFiniteError)),
            (lambda t, y: torch.log(1 - t) * y.abs(), 2.0, {}, (NonFiniteError,)),
            (lambda t, y: torch.sin(30 * t) * y, 9.0, {"max_num_steps": 5}, (StepLimitError,)),
            (lambda t, y: y / 0, 9.0, {}, (NonFiniteError,)),
        ],
    )
    def test_are_those_of_the_eager_engine(self, func: Any, end: float, options: Any, error: Any) -> None:
        caught: list[Any] = []
        for engine in ("compiled", "eager"):
            with pytest.raises(error) as failure:
                odeint(func, torch.ones(2).double(), [0.0, end], **TOLERANCES, options=options, engine=engine)
            caught.append(failure.value)
        one, other = caught
        assert isinstance(caught[0], AcaError)
        assert type(one) is type(other)
        assert one.t == pytest.approx(other.t, rel=1e-6)


def test_layer() -> None:
    func = shared()
    layer = NeuralODE(func, (0.0, 1.0), engine="compiled", **TOLERANCES)
    y0 = sample(3)
    assert relative_error(layer(y0), NeuralODE(func, (0.0, 1.0), **TOLERANCES)(y0)) < 1e-9
    assert layer.stats is not None
    assert layer.stats.backend == "compiled"
    assert (layer.stats.compiled, layer.stats.reason) == ("solve", "")


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_engine, "_TORCH", (2, 12))
    with pytest.raises(CompileError, match=r"needs torch 2\.13 or newer.*this is torch 2"):
        odeint(Wave(), torch.ones(2, dtype=torch.float64), TIMES, engine="compiled")
