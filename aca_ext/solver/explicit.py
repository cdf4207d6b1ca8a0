"""An explicit Runge-Kutta method, bound to f and the operations of one solve."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.solver.one_step import OneStepMethod
from aca_ext.solver.runge_kutta import Scheme, Trial, compiled_stepper, stepper, transposed_stepper
from aca_ext.solver.transposed_step import Compare, compare_implicit_end, repeated_implicit_end


class ExplicitMethod(OneStepMethod):
    """An explicit Runge-Kutta method; see ``solver.method.Method``."""

    def __init__(self, f: Any, ops: TorchOperations, scheme: Scheme) -> None:
        self._f, self._ops = f, ops
        self.scheme: Scheme = scheme
        self.compiled = compiled_stepper(ops, scheme)
        self.step = stepper(f, ops, scheme, self.compiled)

    @cached_property
    def vjp(self) -> Any:
        return transposed_stepper(self._f, self._ops, self.scheme)


class ExplicitAmongImplicit(ExplicitMethod):
    """An explicit method for the replay of a solve in which implicit steps were made too.

    A state that implicit steps have computed again differs from that of the forward pass by the error of Newton's
    method, and so does the end of an explicit step from there.
    """

    def __init__(self, f: Any, ops: TorchOperations, scheme: Scheme, tolerance: float) -> None:
        super().__init__(f, ops, scheme)
        self._tolerance = tolerance

    @cached_property
    def vjp(self) -> Any:
        ops, tolerance = self._ops, self._tolerance
        transposed = transposed_stepper(self._f, ops, self.scheme)

        def vjp(
            times: Sequence[float],
            y: Tensor,
            h: float,
            outputs: Sequence[tuple[Sequence[float], Tensor]],
            compare: Compare | None = None,
            y_next: Tensor | None = None,
        ) -> Tensor:
            def compare_end(y1: Tensor, k: Sequence[Tensor]) -> None:
                compare_implicit_end(ops, compare, y, y_next, y1, k, tolerance)

            return transposed(times, y, h, outputs, compare_end, y_next)

        return vjp

    def repeated_end(self, compare: Compare, y: Tensor, y_next: Tensor, trial: Trial) -> Tensor:
        return repeated_implicit_end(self._ops, compare, y, y_next, trial.y1, trial.k, self._tolerance)
