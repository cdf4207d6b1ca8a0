"""What an evaluation of func does, operation by operation: whether its captured form still stands, and whether it can
be captured at all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from aca_ext.errors import GraphError
from aca_ext.state import tensors_in

_HINT = 'Use engine="eager", or change func.'
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_MASKS = (torch.bool, torch.uint8)
# Random numbers are told by the generators that moved: attention without dropout is tagged as if it drew some.
_REASONS = {
    torch.Tag.data_dependent_output: "decides on the host by what a tensor holds",
    torch.Tag.dynamic_output_shape: "makes a tensor whose shape depends on what another holds",
}


class Trace(TorchDispatchMode):
    """The operations of one evaluation with all that they were given, as one hashable value.

    Operands are told apart by where they come from: time, state, args, an earlier operation, or memory that func holds.
    A number that func computes in Python shows as an operand, and so does a tensor that took the place of another.

    Attributes:
        held: tensors that func uses and neither was given nor computed.

    Raises:
        GraphError: an operation cannot be repeated from a capture.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.held: list[Tensor] = []
        self._device = given[0].device
        self._operations: list[Hashable] = []
        self._names: dict[int, Hashable] = {_memory_of(x): ("given", i) for i, x in enumerate(given)}
        self._alive: list[Tensor] = list(given)  # so that memory stays what it was named for

    def key(self) -> Hashable:
        """Equal for two evaluations that did the same to the same memory."""
        return tuple(self._operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tag, reason in _REASONS.items():
            if tag in func.tags and not _is_gather(func, args):
                raise GraphError(f"func {reason} ({func}), which a captured step cannot repeat. {_HINT}")
        if func is torch.ops.aten.lift_fresh.default:  # a constant that func makes anew: what counts is its value
            if args[0].device.type != "cpu":  # the copy there does not show
                raise GraphError(
                    f"func makes a tensor of Python's numbers on the device. Make it once, outside. {_HINT}"
                )
            given: Hashable = (func, repr(args[0].tolist()), args[0].dtype)
        else:
            given = (func, self._described(args), self._described(kwargs or {}))
        if any(self._is_foreign(x) for x in _written(func, args, kwargs or {})):
            raise GraphError(f"func changes a tensor that it holds ({func}). {_HINT}")
        result = func(*args, **(kwargs or {}))
        if _crosses(func, tensors_in((args, kwargs or {}, result if func in _COPIES else None))):
            raise GraphError(f"func copies between the host and the device ({func}). {_HINT}")
        self._name_results(result)
        self._operations.append(given)
        return result

    def _is_foreign(self, x: Tensor) -> bool:
        name = self._names[_memory_of(x)]
        return isinstance(name, tuple) and name[0] in ("given", "held")

    def _described(self, x: Any) -> Hashable:
        if isinstance(x, Tensor):
            return self._described_tensor(x)
        if isinstance(x, (tuple, list)):
            return tuple(map(self._described, x))
        if isinstance(x, dict):
            return tuple((name, self._described(value)) for name, value in x.items())
        if isinstance(x, torch.Generator):
            raise GraphError(f"func draws random numbers, which a captured step cannot repeat. {_HINT}")
        # By type too, since 1, 1.0 and True are equal; and by its digits, since nan is not equal to itself.
        return type(x), repr(x) if isinstance(x, (int, float, complex)) else x

    def _described_tensor(self, x: Tensor) -> Hashable:
        memory = _memory_of(x)
        if memory not in self._names:
            self._names[memory] = ("held", x.untyped_storage().data_ptr())
            self._alive.append(x)
            self.held.append(x)
        layout = tuple(x.shape), tuple(x.stride()), x.storage_offset(), x.dtype, x.device
        # A number in the host's memory goes into a launch on a GPU by its value.
        value = repr(x.item()) if x.dim() == 0 and x.device.type == "cpu" != self._device.type else None
        return self._names[memory], layout, value

    def _name_results(self, result: Any) -> None:
        for i, x in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(x, Tensor) and _memory_of(x) not in self._names:
                self._names[_memory_of(x)] = ("made", len(self._operations), i)
                self._alive.append(x)


class TracedFunction:
    """func, traced wherever it is called.

    Attributes:
        trace: of the last evaluation.
    """

    def __init__(self, func: Callable[..., Any], around: Callable[[], Any]) -> None:
        self._func, self._around = func, around
        self.trace: Trace | None = None
        self._had_grad = False

    def again(self, t: Tensor, y: Any, *args: Any) -> Trace:
        """The trace of one more evaluation, under the conditions of the last."""
        before = self.trace
        with torch.set_grad_enabled(self._had_grad):
            self(t, y, *args)
        found, self.trace = self.trace, before
        assert found is not None
        return found

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        # Copies, since func may hold what it is given too, or another part of the same memory: that is another operand.
        y = tuple(map(torch.clone, y)) if isinstance(y, tuple) else y.clone()
        args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        self.trace = Trace([t, *tensors_in((y, [a for a in args if isinstance(a, Tensor)]))])
        self._had_grad = torch.is_grad_enabled()
        with self._around(), self.trace:
            return self._func(t, y, *args)


def is_tracing() -> bool:
    """Whether the caller is part of an evaluation that is traced."""
    return any(isinstance(mode, Trace) for mode in _get_current_dispatch_mode_stack())


def _is_gather(func: Any, args: Sequence[Any]) -> bool:
    """Whether it is x[i] with numbers: only masks make the shape depend on what they hold."""
    return func is torch.ops.aten.index.Tensor and all(i is None or i.dtype not in _MASKS for i in args[1])


def _crosses(func: Any, operands: Iterable[Tensor]) -> bool:
    """Whether an operation copies from the host to the device or back, as all but taking a number there does.

    The copy waits, which a capture may not, or leaves a host's memory in the capture that is gone when it is repeated.
    """
    devices = {x.device.type for x in operands if func in _COPIES or x.dim() or x.device.type != "cpu"}
    return "cpu" in devices and len(devices) > 1


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    """The operands that an operation changes, lists of them and out=... included."""
    arguments = func._schema.arguments
    operands = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    changed = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors_in([operands.get(name) for name in changed])


def _memory_of(x: Tensor) -> int:
    if x.layout is not torch.strided:
        raise GraphError(f"func works with a tensor of layout {x.layout}, which a captured step cannot. {_HINT}")
    return int(x.untyped_storage()._cdata)
