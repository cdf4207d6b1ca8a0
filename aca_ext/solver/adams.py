"""Steps of the methods of Adams, and their transpose, side by side.

Symbols as in ``runge_kutta.py``; f_n is the slope at the start of step n. The history f_n, f_{n-1}, ... is part of what
a step starts from, so the transpose carries cotangents of these slopes from later steps to earlier ones:

    y_{n+1} = y_n + h·Σ_j w_j·f_{n-j}        grad_f_n = h·Σ_j w_j·g_{n+j+1}

The formulas are for equal steps. Until the history is long enough, and again after a change of the step size, the steps
are those of rk4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from aca_ext.errors import ConvergenceWarning
from aca_ext.kernels.extension import own_result
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.numerics.adams import MIN_ORDER, Adams, bashforth, moulton
from aca_ext.numerics.methods import METHODS
from aca_ext.problem.problem import Problem
from aca_ext.problem.tolerance import Tolerance
from aca_ext.solver.one_step import slope_at_end
from aca_ext.solver.runge_kutta import Trial, scheme_of, step
from aca_ext.solver.transposed_step import Compare
from aca_ext.user_warnings import warn_user
from aca_ext.vector_field.slope_function import ReplayFunction, SlopeFunction

_START = scheme_of(METHODS["rk4"], False)
_PULLED = "the gradient that a backward pass inside func returned"

Times = Sequence[float]  # of f_n, of the corrector and of f_{n+1}, without the last one if no output needs it


class Formula(NamedTuple):
    """The formula of one step.

    Attributes:
        n_slopes: number of slopes f_n, f_{n-1}, ... that it uses; 0 for a step of rk4.
        n_iters: number of evaluations of the corrector.
    """

    n_slopes: int
    n_iters: int


class AdamsSteps:
    """The steps of one solve, each of which continues the history of slopes of those before.

    Args:
        given: formulas to repeat; None to choose them.

    Attributes:
        slopes: the history, newest first.
        formulas: formulas of the steps so far.
    """

    compiled = memory = None

    def __init__(
        self, f: SlopeFunction, ops: TorchOperations, problem: Problem, given: Sequence[Formula] | None = None
    ) -> None:
        assert isinstance(problem.tableau, Adams)
        self._f, self._ops, self._method, self._given = f, ops, problem.tableau, given
        self.scheme = scheme_of(problem.tableau, estimate_error=False)
        self._rounding = _rounding_of_steps(problem)
        self._h = 0.0
        self._unconverged: list[float] = []  # starts of steps
        self.slopes: list[Tensor] = []
        self.formulas: list[Formula] = []

    def step(
        self, times: Times, y: Tensor, h: float, k_first: Tensor | None = None, out: Tensor | None = None
    ) -> Trial:
        """Advances ``y`` by h, as ``runge_kutta.step`` does; the trial is the next step of the solution."""
        f, ops, method = self._f, self._ops, self._method
        k = f(ops.scalars(times[:1])[0], y) if k_first is None else k_first
        self._remember(k, h)
        if self._given is not None:
            formula = self._given[len(self.formulas)]
        elif len(self.slopes) < MIN_ORDER - 1:
            formula = Formula(0, 0)
        else:
            formula = Formula(len(self.slopes), method.max_iters if method.implicit else 0)
        if formula.n_iters and self._given is None:
            formula, y1 = self._corrected(formula, times, y, h, out)
        else:
            y1 = repeated(f, ops, formula, times, y, h, self.slopes, out)
        self.formulas.append(formula)
        slopes = [k]
        if method.dense is not None:
            slopes.append(ops.weighted_sum(None, 1.0 / h, [y1, y], (1.0, -1.0)))
        if len(times) > 2:
            slopes.append(f(ops.scalars(times[2:])[0], y1))
        return Trial(y1, slopes, None)

    def accept(self, y: Tensor, h: Number, trial: Trial) -> Tensor | None:
        return slope_at_end(self.scheme, trial)

    def repeat(self, times: Times, y: Tensor, h: float, k_before: Tensor | None, y_next: Tensor | None) -> Trial:
        return self.step(times, y, h)

    def repeated_end(self, compare: Compare, y: Tensor, y_next: Tensor, trial: Trial) -> Tensor:
        compare(trial.y1, trial.k)
        return trial.y1

    def finish(self) -> None:
        """Warns of steps whose corrector did not converge."""
        if self._unconverged:
            warn_user(
                f"The corrector of {self._method.name} did not converge within max_iters = {self._method.max_iters} "
                f"evaluations in {len(self._unconverged)} of {len(self.formulas)} steps, first in the one from "
                f"t={self._unconverged[0]:.10g}. The solution may be wrong: take smaller steps, larger tolerances or "
                "more iterations.",
                ConvergenceWarning,
            )

    def _remember(self, k: Tensor, h: float) -> None:
        if abs(h - self._h) > self._rounding:
            self.slopes.clear()
        self._h = h
        self.slopes.insert(0, k)
        del self.slopes[self._method.max_order - 1 :]

    def _corrected(
        self, formula: Formula, times: Times, y: Tensor, h: float, out: Tensor | None
    ) -> tuple[Formula, Tensor]:
        """The end of an implicit step, iterated until it converges, and the formula with the iterations made."""
        increments = _increments(self._f, self._ops, times, y, h, self.slopes)
        dy, n_iters, has_converged = next(increments), 0, False
        while n_iters < formula.n_iters and not has_converged:
            before, dy = dy, next(increments)
            has_converged = _has_converged(self._ops.tolerance, before, dy)
            n_iters += 1
        if not has_converged:
            self._unconverged.append(times[0])
            self.slopes.pop()  # as torchdiffeq does: the next formula is not of higher order
        return formula._replace(n_iters=n_iters), self._ops.weighted_sum(y, 1.0, [dy], (1.0,), out)


def repeated(
    f: SlopeFunction,
    ops: TorchOperations,
    formula: Formula,
    times: Times,
    y: Tensor,
    h: float,
    slopes: Sequence[Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """The end of a step by a given formula; ``slopes`` are the history, newest first."""
    if formula.n_slopes == 0:
        inner = [times[0] + c * h for c in _START.c[1:-1]]
        return step(f, ops, _START, [times[0], *inner, times[1]], y, h, slopes[0], out).y1
    used = slopes[: formula.n_slopes]
    if formula.n_iters == 0:
        return ops.weighted_sum(y, h, used, _bashforth(formula.n_slopes), out)
    increments = _increments(f, ops, times, y, h, used)
    return ops.weighted_sum(y, 1.0, [next(islice(increments, formula.n_iters, None))], (1.0,), out)


def _increments(
    f: SlopeFunction, ops: TorchOperations, times: Times, y: Tensor, h: float, slopes: Sequence[Tensor]
) -> Iterator[Tensor]:
    """y_{n+1} - y_n, as predicted and then after each evaluation of the corrector."""
    t_next, weights = ops.scalars(times[1:2])[0], _moulton(len(slopes))
    dy = ops.weighted_sum(None, h, slopes, _bashforth(len(slopes)))
    while True:
        yield dy
        k = f(t_next, ops.weighted_sum(y, 1.0, [dy], (1.0,)))
        dy = ops.weighted_sum(None, h, [k, *slopes], weights)


def _has_converged(tolerance: Tolerance, before: Tensor, now: Tensor) -> bool:
    """torchdiffeq's criterion: the largest element, in tolerances relative to the increment and not to the state."""
    with torch.no_grad():
        scale = tolerance.atol + tolerance.rtol * torch.maximum(before.abs(), now.abs())
        return now.numel() == 0 or bool(((before - now).abs() / scale).max() < 1)


