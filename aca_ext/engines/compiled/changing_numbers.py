"""Python numbers that func reads and that change between solves, such as an annealed weight.

TorchDynamo traces a number as a constant. If a number has changed when func is traced again, it is replaced by a tensor
during that trace. So it becomes an input of the traced graph, which is then valid for every value of the number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aca_ext.engines.compiled.places import Place


class ChangingNumbers:
    """The numbers on which the traced graphs of one owner depend.

    Attributes:
        known: numbers that traces took as constants, by TorchDynamo's names of their places.
        places: places of the numbers that become tensors.
        is_given_up: func does not work with tensors in place of its numbers.
    """

    def __init__(self) -> None:
        self.known: dict[str, float] = {}
        self.places: list[Place] = []
        self.is_given_up = False

    def lift_changed(self, scope: dict[str, Any]) -> bool:
        """Turns known numbers that have changed into tensors for later traces; tells whether there are any."""
        if self.is_given_up:
            return False
        count = len(self.places)
        for name, before in self.known.items():
            place = Place(name)
            try:
                owner = place.owner(scope)
                now = place.get(owner)
            except (AttributeError, LookupError, TypeError, ValueError):  # a func of the same owner without this place
                continue
            if type(now) is type(before) and now != before and place.is_own(owner):
                self.places.append(place)
        for place in self.places[count:]:
            del self.known[place.name]
        return len(self.places) > count

    @contextmanager
    def as_tensors(self, scope: dict[str, Any]) -> Iterator[None]:
        """Replaces the numbers by tensors inside the context."""
        replaced: list[tuple[Place, Any, Any]] = []
        try:
            for place in self.places:
                try:
                    owner = place.owner(scope)
                    number = place.get(owner)
                except (AttributeError, LookupError, TypeError, ValueError):
                    continue
                if type(number) in (int, float):
                    # Integers become float64 too: torch computes with integer tensors in single precision.
                    place.set(owner, torch.tensor(number, dtype=torch.float64, device="cpu"))
                    replaced.append((place, owner, number))
            yield
        finally:
            for place, owner, number in reversed(replaced):
                place.set(owner, number)
