"""``Result``, which every example returns."""

from __future__ import annotations

from typing import Any, NamedTuple


class Result(NamedTuple):
    """Outcome of an example.

    Attributes:
        numbers: what it found, by name; ``aca-ext examples`` prints them.
        figure: picture of it, a Matplotlib figure.
    """

    numbers: dict[str, float]
    figure: Any
