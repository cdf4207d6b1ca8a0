"""Work of Inductor that is left out or done once, since the generated code does not depend on it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def shortcuts() -> Iterator[None]:
    """Makes Inductor compile in less time inside the context."""
    with ExitStack() as stack:
        for context in (dtype_rules_made_once, _plain_sums_expanded, _no_garbage_collection):
            stack.enter_context(context())
        yield


@contextmanager
def dtype_rules_made_once() -> Iterator[None]:
    """Keeps Inductor from making all rules of its single dtype handler anew for each operation inside the context.

    That took a seventh of Inductor's time in torch 2.13.
    """
    from torch._inductor import dtype_propagation

    handler: Any = getattr(dtype_propagation, "DtypePropagationOpsHandler", None)
    if not hasattr(handler, "_instance"):
        yield
        return
    handler()  # after the imports of the compiler, some of which add rules
    make = handler.__init__
    handler.__init__ = lambda self: None
    try:
        yield
    finally:
        handler.__init__ = make


@contextmanager
def _plain_sums_expanded() -> Iterator[None]:
    """Replaces sympy.simplify for indices that are sums of products, which it only expands, after a long search.

    Its first call also imports sympy's physical units.
    """
    import sympy

    original: Any = sympy.simplify

    def simplify(expression: Any, *args: Any, **options: Any) -> Any:
        is_plain = isinstance(expression, sympy.Expr) and all(
            isinstance(part, (sympy.Add, sympy.Mul, sympy.Integer, sympy.Symbol))
            for part in sympy.preorder_traversal(expression)
        )
        return sympy.expand(expression) if is_plain else original(expression, *args, **options)

    sympy.simplify = simplify
    try:
        yield
    finally:
        sympy.simplify = original


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Puts garbage collection off, which would walk all objects of torch's compiler several times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
