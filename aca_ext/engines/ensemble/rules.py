"""Rules for operations of aten: each takes an ``Arithmetic``, the operation that func calls, and its operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from aca_ext.engines.ensemble import operations as ops
from aca_ext.engines.ensemble.arithmetic import Arithmetic
from aca_ext.engines.ensemble.operations import Operation
from aca_ext.engines.ensemble.values import HINT, Computed
from aca_ext.errors import CompileError

aten = torch.ops.aten
# x.detach() in graphs, which stops gradients; torch's own would be taken out of them.
_ours = torch.library.Library("aca_ext", "DEF")
_ours.define("held(Tensor x) -> Tensor")
_ours.impl("held", torch.clone, "CompositeExplicitAutograd")
HELD = torch.ops.aca_ext.held.default
Rule = Callable[..., Any]

# Operations that only move elements; they are run on numbers of them.
MOVES = {
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_copy, aten.permute, aten.transpose, aten.t, aten.select,
    aten.slice, aten.unbind, aten.split, aten.split_with_sizes, aten.cat, aten.stack, aten.expand, aten.squeeze,
    aten.unsqueeze, aten.flip, aten.roll, aten.diagonal, aten.unfold, aten.repeat, aten.tril,
    aten.triu, aten.clone, aten.alias, aten.lift_fresh_copy, aten.diag_embed, aten.select_scatter,
    aten.slice_scatter, aten.diagonal_scatter, aten.select_backward, aten.slice_backward, aten.diagonal_backward,
    aten.constant_pad_nd,
}  # fmt: skip

# Others that do, and calls that move elements as they do.
CALLS: dict[Any, Callable[..., Any]] = {aten.copy: lambda to, x, *_: x.expand(to.shape)}


def _each(operation: Operation, truths: tuple[int, ...] = ()) -> Rule:
    def rule(on: Arithmetic, target: object, *operands: Any, **settings: Any) -> Computed:
        if settings:
            raise CompileError(f"func calls {target} with {', '.join(settings)}, which is not supported. {HINT}")
        return on.pointwise(operation, *operands, target=target, truths=truths)

    return rule


def _scaled(operation: Operation, sign: int) -> Rule:
    """a + sign·alpha·b"""

    def rule(on: Arithmetic, target: object, a: Any, b: Any, alpha: float = 1) -> Computed:
        if alpha == 1:
            return on.pointwise(operation, a, b, target=target)
        return on.pointwise(ops.MULTIPLY_ADD, b, sign * alpha, a, target=target)

    return rule


def _reversed(on: Arithmetic, target: object, a: Any, b: Any, alpha: float = 1) -> Computed:
    return _scaled(ops.SUBTRACT, -1)(on, target, b, a, alpha)


def _power(on: Arithmetic, target: object, a: Any, b: Any) -> Computed:
    if isinstance(b, (int, float)):
        return on.pointwise(ops.power_of(float(b)), a, target=target)
    return on.pointwise(ops.POWER, a, b, target=target)


def _clamp(on: Arithmetic, target: object, x: Any, low: Any = None, high: Any = None) -> Computed:
    is_number = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
    below, above, between = ops.clamps(*_derivatives_at_bound(is_number))
    if low is not None and high is not None:
        return on.pointwise(between, x, low, high, target=target)
    if low is not None:
        return on.pointwise(below, x, low, target=target)
    return on.pointwise(above, x, high, target=target)


@cache
def _derivatives_at_bound(is_number: bool) -> tuple[float, float]:
    """PyTorch's derivatives of clamp(x, max=bound) at x = bound, of x and of the bound, in this version."""
    x, bound = (torch.ones((), device="cpu", requires_grad=True) for _ in range(2))
    with torch.enable_grad():
        clamped = x.clamp(max=1.0) if is_number else x.clamp(max=bound)
        found = torch.autograd.grad(clamped, (x, bound), allow_unused=True)
    of_x, of_bound = (0.0 if grad is None else grad.item() for grad in found)
    return of_x, of_bound


def _softplus(on: Arithmetic, target: object, x: Any, beta: float = 1, threshold: float = 20) -> Computed:
    return on.pointwise(ops.softplus_of(float(beta), float(threshold)), x, target=target)


def _leaky(on: Arithmetic, target: object, x: Any, slope: float = 0.01) -> Computed:
    return on.pointwise(ops.leaky_of(float(slope)), x, target=target)


def _added(operation: Operation) -> Rule:
    return lambda on, target, c, a, b, value=1: on.pointwise(operation, c, a, b, value, target=target)


def _divide(on: Arithmetic, target: object, a: Any, b: Any, rounding_mode: str | None = None) -> Computed:
    if rounding_mode == "floor":
        return on.pointwise(ops.FLOOR_DIVIDE, a, b, target=target)
    quotient = on.pointwise(ops.DIVIDE, a, b, target=target)
    return quotient if rounding_mode is None else on.pointwise(ops.FUNCTIONS["trunc"], quotient, target=target)


def _sum(on: Arithmetic, target: object, x: Any, dims: Any = None, keep: bool = False, **_: Any) -> Computed:
    return on.reduced(x, dims, keep, on.sum, target)


def _mean(on: Arithmetic, target: object, x: Any, dims: Any = None, keep: bool = False, **_: Any) -> Computed:
    total = on.reduced(x, dims, keep, on.sum, target)
    count = x.elements.size / max(total.elements.size, 1)
    return on.pointwise(ops.DIVIDE, total, count, target=target)


