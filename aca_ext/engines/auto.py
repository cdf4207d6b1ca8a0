"""engine="auto": eager at first, compiled from the third solve of the same kind on, eager where that is refused.

Compiling takes seconds, which a func that is solved once or twice does not repay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aca_ext.engines.base import Request
from aca_ext.engines.eager import EagerEngine
from aca_ext.engines.ensemble.engine import EnsembleEngine
from aca_ext.errors import ArgumentValueError, CompileError
from aca_ext.gradients.base import Result
from aca_ext.problem.batch import BatchProblem
from aca_ext.vector_field.function_cache import PerOwner

_SOLVES_BEFORE = 2
_MOST_COUNTED = 64  # kinds of one func; beyond it, the oldest is forgotten
_MOST_KINDS = 8  # compiled for one func; a func with more, such as one for each batch size, would compile for ever
_MOST_COMPILATIONS = 4  # of one kind; each solve may compile again if Python values that func reads change


@dataclass(slots=True)
class _Kind:
    """Solves of one func that run the same compiled code.

    Attributes:
        solves: number of solves so far.
        compilations: number of solves that compiled something.
        refusal: reason why these solves are not compiled, else "".
    """

    solves: int = 0
    compilations: int = 0
    refusal: str = ""


@dataclass(slots=True)
class _Kinds:
    """The kinds of solves of one func; it dies with func."""

    of: dict[Any, _Kind] = field(default_factory=dict)

    def find(self, request: Request) -> _Kind:
        key = _key(request)
        kind = self.of.get(key)
        if kind is None:
            if len(self.of) >= _MOST_COUNTED:
                self.of.pop(next(iter(self.of)), None)
            kind = self.of[key] = _Kind()
        return kind

    def are_too_many(self) -> bool:
        return sum(kind.compilations > 0 for kind in self.of.values()) >= _MOST_KINDS


class AutoEngine:
    """Chooses an engine for each solve; ``stats.engine`` names it, ``stats.reason`` tells why it is not compiled."""

    error = ArgumentValueError

    def __init__(self) -> None:
        self._eager, self._compiled = EagerEngine(), EnsembleEngine()
        self._by_owner = PerOwner(_Kinds)

    def obstacle(self, request: Request) -> str | None:
        return self._compiled.obstacle(request) if _needs_compiling(request) else None

    def solve(self, request: Request) -> Result:
        """Solves by compiled code if this func was solved often enough and can be compiled, else by the eager engine.

        Raises:
            Those of the engines; CompileError only if an argument needs compiled lanes.
        """
        if _needs_compiling(request):
            return self._compiled_result(request)
        obstacle = self._compiled.obstacle(request)
        if obstacle is not None:
            return self._uncompiled(request, obstacle)
        kinds = self._by_owner.of(request.problem.func)
        kind = kinds.find(request)
        kind.solves += 1
        if kind.refusal:
            return self._uncompiled(request, kind.refusal)
        if kind.solves <= _SOLVES_BEFORE:
            return self._uncompiled(request, f"solve {kind.solves} of {_SOLVES_BEFORE} before func is compiled")
        if kind.compilations == 0 and kinds.are_too_many():
            kind.refusal = f"func is compiled for {_MOST_KINDS} kinds of solves (shapes, methods) already"
            return self._uncompiled(request, kind.refusal)
        return self._by_compiling(request, kind)

    def _by_compiling(self, request: Request, kind: _Kind) -> Result:
        try:
            result = self._compiled_result(request)
        except CompileError as error:
            kind.refusal = str(error)
            return self._uncompiled(request, kind.refusal)
        if result.stats.compile_seconds > 0:
            kind.compilations += 1
            if kind.compilations >= _MOST_COMPILATIONS:
                kind.refusal = "func was compiled again and again, since Python values that it depends on change"
        return result

    def _compiled_result(self, request: Request) -> Result:
        result = self._compiled.solve(request)
        result.stats.engine = "compiled" if result.stats.compiled else "eager"
        return result

    def _uncompiled(self, request: Request, reason: str) -> Result:
        result = self._eager.solve(request)
        result.stats.engine, result.stats.reason = "eager", reason
        return result


def _needs_compiling(request: Request) -> bool:
    """Tells whether an argument takes the compiled lanes, since the eager engine does not support it."""
    problem = request.problem
    if not isinstance(problem, BatchProblem):
        return False
    return problem.stops_of_rows is not None or request.checkpoints is not None


def _key(request: Request) -> tuple[Any, ...]:
    """Properties for which code is compiled; not the times, tolerances, values, and whether gradients are enabled."""
    problem = request.problem
    y0, tolerance = problem.y0, problem.tolerance
    are_tensors = isinstance(tolerance.rtol, Tensor), isinstance(tolerance.atol, Tensor)
    of_state = type(problem), problem.packing, y0.shape, y0.stride(), y0.dtype
    of_method = problem.tableau, problem.adaptive, are_tensors
    mode = getattr(problem.func, "training", None)  # func may be compiled for evaluation, but not in training
    return of_state, of_method, _structure(problem.args), mode


def _structure(x: Any) -> Any:
    """The structure of args: types, and shapes and dtypes of tensors, but no values."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    if isinstance(x, (tuple, list)):
        return type(x), *map(_structure, x)
    if isinstance(x, Mapping):
        return type(x), *((name, _structure(value)) for name, value in x.items())
    return type(x)
