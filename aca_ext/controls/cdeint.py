"""``cdeint``: solves of controlled differential equations, with torchcde's signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aca_ext.controls.controlled_field import ControlledField, FieldOfSamples, is_path
from aca_ext.controls.interpolation import Interpolation
from aca_ext.engines.default import get_default_engine
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, OptionError
from aca_ext.numerics.methods import ALIASES
from aca_ext.odeint import odeint
from aca_ext.problem.options import FIXED_OPTIONS
from aca_ext.problem.state import State
from aca_ext.problem.transforms import is_transformed
from aca_ext.problem.trees import map_leaves
from aca_ext.problem.validation import ALL_METHODS
from aca_ext.torchdiffeq import solves as drop_in

BACKENDS = ("aca_ext", "torchdiffeq")


def cdeint(
    X: Any,  # noqa: N803  torchcde's name
    func: Callable[..., Any],
    z0: State,
    t: Tensor | Sequence[float],
    adjoint: bool = True,
    backend: str = "aca_ext",
    **kwargs: Any,
) -> State:
    """Solves dz/dt = func(t, z) dX/dt, a controlled differential equation, from z(t[0]) = z0, as torchcde does.

    Adaptive steps end at the knots of an ``Interpolation`` (``Interpolation.solver_options``), unless ``step_t`` or
    ``jump_t`` is among the options (None for neither), or the solve is inside torch.func. Those of independent samples
    (option ``batch``) do with engine="compiled" alone; its lanes need code that grows with the number of knots.
    Fixed steps on a linear path evaluate func inside of each step (option ``perturb``), since dX/dt jumps at the knots;
    let knots be nodes of their grid.

    Args:
        X: the control, an ``Interpolation``, or an object with a method ``derivative(t)`` that returns (..., channels);
            for a state with components a tree of such, structured like z0.
        func: callable or nn.Module. func(t, z) returns (..., hidden, channels) for a 0-d tensor t and z like z0. If it
            has a method ``prod``, func.prod(t, z, dXdt) returns the product, (..., hidden), instead.
        z0: (..., hidden) initial state, of the batch dimensions and the dtype of X; or a tree of such.
        t: (T,) strictly monotonic times, usually ``X.interval``.
        adjoint: True (default) for gradients at the memory of checkpoints, gradient="aca"; False for gradient="direct".
        backend: "aca_ext" (default), or "torchdiffeq": kwargs and gradients are torchdiffeq's, with the continuous
            adjoint for ``adjoint``. Both solve with aca_ext.
        **kwargs: arguments of ``aca_ext.odeint``, or of torchdiffeq's ``odeint_adjoint`` and ``odeint``; rtol is 1e-4
            and atol 1e-6 by default. With backend="aca_ext", ``adjoint_params`` does nothing: every tensor that func
            and X depend on receives its gradient.

    Returns:
        (..., T, hidden), or a tree of such: the times come before the channels, unlike in ``odeint``. Differentiable
        with respect to z0, t, parameters, and the x of X; also the knots of X, if it is a spline. (A knot of a linear
        path would move a jump of dX/dt through the steps: a knot that requires grad is an error there.)

    Raises:
        ArgumentTypeError: X has no method ``derivative``.
        ArgumentValueError: unknown backend; event_fn or output_fn; a constant path, whose derivative is zero; a linear
            path whose knots require grad.
        OptionError: independent samples whose X is no single ``Interpolation`` with a path for each.
        SlopeError: shapes or dtypes of X, func and z0 do not fit.
        Those of ``odeint``.

    Source: Kidger et al., Neural controlled differential equations for irregular time series, NeurIPS 2020.
    """
    paths = pytree.tree_leaves(X, is_path)
    for path in paths:
        _check_control(path)
    for name in ("event_fn", "output_fn"):
        if kwargs.get(name) is not None:
            raise ArgumentValueError(
                f"{name} has no place in cdeint, which returns the states at the times t. Leave it out."
            )
    settings = {"rtol": 1e-4, "atol": 1e-6} | kwargs
    settings["options"] = _options_at_knots(paths, settings)
    field = ControlledField(X, func)
    if settings["options"].get("batch") == "independent" and backend == "aca_ext":
        field = _field_of_samples(paths, func, z0, settings)
        settings["args"] = (paths[0].pieces_of_samples, *settings.get("args", ()))
    if backend == "aca_ext":
        settings.pop("adjoint_params", None)
        settings.setdefault("gradient", "aca" if adjoint else "direct")
        out = odeint(field, z0, t, **settings)
    elif backend == "torchdiffeq":
        out = _by_drop_in(paths, field, z0, t, adjoint, settings)
    else:
        raise ArgumentValueError(f"backend is {backend!r}; there are {', '.join(map(repr, BACKENDS))}.")
    return map_leaves(lambda part: part.movedim(0, -2), out)


def _check_control(path: Any) -> None:
    if not is_path(path):
        raise ArgumentTypeError(
            f"X is of type {type(path).__name__}, which has no method derivative(t); give an aca_ext.Interpolation or, "
            "for a state with components, a tree of such."
        )
    if not isinstance(path, Interpolation):
        return
    if path.kind == "constant":
        raise ArgumentValueError(
            'X is an Interpolation of kind "constant", whose derivative is zero, so that z would not change. Give '
            "another kind; or use X.evaluate(t) inside a func of odeint, with options=X.solver_options."
        )
    if path.kind == "linear" and path.grid_points.requires_grad:
        raise ArgumentValueError(
            "the knots of X require grad, and its derivative jumps there, which no gradient through the steps takes "
            'into account. Detach t, or give kind="cubic" or "hermite".'
        )


def _options_at_knots(paths: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a solve, with the knots of the paths among them where the solve can take them."""
    options = dict(settings.get("options") or {})
    paths = [path for path in paths if isinstance(path, Interpolation)]
    method = settings.get("method") or "dopri5"
    if not isinstance(method, str):
        return options  # odeint says what is allowed
    weights = ALL_METHODS.get(ALIASES.get(method, method))
    if weights is None:
        return options  # an unknown method, or one of the drop-in alone
    if not weights.adaptive or any(options.get(name) is not None for name in FIXED_OPTIONS):
        if any(path.jumps for path in paths):
            options.setdefault("perturb", True)
        return options
    is_taken = options.get("batch") is None or _engine(settings) == "compiled"
    if "step_t" in options or "jump_t" in options or not is_taken or is_transformed():
        return options
    for path in paths:
        for name, knots in path.solver_options.items():
            options[name] = (*options.get(name, ()), *knots)
    return options


