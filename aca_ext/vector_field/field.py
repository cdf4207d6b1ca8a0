"""The user's func as the solver calls it: with the user's form of the state, validated, counted and repeatable.

Repeatable means that a replay finds what the forward pass found: random numbers, autocast state, training modes and all
other state that func reads. Buffers of modules, such as BatchNorm statistics, change with accepted evaluations alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aca_ext.errors import ArgumentTypeError
from aca_ext.kernels.fused import TorchOperations
from aca_ext.problem.state import Packing
from aca_ext.problem.transforms import refuse_transforms
from aca_ext.vector_field.environment import Environment
from aca_ext.vector_field.holdings import Holdings
from aca_ext.vector_field.module_buffers import (
    Buffer,
    buffers_used_by,
    is_distributed,
    modules_of,
    restore,
    warn_of_batch_statistics,
)
from aca_ext.vector_field.slope_check import Func, checked_slope_function
from aca_ext.vector_field.slope_function import SlopeFunction

RandomState = tuple[Tensor, ...]


class Kept(Protocol):
    """A place where func keeps tensors that it computes."""

    def snapshot(self) -> Callable[[], None]: ...


class VectorField:
    """f(t, y, \\*args) on packed states, with its output checked against the state it was given.

    Attributes:
        n_evals: how often func was called.
        draws_random_numbers: the first evaluation drew from a random generator.
        random_trail: states of the random generators before each evaluation since the list was last emptied; filled
            only if func draws random numbers.
        moving_buffers: buffers of func's modules that the first evaluation changed.
        calls_autograd: func differentiates by itself, so it is evaluated with gradients enabled and a state that
            requires grad.
        reuses_slopes: the slope at the end of a step may serve as the first one of the next step, with its graph.
        holdings: tensors, modules and generators that func holds; None if no backward pass can follow.
        environment: state that func reads, as in the forward pass; None if no backward pass can follow.
        kept: tensors that func keeps from its evaluations; replays leave them unchanged.
    """

    reuses_slopes = True

    def __init__(self, func: Func, args: Sequence[Any], packing: Packing, ops: TorchOperations) -> None:
        self.func, self.args, self.packing = func, tuple(args), packing
        self.draws_random_numbers = False
        self.random_trail: list[RandomState] = []
        self.moving_buffers: list[Tensor] = []
        self._has_been_watched = False
        self._random_state_before: RandomState | None = None
        self.calls_autograd = False
        self.holdings: Holdings | None = None
        self.environment: Environment | None = None
        self.kept: Sequence[Kept] = ()
        self._generators: list[torch.Generator] = []
        self._ops = ops
        self._device = ops.like.device
        self._call = checked_slope_function(func, self.args_of_func, packing, ops)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if self.draws_random_numbers:
            self.random_trail.append(self.random_state())
        if not self.calls_autograd or (torch.is_grad_enabled() and y.requires_grad):
            return self._call(t, y)
        with torch.enable_grad():
            k = self._call(t, y.detach().requires_grad_())
        return k if torch.is_grad_enabled() else k.detach()

    @property
    def n_evals(self) -> int:
        return self._call.n_evals

    @property
    def fastest(self) -> SlopeFunction:
        """The callable that evaluates func with the least overhead."""
        return self if self.draws_random_numbers or self.calls_autograd else self._call

    def admit(self, y: Tensor) -> Tensor:
        """``y`` laid out in memory like the state."""
        return self._ops.admit(y)

    def with_args(self, args: Sequence[Any]) -> VectorField:
        """The same f with other args."""
        other: VectorField = object.__new__(type(self))  # copy.copy takes four times as long
        vars(other).update(vars(self))
        other.args = tuple(args)
        other._call = checked_slope_function(other.func, other.args_of_func, other.packing, other._ops)
        return other

    @property
    def args_of_func(self) -> tuple[Any, ...]:
        """Those of the args that func receives."""
        return self.args

    def begin_step(self, n: int | None) -> None:
        """Tells that the next evaluations belong to accepted step ``n``; None if they belong to no step."""

    @property
    def _roots(self) -> tuple[Any, ...]:
        return self.func, *(arg for arg in self.args if not isinstance(arg, Tensor))

    def check_signature(self) -> None:
        """Raises ArgumentTypeError if func does not take the arguments that it is called with."""
        try:
            signature = inspect.signature(self.func.forward if isinstance(self.func, nn.Module) else self.func)
        except (TypeError, ValueError):
            return  # compiled code may have no signature
        try:
            signature.bind(None, None, *self.args_of_func)
        except TypeError as mismatch:
            given = f" and {len(self.args_of_func)} of args" if self.args_of_func else ""
            raise ArgumentTypeError(
                f"func takes {signature}, but is called as func(t, y, *args) with t, y{given}: {mismatch}. Let func "
                "take both t and y, used or not, and pass whatever else it takes by args=(...)."
            ) from None

    def prepare_replay(self) -> None:
        """Records the objects that func holds and the state that it reads, for a replay when they may have changed.

        A module that the walk does not find is recorded in the first evaluation.
        """
        self.holdings = Holdings(self._roots)
        self._generators = self.holdings.generators
        if isinstance(self.func, nn.Module) and any(map(is_distributed, self.holdings.kinds)):
            for module in modules_of(self.func):
                _check_is_not_distributed(module)
        self.environment = Environment(self.holdings)

    def has_put(self, leaf: Tensor) -> bool:
        """Tells whether func created a leaf and keeps it: nothing held it before the first evaluation."""
        if self.holdings is None or self.holdings.has_seen(leaf):
            return False
        return any(x is leaf for x in self.tensors_held_now())

    def tensors_held_now(self) -> list[Tensor]:
        """Tensors requiring grad that func holds at present."""
        return Holdings(self._roots).tensors

    def take_notes_of(self, other: VectorField) -> None:
        """Copies the records of another field for the same func."""
        self.holdings, self.environment = other.holdings, other.environment
        self._generators = other._generators

    def _note_in_use(self, module: nn.Module) -> None:
        _check_is_not_distributed(module)
        if self.holdings is not None and self.environment is not None and not self.holdings.has_seen(module):
            self.environment.add_module(module)

    def first(self, t: Tensor, y: Tensor, watch: AbstractContextManager[Any] | None = None) -> Tensor:
        """f at the start, evaluated inside ``watch``; records which random generators and buffers it changes."""
        random_state = self._random_state_before = self.random_state()
        self._call.surroundings = watch  # not of the checks, whose operations would count as func's
        try:
            with buffers_used_by(self.func, self._note_in_use) as used:
                k = self(t, y)
        finally:
            self._call.surroundings = None
        refuse_transforms("the slope that func returned", k)
        self.draws_random_numbers = self.has_drawn_since(random_state)
        if self.draws_random_numbers:
            self.random_trail.append(random_state)
        # Batch normalisation changes its statistics without a new version, and its count of batches with one.
        moved = [owned for owned in used if any(b.tensor._version != b.version for b in owned)]
        self.moving_buffers = [b.tensor for owned in moved for b in owned]
        if moved:
            warn_of_batch_statistics(moved)
        self._has_been_watched = True
        return k

    def forget_first(self) -> None:
        """Undoes a failed ``first``, before it is called again."""
        self.random_trail.clear()
        if self._random_state_before is not None:
            self.set_random_state(self._random_state_before)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context of evaluations that are not part of the solution: they change nothing but ``n_evals``."""
        trail = list(self.random_trail)
        watch: AbstractContextManager[list[list[Buffer]]] = (
            nullcontext([]) if self._has_been_watched else buffers_used_by(self.func)
        )
        values = self.buffer_values()
        with watch as used:
            try:
                yield
            finally:
                self.random_trail = trail
                self.restore_buffers(values)
                for owned in used:
                    restore([b.tensor for b in owned], [b.value for b in owned])

    def random_state(self) -> RandomState:
        """States of the random generators of the CPU, of the state's device, and of those that func holds."""
        states = (torch.get_rng_state(), *[generator.get_state() for generator in self._generators])
        return (*states, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else states

    def set_random_state(self, state: RandomState) -> None:
        torch.set_rng_state(state[0])
        for generator, of_generator in zip(self._generators, state[1:], strict=False):
            generator.set_state(of_generator)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[-1], self._device)

    def has_drawn_since(self, state: RandomState) -> bool:
        """Tells whether random numbers were drawn since ``state``."""
        # Bytes, since torch.equal takes longer. The random states are tensors on the CPU, those of a GPU too.
        return any(a.numpy().tobytes() != b.numpy().tobytes() for a, b in zip(state, self.random_state(), strict=True))

    def buffer_values(self) -> list[Tensor] | None:
        """A copy of the buffers that func changes, None if it changes none."""
        return [b.detach().clone() for b in self.moving_buffers] if self.moving_buffers else None

    def restore_buffers(self, values: list[Tensor] | None) -> None:
        if values is not None:
            restore(self.moving_buffers, values)


def _check_is_not_distributed(module: nn.Module) -> None:
    if is_distributed(type(module)):  # type: ignore[arg-type]
        raise ArgumentTypeError(
            f"func is, or holds, a distributed module ({type(module).__name__}), which acts on every backward pass "
            "through it; a solve evaluates func many times. Wrap the module that holds the solve instead."
        )


class AutocastState:
    """State of torch.autocast when this object was created; ``dtype`` is None if it was off."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self.enabled = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type) if self.enabled else None

    def restored(self) -> Any:
        if not self.enabled and not torch.is_autocast_enabled(self._device_type):
            return nullcontext()
        # Without the cache: a weight cast in a pass without a graph must not serve one with.
        return torch.autocast(self._device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)
