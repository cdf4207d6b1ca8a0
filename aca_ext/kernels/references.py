"""References to a tensor from Python, told by its reference count.

Graphs refer to tensors in C++. Torch counts that in Python too, from some version on: what it adds is measured here.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_held(count: int, x: Tensor, n_known: int) -> bool:
    """Tells whether something holds ``x`` besides graphs, one variable or attribute, and ``n_known`` references more.

    ``count`` is ``sys.getrefcount(x)``, taken by the caller: what a call adds depends on how the interpreter makes it.
    """
    from_graphs = _OF_GRAPHS if _OF_GRAPHS and x._use_count() > 1 else 0  # type: ignore[attr-defined]
    return count - OF_A_VARIABLE - from_graphs > n_known


def _measured() -> tuple[int, int, int]:
    """References that are counted for a variable, for graphs, and for a leaf that a graph alone holds."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        of_a_variable = sys.getrefcount(x)
        product = x * x
        of_graphs = sys.getrefcount(x) - of_a_variable
        del x
    node = product.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return of_a_variable, of_graphs, sys.getrefcount(node.variable)  # type: ignore[union-attr]


OF_A_VARIABLE, _OF_GRAPHS, OF_A_LEAF_OF_A_GRAPH = _measured()
