"""Lanes that are threads: the steps of vectors bit for bit, as a loop on the CPU, and as CUDA that nvcc compiles.

Nothing here runs on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
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
from aca_ext.engines.compiled import library_cache
from aca_ext.engines.ensemble import build, cuda_build, plan, thread_library

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

BATCH = 23
MOST_THREADS = 7  # of the loop on the CPU (csrc/ensemble/threads.cuh)


def command_of_cpp() -> list[str]:
    """The C++ compiler without torch's functions of vectors, which differ from those of C++ in the last bits."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return [get_cpp_compiler(), *build._FLAGS, f"-I{build.headers()}"]


def library_on_cpu(source: str, _: torch.device) -> Any:
    def compile_to(to: Path) -> None:
        library_cache.run_compiler([*command_of_cpp(), str(library_cache.source_file(to)), "-o", str(to)], source, to)

    parts = [*library_cache.origin(), source, *command_of_cpp(), build.state_of_headers()]
    return library_cache.library(parts, compile_to)


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Function that chooses the lanes of the plans that are made next."""
    monkeypatch.setattr(build, "_command", lambda: tuple(command_of_cpp()))
    monkeypatch.setattr(build, "_vector_functions", dict)
    monkeypatch.setattr(thread_library, "load", library_on_cpu)
    return lambda kind: monkeypatch.setattr(plan, "lanes_of", lambda _: kind)


class Hamiltonian(nn.Module):
    """Its slope is a gradient taken inside func."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

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
    "van_der_pol": (lambda: van_der_pol, lambda: sample(BATCH, 2), lambda: (3 * learnt(BATCH, 1),), {"method": "dopri8"}),
    "robertson": (lambda: robertson, lambda: 0.1 * sample(BATCH, 3).abs() + 0.5, lambda: (learnt(BATCH, 3),), {"method": "bosh3"}),
    "network": (Network, lambda: sample(BATCH, 2), tuple, {}),
    "torch.func.grad": (Hamiltonian, lambda: sample(BATCH, 2), tuple, {"method": "tsit5"}),
    "step_t": (lambda: pulses, lambda: sample(BATCH, 1), lambda: (learnt(BATCH, 1),),
               {"options": {"jump_t": [0.7], "step_t": [0.2, 0.25]}}),
    "backward in time": (lambda: pulses, lambda: sample(BATCH, 1), lambda: (learnt(),),
                         {"t": -T, "rtol": torch.logspace(-3, -7, BATCH, dtype=torch.float64)[:, None]}),
    "controller": (lambda: lotka_volterra, lambda: sample(BATCH, 2).abs() + 0.3, lambda: (learnt(BATCH, 4),),
                   {"options": {"pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.1, "first_step": 0.01}}),
}  # fmt: skip


def solved(case: str, dtype: torch.dtype = torch.float64) -> tuple[Any, tuple[Tensor, ...], list[Tensor]]:
    """The solution, the gradients of y0 and of what belongs to samples, and of what they share."""
    make_func, make_y0, make_args, call = CASES[case]
    torch.manual_seed(0)
    func = make_func()
    func = func.to(dtype) if isinstance(func, nn.Module) else func
    y0, args = (x.detach().to(dtype).requires_grad_() for x in (make_y0(),)), make_args()
    (y0,) = y0
    args = tuple(x.detach().to(dtype).requires_grad_() for x in args)
    call = {**CALL, **call, "options": INDEPENDENT | call.get("options", {})}
    t = call.pop("t", T)
    sol = aca_ext.solve(lambda *operands: func(*operands), y0, t, args=args, engine="compiled", **call)
    assert sol.stats.compiled == "solve"
    shared = [x for x in args if x.dim() == 0]
    shared += func.parameters() if isinstance(func, nn.Module) else []
    own = [y0, *(x for x in args if x.dim() > 0)]
    grads = torch.autograd.grad(weighted(sol.y), [*own, *shared])
    return sol, grads[: len(own)], list(grads[len(own) :])


class TestThreadsOnTheCpu:
    def check(self, kinds: Callable[[str], None], case: str, dtype: torch.dtype = torch.float64) -> None:
        kinds("vectors")
        vectors, own, shared = solved(case, dtype)
        kinds("threads")
        threads, own_of_threads, shared_of_threads = solved(case, dtype)
        assert torch.equal(threads.y, vectors.y)
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

    @pytest.mark.parametrize("case", ["lotka_volterra", "network"])
    def test_float32(self, kinds: Callable[[str], None], case: str) -> None:
        self.check(kinds, case, torch.float32)
