"""f along fixed steps whose ends depend on the requested times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.vector_field.field import VectorField
from aca_ext.vector_field.slope_check import checked_slope_function
from aca_ext.vector_field.slope_function import SlopeFunction


class GridField(VectorField):
    """f, with a graph from every slope to the ends of the step in which it is evaluated.

    Inside step n the time is τ, from node a to node b. If the nodes move by δa and δb, the stage at τ moves by δa on
    its way to a, and by δb at b, and the step becomes longer by δb - δa. A step of length h takes h·k, so the slope of
    the unmoved step is k·(1 + (δb - δa)/h). With δa = δb = 0, values are those of f, bit for bit, and derivatives of
    every order are those of the moved step.

    The last entry of ``args`` are the shifts of all nodes: zeros, with a graph.
    """

    reuses_slopes = False  # one slope belongs to the end of one step, another to the start of the next

    grid: Sequence[float]
    _step: int | None

    @classmethod
    def of(cls, field: VectorField, grid: Sequence[float], shifts: Tensor) -> GridField:
        """``field`` on steps between the nodes of ``grid``, which move by ``shifts``."""
        found: GridField = object.__new__(cls)
        vars(found).update(vars(field), grid=grid, args=(*field.args, shifts), _step=0)
        found._call = checked_slope_function(found.func, found.args_of_func, found.packing, found._ops)
        return found

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        shifts: Tensor = self.args[-1]
        n = self._step
        if n is None or not (shifts.requires_grad and torch.is_grad_enabled()):
            return super().__call__(t, y)
        start, end = self.grid[n], self.grid[n + 1]
        of_start, of_end = shifts[n], shifts[n + 1]
        longer = of_end - of_start
        moved = t + of_start + (t.detach() - start) / (end - start) * longer
        return super().__call__(moved, y) * (1 + longer / (end - start))

    @property
    def fastest(self) -> SlopeFunction:
        return self

    @property
    def args_of_func(self) -> tuple[Any, ...]:
        return self.args[:-1]

    def begin_step(self, n: int | None) -> None:
        self._step = n
