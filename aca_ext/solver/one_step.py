"""Base of the methods whose steps do not depend on one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from aca_ext.kernels.reference import Number
from aca_ext.solver.runge_kutta import Coefficients, Trial
from aca_ext.solver.transposed_step import Compare


class OneStepMethod:
    """A one-step method; see ``solver.method.Steps``."""

    scheme: Any
    step: Any
    compiled: Any | None = None
    memory: Any = None

    def accept(self, y: Tensor, h: Number, trial: Trial) -> Tensor | None:
        return slope_at_end(self.scheme, trial)

    def accept_rows(self, accepted: Any, h: Tensor, trial: Trial) -> None:
        """Goes on to the next step in the rows of a batch that accepted this one, of sizes ``h``."""

    def finish(self) -> None:
        pass

    def repeat(
        self, times: Sequence[Number], y: Tensor, h: Number, k_before: Tensor | None, y_next: Tensor | None
    ) -> Trial:
        trial: Trial = self.step(times, y, h)
        return trial

    def repeated_end(self, compare: Compare, y: Tensor, y_next: Tensor, trial: Trial) -> Tensor:
        compare(trial.y1, trial.k)
        return trial.y1


def slope_at_end(scheme: Coefficients, trial: Trial) -> Tensor | None:
    """The slope at the end of a step, if it is the first slope of the next step of the same method."""
    return trial.k[-1] if scheme.fsal else None
