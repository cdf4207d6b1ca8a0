"""Log-densities of data under a flow, and samples from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aca_ext.engines.arguments import Arguments
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, TimeError
from aca_ext.flows.divergence import DivergenceField, with_divergence
from aca_ext.odeint import solve
from aca_ext.problem.arguments import lookup
from aca_ext.problem.events import refuse_terminal
from aca_ext.problem.options import refuse_dense, refuse_to_stop
from aca_ext.problem.state import State
from aca_ext.problem.times import times_of
from aca_ext.problem.trees import is_node, leaves_of, map_leaves
from aca_ext.solver.stats import BatchStats, Stats

Times = Tensor | Sequence[float]

_ATOL = next(argument.default for argument in fields(Arguments) if argument.name == "atol")
_UNBOUNDED = 1e30  # an absolute tolerance that no error reaches


class Likelihood(NamedTuple):
    """Result of ``likelihood``.

    Attributes:
        log_prob: (\\*batch,) log-density of the data.
        z: the data carried back to the first time, like x.
        penalties: (\\*batch,) integral of each penalty of the field by name, at least 0 in either direction of time.
        stats: counts of evaluations and steps.
    """

    log_prob: Tensor
    z: State
    penalties: dict[str, Tensor]
    stats: Stats | BatchStats


def log_prob(func: Callable[..., Any], x: State, t: Times, base: Any, **settings: Any) -> Tensor:
    """The log-density of ``x`` under the flow, (\\*batch,): ``likelihood(...).log_prob``, with its arguments."""
    return likelihood(func, x, t, base, **settings).log_prob


def likelihood(
    func: Callable[..., Any],
    x: State,
    t: Times,
    base: Any,
    *,
    args: Sequence[Any] = (),
    probes: Tensor | None = None,
    error_norm: str = "all",
    **settings: Any,
) -> Likelihood:
    """The log-density of data under the flow that carries ``base`` at t[0] to the data at t[-1].

    Solves backward, from x at t[-1] to z at t[0]: log p(x) = log p_base(z) - ∫ div func dt over t[0]..t[-1].

    Args:
        func: function (t, y, \\*args) that returns dy/dt, whose divergence is then exact, or a field from
            ``with_divergence``, which chooses the kind of divergence, penalties and batch dimensions.
        x: (batch, \\*sample) data, a real tensor or a tree of such; all elements of a tree are one sample.
        t: (T,) times from the base distribution (first) to the data (last), T ≥ 2; they may decrease. As for ``solve``.
        base: distribution at t[0]: an object with ``log_prob(z)`` that returns (\\*batch,), such as
            ``torch.distributions.Independent(Normal(zeros, ones), 1)``. For a tree it is given the tree.
        args: further arguments of func.
        probes: random vectors of a Hutchinson field, from ``field.draw_probes(x)``; default: drawn anew. Either way
            they are constant during the solve and its backward pass.
        error_norm: "all" (default) bounds the error of the log-density too; "state" chooses the steps by y alone.
        **settings: keyword arguments of ``solve`` (rtol, atol, method, gradient, engine, options, ...), except those
            that end a solve early or change its outputs.

    Returns:
        A ``Likelihood``. It is differentiable with respect to x, t, args, func's parameters, and those of base, as a
        solve is.

    Raises:
        ArgumentTypeError, ArgumentValueError, TimeError: an argument is not accepted.
        SlopeError, SolveError, ReplayError, CompileError: as in ``solve``.
    """
    field = func if isinstance(func, DivergenceField) else with_divergence(func)
    _log_prob_of(base)
    times = _checked_times(t)
    backward = times.flip(-1) if isinstance(times, Tensor) else times[::-1]
    state, stats = _end("flows.likelihood", field, x, backward, args, probes, error_norm, settings)
    z, change, *penalties = state
    signs = _direction(backward)
    named = {name: value * signs for name, value in zip(field.penalties, penalties, strict=True)}
    return Likelihood(_density(base, z, change.shape) - change, z, named, stats)


def sample(
    func: Callable[..., Any],
    n: int | State,
    t: Times,
    base: Any = None,
    *,
    args: Sequence[Any] = (),
    **settings: Any,
) -> State:
    """Samples of the flow: draws from ``base`` at t[0], carried to t[-1] without their density.

    Args:
        func: function (t, y, \\*args) that returns dy/dt, or a field from ``with_divergence``, whose func is used.
        n: number of samples, or the samples of the base distribution, (batch, \\*sample) or a tree of such.
        t: (T,) times from the base distribution (first) to the data (last), T ≥ 2. As for ``solve``.
        base: distribution at t[0], an object with ``rsample((n,))`` or ``sample((n,))``; not used for given samples.
            It draws from PyTorch's generator.
        args: further arguments of func.
        **settings: keyword arguments of ``solve``, as in ``likelihood``.

    Returns:
        (n, \\*sample), differentiable with respect to given base samples, t, args, func's parameters, and those of a
        base that has ``rsample``.

    Raises:
        Those of ``likelihood``.
    """
    z = _base_samples(n, base)
    _check("flows.sample", settings)
    field = func.func if isinstance(func, DivergenceField) else func
    solution = solve(field, z, _checked_times(t), args=args, **settings)
    _check_complete("flows.sample", solution.is_complete)
    samples: State = map_leaves(lambda part: part[-1], solution.y)
    return samples


def sample_and_log_prob(
    func: Callable[..., Any],
    n: int | State,
    t: Times,
    base: Any,
    *,
    args: Sequence[Any] = (),
    probes: Tensor | None = None,
    error_norm: str = "all",
    **settings: Any,
) -> tuple[State, Tensor]:
    """Samples of the flow, (n, \\*sample), and their log-densities, (n,), in one solve.

    Arguments and errors as for ``sample`` and ``likelihood``; ``probes`` are for the base samples.
    """
    field = func if isinstance(func, DivergenceField) else with_divergence(func)
    _log_prob_of(base)
    z = _base_samples(n, base)
    state, _ = _end("flows.sample_and_log_prob", field, z, _checked_times(t), args, probes, error_norm, settings)
    return state[0], _density(base, z, state[1].shape) + state[1]


def _end(
    caller: str,
    field: DivergenceField,
    y: State,
    t: Times,
    args: Sequence[Any],
    probes: Tensor | None,
    error_norm: str,
    settings: Mapping[str, Any],
) -> tuple[tuple[Any, ...], Stats | BatchStats]:
    """The state of the field at the last time, from ``y`` at the first."""
    _check(caller, settings)
    state = field.start(y)
    if field.kind == "hutchinson":
        args = (field.draw_probes(y) if probes is None else probes, *args)
    elif probes is not None:
        raise ArgumentValueError(
            'probes are given, but the divergence is exact; use with_divergence(func, "hutchinson").'
        )
    tolerances = _tolerances(error_norm, state, settings)
    solution = solve(field, state, t, args=args, **{**settings, **tolerances})
    _check_complete(caller, solution.is_complete)
    return tuple(map_leaves(lambda part: part[-1], component) for component in solution.y), solution.stats


def _tolerances(error_norm: str, state: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tolerance that leaves all components but the first out of the error norm, for "state".

    A huge tolerance works in every engine, where a norm of one's own would keep the steps in Python.
    """
    if lookup("error_norm", error_norm, ("all", "state")) == "all":
        return {}
    atol = settings.get("atol", _ATOL)
    if isinstance(atol, (tuple, list)):
        raise ArgumentValueError('atol is given for each component; with error_norm="state" give that of y alone.')
    unbounded = min(_UNBOUNDED, torch.finfo(state[1].dtype).max)
    return {"atol": (map_leaves(lambda _: atol, state[0]), *(unbounded for _ in state[1:]))}


