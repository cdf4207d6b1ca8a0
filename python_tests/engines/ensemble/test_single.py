"""Single problems with an implicit method on a compiled lane: steps, gradients and repeated solves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import sample
from test_ensemble import weighted
from torch import Tensor, nn

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

T = torch.tensor([0.0, 0.3, 4.0, 40.0], dtype=torch.float64)
START = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
RATES = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64)
COUNTS = ("n_f_evals", "n_steps", "n_accepted", "n_rejected", "n_jacobians", "n_factorizations", "n_newton_iterations")


def robertson(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    assert t.shape == ()
    assert y.shape == (3,)
    a, b, c = y.unbind()
    made, lost, burnt = p[0] * a * (1 + 0.5 * torch.sin(t)), p[1] * b * c, p[2] * b * b
    return torch.stack([lost - made, made - lost - burnt, burnt])


def solve(engine: str, func: Any, y0: Any, t: Any = T, args: Any = (), **call: Any) -> aca_ext.Solution:
    return aca_ext.solve(
        func, y0, t, args=args, engine=engine, **{"method": "kvaerno5", "rtol": 1e-5, "atol": 1e-9} | call
    )


def both(func: Any, y0: Any, t: Any = T, args: Any = (), **call: Any) -> tuple[aca_ext.Solution, aca_ext.Solution]:
    """The solution on a lane, and that of the eager engine, with the same counts."""
    lane, eager = (solve(engine, func, y0, t, args, **call) for engine in ("compiled", "eager"))
    assert lane.stats.compiled == "solve", lane.stats.reason
    for name in COUNTS:
        assert getattr(lane.stats, name) == getattr(eager.stats, name)
    return lane, eager


def inputs() -> tuple[Tensor, Tensor]:
    return START.clone().requires_grad_(), RATES.clone().requires_grad_()


class TestSteps:
    @pytest.mark.parametrize("method", ["kvaerno3", "kvaerno5", "trbdf2"])
    def test_and_gradients_are_those_of_the_eager_engine(self, method: str) -> None:
        y0, p = inputs()
        lane, eager = both(robertson, y0, args=(p,), method=method)
        assert isinstance(lane.stats, aca_ext.Stats)
        assert lane.steps.shape == eager.steps.shape
        assert relative_error(lane.steps, eager.steps) <= 1e-9
        assert relative_error(lane.y, eager.y) <= 1e-9
        found, expected = (torch.autograd.grad(weighted(one.y), (y0, p)) for one in (lane, eager))
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-8
        assert lane.stats.n_f_evals_backward > lane.stats.n_accepted

    def test_are_those_of_a_batch_of_one(self) -> None:
        def batched(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
            return robertson(t[0, 0], y[0], p)[None]

        lane = solve("compiled", robertson, START, args=(RATES,))
        batch = solve("compiled", batched, START[None], args=(RATES,), options={"batch": "independent"})
        assert torch.equal(lane.y, batch.y[:, 0])
        assert torch.equal(lane.steps, batch.steps[0])

    def test_to_a_late_end(self) -> None:
        """The published end of Robertson's problem, whose rates do not depend on time."""
        t = torch.tensor([0.0, 1e11], dtype=torch.float64)
        lane, _ = both(lambda t, y, p: robertson(0 * t, y, p), START, t, (RATES,), rtol=1e-6, atol=1e-12)
        end = torch.tensor([0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050], dtype=torch.float64)
        assert ((lane.y[-1] - end).abs() <= 10 * (1e-12 + 1e-6 * end)).all()

    @pytest.mark.parametrize("shape", [(), (1,), (32,), (2, 3)])
    def test_of_states_of_other_shapes(self, shape: tuple[int, ...]) -> None:
        y0 = sample(*shape).requires_grad_()
        lane, eager = both(lambda t, y: torch.cos(t) - 3 * y - y.sum() ** 3, y0, T[:3])
        assert relative_error(lane.y, eager.y) <= 1e-9
        found, expected = (torch.autograd.grad(weighted(one.y), y0)[0] for one in (lane, eager))
        assert relative_error(found, expected) <= 1e-8

    def test_of_a_transposed_state_with_tolerances_for_its_elements(self) -> None:
        matrix = sample(3, 2).T.requires_grad_()
        atol = torch.logspace(-9, -4, 6, dtype=torch.float64).view(2, 3)
        lane, eager = both(lambda t, y: -y * torch.arange(1.0, 4.0).double(), matrix, T[:3], atol=atol)
        assert relative_error(lane.y, eager.y) <= 1e-9
        found, expected = (torch.autograd.grad(weighted(one.y), matrix)[0] for one in (lane, eager))
        assert relative_error(found, expected) <= 1e-8

    def test_of_trees_and_float32(self) -> None:
        def func(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"x": -50 * (y["x"] - y["c"]), "c": -y["c"] * torch.cos(t)}

        y0 = {"x": torch.ones(2, 2), "c": torch.tensor(0.5)}
        lane, eager = (solve(engine, func, y0, T[:3].float(), rtol=1e-3, atol=1e-5) for engine in ("compiled", "eager"))
        assert lane.stats.compiled == "solve", lane.stats.reason
        for name, x in lane.y.items():
            assert x.dtype == torch.float32
            torch.testing.assert_close(x, eager.y[name], rtol=1e-3, atol=1e-4)

    def test_backwards_with_stops_and_jumps(self) -> None:
        def switched(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t > 1.5, 5 * (y - 1), 5 * (y - 3))

        t = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
        lane, eager = both(switched, sample(2), t, options={"jump_t": [1.5], "step_t": [2.2], "first_step": 1e-3})
        assert relative_error(lane.y, eager.y) <= 1e-9
        assert {1.5, 2.2} <= set(lane.steps[:, 1].tolist())

    @pytest.mark.parametrize(
        "func",
        [
            lambda t, y, a: a @ y - y,
            lambda t, y, a: torch.cumsum(y, 0) - 2 * y + a[0] * torch.roll(y, 1),
            lambda t, y, a: torch.diff(y, prepend=y[-1:]) - y * torch.dot(y, a[1]) - y.softmax(0),
        ],
    )
    def test_of_funcs_of_vectors(self, func: Callable[..., Tensor]) -> None:
        y0, a = sample(4).requires_grad_(), sample(4, 4, seed=1).requires_grad_()
        lane, eager = both(func, y0, T[:2], (a,))
        found, expected = (torch.autograd.grad(weighted(one.y), (y0, a)) for one in (lane, eager))
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-8

    def test_at_a_single_time(self) -> None:
        y0, p = inputs()
        y = solve("compiled", robertson, y0, [0.0], (p,)).y
        assert torch.equal(y, START[None])
        assert torch.equal(torch.autograd.grad(y.sum(), y0)[0], torch.ones(3, dtype=torch.float64))
        assert solve("compiled", lambda t, y: -y, START[:0], T).y.shape == (4, 0)


