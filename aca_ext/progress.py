"""Observation of a running solve: the ``Step`` that callbacks receive, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from aca_ext.errors import NotInstalledError


class Step(NamedTuple):
    """One trial step and the counts up to it, as a callback receives them.

    Types in brackets are those of a common step, then those of independent samples: tensors (batch,) on the CPU.

    Attributes:
        t: start of the trial, in the unit of t [float; float64].
        t_next: end of the trial; independent samples: the time reached, t if rejected or finished [float; float64].
        h: signed step size [float; float64].
        error_ratio: error norm in units of the tolerance, accepted up to 1; NaN on a fixed grid [float; float64].
        is_accepted: True if the trial became part of the solution [bool; bool].
        n_steps: trial steps so far [int; int64].
        n_accepted: accepted trial steps so far [int; int64].
        n_rejected: rejected trial steps so far [int; int64].
        n_f_evals: evaluations of func so far; of independent samples each is of the whole batch [int; int].
        y: state at ``t``, like y0, without an autograd graph; must not be changed in place.
    """

    t: Any
    t_next: Any
    h: Any
    error_ratio: Any
    is_accepted: Any
    n_steps: Any
    n_accepted: Any
    n_rejected: Any
    n_f_evals: int
    y: Any = None


Callback = Callable[[Step], object]


def asks_to_stop(result: object) -> bool:
    """Tells whether a callback returned True, as a bool of Python, NumPy or PyTorch."""
    if str(getattr(result, "dtype", None)) in ("bool", "torch.bool"):
        return bool(result)
    return result is True


def both(one: Callback | None, other: Callback | None) -> Callback | None:
    """A callback that calls both and returns the result of the first, or the one that is given."""
    if one is None or other is None:
        return one or other

    def call_both(step: Step) -> object:
        result = one(step)
        other(step)
        return result

    return call_both


@contextmanager
def progress_bar(length: float) -> Iterator[Callback]:
    """Shows a bar of the time that a solve has reached; yields the callback that advances it.

    Args:
        length: length of the solve in the unit of t; of independent samples the mean.

    Raises:
        NotInstalledError: tqdm is missing.
    """
    tqdm = _tqdm()
    form = "{percentage:3.0f}%|{bar}| t: {n:.4g}/{total:.4g} [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=length, bar_format=form) as bar:

        def show(step: Step) -> None:
            advance = abs(step.t_next - step.t) * step.is_accepted
            bar.set_postfix(steps=_number(step.n_steps), rejected=_number(step.n_rejected), refresh=False)
            advance = advance if isinstance(advance, float) else float(advance.mean())
            bar.update(min(advance, length - bar.n))  # the rounded sum of steps may exceed the length

        yield show


@contextmanager
def samples_bar(n_samples: int) -> Iterator[Callable[[int], object]]:
    """Shows a bar of the samples that have reached their ends; yields a function of how many more have.

    Raises:
        NotInstalledError: tqdm is missing.
    """
    with _tqdm()(total=n_samples, unit="samples", unit_scale=True) as bar:
        yield bar.update


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise NotInstalledError(
            "progress=True needs the package tqdm, which is not installed. Run `pip install tqdm`, or omit progress."
        ) from None
    return tqdm


def _number(count: Any) -> int:
    return count if isinstance(count, int) else int(count.max())
