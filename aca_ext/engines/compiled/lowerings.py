"""Changes to Inductor's lowerings: matrix products are separated from the sums that follow, and softplus and tanh are
series, which become vector code several times as fast as library calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import select_decomp_table

    table = {**select_decomp_table(), aten.addmm.default: _addmm, aten.baddbmm.default: _baddbmm}
    return {op: rule for op, rule in table.items() if op not in (aten.softplus.default, aten.tanh.default)}


def _addmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _scaled(aten.mm(a, b), alpha) + _scaled(x, beta)


def _baddbmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _scaled(aten.bmm(a, b), alpha) + _scaled(x, beta)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


@contextmanager
def lowerings() -> Iterator[None]:
    """Installs these lowerings of softplus and tanh in Inductor inside the context."""
    from torch._inductor import lowering

    rules: Any = lowering.lowerings
    ours = {aten.softplus.default: _lower_softplus, aten.tanh.default: _lower_tanh}
    before = {op: rules.get(op) for op in ours}
    rules.update(ours)
    try:
        yield
    finally:
        for op, rule in before.items():
            if rule is None:
                del rules[op]
            else:
                rules[op] = rule


def _lower_softplus(x: Any, beta: float = 1, threshold: float = 20) -> Any:
    """max(x, 0) + log1p(exp(-|x|)), with log1p(z) = 2 artanh(z / (2 + z)) as a series."""

    def softplus(ops: Any, number: Callable[[float], Any], terms: tuple[int, int], x: Any) -> Any:
        scaled = ops.mul(x, number(beta))
        z = ops.exp(ops.neg(ops.abs(scaled)))
        s = ops.truediv(z, ops.add(z, number(2)))
        series = _polynomial(ops, number, ops.mul(s, s), [2 / (2 * j + 1) for j in range(terms[0])])
        smooth = ops.add(ops.maximum(scaled, number(0)), ops.mul(s, series))
        return ops.where(ops.gt(scaled, number(threshold)), x, ops.mul(smooth, number(1 / beta)))

    return _pointwise(softplus, x)


def _lower_tanh(x: Any) -> Any:
    """Taylor series near 0, since 1 - 2 / (exp(2|x|) + 1) loses digits to cancellation there."""

    def tanh(ops: Any, number: Callable[[float], Any], terms: tuple[int, int], x: Any) -> Any:
        size = ops.abs(x)
        far = ops.sub(number(1), ops.truediv(number(2), ops.add(ops.exp(ops.add(size, size)), number(1))))
        near = ops.mul(x, _polynomial(ops, number, ops.mul(x, x), _tanh_series()[: terms[1]]))
        signed = ops.where(ops.lt(x, number(0)), ops.neg(far), far)
        return ops.where(ops.lt(size, number(0.55)), near, signed)

    return _pointwise(tanh, x)


# Numbers of terms of the series of artanh, up to 1/3, and of tanh, up to 0.55, that are not below rounding error.
_TERMS = {torch.float32: (8, 9), torch.float64: (17, 19)}


def _pointwise(formula: Callable[..., Any], x: Any) -> Any:
    from torch._inductor.lowering import make_pointwise
    from torch._inductor.virtualized import ops

    dtype = x.get_dtype()
    if dtype not in _TERMS:
        dtype = torch.float32

    def number(value: float) -> Any:
        return ops.constant(value, dtype)

    return make_pointwise(lambda value: formula(ops, number, _TERMS[dtype], value))(x)


def _polynomial(ops: Any, number: Callable[[float], Any], x: Any, coefficients: Sequence[float]) -> Any:
    total = number(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = ops.add(ops.mul(total, x), number(c))
    return total


@cache
def _tanh_series() -> list[float]:
    """Coefficients of x, x³, x⁵, ... in tanh(x), from tanh' = 1 - tanh²."""
    c = [Fraction(1)]
    for n in range(1, 20):
        c.append(-sum((c[i] * c[n - 1 - i] for i in range(n)), Fraction(0)) / (2 * n + 1))
    return [float(x) for x in c]
