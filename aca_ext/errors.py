"""Exceptions and warnings of the package; each message says what was given, what is allowed and what to change."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AcaError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BatchStatisticsWarning",
    "CompileError",
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
    """An argument has a type that is not accepted, for example an integer state."""


class ArgumentValueError(AcaError, ValueError):
    """An argument has the right type and a value that is not accepted."""


class UnknownNameError(ArgumentValueError):
    """A method, gradient or option that does not exist."""


class OptionError(ArgumentValueError):
    """An entry of ``options`` with a value that is not accepted."""


class TimeError(ArgumentValueError):
    """``t`` is empty, of the wrong rank, not finite, or not strictly monotonic."""


class ToleranceError(ArgumentValueError):
    """``rtol`` or ``atol`` is negative, not finite, zero everywhere, or does not broadcast to the state."""


class SlopeError(AcaError, TypeError, ValueError):
    """``func`` returned something that is not the derivative of the state it was given."""


class EventError(AcaError, ValueError):
    """An event function, or a reset, returned something that cannot be used; or no event occurred; or too many did."""


class ReplayError(AcaError, RuntimeError):
    """The backward pass could not repeat the forward pass, so its gradient would be wrong."""


class CompileError(AcaError, RuntimeError):
    """``engine="compiled"`` cannot compile ``func``, or not for this kind of solve."""


class GraphError(AcaError, RuntimeError):
    """``engine="graph"`` cannot capture ``func``, or not for this kind of solve."""


class SolveError(AcaError, RuntimeError):
    """A solve that could not reach its end.

    Attributes:
        t: time that was reached.
        h: step size of the last trial.
        error_ratio: error norm of the last trial in units of the tolerance (accepted where at most 1).
        n_accepted, n_rejected, n_f_evals: counts up to there.
        sample: which sample of a batch of independent ones, else None.
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
    """A pickled error, without its constructor, which would word the message again."""
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class NonFiniteError(SolveError):
    """``func`` or the solution became NaN or infinite and stayed so however small the step."""


class StepSizeError(SolveError):
    """The step fell below ``min_step`` or the spacing of floats: the problem is too stiff, or singular."""


class StepLimitError(SolveError):
    """``max_num_steps`` trial steps were not enough."""


class KeptTensorWarning(UserWarning):
    """``func`` keeps tensors of its evaluations, which have no graph."""


class NotInstalledError(AcaError, ImportError):
    """An optional package that was asked for is missing."""


class NotCompiledError(ImportError):
    """The package was imported from a source folder that holds no compiled extension."""


class TimeResolutionWarning(UserWarning):
    """The state's dtype cannot tell apart the times that func is called with; shift them to start near zero."""


class BatchStatisticsWarning(UserWarning):
    """Batch normalisation inside func averages its running statistics over all times of the solve."""


class UnregisteredParameterWarning(UserWarning):
    """A ``NeuralODE`` uses parameters that are not among its own, so its optimizer and state dict miss them."""
