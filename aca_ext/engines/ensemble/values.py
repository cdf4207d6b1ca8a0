"""Tensors of a traced func by sample: which of their elements belong to which sample, found by moving numbers around.

A tensor is either *computed*, from time or state, or *given*: a view of a tensor that does not depend on them. An
operation that only moves elements is run on a tensor of their numbers, and what became of the numbers tells how the
result lies in the batch, whatever the operation. Nothing is guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from aca_ext.engines.compiled.backend import UnusableFuncError
from aca_ext.engines.ensemble.code import Code, Element, Number, Numbers
from aca_ext.engines.ensemble.operations import TRUTH

HINT = 'Use engine="eager", or change func.'


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that depends on time or state.

    Attributes:
        elements: those of one sample, of the tensor's shape but for ``axis``.
        axis: whose index is sample · (elements in it) + element; None in a batch of one.
    """

    elements: Numbers
    axis: int | None


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor that depends on neither.

    Attributes:
        node: what computes the tensor that this is a view of.
        index: of every element among those of that tensor, -1 where the element is zero.
    """

    node: fx.Node
    index: Tensor


Value = Computed | Given


class MixesError(UnusableFuncError):
    """An operation in func makes one sample depend on another, or on its place in the batch."""

    def __init__(self, operation: object) -> None:
        super().__init__(
            f"func does not treat samples alike and apart from one another: {operation} combines, reorders or selects "
            f'samples, which option batch="independent" does not allow in compiled code. {HINT}'
        )


@dataclass
class Inputs:
    """Numbers that the code reads besides time and state, as they come to be used.

    Attributes:
        shared: of tensors whose elements all samples share, the place of the first element in w.
        by_sample: of tensors with numbers for each sample, and the distance between those of one sample and of the
            next, the place of the first in p.
        picked: of other tensors with numbers for each sample, where in them each sample's lies, and the place in p.
        n_shared, n_by_sample: how many numbers there are.
    """

    shared: dict[fx.Node, int] = field(default_factory=dict)
    by_sample: dict[tuple[fx.Node, int], int] = field(default_factory=dict)
    picked: list[tuple[fx.Node, Tensor, int]] = field(default_factory=list)
    n_shared: int = 0
    n_by_sample: int = 0


class Resolver:
    """Elements of given tensors as numbers in the code.

    Args:
        batch: number of samples.
        tensors: examples of the given tensors that are not views.
        constants: those among them that never change.
    """

    def __init__(self, code: Code, batch: int, tensors: dict[fx.Node, Tensor], constants: set[fx.Node]) -> None:
        self.code, self.batch = code, batch
        self.inputs = Inputs()
        self._tensors, self._constants = tensors, constants

    def along(self, given: Given, axis: int | None, operation: object) -> Numbers:
        """The elements of one sample, where ``axis`` is that of the batch; None: all are shared."""
        index = given.index.numpy()
        if axis is None:
            return self.shared(given.node, index)
        by_sample = np.moveaxis(_split(given.index, axis, self.batch).numpy(), axis, 0)
        is_shared = (by_sample == by_sample[0]).all(0)
        found = self.shared(given.node, np.where(is_shared, by_sample[0], -1))
        for place in zip(*np.nonzero(~is_shared), strict=True):
            found[place] = self.of_sample(given.node, by_sample[(slice(None), *place)], operation)
        return found

    def shared(self, node: fx.Node, index: Any) -> Numbers:
        found = np.empty(index.shape, dtype=object)
        found.fill(0.0)
        used = index >= 0
        if not used.any():
            return found
        example = self._tensors[node]
        if node in self._constants:
            values = example.detach().reshape(-1).tolist()
            convert = bool if example.dtype is torch.bool else float
            found[used] = [convert(values[i]) for i in index[used]]
            return found
        if node not in self.inputs.shared:
            self.inputs.shared[node] = self.inputs.n_shared
            self.inputs.n_shared += example.numel()
        start = self.inputs.shared[node]
        numbers = np.empty(int(used.sum()), dtype=object)
        for n, i in enumerate(index[used]):
            numbers[n] = Element(self.code.w, start + int(i))
        found[used] = self._truths(numbers, example)
        return found

    def of_sample(self, node: fx.Node, index: Any, operation: object) -> Number:
        """A number for each sample, given where each lies in a tensor."""
        example = self._tensors[node]
        if (index < 0).any():  # zero for some samples
            raise MixesError(operation)
        if node in self._constants:
            values = example.reshape(-1)[torch.from_numpy(index)]
            if bool((values == values[0]).all()):
                return values[0].item() if example.dtype is torch.bool else float(values[0])
        numbers = np.empty(1, dtype=object)
        numbers[0] = Element(self.code.p, self._place(node, example.numel(), index))
        return self._truths(numbers, example)[0]

    def _place(self, node: fx.Node, size: int, index: Any) -> int:
        inputs, start, step = self.inputs, int(index[0]), int(index[1] - index[0])
        is_even = step > 0 and (index == start + step * np.arange(self.batch)).all()
        if not (is_even and size % (step * self.batch) == 0 and start % (step * self.batch) < step):
            inputs.picked.append((node, torch.from_numpy(index.copy()), inputs.n_by_sample))
            inputs.n_by_sample += 1
            return inputs.n_by_sample - 1
        key = node, step
        if key not in inputs.by_sample:
            inputs.by_sample[key] = inputs.n_by_sample
            inputs.n_by_sample += size // self.batch
        outer, block = divmod(start, step * self.batch)
        return inputs.by_sample[key] + outer * step + block

    def _truths(self, numbers: Numbers, example: Tensor) -> Numbers:
        return self.code.map(TRUTH, numbers) if example.dtype is torch.bool else numbers


def rows_of(tensor: Tensor, step: int, batch: int) -> Tensor:
    """(batch, numbers of a sample) of a tensor in which those of one sample and of the next are ``step`` apart."""
    return tensor.reshape(-1, batch, step).transpose(0, 1).reshape(batch, -1)


def moved(target: Callable[..., Any], args: Any, kwargs: Any, resolver: Resolver) -> Any:
    """The result of an operation that only moves elements; None if it joins given tensors alone.

    Raises:
        MixesError: elements of one sample do not stay together.
    """
    numbering = _Numbering(resolver, target)
    args, kwargs = pytree.tree_map(numbering.numbers_of, (args, kwargs))
    result = target(*args, **kwargs)
    tensors, form = pytree.tree_flatten(result)
    values = [numbering.value_of(x) for x in tensors]
    return None if None in values else pytree.tree_unflatten(values, form)


class _Numbering:
    """Distinct numbers for the elements of the operands of one operation; 0 is the number of zero."""

    def __init__(self, resolver: Resolver, target: object) -> None:
        self._resolver, self._batch, self._target = resolver, resolver.batch, target
        self._starts: list[int] = []
        self._values: list[Value] = []
        self._next = 1

    def numbers_of(self, x: Any) -> Any:
        if isinstance(x, Computed):
            return self._numbers_of_computed(x)
        if isinstance(x, Given):
            self._take(x, 1 + (int(x.index.max()) if x.index.numel() else 0))
            return torch.where(x.index < 0, 0, x.index + self._starts[-1])
        return x

    def value_of(self, numbers: Tensor) -> Value | None:
        """The tensor whose elements are now where these numbers are."""
        if any(isinstance(x, Computed) for x in self._values):
            return self._computed(numbers)
        used = numbers[numbers > 0]
        owners = torch.searchsorted(torch.tensor(self._starts, device="cpu"), used, right=True).unique() - 1
        if len(owners) > 1:
            return None
        owner = int(owners[0]) if len(owners) else 0
        value = self._values[owner]
        assert isinstance(value, Given)
        return Given(value.node, torch.where(numbers == 0, -1, numbers - self._starts[owner]))

    def _computed(self, numbers: Tensor) -> Computed:
        if self._batch == 1:
            return Computed(self._resolved(numbers.numpy(), None), None)
        for axis in range(numbers.dim()):
            if numbers.shape[axis] and numbers.shape[axis] % self._batch == 0:
                split = _split(numbers, axis, self._batch).numpy()
                start = np.take(split, 0, axis)
                step = np.take(split, 1, axis) - start
                by_sample = np.arange(self._batch).reshape(-1, *(1,) * (split.ndim - 1 - axis))
                is_even = (split == np.expand_dims(start, axis) + by_sample * np.expand_dims(step, axis)).all()
                if is_even and self._belongs(start, step):
                    return Computed(self._resolved(start, step), axis)
        raise MixesError(self._target)

    def _belongs(self, start: Any, step: Any) -> bool:
        """Tells whether the elements of computed tensors go from sample to sample along the axis."""
        for i, number, distance in self._owners(start, step):
            value = self._values[i]
            if isinstance(value, Computed) and (distance != value.elements.size or number >= value.elements.size):
                return False
        return True

    def _owners(self, start: Any, step: Any) -> list[tuple[int, int, int]]:
        """For each element that is not zero, its operand, and there its number and the distance to the next sample."""
        steps = np.zeros_like(start) if step is None else step
        pairs = [(int(n), int(s)) for n, s in zip(start.reshape(-1), steps.reshape(-1), strict=True) if n > 0]
        owners = np.searchsorted(self._starts, [n for n, _ in pairs], side="right") - 1
        return [(int(i), n - self._starts[i], s) for i, (n, s) in zip(owners, pairs, strict=True)]

    def _resolved(self, start: Any, step: Any) -> Numbers:
        found = np.empty(start.size, dtype=object)
        found.fill(0.0)
        used = np.flatnonzero(start.reshape(-1) > 0)
        for place, (i, number, distance) in zip(used, self._owners(start, step), strict=True):
            value = self._values[i]
            if isinstance(value, Computed):
                found[place] = value.elements.reshape(-1)[number]
            elif distance == 0:
                found[place] = self._resolver.shared(value.node, np.array([number]))[0]
            else:
                found[place] = self._resolver.of_sample(
                    value.node, number + distance * np.arange(self._batch), self._target
                )
        return found.reshape(start.shape)

    def _numbers_of_computed(self, x: Computed) -> Tensor:
        size = x.elements.size
        self._take(x, size * self._batch)
        numbers = torch.arange(size, device="cpu").reshape(x.elements.shape) + self._starts[-1]
        if x.axis is None:
            return numbers
        samples = (torch.arange(self._batch, device="cpu") * size).reshape(-1, *(1,) * (numbers.dim() - x.axis))
        return (numbers.unsqueeze(x.axis) + samples).flatten(x.axis, x.axis + 1)

    def _take(self, x: Value, count: int) -> None:
        self._starts.append(self._next)
        self._values.append(x)
        self._next += max(count, 1)


def _split(x: Tensor, axis: int, batch: int) -> Tensor:
    """With the axis as one of samples and one of what each has in it."""
    return x.unflatten(axis, (batch, x.shape[axis] // batch))
