"""Code on lanes as a list of statements, each of which computes an array of numbers from elements of earlier arrays.

Statements on few elements become straight-line C++; those on many, loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aca_ext.engines.ensemble.operations import ADD, MULTIPLY, MULTIPLY_ADD, Operation

_LOOP_FROM = 16  # elements; fewer become straight-line code
_CONTRACTION_FROM = 64  # products


@dataclass(frozen=True, eq=False)
class Array:
    """Numbers in a lane: an input, or the result of a statement.

    Attributes:
        name: in C++, where it is a plain variable if it has one element and is no input.
        is_shared: all lanes have the same numbers in it.
        is_mask: they are true or false.
    """

    name: str
    size: int
    is_input: bool = False
    is_shared: bool = False
    is_mask: bool = False

    @property
    def is_variable(self) -> bool:
        return self.size == 1 and not self.is_input


@dataclass(frozen=True, slots=True)
class Element:
    """A number of an array."""

    array: Array
    index: int


Number = Element | float | bool
Numbers = NDArray[np.object_]  # of Number


@dataclass(frozen=True, slots=True)
class Run:
    """Operand of a statement: elements of one array at equal distances, or one constant.

    Element i has the index start + i·step; with two dimensions, element (i, j) that of start + i·step + j·inner.
    """

    array: Array | None
    start: int = 0
    step: int = 0
    inner: int = 0
    constant: Number = 0.0

    def key(self) -> tuple[object, ...]:
        return id(self.array), self.start, self.step, self.inner, repr(self.constant)


@dataclass(frozen=True)
class Map:
    """out[i] = operation(operands[0][i], operands[1][i], ...)."""

    out: Array
    operation: Operation
    operands: tuple[Run, ...]


@dataclass(frozen=True)
class Contraction:
    """out[i] = Σ_j a[i, j]·b[j] with ``count`` summands."""

    out: Array
    a: Run
    b: Run
    count: int


@dataclass(frozen=True)
class Gather:
    """out[i] = elements[i]."""

    out: Array
    elements: tuple[Number, ...]


@dataclass(frozen=True)
class Largest:
    """The largest of some elements, or with sign -1 the smallest; NaN where one is. Ties share the cotangent."""

    out: Array
    elements: tuple[Number, ...]
    sign: int


Statement = Map | Contraction | Gather | Largest


@dataclass
class Code:
    """Statements in order, and the inputs that they start from.

    Attributes:
        t: time, one number.
        y: the state.
        p: numbers that belong to the sample.
        w: numbers that all samples share.
    """

    t: Array
    y: Array
    p: Array
    w: Array
    statements: list[Statement] = field(default_factory=list)
    _known: dict[object, Array] = field(default_factory=dict)
    _n_arrays: int = 0

    @classmethod
    def on(cls, n: int) -> Code:
        """Code on a state of n numbers; p and w grow as they are used."""
        t, y, p = (Array(name, size, is_input=True) for name, size in (("t", 1), ("y", n), ("p", 0)))
        return cls(t, y, p, Array("w", 0, is_input=True, is_shared=True))

    def map(self, operation: Operation, *operands: Numbers) -> Numbers:
        """The operation on each element; the operands broadcast."""
        given = np.broadcast_arrays(*operands)
        shape, size = given[0].shape, given[0].size
        flat = [x.reshape(-1) for x in given]
        if size >= _LOOP_FROM:
            out = self._map(operation, tuple(self._run(x) for x in flat), size)
            return elements_of(out).reshape(shape)
        found = np.empty(size, dtype=object)
        for i in range(size):
            found[i] = Element(self._map(operation, tuple(_single(x[i]) for x in flat), 1), 0)
        return found.reshape(shape)

    def contract(self, a: Numbers, b: Numbers) -> Numbers:
        """(I, J) times (J,), or the sums of the rows of ``a`` where b holds ones."""
        rows, count = a.shape
        run = _matrix_run(a) if rows * count >= _CONTRACTION_FROM else None
        if run is not None and run.array is not None:
            out = self._new(rows)
            self.statements.append(Contraction(out, run, self._run(b), count))
            return elements_of(out)
        is_sum = all(isinstance(x, float) and x == 1.0 for x in b)
        if count == 0:
            return np.full(rows, 0.0, dtype=object)
        total = a[:, 0] if is_sum else self.map(MULTIPLY, a[:, 0], b[0:1])
        for j in range(1, count):
            total = self.map(ADD, total, a[:, j]) if is_sum else self.map(MULTIPLY_ADD, a[:, j], b[j : j + 1], total)
        return total

    def largest(self, elements: Sequence[Number], sign: int) -> Number:
        out = self._new(1)
        self.statements.append(Largest(out, tuple(elements), sign))
        return Element(out, 0)

    def _map(self, operation: Operation, operands: tuple[Run, ...], size: int) -> Array:
        key = operation.text, operation.pullbacks, tuple(run.key() for run in operands), size
        if key not in self._known:
            out = self._new(size, operation.is_mask)
            self.statements.append(Map(out, operation, operands))
            self._known[key] = out
        return self._known[key]

    def _run(self, elements: Numbers) -> Run:
        """Elements as an operand of a loop, gathered into an array of their own where they do not lie in order."""
        run = _matrix_run(elements.reshape(-1, 1))
        if run is not None:
            return run
        out = self._new(len(elements), is_mask=is_mask(elements))
        self.statements.append(Gather(out, tuple(elements)))
        return Run(out, 0, 1)

    def _new(self, size: int, is_mask: bool = False) -> Array:
        self._n_arrays += 1
        return Array(f"v{self._n_arrays}", size, is_mask=is_mask)


def elements_of(array: Array, start: int = 0, count: int | None = None) -> Numbers:
    found = np.empty(array.size if count is None else count, dtype=object)
    for i in range(len(found)):
        found[i] = Element(array, start + i)
    return found


def is_mask(elements: Numbers) -> bool:
    """Tells whether numbers are true or false."""
    return all(isinstance(x, bool) or (isinstance(x, Element) and x.array.is_mask) for x in elements.reshape(-1))


def _single(x: Number) -> Run:
    return Run(x.array, x.index) if isinstance(x, Element) else Run(None, constant=x)


def _matrix_run(x: Numbers) -> Run | None:
    """A matrix of elements at equal distances in one array, or all the same constant; None if it is neither."""
    first = x[0, 0]
    if not isinstance(first, Element):
        is_one = all(not isinstance(number, Element) and repr(number) == repr(first) for number in x.reshape(-1))
        return Run(None, constant=first) if is_one else None
    if any(not isinstance(number, Element) or number.array is not first.array for number in x.reshape(-1)):
        return None
    index = np.array([number.index for number in x.reshape(-1)]).reshape(x.shape)
    step = int(index[1, 0] - index[0, 0]) if x.shape[0] > 1 else 0
    inner = int(index[0, 1] - index[0, 0]) if x.shape[1] > 1 else 0
    expected = index[0, 0] + step * np.arange(x.shape[0])[:, None] + inner * np.arange(x.shape[1])
    return Run(first.array, int(first.index), step, inner) if (index == expected).all() else None
