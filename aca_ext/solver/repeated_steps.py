"""Repetition of known steps in plain torch operations, through which every transform and tracer of PyTorch passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.kernels import reference
from aca_ext.kernels.operations import Floats, Tensors, TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.problem.tolerance import Tolerance
from aca_ext.solver.runge_kutta import Scheme, Weights, nonzero, scheme_of, solution_only, stage_times, step
from aca_ext.solver.step_plan import Array, StepPlan, outputs_by_step, places_of
from aca_ext.vector_field.slope_function import SlopeFunction


class PlainOperations(TorchOperations):
    """The operations by ``reference`` alone: no copies into a memory layout, which transforms and tracers refuse."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.tolerance = like, Tolerance(0.0, 0.0, [0, like.numel()])

    def admit(self, x: Tensor, what: str = "") -> Tensor:
        return x

    def weighted_sum(self, base: Tensor | None, h: Number, x: Tensors, w: Floats, out: Tensor | None = None) -> Tensor:
        return reference.weighted_sum(base, h, x, w)

    def scalars(self, values: Sequence[Number]) -> Sequence[Tensor]:
        if values and isinstance(values[0], Tensor):  # times of samples with steps of their own
            return values
        return torch.tensor(values, dtype=self.like.dtype, device=self.like.device).unbind(0)


class Lanes(Protocol):
    """Samples with steps of their own: conversion of an array with an entry per sample into tensors."""

    def numbers(self, values: Array, like: Tensor) -> Tensor:
        """The values, (n_samples,), as a tensor of the dtype of ``like`` that broadcasts to a state."""

    def pick(self, stacked: Tensor, index: NDArray[np.int64]) -> Tensor:
        """From states (n, \\*state) those of steps ``index``, (n_samples, T): (T, \\*state)."""

    def weights(self, values: Array, like: Tensor) -> Tensor:
        """The values, (n_samples, T), as a tensor that broadcasts to states (T, \\*state)."""


class FixedStep(NamedTuple):
    """One step that all samples share, as constants.

    Attributes:
        times: times of the stages.
        outputs: weights of the slopes in each output of the step; None for one at its end.
        keeps_slope: the last slope is the first one of the next step.
    """

    scheme: Scheme
    times: Sequence[float]
    h: float
    outputs: Sequence[Weights | None]
    keeps_slope: bool


def fixed_steps(plan: StepPlan, dtype: torch.dtype) -> list[FixedStep]:
    """The steps of a plan, for states of this real dtype."""
    tableau, steps, found = plan.method, plan.known.common, list[FixedStep]()
    scheme = scheme_of(tableau, estimate_error=False)
    short = solution_only(scheme)
    for n, ((t, h, t_next), due) in enumerate(zip(steps, outputs_by_step(steps, plan.times), strict=True)):
        outputs = [None if theta == 1.0 else nonzero(tableau.dense_weights(theta)) for _, theta in due]
        is_last, is_dense = n + 1 == len(steps), any(weights is not None for weights in outputs)
        used = short if not is_dense and (is_last or not scheme.fsal) else scheme
        times = stage_times(used, t, h, t_next, plan.jumps, dtype)
        found.append(FixedStep(used, times, h, outputs, used.fsal and t_next not in plan.jumps))
    return found


def repeated_states(
    f: SlopeFunction, steps: Sequence[FixedStep], y: Tensor, ops: PlainOperations | None = None
) -> list[Tensor]:
    """The states at the requested times, from ``y`` along steps that all samples share; differentiable in y and f."""
    ops, k, outputs = ops or PlainOperations(y), None, [y]
    for s in steps:
        trial = step(f, ops, s.scheme, s.times, y, s.h, k)
        for weights in s.outputs:
            if weights is None:
                outputs.append(trial.y1)
            else:
                outputs.append(ops.weighted_sum(y, s.h, [trial.k[i] for i in weights[0]], weights[1]))
        y, k = trial.y1, trial.k[-1] if s.keeps_slope else None
    return outputs


def repeated_states_of_lanes(f: SlopeFunction, plan: StepPlan, y: Tensor, lanes: Lanes) -> Tensor:
    """The states at the requested times, (T, \\*state), of samples with steps of their own."""
    steps, times = plan.known.of_rows, plan.times
    assert steps is not None
    n_times = times.shape[1]
    if n_times == 1 or steps.shape[1] == 0:
        return torch.stack([y] * n_times)
    ops, scheme = PlainOperations(y), scheme_of(plan.method, estimate_error=False)
    is_dense, k = n_times > 2, None
    if not (is_dense or scheme.fsal):
        scheme = solution_only(scheme)
    states, slopes = [y], list[list[Tensor]]()
    for n in range(steps.shape[1]):
        t, h, t_next = steps[:, n].T
        at = [lanes.numbers(t_next if c == 1 else t + c * h, y) for c in scheme.c]
        trial = step(f, ops, scheme, at, y, lanes.numbers(h, y), k)
        y, k = trial.y1, trial.k[-1] if scheme.fsal else None
        states.append(y)
        if is_dense:
            slopes.append(trial.k)
    if not is_dense:
        return torch.stack([states[0], y])
    inside = _inside(lanes, plan, torch.stack(states[:-1]), slopes)
    return torch.cat([states[0][None], inside, y[None]])


def _inside(lanes: Lanes, plan: StepPlan, starts: Tensor, slopes: Sequence[Sequence[Tensor]]) -> Tensor:
    """The states at all requested times but the first and the last, by dense output."""
    steps = plan.known.of_rows
    assert steps is not None
    index, theta = places_of(steps, plan.times[:, 1:-1])
    h = np.take_along_axis(steps[:, :, 1], index, 1)
    total = lanes.pick(starts, index)
    for i, b in enumerate(plan.method.dense_weights(theta)):
        if np.any(b):
            k = torch.stack([of_step[i] for of_step in slopes])
            total = total + lanes.weights(h * b, starts) * lanes.pick(k, index)
    return total


class Rows:
    """``Lanes`` of a batch whose first dimension counts the samples."""

    def __init__(self, like: Tensor) -> None:
        self._shape = (len(like), *(1,) * (like.dim() - 1))
        self._samples = torch.arange(len(like), device=like.device)

    def numbers(self, values: Array, like: Tensor) -> Tensor:
        return torch.tensor(values.tolist(), dtype=like.dtype, device=like.device).view(self._shape)

    def pick(self, stacked: Tensor, index: NDArray[np.int64]) -> Tensor:
        return stacked[torch.from_numpy(index.T.copy()).to(stacked.device), self._samples]

    def weights(self, values: Array, like: Tensor) -> Tensor:
        return torch.from_numpy(values.T.copy()).to(like).view(-1, *self._shape)
