"""Rows (samples) laid out like a state, and stacks of states that keep their memory format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from aca_ext.kernels.fused import empty_rows
from aca_ext.kernels.layout import stack_rows

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
