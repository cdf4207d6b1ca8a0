"""checkpoints=K on compiled lanes: the gradient of a full record, from few states of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import DrivenMlp, sample
from test_ensemble import T, forget_peak, inputs_of, resident, solve, weighted
from test_ensemble_stops import inputs, own_times, switched
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aca_ext import errors
from aca_ext.engines.compiled import engine as compiled_engine

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

POLICIES = [1, 2, 3, 7, 30, 10**30, "cpu"]


def check(
    func: Any, y0: Tensor, args: tuple[Tensor, ...], shared: Sequence[Tensor] = (), t: Any = T, **call: Any
) -> None:
    """Outputs, and gradients of what samples have for themselves, are those of all states, bit for bit."""
    own = [x for x in (y0, *args) if x.requires_grad and len(x) == len(y0)]
    others = [x for x in (*args, *shared) if x.requires_grad and not any(x is y for y in own)]
    full = solve("compiled", func, y0, t, args, **call)
    expected = torch.autograd.grad(weighted(full.y), own + others)
    for policy in POLICIES:
        sol = solve("compiled", func, y0, t, args, checkpoints=policy, **call)
        assert torch.equal(sol.y, full.y)
        found = torch.autograd.grad(weighted(sol.y), own + others)
        for i, (grad, exact) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(grad, exact) if i < len(own) else relative_error(grad, exact) <= 1e-12


class TestGradients:
    @pytest.mark.parametrize("name", ["lotka_volterra", "epidemic"])
    def test_of_each_sample(self, name: str) -> None:
        func, y0, p = inputs_of(name, 301)
        check(func, y0, (p,))

    @pytest.mark.parametrize("method", ["dopri5", "fehlberg2", "dopri8"])
    def test_with_shared_parameters_and_own_times(self, method: str) -> None:
        func = DrivenMlp()
        y0, drive = (sample(4, 3) * 2).requires_grad_(), sample(4, 3, seed=1).requires_grad_()
        rate = torch.tensor([[0.1], [1.0], [4.0], [9.0]], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([[0.0, 0.31, 0.32, 1.3], [0.0, 1.0, 1.1, 1.9], [1.0, 0.9, 0.5, 0.2], [2.0, 2.1, 2.2, 2.3]],
                         dtype=torch.float64)  # fmt: skip
        check(func, y0, (drive, rate), list(func.parameters()), t, method=method)

    def test_with_a_controller_that_remembers(self) -> None:
        func, y0, p = inputs_of("van_der_pol", 21)
        check(func, y0, (p,), options={"pcoeff": 0.4, "icoeff": 0.3, "dcoeff": 0.1})
        check(func, y0, (p,), options={"first_step": 0.3})

    @pytest.mark.parametrize("method", ["dopri5", "fehlberg2"])
    def test_with_jumps(self, method: str) -> None:
        y0, p = inputs()
        check(switched, y0, (p, own_times()), options={"jump_t": own_times(), "step_t": [0.1, 2.4]}, method=method)

    def test_with_samples_that_fail(self) -> None:
        y0 = torch.tensor([[0.1], [2.0], [0.2], [0.3]], dtype=torch.float64, requires_grad=True)
        rate = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
        found = []
        for policy in (None, 2):
            sol = solve("compiled", lambda t, y, r: r * y * y, y0, args=(rate,), checkpoints=policy,
                        options={"on_failure": "nan"})  # fmt: skip
            assert [error.sample for error in sol.stats.failures] == [1]
            found.append(torch.autograd.grad(sol.y.square().nansum(), [y0, rate]))
        for grad, exact in zip(*found, strict=True):
            assert torch.equal(grad, exact)
            assert (grad[[0, 2, 3]] != 0).all()


class TestCounts:
    def test_evaluations_are_those_of_all_steps_again(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 3)
        stats = []
        for policy in (None, 1, 5):
            sol = solve("compiled", func, y0, args=(p,), checkpoints=policy)
            weighted(sol.y).backward()
            stats.append(sol.stats)
        full, one, five = (s.n_f_evals_backward for s in stats)
        most = int(stats[0].n_steps.max())
        assert one == full + 1 + 6 * most
        assert one < five <= one + 4

    def test_the_steps_are_found_again(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 5)
        full, few = (solve("compiled", func, y0, args=(p,), checkpoints=policy) for policy in (None, 3))
        for one, other in zip(full.steps, few.steps, strict=True):
            assert torch.equal(one, other)
        grads = [torch.autograd.grad(weighted(sol.y), (y0, p)) for sol in (full, few)]  # after the steps were asked for
        for grad, exact in zip(*grads, strict=True):
            assert torch.equal(grad, exact)

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is known on Linux only")
    def test_memory(self) -> None:
        func, y0, p = inputs_of("lotka_volterra", 20_000)
        solve("compiled", func, y0, [0.0, 0.1], args=(p,), checkpoints=3).y.sum().backward()
        before = forget_peak()
        sol = solve("compiled", func, y0, [0.0, 20.0], args=(p,), rtol=1e-7, checkpoints=8)
        sol.y.sum().backward()
        n_bytes = int(sol.stats.n_accepted.sum()) * 8 * 9  # an entry and a state of two numbers
        assert n_bytes > 1e8
        assert resident("VmHWM") - before < 0.5 * n_bytes


class TestSavedTensors:
    """Hooks let go of the tensor that owns the recorded states; the gradient must be the same all the same."""

    @pytest.mark.parametrize("policy", [None, 3])
    @pytest.mark.parametrize("retain", [False, True])
    def test_hooks_that_copy(self, policy: int | None, retain: bool) -> None:
        func, y0, p = inputs_of("lotka_volterra", 301)
        expected = torch.autograd.grad(weighted(solve("compiled", func, y0, args=(p,)).y), (y0, p))
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            sol = solve("compiled", func, y0, args=(p,), checkpoints=policy)
            sol.y.detach().zero_()
            for _ in range(1 + retain):
                found = torch.autograd.grad(weighted(sol.y), (y0, p), retain_graph=retain)
                assert all(map(torch.equal, found, expected))
        assert len(sol.steps) == 301

    @pytest.mark.parametrize("policy", [None, 3])
    def test_checkpointed_models(self, policy: int | None) -> None:
        func, y0, p = inputs_of("lotka_volterra", 5)

        def model(y0: Tensor) -> Tensor:
            return weighted(solve("compiled", func, y0, args=(p,), checkpoints=policy).y)

        expected = torch.autograd.grad(model(y0), (y0, p))
        found = torch.autograd.grad(checkpoint(model, y0, use_reentrant=False), (y0, p))
        assert all(map(torch.equal, found, expected))


def test_values_that_are_refused() -> None:
    for value in (0, "gpu"):
        with pytest.raises(errors.ArgumentValueError, match="checkpoints"):
            solve("compiled", lambda t, y: -y, torch.ones(2, 1), checkpoints=value)
