"""The kernels on states of any memory layout, and the tensors that they admit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import Operands, check_error_norm, check_solution_and_error, check_weighted_sum, kernels, tolerance_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from aca_ext.kernels.fused import Tolerance


class TestAdmit:
    def test_returns_the_right_layout_as_it_is(self, device: str) -> None:
        for operands in (
            Operands((3, 4), device=device),
            Operands((2, 3, 5, 7), device=device, order=(0, 2, 3, 1)),
            Operands((3, 4), device=device, offset=1),
            Operands((), device=device),
        ):
            like, x = operands.many(2)
            assert kernels(like).admit(x) is x

    @pytest.mark.parametrize(
        "unlike",
        [
            lambda x: x[:, :1].expand(3, 4),
            lambda x: x.new_ones(()).expand(3, 4),
            lambda x: x.t().contiguous().t(),
            lambda x: x.repeat(1, 2)[:, ::2],
            lambda x: x.repeat(2, 1)[::2],
            lambda x: torch._neg_view(x),
        ],
        ids=[
            "expanded",
            "expanded 0-d",
            "transposed",
            "columns",
            "rows",
            "negative bit",
        ],
    )
    def test_copies_other_layouts(self, device: str, unlike: Callable[[Tensor], Tensor]) -> None:
        like = Operands((3, 4), device=device).one()
        x = unlike(like)
        admitted = kernels(like).admit(x)
        assert admitted.stride() == like.stride()
        assert not admitted.is_neg()
        assert admitted.data_ptr() != x.data_ptr()
        assert torch.equal(admitted, x)
        doubled = kernels(like).weighted_sum(None, 2.0, [admitted], (1.0,))
        assert torch.equal(doubled, 2 * x)

    def test_keeps_channels_last(self, device: str) -> None:
        like = Operands((2, 3, 5, 7), device=device, order=(0, 2, 3, 1)).one()
        admitted = kernels(like).admit(like.contiguous())
        assert admitted.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(admitted, like)

    def test_is_differentiable(self) -> None:
        like = torch.zeros(3, 4, dtype=torch.float64)
        x = Operands((4, 3)).one().requires_grad_()
        ops = kernels(like)
        assert gradcheck(lambda x: ops.admit(x.t()) ** 2, x)
        assert gradgradcheck(lambda x: ops.admit(x.t()) ** 2, x)
        with torch.no_grad():
            assert not ops.admit(x.t()).requires_grad


@st.composite
def layouts(draw: st.DrawFn) -> Operands:
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    return Operands(
        shape,
        draw(st.sampled_from([torch.float32, torch.float64])),
        order=draw(st.permutations(range(len(shape)))),
        offset=draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


any_h = st.floats(-10, 10, allow_subnormal=False).filter(lambda h: h == 0 or abs(h) > 1e-6)


class TestAnyLayout:
    @settings(deadline=None, max_examples=150)
    @given(operands=layouts(), count=st.integers(1, 40), with_base=st.booleans(), h=any_h)
    def test_weighted_sum(self, operands: Operands, count: int, with_base: bool, h: float) -> None:
        check_weighted_sum(operands, count, with_base, h)

    @settings(deadline=None, max_examples=100)
    @given(operands=layouts(), count=st.integers(1, 16), h=any_h)
    def test_solution_and_error(self, operands: Operands, count: int, h: float) -> None:
        check_solution_and_error(operands, count, h)

    @settings(deadline=None, max_examples=100)
    @given(
        operands=layouts(),
        with_slope=st.booleans(),
        each=st.booleans(),
        rtol=st.floats(0, 1),
        atol=st.floats(1e-6, 1),
    )
    def test_error_norm(self, operands: Operands, with_slope: bool, each: bool, rtol: float, atol: float) -> None:
        n = math.prod(operands.shape)
        tolerance_each = operands.one().abs() + 1e-3
        check_error_norm(operands, tolerance_of(n, tolerance_each if each else rtol, atol), with_slope)

    @settings(deadline=None, max_examples=100)
    @given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=140), seed=st.integers(0, 2**32 - 1))
    def test_segments(self, sizes: list[int], seed: int) -> None:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        check_error_norm(Operands(bounds[-1], seed=seed), Tolerance(1e-3, 1e-5, bounds))

    @settings(deadline=None, max_examples=100)
    @given(operands=layouts(), data=st.data())
    def test_admit(self, operands: Operands, data: st.DataObject) -> None:
        other_order = data.draw(st.permutations(range(len(operands.shape))))
        like, x = operands.one(), Operands(operands.shape, operands.dtype, order=other_order).one()
        admitted = kernels(like).admit(x)
        assert admitted.stride() == like.stride()
        assert torch.equal(admitted, x)
        assert (admitted is x) == (x.stride() == like.stride())
