"""``AUTO``: an explicit and an implicit method, between which a solve changes as the problem becomes stiff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aca_ext.numerics.implicit import ImplicitTableau
from aca_ext.numerics.implicit_tableaus import IMPLICIT_METHODS
from aca_ext.numerics.methods import METHODS
from aca_ext.numerics.tableau import Tableau


@dataclass(frozen=True, eq=False)
class Switching:
    """Two methods of the same order, so that both choose similar steps where stability does not limit them.

    ``explicit`` has an estimate of the stiffness (``numerics.stiffness``); ``implicit`` begins with an explicit stage.
    """

    name: str
    explicit: Tableau
    implicit: ImplicitTableau

    @property
    def parts(self) -> tuple[Tableau, ImplicitTableau]:
        """The two methods; a step records its own by the index here."""
        return self.explicit, self.implicit

    @property
    def order(self) -> int:
        return self.explicit.order

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def dense(self) -> Any:
        return self.explicit.dense


# Of dopri5 and tsit5 the default method, so that a solve that never becomes stiff takes the steps of a default solve.
AUTO = Switching("auto", METHODS["dopri5"], IMPLICIT_METHODS["kvaerno5"])
