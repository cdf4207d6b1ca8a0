"""Test for other references to a tensor, by its Python reference count.

An autograd graph refers to its tensors in C++. Newer versions of torch add these references to the Python count, so the
contributions of a graph, and of a variable, are measured at import.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_held(count: int, x: Tensor, n_known: int) -> bool:
    """Tells whether anything refers to ``x`` besides autograd graphs, a variable or attribute, and ``n_known`` others.

    ``count`` is ``sys.getrefcount(x)`` in the caller: a call from here would add its own references, whose number
    depends on the version of Python.
    """
    from_graphs = _OF_GRAPHS if _OF_GRAPHS and x._use_count() > 1 else 0  # type: ignore[attr-defined]
    return count - OF_A_VARIABLE - from_graphs > n_known


def _measured() -> tuple[int, int, int]:
    """Reference counts of a variable, of autograd graphs, and of a leaf that only an autograd graph refers to."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        of_a_variable = sys.getrefcount(x)
        product = x * x
        of_graphs = sys.getrefcount(x) - of_a_variable
        del x
    node = product.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    return of_a_variable, of_graphs, sys.getrefcount(node.variable)  # type: ignore[union-attr]


OF_A_VARIABLE, _OF_GRAPHS, OF_A_LEAF_OF_A_GRAPH = _measured()
