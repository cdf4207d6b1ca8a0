"""Results of ``output_fn``: validated, computed again in a backward pass, and stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from aca_ext.errors import ArgumentTypeError, ArgumentValueError, ReplayError
from aca_ext.problem.trees import labelled_leaves, leaves_of, structure_of, unflattened

_ROUNDING = 1e3  # in units of eps


def recomputed(compute: Callable[[Tensor], list[Any]], start: Tensor) -> list[Any]:
    """The results of ``compute(start)``; a backward pass computes them again, and compares."""
    first: list[Tensor] = []  # results of the solve

    def results(start: Tensor) -> list[Any]:
        found = compute(start)
        values = [x.detach() for result in found for x in leaves_of(result)]
        _check_repeated(first, values)
        first[:] = first or values
        return found

    if not torch.is_grad_enabled():
        return results(start)
    with set_checkpoint_early_stop(False):  # or it would not come to the comparison
        found: list[Any] = checkpoint(results, start, use_reentrant=False)
    return found


def checked_output(result: Any) -> Any:
    """The result of output_fn.

    Raises:
        ArgumentTypeError: it holds anything but tensors, or nothing.
    """
    leaves = labelled_leaves(result, "the result of output_fn")
    for where, part in leaves:
        if not isinstance(part, Tensor):
            raise ArgumentTypeError(
                f"{where} is of type {type(part).__name__}; output_fn must return a tensor or a tree of tensors. Make "
                "a tensor of it by operations of torch, which carry gradients; torch.as_tensor(number) has none."
            )
    if not leaves:
        raise ArgumentTypeError(f"the result of output_fn is an empty {type(result).__name__}; return a tensor.")
    return result


def stacked_outputs(results: Sequence[Any]) -> Any:
    """The results of output_fn at all times, stacked along a new first dimension.

    Raises:
        ArgumentValueError: their structures or shapes differ.
    """
    structure = structure_of(results[0])
    if any(structure_of(result) != structure for result in results):
        raise ArgumentValueError("output_fn returned results of other structures at other times; return the same.")
    columns = map(leaves_of, results)
    stacked: list[Tensor] = []
    for parts in zip(*columns, strict=True):
        forms = {(tuple(part.shape), part.dtype) for part in parts}
        if len(forms) > 1:
            raise ArgumentValueError(
                f"output_fn returned tensors of {' and '.join(sorted(map(str, forms)))} at different times; it must "
                "return the same shapes and dtypes at all times."
            )
        stacked.append(torch.stack(parts))
    return unflattened(structure, stacked)


def _check_repeated(first: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """Raises ReplayError if output_fn does not repeat its results; ``first`` is empty at its first call."""
    for x, y in zip(first, again, strict=False):
        rounding = _ROUNDING * torch.finfo(x.dtype).eps if x.is_floating_point() or x.is_complex() else 0.0
        size = float(x.abs().max()) if x.numel() and rounding else 0.0
        if not torch.allclose(x, y, rtol=0.0, atol=rounding * size, equal_nan=True):
            raise ReplayError(
                "output_fn does not repeat the values that it had in the solve: it has changed since, or a tensor that "
                "it uses (an optimizer step?). Call backward() before the change, or solve again."
            )
