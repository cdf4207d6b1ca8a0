"""engine="compiled": operations that func may use, operations that are refused, and refusals without side effects."""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autograd_reference import relative_error
from problems import sample
from torch import Tensor, nn

from aca_ext import odeint, solve
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import step_graphs as graphs
from aca_ext.errors import BatchStatisticsWarning, CompileError, KeptTensorWarning, ReplayError

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

STEPS: dict[str, Any] = {"method": "euler", "options": {"step_size": 0.25}}
W = sample(3, 3, seed=5).requires_grad_()
CALLS = 0


def steps(func: Any, y0: Any, engine: str = "compiled", **settings: Any) -> Any:
    return solve(func, y0, [0.0, 1.0], engine=engine, **{**STEPS, **settings})


def net(y: Tensor) -> Tensor:
    return torch.tanh(y @ W)


def energy(y: Tensor) -> Tensor:
    return net(y).square().sum()


def by_autograd(t: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        y = y.requires_grad_(True)
        return -torch.autograd.grad(energy(y), y, create_graph=True)[0]


def by_autograd_of_a_copy(t: Tensor, y: Tensor) -> Tensor:
    with torch.set_grad_enabled(True):
        z = y.clone().requires_grad_(True)
        t.requires_grad_(True)
        return -torch.autograd.grad(energy(z), z, create_graph=True)[0]


class TestDerivativesInFunc:
    @pytest.mark.parametrize(
        "func",
        [
            lambda t, y: -torch.func.grad(energy)(y),
            lambda t, y: -torch.func.vmap(torch.func.grad(energy))(y),
            lambda t, y: -torch.func.vjp(net, y)[1](torch.ones_like(y))[0],
            lambda t, y: -torch.func.vmap(torch.func.jacrev(net))(y).diagonal(dim1=-2, dim2=-1),
            lambda t, y: -torch.func.jvp(net, (y,), (torch.ones_like(y),))[1],
            by_autograd,
            by_autograd_of_a_copy,
        ],
        ids=["grad", "vmap of grad", "vjp", "jacrev", "jvp", "autograd", "autograd of a copy"],
    )
    def test_are_exact_and_have_exact_gradients(self, func: Any) -> None:
        y0 = sample(2, 3).requires_grad_()
        y = steps(func, y0).y
        found = torch.autograd.grad(y[-1].square().sum(), [y0, W])
        z = y0
        for _ in range(4):
            z = z + 0.25 * func(torch.zeros(()).double(), z)
        expected = torch.autograd.grad(z.square().sum(), [y0, W])
        for ours, theirs in zip([y[-1], *found], [z, *expected], strict=True):
            assert relative_error(ours, theirs) < 1e-12

    def test_of_a_continuous_normalizing_flow(self) -> None:
        def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = state[0].requires_grad_(True)
                dz = net(z)
                trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(3))
            return dz, -trace  # type: ignore[operator]

        start = (sample(2, 3).requires_grad_(), torch.zeros(2).double())
        z, log_p = steps(flow, start).y
        found = torch.autograd.grad(z[-1].sum() + log_p[-1].sum(), [start[0], W])
        a, b = start
        for _ in range(4):
            da, db = flow(torch.zeros(()), (a, b))
            a, b = a + 0.25 * da, b + 0.25 * db
        expected = torch.autograd.grad(a.sum() + b.sum(), [start[0], W])
        for ours, theirs in zip([z[-1], log_p[-1], *found], [a, b, *expected], strict=True):
            assert relative_error(ours, theirs) < 1e-12


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return torch.stack([v, (1 - x * x) * v - x], -1)


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [3, 2000])
    def test_components_split_and_stacked(self, n: int, dtype: torch.dtype) -> None:
        y0 = (sample(n, 2) / 4).to(dtype)
        settings: dict[str, Any] = {"method": "bosh3", "options": {}, "rtol": 1e-4, "atol": 1e-4}
        found, expected = (steps(van_der_pol, y0, engine, **settings) for engine in ("compiled", "eager"))
        assert found.stats.n_steps == expected.stats.n_steps
        assert relative_error(found.y, expected.y) < 100 * torch.finfo(dtype).eps

    def test_a_trial_step_that_explodes_is_rejected(self) -> None:
        turn = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
        found, expected = (
            solve(lambda t, y: y**3 @ turn, torch.tensor([[2.0, 0.0]]), [0.0, 0.1], engine=engine)
            for engine in ("compiled", "eager")
        )
        assert relative_error(found.y, expected.y) < 1e-5
        assert found.stats.n_rejected == expected.stats.n_rejected

    def test_under_another_default_device(self) -> None:
        torch.set_default_device("meta")
        try:
            y0 = torch.ones(2, dtype=torch.float64, device="cpu").requires_grad_()
            times = torch.tensor([0.0, 1.0], device="cpu")
            y = odeint(lambda t, y: -y, y0, times, engine="compiled", **STEPS)
            (grad,) = torch.autograd.grad(y[-1].sum(), y0)
        finally:
            torch.set_default_device(None)
        assert relative_error(grad, torch.full((2,), 0.75**4).double()) < 1e-12


