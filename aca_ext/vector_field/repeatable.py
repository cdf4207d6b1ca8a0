"""Evaluations of func in plain PyTorch that repeat those of a solve: refusals, and evaluations without side effects."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aca_ext.errors import ArgumentValueError
from aca_ext.problem.recorders import recorder
from aca_ext.vector_field.contents import restore
from aca_ext.vector_field.holdings import Holdings
from aca_ext.vector_field.module_buffers import modules_of
from aca_ext.vector_field.slope_function import SlopeFunction


def refuse_unrepeatable(func: Callable[..., Any]) -> None:
    """Raises ArgumentValueError if func trains a batch normalisation, whose statistics would move once more."""
    for module in _modules(func):
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            raise ArgumentValueError(
                f"func holds a {type(module).__name__} in training mode, whose statistics another evaluation would "
                "move once more. Call func.eval() first."
            )


def _modules(func: Callable[..., Any]) -> list[nn.Module]:
    if isinstance(func, nn.Module):
        return modules_of(func)
    is_recorded = torch.compiler.is_compiling() or recorder() is not None  # neither follows the walk
    return [] if is_recorded else Holdings((func,)).modules


def repeatable(f: SlopeFunction, like: Tensor, func: Callable[..., Any]) -> SlopeFunction:
    """``f``, which raises ArgumentValueError if an evaluation draws random numbers; not inside recordings."""
    if torch.compiler.is_compiling() or recorder() is not None:
        return f
    generators = Holdings((func,)).generators

    def states() -> list[Tensor]:
        found = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
        return [*found, torch.cuda.get_rng_state(like.device)] if like.is_cuda else found

    def watched(t: Tensor, y: Tensor) -> Tensor:
        before = states()
        k = f(t, y)
        if any(not torch.equal(one, other) for one, other in zip(before, states(), strict=True)):
            raise ArgumentValueError(
                "func draws random numbers, so another evaluation would use others than the solve. Use a func without "
                "them, for example a module in evaluation mode."
            )
        return k

    return watched


@contextmanager
def without_foreign_draws(func: Callable[..., Any]) -> Iterator[None]:
    """Context of evaluations that must not draw random numbers from NumPy or Python.

    Their global generators, and those that func holds, are compared once, at the end: reading their states takes long.

    Raises:
        ArgumentValueError: one of them has moved; not inside recordings.
    """
    if torch.compiler.is_compiling() or recorder() is not None:
        yield
        return
    generators = Holdings((func,)).foreign_generators
    before = _foreign_states(generators)
    yield
    if before != _foreign_states(generators):
        raise ArgumentValueError(
            "func draws random numbers from NumPy or Python, so another evaluation would use others than the solve. "
            "Draw them before the solve, and give them as args."
        )


def _foreign_states(generators: Sequence[Any]) -> bytes:
    found = [np.random.get_state(), random.getstate()]
    for x in generators:
        if isinstance(x, np.random.Generator):
            found.append(x.bit_generator.state)
        else:
            found.append(x.get_state() if isinstance(x, np.random.RandomState) else x.getstate())
    return pickle.dumps(found)


@contextmanager
def leaving_no_trace(func: Callable[..., Any], args: Sequence[Any]) -> Iterator[None]:
    """Context of evaluations after which all that func's code reaches is what it was before.

    What func has computed and keeps would carry no derivative, and another evaluation might use it.

    Raises:
        ArgumentValueError: func wrote into a tensor that it holds.
    """
    contents = Holdings((func, *(arg for arg in args if not isinstance(arg, Tensor)))).contents
    contents.watch_tensors()
    try:
        yield
        if contents.changed_tensors(True):
            raise ArgumentValueError(
                "func writes into a tensor that it holds, which another evaluation would find changed. Let it make a "
                "new tensor."
            )
    finally:
        restore(contents)
