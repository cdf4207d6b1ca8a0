"""Tensors that func computes in one evaluation and keeps: caches of parameters, penalties, histories.

The evaluations of a solve record no autograd graph, so tensors kept from them have none; with gradient="direct" they
would have one. A cache that the first evaluation filled has its graph, since that evaluation is made with one. Any
other kept tensor is given a graph that ends in an error: its value can be read, and asking for its gradient raises.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import KeptTensorWarning, ReplayError
from aca_ext.kernels.references import is_held
from aca_ext.vector_field.contents import Change
from aca_ext.vector_field.function_cache import PerOwner
from aca_ext.vector_field.holdings import Holdings, Place

HINT = (
    "Make it part of the state (its rate one more component of y), compute it from the solution, or use "
    'gradient="direct". To keep a value alone, keep tensor.detach().'
)


class Keepsake:
    """A tensor that the first evaluation of a solve computed and that outlives this evaluation.

    Args:
        place: the place that holds it; None if the walk did not find one.
        depends_on_state: it was computed from the state, perhaps together with parameters.
    """

    def __init__(self, tensor: Tensor, place: Place | None, depends_on_state: bool) -> None:
        self.tensor, self.place, self.depends_on_state = tensor, place, depends_on_state
        self._before = {id(x) for x in self._contents()} - {id(tensor)}

    def is_cache(self) -> bool:
        """Tells whether it is still kept and depends on parameters alone, so that its graph remains valid."""
        if self.depends_on_state:
            return False
        if self.place is not None:
            return self._is_in_place()
        return is_held(sys.getrefcount(self.tensor), self.tensor, n_known=0)

    def settle(self, origins: Sequence[Tensor]) -> None:
        """Replaces the tensors that later evaluations put in its place by ones whose gradient is an error."""
        place = self.place
        if place is None:
            return
        message = _message(place.describe())
        for there in self._successors():
            now = there.get()
            if not self.depends_on_state and _are_equal(now, self.tensor):
                there.put(self.tensor)
            else:
                there.put(_lost(now, origins, message))

    def release(self) -> None:
        """Releases the tensor, and with it the graph of the first evaluation; the place stays known."""
        self.tensor = ANCHOR
        if self.place is not None:
            self.place = self.place._replace(tensor=ANCHOR)

    def snapshot(self) -> Callable[[], None]:
        """Returns a function that restores the present contents of its place."""
        place = self.place
        if place is None:
            return _nothing
        holder = place.holder
        if place.is_attribute or not isinstance(holder, (dict, list)):
            return partial(place.put, place.get())
        return partial(_refill, holder, holder.copy())

    def _is_in_place(self) -> bool:
        return self.place is not None and any(x is self.tensor for x in self._contents())

    def _contents(self) -> Sequence[Any]:
        place = self.place
        if place is None:
            return ()
        if place.is_attribute or not isinstance(place.holder, (dict, list)):
            return (place.get(),)
        return list(place.holder.values() if isinstance(place.holder, dict) else place.holder)

    def _successors(self) -> Iterator[Place]:
        """Places whose tensors were put there since, or depend on the state of the first evaluation."""
        place = self.place
        assert place is not None
        places = [place]
        if not place.is_attribute and isinstance(place.holder, dict):
            places = [place._replace(key=key) for key in place.holder]
        elif isinstance(place.holder, list):
            places = [place._replace(key=i) for i in range(len(place.holder))]
        for there in places:
            x = there.get()
            if not isinstance(x, Tensor) or id(x) in self._before or not (x.is_floating_point() or x.is_complex()):
                continue
            if not x.requires_grad or (x is self.tensor and self.depends_on_state):
                yield there


def settle_late(func: Any, changes: Sequence[Change], origins: Sequence[Tensor]) -> None:
    """Replaces tensors that evaluations after the first put in empty places by ones whose gradient is an error."""
    changes = [c for c in changes if isinstance(c.now, Tensor) or (isinstance(c.now, list) and c.key is None)]
    names = sorted({_describe(change) for change in changes})
    for change in changes:
        message = _message(_describe(change))
        if isinstance(change.now, Tensor):
            change.put(_lost_where_it_has_no_graph(change.now, origins, message))
        else:
            change.put([_lost_where_it_has_no_graph(x, origins, message) for x in change.now])
    _warn_once(func, names)


def _describe(change: Change) -> str:
    is_name = isinstance(change.key, str)
    return f"as {change.key}" if is_name else f"in a {type(change.holder).__name__}"


def _message(where: str) -> str:
    return (
        f"The gradient of a tensor that func keeps ({where}) was asked for. The evaluations of func have no graph, so "
        f"it cannot be had. {HINT}"
    )


def _lost_where_it_has_no_graph(x: Any, origins: Sequence[Tensor], message: str) -> Any:
    is_number = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    return _lost(x, origins, message) if is_number and not x.requires_grad else x


def _refill(holder: Any, contents: Any) -> None:
    holder.clear()
    holder.extend(contents) if isinstance(holder, list) else holder.update(contents)


def _nothing() -> None:
    pass


def keepsakes_of(func: Any, kept: Sequence[tuple[Tensor, bool]]) -> list[Keepsake]:
    """Keepsakes of the tensors that outlived an evaluation; each comes with a flag: it depends on the state."""
    if not kept:
        return []
    places = {id(place.tensor): place for place in Holdings((func,)).places}
    found = [
        Keepsake(x, places.get(id(x)), depends_on_state)
        for x, depends_on_state in kept
        if id(x) in places or not (depends_on_state and _are_saved_tensors_packed())
    ]
    names = {k.place.describe() if k.place is not None else "in a place not found" for k in found if k.depends_on_state}
    _warn_once(func, sorted(names))
    return found


def _are_saved_tensors_packed() -> bool:
    """Tells whether saved-tensor hooks are active, under which autograd graphs hold saved tensors as Python objects."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # private
    return top is not None and top(False) is not None


