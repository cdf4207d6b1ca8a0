"""Arguments that describe a problem, and validation that several share: names, numbers, tensors that require grad."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from aca_ext.errors import UnknownNameError
from aca_ext.problem.admission import check_readable
from aca_ext.problem.state import State, tensors_in
from aca_ext.problem.suggestions import is_implicit, meant_by


@dataclass(eq=False, slots=True)
class ProblemArguments:
    """Arguments of ``solve`` that describe the problem, before validation and never modified.

    A frozen dataclass would take longer to create.
    """

    func: Callable[..., State]
    y0: State
    t: Tensor | Sequence[float]
    _: KW_ONLY
    rtol: float | Tensor = 1e-7
    atol: float | Tensor = 1e-9
    method: str | None = None
    options: Mapping[str, Any] | None = None
    args: Sequence[Any] = ()


def lookup(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Returns ``name`` if it is one of ``allowed``; ``kind`` names the argument in the message.

    Raises:
        UnknownNameError: it is not; the message lists the allowed names and suggests the closest.
    """
    allowed = list(allowed)
    if isinstance(name, str) and name in allowed:
        return name
    meant = meant_by(name, allowed)
    hint = f" Did you mean {meant!r}?" if meant is not None else ""
    if kind == "method" and is_implicit(name):
        hint = " For stiff problems, kvaerno5 is the usual choice."
    raise UnknownNameError(f"unknown {kind} {name!r}; there are {', '.join(allowed)}.{hint}")


def number_in(value: object) -> float | None:
    """The float in a Python or NumPy number or a tensor of one element; None for anything else, bools included."""
    if isinstance(value, Tensor) and value.numel() == 1:
        check_readable("a number", value)
        value = value.detach().item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def holds_grad(x: Any) -> bool:
    """Tells whether a tensor in ``x``, or in tuples, lists and dicts nested in it, requires grad."""
    return any(tensor.requires_grad for tensor in tensors_in(x))