def _engine(settings: Mapping[str, Any]) -> str:
    return settings.get("engine") or get_default_engine()


def _field_of_samples(
    paths: Sequence[Any], func: Callable[..., Any], z0: State, settings: Mapping[str, Any]
) -> FieldOfSamples:
    """The vector field of independent samples.

    Raises:
        OptionError: the control is no single ``Interpolation`` with a path for each sample.
    """
    (path, *others), advice = paths, 'or leave out option batch="independent".'
    if others or not isinstance(path, Interpolation) or not isinstance(z0, Tensor):
        raise OptionError(
            f"independent samples need an aca_ext.Interpolation as X and a tensor as z0; give them, {advice}"
        )
    pieces = path.pieces_of_samples
    if pieces.dim() < 4 or pieces.shape[:1] != z0.shape[:1]:
        raise OptionError(
            f"X has {pieces.shape[0] if pieces.dim() > 3 else 'no'} samples, and z0 has shape {tuple(z0.shape)}. "
            f"Independent samples need a path each: give x of shape (batch, ..., L, channels), {advice}"
        )
    return FieldOfSamples(path, func, by_weights=_engine(settings) == "compiled")


def _by_drop_in(
    paths: Sequence[Any], field: ControlledField, z0: State, t: Any, adjoint: bool, settings: dict[str, Any]
) -> Any:
    """The solve with torchdiffeq's arguments and gradients."""
    if not adjoint:
        return drop_in.odeint(field, z0, t, **settings)
    if settings.get("adjoint_params") is None:
        modules = [x for x in (field.func, *paths) if isinstance(x, nn.Module)]
        tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
        settings["adjoint_params"] = tuple(x for x in tensors if x.requires_grad)
    return drop_in.odeint_adjoint(field, z0, t, **settings)
