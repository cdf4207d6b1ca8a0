"""One explicit Runge-Kutta step and its transpose, side by side.

Symbols, as in Hairer, Nørsett & Wanner: t time, h step size, y state, k_i slope of stage i, a b c the tableau, theta
the position in a step (0..1); further g, the cotangent of a state, and grad_k, the cotangent of a slope.

    k_i = f(t + c_i·h, y + h·Σ_j a_ij·k_j)        y1 = y + h·Σ_i b_i·k_i        y(theta) = y + h·Σ_i b_i(theta)·k_i

The transpose of a step uses the transposed tableau. Each output inside the step, its end included, is a pair: weights w
and a cotangent g. With v_i = (∂f/∂y at stage i)ᵀ·grad_k_i,

    grad_k_i = h·(Σ_outputs w_i·g + Σ_{j>i} a_ji·v_j)        grad_y = Σ_outputs g + Σ_i v_i
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from aca_ext.kernels.extension import own_result
from aca_ext.kernels.fused import KernelOperations, TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.numerics.tableau import Tableau
from aca_ext.solver.transposed_step import Compare, Inside, cotangent_of_start
from aca_ext.vector_field.slope_function import ReplayFunction, SlopeFunction

PULLED = "the gradient that a backward pass inside func returned"  # names v_i in errors of ``ops.admit``

Weights = tuple[tuple[int, ...], tuple[float, ...]]  # indices of the slopes with non-zero weight, and the weights


class Coefficients(Protocol):
    """Coefficients that explicit and implicit methods share; see ``Scheme`` for the attributes."""

    @property
    def tableau(self) -> Any: ...

    @property
    def fsal(self) -> bool: ...

    @property
    def starts_explicitly(self) -> bool: ...

    @property
    def c(self) -> tuple[float, ...]: ...

    @property
    def solution(self) -> tuple[float, ...]: ...

    @property
    def error_last(self) -> float: ...


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as tableaus are
class Scheme:
    """A tableau as floats, without its zeros, in the order in which a step uses them.

    Attributes:
        fsal: the last slope is f at the solution, so it is the first slope of the next step.
        a: all coefficients of the stages, zeros included.
        stages: the non-zero entries of each row of ``a``.
        solution: all of the weights b, zeros included.
        indices: slopes that the solution or the error needs, without the slope at the solution: (0, 2, 3, 4, 5) of
            dopri5, whose second slope has weight 0 in both, and whose seventh is that at the solution.
        b: weights of these slopes in the solution.
        error: weights of these slopes in the error; None if the error is not estimated.
        error_last: weight in the error of the slope at the solution; 0 unless ``fsal``.
        starts_explicitly: the first slope is f at the start of the step.
    """

    tableau: Tableau
    fsal: bool
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    stages: tuple[Weights, ...]
    solution: tuple[float, ...]
    indices: tuple[int, ...]
    b: tuple[float, ...]
    error: tuple[float, ...] | None
    error_last: float
    starts_explicitly: bool = True


@lru_cache(maxsize=64)
def scheme_of(tableau: Tableau, estimate_error: bool) -> Scheme:
    b = [float(x) for x in tableau.b]
    error = [float(x) for x in tableau.error] if tableau.error is not None and estimate_error else None
    before = range(len(b) - 1 if tableau.fsal else len(b))
    indices = tuple(i for i in before if b[i] != 0 or (error is not None and error[i] != 0))
    a = tuple(tuple(float(x) for x in row) for row in tableau.a)
    return Scheme(
        tableau=tableau,
        fsal=tableau.fsal,
        c=tuple(float(x) for x in tableau.c),
        a=a,
        stages=tuple(nonzero(row) for row in a),
        solution=tuple(b),
        indices=indices,
        b=tuple(b[i] for i in indices),
        error=None if error is None else tuple(error[i] for i in indices),
        error_last=error[-1] if tableau.fsal and error is not None else 0.0,
    )


def solution_only(scheme: Scheme) -> Scheme:
    """The scheme that computes the same solution, bit for bit, without the error and the slope at its end."""
    count = 1 + max(scheme.indices)
    return replace(scheme, fsal=False, c=scheme.c[:count], stages=scheme.stages[:count], error=None, error_last=0.0)


def nonzero(weights: Sequence[float]) -> Weights:
    """The indices and values of the weights that are not zero."""
    indices = tuple(i for i, w in enumerate(weights) if w != 0)
    return indices, tuple(weights[i] for i in indices)


@dataclass(slots=True)
class Trial:
    """A computed step, not yet accepted.

    Attributes:
        y1: the solution at its end.
        k: the slopes of all stages.
        partial_error: the error estimate without the term of the slope at the solution; None if not estimated.
        error_norm: norm of the error in units of the tolerance; None if the step did not compute it.
        failures: for each row whose implicit step has no solution, the reason; see ``TorchOperations.n_rows``.
    """

    y1: Tensor
    k: list[Tensor]
    partial_error: Tensor | None
    error_norm: Number | None = None
    failures: Mapping[int, str] | None = None

    @property
    def failure(self) -> str | None:
        """The reason why a step has no solution; None if it has one."""
        return next(iter(self.failures.values())) if self.failures else None


def stage_times(
    scheme: Coefficients, t: Number, h: Number, t_next: Number, jumps: frozenset[float], dtype: torch.dtype
) -> list[Number]:
    """Times of all stages. Stages at the end of the step get exactly ``t_next``, from which t + h may differ.

    If f jumps at one end of the step, the stages there get the adjacent number of ``dtype`` inside the step.
    """
    times = [t_next if c == 1 else t + c * h for c in scheme.c]
    if t in jumps:
        times = [_next_after(t, t_next, dtype) if c == 0 else time for c, time in zip(scheme.c, times, strict=True)]
    if t_next in jumps:
        times = [_next_after(t_next, t, dtype) if c == 1 else time for c, time in zip(scheme.c, times, strict=True)]
    return times


def _next_after(t: float, towards: Number, dtype: torch.dtype) -> float:
    sign = 1.0 if towards > t else -1.0
    start, end = (torch.tensor(x, dtype=dtype, device="cpu") for x in (t, sign * math.inf))
    return torch.nextafter(start, end).item()


def step(
    f: SlopeFunction,
    ops: TorchOperations,
    scheme: Scheme,
    times: Sequence[Number],
    y: Tensor,
    h: Number,
    k_first: Tensor | None = None,
    out: Tensor | None = None,
) -> Trial:
    """Advances ``y`` by h; ``times`` are those of the stages.

    ``k_first`` is f(t, y) if it is known. The solution is written into ``out`` if it is given.
    """
    t = ops.scalars(times)
    k = [f(t[0], y) if k_first is None else k_first]
    for i in range(1, len(scheme.c) - scheme.fsal):
        indices, weights = scheme.stages[i]
        k.append(f(t[i], ops.weighted_sum(y, h, [k[j] for j in indices], weights)))
    known = [k[j] for j in scheme.indices]
    if scheme.error is None:
        y1, partial_error = ops.weighted_sum(y, h, known, scheme.b, out), None
    else:
        y1, partial_error = ops.solution_and_error(y, h, known, scheme.b, scheme.error, out)
    if scheme.fsal:
        k.append(f(t[-1], y1))
    return Trial(y1, k, partial_error)


def compiled_stepper(ops: TorchOperations, scheme: Scheme) -> Any | None:
    """The cached C++ object that makes steps with the kernels of ``ops``; None if steps run in Python."""
    if type(ops) is not KernelOperations:
        return None
    known = ops.steppers.get(scheme)
    if known is None:
        solution = scheme.indices, scheme.b, scheme.error, scheme.error_last
        known = ops.steppers[scheme] = ops.stepper(scheme.c, scheme.stages, solution, scheme.fsal)
    return known


def stepper(f: SlopeFunction, ops: TorchOperations, scheme: Scheme, compiled: Any | None) -> Callable[..., Trial]:
    """``step`` with its first three arguments bound, in C++ if ``compiled`` is given."""
    if compiled is None:
        return partial(step, f, ops, scheme)

    def compiled_step(
        times: Sequence[float], y: Tensor, h: float, k_first: Tensor | None = None, out: Tensor | None = None
    ) -> Trial:
        return Trial(*compiled.step(f, times, y, h, k_first, out))

    return compiled_step


def transposed_stepper(f: ReplayFunction, ops: TorchOperations, scheme: Scheme) -> Callable[..., Tensor]:
    """``step_vjp`` with its first three arguments bound, in C++ if ``ops`` are kernels."""
    compiled = compiled_stepper(ops, scheme)
    if compiled is None:
        return partial(step_vjp, f, ops, scheme)

    admit = partial(ops.admit, what=PULLED)

    def compiled_step_vjp(
        times: Sequence[float],
        y: Tensor,
        h: float,
        outputs: Sequence[tuple[Sequence[float], Tensor]],
        compare: Compare | None = None,
        y_next: Tensor | None = None,
    ) -> Tensor:
        return compiled.vjp(f.fastest, f.pull_back, admit, compare, y_next, times, y, h, outputs)

    return compiled_step_vjp


def error_norm(ops: TorchOperations, scheme: Coefficients, y: Tensor, h: Number, trial: Trial) -> Number:
    """The norm of a trial's error in units of the tolerance."""
    if trial.error_norm is not None:
        return trial.error_norm
    assert trial.partial_error is not None
    k_last = trial.k[-1] if scheme.error_last != 0 else None
    return ops.error_norm(trial.partial_error, k_last, scheme.error_last * h, y, trial.y1)


