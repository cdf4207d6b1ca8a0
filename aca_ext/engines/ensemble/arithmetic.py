"""Arithmetic on tensors by sample: operations on each element, reductions and matrix products, as code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from aca_ext.engines.ensemble import operations as ops
from aca_ext.engines.ensemble.code import Code, Numbers, is_mask
from aca_ext.engines.ensemble.operations import Operation
from aca_ext.engines.ensemble.values import Computed, Given, MixesError, Resolver, Value

Total = Callable[[Numbers], Numbers]  # of each row of a matrix


@dataclass(frozen=True)
class Arithmetic:
    """Operations on values; ``target`` is what func calls, for messages."""

    code: Code
    resolver: Resolver

    def pointwise(self, operation: Operation, *operands: Any, target: object, truths: tuple[int, ...] = ()) -> Computed:
        """An operation on each element; the operands broadcast as tensors do.

        Operands number ``truths`` are taken as true or false, the others as numbers.
        """
        rank = max(_rank(x) for x in operands)  # one at least is computed
        found = [x for x in operands if isinstance(x, Computed)]
        places = {(x.axis + rank - x.elements.ndim, x.elements.shape[x.axis]) for x in found if x.axis is not None}
        if len(places) > 1:
            raise MixesError(target)
        axis = next(iter(places))[0] if places else None
        numbers = []
        for i, x in enumerate(operands):
            elements = self._aligned(x, axis, rank, target)
            numbers.append(self.truths(elements) if i in truths else self.numbers(elements))
        return Computed(self.code.map(operation, *numbers), axis)

    def _aligned(self, x: Any, axis: int | None, rank: int, target: object) -> Numbers:
        if isinstance(x, Computed):
            return x.elements
        if isinstance(x, Given):
            own = None if axis is None else axis - (rank - x.index.dim())
            if own is not None and (own < 0 or x.index.shape[own] == 1):
                own = None
            return self.resolver.along(x, own, target)
        number = np.empty((), dtype=object)
        number[()] = x if isinstance(x, bool) else float(x)
        return number

    def numbers(self, elements: Numbers) -> Numbers:
        """Truth values as the numbers 1 and 0."""
        return self.code.map(ops.NUMBER, elements) if elements.size and is_mask(elements) else elements

    def truths(self, elements: Numbers) -> Numbers:
        """Numbers as true or false: whether they are not zero."""
        return elements if is_mask(elements) else self.code.map(ops.TRUTH, elements)

    def reduced(self, x: Computed, dims: Any, keep: bool, total: Total, target: object) -> Computed:
        """``total`` of the elements along some dimensions, by default of all."""
        shape = x.elements.shape
        given = range(len(shape)) if dims in (None, [], ()) else [dims] if isinstance(dims, int) else dims
        along = sorted({d % max(len(shape), 1) for d in given})
        if x.axis in along:
            raise MixesError(target)
        others = [d for d in range(len(shape)) if d not in along]
        kept = [shape[d] for d in others]
        rows = self.numbers(x.elements).transpose([*others, *along]).reshape(math.prod(kept), -1)
        result = total(rows).reshape([1 if d in along else shape[d] for d in range(len(shape))] if keep else kept)
        return Computed(result, x.axis if x.axis is None or keep else others.index(x.axis))

    def sum(self, rows: Numbers) -> Numbers:
        return self.code.contract(rows, np.full(rows.shape[1], 1.0, dtype=object))

    def running(self, operation: Operation) -> Total:
        """Of each row the first element, the operation on it and the second, and so on to the last."""

        def total(rows: Numbers) -> Numbers:
            found = rows[:, 0]
            for column in rows.T[1:]:
                found = self.code.map(operation, found, column)
            return found

        return total

    def accumulated(self, x: Computed, dim: int, operation: Operation, target: object) -> Computed:
        """Along a dimension, each element joined with all those before it."""
        dim %= max(x.elements.ndim, 1)
        if x.axis == dim:
            raise MixesError(target)
        found = np.moveaxis(self.numbers(x.elements), dim, 0).copy()
        for i in range(1, len(found)):
            found[i, ...] = self.code.map(operation, found[i - 1, ...], found[i, ...])
        return Computed(np.moveaxis(found, 0, dim), x.axis)

    def largest(self, rows: Numbers, sign: int) -> Numbers:
        found = np.empty(len(rows), dtype=object)
        for i, row in enumerate(rows):
            found[i] = self.code.largest(list(row), sign)
        return found

    def product(self, a: Value, b: Value, target: object) -> Computed:
        """The product of two matrices: that of the samples' rows with a matrix that they share, or turned."""
        if isinstance(a, Computed) and isinstance(b, Computed):
            if a.axis is not None or b.axis is not None:
                raise MixesError(target)
            return Computed(self._product(a.elements, b.elements), None)
        if isinstance(b, Computed):
            assert isinstance(a, Given)
            return _turned(self.product(_turned(b), Given(a.node, a.index.T), target))
        assert isinstance(a, Computed)
        assert isinstance(b, Given)
        if a.axis == 1:
            raise MixesError(target)
        return Computed(self._product(a.elements, self.resolver.along(b, None, target)), a.axis)

    def products(self, a: Value, b: Value, target: object) -> Computed:
        """The products of the matrices of two stacks."""
        axes = {x.axis for x in (a, b) if isinstance(x, Computed)}
        axis = axes.pop()
        of_rows, of_columns = axis == 1 and isinstance(b, Given), axis == 2 and isinstance(a, Given)
        if axes or not (axis in (None, 0) or of_rows or of_columns):
            raise MixesError(target)
        along = 0 if axis == 0 else None
        one, other = (x.elements if isinstance(x, Computed) else self.resolver.along(x, along, target) for x in (a, b))
        return Computed(np.stack([self._product(x, y) for x, y in zip(one, other, strict=True)]), axis)

    def _product(self, a: Numbers, b: Numbers) -> Numbers:
        found = np.empty((a.shape[0], b.shape[1]), dtype=object)
        for i, row in enumerate(a):
            found[i] = self.code.contract(b.T, row)
        return found


def _turned(x: Computed) -> Computed:
    return Computed(x.elements.T, None if x.axis is None else 1 - x.axis)


def _rank(x: Any) -> int:
    return x.elements.ndim if isinstance(x, Computed) else x.index.dim() if isinstance(x, Given) else 0
