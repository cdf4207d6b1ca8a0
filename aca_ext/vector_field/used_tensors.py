"""Search for tensors of transforms that func uses besides its arguments, and evaluations with others in their place.

Inside torch.func a tensor that func captured cannot be seen in an autograd graph alone: it may belong to several
levels, and func may hold it only for as long as ``functional_call`` lasts. So operands of torch functions are observed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from aca_ext.errors import ArgumentValueError
from aca_ext.problem.state import tensors_in
from aca_ext.problem.transforms import address_of, is_wrapped, level_of_transforms, under_levels_above
from aca_ext.vector_field.slope_function import SlopeFunction
from aca_ext.vector_field.substitution import METADATA

_KEEPS = (
    "func keeps a tensor that it computed in an earlier evaluation, which has no derivative. Compute it in each "
    'evaluation, or before the solve, or use gradient="direct".'
)


class UnknownTensorError(Exception):
    """func used a tensor with a derivative, or a batched one, that was not known."""


class _Made(NamedTuple):
    """A result of an evaluation, the number of that evaluation, and its kind: that of ``replaced``, or ``observed``."""

    reference: weakref.ref[Tensor]
    number: int
    is_repeated: bool


class UsedTensors:
    """Tensors besides its arguments that func uses and that carry a derivative or are batched, as far as known.

    Attributes:
        tensors: these, in the order of their first use.
        keeps: func used a tensor that an earlier evaluation had computed.
        hides: a transform inside func wrapped a tensor, so that no other can take its place.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.keeps = self.hides = False
        self._index: dict[int, int] = {}
        self._made: dict[int, _Made] = {}
        self._constants: dict[int, Tensor] = {}  # that transforms inside func wrap
        self._number, self._is_repeated = 0, False

    def observed(self, f: SlopeFunction) -> SlopeFunction:
        """``f``, whose evaluations add tensors that are new.

        Raises:
            ArgumentValueError: in an evaluation, if func uses a tensor that a repeated evaluation had computed, which
                has no derivative.
        """

        def one(x: Tensor) -> Tensor:
            if id(x) in self._index or self._is_known(x):
                return x
            if self._is_kept(x) and self._made[id(x)].is_repeated:
                raise ArgumentValueError(_KEEPS)
            if under_levels_above(x, self._level) is not x:
                self.hides = True
            else:
                self._index[id(x)] = len(self.tensors)
                self.tensors.append(x)
            return x

        return partial(self._evaluate, f, one, False)

    def replaced(self, f: SlopeFunction, values: Sequence[Tensor], used: set[int]) -> SlopeFunction:
        """``f`` with ``values`` in place of the first tensors; adds the indices of those that it uses to ``used``.

        An evaluation raises UnknownTensorError if it uses a tensor that is new.
        """

        def one(x: Tensor) -> Tensor:
            i = self._index.get(id(x), len(values))
            if i < len(values):
                used.add(i)
                return values[i]
            if not self._is_known(x):
                raise UnknownTensorError
            return x

        return partial(self._evaluate, f, one, True)

    def _evaluate(
        self, f: SlopeFunction, one: Callable[[Tensor], Tensor], is_repeated: bool, t: Tensor, y: Tensor
    ) -> Tensor:
        self._made = {key: made for key, made in self._made.items() if made.reference() is not None}
        self._number += 1
        self._is_repeated, self._level, self._y = is_repeated, level_of_transforms(), y
        for x in (t, y):
            self.note_result(x)
        operands = _Operands(one, self.note_result)
        _active.evaluations.append(operands)
        try:
            with operands:
                k = one(f(t, y))
        finally:
            _active.evaluations.pop()
            del self._y
            if not is_repeated:  # func may hold y0, which its caller made
                for x in (t, y):
                    self._made.pop(id(x), None)
        return k

    def note_result(self, x: Tensor) -> None:
        """Records a tensor that the evaluation at hand was given, or has computed."""
        if id(x) not in self._index:
            self._made[id(x)] = _Made(weakref.ref(x), self._number, self._is_repeated)

    def _is_known(self, x: Tensor) -> bool:
        """Tells whether an operand is one of this evaluation, or a constant."""
        if self._is_of_evaluation(x):
            return True
        if self._is_kept(x):
            self.keeps = True
            return False
        if not is_wrapped(x):
            return not x.requires_grad
        outer = under_levels_above(x, self._level)
        return outer is not x and self._is_known_outside(outer)

    def _is_known_outside(self, x: Tensor) -> bool:
        """As ``_is_known``, for what a transform inside func has wrapped.

        Forward mode wraps a view of its input, known by its memory. In a repeated evaluation, outside of some levels,
        a new tensor looks like a constant, so constants are those of the observed evaluations.
        """
        if self._is_of_evaluation(x):
            return True
        if not (self._is_repeated or is_wrapped(x) or x.requires_grad):
            self._constants[id(x)] = x
        if self._constants.get(id(x)) is x:
            return True
        address = address_of(x)
        return 0 != address == address_of(self._y) and all(address != address_of(other) for other in self.tensors)

    def _is_of_evaluation(self, x: Tensor) -> bool:
        made = self._made.get(id(x))
        return made is not None and made.number == self._number and made.reference() is x

    def _is_kept(self, x: Tensor) -> bool:
        made = self._made.get(id(x))
        return made is not None and made.number < self._number and made.reference() is x


class _Operands(TorchFunctionMode):
    """Passes each operand of torch functions through ``one``, and reports their results."""

    def __init__(self, one: Callable[[Tensor], Tensor], note_result: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._one, self.note_result = one, note_result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METADATA:
            return func(*args, **(kwargs or {}))
        result = func(*self._of(args), **self._of(kwargs or {}))
        for x in (result,) if isinstance(result, Tensor) else tensors_in(result):
            self.note_result(x)
        return result

    def _of(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._one(x)
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._of, x)) if type(x) in (tuple, list) else x
        return {key: self._of(value) for key, value in x.items()} if isinstance(x, dict) else x


class _Active(threading.local):
    """The evaluations of a thread that are watched, the innermost last."""

    def __init__(self) -> None:
        self.evaluations: list[_Operands] = []


_active = _Active()


def note_made(*tensors: Tensor) -> None:
    """Tells that func has computed these, where no torch function returns them, as from a transform inside func."""
    for operands in _active.evaluations:
        for x in tensors:
            operands.note_result(x)
