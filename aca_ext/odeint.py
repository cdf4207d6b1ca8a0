"""``odeint`` and ``solve``: dy/dt = func(t, y, \\*args) with the signature that torchdiffeq users know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aca_ext.engines.arguments import Arguments, takes
from aca_ext.engines.dispatch import run, run_compiled_again
from aca_ext.engines.event_segments import solve_with_events, to_event
from aca_ext.errors import ArgumentValueError
from aca_ext.problem.events import Event
from aca_ext.problem.options import refuse_to_stop
from aca_ext.problem.state import State
from aca_ext.solution import Solution


@dataclass(eq=False, slots=True)
class _OdeintArguments(Arguments):
    """Those of ``solve``, and torchdiffeq's ``event_fn``."""

    event_fn: Callable[[Tensor, Any], Tensor] | None = field(default=None, kw_only=True)


@takes(_OdeintArguments)
def odeint(arguments: _OdeintArguments) -> State | tuple[Tensor, State]:
    """Solves dy/dt = func(t, y, \\*args) from y(t[0]) = y0 and returns y at the times t.

    Args:
        func: callable or nn.Module. Receives t as a 0-d tensor of the state's real dtype and device, and y like y0;
            returns the derivative, of y's shape, dtype and device. Must not change y in place. One that names its
            arguments (y, t), in this order, is refused. Batch normalisation inside it trains, but averages its running
            statistics over all times, and so computes something else in evaluation mode: a BatchStatisticsWarning.
        y0: initial state, a tensor of any shape or a tuple of tensors; float32, float64, complex64 or complex128. Of a
            namedtuple, func receives one of its class, and the result is one.
        t: (T,) strictly increasing or strictly decreasing times, T ≥ 1, on any device, in whatever unit func uses. With
            ``batch="independent"`` also (batch, T), times for every sample. The solver keeps time in float64, but func
            receives it in the state's dtype: a TimeResolutionWarning where that is too coarse (unix time in float32).
        rtol, atol: relative and absolute tolerance per step, a number or a tensor that broadcasts to y0 (for a tuple
            state also a tuple of one for each). A step is accepted if the norm of
            error / (atol + rtol·max(|y_before|, |y_after|)) is at most 1. Fixed steps do not use them.
        method: "dopri5" (default) or another key of ``aca_ext.METHODS``.
        options: of adaptive steps ``first_step, min_step, max_step, max_num_steps`` (100 000), ``safety`` (0.9),
            ``ifactor`` (10), ``dfactor`` (0.2), the PID coefficients ``pcoeff`` (0), ``icoeff`` (1), ``dcoeff`` (0),
            ``step_t`` and ``jump_t`` (times to land on, and where func jumps), ``norm`` (a function of a tensor like
            the state; default RMS, for a tuple the largest of its components') and ``on_step_limit`` ("raise"; with
            "stop", which ``solve`` alone takes, it returns what it reached in max_num_steps steps, and its
            ``Solution.resume`` goes on; of gradients "aca" and "direct") and ``on_min_step`` ("raise"; with "accept" a
            step of min_step is accepted whatever its error). ``step_size`` or
            ``grid_constructor(func, y0, t)`` make the steps of any method fixed; every time in t is a grid point, and
            rounding of t's dtype makes no steps. With ``interp="linear"`` or ``"cubic"`` requested times are no nodes
            of their own: the states there are interpolated. ``perturb=True``: func jumps at the nodes, and the stages
            at the ends of a step see the next number inside it. A fixed-step solve on a GPU returns what it finds, NaN
            included: looking would stop the host.
            ``batch="independent"``: every sample of the first dimension (of all components of a tuple) has its own
            steps and takes those that it would take alone. func is then called on the whole batch with t of shape
            (batch, 1, ..., 1), of as many dimensions as y has (as its largest component has), so that what is
            written for a number t works; ``t.flatten()`` is (batch,). Samples must not depend on one another, and one
            that has reached its end is still evaluated, there, until all have. Adaptive steps, gradients "aca" and
            "direct", without ``norm``, ``step_t`` and ``jump_t``.
        event_fn: torchdiffeq's: the solve ends where an element of event_fn(t, y) changes its sign, and the result is
            the time of that and the states at t[0] and there. The last time in t is the limit of the search.
        gradient: how the backward pass works. "aca" (default): exact gradient of the discrete solution, from
            checkpoints of the accepted steps. "direct": the same gradient from a stored graph. "naive": also
            differentiates the search for the step size. "adjoint": the continuous adjoint, approximate.
        checkpoints: which states gradient="aca" keeps for the backward pass, which computes the same gradient, bit for
            bit, from any choice. None: that of every accepted step. An int K: at most K, chosen while the solve runs,
            besides the two of the step at hand; the others are computed again, r times at most where the steps are no
            more than C(K + r, r) (with create_graph=True, the backward pass holds the graph of all steps anyway).
            "cpu": that of every step in the host's memory, pinned where the solve runs on a GPU.
        engine: "eager" (default) calls func at every stage. "compiled" traces a whole step, and its transpose, with
            torch's compiler and runs all steps in compiled code: the same steps and gradient up to rounding, many times
            faster where func is small. Compiling takes seconds, once for each func, shape and method
            (``stats.compile_seconds``); what is compiled is used again, whatever values parameters, times and
            tolerances have. For real float32 and float64 states on the CPU and gradient="aca", every state kept; second
            derivatives come from the eager engine. func must be one that ``torch.compile(fullgraph=True)`` can trace,
            out of pointwise operations, reductions, matrix products, and derivatives of such (torch.func,
            torch.autograd.grad), without random numbers or an autograd.Function of its own. Of the state that it
            changes, counters of its evaluations are kept up; whatever else it records is refused. Programs are checked
            against func itself before they are used. Needs torch 2.13 or newer.
            "graph" (experimental: it has not run on a GPU yet) captures a trial step and its transpose as CUDA graphs
            and repeats them on the device, which decides by itself on step sizes, acceptance, outputs and checkpoints:
            the steps of the eager engine, without the host between them. For states on a CUDA device and
            gradient="aca", every state kept, tolerances as numbers; second derivatives come from the eager engine. func
            is captured anew where its operations, the tensors it holds, shapes, dtypes, tolerances, autocast or
            training mode differ; parameters updated in place need none. It must not draw random numbers, change what
            it holds, or decide on the host by what a tensor holds.
        args: further arguments of func; tensors among them receive gradients.
        params: tensors that func depends on by itself. Default: func.parameters() of a module, and whatever else
            it uses or holds where its code can reach it; a tensor found nowhere is a ReplayError when it is used.
        progress: show a bar of the time that the solve has reached (needs tqdm).
        callback: called after every trial step with an ``aca_ext.Step``: times, step size, error, counts. What it
            raises ends the solve. The steps of a solve that is watched run in Python.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: how gradient="adjoint" solves backward; by default
            as forward. ``norm`` in adjoint_options is "seminorm", which leaves the parameters out of the error norm, or
            a function of (t, \\*y, \\*adjoint of y, \\*gradients), whose first part is zero; ``callback`` is called as
            that of the forward solve, with these parts as the state. The other
            gradients solve nothing backward and have no use for them.
        adjoint_params: torchdiffeq's name for ``params``.

    Returns:
        (T, \\*y0.shape), or for a tuple state a tuple of such; the first row is y0. Differentiable with respect to y0,
        args, what func depends on, and t; in "aca", "direct" and "naive" to second order and beyond.

    Raises:
        aca_ext.errors.ArgumentTypeError, ArgumentValueError: an argument is not accepted (with TimeError,
            ToleranceError, OptionError and UnknownNameError among them).
        aca_ext.errors.SlopeError: func returned something that is no derivative of the state.
        aca_ext.errors.CompileError, GraphError: engine="compiled" or "graph" cannot take func or an argument.
        aca_ext.errors.SolveError: the end could not be reached (NonFiniteError, StepSizeError, StepLimitError).
        aca_ext.errors.ReplayError: in the backward pass, where func did not repeat its forward pass.

    torch.jit.trace and torch.export (with strict=False) record fixed steps, in plain PyTorch, of which the gradient is
    that of the steps whatever ``gradient`` says; adaptive steps would be those of the example and are refused.

    Adaptive steps follow Hairer, Nørsett & Wanner, Solving ODEs I, II.4; the gradient Zhuang et al., ICML 2020.
    """
    refuse_to_stop("odeint", arguments.options)
    if arguments.event_fn is not None:
        return to_event(arguments, arguments.event_fn)
    for i, event in enumerate(arguments.events):
        if isinstance(event, Event) and event.terminal:
            raise ArgumentValueError(
                f"events[{i}] is terminal and may end the solve before its last time, which the result of odeint could "
                "not show. Use aca_ext.solve, or event_fn=."
            )
    return _solution(arguments).y


@takes(Arguments)
def solve(arguments: Arguments) -> Solution:
    """``odeint`` that also returns the accepted steps and the counts: a ``Solution``.

    Arguments as there, and option ``on_step_limit="stop"``.
    """
    return _solution(arguments)


def _solution(arguments: Arguments) -> Solution:
    if arguments.events:
        return solve_with_events(arguments)
    solution = run_compiled_again(arguments) if arguments.engine == "compiled" else None
    return run(arguments) if solution is None else solution
