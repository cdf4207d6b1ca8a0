"""engine="auto", and the default engine: which engine runs which solve, and the reasons it gives."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import sample
from torch import Tensor, nn

import aca_ext
from aca_ext import NeuralODE, errors, odeint, solve
from aca_ext.engines import ENGINES, Request, auto
from aca_ext.engines.auto import AutoEngine
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.eager import EagerEngine
from aca_ext.gradients.base import Result

NEEDS_COMPILER = pytest.mark.skipif(
    compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch"
)
TIMES = [0.0, 1.0]
TOLERANCES: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8}


@dataclass
class Compiler:
    """Stands in for the compiled engine: the eager engine, with the refusals that a test wants."""

    error = errors.CompileError
    obstacle_of_all: str | None = None
    refusal: str = ""
    compile_seconds: float = 0.0
    solves: int = 0

    def obstacle(self, request: Request) -> str | None:
        return self.obstacle_of_all

    def solve(self, request: Request) -> Result:
        self.solves += 1
        if self.refusal:
            raise errors.CompileError(self.refusal)
        result = EagerEngine().solve(request)
        result.stats.compiled, result.stats.compile_seconds = "solve", self.compile_seconds
        return result


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    engine, stand_in = AutoEngine(), Compiler()
    monkeypatch.setattr(engine, "_compiled", stand_in)
    monkeypatch.setitem(ENGINES, "auto", engine)
    return stand_in


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


def engine_of(func: Any, y0: Tensor | None = None, **settings: Any) -> str:
    y0 = sample(3) if y0 is None else y0
    return solve(func, y0, TIMES, **{**TOLERANCES, "engine": "auto", **settings}).stats.engine


class TestChoice:
    def test_the_third_solve_is_compiled(self, compiler: Compiler) -> None:
        func = Decay()
        assert [engine_of(func) for _ in range(4)] == ["eager", "eager", "compiled", "compiled"]
        assert engine_of(Decay()) == "eager"  # each func is counted by itself

    def test_stats_give_the_reason(self, compiler: Compiler) -> None:
        func = Decay()
        first, _, third = (solve(func, sample(3), TIMES, **TOLERANCES, engine="auto") for _ in range(3))
        assert first.stats.reason == "solve 1 of 2 before func is compiled"
        assert third.stats.reason == ""
        assert "engine='eager', reason='solve 1 of 2 before func is compiled'" in repr(first)
        assert "reason" not in repr(third)

    def test_new_times_tolerances_and_values_are_no_new_kind(self, compiler: Compiler) -> None:
        func = Decay()
        engine_of(func)
        engine_of(func, sample(3) + 1, rtol=1e-3, options={"first_step": 0.1})
        assert engine_of(func, rtol=1e-4) == "compiled"

    def test_with_and_without_gradients_are_one_kind(self, compiler: Compiler) -> None:
        func, y0 = Decay(), sample(3).requires_grad_()
        engine_of(func, y0)
        with torch.no_grad():
            engine_of(func)
            assert engine_of(func) == "compiled"
        assert engine_of(func, y0) == "compiled"

    def test_shapes_methods_args_and_modes_are_kinds(self, compiler: Compiler) -> None:
        func = Decay()
        for _ in range(3):
            engine_of(func)
        assert engine_of(func, sample(4)) == "eager"
        assert engine_of(func, sample(3).float()) == "eager"
        assert engine_of(func, method="bosh3") == "eager"
        assert engine_of(func, options={"step_size": 0.1}) == "eager"
        assert engine_of(func, rtol=torch.full((3,), 1e-6).double()) == "eager"
        assert engine_of(func.eval()) == "eager"
        assert engine_of(func.train()) == "compiled"

        def driven(t: Tensor, y: Tensor, force: Any) -> Tensor:
            return y * 0 + (force if isinstance(force, Tensor) else force[0])

        one, other = (torch.ones(3).double(),), ((torch.ones(3).double(),),)
        found = [engine_of(driven, args=args) for args in (one, one, other, one, other, other)]
        assert found == ["eager", "eager", "eager", "compiled", "eager", "compiled"]

    def test_counts_die_with_func(self, compiler: Compiler) -> None:
        engine = ENGINES["auto"]
        assert isinstance(engine, AutoEngine)
        func = Decay()
        engine_of(func)
        assert len(engine._by_owner) == 1
        del func
        gc.collect()
        assert len(engine._by_owner) == 0


class TestRefusals:
    def test_are_remembered(self, compiler: Compiler) -> None:
        func, compiler.refusal = Decay(), "func cannot be compiled"
        solutions = [solve(func, sample(3), TIMES, **TOLERANCES, engine="auto") for _ in range(5)]
        assert [one.stats.engine for one in solutions] == ["eager"] * 5
        assert [one.stats.reason for one in solutions[2:]] == [compiler.refusal] * 3
        assert compiler.solves == 1
        assert engine_of(func.eval()) == engine_of(func) == "eager"  # another mode is tried
        assert engine_of(func) == "eager"
        assert compiler.solves == 2

    def test_by_an_argument_are_no_refusals_of_func(self, compiler: Compiler) -> None:
        func = Decay()
        compiler.obstacle_of_all = "no such argument"
        for _ in range(3):
            solution = solve(func, sample(3), TIMES, **TOLERANCES, engine="auto")
            assert (solution.stats.engine, solution.stats.reason) == ("eager", "no such argument")
        compiler.obstacle_of_all = None
        assert [engine_of(func) for _ in range(3)] == ["eager", "eager", "compiled"]

    def test_end_repeated_compilations(self, compiler: Compiler) -> None:
        func, compiler.compile_seconds = Decay(), 1.0
        found = [engine_of(func) for _ in range(9)]
        assert found == ["eager"] * 2 + ["compiled"] * auto._MOST_COMPILATIONS + ["eager"] * 3

    def test_end_compilations_for_ever_new_shapes(self, compiler: Compiler) -> None:
        func, compiler.compile_seconds = Decay(), 1.0
        found = [[engine_of(func, sample(n)) for _ in range(3)][-1] for n in range(1, auto._MOST_KINDS + 3)]
        assert found == ["compiled"] * auto._MOST_KINDS + ["eager"] * 2
        compiler.compile_seconds = 0.0
        assert engine_of(func, sample(1)) == "compiled"

    def test_errors_of_the_solve_are_not_hidden(self, compiler: Compiler) -> None:
        def explodes(t: Tensor, y: Tensor) -> Tensor:
            return y * y

        for _ in range(4):
            with pytest.raises(errors.SolveError):
                odeint(explodes, torch.ones(1).double(), [0.0, 2.0], engine="auto")
        assert compiler.solves == 2

    def test_what_the_eager_engine_lacks_is_compiled_at_once(self, compiler: Compiler) -> None:
        batch = {"batch": "independent"}
        for settings in ({"options": batch, "checkpoints": 2}, {"options": {**batch, "step_t": [0.5]}}):
            compiler.obstacle_of_all, compiler.refusal = None, "no lanes"
            with pytest.raises(errors.CompileError, match="no lanes"):
                engine_of(Decay(), sample(3, 2), **settings)
            compiler.obstacle_of_all = "no such argument"
            with pytest.raises(errors.ArgumentValueError, match="no such argument"):
                engine_of(Decay(), sample(3, 2), **settings)


@NEEDS_COMPILER
class TestWithTheCompiler:
    def test_results_agree_before_and_after(self) -> None:
        func, y0 = Decay(), sample(3)
        engines, found = [], []
        for _ in range(3):
            solution = solve(func, y0, TIMES, **TOLERANCES, engine="auto", method="heun2")
            engines.append(solution.stats.engine)
            (grad,) = torch.autograd.grad(solution.y[-1].sum(), func.rate)
            found.append((solution.y.detach(), grad))
        assert engines == ["eager", "eager", "compiled"]
        for y, grad in found[1:]:
            torch.testing.assert_close(y, found[0][0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(grad, found[0][1], rtol=1e-10, atol=1e-12)

    def test_a_func_that_cannot_be_compiled_runs_as_before(self) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.seen: list[float] = []

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                self.seen.append(t.item())
                return -y

        func, y0 = Counting(), sample(3)
        lengths, stats = [], []
        for _ in range(4):
            before = len(func.seen)
            stats.append(solve(func, y0, TIMES, **TOLERANCES, engine="auto").stats)
            lengths.append(len(func.seen) - before)
        assert [one.engine for one in stats] == ["eager"] * 4
        assert lengths[2:] == lengths[:2]  # trying to compile leaves no trace in func
        assert stats[2].reason
        assert stats[3].reason == stats[2].reason


class TestDefault:
    @pytest.fixture(autouse=True)
    def _restored(self) -> Iterator[None]:
        yield
        aca_ext.set_default_engine("eager")

    def test_is_eager_at_first(self) -> None:
        assert aca_ext.get_default_engine() == "eager"
        assert solve(Decay(), sample(3), TIMES).stats.engine == ""

    def test_holds_for_solves_that_name_no_engine(self, compiler: Compiler) -> None:
        func = Decay()
        layer = NeuralODE(func, TIMES, **TOLERANCES)
        aca_ext.set_default_engine("auto")
        engines = []
        for _ in range(3):
            layer(sample(3))
            assert layer.stats is not None
            engines.append(layer.stats.engine)
        assert engines == ["eager", "eager", "compiled"]
        assert solve(func, sample(3), TIMES, **TOLERANCES, engine="eager").stats.engine == ""
        aca_ext.set_default_engine("eager")
        assert solve(func, sample(3), TIMES, **TOLERANCES).stats.engine == ""

    def test_layers_take_the_engine_too(self, compiler: Compiler) -> None:
        layer = NeuralODE(Decay(), TIMES, **TOLERANCES, engine="auto")
        for _ in range(3):
            layer(sample(3))
        assert layer.stats is not None
        assert layer.stats.engine == "compiled"

    @pytest.mark.parametrize("name", ENGINES)
    def test_is_any_engine(self, name: str) -> None:
        aca_ext.set_default_engine(name)
        assert aca_ext.get_default_engine() == name

    def test_is_no_other_name(self) -> None:
        with pytest.raises(errors.UnknownNameError, match="Did you mean 'eager'"):
            aca_ext.set_default_engine("eagre")
        assert aca_ext.get_default_engine() == "eager"

    def test_holds_in_all_threads(self) -> None:
        seen: list[str] = []
        aca_ext.set_default_engine("auto")
        thread = threading.Thread(target=lambda: seen.append(aca_ext.get_default_engine()))
        thread.start()
        thread.join()
        assert seen == ["auto"]
