"""Steps composed of one compiled evaluation of func and steps compiled as a whole, compared with the eager engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from problems import sample
from torch import Tensor

from aca_ext import solve
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import library_cache, plans
from aca_ext.engines.compiled.composed_steps import ComposedSteps
from aca_ext.engines.compiled.step_graphs import Layout, WholeSteps
from aca_ext.errors import CompileError
from aca_ext.kernels.fused import Tolerance
from aca_ext.numerics.methods import METHODS
from aca_ext.problem.state import Packing
from aca_ext.solver.runge_kutta import scheme_of

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

WAYS = {"composed": ComposedSteps, "whole": WholeSteps}
W, B, UNUSED = (sample(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 3), (3,), (2,)]))
TRANSPOSED = sample(3, 3, seed=7).t().requires_grad_()
OUTPUTS = [0.0, 0.4, 1.0]  # the second one lies inside a step


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways have the same names in the cache."""
    monkeypatch.setenv(library_cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(library_cache, "_libraries", {})


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "ways_of_compiling", lambda *given: [WAYS[request.param](*given)])


def network(t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y @ W + B) @ TRANSPOSED * torch.cos(t)


def products_of_elements(t: Tensor, y: Tensor) -> Tensor:
    return (y[:, :, None] * y[:, None, :]).mean(-1) - y * B


def without_state(t: Tensor, y: Tensor) -> Tensor:
    return (B * t).expand_as(y)


def without_parameters(t: Tensor, y: Tensor) -> Tensor:
    return -y


def returns_the_state(t: Tensor, y: Tensor) -> Tensor:
    return y


def components(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    p, q = y
    return q @ W, -torch.sin(p) * B + q.sum() * 0.1


def results(func: Any, y0: Any, engine: str, **settings: Any) -> list[Tensor]:
    """The solution and its gradients; asserts that a compiled solve ran as one program."""
    parts = [x.clone().requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    given = tuple(parts) if isinstance(y0, tuple) else parts[0]
    solution = solve(func, given, OUTPUTS, engine=engine, **{"rtol": 1e-4, "atol": 1e-5, **settings})
    assert engine == "eager" or solution.stats.compiled == "solve", solution.stats.reason
    ys = solution.y if isinstance(solution.y, tuple) else (solution.y,)
    loss = sum(((i + 1) * x.square().flatten().cumsum(0)).sum() for i, x in enumerate(ys))
    grads = torch.autograd.grad(loss, [*parts, W, B, TRANSPOSED, UNUSED], allow_unused=True)
    return [*(x.detach() for x in ys), *(torch.zeros(()) if g is None else g for g in grads)]


def assert_same(func: Callable[..., Any], y0: Any, tolerance: float = 1e-11, **settings: Any) -> None:
    func = FunctionType(func.__code__, func.__globals__, closure=func.__closure__)  # whose programs are not cached
    expected, found = (results(func, y0, engine, **settings) for engine in ("eager", "compiled"))
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).abs().max()) <= tolerance * max(1.0, float(y.abs().max()))


@pytest.mark.usefixtures("way")
class TestBothWays:
    @pytest.mark.parametrize(
        "func", [network, products_of_elements, without_state, without_parameters, returns_the_state]
    )
    def test_they_make_the_steps_of_the_eager_engine(self, func: Any) -> None:
        assert_same(func, sample(5, 3, seed=3))

    def test_a_state_of_components_with_a_tolerance_each(self) -> None:
        y0 = sample(2, 3, seed=3), sample(2, 3, seed=4)
        assert_same(components, y0, rtol=(1e-4, 1e-6))


