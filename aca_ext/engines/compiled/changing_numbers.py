"""Python numbers that func reads and that change between solves, such as an annealed weight.

TorchDynamo traces a number as a constant. If a number has changed when func is traced again, it is replaced by a tensor
during that trace. So it becomes an input of the traced graph, which is then valid for every value of the number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aca_ext.engines.compiled.places import Place
from aca_ext.problem.state import State
from aca_ext.problem.trees import leaves_of, parts_like

if TYPE_CHECKING:
    from aca_ext.engines.compiled.backend import Captured


class ChangingNumbers:
    """The numbers on which the traced graphs of one owner depend.

    Attributes:
        known: numbers that traces took as constants, by TorchDynamo's names of their places.
        places: places of the numbers that become tensors.
        is_given_up: func does not work with tensors in place of its numbers.
        compared: the graph that was last compared with func, and the values that the numbers had.
    """

    def __init__(self) -> None:
        self.known: dict[str, float] = {}
        self.places: list[Place] = []
        self.is_given_up = False
        self.compared: tuple[Captured, list[float | None]] | None = None

    def were_compared(self, captured: Captured, scope: dict[str, Any]) -> bool:
        """Tells whether ``compare`` was called last with this graph and the present values."""
        return self.compared is not None and self.compared[0] is captured and self.compared[1] == self._values(scope)

    def compare(
        self,
        captured: Captured,
        scope: dict[str, Any],
        inputs: Sequence[Tensor],
        t: Tensor,
        y: State,
        evaluate: Callable[[], Any],
    ) -> bool:
        """Tells whether a graph, in which tensors replace numbers, equals func for the present numbers.

        A trace evaluates types, sets and keys of dicts once: ``n in {2, 3}`` is false for a tensor, and no guard tells.
        """
        of: dict[str, Sequence[Tensor]] = {"t": (t,), "y": leaves_of(y)}
        of["input"] = [x if x.requires_grad else x.clone() for x in inputs]
        try:
            expected = parts_like(y, evaluate())
            found = captured.graph.forward(*(of[kind][i] for kind, i in captured.roles))
            is_same = all(map(_are_close, expected, found))
        except Exception:  # such as a missing key; func raises it again when it runs uncompiled
            return False
        self.compared = captured, self._values(scope)
        return is_same

    def _values(self, scope: dict[str, Any]) -> list[float | None]:
        """The numbers at the places; None for anything else."""
        found: list[Any] = []
        for place in self.places:
            try:
                value = place.get(place.owner(scope))
            except (AttributeError, LookupError, TypeError, ValueError):
                value = None
            found.append(value if type(value) in (int, float) else None)
        return found

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


def _are_close(one: Tensor, other: Tensor) -> bool:
    size = float(one.detach().abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=size * torch.finfo(one.dtype).eps ** 0.5, equal_nan=True)
