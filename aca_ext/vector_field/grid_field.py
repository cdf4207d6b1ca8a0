"""f along fixed steps whose ends depend on the requested times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aca_ext.problem.moving_nodes import MovingNodes
from aca_ext.vector_field.field import VectorField
from aca_ext.vector_field.slope_check import checked_slope_function
from aca_ext.vector_field.slope_function import SlopeFunction


class GridField(VectorField):
    """f, with a graph from every slope to the ends of the step in which it is evaluated.

    Let the ends a and b = a + h of a step move by δa and δb. A stage at the share s of the step then moves by
    (1 - s)·δa + s·δb, and the step becomes longer by δb - δa. The step takes h·k from each slope k, so in the unmoved
    step the slope k·(1 + (δb - δa)/h) has the same effect. With δa = δb = 0 values are those of f, bit for bit, and
    derivatives of every order are those of the moved step.

    The last entry of ``args`` holds the shifts of the requested times: zeros, with a graph.
    """

    reuses_slopes = False  # one slope belongs to the end of one step, another to the start of the next

    _grid: MovingNodes
    _step: int | None

    @classmethod
    def of(cls, field: VectorField, grid: MovingNodes, shifts: Tensor) -> GridField:
        """``field`` on steps between the nodes of ``grid``, as the requested times move by ``shifts``."""
        found: GridField = object.__new__(cls)
        vars(found).update(vars(field), _grid=grid, args=(*field.args, shifts), _step=0)
        found._call = checked_slope_function(found.func, found.args_of_func, found.packing, found._ops)
        return found

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        n, shifts, grid = self._step, self.args[-1], self._grid
        if n is None or not (shifts.requires_grad and torch.is_grad_enabled()):
            return super().__call__(t, y)
        start, h = grid.nodes[n], grid.nodes[n + 1] - grid.nodes[n]
        of_start = grid.shift(n, shifts)
        longer = grid.shift(n + 1, shifts) - of_start
        moved = t + of_start + (t - start) / h * longer  # rodas5p differentiates by t
        return super().__call__(moved, y) * (1 + longer / h)

    @property
    def fastest(self) -> SlopeFunction:
        return self

    @property
    def args_of_func(self) -> tuple[Any, ...]:
        return self.args[:-1]

    def begin_step(self, n: int | None) -> None:
        self._step = n
