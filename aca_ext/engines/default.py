"""The engine of solves that name none."""

from __future__ import annotations

from aca_ext.engines import ENGINES
from aca_ext.problem.arguments import lookup

_default = "eager"


def set_default_engine(engine: str) -> None:
    """Sets the engine of every solve that is called without ``engine``, also of a ``NeuralODE`` made before.

    It holds for the whole process, all threads included, like ``torch.set_default_dtype``; a solve that is running
    keeps its engine. At first it is "eager".

    Args:
        engine: a name that ``odeint`` takes; "auto" suits programs that repeat their solves, such as training.

    Raises:
        UnknownNameError: there is no engine of that name.
    """
    global _default
    _default = lookup("engine", engine, ENGINES)  # one assignment, which other threads see at once or not yet


def get_default_engine() -> str:
    """The engine of every solve that is called without ``engine``."""
    return _default
