"""Refusal of a func that makes independent samples depend on one another."""

from __future__ import annotations

import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError
from aca_ext.gradients.base import Task
from aca_ext.problem.batch import BatchProblem
from aca_ext.vector_field.replay import run_backward


def refuse_mixed_samples(task: Task, y: Tensor, k: Tensor | None) -> None:
    """Raises ArgumentValueError if the slopes of some independent samples depend on the states of others.

    A func that joins all samples is found by the slopes of every other sample. Every solve looks, since a parameter
    that joins them may be zero at first, and a state may be too far from another. Hooks inside func see the look.
    """
    if not isinstance(task.problem, BatchProblem) or len(y) < 2 or task.field.moving_buffers:  # refused in batch.py
        return
    if k is None or not k.requires_grad or not y.requires_grad:
        return
    every_other = torch.zeros_like(k)
    every_other[::2] = 1
    try:
        (found,) = run_backward((k,), (every_other,), True, False, (y,), True, False)
    except Exception:  # func has no derivative, or compiled code has it once; lanes have looked at what that computes
        return
    others = None if found is None else found[1::2]
    if others is not None and others.any() and bool((torch.isfinite(others) & (others != 0)).any()):
        raise ArgumentValueError(
            "func makes samples depend on one another: slopes of some depend on states of others, as with y.mean(0) or "
            'batch statistics. Option batch="independent" does not allow that, since each sample has its own time and '
            "steps. Leave the option out, or compute the slope of a sample from that sample alone."
        )
