"""Lanes that are threads, as a loop on the CPU: the steps of vectors, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import sample
from test_ensemble import CALL, INDEPENDENT, T, lotka_volterra, robertson, van_der_pol, weighted
from torch import Tensor, nn

import aca_ext
from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.ensemble import engine as ensemble_engine
from aca_ext.engines.ensemble import thread_library
from aca_ext.engines.ensemble.library import Record
from aca_ext.engines.ensemble.thread_library import ThreadRecord

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

BATCH = 23


class Hamiltonian(nn.Module):
    """Its slope is a gradient taken inside func."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1, bias=False)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: self.net(x).sum())(y)
        return torch.stack((slope[..., 1], -slope[..., 0]), -1) - 0.1 * y


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 24), nn.Tanh(), nn.Linear(24, 2), nn.Softplus()).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat((y, t), -1)) - y


def pulses(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
    return torch.where(t < 0.7, rate * y, -rate * y) + torch.exp(-t) * torch.sin(y)


def learnt(*shape: int) -> Tensor:
    return (sample(*shape, seed=1).abs() + 0.3).requires_grad_()


# Of each case: what makes func, y0, args, and further arguments of the solve.
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], Callable[[], tuple[Tensor, ...]], dict[str, Any]]] = {
    "lotka_volterra": (lambda: lotka_volterra, lambda: sample(BATCH, 2).abs() + 0.3, lambda: (learnt(BATCH, 4),), {}),
    "van_der_pol": (lambda: van_der_pol, lambda: sample(BATCH, 2), lambda: (3 * learnt(BATCH, 1),),
                    {"method": "dopri8"}),
    "robertson": (lambda: robertson, lambda: 0.1 * sample(BATCH, 3).abs() + 0.5, lambda: (learnt(BATCH, 3),),
                  {"method": "bosh3"}),
    "network": (Network, lambda: sample(BATCH, 2), tuple, {}),
    "torch.func.grad": (Hamiltonian, lambda: sample(BATCH, 2), tuple, {"method": "tsit5"}),
    "step_t": (lambda: pulses, lambda: sample(BATCH, 1), lambda: (learnt(BATCH, 1),),
               {"options": {"jump_t": [0.7], "step_t": [0.2, 0.25]}}),
    "backward in time": (lambda: pulses, lambda: sample(BATCH, 1), lambda: (learnt(),),
                         {"t": -T, "rtol": torch.logspace(-3, -7, BATCH, dtype=torch.float64)[:, None]}),
    "ragged": (lambda: pulses, lambda: sample(BATCH, 1), lambda: (learnt(BATCH, 1),),
               {"t": torch.where(torch.arange(5) > torch.arange(BATCH)[:, None], math.nan, T + sample(BATCH, 1))}),
    "controller": (lambda: lotka_volterra, lambda: sample(BATCH, 2).abs() + 0.3, lambda: (learnt(BATCH, 4),),
                   {"options": {"pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.1, "first_step": 0.01}}),
}  # fmt: skip


def solved(case: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Any, Any, Any]:
    """The solution, the gradients of y0 and of what belongs to samples, and of what they share."""
    make_func, make_y0, make_args, call = CASES[case]
    torch.manual_seed(0)
    func = make_func()
    func = func.to(device, dtype) if isinstance(func, nn.Module) else func
    y0, *args = (x.detach().to(device, dtype).requires_grad_() for x in (make_y0(), *make_args()))
    call = {**CALL, **call, "options": INDEPENDENT | call.get("options", {})}
    t = call.pop("t", T)
    sol = aca_ext.solve(lambda *operands: func(*operands), y0, t, args=tuple(args), engine="compiled", **call)
    assert sol.stats.compiled == "solve", sol.stats.reason
    shared = [x for x in args if x.dim() == 0]
    shared += func.parameters() if isinstance(func, nn.Module) else []
    own = [y0, *(x for x in args if x.dim() > 0)]
    grads = torch.autograd.grad(weighted(sol.y.nan_to_num()), [*own, *shared])
    return sol, grads[: len(own)], list(grads[len(own) :])


def record_of(sol: Any) -> Any:
    return vars(sol)["_plan"][1]._record


class TestThreadsOnTheCpu:
    def check(self, kinds: Callable[[str], None], case: str, dtype: torch.dtype = torch.float64) -> None:
        kinds("vectors")
        vectors, own, shared = solved(case, dtype)
        kinds("threads")
        threads, own_of_threads, shared_of_threads = solved(case, dtype)
        assert [type(record_of(sol)) for sol in (vectors, threads)] == [Record, ThreadRecord]
        assert torch.equal(threads.y.isnan(), vectors.y.isnan())
        assert torch.equal(threads.y.nan_to_num(), vectors.y.nan_to_num())
        assert len(set(threads.stats.n_steps.tolist())) > 1
        for count in ("n_steps", "n_accepted", "n_rejected"):
            assert torch.equal(getattr(threads.stats, count), getattr(vectors.stats, count))
        assert threads.stats.n_f_rows == vectors.stats.n_f_rows
        assert threads.stats.n_f_evals_backward == vectors.stats.n_f_evals_backward
        for one, other in zip(threads.steps, vectors.steps, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(own_of_threads, own, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(shared_of_threads, shared, strict=True):  # sums over samples in another order
            assert relative_error(one, other) <= (1e-13 if dtype == torch.float64 else 1e-6)

    @pytest.mark.parametrize("case", CASES)
    def test_steps_and_gradients_are_those_of_vectors(self, kinds: Callable[[str], None], case: str) -> None:
        self.check(kinds, case)

    def test_by_the_way_to_a_gpu(self, kinds: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ensemble_engine, "is_on_gpu", lambda _: True)
        self.check(kinds, "network")
        with pytest.raises(errors.CompileError, match="checkpoints"):
            aca_ext.odeint(
                lambda t, y: -y, learnt(BATCH, 2), T, checkpoints=4, options=INDEPENDENT, engine="compiled", **CALL
            )
        times = 2 * T  # with those of before it would be a repeated solve, which there are for states on a CPU alone
        with pytest.raises(errors.CompileError, match=r"on a GPU in compiled threads alone.*BatchNorm|running"):
            aca_ext.odeint(
                nn.BatchNorm1d(2).double(), learnt(BATCH, 2), times, options=INDEPENDENT, engine="compiled", **CALL
            )

    @pytest.mark.parametrize("case", ["lotka_volterra", "network"])
    def test_float32(self, kinds: Callable[[str], None], case: str) -> None:
        self.check(kinds, case, torch.float32)


class TestRecord:
    """Memory for steps, of which threads take pieces."""

    def test_too_little_memory_makes_the_solve_again(
        self, kinds: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kinds("vectors")
        expected = solved("lotka_volterra")
        kinds("threads")
        sizes: list[int] = []
        memory = thread_library.ThreadLibrary._memory
        monkeypatch.setattr(
            thread_library.ThreadLibrary, "_memory", lambda self, size: sizes.append(size) or memory(self, size)
        )
        monkeypatch.setattr(thread_library, "_STEPS_AT_FIRST", 0)
        sol, grads, _ = solved("lotka_volterra")
        assert len(sizes) == 2
        assert sizes[0] < sizes[1]
        assert torch.equal(sol.y, expected[0].y)
        for one, other in zip(grads, expected[1], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(sol.steps, expected[0].steps, strict=True):
            assert torch.equal(one, other)

    def test_is_freed_with_the_graph(self, kinds: Callable[[str], None]) -> None:
        kinds("threads")
        y0, rates = (sample(BATCH, 2).abs() + 0.3).requires_grad_(), learnt(BATCH, 4)
        call = {**CALL, "options": INDEPENDENT, "engine": "compiled", "args": (rates,)}
        sol = aca_ext.solve(lambda *operands: lotka_volterra(*operands), y0, T, **call)
        record = record_of(sol)
        assert record.has_states
        one = torch.autograd.grad(weighted(sol.y), (y0, rates), retain_graph=True)
        assert record.has_states
        for grad, again in zip(one, torch.autograd.grad(weighted(sol.y), (y0, rates)), strict=True):
            assert torch.equal(grad, again)
        sol.y.detach_()
        assert not record.has_states
        assert len(sol.steps) == BATCH  # which are found by another solve

    def test_checkpoints_are_refused(self, kinds: Callable[[str], None]) -> None:
        kinds("threads")
        with pytest.raises(errors.CompileError, match="checkpoints"):
            aca_ext.solve(
                lambda t, y: -y, learnt(BATCH, 2), T, checkpoints=4, options=INDEPENDENT, engine="compiled", **CALL
            )


def explosive(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return p * y * y


def test_samples_that_fail(kinds: Callable[[str], None]) -> None:
    y0, p = torch.ones(4, 1, dtype=torch.float64), torch.tensor([[0.1], [2.0], [-1.0], [math.nan]]).double()
    found = {}
    for kind in ("vectors", "threads"):
        kinds(kind)
        leaves = [x.clone().requires_grad_() for x in (y0, p)]
        call = {**CALL, "args": (leaves[1],), "engine": "compiled"}
        with pytest.raises(errors.SolveError, match=r"The solve of sample 1 \(and 1 more\)"):
            aca_ext.solve(lambda *operands: explosive(*operands), leaves[0], T, options=INDEPENDENT, **call)
        options = INDEPENDENT | {"on_failure": "nan"}
        sol = aca_ext.solve(lambda *operands: explosive(*operands), leaves[0], T, options=options, **call)
        assert sol.y[:, [1, 3]].isnan().all()
        assert not sol.y[:, [0, 2]].isnan().any()
        found[kind] = sol, torch.autograd.grad(weighted(sol.y[:, [0, 2]]), leaves)
    (sol, grads), (expected, of_vectors) = found["threads"], found["vectors"]
    assert [(type(e), str(e)) for e in sol.stats.failures] == [(type(e), str(e)) for e in expected.stats.failures]
    for one, other in zip(grads, of_vectors, strict=True):
        assert torch.equal(one, other)
        assert not one[[1, 3]].any()


def test_progress(kinds: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    kinds("threads")
    aca_ext.solve(lambda t, y: -y, sample(BATCH, 2), T, progress=True, options=INDEPENDENT, engine="compiled", **CALL)
    assert f"{BATCH}.0/{BATCH}.0 " in capsys.readouterr().err
