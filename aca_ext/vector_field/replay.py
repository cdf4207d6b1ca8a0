"""The user's f in the backward pass, as the forward pass saw it, and its gradients collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from aca_ext.errors import ArgumentTypeError, ReplayError
from aca_ext.kernels.fused import known_tensors
from aca_ext.problem.state import tensors_in
from aca_ext.vector_field.field import AutocastState, RandomState, VectorField
from aca_ext.vector_field.kept import ANCHOR, USED_AGAIN
from aca_ext.vector_field.module_buffers import holds_script
from aca_ext.vector_field.slope_function import SlopeFunction

# torch.autograd.grad(tensors, inputs, grad_tensors, allow_unused=True) without its look at the arguments, which takes
# longer than the backward pass of a small layer. Arguments: tensors, grad_tensors, keep_graph, create_graph, inputs,
# allow_unreachable, accumulate_grad.
_run_backward: Callable[..., tuple[Any, ...]] = torch.autograd.Variable._execution_engine.run_backward

_FEW = 16


class Replay:
    """f in the backward pass: stages evaluated with their graphs under the forward's conditions, and pulled back.

    Args:
        params: what f depends on by itself, as found by the forward pass.
        cut: makes of a tensor with a history one without, through which gradients go no further. Used for tensor args
            and for params that were computed by other operations: their history may hold other params, and belongs to
            the graph outside. So do hooks.
        cuts_all: cut every param, leaf or not, so that no node of the graph is older than the replay. A capture needs
            that, and so does a gradient that must not run into the history of another input.
        found: leaves besides, that func held and had not used yet. They cost nothing before it does.
        is_checked: func must depend on nothing else that requires grad.

    Attributes:
        inputs: what gradients are collected for besides the state: params, tensor args and found leaves, those with a
            history cut.
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
        cuts_all: bool = False,
        found: Sequence[Tensor] = (),
        is_checked: bool = False,
    ) -> None:
        is_one_graph = cut is not None
        cut = cut or (lambda x: x.detach().requires_grad_())
        # Hooks on a leaf are for its whole gradient, which they see outside. One frozen since required grad before.
        cut_params, cut_found = (
            [p if p.is_leaf and p.requires_grad and not p._backward_hooks and not cuts_all else cut(p) for p in tensors]
            for tensors in (params, found)
        )
        if any(p is not c for p, c in zip(params, cut_params, strict=True)) and holds_script(field.func):
            raise ArgumentTypeError(
                "func holds TorchScript whose parameters have hooks, or were computed by other operations, which a "
                'replay cannot reach. Remove the hooks, or use gradient="direct" or func as it was before scripting.'
            )
        cut_args = [cut(arg) for arg in args]
        following = iter(cut_args)
        self.field = field.with_args([next(following) if _has_grad(a) else a for a in field.args])
        self.inputs = [*cut_params, *cut_args, *cut_found]
        self.grads: list[Tensor | None] = [None] * len(self.inputs)
        # Where all that func can reach was found, a few leaves that it may come to use are no reason to look at graphs.
        holdings = self.field.holdings
        is_complete = holdings is not None and holdings.is_complete and len(found) <= _FEW and not field.kept
        n_found = 0 if is_one_graph or cuts_all or is_complete else len(found)
        self._wanted = list(range(len(self.inputs) - n_found))  # of the inputs; others follow when they are met
        self._targets = self.inputs[: len(self._wanted)]
        self._index: dict[int, int] | None = None  # of the inputs, by the ids of their variables
        self._is_checked = is_checked
        self._known = known_tensors(self._targets) if is_checked and not is_complete else None
        self._put_back: list[Callable[[], None]] = []
        self._autocast = autocast
        self._random_states: Sequence[RandomState] | None = None
        self._stage = 0
        # func holds the originals: wherever it uses one, it is to use the cut one. A leaf that is an arg counts too.
        originals = [*params, *(a for a in field.args if _has_grad(a)), *found]
        self._originals = originals
        self._substitutes = {id(x): c for x, c in zip(originals, self.inputs, strict=True) if x is not c}
        self._overwritten: list[Tensor] = []
        self._makes_late_tensors = False
        if self.field.environment is not None:
            self._makes_late_tensors = self.field.environment.has_late_tensors
            self._substitutes.update((id(x), x.detach()) for x in self.field.environment.unfrozen())
            self._overwritten = self.field.environment.overwritten()

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """The forward pass's conditions; afterwards everything but counters of func is as before."""
        field, environment = self.field, self.field.environment
        self._put_back = [kept.snapshot() for kept in field.kept]
        is_plain = not self._substitutes and not self._overwritten
        operands = nullcontext() if is_plain else _Substitution(self._substitutes, self._overwritten)
        surroundings = nullcontext() if environment is None else environment.restored()
        buffers = field.buffer_values()
        random_state = field.random_state() if field.draws_random_numbers else None
        try:
            with surroundings, torch.enable_grad(), self._autocast.restored(), operands:
                yield
        finally:
            for put_back in self._put_back:
                put_back()
            field.restore_buffers(buffers)
            if random_state is not None:
                field.set_random_state(random_state)

    @property
    def n_evals(self) -> int:
        return self.field.n_evals

    @property
    def held(self) -> list[Tensor]:
        """The tensors that f is known to compute with."""
        return [*self.inputs, *(() if self.field.environment is None else self.field.environment.tensors)]

    @property
    def fastest(self) -> SlopeFunction:
        """The callable that evaluates the next stage with the least overhead."""
        return self if self.field.draws_random_numbers or self._makes_late_tensors else self.field.fastest

    def begin_step(self, random_states: Sequence[RandomState] | None) -> None:
        """Tells the random states that the stages of the step to come were computed from."""
        self._random_states, self._stage = random_states, 0
        for put_back in self._put_back:  # else graphs of all steps would live in what is kept
            put_back()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The next stage of the step, with its graph; inside ``repeating``."""
        if self._random_states is not None:
            self.field.set_random_state(self._random_states[self._stage])
        self._stage += 1
        if self._makes_late_tensors:
            assert self.field.environment is not None
            self.field.environment.begin_evaluation()
        return self.field(t, y)

    def pull_back(self, y: Tensor, k: Tensor | Sequence[Tensor], grad_k: Tensor | Sequence[Tensor]) -> Tensor | None:
        slopes, cotangents = ((k,), (grad_k,)) if isinstance(k, Tensor) else (tuple(k), tuple(grad_k))
        if self._known is not None:
            self.check(slopes, y)
        try:
            v, *grads = _run_backward(slopes, cotangents, False, False, (y, *self._targets), True, False)
        except RuntimeError as error:
            if "use_reentrant=True" in str(error):
                raise ReplayError(
                    "func uses torch.utils.checkpoint with use_reentrant=True, which cannot be part of a replay. Use "
                    "use_reentrant=False."
                ) from error
            if "through the graph a second time" not in str(error):
                raise
            raise ReplayError(
                "func uses a tensor that it computed in another evaluation, or that was computed before the solve and "
                "not found there, whose graph is used up. Compute it in each evaluation, or before the solve and name "
                'it by params=[...], or use gradient="direct".'
            ) from error
        self._add(grads)
        return v

    def check_all(self, outputs: Tensor, start: Tensor) -> None:
        """``check`` for the graph of a whole solve from ``start``."""
        if self._known is not None:
            self._known.add(start)
            self.check(outputs)

    def check(self, slopes: Tensor | tuple[Tensor, ...], y: Tensor | None = None) -> None:
        """Takes in the leaves that func uses for the first time.

        Raises:
            ReplayError: one of them was not found before the solve, so that its gradient would be lost.
        """
        if self._known is None:
            return
        if not self._substitutes:
            others = self._known.others(slopes, y)
        else:
            with torch._C.DisableTorchFunction():  # or it would look at substitutes
                others = self._known.others(slopes, y)
        if others is not None:
            self._admit(self._known, others)

    def _admit(self, known: Any, others: Sequence[Tensor]) -> None:
        if any(leaf is ANCHOR for leaf in others):
            raise ReplayError(USED_AGAIN)
        if self._index is None:
            self._index = {id(_variable(x)): i for i, x in enumerate(self.inputs)}
        for leaf in others:
            i = self._index.get(id(leaf))
            if i is not None:
                if i not in self._wanted:
                    self._wanted.append(i)
                    self._targets.append(self.inputs[i])
            elif not self.field.has_put(leaf):
                raise ReplayError(
                    f"func depends on a tensor of shape {tuple(leaf.shape)} and {leaf.dtype} that requires grad and "
                    "was not found before the solve, so that its gradient would be lost. Name it, with what else "
                    "receives a gradient, by params=[...], or pass it by args=(...)."
                )
            known.add(leaf)

    def check_reached(self, indices: Sequence[int], t: Tensor, y: Tensor) -> None:
        """Checks that inputs that the slope at (t, y) depended on in the forward pass received gradients.

        Raises:
            ReplayError: func depends on them no longer, which makes their gradients wrong.
        """
        missing = [i for i in indices if self.grads[i] is None]
        if not self._is_checked or not missing:
            return
        with torch.enable_grad():
            k = self(t, y.detach().requires_grad_())
        with torch._C.DisableTorchFunction():
            # A cache that the first evaluation filled has a graph of its own, outside, which leads on to them.
            graphs = tuple(x for x in (k, *self._originals) if x.grad_fn is not None)
            for i in missing:
                x = _variable(self.inputs[i])
                if not known_tensors([self._originals[i], x]).are_met_by(graphs):
                    self._raise_not_reached(x)

    def _raise_not_reached(self, x: Tensor) -> None:
        name = self.field.holdings.name_of(x) if self.field.holdings is not None else None
        raise ReplayError(
            f"func depended on {f'{name}, ' if name else ''}a tensor of shape {tuple(x.shape)} in the forward pass, "
            "and does not in the backward pass, so that its gradient would be lost. Causes: func keeps what it "
            "computed from it (a cache), or another tensor took its place. Compute it in each evaluation or before the "
            'solve, or use gradient="direct".'
        )

    def _add(self, grads: Sequence[Tensor | None]) -> None:
        totals: list[Tensor] = []
        terms: list[Tensor] = []
        for i, grad in enumerate(grads) if self._known is None else zip(self._wanted, grads, strict=True):
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


_METADATA = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")}


class _Substitution(TorchFunctionMode):
    """Gives torch functions other tensors in place of some of their operands, and refuses those that were overwritten.

    An overwritten tensor that func reads can change its derivatives and leave its values as they are, so that the
    comparison of states alone would not notice.
    """

    def __init__(self, substitutes: dict[int, Tensor], overwritten: Sequence[Tensor]) -> None:
        super().__init__()
        self._substitutes = substitutes
        self._overwritten = {id(x) for x in overwritten}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._overwritten and func not in _METADATA:
            for x in tensors_in((args, kwargs or {})):
                if id(x) in self._overwritten:
                    raise ReplayError(
                        f"A tensor of shape {tuple(x.shape)} and {x.dtype}, which func reads, was written to between "
                        "the forward and the backward pass, so that a replay would not repeat the forward pass. Write "
                        "to it after the backward pass, put a new tensor in its place, or use "
                        'gradient="direct", which does not replay.'
                    )
        return func(*self._of(args), **self._of(kwargs or {}))

    def _of(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self._substitutes.get(id(x), x)
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._of, x)) if type(x) in (tuple, list) else x
        return {key: self._of(value) for key, value in x.items()} if isinstance(x, dict) else x


def _variable(x: Tensor) -> Tensor:
    """The tensor that a graph's leaf names for ``x``, which is another object where it was unpacked by a hook."""
    if not x.requires_grad or not x.is_leaf:
        return x
    return get_gradient_edge(x).node.variable  # type: ignore[attr-defined]


def _has_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