def interpolate(
    ops: TorchOperations,
    tableau: Tableau,
    y: Tensor,
    h: Number,
    k: Sequence[Tensor],
    theta: Number,
    out: Tensor | None = None,
) -> Tensor:
    """Dense output y(theta) inside a step."""
    indices, weights = nonzero(tableau.dense_weights(theta))
    return ops.weighted_sum(y, h, [k[i] for i in indices], weights, out)


def step_vjp(
    f: ReplayFunction,
    ops: TorchOperations,
    scheme: Scheme,
    times: Sequence[float],
    y: Tensor,
    h: Number,
    outputs: Sequence[tuple[Sequence[float], Tensor]],
    compare: Compare | None = None,
    y_next: Tensor | None = None,
    inside: Inside | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Replays a step from ``y`` and returns the cotangent of ``y``, written into ``out`` if it is given.

    ``f.pull_back`` collects the cotangents of everything else that f depends on.

    Args:
        outputs: pairs (w, g); g is the cotangent of y + h·Σ_i w[i]·k_i. The end of the step is (b, g), dense output is
            (b(theta), g). Only stages that an output needs are evaluated.
        compare: receives the end of the step and its slopes, if all slopes of the solution are evaluated. The C++ code
            on the CPU calls it only if the end differs from ``y_next`` in a bit.
        inside: further outputs, dense ones inside the step, already summed: see ``Inside``.
    """
    count = 1 + max(i for w, _ in outputs for i, w_i in enumerate(w) if w_i != 0)
    if inside is not None:
        count = len(scheme.stages)
    t = ops.scalars(times[:count])
    states: list[Tensor] = []
    slopes: list[Tensor] = []  # with their autograd graphs
    k: list[Tensor] = []
    for i in range(count):
        indices, weights = scheme.stages[i]
        y_i = ops.weighted_sum(y, h, [k[j] for j in indices], weights) if i else y.detach()
        states.append(y_i.requires_grad_())
        slopes.append(f(t[i], y_i))
        k.append(slopes[i].detach())
    if compare is not None and count > max(scheme.indices):
        compare(ops.weighted_sum(y, h, [k[i] for i in scheme.indices], scheme.b), k)

    pulled: dict[int, Tensor] = {}  # v_i of the stages whose slope depends on y
    a = scheme.a
    for i in reversed(range(count)):
        terms = [(w[i], g) for w, g in outputs if w[i] != 0]
        if inside is not None:
            terms.append((1.0, inside[1][i]))
        terms += [(a[j][i], v) for j, v in pulled.items() if a[j][i] != 0]
        y_i, k_i = states.pop(), slopes.pop()
        if not terms or not k_i.requires_grad:
            continue
        grad_k = ops.weighted_sum(None, h, [x for _, x in terms], tuple(w for w, _ in terms))
        v = own_result(f.pull_back, y_i, k_i, grad_k)  # a copy if func keeps the tensor and may overwrite it
        if v is not None:
            pulled[i] = ops.admit(v, PULLED)  # in the layout that the kernels read

    return cotangent_of_start(ops, outputs, pulled.values(), inside, out)