class TestComposedSteps:
    @pytest.mark.parametrize("method", ["rk4", "bosh3", "adaptive_heun", "dopri8"])
    def test_methods_of_other_forms(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plans, "ways_of_compiling", lambda *given: [ComposedSteps(*given)])
        options = {"step_size": 0.125} if method == "rk4" else {}
        assert_same(network, sample(2, 3, seed=3), method=method, options=options)

    @pytest.mark.parametrize(("size", "dtype"), [(1, torch.float64), (31, torch.float64), (47, torch.float32)])
    def test_states_that_fill_no_vectors(self, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plans, "ways_of_compiling", lambda *given: [ComposedSteps(*given)])
        y0, tolerance = sample(size, seed=3).to(dtype), 1e-11 if dtype == torch.float64 else 1e-4
        assert_same(lambda t, y: torch.sin(y) * torch.cos(3 * t), y0, tolerance)

    def test_a_state_without_error_has_a_sum_of_zero_though_its_tolerance_is_zero(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plans, "ways_of_compiling", lambda *given: [ComposedSteps(*given)])
        assert_same(lambda t, y: torch.zeros_like(y), torch.zeros(5, dtype=torch.float64), rtol=1e-6, atol=0.0)

    def test_gradients_of_many_parameters_are_the_same_for_any_number_of_threads(self) -> None:
        weight = sample(182, 182, seed=5).requires_grad_()  # so many elements are summed by several threads
        y0, found = sample(3, 182, seed=3), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                solution = solve(
                    lambda t, y: torch.sin(y @ weight), y0, [0.0, 1.0], method="rk4", options={"step_size": 0.5},
                    engine="compiled",
                )  # fmt: skip
                assert solution.stats.compiled == "solve"
                found += torch.autograd.grad(solution.y.square().sum(), weight)
            finally:
                torch.set_num_threads(1)
        assert torch.equal(*found)
        assert found[0].abs().max() > 0

    def test_if_they_cannot_be_compiled_the_whole_step_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tried = []

        def fails(self: ComposedSteps) -> Any:
            tried.append(self)
            raise CompileError("cannot")

        monkeypatch.setattr(ComposedSteps, "step", fails)
        assert_same(network, sample(4, 3, seed=3))
        assert tried

    @pytest.mark.parametrize(("size", "kinds"), [(1 << 15, [ComposedSteps, WholeSteps]), (1 + (1 << 15), [WholeSteps])])
    def test_states_beyond_some_size_take_whole_steps(self, size: int, kinds: list[type]) -> None:
        like = torch.zeros(size)
        layout = Layout(like, Packing.of(like), scheme_of(METHODS["dopri5"], True), Tolerance(1e-3, 1e-3, [0, size]))
        captured: Any = None
        assert [type(steps) for steps in plans.ways_of_compiling(captured, layout)] == kinds


@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_with_gaps_in_memory_are_read_where_they_lie(way: None, requires_grad: bool) -> None:
    table = torch.zeros(3, 2, dtype=torch.float64)  # a column has gaps, but where all is zero none shows
    column = table[:, 1].requires_grad_(requires_grad)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return column * torch.cos(t) - y * B

    def solved(engine: str) -> list[Tensor]:
        y0 = sample(3).requires_grad_()
        solution = solve(func, y0, OUTPUTS, engine=engine, rtol=1e-4, atol=1e-5)
        assert engine == "eager" or solution.stats.compiled == "solve", solution.stats.reason
        wanted = [y0, B, *([column] if requires_grad else [])]
        return [solution.y.detach(), *torch.autograd.grad(solution.y.square().sum(), wanted)]

    for values in (0.0, 1.0, 2.0), (3.0, -1.0, 0.5):
        torch.testing.assert_close(solved("compiled"), solved("eager"), rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            column.copy_(torch.tensor(values))
    torch.testing.assert_close(solved("compiled"), solved("eager"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_tensor_given_as_several_args_has_the_sum_of_their_gradients(way: None, create_graph: bool) -> None:
    def solved(engine: str) -> list[Tensor]:
        y0 = sample(3).requires_grad_()
        solution = solve(
            lambda t, y, p, q: B * q.square() - p * y, y0, OUTPUTS, args=(B, B), engine=engine, rtol=1e-4, atol=1e-5
        )
        assert engine == "eager" or solution.stats.compiled == "solve", solution.stats.reason
        found = torch.autograd.grad(solution.y.square().sum(), [y0, B], create_graph=create_graph)
        return [solution.y.detach(), *(x.detach() for x in found)]

    torch.testing.assert_close(solved("compiled"), solved("eager"), rtol=1e-9, atol=1e-12)