def _rounding_of_steps(problem: Problem) -> float:
    """The largest difference between two step sizes that rounding of the times explains."""
    grid = torch.tensor(problem.grid or (0.0,), dtype=torch.float64, device="cpu")
    is_single = torch.equal(grid.float().double(), grid)  # a grid_constructor may compute in float32
    of_grid = torch.finfo(torch.float32 if is_single else torch.float64).eps
    return 4 * max(problem.resolution, of_grid) * float(grid.abs().max())


@lru_cache
def _bashforth(n_slopes: int) -> tuple[float, ...]:
    return tuple(map(float, bashforth(n_slopes)))


@lru_cache
def _moulton(n_slopes: int) -> tuple[float, ...]:
    return tuple(map(float, moulton(n_slopes)))


class TransposedAdamsSteps:
    """Replays the steps of one solve, last to first, and pulls cotangents back through them.

    Args:
        formulas: those of all steps.
    """

    def __init__(self, f: ReplayFunction, ops: TorchOperations, formulas: Sequence[Formula]) -> None:
        self._f, self._ops, self._formulas = f, ops, formulas
        # Parts of the cotangents of slopes: step n, weights of f_n, f_{n-1}, ..., and the tensor that they multiply.
        self._parts: list[tuple[int, Sequence[float], Tensor]] = []

    def pull_back(
        self,
        n: int,
        times: Times,
        y: Tensor,
        h: float,
        earlier: Sequence[Tensor],
        outputs: Sequence[tuple[Sequence[float], Tensor]],
        compare: Compare,
    ) -> Tensor:
        """Replays step n from ``y`` and returns the cotangent of ``y``.

        Args:
            earlier: the slopes f_{n-1}, f_{n-2}, ...
            outputs: pairs (w, g), with g the cotangent of y + h·(w_0·f_n + w_2·f_{n+1}) + w_1·(y_{n+1} - y).
            compare: receives the end of the step and its slopes.
        """
        ops, formula = self._ops, self._formulas[n]
        made: list[tuple[Tensor, Tensor]] = []  # every evaluation: its state, and its slope with graph

        def f(t: Tensor, y: Tensor) -> Tensor:
            y = y.detach().requires_grad_()
            made.append((y, self._f(t, y)))
            return made[-1][1].detach()

        slopes = [f(ops.scalars(times[:1])[0], y), *earlier]
        y1 = repeated(f, ops, formula, times, y, h, slopes)
        compare(y1, [k.detach() for _, k in made])
        a = self._end(f, made, times, y1, h, outputs)
        pulled = self._start(n, made, h, a) if formula.n_slopes == 0 else self._formula(n, made, h, a)
        v = self._slope(n, made[0], [(h * w[0], g) for w, g in outputs])
        terms = [(1.0 - w[1], g) for w, g in outputs if w[1] != 1.0]
        return _sum(ops, [(1.0, x) for x in (a, *pulled, v) if x is not None] + terms)

    def _end(
        self,
        f: SlopeFunction,
        made: list[tuple[Tensor, Tensor]],
        times: Times,
        y1: Tensor,
        h: float,
        outputs: Sequence[tuple[Sequence[float], Tensor]],
    ) -> Tensor:
        """The cotangent of y_{n+1}, from the outputs and through f_{n+1} if they use it."""
        terms = [(w[1], g) for w, g in outputs if w[1] != 0]
        of_slope = [(h * w[2], g) for w, g in outputs if w[2:] and w[2] != 0]
        if of_slope:
            f(self._ops.scalars(times[2:])[0], y1)
            v = self._pull(*made.pop(), _sum(self._ops, of_slope))
            terms += [] if v is None else [(1.0, v)]
        return _sum(self._ops, terms)

    def _start(self, n: int, made: Sequence[tuple[Tensor, Tensor]], h: float, a: Tensor) -> list[Tensor]:
        """Cotangents of y from all slopes of a step of rk4 but the first."""
        b, rows = _START.solution, _START.a
        pulled: dict[int, Tensor] = {}
        for i in reversed(range(1, len(b))):
            terms = [(h * b[i], a), *((h * rows[j][i], v) for j, v in pulled.items() if rows[j][i] != 0)]
            v = self._pull(*made[i], _sum(self._ops, terms))
            if v is not None:
                pulled[i] = v
        self._parts += [(n, (h * b[0],), a), *((n, (h * rows[j][0],), v) for j, v in pulled.items())]
        return list(pulled.values())

    def _formula(self, n: int, made: Sequence[tuple[Tensor, Tensor]], h: float, a: Tensor) -> list[Tensor]:
        """Cotangents of y from the evaluations of the corrector; none for an explicit step."""
        n_slopes = self._formulas[n].n_slopes
        first, *others = _moulton(n_slopes)
        of_increments, pulled = [a], list[Tensor]()
        for state, slope in reversed(made[1:]):
            v = self._pull(state, slope, _sum(self._ops, [(h * first, of_increments[-1])]))
            if v is None:
                break
            pulled.append(v)
            of_increments.append(v)
        if len(pulled) == len(made) - 1:
            self._parts.append((n, [h * w for w in _bashforth(n_slopes)], of_increments.pop()))
        if of_increments:
            total = _sum(self._ops, [(1.0, x) for x in of_increments])
            self._parts.append((n, [h * w for w in others], total))
        return pulled

    def _slope(self, n: int, first: tuple[Tensor, Tensor], terms: list[tuple[float, Tensor]]) -> Tensor | None:
        """The cotangent of y from f_n, whose cotangent is that of this and of later steps."""
        terms = [(w, g) for w, g in terms if w != 0]
        terms += [(weights[m - n], x) for m, weights, x in self._parts if m - n < len(weights)]
        self._parts = [part for part in self._parts if part[0] - n + 1 < len(part[1])]
        return self._pull(*first, _sum(self._ops, terms)) if terms else None

    def _pull(self, y: Tensor, k: Tensor, grad_k: Tensor) -> Tensor | None:
        if not k.requires_grad:
            return None
        v = own_result(self._f.pull_back, y, k, grad_k)
        return None if v is None else self._ops.admit(v, _PULLED)


def _sum(ops: TorchOperations, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    weights, tensors = zip(*terms, strict=True)
    return ops.weighted_sum(None, 1.0, tensors, weights)
