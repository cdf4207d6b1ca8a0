"""Detection of recorders of operations: torch.jit.trace, torch.export, make_fx. Their tensors may have no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
JIT = "torch.jit.trace"
# Dispatch modes are private to torch. Without them, recorders go undetected here, and torch raises its own errors.
_count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_mode: Callable[[Any], object] = getattr(torch._C, "_get_dispatch_mode", lambda key: None)
_keys = getattr(torch._C, "_TorchDispatchModeKey", None)
_RECORDING_MODES = [key for name in ("PROXY", "FUNCTIONAL") if (key := getattr(_keys, name, None)) is not None]


def recorder() -> str | None:
    """Name of the recorder that is active in this thread; None if there is none."""
    if torch._C._get_tracing_state() is not None:
        return JIT
    if _is_exporting():
        return "torch.export"
    return "make_fx or AOTAutograd" if _count_modes() and any(map(_mode, _RECORDING_MODES)) else None
