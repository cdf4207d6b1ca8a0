"""Solves under torch.jit.trace, torch.export or make_fx: fixed steps in plain torch operations, or an error.

The kernels work on addresses, which a recorder cannot see: a recording of them would read memory that nothing wrote.
Plain torch operations are recorded, and so is their gradient. Step sizes become constants of the recording. This is
right for fixed steps only: adaptive steps would be those of the example for every input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.kernels.operations import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.numerics.adams import Adams
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.options import FIXED_OPTIONS
from aca_ext.problem.problem import Problem
from aca_ext.problem.recorders import JIT
from aca_ext.problem.validation import checked_problem
from aca_ext.solution import LazySolution, Solution
from aca_ext.solver.checkpoints import AcceptedStep, StepRecord
from aca_ext.solver.repeated_steps import PlainOperations, fixed_steps, repeated_states
from aca_ext.solver.stats import Stats
from aca_ext.solver.step_plan import StepPlan
from aca_ext.vector_field.slope_check import SlopeCheck

_value_of = getattr(torch._C, "_get_value_trace", None)  # private to torch


def solve_recorded(by: str, given: ProblemArguments) -> Solution:
    """Solves with fixed steps; the gradient comes from autograd, and no engine is used.

    Raises:
        ArgumentTypeError: the times or the step size depend on an input of the recording, or require grad.
        ArgumentValueError: the steps are adaptive.
        Those of ``solve``.
    """
    t, options = given.t, given.options if isinstance(given.options, Mapping) else {}
    for what, x in (("t", t), *((f"option {name}", options.get(name)) for name in FIXED_OPTIONS)):
        _refuse_input(by, what, x)
    with _quiet():
        problem = checked_problem(given)
    if problem.grid is None:
        raise ArgumentValueError(
            f"{by} would record the adaptive steps of its example, but each input needs its own. Use fixed steps, by "
            'options={"step_size": h} or a method such as "rk4", or record func alone and solve outside of the '
            "recording."
        )
    if problem.newton is not None:
        raise ArgumentValueError(
            f"{by} would record the iterations of Newton's method of its example, but each input needs its own. Use an "
            f"explicit method instead of {problem.tableau.name!r}."
        )
    if problem.interp is not None or problem.jumps:
        raise ArgumentValueError(f"{by} records no solve with option interp or perturb; leave them out.")
    if isinstance(problem.tableau, Adams):
        raise ArgumentValueError(f"{by} records no solve with method {problem.tableau.name!r}; use rk4, for example.")
    ys, record = _solution_on(problem.grid, problem)
    stats = Stats(n_steps=len(record.steps), n_accepted=len(record.steps), backend=TorchOperations.backend)
    with _quiet():
        times = t if isinstance(t, Tensor) else torch.tensor(problem.times, dtype=torch.float64)
        return LazySolution.of(times, problem.packing.unpack_rows(ys), record, stats, problem)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tracer's warnings about constants; those made inside are shapes and validated numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        yield


class _RecordedOperations(PlainOperations):
    """Plain operations whose constants the tracer does not warn of."""

    def scalars(self, values: Sequence[Number]) -> Sequence[Tensor]:
        with _quiet():
            return super().scalars(values)


def _solution_on(grid: tuple[float, ...], problem: Problem) -> tuple[Tensor, StepRecord]:
    """States at the requested times, and the record of the steps."""
    y = problem.y0
    ops = _RecordedOperations(y)
    check = SlopeCheck(problem.packing, ops)

    def f(t: Tensor, y: Tensor) -> Tensor:
        with _quiet():
            state = problem.packing.unpack(y)
        k = problem.func(t, state, *problem.args)
        with _quiet():
            return check(k)

    record = StepRecord([AcceptedStep(t, t_next - t, t_next, []) for t, t_next in pairwise(grid)])
    plan = StepPlan(problem.tableau, record, problem.times)
    return torch.stack(repeated_states(f, fixed_steps(plan, y.dtype), y, ops)), record


def _refuse_input(by: str, what: str, x: object) -> None:
    """Raises if the recorder does not know the value of ``x``, or must not keep it as a constant."""
    if not isinstance(x, Tensor):
        return
    if by != JIT:
        raise ArgumentTypeError(f"{what} is a tensor, whose values {by} does not know. Give numbers.")
    if (x.requires_grad and torch.is_grad_enabled()) or _depends_on_input(x):
        raise ArgumentTypeError(
            f"{what} is computed from an input of the model or requires grad, but {by} would record its values as "
            "constants. Give numbers or a constant tensor."
        )


def _depends_on_input(x: Tensor) -> bool:
    """Tells whether ``x`` was computed from an input of the model that torch.jit.trace records."""
    waiting, seen = [] if _value_of is None else [_value_of(x)], set()
    while waiting:
        value = waiting.pop()
        if value.debugName() in seen:
            continue
        seen.add(value.debugName())
        node = value.node()
        if node.kind() == "prim::Param" and value.type().kind() != "ClassType":  # a ClassType is the model itself
            return True
        inputs = list(node.inputs())
        waiting += inputs[:1] if node.kind() in ("aten::to", "aten::type_as") else inputs  # others give a dtype
    return False
