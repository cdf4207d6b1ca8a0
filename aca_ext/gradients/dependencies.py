"""Search for the tensors that func depends on besides its arguments.

The first evaluation of func runs with an autograd graph, from a state that requires grad, under a TorchFunctionMode.
Leaves are found in that graph. Tensors with a history, such as a context vector in a closure, are found as operands of
torch functions. Tensors that the evaluation computed and keeps are found by their reference counts.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aca_ext.errors import AcaError, ArgumentTypeError
from aca_ext.gradients.base import Task
from aca_ext.gradients.mixed_samples import refuse_mixed_samples
from aca_ext.kernels.extension import known_tensors
from aca_ext.kernels.references import OF_A_VARIABLE, is_held
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.state import tensors_in
from aca_ext.vector_field.kept import Keepsake, is_lost, keepsakes_of, settle_late


class FirstEvaluation:
    """f(t0, y0), and the tensors on which func depends according to this evaluation.

    Args:
        is_traced: the caller keeps all results alive, so reference counts do not tell what func keeps.

    Attributes:
        k: the slope without its autograd graph; None if the solve has no step.
        params: tensors requiring grad on which func depends besides state and args, or those given by the user.
        found: other leaves that func holds and may use later in the solve.
        leaves: indices of the params found in the autograd graph of the slope.
    """

    def __init__(self, task: Task, is_traced: bool = False) -> None:
        self._task = task
        self.found: list[Tensor] = []
        self.leaves = range(0)
        self._keepsakes: list[Keepsake] = []
        self._made: list[Tensor] = []  # leaves that the evaluation created
        self._use: _Use | None = None
        y = task.problem.y0.detach()  # a new tensor, to tell it from y0 if func captures y0
        args = [a for a in task.field.args if isinstance(a, Tensor)]
        y = y.clone() if y.is_inference() else y
        watch = _watch_for(task.field.func, (y, *args))
        k = (_plain if is_traced else _differentiable)(task, y, watch)
        task.field.calls_autograd = _needs_graph_inside(task, watch)
        captured = watch.captured_and_held()
        self.params = captured if task.params is None else [p for p in task.params if p.requires_grad]
        n_captured = len(captured)
        if k is not None and k.requires_grad and task.params is None:
            leaves = known_tensors([*captured, *args, y]).others(k, None) or []
            self._made = [x for x in leaves if watch.has_made(x) or task.field.has_put(x)]
            self.params += [x for x in leaves if not any(x is made for made in self._made)]
            self.leaves = range(n_captured, len(self.params))
        refuse_mixed_samples(task, y, k)
        self.k = k = None if k is None else k.detach()
        self._look_at_holdings(task, {id(x) for x in (*self.params, *args)})
        if not is_traced:
            outlived = watch.outlived()  # first, as it drops references to y from graphs held in Python
            kept = [(y, True)] if is_held(sys.getrefcount(y), y, n_known=watch.outer_references(y)) else []
            if outlived:
                state = known_tensors([y])
                kept += [(x, state.are_met_by(x)) for x in outlived]
            task.field.kept = self._keepsakes = keepsakes_of(task.field.func, kept)
        if task.field.environment is not None:
            task.field.environment.end_first_evaluation()

    def _look_at_holdings(self, task: Task, known: set[int]) -> None:
        holdings = task.field.holdings
        unused: list[Tensor] = []
        for x in holdings.tensors if holdings is not None and task.params is None else ():
            if id(x) not in known:
                if x.is_leaf:
                    self.found.append(x)
                elif not is_lost(x):
                    unused.append(x)
        if unused:
            self._use = _Use(unused)
        if holdings is not None:
            holdings.let_go_of_histories()

    def needs_graph(self, args: Sequence[Tensor]) -> bool:
        """Tells whether a tensor that the solution depends on, or may depend on later, requires grad."""
        origins = (self._task.problem.y0, *self.params, *self.found, *args)
        return self._use is not None or any(x.requires_grad for x in origins)

    def watch(self) -> AbstractContextManager[Any]:
        """Returns the context for the rest of the solve, which ends before ``settle``."""
        return _NOTHING if self._use is None else self._use

    def settle(self) -> None:
        """Adds to the params the tensors with a history that the solve used later, and the caches that func filled."""
        if self._use is not None:
            self.params += self._use.found
        for keepsake in self._keepsakes:
            if keepsake.is_cache():
                self.params.append(keepsake.tensor)
            else:
                keepsake.settle(self._origins())
            keepsake.release()
        environment = self._task.field.environment
        if environment is not None:
            late = environment.end_solve(self._task.field.n_evals)
            if late:
                settle_late(self._task.field.func, late, self._origins())
                environment.settle()
            if environment.has_own_state:
                self._add_made_leaves(self._task)

    def _add_made_leaves(self, task: Task) -> None:
        """Adds the leaves that func created in the solve and keeps, such as those of a layer built at its first use."""
        args = [arg for arg in task.field.args if isinstance(arg, Tensor)]
        known = {id(x) for x in (*self.params, *self.found, *args)}
        for x in task.field.tensors_held_now():
            if x.is_leaf and id(x) not in known and task.params is None:
                (self.params if any(x is made for made in self._made) else self.found).append(x)

    def _origins(self) -> list[Tensor]:
        """The known tensors requiring grad on which the solution depends."""
        args = [arg for arg in self._task.field.args if isinstance(arg, Tensor)]
        return [x for x in (self._task.problem.y0, *self.params, *self.found, *args) if x.requires_grad]


def first_slope_without_graph(task: Task) -> Tensor | None:
    """f(t0, y0) for a solve without gradients."""
    y = task.problem.y0.detach()
    if not isinstance(task.problem, BatchProblem) or torch.is_inference_mode_enabled() or y.is_inference():
        return task.first_slope(y)
    k = _differentiable(task, y, None)
    refuse_mixed_samples(task, y, k)
    return None if k is None else k.detach()


def first_slope_with_graph(task: Task) -> Tensor | None:
    """f(t0, y0) with its autograd graph; also records in ``task.field`` whether func calls autograd."""
    watch, y0 = _watch_for(task.field.func, ()), task.problem.y0
    if isinstance(task.problem, BatchProblem) and y0.requires_grad:
        y0 = y0.view_as(y0)  # the look at dependences ends at the view, where hooks of y0 do not see it
    k = task.first_slope(y0, watch)
    if y0.requires_grad:
        refuse_mixed_samples(task, y0, k)
    elif isinstance(task.problem, BatchProblem) and k is not None:
        with task.field.aside():
            y = y0.detach().requires_grad_()
            refuse_mixed_samples(task, y, task.field(task.problem.start_time(y), y))
    task.field.calls_autograd = _needs_graph_inside(task, watch)
    return k


def _needs_graph_inside(task: Task, watch: Any) -> bool:
    """Tells whether func calls autograd and leaves it to its caller to enable gradients."""
    return watch.has_called_autograd and not getattr(task.field.func, "enables_grad_itself", False)


def _plain(task: Task, y: Tensor, watch: Any) -> Tensor | None:
    """The first slope, with no autograd graph if func is a module or the user gave params."""
    with torch.set_grad_enabled(task.params is None and not isinstance(task.field.func, nn.Module)):
        return task.first_slope(y, watch)


def _differentiable(task: Task, y: Tensor, watch: Any) -> Tensor | None:
    """The first slope with its autograd graph, or that of ``_plain`` if func rejects a state that requires grad."""
    try:
        with torch.enable_grad():
            return task.first_slope(y.requires_grad_(), watch)
    except RuntimeError:
        task.field.forget_first()
        try:
            return _plain(task, y.requires_grad_(False), watch)
        except AcaError:
            raise
        except Exception:
            pass
        raise


def checked_params(params: Any) -> tuple[Tensor, ...] | None:
    """Validates the ``params`` argument of ``odeint``.

    Raises:
        ArgumentTypeError: ``params`` contains something other than tensors.
    """
    if params is None:
        return None
    if isinstance(params, Tensor):
        return (params,)
    if not isinstance(params, Iterable):
        raise ArgumentTypeError(f"params is of type {type(params).__name__}; give tensors, such as net.parameters().")
    params = tuple(params)
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise ArgumentTypeError(
                f"params[{i}] is of type {type(p).__name__}; give tensors, such as net.parameters()."
            )
    return params


_NOTHING = nullcontext()
_AUTOGRAD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class _Active(threading.local):
    """The active watches of a thread, the innermost last."""

    def __init__(self) -> None:
        self.watches: list[_Watch] = []


_active = _Active()


class _Watch(TorchFunctionMode):
    """Collects the tensors requiring grad that torch functions use (captured ones) and compute."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.has_called_autograd = False
        self._captured: list[Tensor] = []
        self._ids = {id(x) for x in known}
        self._made: list[Tensor] = []  # keeps results alive, so that Python does not reuse their ids

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _AUTOGRAD:
            self.has_called_autograd = True
        self._note(args if not kwargs else (*args, *kwargs.values()), self._captured)
        result = func(*args, **kwargs) if kwargs else func(*args)
        self._note((result,), self._made)
        return result

    def _note(self, values: Sequence[Any], into: list[Tensor]) -> None:
        """Appends the tensors in ``values`` that require grad and were not met before."""
        for value in values:
            for x in (value,) if isinstance(value, Tensor) else tensors_in(value):
                if x.requires_grad and id(x) not in self._ids:
                    self._ids.add(id(x))
                    into.append(x)

    def captured_and_held(self) -> list[Tensor]:
        """Captured operands with a history, except temporaries of functions that bypass ``__torch_function__``."""
        captured = [x for x in self._captured if not x.is_leaf and not is_lost(x)]
        return [x for x in captured if is_held(sys.getrefcount(x), x, n_known=2 + self.outer_references(x))]

    def outer_references(self, x: Tensor) -> int:
        """Number of references to ``x`` from outer watches: func may contain another solve."""
        return sum(id(x) in watch._ids for watch in _active.watches) if _active.watches else 0

    def __enter__(self) -> _Watch:
        _active.watches.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.watches.pop()

    def has_made(self, x: Tensor) -> bool:
        """Tells whether the evaluation computed ``x``, so that nothing outside needs its gradient."""
        return any(made is x for made in self._made)

    def outlived(self) -> list[Tensor]:
        """Results that something else still refers to after the evaluation, once its slope has no graph."""
        found: list[Tensor] = []
        made = self._made
        self._captured.clear()
        while made:  # last to first, since the history of a result may hold those before it
            x = made.pop()
            count = sys.getrefcount(x)
            if count > OF_A_VARIABLE and is_held(count, x, n_known=self.outer_references(x)):
                found.append(x)
        return found


class _Use(TorchFunctionMode):
    """Collects those of the given tensors that torch functions use."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._ids = {id(x) for x in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tensors_in((args, kwargs or {})):
            if id(x) in self._ids:
                self._ids.remove(id(x))
                self.found.append(x)
        return func(*args, **(kwargs or {}))


class _NoWatch:
    """Stand-in for compiled modules, which a TorchFunctionMode would force to recompile."""

    has_called_autograd = False

    def captured_and_held(self) -> list[Tensor]:
        return []

    def outlived(self) -> list[Tensor]:
        return []

    def outer_references(self, x: Tensor) -> int:
        return 0

    def has_made(self, x: Tensor) -> bool:
        return False

    def __enter__(self) -> _NoWatch:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _watch_for(func: Any, known: Sequence[Tensor]) -> Any:
    is_compiled = isinstance(func, torch.jit.ScriptModule) or (
        isinstance(func, nn.Module) and hasattr(func, "_orig_mod")
    )
    return _NoWatch() if is_compiled else _Watch(known)
