"""Operands of func in a replay: other tensors in place of those of the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from aca_ext.errors import ReplayError
from aca_ext.problem.state import tensors_in
from aca_ext.vector_field.environment import overwritten_message

_METADATA = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")}


class Substitution(TorchFunctionMode):
    """Replaces operands of torch functions by other tensors, and refuses overwritten operands.

    An overwritten tensor may change func's derivatives and leave its values alone. The comparison of states would then
    not notice.
    """

    def __init__(self, substitutes: dict[int, Tensor], overwritten: Sequence[Tensor]) -> None:
        super().__init__()
        self._substitutes = substitutes
        self._overwritten = {id(x) for x in overwritten}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._overwritten and func not in _METADATA:
            for x in tensors_in((args, kwargs or {})):
                if id(x) in self._overwritten:
                    raise ReplayError(overwritten_message(x))
        return func(*self._of(args), **self._of(kwargs or {}))

    def _of(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._substitutes.get(id(x), x)
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._of, x)) if type(x) in (tuple, list) else x
        return {key: self._of(value) for key, value in x.items()} if isinstance(x, dict) else x
