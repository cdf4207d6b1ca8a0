"""``Solution``, the result of ``solve``, and the means to resume a solve that stopped early."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aca_ext.errors import ArgumentTypeError, ArgumentValueError, TimeError
from aca_ext.gradients.base import Record
from aca_ext.kernels.layout import stack_rows
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Problem
from aca_ext.problem.resumption import SolverState
from aca_ext.problem.state import Packing, State
from aca_ext.problem.trees import labelled_leaves, leaves_of, map_leaves
from aca_ext.solver.checkpoints import StepRecord
from aca_ext.solver.stats import BatchStats, Stats, sum_of
from aca_ext.solver.step_plan import StepPlan

_RESETS = "a reset changed the state during the solve, at a time that depends on it."
_STOPS = "independent samples were solved with option step_t or jump_t. Solve them with common steps, or without it."
_FAILED = "samples failed, so they have no steps to their last times."


@dataclass(frozen=True)
class Continuation:
    """Everything needed to resume a solve.

    Attributes:
        state: state of the solver where it stopped.
        y: state of the ODE there.
        times_left: requested times that were not reached.
        again: solves on, called as ``again(y, times, state, max_num_steps=..., is_beyond=...)``.
    """

    state: SolverState
    y: State
    times_left: tuple[float, ...]
    again: Callable[..., Solution]


@dataclass(frozen=True)
class EventRecord:
    """Occurrences of one event, in the order of the solve.

    Attributes:
        t: (n,) times of the occurrences, in the unit of t. dtype and device are those of the requested times if these
            are a floating-point tensor, else float64 on the CPU. Differentiable, once.
        y: (n, \\*y0.shape) states at these times, before a reset; for a tree one of such tensors.
            Differentiable, once.

    With independent samples t is (batch, n) and y (batch, n, \\*state of a sample), with n the most occurrences in one
    sample, and NaN for occurrences that others do not have. Of a terminal event t is (batch,) and y like y0.
    """

    t: Tensor
    y: State


@dataclass(frozen=True, repr=False)
class Solution:
    """Result of ``solve``.

    Attributes:
        t: (T,) requested times as given; (batch, T) for independent samples with times of their own. After a stop at
            the step limit, only the times that were reached.
        y: state at these times, (T, \\*y0.shape), NaN at padded times; for a tree one of such tensors.
            Differentiable.
        steps: (n_accepted, 2) float64 on the CPU, start and end of every accepted step, in the unit of t; for
            independent samples a tuple with one such tensor per sample.
        stats: counts of evaluations and steps, and the backend; a ``BatchStats`` for independent samples.
        is_complete: True if all requested times were reached; False only with option ``on_step_limit="stop"``.
        continuation: data for ``resume``; None without option ``on_step_limit="stop"``.
        events: one ``EventRecord`` per event, in the order in which the events were given.
        ended_by: index of the terminal event that ended the solve; None if it reached its last time. With independent
            samples and events, (batch,) int64 on the CPU, with -1 for a sample that reached its last time; states at
            times after the event of a sample are NaN.
        plan: data for ``aca_ext.replay``.
    """

    t: Tensor
    y: State
    steps: Tensor | tuple[Tensor, ...]
    stats: Stats | BatchStats
    is_complete: bool = True
    continuation: Continuation | None = field(default=None, repr=False, compare=False)
    events: tuple[EventRecord, ...] = ()
    ended_by: int | Tensor | None = None
    plan: StepPlan | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """Shows shapes and counts instead of values."""
        t, y = self.t, self.y
        states = _forms(y)
        ends = f", {t[0].item():.6g} to {t[-1].item():.6g}" if t.dim() == 1 and len(t) else ""
        is_complete = "" if self.is_complete else ", is_complete=False"
        counts = ", ".join(str(len(record.t)) for record in self.events)
        events = f", events: {counts}" if self.events else ""
        return f"{type(self).__name__}(t: {_form(t)}{ends}, y: {states},\n  {self.stats!r}{is_complete}{events})"

    def __call__(self, t: Any) -> State:
        """Raises ArgumentValueError: only a solution of ``solve(..., dense=True)`` is a function of time."""
        raise ArgumentValueError(
            "the solution holds states at its requested times alone. Give dense=True to solve for solution(t) and "
            "solution.derivative(t), or request t."
        )

    derivative = __call__

    @property
    def t_reached(self) -> float:
        """The last time that the solve reached, in the unit of t.

        Raises:
            ArgumentValueError: the solve was made without option ``on_step_limit="stop"``.
        """
        return float(self._continuation().state.t)

    @property
    def y_reached(self) -> State:
        """The state at ``t_reached``, shaped like y0. Differentiable.

        Raises:
            ArgumentValueError: the solve was made without option ``on_step_limit="stop"``.
        """
        return self._continuation().y

    def resume(self, t: Tensor | Sequence[float] = (), *, max_num_steps: int | None = None) -> Solution:
        """Continues the solve to the requested times that were not reached, and then to further times.

        The solver keeps its step size and first slope. It takes the same steps, bit for bit, as a solve without the
        stop, and the gradient is exact for all of them. Newton's method begins anew: steps of implicit methods may
        differ by its tolerance. A complete solve can be resumed too: its steps are those of a
        solve that had to land on its last time (option ``step_t``).

        Args:
            t: (N,) further times in the unit of t, beyond those requested before, in the same direction. They have no
                gradient.
            max_num_steps: limit on the trial steps of this call. Default: the limit of the solve, but at least 100 000
                if this solution is complete.

        Returns:
            The whole solution from the first time on. Its stats are the sums over all parts, except
            ``n_f_evals_backward``. Each part evaluates func once more, to find the tensors that it depends on.

        Raises:
            ArgumentTypeError: ``t`` requires grad.
            ArgumentValueError: the solve was made without option ``on_step_limit="stop"``, or no time is left.
            TimeError: the further times do not continue in the direction of the solve.
            SolveError, SlopeError, ReplayError: as in ``solve``.
        """
        part = self._continuation()
        if isinstance(t, Tensor) and t.requires_grad:
            raise ArgumentTypeError(
                "t requires grad, but a resumed solve has no gradient with respect to times. Give t.detach()."
            )
        further = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach().reshape(-1).tolist()
        times = [*part.times_left, *further]
        if not times:
            raise ArgumentValueError(f"the solve reached its last time, t={part.state.t!r}; give further times.")
        for one, other in pairwise([part.state.t, *times]):
            if part.state.sign * (other - one) <= 0:
                raise TimeError(
                    f"after t={one!r} comes t={other!r}; further times must continue in the direction of the solve. "
                    f"Give times {'above' if part.state.sign > 0 else 'below'} {one!r}."
                )
        start = torch.tensor([part.state.t, *times], dtype=torch.float64, device="cpu")
        is_beyond = self.is_complete
        return self._joined(part.again(part.y, start, part.state, max_num_steps=max_num_steps, is_beyond=is_beyond))

    def _continuation(self) -> Continuation:
        if self.continuation is None:
            raise ArgumentValueError(
                'this solution cannot be resumed; solve with options={"on_step_limit": "stop"} to make one that can.'
            )
        return self.continuation

    def _joined(self, rest: Solution) -> Solution:
        y = followed_by(self.y, rest.y)
        assert isinstance(self.steps, Tensor)
        assert isinstance(rest.steps, Tensor)
        return replace(
            rest,
            t=torch.cat([self.t, rest.t[1:].to(self.t)]),
            y=y,
            steps=torch.cat([self.steps, rest.steps]),
            stats=sum_of(self.stats, rest.stats),
            plan=None if self.plan is None or rest.plan is None else self.plan.followed_by(rest.plan),
        )


def checked_plan(plan: StepPlan, stats: Stats | BatchStats) -> StepPlan:
    """The plan, with a refusal if a sample failed."""
    return plan.refused(_FAILED) if isinstance(stats, BatchStats) and stats.failures else plan


def event_record(found: Sequence[tuple[Tensor, Tensor]], ys: Tensor, packing: Packing) -> EventRecord:
    """The record of an event from float64 times and packed states; ``ys`` are the outputs of the solve."""
    t = torch.stack([t for t, _ in found]) if found else torch.empty(0, dtype=torch.float64, device="cpu")
    y = torch.stack([y for _, y in found]) if found else ys[:0]
    return EventRecord(t, packing.unpack_rows(y))


def batch_event_record(t: Tensor, ys: Tensor, packing: Packing, is_terminal: bool) -> EventRecord:
    """The record of an event of independent samples from times (n, batch) and packed states (n, batch, ...)."""
    if is_terminal and len(t) == 0:
        t, ys = t.new_full((1, *t.shape[1:]), math.nan), ys.new_full((1, *ys.shape[1:]), math.nan)
    y = packing.unpack_rows(ys)
    of_samples = map_leaves(lambda part: part[0] if is_terminal else part.transpose(0, 1), y)
    return EventRecord(t[0] if is_terminal else t.T, of_samples)


def joined(parts: Sequence[Solution], times: Tensor) -> Solution:
    """One solution to ``times`` of parts that follow one another, each from a reset of the one before it."""
    y, stats = parts[0].y, parts[0].stats
    for part in parts[1:]:
        y, stats = followed_by(y, part.y), sum_of(stats, part.stats)
    events = tuple(_all_of(records, times) for records in zip(*(part.events for part in parts), strict=True))
    steps = torch.cat([part.steps for part in parts])  # type: ignore[misc]
    n = sum(len(part.t) for part in parts) - len(parts) + 1
    plan = parts[0].plan
    if plan is not None and len(parts) > 1:
        plan = plan.refused(_RESETS)
    is_complete = n == len(times)
    return replace(
        parts[-1], t=times[:n], y=y, steps=steps, stats=stats, events=events, is_complete=is_complete, plan=plan
    )


def _all_of(records: Sequence[EventRecord], times: Tensor) -> EventRecord:
    y = map_leaves(lambda *parts: torch.cat(parts), *(record.y for record in records))
    t = torch.cat([record.t for record in records])
    return EventRecord(t.to(times) if times.is_floating_point() else t, y)


def followed_by(y: State, rest: State) -> State:
    """The rows of two parts of a solve, without the first of the second part, where the first part ended."""
    return map_leaves(_stacked, y, rest)


def stopped(solution: Solution, problem: Problem, record: StepRecord, again: Callable[..., Solution]) -> Solution:
    """The solution of a solve that can be resumed; the state where it stopped is moved out of its outputs."""
    end = record.end
    if end is None:  # a single time, so there was no step
        return solution
    n_reached = len(leaves_of(solution.y)[0]) - (not end.is_complete and len(record.steps) > 0)
    y_reached, left = map_leaves(lambda part: part[-1], solution.y), problem.times[n_reached:]
    return replace(
        solution,
        t=solution.t[:n_reached],
        plan=None if solution.plan is None else solution.plan.reaching(n_reached),
        y=map_leaves(lambda part: part[:n_reached], solution.y),
        is_complete=end.is_complete,
        continuation=Continuation(end, y_reached, left, again),
    )


class LazySolution(Solution):
    """A solution that computes ``steps`` and ``plan`` at first access: an engine may have to copy from the device."""

    @classmethod
    def of(cls, t: Tensor, y: State, record: Record, stats: Stats | BatchStats, problem: Problem) -> LazySolution:
        solution = object.__new__(cls)
        plan = problem.tableau, record, problem.known_times, problem.jumps
        jumps_of_samples = isinstance(problem, BatchProblem) and problem.stops_of_rows is not None
        vars(solution).update(t=t, y=y, stats=stats, _plan=plan, _jumps_of_samples=jumps_of_samples)
        return solution

    @cached_property
    def steps(self) -> Tensor | tuple[Tensor, ...]:
        record: Record = vars(self)["_plan"][1]
        return record.bounds()

    @cached_property
    def plan(self) -> StepPlan:
        plan = checked_plan(StepPlan(*vars(self)["_plan"]), self.stats)
        return plan.refused(_STOPS) if vars(self)["_jumps_of_samples"] else plan

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (self.t, self.y, self.steps, self.stats, self.plan)


def _loaded(t: Tensor, y: State, steps: Any, stats: Any, plan: StepPlan | None) -> Solution:
    return Solution(t, y, steps, stats, plan=plan)


def _form(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _forms(y: Any) -> str:
    """Shapes and dtypes of the states; ``output_fn`` may have returned anything."""
    if isinstance(y, tuple) and all(isinstance(part, Tensor) for part in y):
        return f"({', '.join(map(_form, y))})"
    leaves = [(path, x) for path, x in labelled_leaves(y, "") if isinstance(x, Tensor)]
    return ", ".join(f"{path}: {_form(x)}" if path else _form(x) for path, x in leaves)


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """The outputs of both parts without the first of ``other``, which is the start of that part; keeps the strides."""
    return stack_rows([*one.unbind(0), *other[1:].unbind(0)], one[0])
