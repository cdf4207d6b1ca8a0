"""The user's func in the backward pass: evaluated as in the forward pass, transposed, its gradients summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ReplayError
from aca_ext.vector_field.field import AutocastState, RandomState, VectorField
from aca_ext.vector_field.gradient_sums import COARSE, GradientSums, WideSum
from aca_ext.vector_field.memory_check import refuse_memory
from aca_ext.vector_field.module_buffers import holds_script
from aca_ext.vector_field.replay_leaves import ReplayLeaves, variable_of
from aca_ext.vector_field.slope_function import SlopeFunction
from aca_ext.vector_field.substitution import Substitution

# torch.autograd.grad(tensors, inputs, grad_tensors, allow_unused=True) without its validation of the arguments, which
# takes longer than the backward pass of a small layer. Arguments: tensors, grad_tensors, keep_graph, create_graph,
# inputs, allow_unreachable, accumulate_grad.
run_backward: Callable[..., tuple[Any, ...]] = torch.autograd.Variable._execution_engine.run_backward

_FEW = 16


class Replay:
    """f in the backward pass: evaluates stages with their autograd graphs, as in the forward pass, and transposes them.

    Args:
        params: tensors that f depends on besides its arguments, as found by the forward pass.
        cut: returns a tensor of the same value at which gradients end. It replaces tensor args, params that other
            operations computed, and params with hooks: history and hooks belong to the graph outside of the solve.
        cuts_all: cut every param, leaf or not, so that no node of the graph is older than the replay. A CUDA graph
            capture needs that, and so does a gradient that must not run into the history of another input.
        found: further leaves that func holds and has not used yet. They cost nothing until it uses them.
        is_checked: raise if func depends on any other tensor that requires grad.

    Attributes:
        inputs: tensors whose gradients are summed: params, tensor args and found leaves, cut where needed.
        grads: their gradients so far; None for a tensor on which no evaluation depended.
        origins: named params that other operations computed, each with its index among the inputs. func may also use
            tensors made from them before the solve, through which their gradient flows; that graph is used again.
        n_evals: number of evaluations of func.
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
        # A hook on a leaf expects the whole gradient, so it runs outside. A param frozen since has to require grad.
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
        self._sums = GradientSums([None] * len(self.inputs))
        is_named = not is_checked and (is_one_graph or not cuts_all)
        self.origins = [(i, p) for i, p in enumerate(params) if is_named and p.grad_fn is not None]
        self._origins = tuple(p for _, p in self.origins)
        # The graph between named params and tensors made from them before the solve serves every evaluation.
        self._keeps_graph = is_named and (
            bool(self.origins) or (field.holdings is not None and field.holdings.has_histories())
        )
        # After a complete walk, asking for the gradients of a few unused leaves is cheaper than searching every graph.
        holdings = self.field.holdings
        is_complete = holdings is not None and holdings.is_complete and len(found) <= _FEW and not field.kept
        n_found = 0 if is_one_graph or cuts_all or is_complete else len(found)
        self._put_back: list[Callable[[], None]] = []
        self._autocast = autocast
        self._random_states: Sequence[RandomState] | None = None
        self._stage = 0
        # func holds the originals. Wherever it uses one, an arg included, the cut tensor takes its place.
        originals = [*params, *(a for a in field.args if _has_grad(a)), *found]
        self._substitutes = {id(x): c for x, c in zip(originals, self.inputs, strict=True) if x is not c}
        self._wide: list[WideSum] = []
        if is_one_graph and not holds_script(field.func):
            named = zip(originals, self.inputs, strict=True)
            self._wide = [WideSum(x, c, cut(x)) for x, c in named if x.dtype in COARSE and x.requires_grad]
            self.origins += [(i, w.total) for w in self._wide for i, c in enumerate(self.inputs) if c is w.of[1]]
        self._overwritten: list[Tensor] = []
        self._makes_late_tensors = False
        if self.field.environment is not None:
            self._makes_late_tensors = self.field.environment.has_late_tensors
            self._substitutes.update((id(x), x.detach()) for x in self.field.environment.unfrozen())
            self._overwritten = self.field.environment.overwritten()
        pairs = zip((*params, *found), (*cut_params, *cut_found), strict=True)
        cut_leaves = {id(variable_of(p)) for p, c in pairs if p is not c and p.is_leaf}
        has_cut = any(p is not c for p, c in zip(params, cut_params, strict=True))
        self._leaves = ReplayLeaves(
            self.field,
            originals,
            self.inputs,
            len(self.inputs) - n_found,
            cut_leaves,
            is_checked=is_checked,
            is_searched=bool(cut_leaves) or (is_checked and (has_cut or not is_complete)),
            hides_originals=bool(self._substitutes),
        )

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Restores the conditions of the forward pass; afterwards everything but func's counters is as before."""
        field, environment = self.field, self.field.environment
        self._put_back = [kept.snapshot() for kept in field.kept]
        is_plain = not self._substitutes and not self._wide and not self._overwritten
        operands = nullcontext() if is_plain else Substitution(self._substitutes, self._overwritten)
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
    def grads(self) -> list[Tensor | None]:
        return self._sums.totals

    @grads.setter
    def grads(self, grads: list[Tensor | None]) -> None:
        self._sums = GradientSums(grads)

    @property
    def n_evals(self) -> int:
        return self.field.n_evals

    @property
    def held(self) -> list[Tensor]:
        """Tensors that f is known to compute with."""
        return [*self.inputs, *(() if self.field.environment is None else self.field.environment.tensors)]

    @property
    def fastest(self) -> SlopeFunction:
        """The callable that evaluates the next stage with the least overhead."""
        return self if self.field.draws_random_numbers or self._makes_late_tensors or self._wide else self.field.fastest

    def begin_step(self, n: int | None, random_states: Sequence[RandomState] | None = None) -> None:
        """Sets the number of the next step, and the states of the random generators for each of its stages."""
        self.field.begin_step(n)
        self._random_states, self._stage = random_states, 0
        for put_back in self._put_back:  # otherwise func would keep the graphs of all steps
            put_back()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluates the next stage of the step, with its graph; for use inside ``repeating``."""
        if self._random_states is not None:
            self.field.set_random_state(self._random_states[self._stage])
        self._stage += 1
        for wide in self._wide:
            addend = wide.for_evaluation()
            self._substitutes.update((id(x), addend) for x in wide.of)
        if self._makes_late_tensors:
            assert self.field.environment is not None
            self.field.environment.begin_evaluation()
        return self.field(t, y)

    def pull_back(self, y: Tensor, k: Tensor | Sequence[Tensor], grad_k: Tensor | Sequence[Tensor]) -> Tensor | None:
        slopes, cotangents = ((k,), (grad_k,)) if isinstance(k, Tensor) else (tuple(k), tuple(grad_k))
        leaves = self._leaves
        if leaves.is_searched:
            leaves.admit(slopes, y)
        try:
            targets = y, *leaves.targets, *self._origins
            v, *grads = run_backward(slopes, cotangents, self._keeps_graph, False, targets, True, False)
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
        self._sums.add(self.with_origins(grads) if self.origins else grads, leaves.indices)
        return v

    def gradients(
        self, k: Tensor, wanted: Sequence[Tensor], grad_k: Tensor, create_graph: bool = False
    ) -> Sequence[Tensor | None]:
        """Gradients of a slope with respect to ``wanted``, which ends with the inputs; adds up nothing."""
        if not self._keeps_graph:
            return torch.autograd.grad(k, wanted, grad_k, allow_unused=True, create_graph=create_graph)
        targets = *wanted, *self._origins
        with torch._C.DisableTorchFunction():  # otherwise the substitutes would take the place of the origins
            found = torch.autograd.grad(
                k, targets, grad_k, retain_graph=True, allow_unused=True, create_graph=create_graph
            )
        n = len(wanted) - len(self.inputs)
        return *found[:n], *self.with_origins(found[n:])

    def with_origins(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Adds the gradients of the origins, which are the last of ``grads``, to those of their inputs."""
        n = len(grads) - len(self.origins)
        found = list(grads[:n])
        for (i, _), grad in zip(self.origins, grads[n:], strict=True):
            one = found[i]
            found[i] = grad if one is None else one if grad is None else one + grad
        return found

    def check_all(self, outputs: Tensor, start: Tensor) -> None:
        """As ``check``, for the graph of a whole solve from ``start``."""
        for x in (start, *(wide.total for wide in self._wide)):
            self._leaves.know(x)
        self._leaves.admit(outputs)

    def check(self, slope: Tensor, y: Tensor) -> None:
        """Adds leaves that func uses for the first time to the inputs.

        Raises:
            ReplayError: a leaf was not found before the solve, so that its gradient would be lost.
        """
        self._leaves.admit(slope, y)

    def check_end(self, indices: Sequence[int], t: Tensor, y: Tensor) -> None:
        """The last checks of a replay, at the start of the solve, whose slope depended on the inputs ``indices``.

        Raises:
            ReplayError: a derivative of func depends on earlier evaluations, or an input on which the first slope
                depended received no gradient.
        """
        environment = self.field.environment
        if environment is not None and environment.may_remember:
            refuse_memory(self.derivatives(t, y), self.derivatives(t, y))
        missing = [i for i in indices if self.grads[i] is None]
        if missing and self._leaves.is_checked:
            with torch.enable_grad():
                k = self(t, y.detach().requires_grad_())
            self._leaves.refuse_unreached(missing, k)

    def derivatives(self, t: Tensor, y: Tensor) -> Sequence[Tensor | None]:
        """Gradients of the first stage of the step for a fixed cotangent: of y, the inputs and the origins."""
        self._stage = 0
        y = y.detach().requires_grad_()
        k = self(t, y)
        wanted = [x for x in (y, *self.inputs, *(p for _, p in self.origins)) if x.requires_grad]
        if not k.requires_grad:
            return [None] * len(wanted)
        cotangent = torch.linspace(1, 2, k.numel(), device=k.device).to(k.dtype).view(k.shape)
        with torch._C.DisableTorchFunction():  # otherwise the substitutes would take the place of inputs
            return torch.autograd.grad(k, wanted, cotangent, retain_graph=True, allow_unused=True)


def _has_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
