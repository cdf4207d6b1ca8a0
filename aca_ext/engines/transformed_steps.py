"""Checkpoints inside transforms of torch.func: a step whose reverse pass evaluates it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ReplayError
from aca_ext.gradients.checkpointed_function import Tensors, checkpointed, with_constants
from aca_ext.problem.transforms import allows_repetition, has_gradient
from aca_ext.vector_field.contents import Change, put_back
from aca_ext.vector_field.field import AutocastState
from aca_ext.vector_field.holdings import Holdings
from aca_ext.vector_field.slope_function import SlopeFunction
from aca_ext.vector_field.used_tensors import UnknownTensorError, UsedTensors

Advance = Callable[..., Tensors]

_MOST_FAILURES = 3
_NUMBERS = (int, float, bool, complex, str, type(None))
_OTHER_TENSORS = (
    "func does not use the same tensors in the reverse pass as it did in the solve, so that a gradient would be lost. "
    'Compute what it uses before the solve or in each evaluation, or use gradient="direct".'
)


class CheckpointedSteps:
    """Steps of a solve inside transforms, of which a reverse pass keeps the states between them alone.

    A derivative with respect to a tensor that func captured needs that tensor as an input of the step. The first step
    is made with its graph, and shows which these are. So is every step in which func uses a new one, and all steps of a
    func that could not be repeated later: one that keeps what it computed, or hides what it depends on.

    Args:
        f: func on packed states.
        func, args: the user's function and its arguments, which may hold the tensors.
    """

    def __init__(self, f: SlopeFunction, func: Callable[..., Any], args: Sequence[Any]) -> None:
        self._used = UsedTensors()
        self._f = f
        self._contents = Holdings((func, *(arg for arg in args if not isinstance(arg, Tensor)))).contents
        self._contents.watch_tensors()
        self._autocast: AutocastState | None = None
        self._n_tried = -1  # number of used tensors with which a trial has succeeded
        self._n_failures = 0
        self._has_repeated = False  # func may hold results without derivative since then
        self.is_repeatable = allows_repetition()

    def __call__(self, advance: Advance, *x: Tensor) -> Tensors:
        """``advance(f, *x)``, the tensors that a step computes."""
        self._autocast = self._autocast or AutocastState(x[0].device.type)
        if self.is_repeatable and self._n_tried == len(self._used.tensors):
            try:
                return checkpointed(_RepeatedStep(self, advance, self._n_tried), *x, *self._used.tensors)
            except UnknownTensorError:
                self._fail(is_final=self._used.keeps)
            except Exception:  # an error of func comes again in the step with its graph
                self._fail(is_final=True)
        if self.is_repeatable:
            return self._with_graph(advance, x)
        return advance(self._used.observed(self._f) if self._has_repeated else self._f, *x)

    def _with_graph(self, advance: Advance, x: Tensors) -> Tensors:
        last: list[Tensors] = []
        observed = self._used.observed(self._f)

        def f(t: Tensor, y: Tensor) -> Tensor:
            last[:] = [(t, y)]
            return observed(t, y)

        try:
            found = advance(f, *x)
        except Exception:  # func may refuse to be observed, as code of torch.compile does
            if self._has_repeated:
                raise
            self._fail(is_final=True)
            return advance(self._f, *x)
        self.is_repeatable = self._is_plain() and any(map(has_gradient, (*x, *self._used.tensors)))
        if self.is_repeatable and last:
            self._try(*last[0])
        return found

    def _fail(self, is_final: bool) -> None:
        """Counts a failure, and removes what a repeated evaluation has left behind, which has no derivative."""
        self._n_failures += 1
        self.is_repeatable = not is_final and self._n_failures < _MOST_FAILURES
        for change in map(Change._make, self._contents.changes()):
            if not isinstance(change.now, _NUMBERS):
                change.put(change.before)

    def _is_plain(self) -> bool:
        """Tells whether func shows what it uses, and changed nothing but numbers, so that it finds the same again."""
        changes = (Change._make(change) for change in self._contents.changes())
        return not (
            self._used.keeps
            or self._used.hides
            or self._contents.changed_tensors(True)
            or any(not isinstance(change.now, _NUMBERS) for change in changes)
        )

    def _try(self, t: Tensor, y: Tensor) -> None:
        """Tries a derivative of one evaluation, whose value must be a constant if all that is known is one."""
        n, self._has_repeated = len(self._used.tensors), True

        def f(y: Tensor, *values: Tensor) -> Tensors:
            return (self._used.replaced(self._f, values, set())(t, y),)

        constants = [x.detach() for x in (y, *self._used.tensors)]
        moving = [i for i, x in enumerate(constants) if x.is_floating_point() or x.is_complex()]
        try:
            with self.restored():
                function = with_constants(f, constants, moving)
                (k,), pull_back, *_ = torch.func.vjp(function, *(constants[i] for i in moving))
                pull_back((torch.zeros_like(k),))
            is_hidden = has_gradient(k)
        except UnknownTensorError:
            self._fail(is_final=self._used.keeps)
        except Exception:  # func cannot be differentiated this way; if it can be otherwise, its graph serves
            self._fail(is_final=True)
        else:
            self._n_tried = n
            if is_hidden:
                self._fail(is_final=True)

    def replaced(self, values: Sequence[Tensor], used: set[int]) -> SlopeFunction:
        """f with ``values`` in place of the tensors that func uses; adds the indices of those that it used."""
        return self._used.replaced(self._f, values, used)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context in which all that func's code reaches is as it was before the solve."""
        assert self._autocast is not None
        with put_back(lambda: [Change._make(change) for change in self._contents.changes()]), self._autocast.restored():
            yield


class _RepeatedStep:
    """A step as a function of tensors alone: those of the step, and the first ``n_used`` that func uses."""

    def __init__(self, steps: CheckpointedSteps, advance: Advance, n_used: int) -> None:
        self._steps, self._advance, self._n_used = steps, advance, n_used
        self._used: set[int] | None = None  # in the solve

    def __call__(self, *x: Tensor) -> Tensors:
        n, used = len(x) - self._n_used, set[int]()
        f = self._steps.replaced(x[n:], used)
        if self._used is None:
            found = self._advance(f, *x[:n])
            self._used = used
            return found
        try:
            with self._steps.restored():
                found = self._advance(f, *x[:n])
        except UnknownTensorError:
            raise ReplayError(_OTHER_TENSORS) from None
        if used != self._used:
            raise ReplayError(_OTHER_TENSORS)
        return found
