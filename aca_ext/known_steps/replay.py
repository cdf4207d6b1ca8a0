"""``replay``: the accepted steps of a solve as a differentiable function of fixed length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.problem.batch import RowPacking
from aca_ext.problem.state import Packing, State
from aca_ext.problem.trees import leaves_of
from aca_ext.solution import Solution
from aca_ext.solver.repeated_steps import (
    FixedStep,
    PlainOperations,
    Rows,
    fixed_steps,
    repeated_states,
    repeated_states_of_lanes,
)
from aca_ext.solver.step_plan import StepPlan
from aca_ext.vector_field.repeatable import refuse_unrepeatable, repeatable, without_foreign_draws
from aca_ext.vector_field.slope_check import plain_slope_function


def replay(
    func: Callable[..., State],
    solution: Solution,
    y0: State,
    *,
    args: Sequence[Any] = (),
    params: Mapping[str, Tensor] | None = None,
) -> State:
    """Repeats the accepted steps of a solve from ``y0``, in plain PyTorch.

    The number of steps, their sizes and their times are constants, so this is a function of y0, args, params and all
    that func depends on. It composes with torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap), forward-mode
    derivatives, torch.compile, torch.export and torch.onnx.export. At the arguments of the solve, values and gradients
    are those of the solve up to rounding. At others the error of the steps is not controlled. A reverse pass keeps the
    graph of all steps in memory.

    Args:
        func: function (t, y, \\*args), as for ``solve``.
        solution: result of ``solve`` with any engine and gradient. In a batch of independent samples each sample has
            its own steps.
        y0: initial state with the structure, dtype and device of the solve. With steps that all samples share, its
            shapes are free; for independent samples the first dimension is the batch of the solve.
        args: further arguments of func.
        params: values for parameters and buffers of a module func, by name, as for ``torch.func.functional_call``.
            Default: those that the module holds.

    Returns:
        The states at the times of the solution, (T, \\*y0.shape); for a tree one of such. Not
        differentiable with respect to the times.

    Raises:
        ArgumentTypeError: an argument has a type that is not accepted.
        ArgumentValueError: the steps cannot be repeated: the method is no explicit Runge-Kutta method, a reset changed
            the state, a sample failed or had stops of its own, func draws random numbers or trains a batch
            normalisation; or y0 is another batch than that of independent samples. Random numbers
            are not noticed inside torch.compile and torch.export, which record those of NumPy as constants.
        SlopeError: func returned something that is not a derivative of the state.
    """
    prepared = _prepared(solution)
    if not callable(func):
        raise ArgumentTypeError(f"func is of type {type(func).__name__}; give a callable func(t, y, *args).")
    refuse_unrepeatable(func)
    called = _with_params(func, params)
    packing = Packing.of(y0) if prepared.lanes is None else _row_packing(y0, prepared.n_rows)
    y = packing.pack(y0)
    if y.dtype != prepared.dtype:
        raise ArgumentTypeError(f"y0 has real dtype {y.dtype}, but the solution has {prepared.dtype}. Convert y0.")
    time_shape = packing.time_shape if isinstance(packing, RowPacking) else None
    f = repeatable(plain_slope_function(called, args, packing, PlainOperations(y), time_shape), y, func)
    with without_foreign_draws(func):
        if prepared.lanes is None:
            ys = torch.stack(repeated_states(f, prepared.steps, y))
        else:
            ys = repeated_states_of_lanes(f, prepared.lanes, y, Rows(y))
    return packing.unpack_rows(ys)


class _Prepared(NamedTuple):
    """The steps of a solution as constants: ``steps`` that all samples share, or ``lanes`` of ``n_rows`` samples."""

    dtype: torch.dtype
    steps: Sequence[FixedStep]
    lanes: StepPlan | None = None
    n_rows: int = 0


# torch.compile does not trace the rational numbers of a method.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepared(solution: object) -> _Prepared:
    if not isinstance(solution, Solution):
        raise ArgumentTypeError(
            f"solution is of type {type(solution).__name__}; give the Solution that aca_ext.solve returns."
        )
    plan = solution.plan
    if plan is None:
        raise ArgumentValueError("the solution has no record of its steps. Give one that aca_ext.solve returned.")
    known, y = plan.known, solution.y
    if known.refusal is not None:
        raise ArgumentValueError(f"the steps of this solution cannot be repeated: {known.refusal}")
    dtype = leaves_of(y)[0].dtype.to_real()
    if known.of_rows is not None:
        return _Prepared(dtype, (), plan, len(known.of_rows))
    return _Prepared(dtype, fixed_steps(plan, dtype))


def _with_params(func: Callable[..., State], params: object) -> Callable[..., State]:
    """func with other values for the parameters and buffers that ``params`` names."""
    if params is None:
        return func
    if not isinstance(params, Mapping) or not all(isinstance(p, Tensor) for p in params.values()):
        raise ArgumentTypeError(
            f"params is of type {type(params).__name__}; give a dict of tensors by name, dict(func.named_parameters())."
        )
    if not isinstance(func, nn.Module):
        raise ArgumentTypeError(
            f"params are given by name, but func is of type {type(func).__name__}, not an nn.Module. Give tensors that "
            "func uses by args=(...), or let func refer to them."
        )
    unknown = [name for name in params if name not in _names(func)]
    if unknown:
        raise ArgumentValueError(f"params has {unknown[0]!r}, which func does not have; it has {sorted(_names(func))}.")
    values = dict(params)
    return lambda t, y, *args: torch.func.functional_call(func, values, (t, y, *args))


def _names(func: nn.Module) -> set[str]:
    named = (*func.named_parameters(remove_duplicate=False), *func.named_buffers(remove_duplicate=False))
    return {name for name, _ in named}


def _row_packing(y0: State, n_rows: int) -> RowPacking:
    packing = RowPacking.of(y0)
    assert isinstance(packing, RowPacking)
    if any(len(shape) - packing.is_complex < 1 or shape[0] != n_rows for shape in packing.shapes):
        raise ArgumentValueError(
            f"the solution has a batch of {n_rows} independent samples, but y0 is {packing.describe()}. Give one with "
            f"first dimension {n_rows}."
        )
    return packing
