"""The user's f as the solver sees it: called with the user's form of the state, checked, counted, and repeatable.

Repeatable means that a replay sees what the forward pass saw: the random numbers, the autocast state, and module
buffers (BatchNorm statistics) that only accepted evaluations may move.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from aca_ext.errors import ArgumentTypeError, SlopeError
from aca_ext.ops import TorchOperations, slope_function
from aca_ext.runge_kutta import SlopeFunction
from aca_ext.state import Packing, State
from aca_ext.transforms import refuse_transforms

# torch.autograd.grad(tensors, inputs, grad_tensors, allow_unused=True) without its look at the arguments, which takes
# longer than the backward pass of a small layer. Arguments: tensors, grad_tensors, keep_graph, create_graph, inputs,
# allow_unreachable, accumulate_grad.
_run_backward: Callable[..., tuple[Any, ...]] = torch.autograd.Variable._execution_engine.run_backward

Func = Callable[..., State]
RandomState = tuple[Tensor, ...]


class VectorField:
    """f(t, y, \\*args) on packed states, with its output checked against the state it was given.

    Attributes:
        n_evals: how often func was called.
        draws_random_numbers: its first evaluation moved a random generator.
        random_trail: the random generators' states before each evaluation since the list was last emptied, where func
            draws random numbers.
        moving_buffers: buffers of func's modules that its first evaluation changed.
        held: the parameters and buffers that func's modules hold in the forward pass.
    """

    def __init__(self, func: Func, args: Sequence[Any], packing: Packing, ops: TorchOperations) -> None:
        self.func, self.args, self.packing = func, tuple(args), packing
        self.draws_random_numbers = False
        self.random_trail: list[RandomState] = []
        self.moving_buffers: list[Tensor] = []
        self._has_been_watched = False
        self.held: list[_Held] = []
        self._ops = ops
        self._device = ops.like.device
        self._call = self._bound()

    def _bound(self) -> Any:
        """func with its args, checks and count. It holds no reference to this object, which would be a cycle."""
        like, packing = self._ops.like, self.packing
        check = _SlopeCheck(packing, self._ops)
        func = self.func if packing.is_trivial else partial(_unpacked, self.func, packing, check)
        versioned = not like.is_inference() and not torch.is_inference_mode_enabled()
        return slope_function(func, self.args, like, check, _changed_in_place, versioned)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if self.draws_random_numbers:
            self.random_trail.append(self.random_state())
        return self._call(t, y)

    @property
    def n_evals(self) -> int:
        return self._call.n_evals

    @property
    def fastest(self) -> SlopeFunction:
        """What evaluates func with the least in between."""
        return self if self.draws_random_numbers else self._call

    def admit(self, y: Tensor) -> Tensor:
        """``y`` laid out in memory like the state."""
        return self._ops.admit(y)

    def with_args(self, args: Sequence[Any]) -> VectorField:
        """The same f with other args."""
        other = copy.copy(self)
        other.args = tuple(args)
        other._call = other._bound()
        return other

    def check_signature(self) -> None:
        """Raises ArgumentTypeError where func does not take the arguments that it is called with."""
        try:
            signature = inspect.signature(self.func.forward if isinstance(self.func, nn.Module) else self.func)
        except (TypeError, ValueError):
            return  # compiled code may not tell
        try:
            signature.bind(None, None, *self.args)
        except TypeError as mismatch:
            given = f" and {len(self.args)} of args" if self.args else ""
            raise ArgumentTypeError(
                f"func takes {signature}, but is called as func(t, y, *args) with t, y{given}: {mismatch}. Let func "
                "take both t and y, used or not, and pass whatever else it takes by args=(...)."
            ) from None

    def prepare_replay(self) -> None:
        """Notes what func's modules hold now, for evaluations when they may hold something else.

        Those of another callable than a module are noted in its first evaluation.
        """
        if isinstance(self.func, nn.Module):
            for module in self.func.modules():
                self._note(module)

    def _note(self, module: nn.Module) -> None:
        if _is_distributed(type(module)):  # type: ignore[arg-type]
            raise ArgumentTypeError(
                f"func is, or holds, a distributed module ({type(module).__name__}), which acts on every backward pass "
                "through it; a solve evaluates func many times. Wrap the module that holds the solve instead."
            )
        for members in (module._parameters, module._buffers):
            if members:
                self.held += [(members, name, x) for name, x in members.items() if x is not None]

    def first(self, t: Tensor, y: Tensor) -> Tensor:
        """f at the start, noting which random generators and buffers it moves."""
        random_state = self.random_state()
        with _buffers_used_by(self.func, self._note) as used:
            k = self(t, y)
        refuse_transforms("the slope that func returned", k)
        self.draws_random_numbers = self.has_drawn_since(random_state)
        if self.draws_random_numbers:
            self.random_trail.append(random_state)
        # Batch normalisation moves its statistics without a new version, but counts its batches with one.
        moved = [owned for owned in used if any(b.tensor._version != b.version for b in owned)]
        self.moving_buffers = [b.tensor for owned in moved for b in owned]
        self._has_been_watched = True
        return k

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For evaluations that are no part of the solution: they leave no trace but in ``n_evals``."""
        trail = list(self.random_trail)
        watch: AbstractContextManager[list[list[_Buffer]]] = (
            nullcontext([]) if self._has_been_watched else _buffers_used_by(self.func)
        )
        values = self.buffer_values()
        with watch as used:
            try:
                yield
            finally:
                self.random_trail = trail
                self.restore_buffers(values)
                for owned in used:
                    _restore([b.tensor for b in owned], [b.value for b in owned])

    def random_state(self) -> RandomState:
        """State of the random generators of the CPU and of the state's device."""
        states = (torch.get_rng_state(),)
        return (*states, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else states

    def set_random_state(self, state: RandomState) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self._device)

    def has_drawn_since(self, state: RandomState) -> bool:
        """Whether a random generator has moved since ``state``."""
        return not all(torch.equal(a, b) for a, b in zip(state, self.random_state(), strict=True))

    def buffer_values(self) -> list[Tensor] | None:
        """A copy of the buffers that func moves, or None where it moves none."""
        return [b.detach().clone() for b in self.moving_buffers] if self.moving_buffers else None

    def restore_buffers(self, values: list[Tensor] | None) -> None:
        if values is not None:
            _restore(self.moving_buffers, values)


