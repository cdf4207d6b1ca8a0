"""One step of an implicit Runge-Kutta method and its transpose.

The slopes of a step satisfy the same equations as in ``runge_kutta``, with a full matrix a. So does the transpose:

    grad_k_i = h·(Σ_outputs w_i·g + Σ_j a_ji·v_j)        v_j = (∂f/∂y at stage j)ᵀ·grad_k_j

For stages that depend on one another these are linear equations, with the transpose of the matrix of Newton's method
at the converged stages. The iterations themselves are not differentiated.

With ``RowOperations``, where each sample has a step size of its own, these are the equations of each sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, ReplayError
from aca_ext.kernels.extension import own_result
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.solver.implicit.newton import Newton
from aca_ext.solver.implicit.replayed_stages import ReplayedStage, predicted, pulled_states, transposed_solution
from aca_ext.solver.implicit.rows import Mask, constant, is_any, spread
from aca_ext.solver.implicit.scheme import Group, ImplicitScheme
from aca_ext.solver.implicit.starting_values import StepBefore
from aca_ext.solver.implicit.systems import Jacobian, Solution
from aca_ext.solver.one_step import OneStepMethod
from aca_ext.solver.runge_kutta import PULLED, Trial
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.solver.transposed_step import (
    Compare,
    Inside,
    compare_implicit_end,
    cotangent_of_slope,
    cotangent_of_start,
    repeated_implicit_end,
)
from aca_ext.vector_field.slope_function import SlopeFunction

_CORRECTIONS = 2  # Newton corrections with a graph: each makes one more order of derivatives exact


class ImplicitMethod(OneStepMethod):
    """An implicit Runge-Kutta method, bound to f and the operations of a solve; see ``solver.method.Method``.

    Args:
        tolerance: the error of Newton's method in a stage, in units of the tolerance of the solve; None iterates until
            rounding.
        repeats: steps repeat those of a forward pass, and iterate until rounding.
    """

    def __init__(
        self,
        f: SlopeFunction,
        ops: TorchOperations,
        scheme: ImplicitScheme,
        jacobian: Jacobian,
        tolerance: float | None,
        counts: Stats | BatchStats,
        repeats: bool = False,
    ) -> None:
        self.scheme: ImplicitScheme = scheme
        self._f, self._ops, self._jacobian, self._tolerance, self._repeats = f, ops, jacobian, tolerance, repeats
        self._before = StepBefore(ops, scheme)
        self._newton = Newton(f, ops, jacobian, None if repeats else tolerance, counts)

    def step(
        self,
        times: Sequence[Number],
        y: Tensor,
        h: Number,
        k_first: Tensor | None = None,
        out: Tensor | None = None,
        y_next: Tensor | None = None,
    ) -> Trial:
        """Advances ``y`` by h, as ``runge_kutta.step`` does; where Newton's method fails, the error is infinite.

        ``y_next`` is the end of the step if that is known.
        """
        scheme, ops, newton = self.scheme, self._ops, self._newton
        t, size = ops.scalars(times), constant(h)
        k: list[Tensor] = []
        if k_first is None:  # the first step, or one at a jump of func
            self._before.forget()
        first = self._first_slope(t, y) if k_first is None else k_first
        states = None if y_next is None else {-1: y.detach(), len(scheme.a): y_next}  # as in Group.predictors
        newton.begin_step(times[0], t[0], y, size)
        for group in scheme.groups:
            if group.a is None:
                i = group.stages.start
                k.append(first if i == 0 else self._f(t[i], self._base(i, y, h, k)))
            else:
                found = self._solved(group, t, y, size, k, first, states)
                if not is_any(newton.live):
                    return self._with_failures(Trial(y, [first], None), y)
                k += self._with_graph(group, t, y, h, k, found) if torch.is_grad_enabled() else found
            if states is not None:
                states |= {i: self._base(i, y, h, k).detach() for i in group.stages}
        if scheme.error is None:
            return Trial(ops.weighted_sum(y, h, k, scheme.solution, out), k, None)
        y1, error = ops.solution_and_error(y, h, k, scheme.solution, scheme.error, out)
        if scheme.error_filter is not None:
            if size is not h:
                raise ArgumentValueError(
                    f'gradient="naive" does not differentiate the filtered error estimate of {scheme.tableau.name!r}. '
                    'Use gradient="aca" or "direct", or another method.'
                )
            with torch.no_grad():
                error = newton.filtered(scheme.error_filter, error.detach())
        trial = Trial(y1, k, error)
        return self._with_failures(trial, y) if is_any(newton.failed) else trial

    def _with_failures(self, trial: Trial, y: Tensor) -> Trial:
        """The trial with an infinite error in the rows whose iterations failed, and their messages."""
        newton, ops = self._newton, self._ops
        trial.failures = newton.failures()
        if not is_any(newton.live):
            trial.error_norm = spread(math.inf, ops)
        else:
            assert trial.partial_error is not None
            norm = ops.error_norm(trial.partial_error, None, 0.0, y, trial.y1)
            trial.error_norm = np.where(newton.failed, math.inf, norm)
        return trial

    def vjp(
        self,
        times: Sequence[Number],
        y: Tensor,
        h: Number,
        outputs: Sequence[tuple[Sequence[float], Tensor]],
        compare: Compare | None = None,
        y_next: Tensor | None = None,
        inside: Inside | None = None,
    ) -> Tensor:
        """Replays a step from ``y`` and returns the cotangent of ``y``, as ``runge_kutta.step_vjp`` does.

        ``compare`` is called only if the end of the step differs from ``y_next`` by more than the iterations may.
        """
        ops, f = self._ops, self._f
        assert hasattr(f, "pull_back")
        stages = self._replayed(times, y, h, y_next)
        k = [stage.k for stage in stages]
        y1 = ops.weighted_sum(y, h, k, self.scheme.solution)
        compare_implicit_end(ops, compare, y, y_next, y1, k, self._tolerance)
        pulled: dict[int, Tensor] = {}  # v_i of the stages whose slope depends on y
        for group in reversed(self.scheme.groups):
            r = [cotangent_of_slope(ops, self.scheme.a, i, h, outputs, pulled, inside) for i in group.stages]
            if all(x is None for x in r):
                continue
            of_group = [stages[i] for i in group.stages]
            cotangents = [torch.zeros_like(ops.like) if x is None else x for x in r]
            grad_k = transposed_solution(ops, self._jacobian.is_exact, group, h, of_group, cotangents)
            found = {
                i: own_result(f.pull_back, stage.y, stage.slope, grad)
                for i, stage, grad in zip(group.stages, of_group, grad_k, strict=True)
                if stage.slope.requires_grad
            }
            v = {i: ops.admit(x, PULLED) for i, x in found.items() if x is not None}
            if group.a is not None:
                by_equations = zip(group.stages, pulled_states(ops, group, h, cotangents, grad_k), strict=True)
                v = {i: x for i, x in by_equations if i in v}
            pulled |= v
        return cotangent_of_start(ops, outputs, pulled.values(), inside)

    def accept(self, y: Tensor, h: Number, trial: Trial) -> Tensor | None:
        if self._tolerance is not None:
            self._before.keep(h, trial.k)
        return super().accept(y, h, trial)

    def accept_rows(self, accepted: Mask, h: Tensor, trial: Trial) -> None:
        self._before.keep_rows(accepted, h, trial.k)

    def forget_jacobian(self) -> None:
        self._newton.forget()

    def jacobian_norm(self, scale: Tensor) -> float:
        """The norm of the Jacobian that Newton's method has used last, for states in units of ``scale``."""
        known = self._newton.linearisation
        return math.inf if known is None else self._jacobian.norm(known, scale)

    def repeat(
        self, times: Sequence[Number], y: Tensor, h: Number, k_before: Tensor | None, y_next: Tensor | None
    ) -> Trial:
        # f(y) in place of k_before would multiply errors of the iterations, and their derivatives, by the stiffness.
        return self.step(times, y, h, k_before, y_next=y_next)

    def repeated_end(self, compare: Compare, y: Tensor, y_next: Tensor, trial: Trial) -> Tensor:
        return repeated_implicit_end(self._ops, compare, y, y_next, trial.y1, trial.k, self._tolerance)

    def _first_slope(self, t: Sequence[Tensor], y: Tensor) -> Tensor:
        """The slope at the start of the step: the first stage, or else a value from which Newton's method starts."""
        if self.scheme.starts_explicitly:
            return self._f(t[0], y)
        with torch.no_grad():
            return self._f(t[-1], y.detach())

    def _base(self, i: int, y: Tensor, h: Number, k: Sequence[Tensor]) -> Tensor:
        """The state of stage i without the slopes that are not yet in ``k``."""
        known = [(j, w) for j, w in enumerate(self.scheme.a[i][: len(k)]) if w != 0]
        return self._sum(y, h, k, known) if known else y

    def _sum(self, y: Tensor | None, h: Number, k: Sequence[Tensor], weights: Sequence[tuple[int, float]]) -> Tensor:
        return self._ops.weighted_sum(y, h, [k[j] for j, _ in weights], tuple(w for _, w in weights))

    def _solved(
        self,
        group: Group,
        t: Sequence[Tensor],
        y: Tensor,
        h: Number,
        k: Sequence[Tensor],
        first: Tensor,
        known_states: dict[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """The slopes of a group of stages, without a graph; ``_newton`` tells the rows that failed.

        The iterations start from the step before, or from earlier slopes of this step (``Group.starts``): where the
        error is controlled, these are near. Large fixed steps start from the state, since slopes may lead to another
        solution of the equations; ``first``, the slope at the start of the step, then saves their first evaluations of
        func. A replay starts from the polynomial through ``known_states``, the end of the step among them: see
        ``Group.predictors``.
        """
        stages, newton = group.stages, self._newton
        assert group.a is not None
        if y.numel() == 0:
            return [torch.zeros_like(y)] * len(stages)
        with torch.no_grad():
            known = [x.detach() for x in k]
            base = [self._base(i, y.detach(), h, known) for i in stages]
            at = t[stages.start : stages.stop]
            if known_states is not None:
                start = [predicted(self._ops, p, known_states) - x for p, x in zip(group.predictors, base, strict=True)]
                found = newton.solve(group, at, base, start)
            elif known and self._tolerance is not None:
                start = [self._sum(None, h, known, weights) for weights in group.starts]
                found = newton.solve(group, at, base, self._before.starts(group, h, start))
            else:
                start = [y.detach() - x for x in base]
                found = newton.solve(group, at, base, start, first.detach())
        if self._repeats and is_any(newton.failed):
            raise ReplayError(f"the backward pass did not repeat the forward pass: {newton.failures().popitem()[1]}")
        return found

    def _with_graph(
        self, group: Group, t: Sequence[Tensor], y: Tensor, h: Number, k: Sequence[Tensor], found: Sequence[Tensor]
    ) -> list[Tensor]:
        """The slopes ``found`` with an autograd graph, by corrections k + K⁻¹·(f(stage) - k) with a constant K.

        After n corrections the derivatives are those of the solution of the stage equations up to order n.
        """
        ops, before = self._ops, group.stages.start
        assert group.a is not None
        slopes, system = list(found), None
        for _ in range(_CORRECTIONS):
            states = [self._base(i, y, h, [*k[:before], *slopes]) for i in group.stages]
            states = [x if x.requires_grad else x.detach().requires_grad_() for x in states]
            values = [self._f(t[i], x) for i, x in zip(group.stages, states, strict=True)]
            if system is None:
                at = self._linearised([t[i] for i in group.stages], states, values)
                system = self._jacobian.system(at, group.a, constant(h))
            change = Solution.apply(system, False, *(new - old for new, old in zip(values, slopes, strict=True)))
            slopes = [ops.admit(old + d) for old, d in zip(slopes, change, strict=True)]
        return slopes

    def _replayed(self, times: Sequence[Number], y: Tensor, h: Number, y_next: Tensor | None) -> list[ReplayedStage]:
        """The stages of a step from ``y``, solved to rounding, with the graphs of their slopes and their systems.

        The system of a group serves the iterations of the next one. Steps are replayed from last to first, so that the
        Jacobian of the first group is the nearest one to the step that is replayed next.
        """
        t = self._ops.scalars(times)
        stages: list[ReplayedStage] = []
        nearest: Any = None
        y = y.detach()
        states = None if y_next is None else {-1: y, len(self.scheme.a): y_next}
        first = None if self.scheme.starts_explicitly else self._first_slope(t, y)
        self._newton.begin_step(times[0], t[0], y, h)
        for group in self.scheme.groups:
            k = [stage.k for stage in stages]
            if group.a is not None:
                k += self._solved(group, t, y, h, k, k[0] if first is None else first, states)
            for i in group.stages:
                state = self._base(i, y, h, k).detach().requires_grad_()
                slope = self._f(t[i], state)
                stages.append(ReplayedStage(t[i], state, slope, slope.detach() if group.a is None else k[i]))
                if states is not None:
                    states[i] = state.detach()
            if group.a is not None:
                at = self._linearise(group, h, stages[group.stages.start :])
                nearest = at[0] if nearest is None else nearest
        if self._jacobian.outlives_graph and nearest is not None:
            self._newton.adopt_jacobian(nearest)
        return stages

    def _linearise(self, group: Group, h: Number, stages: Sequence[ReplayedStage]) -> list[Any]:
        """Gives the stages of a group their system; returns their Jacobians."""
        assert group.a is not None
        at = self._linearised(*([getattr(stage, name) for stage in stages] for name in ("t", "y", "slope")))
        system = self._jacobian.system(at, group.a, h)
        for stage in stages:
            stage.system = system
        if self._jacobian.outlives_graph:
            self._newton.adopt(group, system)
        return at

    def _linearised(self, t: Sequence[Tensor], states: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Any]:
        return [self._jacobian.of_graph(*x) for x in zip(t, states, slopes, strict=True)]
