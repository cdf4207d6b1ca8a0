"""Validation of tensors from outside: only tensors whose elements can be read from memory are accepted.

Kernels, like many operations of PyTorch, do not validate the addresses that they get. So every tensor from outside (a
state, slope, gradient, tolerance, or times) passes one of these checks first. csrc/python/admission.h is the
counterpart for slopes that have the layout of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import AcaError, ArgumentTypeError
from aca_ext.problem.recorders import recorder
from aca_ext.problem.transforms import is_wrapped

_SURELY_MEMORY = 1 << 40  # without memory, an address is only the offset into the storage, which is smaller
_PLAIN = (Tensor, torch.nn.Parameter)
# The __torch_dispatch__ of a subclass that does not override it. Private to torch, so it may be absent.
_NO_DISPATCH = getattr(torch._C, "_disabled_torch_dispatch_impl", None)
_is_functional: Callable[[Tensor], bool] = getattr(torch, "_is_functional_tensor", lambda x: False)
_is_zeros: Callable[[Tensor], bool] = getattr(torch, "_is_zerotensor", lambda x: False)


def is_plain(x: object) -> bool:
    """Tells whether ``x`` is exactly a Tensor or Parameter; a subclass may hold its elements elsewhere."""
    return type(x) in _PLAIN


def has_memory(x: Tensor) -> bool:
    """Tells whether a plain strided tensor has memory or needs none; cheap in the common case.

    The address of a tensor without memory is its offset into its storage, which is small.
    """
    return x.data_ptr() > _SURELY_MEMORY or x.numel() == 0 or _has_storage(x)


def _has_storage(x: Tensor) -> bool:
    try:
        return x.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def looks_readable(x: Tensor) -> bool:
    """Cheap test for plain dense tensors with memory; False means that ``check_readable`` must decide."""
    return type(x) is Tensor and is_readable(x)


def is_readable(x: Tensor) -> bool:
    """``looks_readable`` for a tensor that is no subclass."""
    return x.layout is torch.strided and not x.is_nested and (x.data_ptr() > _SURELY_MEMORY or has_memory(x))


def check_readable(what: str, x: Any, error: type[AcaError] = ArgumentTypeError) -> None:
    """Raises ``error`` if ``x`` is a tensor whose elements cannot be read; ``what`` names it in the message."""
    # TorchDynamo traces no C function, such as is_wrapped, so it has to stop before.
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or is_wrapped(x) or _is_surely_readable(x):
        return
    obstacle = _obstacle(x)
    if obstacle is not None and recorder() is None:  # a recorder's tensors have no elements yet
        raise error(f"{what} is {obstacle}")


def _is_surely_readable(x: Tensor) -> bool:
    """True for nearly every tensor that has no obstacle, in less than half the time that it takes to find one."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested or x.is_quantized or not x.is_contiguous():
        return False
    end = x.storage_offset() * x.element_size() + x.nbytes
    return x.data_ptr() > _SURELY_MEMORY and x.untyped_storage().nbytes() >= end


def _obstacle(x: Tensor) -> str | None:
    kind = type(x)
    if kind not in _PLAIN and getattr(kind, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH:
        return (
            f"a {kind.__name__}, a subclass that wraps a tensor or stands for one (as DTensor and FakeTensor do); a "
            "solve takes plain tensors. Give the tensor inside, which .to_local() returns for a DTensor."
        )
    if x.is_meta:
        return 'on the device "meta", which holds no values; a solve needs values. Give a tensor on a real device.'
    if _is_functional(x):
        return "a functional tensor, which stands for a value in a function trace; a solve needs values, not a trace."
    if x.is_nested:
        return "a nested tensor; give a dense one, padded, or a tuple of tensors."
    if x.layout is not torch.strided:
        return f"of layout {x.layout}; give a dense tensor, .to_dense()."
    if x.is_quantized:
        return "a quantized tensor; give one of a floating dtype, .dequantize()."
    if _is_zeros(x):
        return None  # a zero tensor has no memory, but a copy of it has
    size, storage = _extent(x), x.untyped_storage()
    held = storage.nbytes()
    if size > held or (size and not has_memory(x)):
        return (
            f"a tensor without its memory: its storage holds {held} of the {size} bytes that it needs. It was freed "
            "or resized, for example by untyped_storage().resize_() or FSDP. Give a copy made before that."
        )
    return None


def _extent(x: Tensor) -> int:
    """Bytes of the storage up to the last element of ``x``."""
    if x.numel() == 0:
        return 0
    if x.is_contiguous():
        return int(x.storage_offset() * x.element_size() + x.nbytes)
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int((x.storage_offset() + last + 1) * x.element_size())
