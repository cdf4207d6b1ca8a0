"""Samples of a batch that fail: an error that names the sample, or with ``on_failure="nan"`` an end for it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import NonFiniteError, SolveError, StepLimitError, StepSizeError
from aca_ext.kernels.extension import STATUSES
from aca_ext.kernels.fused import Array
from aca_ext.problem.batch import BatchProblem
from aca_ext.solver.batch_record import Mask
from aca_ext.solver.failures import NO_TOLERANCE, default_reason, fault_of_start
from aca_ext.vector_field.field import VectorField

RUNNING, DONE, STEP_LIMIT, STEP_SIZE, NOT_FINITE = map(
    STATUSES.index, ("running", "done", "step_limit", "step_size", "not_finite")
)


class SampleFailures:
    """Judges the samples whose control cannot go on.

    Args:
        control: step controls of the samples.

    Attributes:
        errors: errors of the samples that failed, by sample; filled only with ``on_failure="nan"``.
    """

    def __init__(self, problem: BatchProblem, field: VectorField, control: Any) -> None:
        self._problem, self._field, self._control = problem, field, control
        self.errors: dict[int, SolveError] = {}

    def check_proposal(self) -> None:
        """Raises SolveError, or ends the samples, where the control proposed no trial."""
        control = self._control
        before = len(self.errors)
        self._end(control.status == STEP_LIMIT, StepLimitError)
        self._end(control.status == STEP_SIZE, StepSizeError)
        if len(self.errors) > before:
            control.propose()  # the samples just ended rest

    def check_start(self, y: Tensor, k: Tensor, norm_f: Array) -> None:
        """As ``check_proposal`` for samples whose state or slope at the start is not finite."""
        suspects = ~np.isfinite(norm_f) & (self._control.status == RUNNING)
        self._end_not_finite(suspects, y, k, norm_f)

    def check_progress(self, y: Tensor, k: Tensor | None, failures: Mapping[int, str]) -> None:
        """As ``check_proposal`` after a rejected trial: resumes the samples that a smaller step can help.

        Args:
            k: first slopes; None if they are not known.
            failures: for the samples whose implicit step has no solution, the reason.
        """
        control = self._control
        self._end(control.status == STEP_SIZE, StepSizeError)
        doubtful = control.status == NOT_FINITE
        if not doubtful.any():
            return
        self._end_not_finite(doubtful, y, k, control.ratio)
        control.retry()
        stuck = control.status == NOT_FINITE
        unsolved = np.isin(np.arange(len(stuck)), list(failures))
        self._end(stuck & unsolved, StepSizeError, lambda row: failures[row])
        stuck = control.status == NOT_FINITE
        if self._problem.tolerance.forbids_error():
            self._end(stuck & (control.ratio == np.inf), StepSizeError, lambda _: NO_TOLERANCE)
        self._end(control.status == NOT_FINITE, NonFiniteError)

    def _end_not_finite(self, suspects: Mask, y: Tensor, k: Tensor | None, ratio: Array) -> None:
        if y.numel() == 0:
            return
        for what, x in (("the state is NaN or infinite at", y), ("func returned NaN or infinity at", k)):
            if x is None or not suspects.any():
                return
            failed = suspects & ~self._are_finite(x)

            def reason(row: int, what: str = what) -> str:
                return self._fault_of_start(row) or f"{what} t={self._control.t[row]:.17g}; look at func there."

            self._end(failed, NonFiniteError, reason, ratio)
            suspects = suspects & ~failed

    def _are_finite(self, x: Tensor) -> Mask:
        finite: Mask = torch.isfinite(x).reshape(len(x), -1).all(1).cpu().numpy()
        return finite

    def _fault_of_start(self, row: int) -> str | None:
        return fault_of_start(self._problem.y0[row])

    def _end(
        self,
        failed: Mask,
        kind: type[SolveError],
        reason: Callable[[int], str] | None = None,
        ratio: Array | None = None,
    ) -> None:
        """Raises the error of the first failed sample, or keeps the errors and ends the samples."""
        rows = np.flatnonzero(failed).tolist()
        if rows and not self._problem.nan_on_failure:
            raise self._error(rows[0], len(rows) - 1, kind, reason, ratio)
        for row in rows:
            self.errors[row] = self._error(row, 0, kind, reason, ratio)
        self._control.status[failed] = DONE

    def _error(
        self, row: int, others: int, kind: type[SolveError], reason: Callable[[int], str] | None, ratio: Array | None
    ) -> SolveError:
        control, problem = self._control, self._problem
        why = reason(row) if reason is not None else default_reason(problem, kind, problem.last_times[row])
        return kind(
            f"The solve of sample {row}{f' (and {others} more)' if others else ''} with {problem.tableau.name} "
            f"stopped: {why}",
            t=float(control.t[row]),
            h=float(control.h[row]) or math.nan,  # NaN until a step is chosen
            error_ratio=float((control.ratio if ratio is None else ratio)[row]),
            n_accepted=int(control.n_accepted[row]),
            n_rejected=int(control.n_steps[row] - control.n_accepted[row]),
            n_f_evals=self._field.n_evals,
            sample=row,
        )
