"""Newton's method for the stages of an implicit step.

A group of stages with slopes k_i has the unknowns z_i = h·Σ_j a_ij·k_j, the stage states without their base:

    z_i = h·Σ_j a_ij·f(t_j, base_j + z_j)        K·Δz = h·Σ_j a_ij·f(t_j, base_j + z_j) - z_i

The slopes follow from z. Evaluating f at the solution instead would multiply the remaining error of z by the stiffness.
The matrix K is kept over stages and steps as long as the iterations converge fast (simplified Newton iterations).

Independent samples have equations of their own: each is a row with its step size, matrix, iterations and failures. The
state of any other solve is one row.

Source: Hairer & Wanner, Solving ODEs II, IV.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.solver.failures import unsolved
from aca_ext.solver.implicit.convergence import Convergence
from aca_ext.solver.implicit.rows import (
    Mask,
    are_finite,
    chosen,
    combined,
    count,
    inverse,
    is_any,
    larger,
    of_tensor,
    other_than,
    spread,
    where,
)
from aca_ext.solver.implicit.scheme import Group, Matrix
from aca_ext.solver.implicit.systems import Jacobian, System
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.vector_field.slope_function import SlopeFunction

_MOST_EXACT_ITERATIONS = 60
_SLOW = 0.1  # contraction above which iterations to rounding take a new Jacobian
_ROUNDING = 4  # error of iterations to rounding, in units of it


class Newton:
    """The iterations of a solve, with the matrices that they share.

    Args:
        tolerance: the error of a stage in units of the tolerance of the solve; None iterates until rounding.

    Attributes:
        live: rows that step and whose iterations have converged so far in this step.
        failed: rows whose iterations have not.
    """

    def __init__(
        self,
        f: SlopeFunction,
        ops: TorchOperations,
        jacobian: Jacobian,
        tolerance: float | None,
        counts: Stats | BatchStats,
    ) -> None:
        self._f, self._ops, self._jacobian, self._counts = f, ops, jacobian, counts
        self._tolerance = tolerance
        always, never, unknown = spread(True, ops), spread(False, ops), spread(math.nan, ops)
        self.live, self.failed = always, never
        self._residual = unknown  # the last changes of the rows that failed
        self._linearisation: Any = None
        self._lacks_jacobian = always
        self._is_current = never  # the linearisation belongs to the start of this step
        self._is_slow = never
        self._rate = spread(1.0, ops)
        self._system: System | None = None
        self._is_stale = always  # the system belongs to another group, step size or Jacobian
        self._a: Any = None  # of the system
        self._sizes = self._start_times = unknown  # of the steps

    @property
    def linearisation(self) -> Any:
        """The Jacobian in use; None if the next step evaluates one."""
        return None if is_any(self._lacks_jacobian) else self._linearisation

    def adopt(self, group: Group, system: System) -> None:
        """Lets the next stages iterate with a system that was made at the solution of the last ones."""
        self._system, self._a, self._is_stale = system, group.a, spread(False, self._ops)

    def adopt_jacobian(self, linearisation: Any) -> None:
        """Lets the next step iterate with a Jacobian that was made elsewhere."""
        never = spread(False, self._ops)
        self._linearisation, self._lacks_jacobian, self._is_slow = linearisation, never, never
        self._is_current, self._is_stale = never, spread(True, self._ops)

    def forget(self) -> None:
        """Lets the next step evaluate Jacobians: those in use are from a part of the solve long ago."""
        self._lacks_jacobian = spread(True, self._ops)

    def begin_step(self, start_time: Any, t: Tensor, y: Tensor, h: Number) -> None:
        """Sets the start and the size of the next step; a trial that repeats the last step shares its Jacobian."""
        start_times, sizes = of_tensor(start_time), of_tensor(h)
        self._is_current = self._is_current & (start_times == self._start_times)
        self._lacks_jacobian = self._lacks_jacobian | (self._is_slow & other_than(self._is_current))
        self._is_stale = self._is_stale | (sizes != self._sizes)
        self._start_times, self._sizes, self._start, self._h = start_times, sizes, (t, y), h
        self.live, self.failed = sizes != 0, spread(False, self._ops)

    def solve(
        self,
        group: Group,
        t: Sequence[Tensor],
        base: Sequence[Tensor],
        start: list[Tensor],
        slope: Tensor | None = None,
    ) -> list[Tensor]:
        """The slopes of a group of stages at the times ``t``, iterated from z = ``start``.

        ``slope`` stands for the slopes at ``start``, in a first iteration that evaluates nothing. It is those slopes if
        ``start`` is the state before the step and func does not depend on time.

        Rows whose iterations do not converge become ``failed``, with slopes that mean nothing. Rows at rest, with
        h = 0, get zero.
        """
        rows = self.live
        self._linearise_start(rows & self._lacks_jacobian)
        how = group, t, base
        z = start if slope is None else self._ahead(rows, group, start, slope)
        if self._tolerance is None:
            z, solved = self._to_rounding(rows, *how, z)
            again = rows & other_than(solved)
            if is_any(again):
                z, others = self._to_rounding(again, *how, chosen(again, start, z), always_anew=True)
                solved = solved | others
        else:
            z, solved = self._to_tolerance(rows, *how, z)
            again = rows & other_than(solved | self._is_current)
            if is_any(again):
                self._linearise_start(again)
                z, others = self._to_tolerance(again, *how, chosen(again, start, z))
                solved = solved | others
        self.live, self.failed = solved, self.failed | (rows & other_than(solved))
        return [self._ops.admit(k) for k in combined(inverse(self._h), group.inverse, z)]

    def filtered(self, a: Matrix, error: Tensor) -> Tensor:
        """(I - h·a·J)⁻¹·error, an estimate that does not grow with the stiffness; ``a`` has one element."""
        system = self._system
        if system is None or self._a != a or is_any(self._is_stale & self.live):
            self._counts.n_factorizations += count(self.live)
            system = self._jacobian.system([self._linearisation], a, self._h)
        return self._ops.admit(system.solve([error])[0])

    def _ahead(self, rows: Mask, group: Group, z: list[Tensor], slope: Tensor) -> list[Tensor]:
        """The iterate after ``z`` if all slopes there are ``slope``; ``z`` itself in rows where that is not finite."""
        ahead, _ = self._system_for(group, rows).correct([slope] * len(z), z)
        ahead = [self._ops.admit(x) for x in ahead]
        return chosen(are_finite(ahead, self._ops), ahead, z)

    def failures(self) -> dict[int, str]:
        """For each row that failed in this step a message."""
        unit = "of the state" if self._tolerance is None else "times the tolerance"
        sizes, residual = np.atleast_1d(self._sizes), np.atleast_1d(self._residual)
        return {row: unsolved(sizes[row], residual[row], unit) for row in np.flatnonzero(self.failed).tolist()}

    def _to_tolerance(
        self, rows: Mask, group: Group, t: Sequence[Tensor], base: Sequence[Tensor], z: list[Tensor]
    ) -> tuple[list[Tensor], Mask]:
        """Iterates until the error, estimated from the rate of convergence, is within the tolerance."""
        assert self._tolerance is not None
        y, ops = self._start[1], self._ops
        # Below this, changes are rounding.
        rounding = 10 * torch.finfo(y.dtype).eps * ops.error_norm(y, None, 0.0, y, y)
        course = Convergence(rows, larger(self._tolerance, rounding), self._rate, self._is_slow)
        while is_any(course.active):
            active = course.active
            new, size = self._iteration(active, group, t, base, z, y)
            self._residual = where(active, size, self._residual)
            z = chosen(course.judge(size), new, z)
        self._rate, self._is_slow = course.rate, course.is_slow
        return z, course.solved

    def _to_rounding(
        self,
        rows: Mask,
        group: Group,
        t: Sequence[Tensor],
        base: Sequence[Tensor],
        z: list[Tensor],
        always_anew: bool = False,
    ) -> tuple[list[Tensor], Mask]:
        """Iterates until rounding stops the convergence.

        Rows that converge slowly are left, unless every iteration gets a new Jacobian (``always_anew``). They begin
        again from their start: from the iterate at hand, they might find another solution of the equations.
        """
        eps, active, solved = torch.finfo(base[0].dtype).eps, rows, rows & other_than(rows)
        before = spread(math.inf, self._ops)
        for _ in range(_MOST_EXACT_ITERATIONS):
            if not is_any(active):
                break
            if always_anew:
                self._linearise_iterate(rows, group, t, base, z)
            new, (size, largest) = self._iteration(active, group, t, base, z)
            self._residual = where(active, largest, self._residual)
            is_fast = size <= _SLOW * before
            # A fast iteration leaves at most a tenth of its change.
            is_within = (size <= _ROUNDING * eps) | (is_fast & (_SLOW * size <= _ROUNDING * eps))
            done = active & (is_within | (other_than(is_fast) & (largest <= 2**12 * eps)))
            going = active & (size < math.inf) & (done | is_fast | always_anew)
            z = chosen(going, new, z)
            solved, active, before = solved | done, going & other_than(done), size
        return z, solved

    def _iteration(
        self,
        rows: Mask,
        group: Group,
        t: Sequence[Tensor],
        base: Sequence[Tensor],
        z: list[Tensor],
        y: Tensor | None = None,
    ) -> tuple[list[Tensor], Any]:
        """The next z, and the size of its change: see ``TorchOperations.newton_iteration``."""
        self._counts.n_newton_iterations += count(rows)
        ops, system = self._ops, self._system_for(group, rows)
        found = ops.newton_iteration(system, self._f, t, base, z, y)
        if found is not None:
            return found
        states = [ops.admit(b + d) for b, d in zip(base, z, strict=True)]
        new, change = system.correct([self._f(*at) for at in zip(t, states, strict=True)], z)
        pairs = [(ops.admit(d), state) for d, state in zip(change, states, strict=True)]
        if y is not None:
            return new, reduce(larger, (ops.error_norm(d, None, 0.0, y, state) for d, state in pairs))
        sizes = [ops.relative_changes(d, state) for d, state in pairs]
        return new, tuple(reduce(larger, part) for part in zip(*sizes, strict=True))

    def _linearise_iterate(
        self, rows: Mask, group: Group, t: Sequence[Tensor], base: Sequence[Tensor], z: Sequence[Tensor]
    ) -> None:
        """Replaces the matrices by those at the iterate, with a Jacobian of its own for each stage.

        That of the start of the step no longer serves the ``rows``. All rows need their system anew afterwards.
        """
        states = [self._ops.admit(b + d) for b, d in zip(base, z, strict=True)]
        self._factorise(rows, group, [self._linearise(rows, *at) for at in zip(t, states, strict=True)])
        self._is_stale = other_than(rows)
        self._lacks_jacobian, self._is_current = self._lacks_jacobian | rows, self._is_current & other_than(rows)

    def _system_for(self, group: Group, rows: Mask) -> System:
        if self._a != group.a:
            self._is_stale = spread(True, self._ops)
        if is_any(self._is_stale & rows):
            self._factorise(self._is_stale & rows, group, [self._linearisation] * len(group.stages))
        assert self._system is not None
        return self._system

    def _factorise(self, rows: Mask, group: Group, linearisations: Sequence[Any]) -> None:
        """Makes the system of all rows, of which ``rows`` have changed."""
        assert group.a is not None
        self._counts.n_factorizations += count(rows)
        self._system = self._jacobian.system(linearisations, group.a, self._h)
        self._a, self._is_stale = group.a, spread(False, self._ops)

    def _linearise_start(self, rows: Mask) -> None:
        """Evaluates the Jacobians of ``rows`` at the start of the step."""
        if not is_any(rows):
            return
        t, y = self._start
        found, old = self._linearise(rows, t, y.detach()), self._linearisation
        self._linearisation = found if old is None else chosen(rows, [found], [old])[0]
        self._is_current, self._lacks_jacobian = self._is_current | rows, self._lacks_jacobian & other_than(rows)
        self._is_slow, self._is_stale = self._is_slow & other_than(rows), self._is_stale | rows
        self._rate = where(rows, 1.0, self._rate)

    def _linearise(self, rows: Mask, t: Tensor, y: Tensor) -> Any:
        self._counts.n_jacobians += count(rows)
        return self._jacobian.at(t, y)
