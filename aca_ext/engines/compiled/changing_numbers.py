"""Python numbers that func reads and that change from solve to solve, such as a weight that is annealed.

A trace takes a number for a constant. One that has changed when func is traced again becomes a tensor for the time of
the trace, and so an input of the graph, which then serves for every value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aca_ext.engines.compiled.places import Place


class ChangingNumbers:
    """The numbers that graphs of one owner depend on.

    Attributes:
        known: numbers that traces took for constants, by TorchDynamo's names of their places.
        places: of the numbers that become tensors.
        is_given_up: func needs them as numbers.
    """

    def __init__(self) -> None:
        self.known: dict[str, float] = {}
        self.places: list[Place] = []
        self.is_given_up = False

    def lift_changed(self, scope: dict[str, Any]) -> bool:
        """Tells whether some of the known numbers have changed, which then become tensors from now on."""
        if self.is_given_up:
            return False
        count = len(self.places)
        for name, before in self.known.items():
            place = Place(name)
            try:
                owner = place.owner(scope)
                now = place.get(owner)
            except (AttributeError, LookupError, TypeError, ValueError):  # another func of this owner has none
                continue
            if type(now) is type(before) and now != before and place.is_own(owner):
                self.places.append(place)
        for place in self.places[count:]:
            del self.known[place.name]
        return len(self.places) > count

    @contextmanager
    def as_tensors(self, scope: dict[str, Any]) -> Iterator[None]:
        """Makes them tensors inside the context."""
        replaced: list[tuple[Place, Any, Any]] = []
        try:
            for place in self.places:
                try:
                    owner = place.owner(scope)
                    number = place.get(owner)
                except (AttributeError, LookupError, TypeError, ValueError):
                    continue
                if type(number) in (int, float):
                    # An integer too, for torch computes with integer tensors in single precision.
                    place.set(owner, torch.tensor(number, dtype=torch.float64, device="cpu"))
                    replaced.append((place, owner, number))
            yield
        finally:
            for place, owner, number in reversed(replaced):
                place.set(owner, number)
