"""Solves inside transforms of PyTorch: torch.func.grad, vjp, jvp, vmap, what is made of them, and forward_ad.

First the steps are chosen from the values alone, without graph or tangent. Then they are repeated in plain PyTorch
operations, through which every transform passes. So no derivative goes through the choice of a step, as always, and
every sample of vmap has the steps that it takes alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aca_ext.engines.arguments import Arguments
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, OptionError
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.batch import BatchProblem, RowPacking, batch_problem_of, is_independent
from aca_ext.problem.problem import Problem
from aca_ext.problem.recorders import recorder
from aca_ext.problem.state import Packing, State
from aca_ext.problem.transforms import Batches, FurtherBatchError, constant_of, outside_transforms
from aca_ext.problem.trees import leaves_of, like
from aca_ext.problem.validation import problem_of
from aca_ext.solution import Solution
from aca_ext.solver.checkpoints import AcceptedStep, StepRecord
from aca_ext.solver.lane_loop import LaneField, LaneOperations, LaneSolver, TransformedLanes
from aca_ext.solver.repeated_steps import PlainOperations, fixed_steps, repeated_states, repeated_states_of_lanes
from aca_ext.solver.stats import Stats
from aca_ext.solver.step_plan import KnownSteps, StepPlan
from aca_ext.vector_field.repeatable import leaving_no_trace, refuse_unrepeatable, repeatable, without_foreign_draws
from aca_ext.vector_field.slope_check import plain_slope_function

_UNAVAILABLE = (
    "norm", "step_t", "jump_t", "on_step_limit", "on_min_step", "on_failure", "grid_constructor", "compact",
)  # fmt: skip
_IN_VMAP = "it was solved inside vmap, where each sample has steps of its own. Replay it there, or solve again."


def solve_transformed(arguments: Arguments) -> Solution:
    """Solves with gradient="aca" or "direct", whose values and derivatives are the same here.

    The repeated steps keep their graph: the memory of a reverse pass is that of gradient="direct".

    Raises:
        ArgumentTypeError, ArgumentValueError, OptionError: an argument is not available inside transforms; func draws
            random numbers, or trains a batch normalisation.
        Those of ``solve``.
    """
    _check_available(arguments)
    arguments = _with_constants(arguments)
    packing, y = _packed(arguments)
    problem = _problem_without_values(arguments, packing, y)
    time_shape = packing.time_shape if isinstance(packing, RowPacking) else None
    ops = PlainOperations(y)
    refuse_unrepeatable(problem.func)
    f = repeatable(plain_slope_function(problem.func, problem.args, packing, ops, time_shape), y, problem.func)
    t = arguments.t if isinstance(arguments.t, Tensor) else torch.tensor(problem.times, dtype=torch.float64)
    if problem.grid is not None:
        steps = [AcceptedStep(t, t_next - t, t_next, []) for t, t_next in pairwise(problem.grid)]
        return _along_common_steps(f, problem, packing, y, t, StepRecord(steps), Stats(backend="reference"))
    with without_foreign_draws(problem.func):
        return _with_own_steps(f, problem, packing, y, t)


def _with_own_steps(f: Any, problem: Problem, packing: Packing, y: Tensor, t: Tensor) -> Solution:
    """The solution of adaptive steps, those that each sample of vmap takes alone."""
    batches = Batches()
    for x in (y, *(x for x in problem.args if isinstance(x, Tensor))):
        batches = batches.with_those_of(x)
    while True:
        try:
            return _adaptive(f, problem, packing, y, t, batches)
        except FurtherBatchError as found:  # func uses a tensor of a further vmap
            batches = found.batches


def _check_available(given: Arguments) -> None:
    """Raises if an argument is not available inside transforms."""
    options = given.options or {}
    unavailable = {
        f"gradient={given.gradient!r}": given.gradient not in ("aca", "direct"),
        f"engine={given.engine!r}": given.engine not in (None, "eager", "auto"),
        f"checkpoints={given.checkpoints!r}": given.checkpoints is not None,
        "callback": given.callback is not None,
        "progress": given.progress,
        "events": len(given.events) > 0,
        "dense": given.dense,
        "output_fn": given.output_fn is not None,
        **{f"option {name}": options.get(name) is not None for name in _UNAVAILABLE},
    }
    for what, is_given in unavailable.items():
        if is_given:
            error = OptionError if what.startswith("option") else ArgumentValueError
            raise error(
                f"{what} is not available inside a function transform (torch.func, forward_ad). Leave it out, or "
                "solve outside of transforms, where derivatives come from torch.autograd."
            )
    if recorder() is not None:
        raise ArgumentTypeError(f"{recorder()} cannot record a solve inside a function transform.")


def _with_constants(given: Arguments) -> Arguments:
    """The arguments with plain tensors as times and tolerances; raises if these carry a derivative."""

    def constant(what: str, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(constant(what, part) for part in x)
        if not isinstance(x, Tensor):
            return x
        x = constant_of(what, x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentTypeError(
                f"{what} requires grad, but has no gradient inside a function transform. Give {what}.detach()."
            )
        return x

    return replace(given, **{what: constant(what, getattr(given, what)) for what in ("t", "rtol", "atol")})


def _packed(arguments: Arguments) -> tuple[Packing, Tensor]:
    packing = (RowPacking if is_independent(arguments.options) else Packing).of(arguments.y0)
    is_batch = all(len(shape) - packing.is_complex > 0 for shape in packing.shapes)
    if isinstance(packing, RowPacking) and not (is_batch and len({shape[0] for shape in packing.shapes}) == 1):
        raise ArgumentValueError(
            'option batch="independent" needs a state whose first dimension is the batch, the same for all components; '
            f"y0 is {packing.describe()}."
        )
    return packing, packing.pack(arguments.y0)


def _problem_without_values(arguments: Arguments, packing: Packing, y: Tensor) -> Problem:
    """The problem with a state of zeros, whose validation needs no values."""
    make: Any = batch_problem_of if is_independent(arguments.options) else problem_of
    with outside_transforms():
        parts = tuple(
            torch.zeros(shape[:-1] if packing.is_complex else shape, dtype=part.dtype, device=part.device)
            for shape, part in zip(packing.shapes, leaves_of(arguments.y0), strict=True)
        )
        y0: State = like(arguments.y0, parts)
        problem: Problem = make(replace(arguments, y0=y0))
    if type(problem.tableau) is not Tableau:
        raise ArgumentValueError(
            f"method {problem.tableau.name!r} is not available inside a function transform (torch.func, forward_ad). "
            "Use an explicit Runge-Kutta method, such as dopri5, or torch.autograd.functional.jacobian and hessian, "
            "which take any method."
        )
    if isinstance(problem, BatchProblem) and problem.is_ragged:
        raise ArgumentValueError(
            "t is padded with NaN, which is not available inside a function transform (torch.func, forward_ad). Solve "
            "samples with equally many times together."
        )
    return problem


def _adaptive(f: Any, problem: Problem, packing: Packing, y: Tensor, t: Tensor, batches: Batches) -> Solution:
    """Chooses the steps of all samples and repeats them."""
    func = problem.func
    row_shape = (len(y), *(1,) * (y.dim() - 1)) if isinstance(packing, RowPacking) else ()
    problem = _of_lanes(problem, batches)
    lanes = TransformedLanes(batches, row_shape)
    field = LaneField(f, lanes.count)
    ops = LaneOperations(y, problem.tolerance, lanes)
    start = ops.scalars([problem.times_of_rows[:, 0]])[0]
    with leaving_no_trace(func, problem.args):
        k0 = field(start, y.detach()).detach()
        batches.read(k0)  # raises FurtherBatchError
        solver = LaneSolver(problem, field, ops, k0, lanes)
        solver.choose_steps(y)
    plan = StepPlan(problem.tableau, solver.record, problem.times_of_rows)
    if lanes.count == 1 and not row_shape:
        counts = solver.stats
        n_steps, n_rejected = int(counts.n_steps[0]), int(counts.n_rejected[0])
        stats = Stats(field.n_evals, n_steps, n_steps - n_rejected, n_rejected, "reference")
        of_rows = plan.known.of_rows
        assert of_rows is not None
        record = StepRecord([AcceptedStep(t, h, t_next, []) for t, h, t_next in of_rows[0].tolist()])
        return _along_common_steps(f, problem, packing, y, t, record, stats)
    ys = repeated_states_of_lanes(f, plan, y, lanes)
    if not batches.is_empty:
        plan = plan.refused(_IN_VMAP)
    return Solution(t, packing.unpack_rows(ys), solver.record.bounds(), solver.stats, plan=plan)


def _of_lanes(problem: Problem, batches: Batches) -> BatchProblem:
    """The problem of all samples: those of vmap, and in each of them the rows if these are independent."""
    if isinstance(problem, BatchProblem):
        return replace(problem, times_of_rows=np.tile(problem.times_of_rows, (batches.count, 1)))
    given = {name: value for name, value in vars(problem).items() if name != "packing"}
    times = np.tile(np.array(problem.times), (batches.count, 1))
    return BatchProblem(**given, packing=RowPacking.of_problem(problem), times_of_rows=times)


def _along_common_steps(
    f: Any, problem: Problem, packing: Packing, y: Tensor, t: Tensor, record: StepRecord, stats: Stats
) -> Solution:
    steps = tuple((s.t, s.h, s.t_next) for s in record.steps)
    plan = StepPlan(problem.tableau, KnownSteps(steps), problem.times, problem.jumps)
    ys = torch.stack(repeated_states(f, fixed_steps(plan, y.dtype), y))
    stats.n_steps = stats.n_steps or len(steps)
    stats.n_accepted = len(steps)
    return Solution(t, packing.unpack_rows(ys), record.bounds(), stats, plan=plan)
