"""Function transforms of PyTorch (torch.func, vmap, forward-mode derivatives): detection, and access to the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from aca_ext.errors import ArgumentTypeError

try:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as _clear_stack
except ImportError:
    _clear_stack = nullcontext  # type: ignore[assignment]

# Private to torch. In a version without them, transforms go undetected here and torch raises its own error.
_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
is_wrapped: Callable[[Tensor], bool] = getattr(_FUNCTORCH, "is_functorch_wrapped_tensor", lambda x: False)
_is_batched = getattr(_FUNCTORCH, "is_legacy_batchedtensor", lambda x: False)
# The tensor inside one that a transform made and that outlived it; other tensors stay what they are.
outside_ended_transforms: Callable[[Tensor], Tensor] = getattr(_FUNCTORCH, "unwrap_if_dead", lambda x: x)
# Asking for the current level instead would make state that torch copies in every backward pass from then on.
is_transformed_by_func: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_transformed() -> bool:
    """Tells whether a transform of torch.func, or a level of forward-mode derivatives, is active in this thread."""
    return is_transformed_by_func() or getattr(forward_ad, "_current_level", -1) >= 0


def outside_transforms() -> AbstractContextManager[Any]:
    """Context in which plain tensors are operated on as if no transform were active."""
    return _clear_stack()


def is_inside_transform(x: Tensor) -> bool:
    """Tells whether ``x`` was made by torch.func or by a batched backward pass."""
    return is_wrapped(x) or _is_batched(x)


def refuse_transforms(what: str, x: object) -> None:
    """Raises ArgumentTypeError if ``x`` is a tensor inside a transform; ``what`` names it in the message."""
    if not isinstance(x, Tensor):
        return
    if is_inside_transform(x):
        raise ArgumentTypeError(
            f"{what} is inside a function transform (of torch.func, or a batched backward pass), where a solve does "
            "not support it. y0, args and what func uses may be inside transforms, if the solve is called there. For a "
            "batched backward pass use torch.func.jacrev, or torch.autograd.grad for one vector at a time."
        )
    if getattr(forward_ad, "_current_level", -1) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ArgumentTypeError(
            f"{what} carries a forward-mode derivative (torch.autograd.forward_ad), which a solve does not propagate "
            "from there; it does from y0, args and what func uses."
        )


def constant_of(what: str, x: Tensor) -> Tensor:
    """The plain tensor under the wrappers of one that was made inside torch.func.grad and carries no derivative.

    Raises:
        ArgumentTypeError: it is batched by vmap, carries a derivative, or may carry one of forward mode.
    """
    while is_wrapped(x):
        if _FUNCTORCH.is_batchedtensor(x) or x.requires_grad or getattr(forward_ad, "_current_level", -1) >= 0:
            raise ArgumentTypeError(
                f"{what} is inside a function transform and may depend on what is transformed, but a solve has no "
                f"derivative with respect to it there. Make {what} outside of the function, or give numbers."
            )
        x = _FUNCTORCH.get_unwrapped(x)
    refuse_transforms(what, x)
    return x


def version_of(x: Tensor) -> int:
    """Count of the changes in place of a tensor, inside transforms of the tensor that it stands for."""
    plain = _unwrapped(x)[0]
    return 0 if plain.is_inference() else plain._version  # tensors of inference mode have no such count


def _unwrapped(x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The plain tensor under all wrappers, and pairs (level of vmap, its dimension), the innermost vmap first."""
    batches: list[tuple[int, int]] = []
    while is_wrapped(x):
        if _FUNCTORCH.is_batchedtensor(x):
            batches.append((_FUNCTORCH.maybe_get_level(x), _FUNCTORCH.maybe_get_bdim(x)))
        x = _FUNCTORCH.get_unwrapped(x)
    return x, batches


class FurtherBatchError(Exception):
    """A tensor is batched by a vmap that the batches in use do not contain; ``batches`` contain it."""

    def __init__(self, batches: Batches) -> None:
        super().__init__("a tensor is batched by a further vmap")
        self.batches = batches


class Batches:
    """Levels of vmap, the outermost first, with their sizes. Their samples are numbered as in a tensor of all sizes.

    Attributes:
        count: number of samples, 1 without a level.
    """

    def __init__(self, sizes: dict[int, int] | None = None) -> None:
        self._sizes = dict(sorted((sizes or {}).items()))
        self.count = int(np.prod(list(self._sizes.values()), dtype=np.int64))

    @property
    def is_empty(self) -> bool:
        return not self._sizes

    def with_those_of(self, x: Tensor) -> Batches:
        """These levels, and those by which ``x`` is batched."""
        plain, found = _unwrapped(x)
        return Batches({**self._sizes, **{level: plain.shape[d] for level, d in _dimensions(plain, found)[0].items()}})

    def read(self, x: Tensor) -> NDArray[Any]:
        """The values of ``x`` as an array, (count, \\*x.shape).

        Raises:
            FurtherBatchError: ``x`` is batched by a level that is not among these.
        """
        plain, found = _unwrapped(x)
        of_level, others = _dimensions(plain, found)
        if not set(of_level) <= set(self._sizes):
            raise FurtherBatchError(self.with_those_of(x))
        with outside_transforms():
            moved = plain.detach().permute([*(of_level[level] for level in self._sizes if level in of_level), *others])
            for i, level in enumerate(self._sizes):
                moved = moved if level in of_level else moved.unsqueeze(i)
            shape = moved.shape[len(self._sizes) :]
            values: NDArray[Any] = moved.expand((*self._sizes.values(), *shape)).cpu().numpy()
        return values.reshape((self.count, *shape))

    def wrap(self, values: NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The entries of an array (count, ...), one for each sample, as a tensor of the shape behind the first."""
        with outside_transforms():
            plain = torch.from_numpy(np.ascontiguousarray(values)).to(dtype=dtype, device=device)
            x = plain.reshape((*self._sizes.values(), *values.shape[1:]))
        for level in self._sizes:
            x = _FUNCTORCH._add_batch_dim(x, 0, level)
        return x


def _dimensions(plain: Tensor, batches: Sequence[tuple[int, int]]) -> tuple[dict[int, int], list[int]]:
    """Dimension of a plain tensor for each level of vmap, and the other dimensions in order."""
    others = list(range(plain.dim()))
    return {level: others.pop(dimension) for level, dimension in reversed(batches)}, others