class _SlopeCheck:
    """Makes the packed slope of what func returned, converted in layout and, under autocast, in dtype alone."""

    def __init__(self, packing: Packing, ops: TorchOperations) -> None:
        self.packing, self._ops = packing, ops
        self._dtype, self._device = ops.like.dtype, ops.like.device

    def __call__(self, k: Any) -> Tensor:
        packing = self.packing
        parts = self._parts(k)
        given: list[Tensor] = []
        for i, (part, shape) in enumerate(zip(parts, packing.shapes, strict=True)):
            where = f"component {i} of func's output" if packing.is_tuple else "func's output"
            if not isinstance(part, Tensor):
                raise SlopeError(f"{where} is of type {type(part).__name__}; it must be a tensor.")
            expected = shape[:-1] if packing.is_complex else shape
            if part.shape != expected:
                raise SlopeError(
                    f"{where} has shape {tuple(part.shape)}; the state has {tuple(expected)}. The derivative has the "
                    "shape of the state; nothing is broadcast."
                )
            if part.layout is not torch.strided:
                raise SlopeError(f"{where} has layout {part.layout}; return a dense tensor, .to_dense().")
            if part.device != self._device:
                raise SlopeError(f"{where} is on {part.device}; the state is on {self._device}. Move one to the other.")
            given.append(self._of_state_dtype(part, where))
        packed = packing.pack(tuple(given) if packing.is_tuple else given[0])
        return self._ops.admit(packed)

    def _parts(self, k: Any) -> Sequence[Any]:
        packing = self.packing
        if not packing.is_tuple:
            if isinstance(k, (tuple, list)):
                raise SlopeError(f"func returned a {type(k).__name__}; y0 is a tensor, so func returns one tensor.")
            return (k,)
        if not isinstance(k, (tuple, list)):
            raise SlopeError(
                f"func returned a {type(k).__name__}; y0 is {packing.describe()}, so func returns a tuple."
            )
        if len(k) != len(packing.shapes):
            raise SlopeError(f"func returned {len(k)} components; y0 is {packing.describe()}.")
        return k

    def _of_state_dtype(self, part: Tensor, where: str) -> Tensor:
        real, packing = self._dtype, self.packing
        expected = torch.zeros((), dtype=real).to(torch.complex64).dtype if packing.is_complex else real
        if packing.is_complex:
            expected = {torch.float32: torch.complex64, torch.float64: torch.complex128}.get(real, expected)
        if part.dtype == expected:
            return part
        if part.is_floating_point() and torch.is_autocast_enabled(self._device.type):
            return part.to(expected)
        raise SlopeError(
            f"{where} has dtype {part.dtype}; the state has {expected}. Convert y0 or the output, for example with "
            f".to({expected}). (Under torch.autocast a lower precision is converted for you.)"
        )


