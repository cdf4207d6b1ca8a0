"""Watching a solve while it runs: what a callback is told after every trial step, and a progress bar in time units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from aca_ext.errors import NotInstalledError


class Step(NamedTuple):
    """One trial step from ``t`` to ``t_next``, and the counts up to it.

    In a batch of independent samples, the first four are float64 tensors and ``is_accepted`` a bool tensor of (batch,),
    and the counts but n_f_evals int64 ones; a sample that is done has t_next = t.

    Attributes:
        h: size of the step, with the sign of its direction.
        error_ratio: error in units of the tolerance, accepted where at most 1; NaN on a fixed grid.
        is_accepted: whether the step became part of the solution.
        y: the state at ``t``, like y0 and without a graph. Not to be changed in place.
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


def both(one: Callback | None, other: Callback | None) -> Callback | None:
    """One callback for two."""
    if one is None or other is None:
        return one or other

    def call_both(step: Step) -> None:
        one(step)
        other(step)

    return call_both


@contextmanager
def progress_bar(length: float) -> Iterator[Callback]:
    """A bar that fills over a solve of this ``length`` (of a batch, the mean of its samples').

    Raises:
        NotInstalledError: tqdm is missing.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise NotInstalledError(
            "progress=True shows a bar by tqdm, which is not installed. Run `pip install tqdm`, or leave progress out."
        ) from None
    form = "{percentage:3.0f}%|{bar}| t: {n:.4g}/{total:.4g} [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=length, bar_format=form) as bar:

        def show(step: Step) -> None:
            advance = abs(step.t_next - step.t) * step.is_accepted
            bar.set_postfix(steps=_number(step.n_steps), rejected=_number(step.n_rejected), refresh=False)
            advance = advance if isinstance(advance, float) else float(advance.mean())
            bar.update(min(advance, length - bar.n))  # the sum of the steps is rounded

        yield show


def _number(count: Any) -> int:
    return count if isinstance(count, int) else int(count.max())