class Counting(nn.Module):
    """Counts its evaluations in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5).double())
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("in_place", torch.zeros((), dtype=torch.long))
        self.tensor = torch.zeros(1)
        self.n, self.items, self.entries = 0, [0], {"n": 0}

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        self.n += 1
        self.items[0] += 1
        self.entries["n"] += 1
        self.replaced = self.replaced + 1
        self.in_place += 1
        self.tensor = self.tensor - 2
        return -y * self.w

    def counts(self) -> list[float]:
        tensors = [self.replaced.item(), self.in_place.item(), self.tensor.item() / -2]
        return [CALLS, self.n, self.items[0], self.entries["n"], *tensors]


class TestCounters:
    def test_of_every_kind_count_evaluations(self) -> None:
        global CALLS
        CALLS = 0
        func, total = Counting(), 0
        for i in range(2):
            solution = steps(func, sample(3))
            total += solution.stats.n_f_evals
            assert func.counts() == [total] * 7
            func.in_place += 5  # must not matter: the backward pass does not depend on it
            solution.y.sum().backward()
            func.in_place -= 5
            total += solution.stats.n_f_evals_backward
            assert func.counts() == [total] * 7
            assert (solution.stats.compile_seconds > 0) == (i == 0)
        assert relative_error(solution.y[-1], sample(3) * 0.875**4) < 1e-12

    def test_in_a_closure_made_anew(self) -> None:
        for i in range(2):
            n = 0

            def func(t: Tensor, y: Tensor) -> Tensor:
                nonlocal n
                n += 1
                return -y

            stats = steps(func, sample(3)).stats
            assert n == stats.n_f_evals == 4
            assert (stats.compile_seconds > 0) == (i == 0)


class Annealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta, self.rates, self.power = 0.0, {"a": 1.0}, 1

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return (1 - 2 * self.beta) * y - self.rates["a"] * y**self.power

    def advance(self, epoch: int) -> None:
        self.beta, self.rates["a"], self.power = 0.1 * epoch, 1 / (epoch + 1), epoch


class TestChangingNumbers:
    def test_compile_at_most_twice(self) -> None:
        func, y0 = Annealed(), sample(3).abs()
        for epoch in range(4):
            func.advance(epoch)
            solution = steps(func, y0)
            assert relative_error(solution.y, steps(func, y0, "eager").y) < 1e-12
            assert (solution.stats.compile_seconds > 0) == (epoch < 2)
            assert (type(func.beta), type(func.power)) == (float, int)

    def test_among_args_and_in_closures(self) -> None:
        for epoch in range(3):
            beta = 0.1 * epoch
            solution = steps(lambda t, y, g, beta=beta: -g * beta * y + beta, sample(3), args=(epoch / 3,))
            expected = sample(3)
            for _ in range(4):
                expected = expected + 0.25 * (-epoch / 3 * beta * expected + beta)
            assert relative_error(solution.y[-1], expected) < 1e-12
            assert (solution.stats.compile_seconds > 0) == (epoch < 2)

    def test_that_func_needs_as_numbers(self) -> None:
        func = Annealed()
        for epoch in range(3):
            func.beta = 0.1 * epoch

            def decaying(t: Tensor, y: Tensor) -> Tensor:
                return -math.exp(func.beta) * y if func.beta < 0.15 else y

            assert relative_error(steps(decaying, sample(2)).y, steps(decaying, sample(2), "eager").y) < 1e-12


class Recording(nn.Module):
    """Has a side effect in every evaluation that compiled code would lose."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.n, self.limit, self.last = kind, 0, 100, None
        self.history: list[Any] = []
        self.kept: dict[str, Any] = {}
        self.register_buffer("mean", torch.zeros(3).double())
        self.generator = torch.Generator()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.n += 1
        match self.kind:
            case "last":
                self.last = y
            case "history":
                self.history.append(t)
            case "kept":
                self.kept["y"] = y
            case "limit" if self.n > self.limit:
                return 2 * y
            case "value":
                return -y * self.n
            case "doubled":
                self.n = 2 * self.n
            case "mean in place":
                self.mean.mul_(0.9)
            case "mean replaced":
                self.mean = 0.9 * self.mean
            case "mean used":
                self.mean += 1
                return y * self.mean
            case "norm":
                return self.norm(y)
            case "dropout":
                return self.dropout(y)
            case "hessian":
                self.last = torch.func.hessian(energy)(y)
            case "branch" if y.sum() > 0:
                return -y
            case "python random":
                return -y * random.random()
            case "numpy random":
                return -y * np.random.rand()
            case "generator":
                return -y * torch.rand(3, generator=self.generator).double()
            case "operation":
                return torch.linalg.solve(torch.eye(2).double(), y)
            case "error":
                raise KeyError("mine")
        return -y

    def state(self) -> list[Any]:
        tensors = [x.clone() for x in self.buffers()]
        tensors.append(self.generator.get_state())
        return [self.n, self.last, list(self.history), dict(self.kept), *tensors]


