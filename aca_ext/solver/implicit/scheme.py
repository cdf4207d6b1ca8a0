"""The tableau of an implicit Runge-Kutta method as floats, with its stages in groups that are solved together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from aca_ext.numerics.implicit import ImplicitTableau

Matrix = tuple[tuple[float, ...], ...]
_NEAREST = 0.05  # distance of the nodes of a predictor: the weights grow with its inverse
# Slopes from which an iteration starts. With four or more, kvaerno5 takes as many iterations on stiff problems.
_MOST_SLOPES = 3


@dataclass(frozen=True)
class Group:
    """Stages that depend on one another.

    Attributes:
        stages: their numbers.
        a: their coefficients for one another; None for a single explicit stage.
        inverse: inverse of ``a``.
        predictors: for each stage, weights of earlier states, by which the polynomial through them gives its state. A
            state is counted by its stage, the end of the step by the number of all stages, and the start by -1.
        starts: for each stage i, weights w_j of earlier slopes k_j, by which h·Σ_j w_j·k_j is near h·Σ_m a_im·k_m: the
            polynomial through the slopes nearest in time gives those of the group.
    """

    stages: range
    a: Matrix | None = None
    inverse: Matrix = ()
    predictors: tuple[tuple[tuple[int, float], ...], ...] = ()
    starts: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, eq=False)  # compared by identity, as tableaus are
class ImplicitScheme:
    """An implicit tableau as floats, in the order in which a step uses it.

    Attributes:
        fsal: the last slope is f at the solution, where the next step starts.
        starts_explicitly: the first slope is f at the start of the step.
        c: nodes; where no stage is at the start of the step, one more that is.
        solution: the weights b.
        error: weights of the error; None if it is not estimated.
        error_filter: the matrix of one element with ``ImplicitTableau.error_filter``, or None.
    """

    tableau: ImplicitTableau
    fsal: bool
    starts_explicitly: bool
    c: tuple[float, ...]
    a: Matrix
    solution: tuple[float, ...]
    error: tuple[float, ...] | None
    error_filter: Matrix | None
    groups: tuple[Group, ...]
    error_last: float = 0.0  # as in ``runge_kutta.Scheme``: the error of a step includes all of its slopes


@lru_cache(maxsize=64)
def implicit_scheme_of(tableau: ImplicitTableau, estimate_error: bool) -> ImplicitScheme:
    a = tuple(tuple(float(x) for x in row) for row in tableau.a)
    c = [float(x) for x in tableau.c]
    if tableau.stiffly_accurate:
        c[-1] = 1.0  # which the sum of rounded coefficients may miss
    return ImplicitScheme(
        tableau=tableau,
        fsal=tableau.stiffly_accurate,
        starts_explicitly=tableau.explicit_first_stage,
        c=tuple(c) if tableau.explicit_first_stage else (*c, 0.0),
        a=a,
        solution=tuple(float(x) for x in tableau.b),
        error=tuple(float(x) for x in tableau.error) if tableau.error is not None and estimate_error else None,
        error_filter=None if tableau.error_filter is None else ((float(tableau.error_filter),),),
        groups=_groups(a, c),
    )


def _groups(a: Matrix, c: Sequence[float]) -> tuple[Group, ...]:
    """The smallest ranges of stages such that none needs a stage after its range."""
    groups: list[Group] = []
    first = 0
    while first < len(a):
        end = i = first
        while i <= end:
            end = max(end, *(j for j, weight in enumerate(a[i]) if weight != 0), end)
            i += 1
        groups.append(_group(range(first, end + 1), a, c))
        first = end + 1
    return tuple(groups)


def _group(stages: range, a: Matrix, c: Sequence[float]) -> Group:
    block = tuple(a[i][stages.start : stages.stop] for i in stages)
    if block == ((0.0,),):
        return Group(stages)
    inverse = torch.linalg.inv(torch.tensor(block, dtype=torch.float64, device="cpu"))
    nodes = {0.0: -1, 1.0: len(a)}
    for j, node in enumerate(c[: stages.start]):
        if all(abs(node - other) > _NEAREST for other in nodes):
            nodes[node] = j
    predictors = tuple(tuple(_interpolation(nodes, c[i])) for i in stages)
    return Group(stages, block, tuple(tuple(row) for row in inverse.tolist()), predictors, _starts(stages, block, c))


def _starts(stages: range, block: Matrix, c: Sequence[float]) -> tuple[tuple[tuple[int, float], ...], ...]:
    slopes = [dict(_interpolation(_nearest(c[: stages.start], c[m]), c[m])) for m in stages]
    starts = []
    for row in block:
        weights: dict[int, float] = {}
        for weight, slope in zip(row, slopes, strict=True):
            for j, w in slope.items():
                weights[j] = weights.get(j, 0.0) + weight * w
        starts.append(tuple(weights.items()))
    return tuple(starts)


def _nearest(earlier: Sequence[float], x: float) -> dict[float, int]:
    """The nodes nearest to ``x`` with their stages; of equal nodes the last."""
    nodes: dict[float, int] = {}
    for j in sorted(range(len(earlier)), key=lambda j: (abs(earlier[j] - x), -j)):
        if len(nodes) < _MOST_SLOPES and all(abs(earlier[j] - other) > _NEAREST for other in nodes):
            nodes[earlier[j]] = j
    return nodes


def _interpolation(nodes: dict[float, int], x: float) -> Iterator[tuple[int, float]]:
    """The non-zero weights, Lagrange's, of the values at ``nodes`` in the polynomial through them at ``x``."""
    for node, number in nodes.items():
        weight = prod((x - other) / (node - other) for other in nodes if other != node)
        if weight != 0:
            yield number, weight
