"""Arguments of ``odeint``, ``solve`` and ``NeuralODE``, declared once; ``odeint`` documents them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.events import Event
from aca_ext.problem.options import option_names
from aca_ext.problem.suggestions import meant_by, option_meant_by
from aca_ext.progress import Callback

_P = ParamSpec("_P")
_A = TypeVar("_A", bound="Arguments")
_R = TypeVar("_R")

_REASON: dict[str, Any] = {}
if "reason" in inspect.signature(torch.compiler.disable).parameters:  # newer versions of torch show it in their error
    _REASON["reason"] = (
        "torch.compile does not compile a solve, but runs it between two graphs: leave out fullgraph=True. "
        "torch.export accepts a solve with strict=False and fixed steps"
    )


@dataclass(eq=False, slots=True)
class Arguments(ProblemArguments):
    """Arguments of ``solve`` before validation."""

    _: KW_ONLY
    events: Sequence[Event] = ()
    gradient: str = "aca"
    checkpoints: int | str | None = None
    engine: str | None = None
    params: Sequence[Tensor] | None = None
    progress: bool = False
    callback: Callback | None = None
    adjoint_rtol: float | Tensor | None = None
    adjoint_atol: float | Tensor | None = None
    adjoint_method: str | None = None
    adjoint_options: Mapping[str, Any] | None = None
    adjoint_params: Sequence[Tensor] | None = None
    dense: bool = False
    output_fn: Callable[[Tensor, Any], Any] | None = None


def takes(arguments: Callable[_P, _A]) -> Callable[[Callable[[_A], _R]], Callable[_P, _R]]:
    """Decorator for public functions: the caller passes single arguments, the function receives one object of them.

    Type checkers, editors and ``help`` see the single arguments, with their types and defaults. torch.compile does not
    enter the function: it compiles the rest of a model and calls the function uncompiled.
    """

    def decorate(function: Callable[[_A], _R]) -> Callable[_P, _R]:
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                given = arguments(*args, **kwargs)
            except TypeError as error:
                raise _error_of_call(function.__name__, str(error), arguments) from None
            return function(given)

        call.__name__ = call.__qualname__ = function.__name__  # torch.compile shows this name in errors
        kept_out = torch.compiler.disable(call, **_REASON)

        @wraps(function)
        def public(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return (kept_out if torch.compiler.is_compiling() else call)(*args, **kwargs)

        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(arguments).replace(return_annotation=returned)
        types = {**get_type_hints(arguments), "return": get_type_hints(function)["return"]}
        public.__signature__ = signature  # type: ignore[attr-defined]
        public.__annotations__ = {name: types[name] for name in (*signature.parameters, "return")}
        return public

    return decorate


def _as_of(name: str, message: str) -> str:
    """Python's message about the arguments of a constructor, reworded for the function ``name``."""
    without_self = re.sub(r"\d+(?= positional| were given)", lambda count: str(int(count[0]) - 1), message)
    return re.sub(r"^\S*__init__\(\)", f"{name}()", without_self)


def _error_of_call(name: str, message: str, arguments: Callable[..., Arguments]) -> TypeError:
    """The error of a call of the function ``name`` whose ``arguments`` Python refused with a message."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    if unknown is None:
        return TypeError(_as_of(name, message))
    known = list(inspect.signature(arguments).parameters)
    option = option_meant_by(unknown[1], option_names(), known)
    meant = f"options={{{option!r}: ...}}" if option is not None else meant_by(unknown[1], known)
    hint = "" if meant is None else f"; did you mean {meant}?"
    return ArgumentTypeError(f"{name}() got an unexpected keyword argument {unknown[1]!r}{hint}")
