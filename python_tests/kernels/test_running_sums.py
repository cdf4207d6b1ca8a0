"""Sums of gradients in C++: equal to torch's where they are made, and left to torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aca_ext.kernels.extension import running_sums

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (64, 128), (4097,)]


def likes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in plain if x.dim() > 1]
    return [y for x in (*plain, *turned) for y in (x, x.float())]


def test_sums_are_those_of_torch_bit_for_bit() -> None:
    totals = likes()
    expected = [x.clone() for x in totals]
    sums = running_sums(list(totals))
    for n in range(1, 5):
        terms = [x.clone().mul_(0.3 / n) for x in likes()]
        before = [x.clone() for x in terms]
        assert sums.add(tuple(terms))
        torch._foreach_add_(expected, terms)
        assert all(torch.equal(x, y) for x, y in zip(terms, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(totals, expected, strict=True))


def freed(x: Tensor) -> Tensor:
    y = x.clone()
    y.untyped_storage().resize_(0)
    return y


class Labelled(Tensor):
    """A subclass of Tensor."""


# Terms for a total of shape (3, 5) and dtype float64.
OTHERS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda x: None,
    "shape": lambda x: x[:2].clone(),
    "dtype": lambda x: x.float(),
    "integers": lambda x: x.long(),
    "complex": lambda x: torch.complex(x, x),
    "strides": lambda x: x.t().contiguous().t(),
    "expanded": lambda x: x[:1].expand(3, 5),
    "every other column": lambda x: torch.cat([x, x], 1)[:, ::2],
    "negative": lambda x: torch._neg_view(x),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "freed": freed,
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "subclass": lambda x: x.as_subclass(Labelled),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_is_added_where_one_term_is_for_torch(kind: str) -> None:
    first, second = torch.ones(2, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)
    sums = running_sums([first, second])
    assert not sums.add((first.clone(), OTHERS[kind](second)))
    assert torch.equal(first, torch.ones_like(first))
    assert torch.equal(second, torch.ones_like(second))
    assert sums.add((first.clone(), second.clone()))
    assert torch.equal(second, torch.full_like(second, 2))


@pytest.mark.parametrize("terms", [(), (torch.ones(2),), (torch.ones(2),) * 3])
def test_another_number_of_terms(terms: tuple[Tensor, ...]) -> None:
    totals = [torch.zeros(2), torch.zeros(2)]
    assert not running_sums(list(totals)).add(terms)
    assert all(torch.equal(x, torch.zeros(2)) for x in totals)


def test_totals_that_are_left_to_torch() -> None:
    left = [
        torch.zeros(1 << 15).repeat(2),
        torch.zeros(3, dtype=torch.complex128),
        torch.zeros(3, dtype=torch.float16),
        torch.zeros(2, 0),
        torch.zeros(3, 4)[:, ::2],
        torch.zeros(1).expand(4),
    ]
    for total in left:
        assert not running_sums([torch.zeros(2), total]).add((torch.ones(2), torch.ones_like(total)))
        assert not total.any()
    assert not running_sums([]).add(())
