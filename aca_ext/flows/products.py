"""Products of the Jacobian of a function with several vectors, by reverse or by forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.problem.transforms import is_transformed

Function = Callable[[Tensor], Tensor]

# Up to so many vectors a loop is faster than a batched backward pass, and every engine can compile it.
_MOST_IN_LOOP = 16


def products(f: Function, y: Tensor, vectors: Tensor, mode: str | None) -> tuple[Tensor, Tensor]:
    """The value f(y), and the products of its Jacobian J with ``vectors``, (n, \\*y.shape).

    "reverse" gives Jᵀv and "forward" gives Jv, so that vᵀJv is the same. Default: reverse mode, which has less
    overhead; forward mode inside transforms of torch.func, where ``torch.autograd.grad`` does not work, and in
    inference mode, where there are no graphs.
    """
    if mode is None:
        is_reverse = torch.compiler.is_compiling() or not (is_transformed() or torch.is_inference_mode_enabled())
        mode = "reverse" if is_reverse else "forward"
    return _by_reverse_mode(f, y, vectors) if mode == "reverse" else _by_forward_mode(f, y, vectors)


def _by_forward_mode(f: Function, y: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    def product(v: Tensor) -> Any:
        return torch.func.jvp(f, (y,), (v,))

    # The value does not depend on v, so it is computed once.
    result: tuple[Tensor, Tensor] = torch.func.vmap(product, out_dims=(None, 0))(vectors)  # type: ignore[arg-type]
    return result


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
