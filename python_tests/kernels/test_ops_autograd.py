"""The kernels inside autograd, and the choice of operations for a state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operands import Operands, both_dtypes, kernels, tolerance_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from aca_ext.kernels.fused import DifferentiableKernels, KernelOperations, TorchOperations, has_kernels, operations_for


class TestDifferentiableKernels:
    @both_dtypes
    @pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
    def test_are_bitwise_the_kernels(self, device: str, dtype: torch.dtype, with_base: bool) -> None:
        operands = Operands((2, 3, 5, 7), dtype, device, order=(0, 2, 3, 1))
        y, k, b, e = operands.one(), operands.many(6), operands.weights(6), operands.weights(6)
        base = y if with_base else None
        plain, ops = kernels(y), DifferentiableKernels(y, tolerance_of(y.numel()))
        expected = (plain.weighted_sum(base, 0.3, k, b), *plain.solution_and_error(y, 0.3, k, b, e))
        for tensor in (y, *k):
            tensor.requires_grad_()
        result = (ops.weighted_sum(base, 0.3, k, b), *ops.solution_and_error(y, 0.3, k, b, e))
        assert [x.requires_grad for x in result] == [True, True, False]
        assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(result, expected, strict=True))
        with torch.no_grad():
            assert not ops.weighted_sum(base, 0.3, k, b).requires_grad
            assert not ops.solution_and_error(y, 0.3, k, b, e)[0].requires_grad

    @pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
    @pytest.mark.parametrize("count", [3, 18])
    @pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
    def test_gradients_of_weighted_sum(
        self, device: str, check: Callable[..., bool], count: int, with_base: bool
    ) -> None:
        x = [x.requires_grad_() for x in Operands(3, device=device).many(count + 1)]
        w = (0.0, *Operands(3).weights(count - 1))
        ops = DifferentiableKernels(x[0], tolerance_of(3))
        if with_base:
            assert check(lambda base, *x: ops.weighted_sum(base, -0.7, x, w).sin(), tuple(x))
        else:
            assert check(lambda *x: ops.weighted_sum(None, -0.7, x, w).sin(), tuple(x[1:]))

    @pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
    def test_gradients_of_solution_and_error(self, device: str, check: Callable[..., bool]) -> None:
        y, *k = (x.requires_grad_() for x in Operands((2, 2), device=device).many(5))
        b, e = (0.5, 0.0, -1.5, 0.25), (1.0, -1.0, 0.5, 0.0)
        ops = DifferentiableKernels(y, tolerance_of(4))
        assert check(lambda y, *k: ops.solution_and_error(y, 0.3, k, b, e)[0].sin(), (y, *k))

    def test_frozen_operands_receive_nothing(self) -> None:
        base, one, two = Operands(3).many(3)
        two.requires_grad_()
        ops = DifferentiableKernels(base, tolerance_of(3))
        ops.weighted_sum(base, 0.5, [one, two], (1.0, 4.0)).sum().backward()
        assert base.grad is None
        assert one.grad is None
        assert torch.equal(two.grad, torch.full_like(two, 2.0))


class TestChoice:
    def test_kernels_where_there_are_any(self, device: str) -> None:
        like = torch.zeros(3, device=device)
        assert type(operations_for(like, tolerance_of(3))) is KernelOperations
        assert type(operations_for(like, tolerance_of(3), differentiable=True)) is DifferentiableKernels
        assert operations_for(like, tolerance_of(3)).backend == device

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_reference_elsewhere(self, dtype: torch.dtype) -> None:
        like = torch.ones(3, dtype=dtype)
        ops = operations_for(like, tolerance_of(3))
        assert type(ops) is TorchOperations
        assert ops.backend == "reference"
        assert not has_kernels(torch.ones(3, device="meta"))
        assert torch.equal(ops.weighted_sum(like, 0.5, [like], (2.0,)), 2 * like)

    def test_reference_for_subclasses(self) -> None:
        class Wrapped(Tensor):
            pass

        assert not has_kernels(torch.ones(3).as_subclass(Wrapped))
        assert has_kernels(torch.nn.Parameter(torch.ones(3)))

    def test_reference_writes_into_out(self) -> None:
        y, k, out = Operands(5).many(3)
        ops = TorchOperations(y, tolerance_of(5))
        assert ops.weighted_sum(y, 0.5, [k], (2.0,), out) is out
        assert torch.equal(out, y + k)
