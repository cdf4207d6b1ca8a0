"""Dense output of independent samples, each with steps of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError, ReplayError, TimeError
from aca_ext.known_steps.output_functions import checked_output, recomputed, stacked_outputs
from aca_ext.numerics.weights import Weights
from aca_ext.problem.batch import RowPacking
from aca_ext.problem.state import State
from aca_ext.problem.transforms import Batches
from aca_ext.problem.trees import map_leaves
from aca_ext.solver.repeated_steps import PlainOperations, Rows
from aca_ext.solver.runge_kutta import Trial, scheme_of, step
from aca_ext.solver.step_plan import Array, StepPlan, places_of
from aca_ext.vector_field.repeatable import repeatable
from aca_ext.vector_field.slope_check import plain_slope_function

_ROUNDING = 1e3  # as in ``dense``
_CHANGED = (
    "func has changed since the solve, or a tensor that it uses (an optimizer step?): from the state of sample {row} "
    "at t={t:.17g} it does not reach its state at t={t_next:.17g} again; deviation {deviation:.3g}. Call the solution "
    "before the change, or solve again."
)


class RowInterpolant:
    """``Interpolant`` for independent samples.

    Slopes are computed again for all samples at once: in the n-th round, those of the n-th step that each sample needs.

    Args:
        y0: packed states at the starts, (batch, \\*sample).
        ends: packed states at the ends of the steps, (steps, batch, \\*sample); anything behind a sample's last step.
    """

    def __init__(
        self, func: Any, args: Sequence[Any], packing: RowPacking, plan: StepPlan, y0: Tensor, ends: Tensor
    ) -> None:
        self._packing, self._tableau, self._ops, self._lanes = (
            packing,
            plan.tableau,
            PlainOperations(y0.detach()),
            Rows(y0),
        )
        self._f = repeatable(plain_slope_function(func, args, packing, self._ops, packing.time_shape), y0, func)
        self._scheme = scheme_of(plan.tableau, estimate_error=False)
        self._states = torch.cat([y0[None], ends])
        assert plan.known.of_rows is not None
        self._steps = plan.known.of_rows

    def at(self, t: Any, weights_at: Callable[..., list[Any]]) -> State:
        """The states at times ``t``, or their derivatives: the function gives the weights of the slopes in a step."""
        time = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not Batches().with_those_of(time).is_empty:
            raise ArgumentTypeError("t is batched by vmap. Give all times in one call, (batch, T).")
        n = len(self._steps)
        if time.dim() > 2 or (time.dim() == 2 and len(time) != n):
            raise TimeError(
                f"t has shape {tuple(time.shape)}; give times for all samples, a number or (T,), or for each of them, "
                f"({n}, T)."
            )
        each = time.reshape(1, -1).expand(n, -1) if time.dim() < 2 else time
        self._refuse_outside(each.detach())
        rows = self._packing.unpack_rows(self._inside(each, weights_at, self._states))
        return map_leaves(lambda x: x[0], rows) if time.dim() == 0 else rows

    def outputs(self, fn: Callable[[Tensor, Any], Any], times: Array) -> Any:
        """The results of ``fn(t, y)`` at the times, (batch, T), stacked along T; states are computed again."""
        each, results = torch.from_numpy(np.array(times)), list[Any]()
        for column in each.unbind(1):

            def at_time(states: Tensor, column: Tensor = column) -> list[Any]:
                (y,) = self._inside(column[:, None], Weights.dense_weights, states)
                return [checked_output(fn(column.to(y).view(self._packing.time_shape), self._packing.unpack(y)))]

            results += recomputed(at_time, self._states)
        return stacked_outputs(results)

    def _refuse_outside(self, each: Tensor) -> None:
        first, last = (torch.from_numpy(x.copy())[:, None] for x in (self._steps[:, 0, 0], self._steps[:, -1, 2]))
        is_inside = (each - first) * (each - last) <= 0
        if not bool(is_inside.all()):
            row, column = (~is_inside).nonzero()[0].tolist()
            raise TimeError(
                f"t reaches beyond the solution of sample {row}: it holds {each[row, column]:.17g}, and the solution "
                f"goes from {first[row, 0]:.17g} to {last[row, 0]:.17g}. Give times between these, or solve further."
            )

    def _inside(self, each: Tensor, weights_at: Callable[..., list[Any]], states: Tensor) -> Tensor:
        """States, or derivatives, at times (batch, T), which come first in the result, (T, batch, \\*sample)."""
        index, _ = places_of(self._steps, each.detach().numpy())
        needed, position = _rounds(index)
        slopes = [self._slopes(states, number) for number in needed.T]
        t, h, t_next = (torch.from_numpy(np.take_along_axis(self._steps[:, :, i], index, 1)) for i in range(3))
        length = torch.where(t_next == t, 1.0, t_next - t)
        if not slopes:  # no times
            return self._lanes.pick(states, index)
        of_state = weights_at is Weights.dense_weights
        start = self._lanes.pick(states, index)
        total, scale = (start, h) if of_state else (torch.zeros_like(start), h / length)
        for i, weight in enumerate(weights_at(self._tableau, (each - t) / length)):
            if isinstance(weight, Tensor):
                k = self._lanes.pick(torch.stack([k[i] for k in slopes]), position)
                total = total + (scale * weight).T.to(start).reshape(*k.shape[:2], *(1,) * (k.dim() - 2)) * k
        return total

    def _slopes(self, states: Tensor, number: NDArray[np.int64]) -> Sequence[Tensor]:
        """The slopes of step ``number`` of each sample."""
        t, h, t_next = self._steps[np.arange(len(number)), number].T
        y, y_next = (self._lanes.pick(states, number[:, None] + ahead)[0] for ahead in (0, 1))
        at = [self._lanes.numbers(t_next if c == 1 else t + c * h, y) for c in self._scheme.c]
        trial = step(self._f, self._ops, self._scheme, at, y, self._lanes.numbers(h, y))
        self._check(t, h, t_next, y, trial, y_next)
        return trial.k

    def _check(self, t: Array, h: Array, t_next: Array, y: Tensor, trial: Trial, y_next: Tensor) -> None:
        """Raises ReplayError if the step of a sample does not end where it did in the solve."""

        def largest(x: Tensor) -> Array:
            found: Array = x.detach().abs().reshape(len(x), -1).amax(1).double().cpu().numpy()
            return found

        if y.numel() == 0:
            return
        allowed = largest(y) + np.abs(h) * np.max([largest(k) for k in trial.k], 0)
        deviation = largest(trial.y1 - y_next)
        wrong = ~(deviation <= _ROUNDING * torch.finfo(y.dtype).eps * allowed) & (
            h != 0
        )  # without a step, y_next is NaN
        if wrong.any():
            row = int(wrong.argmax())
            raise ReplayError(_CHANGED.format(row=row, t=t[row], t_next=t_next[row], deviation=deviation[row]))


def _rounds(index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different steps that each sample needs, (batch, rounds), and the round of each of its times, (batch, T).

    A sample that needs fewer steps than another one repeats its last.
    """
    order = np.argsort(index, axis=1, kind="stable")
    steps = np.take_along_axis(index, order, 1)
    rounds = np.cumsum(np.diff(steps, axis=1, prepend=steps[:, :1]) != 0, axis=1)
    position = np.empty_like(index)
    np.put_along_axis(position, order, rounds, 1)
    needed = np.repeat(steps[:, -1:], int(rounds.max(initial=-1)) + 1, 1)
    np.put_along_axis(needed, rounds, steps, 1)
    return needed, position


def refuse_padded(times: Array) -> None:
    """Raises ArgumentValueError if samples have no state at some of the times, where output_fn would be called."""
    if np.isnan(times).any():
        raise ArgumentValueError(
            "t is padded with NaN, but output_fn is called for all samples at once. Give samples equally many times, "
            "or use dense=True."
        )
