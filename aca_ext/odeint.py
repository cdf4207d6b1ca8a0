"""``odeint`` and ``solve``: dy/dt = func(t, y, \\*args) with the signature that torchdiffeq users know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aca_ext.engines.arguments import Arguments, takes
from aca_ext.engines.dispatch import run, run_again, solution_again
from aca_ext.engines.event_segments import solve_with_events, to_event
from aca_ext.problem.events import refuse_terminal
from aca_ext.problem.options import refuse_dense, refuse_to_stop
from aca_ext.problem.state import State
from aca_ext.solution import Solution


@dataclass(eq=False, slots=True)
class _OdeintArguments(Arguments):
    """Those of ``solve``, and torchdiffeq's ``event_fn``."""

    event_fn: Callable[[Tensor, Any], Tensor] | None = field(default=None, kw_only=True)


@takes(_OdeintArguments)
def odeint(arguments: _OdeintArguments) -> State:
    """Solves dy/dt = func(t, y, \\*args) from y(t[0]) = y0 and returns y at the times t.

    Args:
        func: callable or nn.Module. It receives t as a 0-d tensor of the state's real dtype and device, and y like y0.
            It returns the derivative, with y's shape, dtype and device, and must not change y in place. The order of
            arguments is (t, y); a func whose parameters are named (y, t) is refused. Batch normalisation inside func
            trains, but its running statistics average over all times, so that evaluation mode is another model: a
            BatchStatisticsWarning says so.
        y0: initial state, a tensor of any shape, or a tree of tensors of one dtype: tuples, namedtuples, lists and
            dicts, nested to any depth, and dataclasses registered by ``torch.export.register_dataclass``. float32,
            float64, complex64 or complex128. func, norms, events and callbacks receive the same structure; func returns
            it, with the keys of a dict in any order, and the result has it.
        t: (T,) strictly increasing or strictly decreasing times, T ≥ 1, on any device, in the unit that func uses. With
            option ``batch="independent"`` also (batch, T): times for each sample. NaN pads the end of shorter series: a
            sample's solve ends at its last time, its outputs at padded times are NaN, and their cotangents are ignored.
            The solver keeps time in float64, but func receives it in the state's dtype; a TimeResolutionWarning says if
            that is too coarse (unix time in float32). Its gradient is exact for fixed steps, whose sizes follow from t.
            With adaptive steps, methods of Adams, gradient "adjoint", option ``perturb``, and inside a fixed step
            (option ``interp``), it is the slope at each time, as accurate as the solution.
        rtol, atol: relative and absolute tolerance per step, numbers or tensors that broadcast to y0; for a tree of
            tensors also a tree of the same structure. A step is accepted if the norm of
            error / (atol + rtol·max(|y_before|, |y_after|)) is at most 1. Fixed steps do not use them.
        method: a key of ``aca_ext.METHODS`` (explicit methods) or ``aca_ext.IMPLICIT_METHODS`` (for stiff problems:
            "radau5", "kvaerno5"), or "rodas5p"; default "dopri5". Implicit methods need a func that neither draws
            random numbers nor changes buffers, and engine="eager", except for kvaerno3, kvaerno5 and trbdf2 on states
            or samples of at most 32 components, which engine="compiled" takes. The tolerance holds for each step, and
            the errors add up: on the problems of benchmarks/stiff.py to less than 10 tolerances with radau5, kvaerno5
            and kvaerno3, but to thousands with trbdf2, which does not add its error estimate to the solution, and with
            rodas5p on one of them. Their gradients are exact up to the tolerance of Newton's method, and second
            derivatives too. Third derivatives are refused, in the backward pass that would make a graph of the second
            ones. gradient="adjoint" solves the state backward, which stiffness makes unstable.
            "auto" takes steps of dopri5 as long as the problem is not stiff, and steps of kvaerno5 where it is; what
            holds for implicit methods holds for it. It needs adaptive steps that all samples share. With
            jacobian="krylov" it does not change back. ``stats.n_accepted_of`` counts the steps of each.
        options: a dict, for adaptive steps of

            * ``first_step``: size of the first trial step; default chosen by Hairer's rule.
            * ``min_step``: steps below it raise StepSizeError; default 0.
            * ``max_step``: upper limit of the step size; default none.
            * ``max_num_steps``: trial steps before StepLimitError; default 100 000.
            * ``safety``: factor on the predicted step size; default 0.9, 0.85 for kvaerno5, 0.65 for kvaerno3, 0.8 for
              other implicit Runge-Kutta methods.
            * ``ifactor``, ``dfactor``: largest growth and shrinkage between two steps; default 10 and 0.2 (0.5 for
              implicit Runge-Kutta methods).
            * ``pcoeff``, ``icoeff``, ``dcoeff``: coefficients of the PID controller; default 0, 1, 0.
            * ``step_t``: times that a step must end at.
            * ``jump_t``: times at which func is discontinuous; steps end there and start anew. They have no gradient.
              With independent samples and engine="compiled", ``step_t`` and ``jump_t`` may be (batch, S), with NaN
              where a sample has fewer.
            * ``jacobian``: of implicit methods and "auto": "dense" (default for up to 2048 elements: a matrix by
              autograd), "block" (one matrix per sample along the first dimension of y0; samples must not depend on one
              another), "krylov" (default for larger states: GMRES with products by autograd), or a function of
              (t, y, \\*args) that returns the derivative of func as a matrix. With every choice the gradient is that
              of func. With independent samples each has a matrix: "dense" and "block" are the same, "krylov" is not
              available, and a function returns (batch, n, n).
            * ``preconditioner``: for jacobian="krylov", a function of (t, y, c, \\*args) that returns a linear function
              near the inverse of 1 - c·J, where J is the derivative of func by y. It must use operations of torch: the
              backward pass transposes it by autograd. The gradient does not depend on it.
            * ``newton_tol``: error of implicit stages in units of rtol and atol, which limits the accuracy of the
              gradient; default 0.001, or 30·rtol if that is less (at least 1e-7); 0.01 for radau5. Fixed steps
              iterate until rounding.
            * ``norm``: function of a tensor like the state that returns the error norm; default the RMS norm, for a
              tree the largest RMS norm of its tensors.
            * ``on_min_step``: "raise" (default), or "accept": a step of min_step is accepted whatever its error.
            * ``on_step_limit``: "raise" (default), or "stop", for ``solve`` alone: return the states reached within
              max_num_steps; ``Solution.resume`` continues. For gradients "aca" and "direct".
            * ``batch``: "independent" gives each sample, along the first dimension of y0 (of all its components), its
              own adaptive steps, the same that it takes alone. func is called on the whole batch with t of shape
              (batch, 1, ..., 1), with as many dimensions as y (as its largest component), so that formulas for a
              number t remain valid; ``t.flatten()`` is (batch,). Samples must not depend on one another. Finished
              samples are still evaluated, at their end, until the slowest one ends, unless ``compact`` is given. For
              gradients "aca" and "direct", without ``norm``, and with ``step_t`` and ``jump_t`` for
              engine="compiled" alone. There, func runs on single samples, in SIMD lanes that take the next sample as
              soon as one has ended. Of the implicit methods, lanes take kvaerno3, kvaerno5 and trbdf2, without
              ``checkpoints``. These iterate for each sample until that one has converged; the numbers are those of a
              batch of one sample, on the CPU bit for bit if func and, in the eager engine, the LU factorisation compute
              a row the same in every batch, else up to rounding.
            * ``compact``: True leaves finished samples of an independent batch out of func, once they are half of those
              that it sees. Tensors in args whose first dimension is the batch follow. func must hold no other tensor
              with a row per sample, which would no longer match: at each such change its result is compared with that
              for all samples, and an OptionError raised if they differ. Default False.
            * ``on_failure``: with independent samples and gradient="aca", "raise" (default), or "nan": a sample that
              fails is NaN in the outputs, zero in the gradients, and an error in ``stats.failures``.

            and for fixed steps of any method one of

            * ``step_size``: size of the steps; the last one before each time in t is shorter.
            * ``grid_constructor``: function of (func, y0, t) that returns the grid, a tensor that contains t.
            * ``n_steps``: number of equal steps from t[0] to t[-1]; requested times between their ends are further
              nodes.

            and with it

            * ``interp``: "linear" or "cubic" interpolates the states at requested times, which then are no nodes of
              the grid; default: every requested time is a node.
            * ``perturb``: True evaluates func at the ends of a step at the next number inside the step, for a func
              that jumps at the nodes; default False.

            and for the methods of Adams also

            * ``max_order``: highest order of a formula, 4 to 12; default 12. High orders of explicit_adams need very
              small steps to be stable; 5 suffices for the order of the whole solve.
            * ``max_iters``: evaluations of the corrector of implicit_adams in a step; default 4. It stops before if an
              evaluation changes the step by less than atol + rtol·|step|, and a ConvergenceWarning says where it does
              not.

            Fixed steps on a GPU do not check for NaN, which would synchronise.
        events: list of ``aca_ext.Event``. A reset changes the state at its event, and the solve goes on. Terminal
            events end a solve early, so ``solve`` alone takes them; it also returns times and states of all events. Not
            for engine="graph"; for gradients "aca", "direct" and "naive". Independent samples have each their own
            events, resets and ends; func, event functions and resets are called on the whole batch.
        event_fn: torchdiffeq's form of a single terminal event: a function g(t, y) that returns a tensor. ``odeint``
            returns (event_t, y), with y at t[0] and at the first sign change of an element of g. t then holds the start
            and the end of the search, which raises EventError if there is no sign change.
        gradient: how the backward pass works.

            * "aca" (default): exact gradient of the discrete solution, from checkpoints of the accepted steps.
            * "direct": the same gradient, from the stored autograd graph of all steps.
            * "naive": in addition differentiates the search for the step size.
            * "adjoint": the continuous adjoint, whose gradient is approximate.

            Inside transforms of torch.func, "aca" has no checkpoints: its steps keep their graph, so that a reverse
            pass takes the memory of "direct".
        checkpoints: states that gradient="aca" keeps for the backward pass; the gradient is the same, bit for bit.

            * None (default): the state of every accepted step.
            * an int K: at most K states, chosen while the solve runs, and two of the step at hand. The others are
              computed again, at most r times if there are no more than C(K + r, r) steps. With create_graph=True the
              backward pass holds the graph of all steps anyway. With independent samples, for engine="compiled" alone:
              K states of each sample, from which every step is computed again once, a few hundred samples at a time;
              the sums over samples in gradients of what they share are rounded in another order.
            * "cpu": the state of every step in host memory, pinned if the solve runs on a GPU.
        engine: program that runs the solve; None (default) is that of ``aca_ext.set_default_engine``, at first "eager".

            * "eager": calls func at every stage.
            * "compiled": traces a whole step and its transpose with torch's compiler and runs all steps in compiled
              code. The same steps and gradient up to rounding, many times faster for a small func. Compiling takes
              seconds, once per func, shape and method (``stats.compile_seconds``); new values of parameters, times and
              tolerances need no new compilation. For real float32 and float64 states, gradient="aca" and
              checkpoints=None, without callback and bar, and a func of pointwise operations, reductions, matrix
              products and derivatives of such (torch.func, torch.autograd.grad). For other solves and funcs,
              evaluations of func and their transpose are compiled, as ``torch.compile(fullgraph=True)`` does, and the
              eager engine makes the steps. A func that cannot be compiled (control flow on values, random numbers,
              BatchNorm in training, side effects other than counters), or is not faster for it, is evaluated as it
              is. ``stats.compiled`` and ``stats.reason`` tell which of these ran, and why. Compiled code is compared
              with func before use. A callback must not change func. For states on the CPU; with option
              batch="independent" also on a CUDA device if nvcc is there (experimental: it has not run on a GPU yet).
              Needs torch 2.13 or newer.
            * "graph" (experimental: it has not run on a GPU yet): captures a trial step and its transpose as CUDA
              graphs, which the device repeats and controls without the host. The steps of the eager engine. For states
              on a CUDA device, gradient="aca", checkpoints=None and numbers as tolerances; second derivatives come from
              the eager engine. func is captured again if its operations, the tensors it holds, shapes, dtypes,
              tolerances, autocast or training mode change, but not for parameters updated in place. It must not draw
              random numbers, change what it holds, or decide on the host by the value of a tensor.
            * "auto": eager for the first two solves of the same func, method, and shapes and dtypes of the state and
              args; compiled from the third on; eager where "compiled" refuses func or an argument, which is then not
              tried again. ``stats.engine`` and ``stats.reason`` tell which it was and why. Both engines take the same
              steps, but round differently, so that the last bits of a result may change at the third solve.
        args: further arguments of func; tensors among them receive gradients.
        dense: ``solve`` alone: True makes the solution a function of time, ``solution(t)`` for any t between the first
            and the last, and ``solution.derivative(t)``. A method without dense output gets cubic Hermite
            interpolation. Independent samples are asked at times for all of them or for each, ``solution(t)`` with t
            (T,) or (batch, T). For engine="eager", gradient="aca" and explicit Runge-Kutta methods, without events. The
            ends of all steps are kept, in addition to the checkpoints of the backward pass.
        output_fn: function (t, y) of a time and a state that returns a tensor or a tree of tensors. The result holds
            its values at the times t in place of the states, which are not kept: memory is that of the steps. A
            backward pass computes the states again. Independent samples are given together, with t (batch, 1, ..., 1).
            Conditions as for ``dense``.
        params: tensors besides y0 and args that func depends on. Default: the parameters of a module, and every other
            tensor that func's code can reach; a tensor that was not found raises ReplayError when it is used.
        progress: show a bar of the time reached (needs tqdm); of the samples solved, with engine="compiled" and
            independent samples.
        callback: called after every trial step with an ``aca_ext.Step``: times, step size, error, counts, state. An
            exception that it raises ends the solve, and ``solve`` ends if it returns True. With a callback or a bar the
            steps run in Python, which is slower.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: settings of the backward solve of
            gradient="adjoint"; by default those of the forward solve. ``norm`` in adjoint_options is "seminorm", which
            leaves the parameters out of the error norm, or a function of (t, \\*y, \\*adjoint of y, \\*gradients) as
            torchdiffeq has it, whose first part is zero. ``callback`` in adjoint_options receives the steps of the
            backward solve. Other gradients have no backward solve and ignore these settings.
        adjoint_params: torchdiffeq's name for ``params``.

    Returns:
        (T, \\*y0.shape), or for a tree one of such tensors; the first row is y0. Differentiable with respect to y0,
        args, params and t: "aca", "direct" and "naive" to any order (implicit methods: twice), "adjoint" once.

    Raises:
        aca_ext.errors.ArgumentTypeError, ArgumentValueError: an argument is not accepted (among them TimeError,
            ToleranceError, OptionError and UnknownNameError).
        aca_ext.errors.SlopeError: func returned something that is not a derivative of the state.
        aca_ext.errors.EventError: an event function or a reset returned something unusable, or event_fn has no event.
        aca_ext.errors.CompileError: engine="compiled" cannot take an argument, or func joins independent samples.
        aca_ext.errors.GraphError: engine="graph" cannot take func or an argument.
        aca_ext.errors.SolveError: the end could not be reached (NonFiniteError, StepSizeError, StepLimitError).
        aca_ext.errors.ReplayError: in the backward pass, if func did not repeat its forward pass.

    torch.jit.trace and torch.export (with strict=False) record solves with fixed steps, in plain PyTorch; the gradient
    is then that of the steps, whatever ``gradient`` says. Adaptive steps would be those of the example and are refused.

    A solve may stand inside torch.func.grad, vjp, jvp, jacrev, jacfwd, hessian, vmap and torch.autograd.forward_ad, for
    gradients "aca" and "direct" and engine="eager". Derivatives with respect to y0, args and tensors that func uses go
    through the steps, which keep their graph. In vmap each sample takes the steps that it takes alone. Not with
    checkpoints, events, callbacks, times or tolerances inside the transform, random numbers in func, or the options
    norm, step_t, jump_t, on_min_step, on_failure, compact and grid_constructor.

    Sources: adaptive steps as in Hairer, Nørsett & Wanner, Solving ODEs I, II.4; gradient "aca" in Zhuang et al., ICML
    2020; gradients of events in Chen, Amos & Nickel, ICLR 2021; thinned checkpoints as in Griewank & Walther's revolve.
    """
    again = run_again(arguments) if arguments.event_fn is None else None
    if again is not None:
        return again[1].ys
    refuse_to_stop("odeint", arguments.options)
    if arguments.event_fn is not None:
        return to_event(arguments, arguments.event_fn)
    refuse_terminal("odeint", arguments.events)
    refuse_dense("odeint", arguments.dense)
    return _solution(arguments, may_stop=False).y


@takes(Arguments)
def solve(arguments: Arguments) -> Solution:
    """``odeint`` that also returns the accepted steps and the counts: a ``Solution``.

    Arguments as there, and option ``on_step_limit="stop"``. If ``callback`` returns True, the solve ends where it is:
    the solution holds the requested times that were reached, ``t_reached`` and ``y_reached``, ``is_complete`` is False,
    and ``resume`` continues adaptive steps. For gradients "aca" and "direct", without events, and with times that do
    not require grad and samples that share their steps.
    """
    again = run_again(arguments)
    return _solution(arguments, may_stop=True) if again is None else solution_again(arguments, *again)


def _solution(arguments: Arguments, *, may_stop: bool) -> Solution:
    if arguments.events:
        return solve_with_events(arguments)
    return run(arguments, may_stop=may_stop)
