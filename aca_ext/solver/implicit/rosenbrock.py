"""One step of a Rosenbrock method and its transpose: linear systems with the Jacobian at the start of the step.

With J and ∂f/∂t at (t, y), the slopes k_i = u_i/h of a step satisfy

    (I - h·γ·J)·k_i = γ·(f(t + c_i·h, y + h·Σ_j a_ij·k_j) + Σ_j coupling_ij·k_j + h·d_i·∂f/∂t)

The slopes depend on the Jacobian, so the transpose of a step differentiates products with it, (∂f/∂y)·k_i + d_i·∂f/∂t.

With ``RowOperations``, where each sample has a step size of its own, each has a system of its own.

Source: Hairer & Wanner, Solving ODEs II, IV.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from aca_ext.kernels.extension import own_result
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.numerics.implicit import RosenbrockTableau
from aca_ext.solver.implicit.rows import constant, count, in_dtype_of, of_tensor
from aca_ext.solver.implicit.systems import BlockSystem, Rowwise, Solution, System, recording, units
from aca_ext.solver.one_step import OneStepMethod
from aca_ext.solver.runge_kutta import PULLED, Trial
from aca_ext.solver.stats import BatchStats, Stats
from aca_ext.solver.transposed_step import (
    Compare,
    Inside,
    compare_implicit_end,
    cotangent_of_start,
    repeated_implicit_end,
)

_CORRECTIONS = 2  # as in ``step``
_NESTED: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}


@dataclass(frozen=True, eq=False)  # compared by identity, as tableaus are
class RosenbrockScheme:
    """A Rosenbrock tableau as floats."""

    tableau: RosenbrockTableau
    gamma: float
    c: tuple[float, ...]
    d: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    coupling: tuple[tuple[float, ...], ...]
    solution: tuple[float, ...]
    error: tuple[float, ...] | None
    error_last: float = 0.0
    fsal: bool = False
    starts_explicitly: bool = False


@lru_cache(maxsize=64)
def rosenbrock_scheme_of(tableau: RosenbrockTableau, estimate_error: bool) -> RosenbrockScheme:
    error = tableau.error if estimate_error else None
    return RosenbrockScheme(
        tableau=tableau,
        gamma=float(tableau.gamma),
        c=tuple(float(x) for x in tableau.c),
        d=tuple(float(x) for x in tableau.d),
        a=tuple(tuple(float(x) for x in row) for row in tableau.a),
        coupling=tuple(tuple(float(x) for x in row) for row in tableau.coupling),
        solution=tuple(float(x) for x in tableau.b),
        error=None if error is None else tuple(float(x) for x in error),
    )


class RosenbrockMethod(OneStepMethod):
    """A Rosenbrock method, bound to f and the operations of a solve; see ``solver.method.Method``."""

    def __init__(self, f: Any, ops: TorchOperations, scheme: RosenbrockScheme, counts: Stats | BatchStats) -> None:
        self.scheme: RosenbrockScheme = scheme
        self._f, self._ops, self._counts = f, ops, counts
        self._rows = Rowwise()

    def step(
        self, times: Sequence[Number], y: Tensor, h: Number, k_first: Tensor | None = None, out: Tensor | None = None
    ) -> Trial:
        """Advances ``y`` by h, as ``runge_kutta.step`` does; ``k_first`` is not used."""
        scheme, ops = self.scheme, self._ops
        t = ops.scalars(times)
        with torch.no_grad():
            k, system = self._solved(self._start(t[0], y), t, constant(h))
        if torch.is_grad_enabled():
            k = self._with_graph(t, y, h, k, system)
        if scheme.error is None:
            return Trial(ops.weighted_sum(y, h, k, scheme.solution, out), k, None)
        y1, error = ops.solution_and_error(y, h, k, scheme.solution, scheme.error, out)
        return Trial(y1, k, error)

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
        """Replays a step from ``y`` and returns the cotangent of ``y``, as ``runge_kutta.step_vjp`` does."""
        scheme, ops, f = self.scheme, self._ops, self._f
        t = ops.scalars(times)
        start = self._start(t[0], y)
        stages: list[tuple[Tensor, Tensor]] = []
        k, system = self._solved(start, t, h, stages)
        compare_implicit_end(ops, compare, y, y_next, ops.weighted_sum(y, h, k, scheme.solution), k)
        pulled: dict[int, Tensor] = {}  # v_i of the stages after the first whose slope depends on y
        cotangents: dict[int, Tensor] = {}  # of the right-hand sides
        for i in reversed(range(len(k))):
            terms = [(w[i], g) for w, g in outputs if w[i] != 0]
            terms += [] if inside is None else [(1.0, inside[1][i])]
            terms += [(scheme.a[j][i], v) for j, v in pulled.items() if scheme.a[j][i] != 0]
            coupled = [(scheme.coupling[j][i], m) for j, m in cotangents.items() if scheme.coupling[j][i] != 0]
            if not terms and not coupled:
                continue
            total = torch.zeros_like(ops.like)
            if terms:
                total = ops.weighted_sum(None, h, [x for _, x in terms], tuple(w for w, _ in terms))
            if coupled:
                total = ops.weighted_sum(total, 1.0, [x for _, x in coupled], tuple(w for w, _ in coupled))
            cotangents[i] = ops.admit(scheme.gamma * system.solve([total], transposed=True)[0])
            y_i, slope = stages[i]
            if i > 0 and slope.requires_grad:
                v = own_result(f.pull_back, y_i, slope, cotangents[i])
                if v is not None:
                    pulled[i] = ops.admit(v, PULLED)
        at_start = self._pulled_through_start(start, h, k, cotangents)
        return cotangent_of_start(ops, outputs, [*pulled.values(), *([] if at_start is None else [at_start])], inside)

    def repeated_end(self, compare: Compare, y: Tensor, y_next: Tensor, trial: Trial) -> Tensor:
        return repeated_implicit_end(self._ops, compare, y, y_next, trial.y1, trial.k)

    def _start(self, t: Tensor, y: Tensor, is_leaf: bool = True) -> _Start:
        """f at the start of a step, with a graph to the state and the time."""
        n = self._ops.n_rows
        with recording():
            joint = torch.cat([y.reshape(n, -1), t.reshape(n, 1)], dim=1)
            joint = joint.detach().requires_grad_() if is_leaf or not joint.requires_grad else joint
            state = self._ops.admit(joint[:, :-1].reshape(y.shape))
            return _Start(joint, self._f(joint[:, -1].reshape(t.shape), state))

    def _solved(
        self, start: _Start, t: Sequence[Tensor], h: Number, stages: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[list[Tensor], System]:
        """The slopes of a step without a graph; ``stages`` receives the states and values of f with their graphs."""
        scheme, ops = self.scheme, self._ops
        derivative = self._derivative(start)
        n_stepping = count(of_tensor(h) != 0)
        self._counts.n_jacobians += n_stepping
        self._counts.n_factorizations += n_stepping
        jacobians, a = [derivative[..., :-1]], [[scheme.gamma]]
        system = ops.small_system(jacobians, a, h) or BlockSystem(jacobians, a, h)
        of_time = ops.weighted_sum(None, h, [ops.admit(derivative[..., -1].reshape(start.k.shape))], (1.0,))
        y = ops.admit(start.joint.detach()[:, :-1].reshape(start.k.shape))
        k: list[Tensor] = []
        for i in range(len(scheme.c)):
            if i == 0:
                y_i, value = y, start.k
            else:
                y_i = ops.weighted_sum(y, h, k, scheme.a[i])
                y_i = y_i if stages is None else y_i.requires_grad_()
                value = self._f(t[i], y_i)
            if stages is not None:
                stages.append((y_i, value))
            right = ops.weighted_sum(value.detach(), 1.0, [*k, of_time], (*scheme.coupling[i], scheme.d[i]))
            k.append(ops.admit(scheme.gamma * system.solve([right])[0]))
        return k, system

    def _derivative(self, start: _Start) -> Tensor:
        """The matrices of ∂f/∂(y, t), one for each row of the state, (rows, m, m + 1)."""
        (n, m), k = start.joint.shape, start.k
        if not k.requires_grad:
            return torch.zeros(n, m - 1, m, dtype=k.dtype, device=k.device)
        return self._rows(start.joint, k, units(m - 1, n, k)).transpose(0, 1)

    def _with_graph(
        self, t: Sequence[Tensor], y: Tensor, h: Number, found: Sequence[Tensor], system: System
    ) -> list[Tensor]:
        """The slopes ``found`` with an autograd graph, by corrections with a constant matrix, as in ``step``."""
        scheme, ops = self.scheme, self._ops
        start = self._start(t[0], y, is_leaf=False)
        slopes = list(found)
        for _ in range(_CORRECTIONS):
            corrected: list[Tensor] = []
            for i, k_i in enumerate(slopes):
                value = start.k if i == 0 else self._f(t[i], ops.weighted_sum(y, h, corrected, scheme.a[i]))
                right = value + in_dtype_of(value, h) * start.product(self._direction(k_i, scheme.d[i]))
                for weight, k_j in zip(scheme.coupling[i], corrected, strict=True):
                    right = right + weight * k_j
                (change,) = Solution.apply(system, False, scheme.gamma * right - k_i)
                corrected.append(ops.admit(k_i + change))
            slopes = corrected
        return slopes

    def _direction(self, k: Tensor, d: float) -> Tensor:
        """The slope ``k`` with a change ``d`` of the time, for each row."""
        n = self._ops.n_rows
        return torch.cat([k.reshape(n, -1), k.new_full((n, 1), d)], dim=1)

    def _pulled_through_start(
        self, start: _Start, h: Number, k: Sequence[Tensor], cotangents: dict[int, Tensor]
    ) -> Tensor | None:
        """The cotangent of y through f and its derivatives at the start of the step."""
        if not start.k.requires_grad or not cotangents:
            return None
        total = torch.zeros((), dtype=start.k.dtype, device=start.k.device)
        size = in_dtype_of(start.k, h.view(-1, 1) if isinstance(h, Tensor) else h)
        for i, m in cotangents.items():
            (row,) = torch.autograd.grad(start.k, start.joint, m, **_NESTED)
            total = total + (size * row * self._direction(k[i], self.scheme.d[i])).sum()
            total = total + (start.k * m).sum() if i == 0 else total
        if not total.requires_grad:
            return None
        v = self._f.pull_back(start.joint, total, torch.ones_like(total))
        return None if v is None else self._ops.admit(v[:, :-1].reshape(start.k.shape), PULLED)


@dataclass
class _Start:
    """f at the start of a step: state and time in one matrix, a row for each row of the state, and the slope there."""

    joint: Tensor
    k: Tensor

    def product(self, direction: Tensor) -> Tensor:
        """∂f/∂(y, t) times ``direction``, differentiable, by two nested backward passes."""
        cotangent, row = self._pulled
        if not row.requires_grad:
            return torch.zeros_like(self.k)
        return torch.autograd.grad(row, cotangent, direction, **_NESTED)[0]

    @cached_property
    def _pulled(self) -> tuple[Tensor, Tensor]:
        """A cotangent of the slope, and its product with ∂f/∂(y, t): the inner pass, which all products share.

        The cotangent is zero, in a graph that leads to ``k``. A backward pass searches nothing behind its inputs; from
        a cotangent without a graph, it would search that of ``joint``, back to the start of the solve.
        """
        if not self.k.requires_grad:
            return torch.zeros_like(self.k), torch.zeros_like(self.joint)
        cotangent = self.k.masked_fill(torch.ones_like(self.k, dtype=torch.bool), 0.0)
        return cotangent, torch.autograd.grad(self.k, self.joint, cotangent, **_NESTED)[0]
