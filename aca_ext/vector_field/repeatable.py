"""Refusal of funcs that another evaluation would not repeat: random numbers, batch statistics in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.errors import ArgumentValueError
from aca_ext.problem.recorders import recorder
from aca_ext.vector_field.module_buffers import modules_of
from aca_ext.vector_field.slope_function import SlopeFunction


def refuse_unrepeatable(func: Callable[..., Any]) -> None:
    """Raises ArgumentValueError if func trains a batch normalisation, whose statistics would move once more."""
    for module in modules_of(func) if isinstance(func, nn.Module) else ():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            raise ArgumentValueError(
                f"func holds a {type(module).__name__} in training mode, whose statistics another evaluation would "
                "move once more. Call func.eval() first."
            )


def repeatable(f: SlopeFunction, like: Tensor) -> SlopeFunction:
    """``f``, which raises ArgumentValueError if an evaluation draws random numbers; not inside recordings."""
    if torch.compiler.is_compiling() or recorder() is not None:
        return f

    def watched(t: Tensor, y: Tensor) -> Tensor:
        before = random_states(like)
        k = f(t, y)
        if any(not torch.equal(one, other) for one, other in zip(before, random_states(like), strict=True)):
            raise ArgumentValueError(
                "func draws random numbers, so another evaluation would use others than the solve. Use a func without "
                "them, for example a module in evaluation mode."
            )
        return k

    return watched


def random_states(like: Tensor) -> list[Tensor]:
    """States of the random generators of the CPU and of the device of ``like``."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(like.device)] if like.is_cuda else states
