"""Newton's method for the stages of an implicit step.

A group of stages with slopes k_i has the unknowns z_i = h·Σ_j a_ij·k_j, the stage states without their base:

    z_i = h·Σ_j a_ij·f(t_j, base_j + z_j)        K·Δz = h·Σ_j a_ij·f(t_j, base_j + z_j) - z_i

The slopes follow from z. Evaluating f at the solution instead would multiply the remaining error of z by the stiffness.
The matrix K is kept over stages and steps as long as the iterations converge fast (simplified Newton iterations).

Source: Hairer & Wanner, Solving ODEs II, IV.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.solver.implicit.scheme import Group
from aca_ext.solver.implicit.systems import Jacobian, System
from aca_ext.solver.stats import Stats
from aca_ext.vector_field.slope_function import SlopeFunction

_MOST_ITERATIONS = 10
_MOST_EXACT_ITERATIONS = 60
_FAST = 0.05  # contraction above which the Jacobian is evaluated again for the next step
_TOLERANCES = "times the tolerance"
# Lowest rate that counts: the first iterations converge faster than the components that an old Jacobian leaves.
_LOWEST_RATE = 0.1
_LARGEST_AT_FIRST = 3.0  # contraction of the second change that may still be one of a convergent iteration
_SLOW = 0.1  # contraction above which iterations to rounding take a new Jacobian


class NewtonError(Exception):
    """Iterations that did not converge; ``residual`` is the size of the last change of a stage, in ``unit``."""

    def __init__(self, residual: float, unit: str) -> None:
        super().__init__()
        self.residual, self.unit = residual, unit


class Newton:
    """The iterations of a solve, with the matrix that they share.

    Args:
        tolerance: the error of a stage in units of the tolerance of the solve; None iterates until rounding.
    """

    def __init__(
        self, f: SlopeFunction, ops: TorchOperations, jacobian: Jacobian, tolerance: float | None, counts: Stats
    ) -> None:
        self._f, self._ops, self._jacobian, self._counts = f, ops, jacobian, counts
        self._tolerance = tolerance
        self._linearisation: Any = None
        self._is_current = False  # the linearisation belongs to the start of this step
        self._is_slow = False
        self._system: System | None = None
        self._key: Any = None  # of the system: the group and h
        self._rate = 1.0
        self._start: tuple[Tensor, Tensor] | None = None

    @property
    def linearisation(self) -> Any:
        """The Jacobian in use; None if the next step evaluates one."""
        return self._linearisation

    def forget(self) -> None:
        """Lets the next step evaluate a Jacobian: the one in use is from a part of the solve long ago."""
        self._linearisation, self._key = None, None

    def begin_step(self, t: Tensor, y: Tensor) -> None:
        """Tells where the next step starts; a trial that repeats the step from there shares its Jacobian."""
        if self._start is None or self._start[1] is not y:
            self._is_current = False
        self._start = t, y
        if self._is_slow and not self._is_current:
            self._linearisation = None

    def use(self, linearisation: Any) -> None:
        """Replaces the Jacobian by one that the caller has evaluated."""
        self._linearisation, self._key = linearisation, None

    def solve(
        self, group: Group, t: Sequence[Tensor], h: float, base: Sequence[Tensor], start: list[Tensor]
    ) -> list[Tensor]:
        """The slopes of a group of stages at the times ``t``, iterated from z = ``start``.

        Raises:
            NewtonError: the iterations do not converge.
        """
        assert group.a is not None
        if self._linearisation is None:
            self._linearise_start()
        try:
            z = (self._to_rounding if self._tolerance is None else self._to_tolerance)(group, t, h, base, start)
        except NewtonError:
            if self._is_current or self._tolerance is None:
                raise
            self._linearise_start()
            z = self._to_tolerance(group, t, h, base, start)
        return [self._ops.admit(k) for k in combined(1 / h, group.inverse, z)]

    def filtered(self, group: Group, h: float, error: Tensor) -> Tensor:
        """(I - h·a·J)⁻¹·error, an estimate that does not grow with the stiffness, for a group of one stage."""
        return self._ops.admit(self._system_for(group, h).solve([error])[0])

    def _to_tolerance(
        self, group: Group, t: Sequence[Tensor], h: float, base: Sequence[Tensor], z: list[Tensor]
    ) -> list[Tensor]:
        """Iterates until the error, estimated from the rate of convergence, is within the tolerance."""
        assert self._tolerance is not None
        assert self._start is not None
        y, ops = self._start[1], self._ops
        # Below this, changes are rounding.
        rounding = 10 * torch.finfo(y.dtype).eps * ops.error_norm(y, None, 0.0, y, y)
        wanted, rate = max(self._tolerance, rounding), self._rate
        sizes: list[float] = []
        for n in range(1, _MOST_ITERATIONS + 1):
            z, change, states = self._iteration(group, t, h, base, z)
            sizes.append(max(float(ops.error_norm(d, None, 0.0, y, s)) for d, s in zip(change, states, strict=True)))
            size = sizes[-1]
            if not size < math.inf:
                break
            if n > 1:
                # Over two iterations if possible: the first change may be small in the components that converge last.
                contraction = size / sizes[-2] if n == 2 else math.sqrt(size / sizes[-3])
                if contraction >= (_LARGEST_AT_FIRST if n == 2 else 1):
                    break
                rate = max(_LOWEST_RATE, contraction / (1 - contraction)) if contraction < 1 else math.inf
                if n > 2 and rate * size * contraction ** (_MOST_ITERATIONS - n) > wanted:
                    break
                self._is_slow = contraction > _FAST
            if size == 0 or rate * size <= wanted:
                self._rate = rate if self._rate == 1.0 else max(rate, self._rate)
                return z
        raise NewtonError(sizes[-1], _TOLERANCES)

    def _to_rounding(
        self,
        group: Group,
        t: Sequence[Tensor],
        h: float,
        base: Sequence[Tensor],
        z: list[Tensor],
        always_anew: bool = False,
    ) -> list[Tensor]:
        """Iterates until rounding stops the convergence.

        If convergence is slow, it begins again with a new Jacobian in every iteration (``always_anew``). From the
        iterate at hand, the iterations might find another solution of the equations.
        """
        start = z
        if always_anew:
            self._linearise_iterate(group, t, h, base, z)
        eps = torch.finfo(base[0].dtype).eps
        before = largest = math.inf
        for _ in range(_MOST_EXACT_ITERATIONS):
            z, change, states = self._iteration(group, t, h, base, z)
            size = max(_largest_ratio(d, s) for d, s in zip(change, states, strict=True))
            largest = max(float(d.abs().max() / (s + d).abs().max()) for d, s in zip(change, states, strict=True))
            if not size < math.inf and always_anew:
                break
            if size <= 4 * eps or (size > _SLOW * before and largest <= 2**12 * eps):
                return z
            if always_anew:
                self._linearise_iterate(group, t, h, base, z)
            elif not size <= _SLOW * before:
                return self._to_rounding(group, t, h, base, start, always_anew=True)
            before = size
        raise NewtonError(largest, "of the state")

    def _iteration(
        self, group: Group, t: Sequence[Tensor], h: float, base: Sequence[Tensor], z: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The next z, its change, and the states at which f was evaluated."""
        assert group.a is not None
        self._counts.n_newton_iterations += 1
        states = [self._ops.admit(b + d) for b, d in zip(base, z, strict=True)]
        slopes = [self._f(*at) for at in zip(t, states, strict=True)]
        residual = [new - old for new, old in zip(combined(h, group.a, slopes), z, strict=True)]
        change = [self._ops.admit(d) for d in self._system_for(group, h).solve(residual)]
        return [old + d for old, d in zip(z, change, strict=True)], change, states

    def _linearise_iterate(
        self, group: Group, t: Sequence[Tensor], h: float, base: Sequence[Tensor], z: Sequence[Tensor]
    ) -> None:
        """Replaces the matrix by that at the iterate, with a Jacobian of its own for each stage."""
        states = [self._ops.admit(b + d) for b, d in zip(base, z, strict=True)]
        self._factorise(group, h, [self._linearise(*at) for at in zip(t, states, strict=True)])
        self._linearisation, self._is_current = None, False

    def _system_for(self, group: Group, h: float) -> System:
        if self._system is None or self._key != (group.a, h):
            self._factorise(group, h, [self._linearisation] * len(group.stages))
        assert self._system is not None
        return self._system

    def _factorise(self, group: Group, h: float, linearisations: Sequence[Any]) -> None:
        assert group.a is not None
        self._counts.n_factorizations += 1
        self._system = self._jacobian.system(linearisations, group.a, h)
        self._key = group.a, h

    def _linearise_start(self) -> None:
        assert self._start is not None
        self._linearisation = self._linearise(self._start[0], self._start[1].detach())
        self._is_current, self._is_slow, self._key, self._rate = True, False, None, 1.0

    def _linearise(self, t: Tensor, y: Tensor) -> Any:
        self._counts.n_jacobians += 1
        return self._jacobian.at(t, y)


def combined(h: float, rows: Sequence[Sequence[float]], x: Sequence[Tensor]) -> list[Tensor]:
    """h·Σ_j rows[i][j]·x[j] for each i."""
    sums: list[Tensor] = []
    for row in rows:
        first, *others = [(h * w) * x_j for w, x_j in zip(row, x, strict=True) if w != 0] or [torch.zeros_like(x[0])]
        for other in others:
            first = first + other
        sums.append(first)
    return sums


def _largest_ratio(change: Tensor, state: Tensor) -> float:
    """The largest change of an element relative to that element; elements below rounding count as rounding."""
    after = state + change
    size = torch.maximum(state.abs(), after.abs())
    lowest = torch.finfo(state.dtype).eps * size.max()
    ratio = (change.abs() / torch.maximum(size, lowest)).masked_fill_(change == 0, 0.0)
    return float(ratio.max()) if torch.isfinite(after).all() else math.inf
