"""Checkpoints: written in place, slots of rejected trials reused, memory bounded, the gradient equal for any policy."""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import comb
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CoupledMlp, DrivenMlp, Mlp, sample
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import aca_ext
from aca_ext import errors
from aca_ext.solver.checkpoints import AcceptedStep, Checkpoints, HostCheckpoints, StepRecord, ThinnedCheckpoints, rows
from aca_ext.solver.reversed_states import brought_to, reversed_states, revolve
from aca_ext.tensor_memory import TensorMemory

pytestmark = pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")

BLOCK_ROWS = 64
BLOCK_BYTES = 1 << 20
STATES = {
    "0-d": torch.tensor(3.0),
    "empty": torch.zeros(0, 2),
    "vector": torch.arange(5.0, dtype=torch.float64),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "channels last": torch.arange(210.0).view(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
}


def filled(y0: Tensor, count: int) -> Checkpoints:
    """Checkpoints of y0, y0 + 1, ..., y0 + count."""
    checkpoints = Checkpoints(y0)
    for i in range(count):
        checkpoints.slot().copy_(y0 + i + 1)
        checkpoints.accept()
    return checkpoints


@pytest.mark.parametrize("y0", STATES.values(), ids=STATES)
class TestEveryState:
    def test_the_first_is_a_copy_of_the_initial_state(self, y0: Tensor) -> None:
        checkpoints = Checkpoints(y0)
        (first,) = rows(checkpoints.blocks, checkpoints.count)
        assert torch.equal(first, y0)
        assert first.data_ptr() != y0.data_ptr() or y0.numel() == 0

    @pytest.mark.parametrize("count", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 2 * BLOCK_ROWS + 3])
    def test_rows_come_in_order_and_no_more_than_were_accepted(self, y0: Tensor, count: int) -> None:
        checkpoints = filled(y0, count)
        checkpoints.slot().fill_(-1)
        states = list(rows(checkpoints.blocks, checkpoints.count))
        assert len(states) == checkpoints.count == count + 1
        assert all(torch.equal(state, y0 + i) for i, state in enumerate(states))

    def test_slots_are_laid_out_like_the_state(self, y0: Tensor) -> None:
        checkpoints = filled(y0, 2)
        assert checkpoints.slot().stride() == y0.stride()
        assert all(row.stride() == y0.stride() for row in rows(checkpoints.blocks, checkpoints.count))
        assert checkpoints.slot().dtype == y0.dtype


class TestSlots:
    def test_a_rejected_trial_leaves_its_slot_to_the_next(self) -> None:
        checkpoints = Checkpoints(torch.zeros(3))
        addresses = {checkpoints.slot().data_ptr() for _ in range(1000)}
        assert len(addresses) == 1
        assert checkpoints.count == 1

    def test_an_accepted_state_is_not_written_again(self) -> None:
        checkpoints = Checkpoints(torch.zeros(3))
        addresses = [row.data_ptr() for row in rows(checkpoints.blocks, 1)]
        for _ in range(3 * BLOCK_ROWS):
            addresses.append(checkpoints.slot().data_ptr())
            checkpoints.accept()
        assert len(set(addresses)) == len(addresses)

    def test_rejected_trials_between_accepted_ones(self) -> None:
        checkpoints = Checkpoints(torch.zeros(2))
        for i in range(1, 100):
            checkpoints.slot().fill_(-i)
            checkpoints.slot().fill_(i)
            checkpoints.accept()
        states = torch.stack(list(rows(checkpoints.blocks, checkpoints.count)))
        assert torch.equal(states[:, 0], torch.arange(100.0))
        assert len(checkpoints.blocks) == 2

    def test_accepting_copies_nothing(self) -> None:
        checkpoints = Checkpoints(torch.zeros(3))
        slot = checkpoints.slot()
        checkpoints.accept()
        *_, last = rows(checkpoints.blocks, checkpoints.count)
        assert last.data_ptr() == slot.data_ptr()


