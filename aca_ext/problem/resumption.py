"""State of the solver where a solve stopped, from which another solve continues with the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SolverState:
    """State of the solver between two steps, without the state of the ODE.

    Attributes:
        t: time reached.
        h: size of the next trial step; NaN for fixed steps.
        sign: direction of the solve, 1 or -1.
        ratios: error ratios of the last accepted steps, newest first.
        k: slope at t; None if it has to be evaluated.
        random_state: states of the random generators before k was evaluated; None if func draws no random numbers.
        memory: data of a method that switches; see ``solver.method.Steps``.
        is_complete: True if the solve reached its last time.
    """

    t: Any
    h: Any
    sign: float
    ratios: list[Any]
    k: Tensor | None
    random_state: tuple[Tensor, ...] | None
    is_complete: bool
    memory: Any = None
