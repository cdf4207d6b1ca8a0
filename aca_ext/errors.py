"""Exceptions and warnings of the package; each message says what was given, what is allowed and what to change."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AcaError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "BatchStatisticsWarning",
    "CompileError",
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
    """The name of a method, gradient, engine, option or keyword argument that does not exist."""


class OptionError(ArgumentValueError):
    """An entry of ``options`` has a value that is not accepted, or does not fit the other arguments."""


class TimeError(ArgumentValueError):
    """``t`` is no sequence of real numbers, empty, of the wrong rank, not finite, or not strictly monotonic."""


class ToleranceError(ArgumentValueError):
    """``rtol`` or ``atol`` is negative, not finite, too small everywhere, or does not broadcast to the state."""


class SlopeError(AcaError, TypeError, ValueError):
    """``func`` changed its state in place, or returned something that is not like y in shape, dtype and device."""


class ReplayError(AcaError, RuntimeError):
    """The backward pass did not reproduce the forward pass, so the gradient would be wrong."""


class CompileError(AcaError, RuntimeError):
    """``engine="compiled"`` cannot compile ``func``, or does not support an argument of this solve."""


class GraphError(AcaError, RuntimeError):
    """``engine="graph"`` cannot capture ``func`` as a CUDA graph, or does not support an argument of this solve."""


class SolveError(AcaError, RuntimeError):
    """A solve did not reach its last time.

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
    """``func`` or the solution is NaN or infinite, and a smaller step does not help."""


class StepSizeError(SolveError):
    """The step fell below ``min_step`` or the spacing of floats: the problem is too stiff or singular here."""


class StepLimitError(SolveError):
    """The solve did not reach its last time within ``max_num_steps`` trial steps."""


class KeptTensorWarning(UserWarning):
    """``func`` stores tensors that depend on the state; they have the right values, but no autograd graph."""


class NotInstalledError(AcaError, ImportError):
    """An optional package that an argument needs is not installed."""


class NotCompiledError(ImportError):
    """The package was imported from its source folder, which holds no compiled extension."""


class TimeResolutionWarning(UserWarning):
    """The state's dtype, in which func receives times, is too coarse for them; shift ``t`` to start near zero."""


class BatchStatisticsWarning(UserWarning):
    """Batch normalisation inside func averages its running statistics over all times of the solve."""


class UnregisteredParameterWarning(UserWarning):
    """A ``NeuralODE`` uses parameters that it does not own, so its ``parameters()`` and state dict lack them."""
