"""Trace of the operations in an evaluation of func.

It tells whether func can be captured, and whether an earlier capture of func is still valid.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from aca_ext.errors import GraphError
from aca_ext.problem.state import tensors_in
from aca_ext.problem.trees import map_leaves

_HINT = 'Use engine="eager", or change func.'
_NUMBERS = (int, float, bool, complex)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_MASKS = (torch.bool, torch.uint8)
# Random numbers are found by generators that moved. A tag would not do: attention without dropout has it too.
_REASONS = {
    torch.Tag.data_dependent_output: "decides on the host by the value of a tensor",
    torch.Tag.dynamic_output_shape: "makes a tensor whose shape depends on the values of another",
}


class Trace(TorchDispatchMode):
    """The operations of one evaluation with their operands, as one hashable value.

    A tensor operand is described by its origin: time, state, args, an earlier operation, or memory that func holds. So
    the value changes if func replaces a tensor, or computes another number in Python.

    Attributes:
        held: tensors that func uses and that are neither its arguments nor computed by it.

    Raises:
        GraphError: an operation cannot be repeated from a capture.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.held: list[Tensor] = []
        self._device = given[0].device
        self._operations: list[Hashable] = []
        self._names: dict[int, Hashable] = {_memory_of(x): ("given", i) for i, x in enumerate(given)}
        self._alive: list[Tensor] = list(given)  # keeps memory from being reused under the same name

    def key(self) -> Hashable:
        """A hashable value, equal for two evaluations that applied the same operations to the same memory."""
        return tuple(self._operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = _operator(func)
        if operator.reason is not None and not _is_gather(func, args):
            raise GraphError(f"func {operator.reason} ({func}), which a captured step cannot repeat. {_HINT}")
        if func is torch.ops.aten.lift_fresh.default:  # a constant made in func is compared by value
            if args[0].device.type != "cpu":  # the copy to the device is not dispatched
                raise GraphError(
                    f"func makes a tensor from Python numbers on the device. Make it once, outside of func. {_HINT}"
                )
            given: Hashable = (func, repr(args[0].tolist()), args[0].dtype)
        else:
            given = (func, *map(self._described, args), self._described(kwargs))
        written = [args[i] if i < len(args) else (kwargs or {}).get(name) for i, name in operator.written]
        if any(map(self._is_foreign, tensors_in(written))):
            raise GraphError(f"func changes a tensor that it holds ({func}). {_HINT}")
        result = func(*args, **(kwargs or {}))
        if self._crosses(operator, tensors_in((args, kwargs, result if operator.copies else None))):
            raise GraphError(f"func copies between the host and the device ({func}). {_HINT}")
        self._name_results(result)
        self._operations.append(given)
        return result

    def _crosses(self, operator: _Operator, operands: Sequence[Tensor]) -> bool:
        """Tells whether an operation copies between the host and the device; operands that are numbers do not count.

        Such a copy may synchronise, which a capture forbids, or record a host address that is invalid at the replay.
        """
        if all(x.device == self._device for x in operands):
            return False
        devices = {x.device.type for x in operands if operator.copies or x.dim() or x.device.type != "cpu"}
        return "cpu" in devices and len(devices) > 1

    def _is_foreign(self, x: Tensor) -> bool:
        name: Any = self._names[_memory_of(x)]
        return name[0] in ("given", "held")

    def _described(self, x: Any) -> Hashable:
        if isinstance(x, Tensor):
            return self._described_tensor(x)
        if type(x) in _NUMBERS:  # with the type, since 1 == 1.0 == True; as text, since nan != nan
            return type(x), repr(x)
        if isinstance(x, (tuple, list)):
            return tuple(map(self._described, x))
        if isinstance(x, dict):
            return tuple((name, self._described(value)) for name, value in x.items())
        if isinstance(x, torch.Generator):
            raise GraphError(f"func draws random numbers, which a captured step cannot repeat. {_HINT}")
        return type(x), x

    def _described_tensor(self, x: Tensor) -> Hashable:
        memory = _memory_of(x)
        if memory not in self._names:
            self._names[memory] = ("held", x.untyped_storage().data_ptr())
            self._alive.append(x)
            self.held.append(x)
        layout = x.shape, x.stride(), x.storage_offset(), x.dtype, x.device
        # A launch on a GPU contains a 0-d tensor of the host by its value.
        is_number = x.dim() == 0 and x.device != self._device and x.device.type == "cpu"
        return self._names[memory], layout, repr(x.item()) if is_number else None

    def _name_results(self, result: Any) -> None:
        for i, x in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(x, Tensor) and _memory_of(x) not in self._names:
                self._names[_memory_of(x)] = ("made", len(self._operations), i)
                self._alive.append(x)


class TracedFunction:
    """Wrapper of func that traces every evaluation.

    Attributes:
        trace: trace of the last evaluation.
    """

    def __init__(self, func: Callable[..., Any], around: Callable[[], Any]) -> None:
        self._func, self._around = func, around
        self.trace: Trace | None = None
        self._had_grad = False

    def again(self, t: Tensor, y: Any, *args: Any) -> Trace:
        """Evaluates func once more in the grad mode of the last evaluation and returns the trace."""
        before = self.trace
        with torch.set_grad_enabled(self._had_grad):
            self(t, y, *args)
        found, self.trace = self.trace, before
        assert found is not None
        return found

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        # Copies, to tell an argument from memory that func holds: both may be the same.
        y = map_leaves(torch.clone, y)
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        self.trace = Trace([t, *tensors_in((y, [a for a in args if isinstance(a, Tensor)]))])
        self._had_grad = torch.is_grad_enabled()
        with self._around(), self.trace:
            return self._func(t, y, *args)


def is_tracing() -> bool:
    """Tells whether a trace is active in this thread."""
    return any(isinstance(mode, Trace) for mode in _get_current_dispatch_mode_stack())


class _Operator(NamedTuple):
    """Properties of an operation that are known before it is called."""

    reason: str | None  # reason why it cannot be captured
    written: tuple[tuple[int, str], ...]  # positions and names of the arguments that it changes
    copies: bool  # may copy between devices


@cache
def _operator(func: Any) -> _Operator:
    reasons = [reason for tag, reason in _REASONS.items() if tag in func.tags]
    arguments = enumerate(func._schema.arguments)
    written = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return _Operator(reasons[0] if reasons else None, written, func in _COPIES)


def _is_gather(func: Any, args: Sequence[Any]) -> bool:
    """Tells whether it is x[i] with integer indices: its shape is known, while that of x[mask] depends on values."""
    return func is torch.ops.aten.index.Tensor and all(i is None or i.dtype not in _MASKS for i in args[1])


def _memory_of(x: Tensor) -> int:
    if x.layout is not torch.strided:
        raise GraphError(f"func uses a tensor of layout {x.layout}, which a captured step does not support. {_HINT}")
    return x.untyped_storage()._cdata
