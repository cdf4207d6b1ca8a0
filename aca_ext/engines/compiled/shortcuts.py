"""Work of Inductor that is left out or done once, since the generated code does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any


@contextmanager
def shortcuts() -> Iterator[None]:
    """Makes Inductor compile in less time inside the context."""
    with ExitStack() as stack:
        for context in (dtype_rules_made_once, _plain_sums_expanded, _leaves_mapped_directly):
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
def _leaves_mapped_directly() -> Iterator[None]:
    """Replaces torch's map over trees for a lone variable or its name, which Inductor maps thousands of times."""
    from torch._inductor.codegen import common
    from torch.utils import _pytree

    original = _pytree.tree_map

    def tree_map(func: Any, tree: Any, *rest: Any, **options: Any) -> Any:
        if not rest and not options and (type(tree) is str or isinstance(tree, common.CSEVariable)):
            return func(tree)
        return original(func, tree, *rest, **options)

    _pytree.tree_map = tree_map
    try:
        yield
    finally:
        _pytree.tree_map = original


@contextmanager
def templates_compiled_when_used() -> Iterator[None]:
    """Makes the import of Inductor leave its templates of GPU kernels uncompiled until they are used."""
    from torch._inductor.codegen import common

    kind: Any = getattr(common, "KernelTemplate", None)
    original = getattr(kind, "_template_from_string", None)
    if original is None or common.jinja2_env() is None:
        yield
        return
    kind._template_from_string = staticmethod(lambda source: _Template(source, original))
    try:
        yield
    finally:
        kind._template_from_string = staticmethod(original)


class _Template:
    """A template of jinja2, compiled at its first use."""

    def __init__(self, source: str, compiled: Callable[[str], Any]) -> None:
        self._source, self._compiled = source, compiled

    @cached_property
    def _template(self) -> Any:
        return self._compiled(self._source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._template, name)
