"""The loop of a solve: adaptive, or over a fixed grid. Knows nothing of gradients.

Storage is in checkpoints, arithmetic in the step, decisions in the controller, where outputs fall in outputs; what is
left here is their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import NonFiniteError, SolveError, StepLimitError, StepSizeError
from aca_ext.kernels.fused import TorchOperations, controller_for
from aca_ext.kernels.reference import Number
from aca_ext.numerics.controller import Controller
from aca_ext.numerics.output_times import OutputTimes
from aca_ext.problem.problem import Problem
from aca_ext.problem.resumption import SolverState
from aca_ext.progress import Step
from aca_ext.solver.checkpoints import AcceptedStep, Checkpoints, StepRecord
from aca_ext.solver.failures import NO_TOLERANCE, failure_of
from aca_ext.solver.runge_kutta import (
    Trial,
    compiled_stepper,
    error_norm,
    interpolate,
    scheme_of,
    stage_times,
    stepper,
)
from aca_ext.vector_field.field import RandomState, VectorField

Leap = Callable[..., Any]  # ``_C.Stepper.leap`` but for where it starts and ends


@dataclass
class Stats:
    """Counts of one solve.

    Attributes:
        n_f_evals: evaluations of func in the forward pass, of which engine="graph" makes more than it counts: steps
            launched ahead in vain, and a look at whether func has changed.
        n_steps: trial steps, n_accepted + n_rejected.
        n_accepted: steps that became part of the solution.
        n_rejected: steps whose error was too large.
        backend: what did the arithmetic: "cpu" or "cuda" kernels, "reference", plain PyTorch, "compiled" or "graph".
        n_f_evals_backward: evaluations of func in the backward pass; None until it has run.
        compile_seconds: time that engine="compiled" took to trace and compile, or engine="graph" to capture; 0 where
            they found all they needed.
    """

    n_f_evals: int = 0
    n_steps: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    backend: str = ""
    n_f_evals_backward: int | None = None
    compile_seconds: float = 0.0


class Solver:
    """One solve of a problem with the given operations.

    Args:
        k0: the first slope where it is known, f(t0, y0) as ``field.first`` returned it.
        rows: tensors to write the outputs into, or None to return tensors with whatever graph the operations make.
        checkpoints: storage for the states of accepted steps, or None where no replay is to come.
        differentiable_steps: make the step size a tensor, so that the graph reaches through the controller.

    Attributes:
        record: the accepted steps.
        stats: the counts.
    """

    def __init__(
        self,
        problem: Problem,
        field: VectorField,
        ops: TorchOperations,
        *,
        k0: Tensor | None,
        rows: Sequence[Tensor] | None = None,
        checkpoints: Checkpoints | None = None,
        differentiable_steps: bool = False,
    ) -> None:
        self.problem, self.field, self.ops = problem, field, ops
        self.record = StepRecord()
        self.stats = Stats(backend=ops.backend)
        self.scheme = scheme_of(problem.tableau, problem.adaptive)
        self._compiled = compiled_stepper(ops, self.scheme)
        self._step = stepper(field.fastest, ops, self.scheme, self._compiled)
        self._k, self._rows, self._checkpoints = k0, rows, checkpoints
        self._differentiable_steps = differentiable_steps
        self._output_times = OutputTimes(problem.times)
        self._outputs: list[Tensor] = []
        # Random states behind the first slope of the step to come, where func draws random numbers.
        self._first_random_state: RandomState | None = field.random_trail[-1] if field.random_trail else None
        resumed = problem.resumed
        if resumed is not None and problem.times[0] in problem.jumps:
            self._k = self._first_random_state = None
        elif resumed is not None and resumed.k is not None:
            self._k, self._first_random_state = resumed.k, resumed.random_state

    def run(self, y0: Tensor) -> list[Tensor]:
        """Solves from ``y0`` and returns the outputs, one for each requested time.

        Raises:
            SolveError: the end could not be reached.
        """
        self._outputs = [y0 if self._rows is None else self._rows[0].copy_(y0)]
        if self.problem.controller is None:
            self._run_fixed(y0)
        elif len(self.problem.times) > 1:
            self._run_adaptive(self.problem.controller, y0)
        self.stats.n_f_evals = self.field.n_evals
        return self._outputs

    def _run_fixed(self, y: Tensor) -> None:
        grid = self.problem.grid or ()
        compiled = self._runs_of_steps()
        if compiled is not None and self._rows is not None:
            y = self._walk(compiled, grid, y, self._rows)
        else:
            for t, t_next in pairwise(grid):
                trial = self._try(t, y, t_next - t, t_next)
                self.stats.n_steps += 1
                self._accept(t, y, t_next - t, t_next, trial)
                self._report(t, t_next, t_next - t, math.nan, is_accepted=True)
                y = trial.y1
                del trial  # its slopes
        self.stats.n_steps = self.stats.n_accepted = len(self.record.steps)
        # One look at the end, and only where it costs no wait for a device.
        if y.device.type == "cpu" and len(grid) > 1 and not _is_finite(y):
            h = grid[-1] - grid[-2]
            message = (
                "the solution on the fixed grid is NaN or infinite at its end. Use smaller steps, or look at func."
            )
            raise self._failure(NonFiniteError, grid[-1], h, math.nan, message)

    def _run_adaptive(self, controller: Controller, y: Tensor) -> None:
        problem, stats = self.problem, self.stats
        t: Number = problem.times[0]
        end = problem.times[-1]
        sign = math.copysign(1.0, end - t)
        stops = [*problem.stops, end]
        ratios: list[Number] = []  # of the last accepted steps, newest first
        if problem.resumed is None:
            h: Number = self._initial_step(controller, t, y, sign)
        else:
            h, ratios = problem.resumed.h, problem.resumed.ratios
        if self._differentiable_steps:
            h = torch.tensor(h, dtype=torch.float64, device="cpu")
        leap = self._leaps(controller)
        while stops:
            if stats.n_steps >= problem.max_num_steps:
                if problem.stops_at_limit:
                    return self._stop(t, h, y, sign, ratios)
                raise self._failure(StepLimitError, t, h, ratios[0] if ratios else math.nan)
            if leap is not None:
                t, h, y, ratios = self._leap(leap, controller, t, h, y, ratios, stops[0])
                if t == stops[0]:
                    stops.pop(0)
                continue
            is_cut = sign * (t + sign * h) >= sign * stops[0] or abs(stops[0] - t) <= h * (1 + 1e-12)
            t_next, h_now = (stops[0], abs(stops[0] - t)) if is_cut else (t + sign * h, h)
            if t_next == t:
                raise self._failure(StepSizeError, t, h, ratios[0] if ratios else math.nan)
            buffers = self.field.buffer_values()
            trial = self._try(t, y, sign * h_now, t_next)
            ratio = error_norm(self.ops, self.scheme, y, sign * h_now, trial)
            stats.n_steps += 1
            if ratio <= 1:
                self._accept(t, y, sign * h_now, t_next, trial)
                self._report(t, t_next, sign * h_now, ratio, is_accepted=True)
                t, y = t_next, trial.y1
                ratios = [ratio, *ratios[:2]]
                grown = controller.grow(h_now, ratios)
                h = max(grown, h) if is_cut else grown  # a step cut short says little about the size to come
                if is_cut:
                    stops.pop(0)
            else:
                self._reject(trial, buffers)
                self._report(t, t_next, sign * h_now, ratio, is_accepted=False)
                h = controller.shrink(h_now, ratio)
                if h < controller.min_step < h_now:
                    h = controller.min_step
                self._check_progress(controller, t, y, h, sign, ratio)
            del trial  # its slopes are not to live beside those of the next
        if problem.stops_at_limit:
            self.record.end = self._state(t, h, sign, ratios, is_complete=True)

    def _stop(self, t: Number, h: Number, y: Tensor, sign: float, ratios: list[Number]) -> None:
        """Makes the state reached so far one more output, unless it is still the first, and notes how to go on."""
        i, steps = len(self._outputs), self.record.steps
        if steps:
            self._outputs.append(y if self._rows is None else self._rows[i].copy_(y))
            steps[-1] = steps[-1]._replace(outputs=[*steps[-1].outputs, (i, 1.0)])
        self.record.end = self._state(t, h, sign, ratios, is_complete=False)

    def _state(self, t: Number, h: Number, sign: float, ratios: list[Number], is_complete: bool) -> SolverState:
        return SolverState(t, h, sign, ratios, self._k, self._first_random_state, is_complete)

    def _report(self, t: Number, t_next: Number, h: Number, ratio: Number, is_accepted: bool) -> None:
        if self.problem.on_step is not None:
            n, times = self.stats, (_float(t), _float(t_next), _float(h))
            counts = n.n_steps, n.n_accepted, n.n_rejected, self.field.n_evals
            self.problem.on_step(Step._make((*times, _float(ratio), is_accepted, *counts)))

    def _initial_step(self, controller: Controller, t: float, y: Tensor, sign: float) -> float:
        """Hairer's first step, or the user's; an evaluation that it takes is no part of the solution."""
        if controller.first_step is not None:
            return controller.first_step
        field, ops, k = self.field, self.ops, self._k
        assert k is not None
        length = abs(self.problem.times[-1] - t)
        compiled = self._runs_of_steps()
        if compiled is not None:
            h = compiled.first_step(field.fastest, controller_for(controller), t, y, k, length, sign)
            if not math.isnan(h):
                return h
        with torch.no_grad():
            norm_f = float(ops.error_norm(k, None, 0.0, y, y))
            if not math.isfinite(norm_f):
                self._check_finite(t, y, k, math.nan, norm_f)

            def change_of_slope(h: float) -> float:
                euler = ops.weighted_sum(y, sign * h, [k], (1.0,))
                with field.aside():
                    change = field(ops.scalars([t + sign * h])[0], euler)
                return float(ops.error_norm(change, k, -1.0, y, y))

            norm_y = float(ops.error_norm(y, None, 0.0, y, y))
            return controller.initial(length, norm_y, norm_f, change_of_slope)

    def _runs_of_steps(self) -> Any | None:
        """Compiled code for several steps at a time; None where something has to happen at each of them."""
        problem, field = self.problem, self.field
        is_watched = field.draws_random_numbers or field.moving_buffers or problem.jumps or self._differentiable_steps
        is_watched = is_watched or problem.on_step is not None
        return None if is_watched or problem.tolerance.norm is not None else self._compiled

    @property
    def _keep(self) -> tuple[Callable[[], Tensor] | None, Callable[[], None] | None]:
        """Where the solution of a step belongs, and how it is kept."""
        checkpoints = self._checkpoints
        return (None, None) if checkpoints is None else (checkpoints.slot, checkpoints.accept)

    def _walk(self, compiled: Any, grid: Sequence[float], y: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """The steps of a fixed grid, as ``_run_fixed`` would make them."""
        row_of = {time: i for i, time in enumerate(self.problem.times)}  # each of them is a node
        due = [row_of.get(node) for node in grid[1:]]
        outputs = [None if i is None else rows[i] for i in due]
        y, self._k = compiled.walk(self.field.fastest, *self._keep, (y, self._k), grid, outputs)
        self.record.steps = [
            AcceptedStep(t, t_next - t, t_next, [] if i is None else [(i, 1.0)])
            for t, t_next, i in zip(grid, grid[1:], due, strict=False)
        ]
        return y

    def _leaps(self, controller: Controller) -> Leap | None:
        compiled = self._runs_of_steps()
        return (
            None
            if compiled is None
            else partial(compiled.leap, self.field.fastest, controller_for(controller), *self._keep)
        )

    def _leap(
        self, leap: Leap, controller: Controller, t: float, h: float, y: Tensor, ratios: list[float], stop: float
    ) -> tuple[float, float, Tensor, list[float]]:
        """The steps up to the next stop or beyond the next output, as ``_run_adaptive`` would make them."""
        stats, sign, start = self.stats, math.copysign(1.0, stop - t), (t, h, y, self._k, ratios)
        trials = self.problem.max_num_steps - stats.n_steps
        reached = leap(start, stop, self._output_times.next, trials)
        (t, h, y, self._k, ratios), steps, n_rejected, ends_inside, alarm = reached
        if not steps and not n_rejected:
            raise self._failure(StepSizeError, t, h, ratios[0] if ratios else math.nan)
        self.record.steps += [AcceptedStep(t_n, h_n, t_end, []) for t_n, h_n, t_end in steps]
        stats.n_steps += len(steps) + n_rejected
        stats.n_accepted += len(steps)
        stats.n_rejected += n_rejected
        if ends_inside is not None:
            last = self.record.steps[-1]
            last.outputs.extend(self._write_outputs(last.t, ends_inside[0], last.h, last.t_next, y, ends_inside[1]))
        if alarm is not None:
            self._check_progress(controller, t, y, h, sign, alarm)
        return t, h, y, ratios

    def _try(self, t: Number, y: Tensor, h: Number, t_next: Number) -> Trial:
        self.field.random_trail = []
        out = self._checkpoints.slot() if self._checkpoints is not None else None
        times = stage_times(self.scheme, t, h, t_next, self.problem.jumps, y.dtype)
        return self._step(times, y, h, self._k, out)

    def _accept(self, t: Number, y: Tensor, h: Number, t_next: Number, trial: Trial) -> None:
        """Makes a trial part of the solution: outputs, record, checkpoint, and the first slope of the next step."""
        due = self._write_outputs(t, y, h, t_next, trial.y1, trial.k)
        random_states = self._random_states()
        self.record.steps.append(AcceptedStep(_float(t), _float(h), _float(t_next), due, random_states))
        if self._checkpoints is not None:
            self._checkpoints.accept()
        self.stats.n_accepted += 1
        reusable = self.scheme.fsal and t_next not in self.problem.jumps
        self._k = trial.k[-1] if reusable else None
        self._first_random_state = random_states[-1] if reusable and random_states else None

    def _write_outputs(
        self, t: Number, y: Tensor, h: Number, t_next: Number, y1: Tensor, k: Sequence[Tensor]
    ) -> list[tuple[int, float]]:
        """The outputs inside a step from (t, y) to (t_next, y1), and where they are."""
        due = self._output_times.within(t, t_next)
        for i, theta in due:
            out = None if self._rows is None else self._rows[i]
            if theta != 1.0:
                y_i = interpolate(self.ops, self.problem.tableau, y, h, k, theta, out)
            else:
                y_i = y1 if out is None else out.copy_(y1)
            self._outputs.append(y_i)
        return due

    def _reject(self, trial: Trial, buffers: list[Tensor] | None) -> None:
        """Leaves no trace of a trial but its first slope, which the next one shares."""
        self.stats.n_rejected += 1
        self.field.restore_buffers(buffers)
        random_states = self._random_states()
        self._k = trial.k[0]
        self._first_random_state = random_states[0] if random_states else None

    def _random_states(self) -> Sequence[RandomState] | None:
        """The random states behind each stage of the last trial, where func draws random numbers."""
        trail, first = self.field.random_trail, self._first_random_state
        return (trail if first is None else [first, *trail]) or None

    def _check_progress(
        self, controller: Controller, t: Number, y: Tensor, h: Number, sign: float, ratio: Number
    ) -> None:
        """Raises where a smaller step cannot help."""
        is_finite = math.isfinite(_float(ratio))
        if not is_finite and self._k is not None:
            self._check_finite(t, y, self._k, h, ratio)
        if h >= controller.min_step and t + sign * h * 0.5 != t:
            return
        if ratio == math.inf and self.problem.tolerance.forbids_error():
            raise self._failure(StepSizeError, t, h, ratio, NO_TOLERANCE)
        raise self._failure(StepSizeError if is_finite else NonFiniteError, t, h, ratio)

    def _check_finite(self, t: Number, y: Tensor, k: Tensor, h: Number, ratio: Number) -> None:
        if _is_finite(y) and _is_finite(k):
            return
        what = "func returned NaN or infinity at" if _is_finite(y) else "the state is NaN or infinite at"
        raise self._failure(NonFiniteError, t, h, ratio, f"{what} t={_float(t):.17g}; look at func there.")

    def _failure(
        self, kind: type[SolveError], t: Number, h: Number, ratio: Number, message: str | None = None
    ) -> SolveError:
        stats = self.stats
        stats.n_f_evals = self.field.n_evals
        return failure_of(
            self.problem,
            kind,
            message,
            t=_float(t),
            h=_float(h),
            error_ratio=_float(ratio),
            n_accepted=stats.n_accepted,
            n_rejected=stats.n_rejected,
            n_f_evals=stats.n_f_evals,
        )


def _is_finite(x: Tensor) -> bool:
    # A finite sum says so at a third of the time.
    return math.isfinite(x.detach().sum()) or bool(torch.isfinite(x).all())


def _float(x: Number) -> float:
    return x.item() if isinstance(x, Tensor) else x