class TestGradients:
    def test_are_those_of_finite_differences(self) -> None:
        _, p = inputs()

        def end(p: Tensor) -> Tensor:
            return solve("compiled", robertson, START, args=(p,), rtol=1e-9, atol=1e-14).y[-1, 2]

        grad = torch.autograd.grad(end(p), p)[0]
        with torch.no_grad():
            for i in range(3):
                moved = 1e-4 * RATES * torch.eye(3, dtype=torch.float64)[i]
                near, far = (end(RATES + n * moved) - end(RATES - n * moved) for n in (1, 2))
                expected = (8 * near - far) / (12 * moved[i])
                assert grad[i].item() == pytest.approx(expected.item(), rel=1e-6)

    def test_of_an_embedding_with_sparse_gradients(self) -> None:
        rows = nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
        lane, eager = both(lambda t, y: -y * rows(torch.tensor(2)).exp(), sample(3), T[:3])
        found, expected = (torch.autograd.grad(weighted(one.y), rows.weight)[0].to_dense() for one in (lane, eager))
        assert relative_error(found, expected) <= 1e-9

    def test_of_parameters_and_of_those_that_are_named(self) -> None:
        func, y0 = Decay(), sample(3)
        names = [name for name, _ in func.named_parameters()]
        lane, eager = both(func, y0, T[:3])
        found, expected = (torch.autograd.grad(weighted(one.y), tuple(func.parameters())) for one in (lane, eager))
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) <= 1e-8
        weight = func.net.weight
        y = solve("compiled", func, y0, T[:3], params=(weight,)).y
        named = torch.autograd.grad(weighted(y), tuple(func.parameters()), allow_unused=True)
        assert torch.equal(named[names.index("net.weight")], found[names.index("net.weight")])
        assert all(x is None for x, name in zip(named, names, strict=True) if name != "net.weight")

    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
    def test_with_a_tolerance_near_rounding(self, dtype: torch.dtype, rtol: float) -> None:
        """Newton's method ends at rounding there, and so far may the repeated steps be from the forward pass."""

        def func(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
            return -50 * k * (y - torch.cos(t)) * (1 + y * y)

        found = []
        for engine in ("compiled", "eager"):
            k = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
            y = solve(engine, func, torch.ones(3, dtype=dtype), [0.0, 2.0], (k,), rtol=rtol, atol=1e-3 * rtol).y
            found.append(torch.autograd.grad(y[-1].sum(), k)[0])
        assert relative_error(*found) <= 1e3 * torch.finfo(dtype).eps / rtol**0.5

    def test_of_the_times(self) -> None:
        found = []
        for engine in ("compiled", "eager"):
            (y0, p), t = inputs(), T.clone().requires_grad_()
            found.append(torch.autograd.grad(weighted(solve(engine, robertson, y0, t, (p,)).y), (t, p, y0)))
        for of_lane, expected in zip(*found, strict=True):
            assert relative_error(of_lane, expected) <= 1e-8

    def test_second_ones_are_those_of_the_eager_engine(self) -> None:
        y0, p = inputs()
        found = []
        for solution in both(robertson, y0, args=(p,)):
            first = torch.autograd.grad(solution.y[1:].square().sum(), (y0, p), create_graph=True)
            total = first[0].sum() + (RATES * first[1]).sum()
            found.append((*first, *torch.autograd.grad(total, (y0, p))))
        for of_lane, expected in zip(*found, strict=True):
            assert relative_error(of_lane, expected) <= 1e-8

    def test_second_ones_notice_a_changed_func(self) -> None:
        y0, p = inputs()
        scale = torch.ones(3, dtype=torch.float64)
        y = solve("compiled", lambda t, y, p: robertson(t, y, p) * scale, y0, args=(p,)).y
        scale[0] = 2.0
        torch.autograd.grad(y.sum(), p, retain_graph=True)  # the numbers of the forward pass
        with pytest.raises(errors.ReplayError, match="func has changed since the forward pass"):
            torch.autograd.grad(y.sum(), p, create_graph=True)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_of_inputs_with_a_history_and_hooks(self, create_graph: bool) -> None:
        """Arg k is computed from w, which func uses too."""
        found, calls = [], []
        for engine in ("compiled", "eager"):
            w, y0 = sample(2).requires_grad_(), sample(2, seed=1)
            w.register_hook(lambda g: (calls.append(1), 2 * g)[1])
            k = torch.exp(w)
            k.register_hook(lambda g: 3 * g)
            solution = solve(engine, lambda t, y, k, w=w: w * torch.sin(t) - 20 * k * y, y0, T[:2], (k,))
            assert solution.stats.compiled == ("solve" if engine == "compiled" else "")
            grads = torch.autograd.grad(weighted(solution.y), (w, k), retain_graph=True, create_graph=create_graph)
            found.append(grads)
        assert len(calls) == 2
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-8

    def test_second_ones_notice_a_changed_start(self) -> None:
        """The end of a stiff solve hardly depends on its start, so comparing ends would not show the change."""

        def func(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
            return -50 * k * (y - torch.cos(t))

        t, k = T[[0, 2]], torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        for is_learnt in (True, False):
            y0 = sample(2).requires_grad_(is_learnt)
            y = solve("compiled", func, y0, t, args=(k,)).y
            expected = torch.autograd.grad(y.square().sum(), k, retain_graph=True)[0]
            y0.data.add_(0.5)
            if is_learnt:
                with pytest.raises(errors.ReplayError, match="y0 has changed since the forward pass"):
                    torch.autograd.grad(y.square().sum(), k, create_graph=True)
            else:
                found = torch.autograd.grad(y.square().sum(), k, create_graph=True)[0]
                assert relative_error(found, expected) <= 1e-8

    def test_a_changed_input_is_an_error(self) -> None:
        y0, p = inputs()
        y = solve("compiled", robertson, y0, args=(p,)).y
        with torch.no_grad():
            p *= 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 3).double()
        self.rate = nn.Parameter(torch.tensor(20.0, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y)) - self.rate * y


class TestRepeatedSolves:
    def test_see_new_values_and_a_changed_func(self) -> None:
        func = Decay()
        for rate, y0 in ((20.0, sample(3)), (2.0, sample(3)), (3.0, sample(3, seed=1))):
            with torch.no_grad():
                func.rate.fill_(rate)
            both(func, y0, T[:3])
        func.net = nn.Linear(3, 3, bias=False).double()
        lane, eager = both(func, sample(3), T[:3])
        assert relative_error(lane.y, eager.y) <= 1e-9

    def test_compile_once(self) -> None:
        seconds = [solve("compiled", robertson, START, T + i, (RATES * (1 + i),)).stats.compile_seconds for i in (0, 1)]
        assert seconds[1] == 0

    def test_by_the_choice_of_the_package(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return -10 * y

        engines = [solve("auto", func, START, T[:2]).stats.engine for _ in range(3)]
        assert engines == ["eager", "eager", "compiled"]

    def test_do_not_keep_func_and_state(self) -> None:
        func, y0 = Decay(), sample(3).requires_grad_()
        y = solve("compiled", func, y0, T[:2]).y
        y.sum().backward()
        watched = [weakref.ref(x) for x in (func, y0, func.net)]
        del func, y0, y
        gc.collect()
        assert [x() for x in watched] == [None] * 3
