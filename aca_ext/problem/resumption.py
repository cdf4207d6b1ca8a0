"""State of the solver from which a solve goes on exactly where another one stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SolverState:
    """The solver between two steps, but for the state of the ODE.

    Attributes:
        t, h: time, and size of the next trial step.
        sign: direction of the solve, 1 or -1.
        ratios: error ratios of the last accepted steps, newest first.
        k: slope at t where it is known, else None.
        random_state: random generators' states behind k, where func draws random numbers.
        is_complete: the end of the solve was reached.
    """

    t: Any
    h: Any
    sign: float
    ratios: list[Any]
    k: Tensor | None
    random_state: tuple[Tensor, ...] | None
    is_complete: bool