def _check(caller: str, settings: Mapping[str, Any]) -> None:
    """Raises if a setting could end the solve early, or change its outputs."""
    refuse_to_stop(caller, settings.get("options"))
    refuse_terminal(caller, settings.get("events") or ())
    refuse_dense(caller, settings.get("dense"))
    if settings.get("output_fn") is not None:
        raise ArgumentValueError(f"output_fn replaces the states, which {caller} needs. Use aca_ext.solve.")


def _check_complete(caller: str, is_complete: bool) -> None:
    if not is_complete:
        raise ArgumentValueError(
            f"callback returned True, which ends the solve of {caller} early. Let it return None, or use aca_ext.solve."
        )


def _log_prob_of(base: Any) -> Callable[[Tensor], Any]:
    density = getattr(base, "log_prob", None)
    if not callable(density):
        raise ArgumentTypeError(
            f"base is of type {type(base).__name__} without a method log_prob(z); give a distribution, for example "
            "torch.distributions.MultivariateNormal(zeros, eye)."
        )
    return density


def _density(base: Any, z: State, shape: torch.Size) -> Tensor:
    """The log-density of each sample under the base distribution; ``shape`` is that of the batch."""
    found = _log_prob_of(base)(z)
    if not isinstance(found, Tensor) or found.shape != shape:
        form = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise ArgumentValueError(
            f"base.log_prob(z) has {form} for z {_described(z)}; it must have one number for each sample, "
            f"{tuple(shape)}. {_advice(z, len(shape))}"
        )
    return found


def _described(z: State) -> str:
    return f"of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"


def _advice(z: State, batch_dims: int) -> str:
    if isinstance(z, Tensor) and z.dim() <= batch_dims:
        return "If x is a single sample, give x[None], or a field of with_divergence(..., batch_dims=0)."
    if isinstance(z, Tensor):
        return f"Wrap the distribution, torch.distributions.Independent(base, {z.dim() - batch_dims})."
    return "Let it add up those of the components."


def _base_samples(n: Any, base: Any) -> State:
    if isinstance(n, Tensor) or (is_node(n) and all(isinstance(part, Tensor) for part in leaves_of(n))):
        return n
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ArgumentTypeError(f"n is {n!r}; give a number of samples of at least 1, or the base samples, a tensor.")
    draw = getattr(base, "rsample" if getattr(base, "has_rsample", False) else "sample", None)
    if not callable(draw):
        raise ArgumentTypeError(
            f"base is of type {type(base).__name__} without a method sample((n,)); give a distribution or base samples."
        )
    drawn: State = draw((n,))
    return drawn


def _checked_times(t: Times) -> Tensor | tuple[float, ...]:
    """The times as a tensor, or as numbers, which have no derivative inside transforms.

    Raises:
        TimeError: they are no times, fewer than two, or padded.
    """
    times = t if isinstance(t, Tensor) else times_of(t)
    count = len(times) if not isinstance(times, Tensor) else times.shape[-1] if times.dim() else 0
    if count < 2:
        raise TimeError("t has no end: give the time of the base distribution and that of the data, (0.0, 1.0).")
    if isinstance(times, Tensor) and times.dim() > 1 and bool(times.isnan().any()):
        raise TimeError(
            "t holds NaN, so that some samples have no last time here. Give each sample its first and last."
        )
    return times


def _direction(times: Tensor | tuple[float, ...]) -> Tensor | float:
    """1 where time increases and -1 where it decreases; (batch,) for times of single samples."""
    if not isinstance(times, Tensor):
        return 1.0 if times[-1] > times[0] else -1.0
    sign = torch.sign(times[..., -1] - times[..., 0]).detach()
    return float(sign) if sign.dim() == 0 else sign