def _unpacked(func: Func, packing: Packing, check: _SlopeCheck, t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return check(func(t, packing.unpack(y), *args))


def _changed_in_place() -> None:
    raise SlopeError(
        "func changed its state argument in place, which would corrupt the solution. "
        "Work on a copy: y = y.clone(), or use the out-of-place operation."
    )


class Replay:
    """f in the backward pass: stages evaluated with their graphs under the forward's conditions, and pulled back.

    Args:
        params: what f depends on by itself, as found by the forward pass.
        cut: makes of a tensor with a history one without, through which gradients go no further. Used for tensor args
            and for params that were computed by other operations: their history may hold other params, and belongs to
            the graph outside. So do hooks.
        is_captured: cut every param, so that no node of a graph is older than the capture that evaluations are part of.

    Attributes:
        inputs: what gradients are collected for besides the state: params and tensor args, those with a history cut.
        grads: their gradients so far, None for one that f has not depended on.
        n_evals: how often func was called.
    """

    def __init__(
        self,
        field: VectorField,
        params: Sequence[Tensor],
        args: Sequence[Tensor],
        autocast: AutocastState,
        cut: Callable[[Tensor], Tensor] | None = None,
        is_captured: bool = False,
    ) -> None:
        cut = cut or (lambda x: x.detach().requires_grad_())
        # Hooks on a leaf are for its whole gradient, which they see outside.
        cut_params = [p if p.is_leaf and not p._backward_hooks and not is_captured else cut(p) for p in params]
        cut_args = [cut(arg) for arg in args]
        following = iter(cut_args)
        self.field = field.with_args([next(following) if _has_grad(a) else a for a in field.args])
        self.inputs = [*cut_params, *cut_args]
        self.grads: list[Tensor | None] = [None] * len(self.inputs)
        self.n_evals = 0
        self._autocast = autocast
        self._random_states: Sequence[RandomState] | None = None
        self._stage = 0
        # func holds the originals: wherever it uses one, it is to use the cut one. A leaf that is an arg counts too.
        originals = [*params, *(a for a in field.args if _has_grad(a))]
        self._substitutes = {id(x): c for x, c in zip(originals, self.inputs, strict=True) if x is not c}
        # What a module held in the forward pass alone (torch.func.functional_call) takes the place of what it holds.
        for members, name, tensor in field.held:
            now = members.get(name)
            if now is not None and now is not tensor:
                self._substitutes[id(now)] = self._substitutes.get(id(tensor), tensor)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """The forward pass's conditions; what replays move, random generators and buffers, is as before afterwards."""
        field = self.field
        substitution = _Substitution(self._substitutes) if self._substitutes else nullcontext()
        buffers = field.buffer_values()
        random_state = field.random_state() if field.draws_random_numbers else None
        try:
            with torch.enable_grad(), self._autocast.restored(), substitution:
                yield
        finally:
            field.restore_buffers(buffers)
            if random_state is not None:
                field.set_random_state(random_state)

    def begin_step(self, random_states: Sequence[RandomState] | None) -> None:
        """Tells the random states that the stages of the step to come were computed from."""
        self._random_states, self._stage = random_states, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The next stage of the step, with its graph; inside ``repeating``."""
        if self._random_states is not None:
            self.field.set_random_state(self._random_states[self._stage])
        self._stage += 1
        self.n_evals += 1
        return self.field(t, y)

    def pull_back(self, y: Tensor, k: Tensor | Sequence[Tensor], grad_k: Tensor | Sequence[Tensor]) -> Tensor | None:
        slopes, cotangents = ((k,), (grad_k,)) if isinstance(k, Tensor) else (tuple(k), tuple(grad_k))
        v, *grads = _run_backward(slopes, cotangents, False, False, (y, *self.inputs), True, False)
        self._add(grads)
        return v

    def _add(self, grads: Sequence[Tensor | None]) -> None:
        totals: list[Tensor] = []
        terms: list[Tensor] = []
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            total = self.grads[i]
            if total is None:
                self.grads[i] = grad.clone()  # autograd may hand out one tensor twice: add only into our own
            else:
                totals.append(total)
                terms.append(grad)
        if totals:
            torch._foreach_add_(totals, terms)


class _Substitution(TorchFunctionMode):
    """Gives torch functions other tensors in place of some of their operands."""

    def __init__(self, substitutes: dict[int, Tensor]) -> None:
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._of(args), **self._of(kwargs or {}))

    def _of(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._substitutes.get(id(x), x)
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._of, x)) if type(x) in (tuple, list) else x
        return {key: self._of(value) for key, value in x.items()} if isinstance(x, dict) else x


class AutocastState:
    """torch.autocast as it was when this object was made."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self._dtype = torch.get_autocast_dtype(device_type) if self.enabled else None

    def restored(self) -> Any:
        if not self.enabled and not torch.is_autocast_enabled(self._device_type):
            return nullcontext()
        # Without the cache: a weight cast in a pass without a graph must not serve one with.
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self.enabled, cache_enabled=False)


