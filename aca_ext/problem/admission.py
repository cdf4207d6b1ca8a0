"""Tensors whose elements can be read, and the reasons why those of others cannot.

The kernels take addresses on trust, and so do many operations of PyTorch. A tensor that comes from outside (a state, a
slope, a gradient, a tolerance, times) passes one of these checks before anything reads it. The twin for slopes that are
laid out like the state is csrc/python/admission.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import AcaError, ArgumentTypeError
from aca_ext.problem.recorders import recorder

_SURELY_MEMORY = 1 << 40  # an address further from 0 than any tensor from the start of its storage
_PLAIN = (Tensor, torch.nn.Parameter)
# What a subclass has as __torch_dispatch__ that leaves everything to PyTorch; private, so perhaps not in each version.
_NO_DISPATCH = getattr(torch._C, "_disabled_torch_dispatch_impl", None)
_is_functional: Callable[[Tensor], bool] = getattr(torch, "_is_functional_tensor", lambda x: False)
_is_zeros: Callable[[Tensor], bool] = getattr(torch, "_is_zerotensor", lambda x: False)


def is_plain(x: object) -> bool:
    """Tells whether ``x`` is a tensor or parameter of no subclass: a subclass may hold its elements elsewhere."""
    return type(x) in _PLAIN


def has_memory(x: Tensor) -> bool:
    """Tells whether a plain strided tensor has an address, or no elements: a first look that costs little.

    Without memory, its address is as far from 0 as the tensor from the start of its storage.
    """
    return x.data_ptr() > _SURELY_MEMORY or x.numel() == 0 or _has_storage(x)


def _has_storage(x: Tensor) -> bool:
    try:
        return x.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def looks_readable(x: Tensor) -> bool:
    """False where ``check_readable`` is to look closer."""
    return type(x) is Tensor and x.layout is torch.strided and not x.is_nested and has_memory(x)


def check_readable(what: str, x: Any, error: type[AcaError] = ArgumentTypeError) -> None:
    """Raises ``error`` where ``x``, called ``what``, is a tensor whose elements nobody can read."""
    if not isinstance(x, Tensor) or _is_surely_readable(x):
        return
    obstacle = _obstacle(x)
    if obstacle is not None and recorder() is None:  # what is recorded is read when it runs
        raise error(f"{what} is {obstacle}")


def _is_surely_readable(x: Tensor) -> bool:
    """True for nearly every tensor that has no obstacle, in less than half the time that it takes to find one."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested or x.is_quantized or not x.is_contiguous():
        return False
    return x.data_ptr() > _SURELY_MEMORY and x.untyped_storage().nbytes() >= _extent(x)


def _obstacle(x: Tensor) -> str | None:
    kind = type(x)
    if kind not in _PLAIN and getattr(kind, "__torch_dispatch__", _NO_DISPATCH) is not _NO_DISPATCH:
        return (
            f"a {kind.__name__}, a subclass that only wraps tensors or stands for one (as FakeTensor and DTensor do); "
            "a solve works on plain tensors. Give it the tensor inside, of a DTensor that of .to_local()."
        )
    if x.is_meta:
        return 'on the device "meta", which holds no values; a solve has to compute some. Move it to a real device.'
    if _is_functional(x):
        return "a functional tensor, which stands for a value while functions are traced; a solve cannot be traced."
    if x.is_nested:
        return "a nested tensor; give a dense one, padded, or a tuple of tensors."
    if x.layout is not torch.strided:
        return f"of layout {x.layout}; give a dense tensor, .to_dense()."
    if x.is_quantized:
        return "a quantized tensor; give one of a floating dtype, .dequantize()."
    if _is_zeros(x):
        return None  # a copy has memory
    size, storage = _extent(x), x.untyped_storage()
    held = storage.nbytes()
    if size > held or (size and not has_memory(x)):
        return (
            f"a tensor whose memory is gone: its storage holds {held} bytes of the {size} that it needs. It was freed "
            "or resized, as untyped_storage().resize_() and FSDP do; give a tensor that keeps its memory, or a copy."
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
