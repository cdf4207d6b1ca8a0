"""``DenseSolution``: a solution as a function of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ReplayError, TimeError
from aca_ext.known_steps.dense_rows import RowInterpolant
from aca_ext.known_steps.output_functions import checked_output, recomputed, stacked_outputs
from aca_ext.numerics.weights import Weights
from aca_ext.problem.state import Packing, State
from aca_ext.problem.transforms import Batches
from aca_ext.problem.trees import map_leaves
from aca_ext.solution import Solution
from aca_ext.solver.repeated_steps import PlainOperations
from aca_ext.solver.runge_kutta import scheme_of, stage_times, step
from aca_ext.solver.step_plan import StepBounds, StepPlan
from aca_ext.vector_field.repeatable import repeatable
from aca_ext.vector_field.slope_check import plain_slope_function

_ROUNDING = 1e3  # in units of eps: the solve adds by fused kernels, this module by plain PyTorch
_CHANGED = (
    "func has changed since the solve, or a tensor that it uses (an optimizer step?): from the state at t={t:.17g} it "
    "does not reach the state at t={t_next:.17g} again; deviation {deviation:.3g}. Call the solution before the "
    "change, or solve again."
)


@dataclass(frozen=True, repr=False)
class DenseSolution(Solution):
    """Result of ``solve`` with ``dense=True``; it can be called. Else a ``Solution``."""

    interpolant: Interpolant | RowInterpolant | None = field(default=None, repr=False, compare=False)

    def __call__(self, t: Any) -> State:
        """The state at any times between the first and the last, by the dense output of the method.

        Exactly differentiable, to any order, with respect to t, y0, args, and what func depends on. The solution holds
        the states between its steps; a call evaluates func anew in the steps that ``t`` falls into.

        Args:
            t: a time or a tensor of times of any shape. For independent samples a time or (T,) times for all of them,
                or (batch, T) times for each.

        Returns:
            (\\*t.shape, \\*y0.shape), for times of each sample (T, \\*y0.shape); for a tree one of such.

        Raises:
            TimeError: a time lies outside of the solution.
            ArgumentTypeError: t is batched by vmap.
            ReplayError: func does not repeat the steps of the solve; it has changed.
        """
        assert self.interpolant is not None
        return self.interpolant.at(t, Weights.dense_weights)

    def derivative(self, t: Any) -> State:
        """The derivative of the solution in time, shaped like the state; arguments and errors as for a call.

        It is that of the dense output, which approximates func along the solution. At a time between two steps it is
        that at the end of the first.
        """
        assert self.interpolant is not None
        return self.interpolant.at(t, Weights.dense_derivative_weights)


class Interpolant:
    """Dense output of known steps, from the states between them.

    Args:
        y0: packed state at the start.
        ends: packed states at the ends of the steps.
    """

    def __init__(
        self, func: Any, args: Sequence[Any], packing: Packing, plan: StepPlan, y0: Tensor, ends: Tensor
    ) -> None:
        self._packing, self._plan, self._ops = packing, plan, PlainOperations(y0.detach())
        self._f = repeatable(plain_slope_function(func, args, packing, self._ops), y0, func)
        self._scheme = scheme_of(plan.tableau, estimate_error=False)
        self._states = [y0, *ends.unbind(0)]
        steps = plan.known.common
        self._sign = 1.0 if steps[-1][2] > steps[0][0] else -1.0
        self._ends = self._sign * torch.tensor([t_next for _, _, t_next in steps], dtype=torch.float64, device="cpu")

    def at(self, t: Any, weights_at: Callable[..., list[Any]]) -> State:
        """The state at times ``t``, or its derivative: the function gives the weights of the slopes in a step."""
        time = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not Batches().with_those_of(time).is_empty:
            raise ArgumentTypeError("t is batched by vmap. Give all times in one call: t may have any shape.")
        flat = time.reshape(-1)
        found: list[Tensor] = [self._states[0][None][:0]]
        order: list[Tensor] = []
        for n, places in self._by_step(flat.detach()):
            found.append(self._inside(n, flat[places], weights_at))
            order.append(places)
        values = torch.cat(found)
        if order:
            values = values[torch.cat(order).argsort().to(values.device)]
        rows = self._packing.unpack_rows(values)
        return map_leaves(lambda x: x.reshape((*time.shape, *x.shape[1:])), rows)

    def outputs(self, fn: Callable[[Tensor, Any], Any], times: Sequence[float]) -> Any:
        """The results of ``fn(t, y)`` at the times, stacked; only these are kept, and states are computed again."""
        flat = torch.tensor(times, dtype=torch.float64, device="cpu")
        results: list[Any] = []
        for n, places in self._by_step(flat):

            def of_step(start: Tensor, n: int = n, at: Tensor = flat[places]) -> list[Any]:
                states = self._inside(n, at, Weights.dense_weights, start)
                given = zip(at.to(states).unbind(0), states.unbind(0), strict=True)
                return [checked_output(fn(t, self._packing.unpack(y))) for t, y in given]

            results += recomputed(of_step, self._states[n])
        return stacked_outputs(results)

    def _by_step(self, times: Tensor) -> list[tuple[int, Tensor]]:
        """Pairs (number of a step, indices of the times in it); a time between two steps belongs to the first.

        Raises:
            TimeError: a time lies outside of the steps, or is NaN.
        """
        steps, along = self._plan.known.common, self._sign * times
        first, last = steps[0][0], steps[-1][2]
        outside = ~((along >= self._sign * first) & (along <= self._sign * last))
        if bool(outside.any()):
            raise TimeError(
                f"t reaches beyond the solution: it holds {times[outside][0]:.17g}, and the solution goes from "
                f"{first:.17g} to {last:.17g}. Give times between these, or solve further."
            )
        index = torch.searchsorted(self._ends, along)
        return [(int(n), (index == n).nonzero().reshape(-1)) for n in index.unique()]

    def _inside(
        self, n: int, times: Tensor, weights_at: Callable[..., list[Any]], start: Tensor | None = None
    ) -> Tensor:
        """States, or derivatives, at times in step ``n``, (len(times), \\*state)."""
        t, h, t_next = bounds = self._plan.known.common[n]
        y = self._states[n] if start is None else start
        at = stage_times(self._scheme, t, h, t_next, self._plan.jumps, y.dtype)
        trial = step(self._f, self._ops, self._scheme, at, y, h)
        self._check(bounds, y, trial.y1, self._states[n + 1], trial.k)
        theta, of_state = (times - t) / (t_next - t), weights_at is Weights.dense_weights
        scale = h if of_state else h / (t_next - t)
        total: Any = y if of_state else torch.zeros_like(y)
        shape = (len(times), *(1,) * y.dim())
        for weight, k in zip(weights_at(self._plan.tableau, theta), trial.k, strict=True):
            if isinstance(weight, Tensor):
                total = total + (scale * weight).to(y).view(shape) * k
        return total

    def _check(self, bounds: StepBounds, y: Tensor, y1: Tensor, expected: Tensor, k: Sequence[Tensor]) -> None:
        """Raises ReplayError if a step does not end where it did in the solve."""
        with torch.no_grad():
            deviation = (y1 - expected).abs().max().item() if y1.numel() else 0.0
            slope = max(k_i.abs().max().item() for k_i in k) if y1.numel() else 0.0
            size = y.abs().max().item() if y1.numel() else 0.0
        allowed = _ROUNDING * torch.finfo(y.dtype).eps * (size + abs(bounds[1]) * slope)
        if not deviation <= allowed:
            raise ReplayError(_CHANGED.format(t=bounds[0], t_next=bounds[2], deviation=deviation))
