"""Solves with ``dense=True`` or ``output_fn``: their checks, and the solution that they return."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext.engines.arguments import Arguments
from aca_ext.engines.base import Request
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, TimeError
from aca_ext.gradients.base import Result
from aca_ext.known_steps.dense import DenseSolution, Interpolant
from aca_ext.known_steps.dense_rows import RowInterpolant, refuse_padded
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.batch import BatchProblem
from aca_ext.problem.problem import Problem
from aca_ext.problem.sample_times import checked_sample_times, times_of_samples
from aca_ext.problem.times import times_of
from aca_ext.solver.checkpoints import StepRecord
from aca_ext.solver.step_plan import StepPlan
from aca_ext.vector_field.repeatable import refuse_unrepeatable


def dense_problem(arguments: Arguments, problem: Problem) -> Problem:
    """The problem with a method that has dense output and, for ``output_fn`` alone, without the states in between.

    Raises:
        ArgumentTypeError: ``dense`` is no bool, or ``output_fn`` is no function.
        TimeError: the solve has no step.
        ArgumentValueError: another evaluation of func would not repeat the first.
    """
    if not isinstance(arguments.dense, bool):
        raise ArgumentTypeError(f"dense is {arguments.dense!r}; give True or False.")
    if arguments.output_fn is not None and not callable(arguments.output_fn):
        raise ArgumentTypeError(
            f"output_fn is of type {type(arguments.output_fn).__name__}; give a function of (t, y)."
        )
    if len(problem.times) == 1:
        raise TimeError(
            "t holds a single time, so there is no interval for dense or output_fn. Give two times or more."
        )
    refuse_unrepeatable(problem.func)
    if problem.tableau.dense is None:
        problem = replace(problem, tableau=problem.tableau.with_hermite_output())
    # Adaptive steps do not depend on the times in between, a fixed grid does.
    if arguments.output_fn is None or not problem.adaptive:
        return problem
    ends = problem.times[0], problem.times[-1]
    if isinstance(problem, BatchProblem):
        refuse_padded(problem.times_of_rows)
        return replace(problem, times=ends, times_of_rows=problem.times_of_rows[:, [0, -1]])
    return replace(problem, times=ends)


def check_dense(request: Request, engine: str) -> None:
    """Raises ArgumentValueError if another argument excludes ``dense`` and ``output_fn``."""
    problem = request.problem
    obstacles = {
        f"engine={engine!r}": engine != "eager",
        f"gradient={request.gradient!r}": request.gradient != "aca",
        f"checkpoints={request.checkpoints!r}": request.checkpoints is not None,
        f"method={problem.tableau.name!r}": type(problem.tableau) is not Tableau,
        'option on_failure="nan"': isinstance(problem, BatchProblem) and problem.nan_on_failure,
        'option on_step_limit="stop"': problem.stops_at_limit,
        "events": len(problem.events) > 0,
        "t that requires grad": request.learnt is not None,
    }
    for what, is_given in obstacles.items():
        if is_given:
            raise ArgumentValueError(
                f"dense or output_fn is given, but does not support {what}. Leave one of the two out; both need "
                'engine="eager", gradient="aca" and an explicit Runge-Kutta method.'
            )


def dense_solution(arguments: Arguments, problem: Problem, result: Result) -> DenseSolution:
    """The solution of a solve whose outputs are followed by the ends of its steps.

    Raises:
        ArgumentValueError: func draws random numbers.
    """
    if isinstance(problem, BatchProblem):
        return _of_samples(arguments, problem, result)
    record, t = result.record, arguments.t
    assert isinstance(record, StepRecord)
    plan = StepPlan(problem.tableau, StepRecord(record.steps), problem.times, problem.jumps)
    if plan.known.refusal is not None:
        raise ArgumentValueError(f"dense or output_fn is given, but {plan.known.refusal}")
    n = len(problem.times)
    interpolant = Interpolant(problem.func, problem.args, problem.packing, plan, problem.y0, result.ys[n:])
    asked = times_of(t)
    given = t if isinstance(t, Tensor) else torch.tensor(asked, dtype=torch.float64, device="cpu")
    if arguments.output_fn is None:
        y: Any = problem.packing.unpack_rows(result.ys[:n])
    else:
        y = interpolant.outputs(arguments.output_fn, asked)
    plan = replace(plan, times=asked)
    return DenseSolution(given, y, record.bounds(), result.stats, plan=plan, interpolant=interpolant)


def _of_samples(arguments: Arguments, problem: BatchProblem, result: Result) -> DenseSolution:
    """``dense_solution`` for independent samples."""
    n, t, of_rows = problem.times_of_rows.shape[1], arguments.t, problem.times_of_rows
    interval = np.stack([of_rows[:, 0], problem.last_times], 1)
    plan = StepPlan(problem.tableau, result.record, interval)
    interpolant = RowInterpolant(problem.func, problem.args, problem.packing, plan, problem.y0, result.ys[n:])
    times, _ = checked_sample_times(t)
    asked = times_of_samples(times, len(of_rows))
    if arguments.output_fn is None:
        y: Any = problem.packing.unpack_rows(result.ys[:n])
    else:
        y = interpolant.outputs(arguments.output_fn, asked)
    given = t if isinstance(t, Tensor) else torch.from_numpy(times.copy())
    steps = result.record.bounds()
    return DenseSolution(given, y, steps, result.stats, plan=replace(plan, times=asked), interpolant=interpolant)
