"""Exceptions and warnings of the package; each message says what was given, what is allowed and what to change."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AcaError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BatchStatisticsWarning",
    "CompileError",
    "ConvergenceWarning",
    "EventError",
    "GraphError",
    "KeptTensorWarning",
    "NonFiniteError",
    "NotCompiledError",
    "NotInstalledError",
    "OptionError",
    "ReplayError",
    "SlopeError",
    "SolveError",
    "StepLimitError",
    "StepSizeError",
    "TimeError",
    "TimeResolutionWarning",
    "ToleranceError",
    "UnknownNameError",
    "UnregisteredParameterWarning",
]


class AcaError(Exception):
    """Base of every exception that aca_ext raises itself."""


class ArgumentTypeError(AcaError, TypeError):
    """Argument of a type that is not accepted, for example an integer state."""


class ArgumentValueError(AcaError, ValueError):
    """Argument of an accepted type with a value that is not accepted."""


class UnknownNameError(ArgumentValueError):
    """Unknown name of a method, gradient, engine, option or keyword argument."""


class OptionError(ArgumentValueError):
    """Entry of ``options`` with a value that is not accepted, or that does not fit the other arguments."""


class TimeError(ArgumentValueError):
    """Times ``t`` that are no real numbers, empty, of the wrong rank, not finite, or not strictly monotonic."""


class ToleranceError(ArgumentValueError):
    """Tolerance that is negative, not finite, too small everywhere, or does not broadcast to the state."""


class SlopeError(AcaError, TypeError, ValueError):
    """Result of ``func`` unlike y in shape, dtype or device; also a ``func`` that changes y in place."""


class EventError(AcaError, ValueError):
    """Unacceptable result of an event function or a reset; also a missing event, or resets without end."""


class ReplayError(AcaError, RuntimeError):
    """Backward pass that does not reproduce the forward pass, so that its gradient would be wrong."""


class CompileError(AcaError, RuntimeError):
    """Argument that ``engine="compiled"`` does not support, or ``func`` that joins samples declared independent.

    A ``func`` that merely cannot be compiled is no error: the eager engine solves with it, and ``stats.reason`` tells.
    """


class GraphError(AcaError, RuntimeError):
    """``func`` that ``engine="graph"`` cannot capture as a CUDA graph, or an argument that it does not support."""


class SolveError(AcaError, RuntimeError):
    """Solve that did not reach its last time.

    Attributes:
        t: float, the time reached, in the unit of ``t``.
        h: float, the size of the trial step that failed or was next; NaN if none was chosen yet.
        error_ratio: float, error norm of the last trial in units of the tolerance; a trial is accepted up to 1.
        n_accepted: int, accepted steps so far.
        n_rejected: int, rejected steps so far.
        n_f_evals: int, evaluations of func so far.
        sample: int, index of the first sample that failed, in a batch of independent samples; None otherwise.
    """

    def __init__(
        self,
        message: str,
        *,
        t: float,
        h: float,
        error_ratio: float,
        n_accepted: int,
        n_rejected: int,
        n_f_evals: int,
        sample: int | None = None,
    ) -> None:
        super().__init__(
            f"{message} (t={t:.17g}, h={h:.6g}, error ratio={error_ratio:.6g}, "
            f"{n_accepted} steps accepted, {n_rejected} rejected, {n_f_evals} evaluations of func)"
        )
        self.t, self.h, self.error_ratio = t, h, error_ratio
        self.n_accepted, self.n_rejected, self.n_f_evals = n_accepted, n_rejected, n_f_evals
        self.sample = sample

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[SolveError], args: tuple[Any, ...], attributes: dict[str, Any]) -> SolveError:
    """Rebuilds a pickled error without its constructor, which would append the numbers to the message again."""
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class NonFiniteError(SolveError):
    """NaN or infinity in ``func`` or in the solution, which a smaller step does not avoid."""


class StepSizeError(SolveError):
    """Step below ``min_step`` or the spacing of floats, since the problem is too stiff or singular there."""


class StepLimitError(SolveError):
    """Solve that did not reach its last time within ``max_num_steps`` trial steps."""


class KeptTensorWarning(UserWarning):
    """Tensors that ``func`` stores and that depend on the state; they have the right values, but no autograd graph."""


class NotInstalledError(AcaError, ImportError):
    """Missing optional package that an argument needs."""


class NotCompiledError(ImportError):
    """Import of the package from its source folder, which holds no compiled extension."""


class TimeResolutionWarning(UserWarning):
    """Times too fine for the state's dtype, in which func receives them; shift ``t`` to start near zero."""


class BatchStatisticsWarning(UserWarning):
    """Batch normalisation inside func, whose running statistics average over all times of the solve."""


class ConvergenceWarning(UserWarning):
    """Steps of an implicit method of Adams whose corrector did not converge within ``max_iters`` iterations."""


class UnregisteredParameterWarning(UserWarning):
    """Parameters that a ``NeuralODE`` uses but does not own; its ``parameters()`` and state dict lack them."""
