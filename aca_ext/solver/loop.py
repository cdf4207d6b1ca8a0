"""The loop of a solve: adaptive, or over a fixed grid. Knows nothing of gradients.

Each iteration proposes a trial, makes the step, measures the error and judges it. The parts live elsewhere: decisions
in ``aca_ext.numerics.step_control``, arithmetic in ``runge_kutta``, storage in ``checkpoints``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import NonFiniteError, SolveError, StepLimitError, StepSizeError
from aca_ext.kernels.extension import step_control_for
from aca_ext.kernels.fused import TorchOperations, empty_rows
from aca_ext.kernels.reference import Number, as_float
from aca_ext.numerics.step_control import StepControl
from aca_ext.problem.problem import Problem
from aca_ext.problem.resumption import SolverState
from aca_ext.solver.callback import report
from aca_ext.solver.checkpoints import AcceptedStep, Checkpoints, StepRecord
from aca_ext.solver.event_search import STEPS_BEFORE
from aca_ext.solver.failures import NO_TOLERANCE, NOT_FINITE_ON_GRID, check_finite, failure_at, growth_advice, is_finite
from aca_ext.solver.first_step import first_step
from aca_ext.solver.method import steps_of
from aca_ext.solver.runge_kutta import Trial, error_norm, interpolate, stage_times
from aca_ext.solver.slope_checkpoints import SlopeCheckpoints
from aca_ext.solver.stats import Stats
from aca_ext.solver.step_events import StepEvents
from aca_ext.solver.stiffness import stiffness_advice
from aca_ext.vector_field.field import RandomState, VectorField

AnyStepControl = Any  # StepControl, or its C++ counterpart


class Solver:
    """One solve of a problem with the given operations.

    Args:
        k0: the first slope, f(t0, y0), as ``field.first`` returned it; None if the solve has no step.
        rows: tensors that receive the outputs, one per requested time. None returns new tensors, with an autograd graph
            if ``ops`` make one.
        checkpoints: storage for the states of accepted steps; None if no backward pass will replay them.
        differentiable_steps: makes the step size a tensor, so that the autograd graph includes the controller.

    Attributes:
        record: accepted steps.
        stats: counts of the solve.
    """

    def __init__(
        self,
        problem: Problem,
        field: VectorField,
        ops: TorchOperations,
        *,
        k0: Tensor | None,
        rows: Sequence[Tensor] | None = None,
        checkpoints: Checkpoints | SlopeCheckpoints | None = None,
        differentiable_steps: bool = False,
    ) -> None:
        self.problem, self.field, self.ops = problem, field, ops
        self.record = StepRecord()
        self.stats = Stats(backend=ops.backend)
        self._steps = steps_of(problem, field, ops, self.stats, self.record, checkpoints)
        self._k, self._rows, self._checkpoints = k0, rows, checkpoints
        self._differentiable_steps = differentiable_steps
        self._outputs: list[Tensor] = []
        self._events = StepEvents(problem, ops, self.record) if problem.events else None
        # States of the random generators before the first slope of the next step; None if func draws no numbers.
        self._first_random_state: RandomState | None = field.random_trail[-1] if field.random_trail else None
        resumed = problem.resumed
        if resumed is not None and problem.times[0] in problem.jumps:
            self._k = self._first_random_state = None
        elif resumed is not None and resumed.k is not None:
            self._k, self._first_random_state = resumed.k, resumed.random_state

    def run(self, y0: Tensor) -> list[Tensor]:
        """Solves from the packed state ``y0``; returns one output per requested time, then one per event.

        A solve that stops early returns the outputs reached, then the state where it stopped.

        Raises:
            SolveError: the solve did not reach its last time.
        """
        problem, stats = self.problem, self.stats
        compiled = self._runs_of_steps()
        if compiled is not None and self._rows is None:
            self._rows = empty_rows(len(problem.times) + problem.may_stop, y0).unbind(0)
        self._outputs = [y0 if self._rows is None else self._rows[0].copy_(y0)]
        kind: Callable[..., AnyStepControl] = StepControl if compiled is None else step_control_for
        control = kind(problem.controller, problem.max_num_steps, problem.times, problem.step_ends)
        if control.status == "running":
            self._start(control, y0)
            if self._events is not None:
                self._events.start(control.t, y0, self._k, self._reach(control))
            y = self._run(control, y0) if compiled is None else self._run_compiled(compiled, control, y0)
            stats.n_steps, stats.n_accepted = control.n_steps, control.n_accepted
            stats.n_rejected = stats.n_steps - stats.n_accepted
            self._finish(control, y)
            self._steps.finish()
        if self._events is not None:
            self._events.append_to(self._outputs)
        stats.n_f_evals = self.field.n_evals
        return self._outputs

    def _start(self, control: AnyStepControl, y: Tensor) -> None:
        """Sets the size of the first trial; a resumed solve continues with the size that it had."""
        controller, resumed = self.problem.controller, self.problem.resumed
        if controller is None:
            return
        if resumed is not None:
            control.h, control.ratios = resumed.h, resumed.ratios
        elif controller.first_step is not None:
            control.h = controller.first_step
        else:
            self._choose_first_step(control, y)
        if self._differentiable_steps:
            control.h = torch.tensor(control.h, dtype=torch.float64, device="cpu")

    def _reach(self, control: AnyStepControl) -> float:
        """The time over which rounding may have moved a start off the surface of an event, negative backward in time.

        Not the whole length of the solve, which is without limit where the first event is looked for.
        """
        h = as_float(control.h) if self.problem.adaptive else abs(self.problem.step_ends[0] - control.t)
        return control.sign * min(self.problem.length, max(abs(as_float(control.t)), STEPS_BEFORE * h))

    def _run(self, control: AnyStepControl, y: Tensor) -> Tensor:
        """Steps until the solve ends or stops; returns the state reached."""
        while control.status == "running":
            control.propose()
            if control.status != "running":
                break
            self.field.begin_step(len(self.record.steps))
            t, h, t_next, buffers = control.t, control.h_trial, control.t_next, self.field.buffer_values()
            trial = self._try(t, y, h, t_next)
            is_adaptive = self.problem.adaptive
            ratio = error_norm(self.ops, self._steps.scheme, y, h, trial) if is_adaptive else math.nan
            control.judge(min(ratio, 1.0) if self._is_smallest(h) and ratio < math.inf else ratio)
            if control.is_accepted:
                self._accept(control, t, y, h, trial)
            else:
                self._reject(trial, buffers)
            is_stopped = report(self.problem, control, (t, t_next, h), ratio, y, self.field.n_evals)
            if trial.failure is not None and not (is_adaptive and control.can_shrink):
                raise self._failure(StepSizeError if is_adaptive else SolveError, control, trial.failure)
            if control.is_accepted:
                y = trial.y1
            elif control.status == "not_finite":
                self._look(control, y)
            del trial  # frees its slopes before the next step allocates its own
            if is_stopped and control.status == "running":
                control.status = "stopped"
        return y

    def _run_compiled(self, compiled: Any, control: AnyStepControl, y: Tensor) -> Tensor:
        """``_run`` in C++, in calls that end at an output inside a step or when the status changes."""
        rows = tuple(self._rows or ())
        while control.status == "running":
            found = compiled.run_steps(self.field.fastest, control, *self._keep, y, self._k, rows)
            y, self._k, accepted, inside = found
            self._outputs += [rows[i] for i in self.record.add_run(accepted, self.problem.times)]
            if inside is not None:
                start, slopes = inside
                step = self.record.steps[-1]
                for i, theta in step.outputs:
                    if theta != 1.0:
                        interpolate(self.ops, self._steps.scheme.tableau, start, step.h, slopes, theta, rows[i])
            if control.status == "not_finite":
                self._look(control, y)
        return y

    def _finish(self, control: AnyStepControl, y: Tensor) -> None:
        """Records where the solve ended, or raises the error of a solve that did not reach its end."""
        problem, status = self.problem, control.status
        if status == "event":
            return
        if status == "done":
            if problem.stops_at_limit:
                self.record.end = self._state(control, is_complete=True)
            # A fixed grid is checked for NaN once, at its end, and only on the CPU: on a GPU it would synchronise.
            if not problem.adaptive and y.device.type == "cpu" and not is_finite(y):
                raise self._failure(NonFiniteError, control, NOT_FINITE_ON_GRID)
        elif status == "stopped" or (status == "step_limit" and problem.stops_at_limit):
            self._stop(control, y)
        else:
            kind: type[SolveError] = StepLimitError if status == "step_limit" else StepSizeError
            raise failure_at(problem, self.field, control, kind, advice=partial(self._advice, control, y.detach()))

    def _advice(self, control: AnyStepControl, y: Tensor) -> str | None:
        """Advice for a solve that stopped at ``y``; None if nothing special is known."""
        growth = growth_advice(self.problem, y, as_float(control.t))
        if growth is not None:
            return growth
        return stiffness_advice(self.problem, self.field, self.ops, self._steps, control, y, self._k)

    def _stop(self, control: AnyStepControl, y: Tensor) -> None:
        """Appends the state reached as a last output, if a step was accepted, and records the solver's state."""
        i, steps = len(self._outputs), self.record.steps
        if steps:
            self._outputs.append(y if self._rows is None else self._rows[i].copy_(y))
            steps[-1] = steps[-1]._replace(outputs=[*steps[-1].outputs, (i, 1.0)])
        self.record.end = self._state(control, is_complete=False)

    def _state(self, control: AnyStepControl, is_complete: bool) -> SolverState:
        h = control.h if self.problem.adaptive else math.nan
        at = control.t, h, control.sign, control.ratios, self._k, self._first_random_state
        return SolverState(*at, is_complete, self._steps.memory)

    def _is_smallest(self, h: Number) -> bool:
        """Tells whether a step is accepted whatever its error."""
        problem = self.problem
        return problem.accepts_min_step and problem.controller is not None and abs(h) <= problem.controller.min_step

    def _choose_first_step(self, control: AnyStepControl, y: Tensor) -> None:
        assert self._k is not None
        compiled = self._runs_of_steps()
        if compiled is None or not compiled.choose_first_step(self.field.fastest, control, y, self._k):
            control.h = first_step(self.problem, self.field, self.ops, control, y, self._k)

    def _runs_of_steps(self) -> Any | None:
        """The C++ stepper that makes many steps per call; None if each step needs Python, as with a callback."""
        problem, field = self.problem, self.field
        is_watched = field.draws_random_numbers or field.moving_buffers or problem.jumps or self._differentiable_steps
        is_watched = is_watched or problem.on_step is not None or self._events is not None or problem.accepts_min_step
        return None if is_watched or problem.tolerance.norm is not None else self._steps.compiled

    @property
    def _keep(self) -> tuple[Callable[[], Tensor] | None, Callable[[], None] | None]:
        """Functions that return the buffer of a trial's solution, and that keep it; None without checkpoints."""
        checkpoints = self._checkpoints
        return (None, None) if checkpoints is None else (checkpoints.slot, checkpoints.accept)

    def _try(self, t: Number, y: Tensor, h: Number, t_next: Number) -> Trial:
        self.field.random_trail = []
        out = self._checkpoints.slot() if self._checkpoints is not None else None
        times = stage_times(self._steps.scheme, t, h, t_next, self.problem.jumps, y.dtype)
        return self._steps.step(times, y, h, self._k, out)

    def _accept(self, control: AnyStepControl, t: Number, y: Tensor, h: Number, trial: Trial) -> None:
        """Adds a trial to the solution: outputs, record, checkpoint, and the first slope of the next step."""
        t_next = control.t
        due = [(i, control.position(i)) for i in range(*control.due)]
        if self._events is not None:
            end = self._events.find(self._steps.scheme.tableau, t, t_next, y, h, trial)
            due = [(i, theta) for i, theta in due if theta <= end]
            control.status = "event" if end <= 1 else control.status
        for i, theta in due:
            out = None if self._rows is None else self._rows[i]
            if theta != 1.0:
                y_i = interpolate(self.ops, self._steps.scheme.tableau, y, h, trial.k, theta, out)
            else:
                y_i = trial.y1 if out is None else out.copy_(trial.y1)
            self._outputs.append(y_i)
        random_states = self._random_states()
        self.record.steps.append(AcceptedStep(as_float(t), as_float(h), as_float(t_next), due, random_states))
        if self._checkpoints is not None:
            self._checkpoints.accept()
        k_next = self._steps.accept(y, h, trial)
        is_reused = self.field.reuses_slopes and t_next not in self.problem.jumps
        self._k = k_next if is_reused else None
        self._first_random_state = random_states[-1] if self._k is not None and random_states else None

    def _reject(self, trial: Trial, buffers: list[Tensor] | None) -> None:
        """Discards a trial, but keeps its first slope: the next trial starts from the same state."""
        self.field.restore_buffers(buffers)
        random_states = self._random_states()
        self._k = trial.k[0] if self._steps.scheme.starts_explicitly else None
        self._first_random_state = random_states[0] if random_states else None

    def _random_states(self) -> Sequence[RandomState] | None:
        """States of the random generators before each stage of the last trial; None if func draws no numbers."""
        trail, first = self.field.random_trail, self._first_random_state
        return (trail if first is None else [first, *trail]) or None

    def _look(self, control: AnyStepControl, y: Tensor) -> None:
        """Continues after a trial whose error was not finite, or raises if a smaller step cannot help."""
        if self._k is not None:
            check_finite(self.problem, self.field, control, y, self._k)
        if control.can_shrink:
            control.resume()
        elif control.ratio == math.inf and self.problem.tolerance.forbids_error():
            raise self._failure(StepSizeError, control, NO_TOLERANCE)
        else:
            raise self._failure(NonFiniteError, control)

    def _failure(self, kind: type[SolveError], control: AnyStepControl, message: str | None = None) -> SolveError:
        return failure_at(self.problem, self.field, control, kind, message)
