"""Warnings that point at the user's call, however many frames of the package and of torch lie in between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INTERNAL = tuple(f"{Path(path).resolve().parent}/" for path in (__file__, torch.__file__))


def warn_user(message: str, category: type[Warning]) -> None:
    """Gives a warning with the first line outside the package and torch as its place."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
