"""Inputs of a traced func in a solve: their addresses, and the check that their contents are unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from aca_ext.engines.compiled.backend import Captured, UnusableFuncError
from aca_ext.engines.compiled.places import shown
from aca_ext.errors import ReplayError
from aca_ext.kernels.extension import checksums_of


def addresses_of(inputs: Sequence[Tensor]) -> list[int]:
    """Addresses of the inputs of func.

    Raises:
        UnusableFuncError: the memory of an input was freed.
    """
    found = list(map(Tensor.data_ptr, inputs))
    if 0 in found:
        for x in inputs:
            if x.numel() and x.data_ptr() == 0:
                raise UnusableFuncError(
                    f"func depends on a tensor of shape {tuple(x.shape)} whose memory was freed "
                    "(untyped_storage().resize_). Restore it before the solve and before its backward pass."
                )
    return found


def contents_of(captured: Captured, inputs: Sequence[Tensor], addresses: list[int]) -> bytes:
    """Checksums of all inputs, eight bytes each, followed by those of the inputs with gaps in memory.

    ``captured.checksums`` leaves inputs with gaps out; they are copied first.
    """
    found: bytes = captured.checksums(addresses)
    for i in captured.gaps:
        dense = inputs[i].detach().contiguous()
        found += checksums_of([dense.nbytes])([dense.data_ptr()])
    return found


def changed_input_error(
    captured: Captured, inputs: Sequence[Tensor], before: bytes, now: bytes, last_step: Sequence[Any]
) -> ReplayError:
    """The error for the first input whose checksum in ``now`` differs from that in ``before``, the forward pass.

    Programs depend on their inputs only, so a replay from equal inputs repeats the forward pass.
    """
    order = [*range(len(inputs)), *captured.gaps]
    i = next(i for n, i in enumerate(order) if now[8 * n : 8 * n + 8] != before[8 * n : 8 * n + 8])
    where = f" from t={last_step[0][0]:.17g}" if last_step else ""
    return ReplayError(
        f"Replaying the step{where} would not repeat the forward pass: func depends on {shown(captured.names[i])}, of "
        f"shape {tuple(inputs[i].shape)}, which has changed since. Causes: it was written to through .data, or its "
        "memory was reused for the next batch. Change it after the backward pass, give func a copy, or use "
        'gradient="direct", which does not replay.'
    )