CAUSES = {
    "last": "func.last",
    "history": "func.history",
    "kept": "func.kept",
    "limit": "func.n",
    "value": "func.n",
    "doubled": "func.n",
    "mean in place": "func.mean",
    "mean replaced": "func.mean",
    "mean used": "func.mean",
    "norm": "in place",
    "dropout": "random numbers",
    "hessian": "func.last",
    "branch": "cannot be traced as one graph",
    "operation": "operation",
    "error": "mine",
    "python random": "func",
    "numpy random": "func",
    "generator": "func",
}


@pytest.fixture
def silent(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts that there is no warning and that torch's compiler logs nothing."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.usefixtures("no_evaluations")
class TestUncompiled:
    @pytest.mark.usefixtures("silent")
    @pytest.mark.parametrize(("kind", "cause"), CAUSES.items())
    def test_func_is_that_of_the_eager_engine(self, kind: str, cause: str) -> None:
        found: list[list[Any]] = []
        for engine in ("compiled", "eager"):
            func = Recording(kind)
            torch.manual_seed(0), random.seed(0), np.random.seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", (KeptTensorWarning, BatchStatisticsWarning))
                for _ in range(2):
                    found.append(self.outcome(func, engine, cause))
        assert found[:2] == found[2:]
        assert torch.is_grad_enabled()
        assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
        x = torch.ones(2).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            assert torch.autograd.grad(x.square().sum(), x)[0].tolist() == [2, 2]

    @staticmethod
    def outcome(func: Recording, engine: str, cause: str) -> list[Any]:
        """Output, state of func and of random generators, after a solve or after the error of func."""
        y: Any = None
        if func.kind == "error":
            with pytest.raises(KeyError, match=cause):
                steps(func, sample(2, 3), engine)
        else:
            solution = steps(func, sample(2, 3), engine)
            y = solution.y
            assert solution.stats.compiled == ""
            assert engine == "eager" or cause in solution.stats.reason
            assert "eval()" not in solution.stats.reason  # advice to use the eager engine is left out to its last word
        return _plain([y, func.state(), torch.get_rng_state(), random.getstate(), np.random.get_state()])

    @pytest.mark.parametrize("wrap", [torch.jit.script, lambda m: torch.jit.freeze(torch.jit.script(m.eval()))])
    def test_scripted_modules(self, wrap: Callable[..., Any]) -> None:
        class Field(nn.Module):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return -y

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            func = wrap(Field())
        assert "scripted" in steps(func, sample(3)).stats.reason

    def test_where_a_program_differs_from_func(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        evaluated = graphs.Slope._evaluated
        monkeypatch.setattr(graphs.Slope, "_evaluated", lambda self, t, y: evaluated(self, t, y) * (1 + 1e-6))
        solution = steps(lambda t, y: -y, sample(3))
        assert "slope that torch's compiler made" in solution.stats.reason
        assert relative_error(solution.y[-1], sample(3) * 0.75**4) < 1e-12
        assert list(empty_cache.iterdir()) == []  # other processes do not find it

    def test_where_gradients_of_few_digits_are_summed(self) -> None:
        """Sums in the dtype of such an input, as a program makes them, would lose most digits."""
        w = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        found = {}
        for engine in ("eager", "compiled"):
            solution = steps(lambda t, y, w: torch.tanh(y @ w.to(y.dtype)) - y, sample(4, 3), engine, args=(w,))
            found[engine] = torch.autograd.grad(solution.y.sum(), w)[0]
        assert "summed in float32" in solution.stats.reason
        assert relative_error(found["compiled"], found["eager"]) < torch.finfo(w.dtype).eps


def _plain(x: Any) -> Any:
    """Tensors and arrays as lists, which can be compared."""
    if isinstance(x, (Tensor, np.ndarray)):
        return x.tolist()
    if isinstance(x, (list, tuple)):
        return [_plain(part) for part in x]
    return {key: _plain(value) for key, value in x.items()} if isinstance(x, dict) else x


class TestRefusals:
    def test_of_gradients_that_differ_from_those_of_func(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pull_back = graphs.Replayed.pull_back
        monkeypatch.setattr(graphs.Replayed, "pull_back", lambda self, y, k, g: pull_back(self, y, k, g * (1 + 1e-6)))
        y = steps(lambda t, y: -y, sample(3).requires_grad_()).y
        with pytest.raises(CompileError, match="gradient that torch's compiler made"):
            y.sum().backward()
        assert list(empty_cache.iterdir()) == []


class TestSavedTensors:
    @pytest.mark.parametrize("is_learnt", [True, False], ids=["y0 learnt", "y0 not learnt"])
    def test_hooks_may_move_them(self, is_learnt: bool) -> None:
        net, found = Driven(), list[tuple[Tensor, ...]]()
        for engine in ("compiled", "eager"):
            y0 = sample(50, 2, seed=1).requires_grad_(is_learnt)
            with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x):
                sol = steps(net, y0, engine)
            others = [torch.full((64, 50, 2), math.nan, dtype=torch.float64) for _ in range(20)]  # where states were
            found.append(torch.autograd.grad(sol.y.square().sum(), [*net.parameters(), *([y0] if is_learnt else [])]))
            del others
        assert all(relative_error(*pair) <= 1e-12 for pair in zip(*found, strict=True))


class Driven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(sample(2))
        self.register_buffer("u", sample(2, seed=3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.w * y) * self.u


@cache
def shared() -> Driven:
    return Driven()


class TestBetweenForwardAndBackward:
    @pytest.fixture
    def func(self) -> Driven:
        """One func for all tests, so that it is compiled once."""
        driven = shared()
        driven.load_state_dict(Driven().state_dict())
        return driven

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            (lambda f: f.w.data.mul_(1.5), "func.w"),
            (lambda f: f.u.copy_(torch.ones(2)), "func.u"),
            (lambda f: setattr(f.u, "data", torch.ones(2).double()), "func.u"),
        ],
        ids=["data of a parameter", "buffer", "data of a buffer"],
    )
    def test_a_changed_input_is_an_error(self, func: Driven, change: Callable[..., Any], name: str) -> None:
        y = steps(func, sample(2)).y
        change(func)
        with pytest.raises(ReplayError, match=f"step from t=0.75.*{name}"):
            y.sum().backward()

    def test_another_tensor_in_its_place_is_not(self, func: Driven) -> None:
        y, before = steps(func, sample(2)).y, func.u
        expected = torch.autograd.grad(steps(func, sample(2), "eager").y.sum(), func.w)[0]
        func.u = torch.ones(2).double()
        assert relative_error(torch.autograd.grad(y.sum(), func.w)[0], expected) < 1e-12
        func.u = before

    def test_second_derivatives_need_func_as_it_was(self, func: Driven) -> None:
        y, before = steps(func, sample(2)).y, func.u
        func.u = torch.ones(2).double()
        with pytest.raises(ReplayError, match="create_graph"):
            torch.autograd.grad(y.sum(), func.w, create_graph=True)
        func.u = before
        (grad,) = torch.autograd.grad(y.sum(), func.w, create_graph=True)
        assert grad.requires_grad

    def test_freed_memory_is_an_error(self, func: Driven) -> None:
        y = steps(func, sample(2)).y
        values = func.w.detach().clone()
        func.w.untyped_storage().resize_(0)
        try:
            with pytest.raises(CompileError, match="freed"):
                y.sum().backward()
            with pytest.raises(CompileError, match="freed"):
                steps(func, sample(2))
        finally:
            func.w.untyped_storage().resize_(16)
            func.w.data.copy_(values)

    def test_gradients_without_memory_are_zeros(self, func: Driven) -> None:
        y = steps(func, sample(2)).y
        (grad,) = torch.autograd.grad(y, func.w, torch._efficientzerotensor(y.shape, dtype=torch.float64))
        assert grad.tolist() == [0, 0]

    def test_second_derivatives_through_a_chain_replay_each_solve_once(self) -> None:
        rate, evaluations = torch.tensor(-0.6).double().requires_grad_(), []
        for length in (3, 6):
            n, y = 0, sample(1)

            def func(t: Tensor, y: Tensor) -> Tensor:
                nonlocal n
                n += 1
                return rate * y

            for _ in range(length):
                y = steps(func, y).y[-1]
            (grad,) = torch.autograd.grad(y.sum(), rate, create_graph=True)
            torch.autograd.grad(grad, rate)
            evaluations.append(n)
        assert evaluations[1] <= 2 * evaluations[0] + 4


def test_odeint_names_what_differs_in_float32_only_where_it_matters() -> None:
    """A func that amplifies rounding must not be refused for it."""
    y0 = sample(50).float()
    found = odeint(lambda t, y: torch.sin(1e4 * y) / 1e4, y0, [0.0, 1.0], engine="compiled", **STEPS)
    assert found.isfinite().all()
