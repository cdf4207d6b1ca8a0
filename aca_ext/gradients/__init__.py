"""Registry of the gradient methods; each is one file."""

from __future__ import annotations

from aca_ext.gradients import aca, adjoint, direct, naive
from aca_ext.gradients.base import Gradient, Result, Task

GRADIENTS: dict[str, Gradient] = {
    "aca": aca.solve,
    "direct": direct.solve,
    "naive": naive.solve,
    "adjoint": adjoint.solve,
}

__all__ = ["GRADIENTS", "Gradient", "Result", "Task"]
