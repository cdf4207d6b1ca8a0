"""Products of the Jacobian of a function with several vectors, by reverse or by forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.problem.transforms import is_transformed, is_transformed_by_func

Function = Callable[[Tensor], Tensor]

# Up to so many vectors a loop is faster than a batched backward pass, and every engine can compile it.
_MOST_IN_LOOP = 16


def products(f: Function, y: Tensor, vectors: Tensor, mode: str | None) -> tuple[Tensor, Tensor]:
    """The value f(y), and the products of its Jacobian J with ``vectors``, (n, \\*y.shape).

    "reverse" gives Jᵀv and "forward" gives Jv, so that vᵀJv is the same. Default: reverse mode, which has less
    overhead; forward mode inside transforms of torch.func, where ``torch.autograd.grad`` does not work, and in
    inference mode, where there are no graphs.
    """
    if _is_reverse(mode):
        return _by_reverse_mode(f, y, vectors)
    return _by_forward_mode(f, y, vectors)


def _is_reverse(mode: str | None) -> bool:
    if torch.compiler.is_compiling():
        return mode != "forward"
    is_inside = is_transformed()
    if is_inside and not is_transformed_by_func():
        raise ArgumentTypeError(
            "a divergence has no forward-mode derivative by torch.autograd.forward_ad, since PyTorch does not nest its "
            "levels. Use torch.func.jvp."
        )
    if is_inside and mode == "reverse":
        raise ArgumentValueError(
            'mode="reverse" does not work inside transforms of torch.func. Use mode="forward" or leave it out.'
        )
    return mode == "reverse" or (mode is None and not (is_inside or torch.is_inference_mode_enabled()))


def _by_forward_mode(f: Function, y: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    def product(v: Tensor) -> Any:
        return torch.func.jvp(f, (y,), (v,))

    values, found = torch.func.vmap(product)(vectors)
    return values[0], found  # one value, computed once and expanded, since it does not depend on v


def _by_reverse_mode(f: Function, y: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The products have a graph only if the caller records one."""
    records = torch.is_grad_enabled()
    with torch.enable_grad():
        x = y if y.requires_grad else y.detach().requires_grad_()
        value = f(x)
        found = _vjps(value, x, vectors, records) if value.requires_grad else torch.zeros_like(vectors)
    return (value, found) if records else (value.detach(), found)


def _vjps(value: Tensor, x: Tensor, vectors: Tensor, records: bool) -> Tensor:
    if len(vectors) > _MOST_IN_LOOP:
        (found,) = torch.autograd.grad(
            value, x, vectors, create_graph=records, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )
        return found
    rows = [
        torch.autograd.grad(value, x, v, retain_graph=True, create_graph=records, allow_unused=True)[0]
        for v in vectors.unbind(0)
    ]
    return torch.stack([torch.zeros_like(x) if row is None else row for row in rows])
