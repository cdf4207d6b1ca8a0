"""Steps and transposed steps in C++, several per call, against the same steps made one by one in Python."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from problems import RUNGE_KUTTA
from torch import Tensor, nn

import aca_ext
from aca_ext.numerics.methods import METHODS
from aca_ext.solver import runge_kutta
from aca_ext.solver.loop import Solver

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
FORWARD, BACKWARD = (0.0, 1.3, 4.0), (4.0, 3.9, 1.3, 0.0)


class Oscillator(nn.Module):
    """Oscillators of two frequencies, with a wall at y = 2 that makes steps fail."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 7.0], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        q, v = y.unbind(-1)
        return torch.stack((self.w * v, -self.w * q - torch.tanh(20 * (q - 0.5)) + torch.sin(3 * t)), -1)


def y0() -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.3, -0.2]], dtype=torch.float64, requires_grad=True)


def solved(func: Callable[..., Tensor], t: tuple[float, ...], **settings: Any) -> tuple[aca_ext.Solution, list[Tensor]]:
    start = y0()
    solution = aca_ext.solve(func, start, t, **{"rtol": 1e-6, "atol": 1e-6, **settings})
    inputs = [start, *(func.parameters() if isinstance(func, nn.Module) else ())]
    return solution, list(torch.autograd.grad(solution.y.square().sum(), inputs))


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after whose call every step and transposed step is made in Python."""

    def patch() -> None:
        monkeypatch.setattr(Solver, "_runs_of_steps", lambda self: None)
        monkeypatch.setattr(runge_kutta, "compiled_stepper", lambda ops, scheme: None)

    return patch


class TestSameBits:
    def check(self, one_by_one: Callable[[], None], t: tuple[float, ...], **settings: Any) -> aca_ext.Solution:
        func = Oscillator()
        compiled, grads = solved(func, t, **settings)
        one_by_one()
        seen, seen_grads = solved(func, t, **settings)
        assert torch.equal(compiled.steps, seen.steps)
        assert torch.equal(compiled.y, seen.y)
        assert vars(compiled.stats) == vars(seen.stats)
        assert all(map(torch.equal, grads, seen_grads))
        return compiled

    @pytest.mark.parametrize("t", [FORWARD, BACKWARD])
    @pytest.mark.parametrize("method", ADAPTIVE)
    def test_adaptive(self, one_by_one: Callable[[], None], method: str, t: tuple[float, ...]) -> None:
        tolerance = 1e-3 if METHODS[method].order < 3 else 1e-6
        solution = self.check(one_by_one, t, method=method, rtol=tolerance, atol=tolerance)
        assert solution.stats.n_accepted > 20
        assert solution.stats.n_rejected > 0

    @pytest.mark.parametrize("t", [FORWARD, BACKWARD])
    @pytest.mark.parametrize("method", RUNGE_KUTTA)
    def test_fixed(self, one_by_one: Callable[[], None], method: str, t: tuple[float, ...]) -> None:
        self.check(one_by_one, t, method=method, options={"step_size": 0.05})

    @pytest.mark.parametrize(
        "options",
        [
            {"pcoeff": 0.2, "icoeff": 0.7},
            {"pcoeff": 0.1, "icoeff": 0.6, "dcoeff": 0.1},
            {"max_step": 0.03},
            {"min_step": 1e-4, "first_step": 1.0},
            {"safety": 0.5, "ifactor": 1.5, "dfactor": 0.6, "first_step": 3.0},
            {"step_t": [0.5, 1.0, 2.0]},
        ],
    )
    def test_controller(self, one_by_one: Callable[[], None], options: dict[str, Any]) -> None:
        self.check(one_by_one, FORWARD, options=options)

    def test_many_outputs_inside_one_step(self, one_by_one: Callable[[], None]) -> None:
        self.check(one_by_one, tuple(torch.linspace(0, 0.4, 200).tolist()), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("limit", [1, 7, 30])
    def test_step_limit(self, one_by_one: Callable[[], None], limit: int) -> None:
        def failure() -> dict[str, Any]:
            with pytest.raises(aca_ext.errors.StepLimitError) as caught:
                solved(Oscillator(), (0.0, 50.0), options={"max_num_steps": limit})
            return vars(caught.value)

        compiled = failure()
        assert compiled["n_accepted"] + compiled["n_rejected"] == limit
        one_by_one()
        assert failure() == compiled

    @pytest.mark.parametrize("blow_up", [lambda t, y: y * y, lambda t, y: torch.sqrt(1 - t) * y])
    def test_failure(self, one_by_one: Callable[[], None], blow_up: Callable[..., Tensor]) -> None:
        def failure() -> tuple[type, dict[str, Any]]:
            with pytest.raises(aca_ext.errors.SolveError) as caught:
                solved(blow_up, (0.0, 4.0))
            return caught.type, {name: str(value) for name, value in vars(caught.value).items()}

        compiled = failure()
        one_by_one()
        assert failure() == compiled


def _kept_by_numpy(x: Tensor) -> Callable[[], Tensor]:
    array = x.numpy()
    return lambda: torch.from_numpy(array)


def _kept_by_storage(x: Tensor) -> Callable[[], Tensor]:
    storage, start, count = x.untyped_storage(), x.storage_offset(), x.numel()
    return lambda: torch.empty(0, dtype=torch.float64).set_(storage, start, (count,))


def _kept_by_dlpack(x: Tensor) -> Callable[[], Tensor]:
    other = torch.from_dlpack(x)
    return lambda: other


def _kept(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Callable[[], Tensor]]:
    def keep(x: Tensor) -> Callable[[], Tensor]:
        kept = make(x)
        return lambda: kept

    return keep


# Ways for func to keep access to a tensor that it was given.
KEPT = {
    "itself": _kept(lambda x: x),
    "view": _kept(lambda x: x.view(-1)),
    "detached": _kept(lambda x: x.detach()),
    "data": _kept(lambda x: x.data),
    "nested": _kept(lambda x: x[None][0].detach().view_as(x)),
    "numpy": _kept_by_numpy,
    "storage": _kept_by_storage,
    "dlpack": _kept_by_dlpack,
}


class Subclass(torch.Tensor):
    pass


# Ways to mark a tensor without changing its elements, and tests for the mark.
_references: list[Any] = []
MARKS: dict[str, tuple[Callable[..., Any], Callable[..., bool]]] = {
    "attribute": (lambda x: setattr(x, "mark", 1), lambda x: hasattr(x, "mark")),
    "reference": (lambda x: _references.append(weakref.ref(x)), lambda x: weakref.getweakrefcount(x) > 0),
    "grad": (lambda x: x.requires_grad_(), lambda x: x.requires_grad),
    # For times only, since a state of another class is refused.
    "class": (lambda x: x.dim() or setattr(x, "__class__", Subclass), lambda x: type(x) is Subclass),
}

# Ways to change a time in place.
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda t: setattr(t, "data", t.data.reshape(1)),
    "data": lambda t: setattr(t, "data", torch.zeros_like(t)),
    "in place": lambda t: t.zero_(),
    "view in place": lambda t: t.unsqueeze_(0),
    "size": lambda t: t.resize_(300),
    "shared": lambda t: t.share_memory_(),
}


class TestWhatFuncIsGiven:
    @pytest.mark.parametrize("options", [{}, {"step_size": 0.05}])
    def test_stays_as_it_was(self, options: dict[str, float]) -> None:
        seen: list[tuple[Tensor, Tensor, float, Tensor]] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            seen.append((t, y, t.item(), y.clone()))
            return torch.sin(3 * t) - y

        with torch.no_grad():
            aca_ext.odeint(func, y0(), FORWARD, options=options)
        assert len(seen) > 60
        assert all(t.item() == time and torch.equal(y, state) for t, y, time, state in seen)

    @pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
    def test_stays_as_it_was_however_it_is_kept(self, keep: Callable[[Tensor], Callable[[], Tensor]]) -> None:
        seen: list[tuple[Callable[[], Tensor], Tensor]] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            seen.extend((keep(x), x.clone().reshape(-1)) for x in (t, y))
            return torch.sin(3 * t) - y

        with torch.no_grad():
            aca_ext.odeint(func, y0(), FORWARD)
        assert len(seen) > 120
        assert all(torch.equal(kept().reshape(-1), value) for kept, value in seen)

    def test_stays_as_it_was_in_a_graph(self) -> None:
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        seen: list[tuple[Tensor, Tensor]] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                seen.append((w * t + (w * y).sum(), t + y.sum()))
            return torch.sin(3 * t) - y

        with torch.no_grad():
            aca_ext.odeint(func, y0(), FORWARD)
        for graph, value in seen[1:]:  # without the first state, which is the user's tensor
            (grad,) = torch.autograd.grad(graph, w)
            torch.testing.assert_close(grad, value)

    @pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
    def test_bears_no_mark_of_an_evaluation_before(self, mark: tuple[Callable[..., Any], Callable[..., bool]]) -> None:
        make, is_marked = mark
        found: list[bool] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            result = torch.sin(3 * t) - y
            found.extend(map(is_marked, (t, y)))
            for x in (t, y):
                make(x)
            return result

        with torch.no_grad():
            aca_ext.odeint(func, y0(), FORWARD)
        assert len(found) > 120
        assert not any(found[4:])  # the first ones are of the first state, which is the user's tensor

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_is_the_time_whatever_became_of_the_last(self, change: Callable[[Tensor], Any]) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            assert t.shape == ()
            result = torch.sin(3 * t) - y
            change(t)
            return result

        with torch.no_grad():
            expected = aca_ext.odeint(lambda t, y: torch.sin(3 * t) - y, y0(), FORWARD)
            assert torch.equal(aca_ext.odeint(func, y0(), FORWARD), expected)

    @pytest.mark.parametrize(
        "func",
        [
            lambda t, y: y,
            lambda t, y: y.view_as(y),
            lambda t, y: y.detach(),
            lambda t, y: y.T.T,
            lambda t, y: y[:1].expand(2, 2),
            lambda t, y: y.flip(0),
        ],
    )
    @pytest.mark.parametrize("settings", [{}, {"method": "rk4", "options": {"step_size": 0.1}}])
    def test_may_be_returned(
        self, one_by_one: Callable[[], None], func: Callable[..., Tensor], settings: dict[str, Any]
    ) -> None:
        with torch.no_grad():
            compiled = aca_ext.odeint(func, y0(), (0.0, 1.0), **settings)
            one_by_one()
            assert torch.equal(compiled, aca_ext.odeint(func, y0(), (0.0, 1.0), **settings))

    def test_is_given_again_where_func_keeps_nothing(self) -> None:
        if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            pytest.skip("this torch does not let compiled code see tensors")
        last: list[int] = []
        count = 0

        def func(t: Tensor, y: Tensor) -> Tensor:
            nonlocal count
            count += last[-1:] == [id(y)]
            last.append(id(y))
            return torch.sin(3 * t) - y

        with torch.no_grad():
            aca_ext.odeint(func, y0(), FORWARD)
        assert count > 0.5 * len(last)

    def test_is_aligned(self) -> None:
        addresses: list[int] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            addresses.append(y.data_ptr())
            return -y

        with torch.no_grad():
            aca_ext.odeint(func, torch.ones(3, 5), (0.0, 3.0))
        assert all(address % 16 == 0 for address in addresses)


def test_a_func_that_holds_its_result_is_collected() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.p * y

    func = Keeps()
    func.result = aca_ext.odeint(func, y0(), (0.0, 1.0))  # type: ignore[assignment]
    dead = weakref.ref(func)
    del func
    gc.collect()
    assert dead() is None


def test_transposed_step_checks_its_replay() -> None:
    calls = [0]

    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros((), dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            calls[0] += 1
            self.n.add_(1)
            return -y * (1 + calls[0] % 7)

    y = aca_ext.odeint(Forgets(), y0(), (0.0, 1.0), method="rk4", options={"step_size": 0.25})
    with pytest.raises(aca_ext.errors.ReplayError):
        y.sum().backward()


def test_the_step_is_compiled_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    original = runge_kutta.stage_times
    monkeypatch.setattr("aca_ext.solver.loop.stage_times", lambda *args: steps.append(args[1]) or original(*args))
    with torch.no_grad():
        solution = aca_ext.solve(Oscillator(), y0(), (0.0, math.pi))
    assert len(steps) < 0.1 * solution.stats.n_steps


class TestMemoryOfTheLastSolve:
    """Results of solves that reuse the buffers of an earlier one."""

    @staticmethod
    def solve(func: Callable[..., Tensor], start: Tensor) -> Tensor:
        with torch.no_grad():
            y = aca_ext.odeint(func, start, torch.tensor(FORWARD, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        assert isinstance(y, Tensor)
        return y

    def test_is_not_that_of_a_solve_inside_func(self) -> None:
        def inner(t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(3 * t) - y

        def outer(t: Tensor, y: Tensor) -> Tensor:
            return inner(t, y) + 0.1 * self.solve(inner, y)[-1]

        start = y0().detach()
        end = self.solve(inner, start)[-1]
        nested = self.solve(outer, start)
        assert torch.equal(nested, self.solve(outer, start))
        assert torch.equal(end, self.solve(inner, start)[-1])
        # The same solve with another func and other settings, so that it shares no memory.
        apart = aca_ext.odeint(
            lambda t, y: inner(t, y) + 0.1 * aca_ext.odeint(inner, y, FORWARD, rtol=1e-6, atol=1e-6)[-1].detach(),
            start,
            FORWARD,
            rtol=1e-6,
            atol=1e-6,
        )
        assert torch.equal(nested, apart.detach())

    def test_is_not_that_of_another_thread(self) -> None:
        starts = [y0().detach() + i for i in range(4)]

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(3 * t) - y

        expected = [self.solve(func, start) for start in starts]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda i: self.solve(func, starts[i % 4]), range(40)))
        assert all(torch.equal(y, expected[i % 4]) for i, y in enumerate(found))

    def test_is_of_the_layout_of_the_state(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return y * torch.arange(6.0).view(2, 3) * -0.1

        start = torch.arange(6.0).view(2, 3)
        other = start.T.contiguous().T
        assert all(torch.equal(self.solve(func, start), self.solve(func, other)) for _ in range(3))

    def test_is_let_go_where_a_solve_failed(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(3 * t) - y

        def fails(t: Tensor, y: Tensor) -> Tensor:
            if t > 2:
                raise ZeroDivisionError
            return func(t, y)

        start = y0().detach()
        expected = self.solve(func, start)
        with pytest.raises(ZeroDivisionError):
            self.solve(fails, start)
        assert torch.equal(self.solve(func, start), expected)

    def test_serves_no_inference_tensors(self) -> None:
        seen: list[bool] = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            seen.append(y.is_inference())
            return -y

        start = y0().detach()
        with torch.inference_mode():
            self.solve(func, start)
        seen.clear()
        self.solve(func, start)
        assert not any(seen)