class _Warned:
    done = False


_warned = PerOwner(_Warned)


def _warn_once(func: Any, places: Sequence[str]) -> None:
    if not places or _warned.of(func).done:
        return
    _warned.of(func).done = True
    warnings.warn(
        f"func keeps tensors that depend on the state ({', '.join(places)}). They have the right values, but no graph "
        f'back to the parameters and the state, which they would have with gradient="direct". {HINT}',
        KeptTensorWarning,
        stacklevel=_depth_of_caller(),
    )


def _depth_of_caller() -> int:
    """Number of frames from ``warnings.warn`` to the first code outside this package and torch."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("aca_ext", "torch"):
        depth, frame = depth + 1, frame.f_back
    return depth


def _are_equal(x: Any, other: Tensor) -> bool:
    return (
        isinstance(x, Tensor) and x.shape == other.shape and x.dtype == other.dtype and torch.equal(x, other.detach())
    )


# Leaf that marks the graph of every tensor whose gradient is an error.
with torch.inference_mode(False):
    ANCHOR = torch.zeros((), device="cpu", requires_grad=True)
USED_AGAIN = (
    "func uses a tensor that depends on the state of another evaluation. The evaluations of a solve have no graph, so "
    f"that its gradient would be lost. {HINT}"
)


def is_lost(x: Tensor) -> bool:
    """Tells whether the gradient of ``x`` is an error."""
    return type(x.grad_fn).__name__ == "_LostBackward"


def _lost(x: Tensor, origins: Sequence[Tensor], message: str) -> Tensor:
    with torch.enable_grad():
        lost = _Lost.apply((x,), message, ANCHOR, *origins)
    lost.__deepcopy__ = _PlainCopy(lost.detach())  # torch refuses to deepcopy a tensor that has a graph
    return lost


class _Lost(torch.autograd.Function):
    """A copy of a tensor whose gradient is an error."""

    @staticmethod
    def forward(ctx: Any, boxed: tuple[Tensor], message: str, *origins: Tensor) -> Tensor:
        ctx.message, ctx.n_origins = message, len(origins)
        ctx.set_materialize_grads(False)
        return boxed[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[None, ...]:
        if g is not None:
            raise ReplayError(ctx.message)
        return None, None, *(None for _ in range(ctx.n_origins))


class _PlainCopy:
    """``copy.deepcopy`` for a tensor with a graph: a copy without one."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def __call__(self, memo: dict[int, Any]) -> Tensor:
        return self._value.clone()
