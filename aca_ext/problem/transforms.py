"""Rejection of function transforms (torch.func, vmap, forward-mode derivatives), which a solve does not support."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from aca_ext.errors import ArgumentTypeError

# Private to torch. In a version without them, transforms go undetected here and torch raises its own error.
_FUNCTORCH = getattr(torch._C, "_functorch", None)
is_wrapped: Callable[[Tensor], bool] = getattr(_FUNCTORCH, "is_functorch_wrapped_tensor", lambda x: False)
_is_batched = getattr(_FUNCTORCH, "is_legacy_batchedtensor", lambda x: False)


def refuse_transforms(what: str, x: object) -> None:
    """Raises ArgumentTypeError if ``x`` is a tensor inside a transform; ``what`` names it in the message."""
    if not isinstance(x, Tensor):
        return
    if is_wrapped(x) or _is_batched(x):
        raise ArgumentTypeError(
            f"{what} is inside a function transform (torch.func.grad, vjp, jvp, jacrev, vmap, or a batched backward "
            "pass), which a solve does not support. For derivatives use torch.autograd.grad (again with "
            'create_graph=True) or torch.autograd.functional; instead of vmap give y0 a batch dimension and options={"'
            'batch": "independent"}.'
        )
    if getattr(forward_ad, "_current_level", -1) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ArgumentTypeError(
            f"{what} carries a forward-mode derivative (torch.autograd.forward_ad), which a solve does not propagate. "
            "Use torch.autograd.functional.jvp."
        )


def version_of(x: Tensor) -> int:
    """Count of the changes in place of a tensor, inside transforms of the tensor that it stands for."""
    while is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x._version
