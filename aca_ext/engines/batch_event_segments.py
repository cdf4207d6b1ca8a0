"""A solve of independent samples with events, each sample with its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.arguments import Arguments
from aca_ext.engines.dispatch import run
from aca_ext.errors import ArgumentValueError, EventError, TimeError
from aca_ext.problem.events import Event
from aca_ext.problem.sample_times import checked_sample_times, counts_of
from aca_ext.problem.state import State, like_tuple
from aca_ext.solution import EventRecord, Solution


def solve_batch_with_events(arguments: Arguments) -> Solution:
    """The solution, in which every sample ends by itself.

    Raises:
        ArgumentValueError: an event has a reset.
        Those of ``run``.
    """
    for i, event in enumerate(arguments.events):
        if event.reset is not None:
            raise ArgumentValueError(
                f'events[{i}] has a reset, which option batch="independent" does not support. Solve the samples one by '
                "one, or let them share their steps."
            )
    solution = run(arguments)
    t = arguments.t
    if not (isinstance(t, Tensor) and t.is_floating_point()):
        return solution
    return replace(solution, events=tuple(EventRecord(record.t.to(t), record.y) for record in solution.events))


def to_batch_event(arguments: Arguments, event_fn: Callable[[Tensor, Any], Tensor]) -> Any:
    """``to_event`` for independent samples: times (batch,), and the states at the starts and there.

    Raises:
        EventError: a sample has no event before the last of its times.
        Those of ``solve_batch_with_events``.
    """
    times, _ = checked_sample_times(arguments.t)
    if times.shape[-1] < 2 or (times.ndim == 2 and (counts_of(times) < 2).any()):
        raise TimeError("event_fn needs a second time in t, which gives the direction and the end of the search.")
    solution = solve_batch_with_events(
        replace(arguments, t=_ends(arguments.t), events=(Event(event_fn, terminal=True),))
    )
    assert isinstance(solution.ended_by, Tensor)
    without = (solution.ended_by < 0).nonzero().flatten().tolist()
    if without:
        others = f" (and of {len(without) - 1} more)" if len(without) > 1 else ""
        raise EventError(
            f"event_fn changed no sign for sample {without[0]}{others} up to its last time. Give a later last time."
        )
    (found,) = solution.events

    def together(y: Tensor, at_event: Tensor) -> Tensor:
        return torch.stack([y[0], at_event])

    y: State = solution.y
    if isinstance(y, Tensor):
        return found.t, together(y, found.y)  # type: ignore[arg-type]
    return found.t, like_tuple(type(y), (together(*pair) for pair in zip(y, found.y, strict=True)))


def _ends(given: Any) -> Tensor:
    """The first and the last time; of each sample if they differ."""
    t = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.float64)
    if t.dim() == 1:
        return torch.cat([t[:1], t[-1:].detach()])
    last = (~t.isnan()).sum(1, keepdim=True) - 1
    return torch.cat([t[:, :1], t.detach().gather(1, last)], 1)
