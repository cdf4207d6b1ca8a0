"""Which tensors func depends on by itself, found by watching its first evaluation.

A module's parameters are known. Any other tensor that requires grad and that func uses, a parameter behind a plain
function, a context vector in a closure or on a module, is seen as an operand of some torch function; what only shows
in the graph (operands of scripted code or of custom autograd functions) is found there, for callables that are no
modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aca_ext.errors import ArgumentTypeError
from aca_ext.gradients.base import Task
from aca_ext.state import tensors_in


def first_slope_and_params(task: Task) -> tuple[Tensor | None, list[Tensor]]:
    """f(t0, y0) without a graph, and the tensors requiring grad that func depends on besides its arguments."""
    func = task.field.func
    y0 = task.problem.y0.detach()  # a tensor of its own, so that a func that also captures y0 is seen to do so
    if task.params is not None:
        with torch.no_grad():
            return task.first_slope(y0), [p for p in task.params if p.requires_grad]
    if isinstance(func, nn.Module):
        known = [p for p in func.parameters() if p.requires_grad]
        watched = not isinstance(func, torch.jit.ScriptModule) and not hasattr(func, "_orig_mod")
        seen: _Watch | _NoWatch = _Watch(known) if watched else _NoWatch()
        with torch.no_grad():
            k0 = task.first_slope(y0, seen)
    else:
        known = []
        seen = _Watch(known)
        with torch.enable_grad():
            k0 = task.first_slope(y0, seen)
    args = [a for a in task.field.args if isinstance(a, Tensor)]
    ids = {id(a) for a in args}
    params = [*known, *(p for p in seen.captured if id(p) not in ids)]
    if k0 is not None and k0.grad_fn is not None:
        ids.update(id(p) for p in params)
        stops = {x.grad_fn for x in (*params, *args)}
        params += [leaf for leaf in leaves_of(k0.grad_fn, stops) if id(leaf) not in ids]
    return None if k0 is None else k0.detach(), params


def checked_params(params: Any) -> tuple[Tensor, ...] | None:
    """The ``params`` argument of ``odeint``.

    Raises:
        ArgumentTypeError: it holds something other than tensors.
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


class _Watch(TorchFunctionMode):
    """Collects operands that require grad and were not computed while it watched."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.captured: list[Tensor] = []
        self._ids = {id(x) for x in known}
        self._made: list[Any] = []  # keeps results alive, so that an id stays that of one tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tensors_in((args, kwargs or {})):
            if x.requires_grad and id(x) not in self._ids:
                self._ids.add(id(x))
                self.captured.append(x)
        result = func(*args, **(kwargs or {}))
        for x in tensors_in(result):
            if x.requires_grad and id(x) not in self._ids:
                self._ids.add(id(x))
                self._made.append(x)
        return result


class _NoWatch:
    """For compiled modules, whose code a watch would have compiled anew."""

    captured: Sequence[Tensor] = ()

    def __enter__(self) -> _NoWatch:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def leaves_of(root: Any, stops: set[Any]) -> list[Tensor]:
    """Leaf tensors of a graph, not looking beyond the nodes in ``stops``."""
    found: list[Tensor] = []
    todo, seen = [root], {root, *stops}
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)
    return found
