"""Leaves of func's graphs in a replay: which of them receive a gradient, and errors where one would be lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from aca_ext.errors import ReplayError
from aca_ext.kernels.extension import known_tensors
from aca_ext.vector_field.field import VectorField
from aca_ext.vector_field.kept import ANCHOR, USED_AGAIN


class ReplayLeaves:
    """The inputs of a replay as leaves of func's graphs, which may lead to others.

    Args:
        field: func.
        originals: tensors that func holds.
        inputs: tensors that take their places in the graphs.
        n_wanted: number of inputs at the start whose gradients are asked for; those of others from their first use on.
        cut: ids of leaves whose places others take. Code that torch functions do not see, such as an
            autograd.Function, uses them nevertheless.
        is_checked: raise if func depends on any other tensor that requires grad.
        is_searched: look at every graph. Without, func cannot use what is not asked for.
        hides_originals: torch functions are replaced, which would show the inputs in place of the leaves.

    Attributes:
        is_checked, is_searched: as given.
        targets: inputs whose gradients are asked for.
        indices: their places among the inputs; None where they are the first ones in order.
    """

    def __init__(
        self,
        field: VectorField,
        originals: Sequence[Tensor],
        inputs: Sequence[Tensor],
        n_wanted: int,
        cut: set[int],
        *,
        is_checked: bool,
        is_searched: bool,
        hides_originals: bool,
    ) -> None:
        self._field, self._originals, self._inputs, self._cut = field, originals, inputs, cut
        self.is_checked, self.is_searched, self._hides_originals = is_checked, is_searched, hides_originals
        self.targets = list(inputs[:n_wanted])
        self.indices = list(range(n_wanted)) if is_searched else None
        self._known = known_tensors(self.targets) if is_searched else None
        self._places: dict[int, int] | None = None  # of the inputs, by the ids of their variables

    def know(self, x: Tensor) -> None:
        """Counts a tensor among those that graphs may lead to."""
        if self._known is not None:
            self._known.add(x)

    def admit(self, slopes: Tensor | tuple[Tensor, ...], y: Tensor | None = None) -> None:
        """Adds inputs that func uses for the first time to the targets.

        Raises:
            ReplayError: a leaf was not found before the solve, so that its gradient would be lost.
        """
        if self._known is None:
            return
        if not self._hides_originals:
            others = self._known.others(slopes, y)
        else:
            with torch._C.DisableTorchFunction():
                others = self._known.others(slopes, y)
        if others is None:
            return
        if any(leaf is ANCHOR for leaf in others):
            raise ReplayError(USED_AGAIN)
        for leaf in others:
            self._admit(leaf)
            self._known.add(leaf)

    def _admit(self, leaf: Tensor) -> None:
        if self._places is None:
            self._places = {id(variable_of(x)): i for i, x in enumerate(self._inputs)}
        i = self._places.get(id(leaf))
        if i is not None:
            assert self.indices is not None
            if i not in self.indices:
                self.indices.append(i)
                self.targets.append(self._inputs[i])
        elif id(leaf) in self._cut:
            raise ReplayError(
                f"func uses a parameter of shape {tuple(leaf.shape)}, which has hooks or a graph outside, in an "
                "autograd.Function or in other code that a replay cannot see, so that its gradient would be lost. "
                'Give that code 1 * parameter, or use gradient="direct".'
            )
        elif self.is_checked and not self._field.has_put(leaf):
            raise ReplayError(
                f"func depends on a tensor of shape {tuple(leaf.shape)} and {leaf.dtype} that requires grad and "
                "was not found before the solve, so that its gradient would be lost. Name it, with what else "
                "receives a gradient, by params=[...], or pass it by args=(...)."
            )

    def refuse_unreached(self, missing: Sequence[int], k: Tensor) -> None:
        """Raises ReplayError if the graph of the first slope ``k`` does not lead to an input, as it did before."""
        with torch._C.DisableTorchFunction():
            # A cache that the first evaluation filled has a graph of its own outside, which leads to them.
            graphs = tuple(x for x in (k, *self._originals) if x.grad_fn is not None)
            for i in missing:
                x = variable_of(self._inputs[i])
                if not known_tensors([self._originals[i], x]).are_met_by(graphs):
                    self._raise_unreached(x)

    def _raise_unreached(self, x: Tensor) -> None:
        name = self._field.holdings.name_of(x) if self._field.holdings is not None else None
        raise ReplayError(
            f"func depended on {f'{name}, ' if name else ''}a tensor of shape {tuple(x.shape)} in the forward pass, "
            "and does not in the backward pass, so that its gradient would be lost. Causes: func keeps what it "
            "computed from it (a cache), or another tensor took its place. Compute it in each evaluation or before the "
            'solve, or use gradient="direct".'
        )


def variable_of(x: Tensor) -> Tensor:
    """The tensor of the graph's leaf node for ``x``: another object if a saved-tensor hook unpacked it."""
    if not x.requires_grad or not x.is_leaf:
        return x
    return get_gradient_edge(x).node.variable  # type: ignore[attr-defined]