class TestMemory:
    @staticmethod
    def bytes_of(checkpoints: Checkpoints) -> int:
        return sum(block.untyped_storage().nbytes() for block in checkpoints.blocks)

    def test_small_states_share_blocks(self) -> None:
        assert len(filled(torch.zeros(4), BLOCK_ROWS - 1).blocks) == 1
        assert len(filled(torch.zeros(4), BLOCK_ROWS).blocks) == 2

    @pytest.mark.parametrize("numel", [1, 1000, BLOCK_BYTES // 8 // 3, BLOCK_BYTES // 8])
    def test_blocks_are_bounded(self, numel: int) -> None:
        checkpoints = filled(torch.zeros(numel, dtype=torch.float64), 10)
        assert all(block.untyped_storage().nbytes() <= BLOCK_BYTES for block in checkpoints.blocks)
        assert all(len(block) <= BLOCK_ROWS for block in checkpoints.blocks)
        assert self.bytes_of(checkpoints) < checkpoints.count * numel * 8 + BLOCK_BYTES

    def test_large_states_have_a_block_each_and_none_in_reserve(self) -> None:
        y0 = torch.zeros(BLOCK_BYTES // 8 + 1, dtype=torch.float64)
        checkpoints = filled(y0, 5)
        assert [len(block) for block in checkpoints.blocks] == [1] * 6
        assert self.bytes_of(checkpoints) == 6 * y0.numel() * 8


class TestRows:
    def test_none(self) -> None:
        assert list(rows([], 0)) == []
        assert list(rows([torch.zeros(3, 2)], 0)) == []

    def test_are_views(self) -> None:
        block = torch.zeros(3, 2)
        for i, row in enumerate(rows([block], 3)):
            row.fill_(i)
        assert block[:, 0].tolist() == [0.0, 1.0, 2.0]


class TestStepRecord:
    def test_bounds(self) -> None:
        record = StepRecord()
        assert record.bounds().shape == (0, 2)
        record.steps.append(AcceptedStep(0.0, 0.1, 0.1, []))
        record.steps.append(AcceptedStep(0.1, 0.2, 0.3, [(1, 0.5)]))
        assert record.bounds().dtype == torch.float64
        assert record.bounds().tolist() == [[0.0, 0.1], [0.1, 0.3]]

    def test_records_do_not_share_their_steps(self) -> None:
        StepRecord().steps.append(AcceptedStep(0.0, 0.1, 0.1, []))
        assert StepRecord().steps == []


def recomputed(n_steps: int, capacity: int, *, from_start: bool = False) -> Counter[int]:
    """Number of recomputations of each step when the states of a solve are handed out in reverse.

    ``from_start``: with the first state as the only checkpoint.
    """
    checkpoints = ThinnedCheckpoints(torch.zeros(2, dtype=torch.float64), capacity)
    for i in range(n_steps):
        checkpoints.slot().fill_(-1)
        checkpoints.slot().fill_(i + 1)
        checkpoints.accept()
    numbers = checkpoints.numbers()
    assert sum(n >= 0 for n in numbers) <= min(capacity, n_steps) + 1
    assert {0, n_steps} <= set(numbers)
    if from_start:
        numbers = [0 if n == 0 else -1 for n in numbers]
    counts: Counter[int] = Counter()

    def advance(n: int, y: Tensor, out: Tensor) -> Tensor:
        assert y.tolist() == [n, n]
        counts[n] += 1
        return out.copy_(y + 1)

    held = list(zip(numbers, rows(checkpoints.blocks, len(numbers)), strict=True))
    expected = n_steps
    for n, y, y_next in reversed_states(held, n_steps, capacity, advance):
        expected -= 1
        assert n == expected
        assert y.tolist() == [n, n]
        assert y_next is None if from_start and n + 1 == n_steps else y_next.tolist() == [n + 1, n + 1]
    assert expected == 0
    assert sum(len(block) for block in checkpoints.blocks) <= capacity + 2
    return counts


def fewest(n_steps: int, capacity: int) -> int:
    """Fewest recomputed steps in reversing ``n_steps`` with ``capacity`` checkpoints, by exhaustive search."""

    @cache
    def count(n: int, room: int) -> int:
        if n == 1:
            return 0
        if room == 1:
            return n * (n - 1) // 2
        return min(i + count(n - i, room - 1) + count(i, room) for i in range(1, n))

    return count(n_steps, capacity)


class TestThinned:
    @settings(max_examples=100, deadline=None)
    @given(n_steps=st.integers(1, 200), capacity=st.integers(1, 40))
    def test_every_state_comes_and_none_too_often(self, n_steps: int, capacity: int) -> None:
        counts = recomputed(n_steps, capacity)
        r = 1
        while comb(capacity + r, r) < n_steps:
            r += 1
        assert max(counts.values(), default=0) <= r
        bound = r * n_steps - comb(capacity + r, r - 1)
        assert sum(counts.values()) <= 1.35 * bound  # the bound is for a known number of steps
        assert sum(counts.values()) >= bound - (n_steps - 1)

    @pytest.mark.parametrize("n_steps", [1, 2, 3, 17, 40])
    @pytest.mark.parametrize("capacity", [1, 2, 3, 7, 50])
    def test_a_known_number_of_steps_costs_the_fewest_possible(self, n_steps: int, capacity: int) -> None:
        assert sum(recomputed(n_steps, capacity, from_start=True).values()) == fewest(n_steps, capacity)

    def test_the_published_count(self) -> None:
        """The places that ``revolve`` chooses reach Griewank & Walther's bound."""

        @cache
        def count(n: int, room: int) -> int:
            i = revolve(n, room) if n > 1 else 0
            return i + count(n - i, room - 1) + count(i, room) if n > 1 and room > 1 else n * (n - 1) // 2

        for n_steps, capacity in ((1000, 3), (1001, 5), (5456, 30), (20_000, 30)):
            r = 1
            while comb(capacity + r, r) < n_steps:
                r += 1
            assert count(n_steps, capacity) == r * n_steps - comb(capacity + r, r - 1)

    def test_nothing_is_dropped_before_it_must_be(self) -> None:
        assert not recomputed(30, 30)
        assert recomputed(31, 30)


class TestHost:
    @pytest.mark.parametrize("y0", STATES.values(), ids=STATES)
    def test_every_state_is_kept_in_the_layout_of_the_state(self, y0: Tensor) -> None:
        checkpoints = HostCheckpoints(y0)
        for i in range(BLOCK_ROWS + 3):
            checkpoints.slot().fill_(-1)
            checkpoints.slot().copy_(y0 + i + 1)
            checkpoints.accept()
        states = list(rows(checkpoints.blocks, checkpoints.count))
        assert [torch.equal(state, y0 + i) for i, state in enumerate(states)] == [True] * (BLOCK_ROWS + 4)
        assert all(state.stride() == y0.stride() for state in states)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
    def test_is_pinned_for_cuda(self) -> None:
        checkpoints = HostCheckpoints(torch.zeros(3, device="cuda"))
        assert all(block.is_pinned() for block in checkpoints.blocks)
        assert checkpoints.slot().is_cuda


class Dropping(Mlp):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(t, y), 0.3, training=True)


class Normalised(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(self.norm(y)) * torch.cos(t)


def _driven() -> tuple[nn.Module, Any, dict[str, Any]]:
    args = (sample(3, seed=1).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True))
    return DrivenMlp(), sample(2, 3).requires_grad_(), {"args": args}


CASES: dict[str, Any] = {
    "driven": _driven,
    "jumps and stops": lambda: (
        Mlp(),
        sample(2, 3).requires_grad_(),
        {"options": {"jump_t": [0.31, 0.7], "step_t": [0.5]}},
    ),
    "rejections": lambda: (Mlp(), sample(2, 3).requires_grad_(), {"options": {"first_step": 1.0}, "rtol": 1e-9}),
    "no fsal": lambda: (Mlp(), sample(2, 3).requires_grad_(), {"method": "adaptive_heun", "rtol": 1e-3}),
    "dopri8": lambda: (Mlp(), sample(2, 3).requires_grad_(), {"method": "dopri8", "rtol": 1e-9}),
    "fixed": lambda: (Mlp(), sample(2, 3).requires_grad_(), {"method": "rk4", "options": {"step_size": 0.03}}),
    "tuple": lambda: (CoupledMlp(), (sample(4, 3).requires_grad_(), sample(3).requires_grad_()), {}),
    "float32": lambda: (
        Mlp(dtype=torch.float32),
        sample(2, 3).float().requires_grad_(),
        {"rtol": 1e-5, "options": {"max_step": 0.1}},
    ),
    "bfloat16": lambda: (
        Mlp(dtype=torch.bfloat16),
        sample(2, 3).bfloat16().requires_grad_(),
        {"options": {"step_size": 0.05}},
    ),
    "returns its input": lambda: (lambda t, y: y, sample(2, 3).requires_grad_(), {}),
    "dropout": lambda: (Dropping(), sample(4, 3).requires_grad_(), {"options": {"step_size": 0.05}}),
    "batch norm": lambda: (Normalised(), sample(4, 3).requires_grad_(), {"options": {"max_step": 0.1}}),
}
TIMES = torch.tensor([0.0, 0.11, 0.12, 0.6, 1.3], dtype=torch.float64)


def solution_and_gradients(
    case: str, checkpoints: int | str | None, **settings: Any
) -> tuple[list[Tensor], aca_ext.Stats, nn.Module]:
    torch.manual_seed(0)
    func, y0, more = CASES[case]()
    parts = y0 if isinstance(y0, tuple) else (y0,)
    wanted = [*parts, *more.get("args", ())]
    wanted += func.parameters() if isinstance(func, nn.Module) else []
    call = {"rtol": 1e-6, "atol": 1e-7} | more | settings
    sol = aca_ext.solve(func, y0, TIMES, checkpoints=checkpoints, **call)
    ys = sol.y if isinstance(sol.y, tuple) else (sol.y,)
    random_state = torch.get_rng_state()
    grads = torch.autograd.grad(sum((y.square() * sample(*y.shape).to(y)).sum() for y in ys), wanted)
    assert torch.equal(torch.get_rng_state(), random_state)
    return [*ys, *grads], sol.stats, func


class TestGradient:
    @pytest.mark.parametrize("checkpoints", [1, 2, 5, 10_000, "cpu"])
    @pytest.mark.parametrize("case", CASES)
    def test_is_bitwise_that_of_every_state_kept(self, case: str, checkpoints: int | str) -> None:
        expected, all_kept, func = solution_and_gradients(case, None)
        found, stats, other = solution_and_gradients(case, checkpoints)
        for one, truth in zip(found, expected, strict=True):
            assert torch.equal(one, truth)
        assert stats.n_f_evals == all_kept.n_f_evals
        assert stats.n_f_evals_backward is not None
        assert all_kept.n_f_evals_backward is not None
        assert stats.n_accepted > 5
        few = isinstance(checkpoints, int) and checkpoints < stats.n_accepted
        assert (stats.n_f_evals_backward > all_kept.n_f_evals_backward) == few
        if case == "batch norm":  # recomputed steps must not move the statistics either
            for one, truth in zip(other.buffers(), func.buffers(), strict=True):
                assert torch.equal(one, truth)

    @pytest.mark.parametrize("hooks", [False, True], ids=["plain", "saved tensors moved"])
    def test_of_a_retained_graph(self, hooks: bool) -> None:
        y0, func = sample(2, 3).requires_grad_(), Mlp()
        grads = []
        for checkpoints in (None, 3, "cpu"):
            with save_on_cpu() if hooks else TensorMemory():
                y = aca_ext.odeint(func, y0, TIMES, checkpoints=checkpoints)
            for retain in (True, True, False):
                grads.append(torch.autograd.grad(y[-1].square().sum(), y0, retain_graph=retain)[0])
        assert all(torch.equal(grad, grads[0]) for grad in grads)

    @pytest.mark.parametrize("checkpoints", [3, "cpu"])
    def test_second_derivatives(self, checkpoints: int | str) -> None:
        found = []
        for policy in (None, checkpoints):
            y0, func = sample(4, 3).requires_grad_(), Normalised()
            y = aca_ext.odeint(func, y0, TIMES, checkpoints=policy, rtol=1e-4, atol=1e-4)
            (grad,) = torch.autograd.grad(y[-1].square().sum(), y0, create_graph=True)
            found.append((grad.detach(), *torch.autograd.grad(grad.square().sum(), [y0, *func.parameters()])))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    @pytest.mark.parametrize("checkpoints", [1, 3, "cpu"])
    def test_a_func_that_does_not_repeat_itself_is_found_out(self, checkpoints: int | str) -> None:
        calls = []

        def func(t: Tensor, y: Tensor) -> Tensor:
            calls.append(1)
            return -y * (torch.rand(()) if len(calls) > 40 else 1.0)

        y = aca_ext.odeint(func, torch.ones(3, requires_grad=True), TIMES, options={"step_size": 0.02},
                           checkpoints=checkpoints)  # fmt: skip
        with pytest.raises(errors.ReplayError):
            y.sum().backward()

    @pytest.mark.parametrize("capacity", [3, 12])
    def test_memory_is_bounded_and_freed(self, capacity: int) -> None:
        n = BLOCK_BYTES // 8 + 1  # so large that every state has a block of its own
        size = n * 8
        y0 = torch.ones(n, dtype=torch.float64, requires_grad=True)
        peaks = {}
        for steps in (30, 90):
            with TensorMemory() as memory:
                t = torch.tensor([0.0, 1.0], dtype=torch.float64)
                sol = aca_ext.solve(lambda t, y: -y, y0, t, checkpoints=capacity, options={"step_size": 1 / steps})
                # Beside the checkpoints: the two states of the step and the two outputs of the solution.
                assert memory.current <= (capacity + 2 + 2) * size + 1000
                sol.y[-1].sum().backward()
                peaks[steps] = memory.peak
                y0.grad = None
                assert memory.current <= 3 * size
            assert sol.stats.n_accepted == steps
        assert peaks[90] - size <= peaks[30] <= (capacity + 40) * size  # the last state is kept too


@pytest.mark.parametrize(
    ("checkpoints", "error"),
    [(0, errors.ArgumentValueError), (-3, errors.ArgumentValueError), ("gpu", errors.ArgumentValueError),
     (True, errors.ArgumentTypeError), (2.0, errors.ArgumentTypeError)],
)  # fmt: skip
def test_wrong_policies(checkpoints: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"checkpoints is .*int of at least 1"):
        aca_ext.odeint(Mlp(), sample(2, 3), TIMES, checkpoints=checkpoints)


@pytest.mark.parametrize("gradient", ["direct", "naive", "adjoint"])
def test_other_gradients_keep_no_checkpoints(gradient: str) -> None:
    with pytest.raises(errors.ArgumentValueError, match=f"gradient='{gradient}' keeps none"):
        aca_ext.odeint(Mlp(), sample(2, 3), TIMES, checkpoints=4, gradient=gradient)


def test_a_layer_takes_the_policy() -> None:
    layer = aca_ext.NeuralODE(Mlp(), checkpoints=2)
    layer(sample(2, 3)).sum().backward()
    assert layer.stats is not None
    assert layer.stats.n_f_evals_backward > 7 * layer.stats.n_accepted


def test_offloaded_states_are_brought_back_once() -> None:
    states = [torch.zeros(2) for _ in range(4)]
    found = list(brought_to(torch.device("meta"), iter([(n, states[n], states[n + 1]) for n in (2, 1, 0)])))
    assert all(y.is_meta and y_next is not None and y_next.is_meta for _, y, y_next in found)
    assert found[0][1] is found[1][2]
    assert found[1][1] is found[2][2]
