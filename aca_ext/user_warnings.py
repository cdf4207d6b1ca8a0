"""Warnings that point at the user's line of code, across any number of frames of the package and of torch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INTERNAL = tuple(f"{Path(path).resolve().parent}/" for path in (__file__, torch.__file__))


def warn_user(message: str, category: type[Warning]) -> None:
    """Issues a warning whose location is the innermost frame outside the package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