def _has_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


@dataclass(frozen=True)
class _Buffer:
    """A module's buffer, and its version and value before an evaluation."""

    tensor: Tensor
    version: int
    value: Tensor


@lru_cache(maxsize=1024)
def _is_distributed(kind: type[nn.Module]) -> bool:
    """Whether modules of this class average or gather gradients (told by name: importing them takes long)."""
    names = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
    return any(base.__name__ in names and base.__module__.startswith("torch.") for base in kind.__mro__)


# Where a module keeps a parameter or buffer, its name, and the tensor.
_Held = tuple[Mapping[str, Tensor | None], str, Tensor]


@contextmanager
def _buffers_used_by(func: Any, on_module: Callable[[nn.Module], None] | None = None) -> Iterator[list[list[_Buffer]]]:
    """The buffers of func's modules in training mode, module by module.

    Those of a module are known; what another callable uses is seen by a hook while it runs, and told ``on_module``.
    """
    used: list[list[_Buffer]] = []
    known: set[int] = set()
    thread = threading.get_ident()

    def note_buffers(module: nn.Module) -> None:
        if module.training and module._buffers:
            buffers = [b for b in module.buffers(recurse=False) if not b.is_inference()]
            used.append([_Buffer(b, b._version, b.detach().clone()) for b in buffers])

    def note(module: nn.Module, _: Any = None) -> None:
        if id(module) in known or threading.get_ident() != thread:
            return
        known.add(id(module))
        if on_module is not None:
            on_module(module)
        note_buffers(module)

    if isinstance(func, nn.Module):
        for module in func.modules():
            note_buffers(module)
        yield used
        return
    handle = register_module_forward_pre_hook(note)
    try:
        yield used
    finally:
        handle.remove()


def _restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        # Through .data, as batch normalisation writes its statistics: graphs that saved them do not depend on them.
        buffer.data.copy_(value)
