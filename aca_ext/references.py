"""Who refers to a tensor in Python, told by its reference count.

Graphs refer to tensors in C++. Torch counts that in Python too, from some version on: what it adds is measured here.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_held(x: Tensor, n_known: int) -> bool:
    """Whether something holds ``x`` besides graphs, the caller's variable and ``n_known`` references more."""
    from_graphs = _OF_GRAPHS if _OF_GRAPHS and x._use_count() > 1 else 0  # type: ignore[attr-defined]
    return sys.getrefcount(x) - _OWN - from_graphs > n_known


def _measured() -> tuple[int, int, int]:
    """References counted for a variable handed to a function, for graphs, and for a leaf that a graph alone holds."""

    def count(x: Tensor) -> int:
        return sys.getrefcount(x)

    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        x = torch.zeros((), requires_grad=True)
        own = count(x)
        product = x * x
        of_graphs = count(x) - own
        del x
    node = product.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return own, of_graphs, sys.getrefcount(node.variable)  # type: ignore[union-attr]


_OWN, _OF_GRAPHS, OF_A_LEAF_OF_A_GRAPH = _measured()
