"""Which requested times fall inside a step and where in it, and stacks of states that keep their memory format."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from aca_ext.kernels.fused import empty_rows
from aca_ext.kernels.layout import stack_rows
from aca_ext.numerics.output_times import OutputTimes

LAYOUTS = {
    "0-d": torch.tensor(2.0),
    "empty": torch.zeros(0, 3),
    "vector": torch.arange(3.0),
    "matrix": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "permuted": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    "channels last": torch.arange(210.0).view(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
    "one channel": torch.arange(70.0).view(2, 1, 5, 7).contiguous(memory_format=torch.channels_last),
}
each_layout = pytest.mark.parametrize("like", LAYOUTS.values(), ids=LAYOUTS)


class TestOutputTimes:
    def test_theta_is_the_position_in_the_step(self) -> None:
        times = OutputTimes([0.0, 0.25, 0.5, 2.0, 3.0])
        assert times.within(0.0, 1.0) == [(1, 0.25), (2, 0.5)]
        assert times.within(1.0, 1.5) == []
        assert times.within(1.5, 2.5) == [(3, 0.5)]
        assert times.within(2.5, 3.0) == [(4, 1.0)]

    def test_decreasing(self) -> None:
        times = OutputTimes([3.0, 2.0, 0.5, 0.25, -1.0])
        assert times.within(3.0, 2.5) == []
        assert times.within(2.5, 1.5) == [(1, 0.5)]
        assert times.within(1.5, 0.25) == [(2, 0.8), (3, 1.0)]
        assert times.within(0.25, -1.0) == [(4, 1.0)]

    def test_a_time_at_the_end_of_a_step_is_not_seen_again(self) -> None:
        times = OutputTimes([0.0, 1.0, 2.0])
        assert times.within(0.0, 1.0) == [(1, 1.0)]
        assert times.within(1.0, 1.5) == []
        assert times.within(1.5, 2.0) == [(2, 1.0)]
        assert times.within(2.0, 9.0) == []

    def test_the_start_is_no_output_of_a_step(self) -> None:
        assert OutputTimes([0.0]).within(0.0, 5.0) == []
        assert OutputTimes([0.0, 7.0]).within(0.0, 5.0) == []

    def test_theta_is_exactly_1_at_the_end(self) -> None:
        t, t_next = 0.1, 0.1 + 3 * 0.1
        assert OutputTimes([0.0, t_next]).within(t, t_next) == [(1, 1.0)]
        assert OutputTimes([0.0, 1.7e308]).within(-1.7e308, 1.7e308) == [(1, 1.0)]

    @given(
        times=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12, unique=True),
        cuts=st.lists(st.floats(-1e6, 1e6), max_size=12),
        decreasing=st.booleans(),
    )
    def test_every_time_comes_once_in_order_and_inside_its_step(
        self, times: list[float], cuts: list[float], decreasing: bool
    ) -> None:
        times = sorted(times, reverse=decreasing)
        low, high = min(times), max(times)
        nodes = sorted({low, high, *(c for c in cuts if low < c < high)}, reverse=decreasing)
        outputs, seen = OutputTimes(times), []
        for t, t_next in pairwise(nodes):
            for i, theta in outputs.within(t, t_next):
                seen.append(i)
                assert 0 < theta <= 1
                assert theta == 1 or times[i] != t_next
                assert t + theta * (t_next - t) == pytest.approx(times[i], rel=1e-9, abs=1e-9)
        assert seen == list(range(1, len(times)))


@each_layout
class TestRows:
    def test_empty_rows_have_the_layout_of_the_state(self, like: Tensor) -> None:
        rows = empty_rows(4, like)
        assert rows.shape == (4, *like.shape)
        assert rows.dtype == like.dtype
        assert all(row.stride() == like.stride() for row in rows.unbind(0))

    def test_empty_rows_do_not_overlap(self, like: Tensor) -> None:
        rows = empty_rows(3, like)
        for i, row in enumerate(rows.unbind(0)):
            row.fill_(i)
        assert all(torch.equal(row, torch.full_like(like, i)) for i, row in enumerate(rows.unbind(0)))
        assert rows.untyped_storage().nbytes() == 3 * like.numel() * like.element_size()

    def test_stack_rows_is_stack(self, like: Tensor) -> None:
        rows = [like, like + 1, like * 2]
        assert torch.equal(stack_rows(rows, like), torch.stack(rows))

    def test_stack_rows_keeps_the_layout(self, like: Tensor) -> None:
        stacked = stack_rows([like, like], like)
        significant = [d for d, size in enumerate(like.shape) if size > 1]
        for row in stacked.unbind(0):
            assert [row.stride(d) for d in significant] == [like.stride(d) for d in significant]
            if like.dim() == 4:
                assert row.is_contiguous(memory_format=torch.channels_last)


def test_stack_rows_gives_the_layout_of_the_state_to_rows_of_another() -> None:
    like = LAYOUTS["channels last"]
    stacked = stack_rows([like.contiguous(), like], like)
    assert all(row.is_contiguous(memory_format=torch.channels_last) for row in stacked.unbind(0))


def test_rows_stay_on_the_dtype_of_the_state() -> None:
    like = torch.zeros(2, dtype=torch.float64)
    assert empty_rows(3, like).dtype == torch.float64
    assert empty_rows(0, like).shape == (0, 2)


def test_stack_rows_is_differentiable() -> None:
    like = torch.randn(2, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    rows = tuple((like * i).requires_grad_() for i in (1, 2))
    assert gradcheck(lambda *rows: stack_rows(rows, like) ** 2, rows)
    assert gradgradcheck(lambda *rows: stack_rows(rows, like) ** 2, rows)
