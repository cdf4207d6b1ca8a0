"""The user's f in the backward pass, as the forward pass saw it, and its gradients collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aca_ext.errors import ArgumentTypeError
from aca_ext.modules import holds_script
from aca_ext.runge_kutta import SlopeFunction
from aca_ext.vector_field import AutocastState, RandomState, VectorField

# torch.autograd.grad(tensors, inputs, grad_tensors, allow_unused=True) without its look at the arguments, which takes
# longer than the backward pass of a small layer. Arguments: tensors, grad_tensors, keep_graph, create_graph, inputs,
# allow_unreachable, accumulate_grad.
_run_backward: Callable[..., tuple[Any, ...]] = torch.autograd.Variable._execution_engine.run_backward


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
        if any(p is not c for p, c in zip(params, cut_params, strict=True)) and holds_script(field.func):
            raise ArgumentTypeError(
                "func holds TorchScript whose parameters have hooks, or were computed by other operations, which a "
                'replay cannot reach. Remove the hooks, or use gradient="direct" or func as it was before scripting.'
            )
        cut_args = [cut(arg) for arg in args]
        following = iter(cut_args)
        self.field = field.with_args([next(following) if _has_grad(a) else a for a in field.args])
        self.inputs = [*cut_params, *cut_args]
        self.grads: list[Tensor | None] = [None] * len(self.inputs)
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

    @property
    def n_evals(self) -> int:
        return self.field.n_evals

    @property
    def held(self) -> list[Tensor]:
        """The tensors that f is known to compute with."""
        return [*self.inputs, *(x for _, _, x in self.field.held)]

    @property
    def fastest(self) -> SlopeFunction:
        """What evaluates the next stage with the least in between."""
        return self if self.field.draws_random_numbers else self.field.fastest

    def begin_step(self, random_states: Sequence[RandomState] | None) -> None:
        """Tells the random states that the stages of the step to come were computed from."""
        self._random_states, self._stage = random_states, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The next stage of the step, with its graph; inside ``repeating``."""
        if self._random_states is not None:
            self.field.set_random_state(self._random_states[self._stage])
        self._stage += 1
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


def _has_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