def _variance_and_mean(
    on: Arithmetic, target: object, x: Any, dims: Any = None, *, correction: float = 1, keepdim: bool = False
) -> tuple[Computed, Computed]:
    mean = _mean(on, target, x, dims, True)
    square = on.pointwise(ops.power_of(2.0), on.pointwise(ops.SUBTRACT, x, mean, target=target), target=target)
    total = on.reduced(square, dims, keepdim, on.sum, target)
    count = x.elements.size / max(total.elements.size, 1)
    variance = on.pointwise(ops.DIVIDE, total, max(count - correction, 0.0), target=target)
    return variance, mean if keepdim else _mean(on, target, x, dims)


def _product(on: Arithmetic, target: object, x: Any, dims: Any = None, keep: bool = False, **_: Any) -> Computed:
    return on.reduced(x, dims, keep, on.running(ops.MULTIPLY), target)


def _running(operation: Operation) -> Rule:
    return lambda on, target, x, dim, **_: on.accumulated(x, dim, operation, target)


def _any(on: Arithmetic, target: object, x: Any, dims: Any = None, keep: bool = False) -> Computed:
    largest = on.reduced(Computed(on.truths(x.elements), x.axis), dims, keep, partial(on.largest, sign=1), target)
    return Computed(on.truths(largest.elements), largest.axis)


def _largest(sign: int) -> Rule:
    def rule(on: Arithmetic, target: object, x: Any, dims: Any = None, keep: bool = False) -> Computed:
        return on.reduced(x, dims, keep, partial(on.largest, sign=sign), target)

    return rule


def _add_product(on: Arithmetic, target: object, c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = (on.products if target is aten.baddbmm.default else on.product)(a, b, target)
    if alpha != 1:
        product = on.pointwise(ops.MULTIPLY, product, alpha, target=target)
    return _scaled(ops.ADD, 1)(on, target, product, c, beta)


def _converted(on: Arithmetic, target: object, x: Any, dtype: torch.dtype | None = None, **_: Any) -> Computed:
    elements = on.truths(x.elements) if dtype is torch.bool else on.numbers(x.elements)
    return Computed(elements if dtype is not None else x.elements, x.axis)


def _held(on: Arithmetic, target: object, x: Any) -> Computed:
    """The same numbers, through which no gradient passes."""
    return on.pointwise(ops.HELD, x, target=target)


RULES: dict[Any, Rule] = {
    **{getattr(aten, name): _each(operation) for name, operation in ops.FUNCTIONS.items()},
    aten.add: _scaled(ops.ADD, 1), aten.sub: _scaled(ops.SUBTRACT, -1), aten.rsub: _reversed,
    aten.mul: _each(ops.MULTIPLY),
    aten.div: _divide, aten.true_divide: _divide, aten.neg: _each(ops.NEGATE), aten.pow: _power,
    aten.square: lambda on, target, x: on.pointwise(ops.power_of(2.0), x, target=target),
    aten.maximum: _each(ops.MAXIMUM), aten.minimum: _each(ops.MINIMUM), aten.remainder: _each(ops.REMAINDER),
    aten.fmod: _each(ops.FMOD), aten.atan2: _each(ops.ATAN2), aten.hypot: _each(ops.HYPOT),
    aten.clamp: _clamp, aten.clamp_min: _clamp,
    aten.clamp_max: lambda on, target, x, high: _clamp(on, target, x, None, high),
    aten.softplus: _softplus, aten.leaky_relu: _leaky, aten.addcmul: _added(ops.ADD_PRODUCT),
    aten.addcdiv: _added(ops.ADD_QUOTIENT),
    aten.where: _each(ops.SELECT, (0,)),
    aten.lt: _each(ops.LESS), aten.le: _each(ops.LESS_EQUAL), aten.gt: _each(ops.GREATER),
    aten.ge: _each(ops.GREATER_EQUAL), aten.eq: _each(ops.EQUAL), aten.ne: _each(ops.NOT_EQUAL),
    aten.logical_and: _each(ops.AND, (0, 1)), aten.logical_or: _each(ops.OR, (0, 1)),
    aten.logical_xor: _each(ops.XOR, (0, 1)), aten.logical_not: _each(ops.NOT, (0,)),
    aten.bitwise_and: _each(ops.AND, (0, 1)), aten.bitwise_or: _each(ops.OR, (0, 1)),
    aten.bitwise_xor: _each(ops.XOR, (0, 1)), aten.bitwise_not: _each(ops.NOT, (0,)),
    aten.isnan: _each(ops.IS_NAN), aten.isinf: _each(ops.IS_INFINITE),
    aten.sum: _sum, aten.mean: _mean, aten.var_mean: _variance_and_mean,
    aten.var: lambda on, target, x, *dims, **how: _variance_and_mean(on, target, x, *dims, **how)[0],
    aten.prod: _product, aten.cumsum: _running(ops.ADD),
    aten.cumprod: _running(ops.MULTIPLY), aten.any: _any, aten.floor_divide: _each(ops.FLOOR_DIVIDE),
    aten.amax: _largest(1), aten.amin: _largest(-1),
    aten.mm: lambda on, target, a, b: on.product(a, b, target),
    aten.bmm: lambda on, target, a, b: on.products(a, b, target),
    aten.addmm: _add_product, aten.baddbmm: _add_product,
    aten._to_copy: _converted, torch.ops.prims.convert_element_type: _converted,
    torch.ops.aca_ext.held: _held,
}  # fmt: skip
