"""Gradients of inputs of few digits, whose terms would lose most of them if they were summed in the inputs' dtype."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from aca_ext import odeint

T = torch.linspace(0, 20, 3, dtype=torch.float64)


def driven(t: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(y @ w.to(y.dtype) + b) - y + torch.sin(5 * t)


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_coarse_gradients_are_rounded_once(dtype: torch.dtype, options: dict[str, str]) -> None:
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random).to(dtype) for shape in ((3, 3), (3,))]
    y0 = torch.randn(4, 3, generator=random, dtype=torch.float64)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        args = [x.detach().to(dtype).requires_grad_() for x in values]
        y = odeint(driven, y0, T, args=tuple(args), rtol=1e-5, atol=1e-5, options=options)
        return torch.autograd.grad(y.square().sum(), args)

    for found, exact in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert found.dtype == dtype
        # Some roundings of single terms to the dtype remain, which do not add up.
        assert (found - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
@pytest.mark.parametrize("is_held", [False, True])
def test_sums_in_a_graph_are_rounded_once_too(is_held: bool, options: dict[str, str]) -> None:
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random).bfloat16() for shape in ((3, 3), (3,))]
    y0 = torch.randn(4, 3, generator=random, dtype=torch.float64)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        own = [x.to(dtype).requires_grad_() for x in values]
        func, args = (partial(driven, w=own[0], b=own[1]), ()) if is_held else (driven, tuple(own))
        y = odeint(func, y0, T, args=args, rtol=1e-5, atol=1e-5, options=options)
        found = torch.autograd.grad(y.square().sum(), own, create_graph=True)
        assert [x.dtype for x in found] == [dtype] * 2
        of_second_order = torch.autograd.grad(sum(x.double().square().sum() for x in found), own)
        return [*(x.detach() for x in found), *of_second_order]

    for i, (found, exact) in enumerate(zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True)):
        allowed = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (found - exact).abs().max() <= (1 if i < 2 else 4) * allowed
