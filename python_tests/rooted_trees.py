"""Order conditions of one-step methods: one per rooted tree, in exact arithmetic.

Trees, densities and elementary weights: Hairer, Norsett & Wanner, Solving ODEs I, II.2. A tree is the sorted
tuple of the subtrees at its root, so ``()`` is a single vertex.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, lru_cache
from math import prod

from aca_ext.numerics.implicit import ImplicitTableau, RosenbrockTableau
from aca_ext.numerics.tableau import Tableau

Tree = tuple  # of trees; Python 3.10 cannot spell the recursive type
Row = tuple[Fraction, ...]
Method = Tableau | ImplicitTableau | RosenbrockTableau


@cache
def trees(vertices: int) -> list[Tree]:
    return [()] if vertices == 1 else sorted(set(map(tuple, map(sorted, forests(vertices - 1)))))


def forests(vertices: int, largest: int | None = None) -> Iterator[Tree]:
    if vertices == 0:
        yield ()
    for first in range(min(vertices, largest or vertices), 0, -1):
        for tree in trees(first):
            for rest in forests(vertices - first, first):
                yield (tree, *rest)


@cache
def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


@cache
def density(tree: Tree) -> int:
    return size(tree) * prod(map(density, tree))


def dot(left: Row, right: Row) -> Fraction:
    return sum((x * y for x, y in zip(left, right, strict=False) if x), Fraction(0))


@lru_cache(maxsize=16)
def elementary_weights(a: tuple[Row, ...], single: tuple[Row, ...] | None = None) -> Callable[[Tree], Row]:
    """Phi_i(tree) for each stage i, each tree computed once.

    Args:
        single: the matrix of a vertex with a single branch, where it is another one, as in a Rosenbrock method:
            Hairer & Wanner, Solving ODEs II, IV.7, theorem 7.4.
    """

    @cache
    def phi(tree: Tree) -> Row:
        weights = (Fraction(1),) * len(a)
        matrix = single if single is not None and len(tree) == 1 else a
        for subtree in tree:
            below = phi(subtree)
            weights = tuple(w * dot(row, below) for w, row in zip(weights, matrix, strict=True))
        return weights

    return phi


class Residuals:
    """Residuals of a method in the order conditions of its solution, embedded and dense weights."""

    def __init__(self, method: Method) -> None:
        self.weights = {"b": method.b}
        if method.error is not None:
            self.weights["b_hat"] = tuple(b - e for b, e in zip(method.b, method.error, strict=True))
        self.powers = [] if method.dense is None else list(zip(*method.dense, strict=True))
        if isinstance(method, RosenbrockTableau):
            beta = tuple(
                tuple(x + y for x, y in zip(*rows, strict=True))
                for rows in zip(method.alpha, method.gammas, strict=True)
            )
            self.phi = elementary_weights(method.alpha, beta)
            self.weights = {what: method.of_slopes(row) for what, row in self.weights.items()}
            self.powers = [method.of_slopes(row) for row in self.powers]
        else:
            self.phi = elementary_weights(method.a)

    def of(self, what: str, order: int) -> Iterator[Fraction]:
        """One residual per tree with ``order`` vertices; for dense output one per tree and power of theta."""
        if what != "dense":
            return (dot(self.weights[what], self.phi(t)) - Fraction(1, density(t)) for t in trees(order))
        assert len(self.powers) >= order, "the polynomials cannot reach theta^order"
        return (
            dot(coefficients, self.phi(t)) - (Fraction(1, density(t)) if power == order else 0)
            for t in trees(order)
            for power, coefficients in enumerate(self.powers, start=1)
        )

    def within(self, tolerance: Fraction | int, what: str, order: int) -> bool:
        """Tells whether all conditions up to ``order`` hold; ends at the first that does not."""
        return all(abs(residual) <= tolerance for lower in range(1, order + 1) for residual in self.of(what, lower))
