"""A solve of independent samples with events: one segment after another, in which samples go on from their resets.

A segment is a solve of the whole batch in the time since each sample's last reset. A sample ends its segment at its
first reset, terminal event or last time. In later segments a sample that has ended has a single time, and no step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.arguments import Arguments
from aca_ext.engines.dispatch import run
from aca_ext.engines.event_resets import LAST_BIT, MAX_RESETS, NO_SIGN, Since, after_reset, moved, options_since
from aca_ext.errors import EventError, TimeError
from aca_ext.problem.events import At, Event
from aca_ext.problem.sample_times import checked_sample_times, counts_of
from aca_ext.problem.state import State
from aca_ext.problem.trees import leaves_of, like, map_leaves
from aca_ext.solution import EventRecord, Solution
from aca_ext.solver.stats import BatchStats

Parts = Sequence[Tensor]  # the components of a state


def solve_batch_with_events(arguments: Arguments) -> Solution:
    """The solution, in which every sample starts anew at its resets and ends by itself.

    Gradients are exact as in ``solve_with_events``: a segment is solved in the time since the resets, and the times of
    the resets are an argument of func.

    Raises:
        EventError: resets follow one another without end, or a reset returned something that is no state.
        Those of ``run``.
    """
    given = arguments.t
    if not any(event.reset is not None for event in arguments.events):
        return _with_times_like(run(arguments), given)
    times, _ = checked_sample_times(given)
    if not isinstance(given, Tensor):
        given = torch.from_numpy(times.copy()) if times.size else given
    # Times of events are float64 between the segments, whatever dtype the given times have.
    precise = given.cpu().double() if isinstance(given, Tensor) else given
    solution = run(replace(arguments, t=precise))
    assert isinstance(precise, Tensor)
    each = precise.expand(len(solution.steps), -1) if precise.dim() == 1 else precise
    segments = _Segments(arguments, each, solution)
    while (rows := segments.rows_to_reset()).any():
        segments.go_on(rows)
    assert isinstance(given, Tensor)
    return _with_times_like(segments.joined(given), given)


def _with_times_like(solution: Solution, given: object) -> Solution:
    if not (isinstance(given, Tensor) and given.is_floating_point()):
        return solution
    return replace(solution, events=tuple(EventRecord(record.t.to(given), record.y) for record in solution.events))


class _Segments:
    """The segments so far, as one solution.

    Args:
        times: (batch, T) float64 requested times on the CPU, with their graph.
    """

    def __init__(self, arguments: Arguments, times: Tensor, first: Solution) -> None:
        assert isinstance(first.stats, BatchStats)
        assert isinstance(first.ended_by, Tensor)
        self._arguments, self._times, self._n = arguments, times, len(times)
        self._y0, self._y = leaves_of(arguments.y0), leaves_of(first.y)
        self._n_reached, self._n_wanted = _n_reached(self._y), (~times.detach().isnan()).sum(1)
        self._ended_by, self._stats = first.ended_by.clone(), first.stats
        self._steps = [[steps] for steps in first.steps]
        self._events: list[list[tuple[Tensor, Parts]]] = [[] for _ in arguments.events]
        self._take_events(first, None)
        self._rows = torch.ones(self._n, dtype=torch.bool, device="cpu")  # samples in the last segment
        self._start = times.detach()[:, 0]
        self._n_segments = 1

    def rows_to_reset(self) -> Tensor:
        """A mask of the samples whose last segment ended at a reset, with requested times left."""
        with_reset = [i for i, event in enumerate(self._arguments.events) if event.reset is not None]
        is_reset = self._rows & torch.isin(self._ended_by, torch.tensor(with_reset, device="cpu"))
        is_at_end = is_reset & (self._n_reached >= self._n_wanted)
        self._ended_by[is_at_end] = -1
        return is_reset & ~is_at_end

    def go_on(self, rows: Tensor) -> None:
        """Adds the segment of the samples ``rows``, from their resets on."""
        time, y = self._at_events(rows)
        self._check_progress(rows, time.detach())
        y = self._after_resets(rows, time, y)
        solution = run(self._segment(rows, time, y))
        parts, n_before = leaves_of(solution.y), self._n_reached
        n_times = len(parts[0])
        # Numbers of the outputs within the segment, whose first is the start.
        number = torch.arange(self._times.shape[1], device="cpu").unsqueeze(1) - n_before + 1
        is_new = rows & (number >= 1) & (number < n_times)
        index, everyone = number.clamp(0, n_times - 1), torch.arange(self._n, device="cpu")
        self._y = tuple(
            torch.where(_beside(is_new, old), new[index.to(new.device), everyone.to(new.device)], old)
            for old, new in zip(self._y, parts, strict=True)
        )
        self._n_reached = n_before + torch.where(rows, _n_reached(parts) - 1, 0)
        for row in rows.nonzero().flatten().tolist():
            self._steps[row].append(solution.steps[row] + time[row].item())
        self._take_events(solution, time)
        assert isinstance(solution.ended_by, Tensor)
        self._ended_by = torch.where(rows, solution.ended_by, self._ended_by)
        assert isinstance(solution.stats, BatchStats)
        self._stats = self._stats.followed_by(solution.stats)
        self._rows, self._start = rows, torch.where(rows, time.detach(), self._start)
        self._n_segments += 1

    def _take_events(self, solution: Solution, start: Tensor | None) -> None:
        for found, event, record in zip(self._events, self._arguments.events, solution.events, strict=True):
            t, y = record.t, leaves_of(record.y)
            if event.terminal:
                t, y = t.unsqueeze(1), tuple(part.unsqueeze(1) for part in y)
            if start is not None:  # missing times stay without a graph: their cotangents may be NaN
                t = t + start.unsqueeze(1).expand_as(t).masked_fill(t.isnan(), 0.0)
            found.append((t, y))

    def _at_events(self, rows: Tensor) -> tuple[Tensor, Parts]:
        """Times (batch,) and states at the ends of the last segment; samples other than ``rows`` get their start."""
        time, y = self._times.detach()[:, 0], tuple(part.detach() for part in self._y0)
        for i, found in enumerate(self._events):
            here = (rows & (self._ended_by == i)).nonzero().flatten()
            if len(here):
                t, states = found[-1]
                last = (~t.isnan()).sum(1)[here] - 1
                time = time.index_copy(0, here, t[here, last])
                y = tuple(
                    part.index_copy(0, here.to(part.device), of_event[here.to(part.device), last.to(part.device)])
                    for part, of_event in zip(y, states, strict=True)
                )
        return time, y

    def _check_progress(self, rows: Tensor, time: Tensor) -> None:
        """Raises EventError for chattering, as ``event_segments`` does."""
        times = self._times.detach()
        length = (times - times[:, :1]).abs().nan_to_num(0.0).amax(1)
        scale = torch.maximum(time.abs(), length * LAST_BIT)
        since, n = (time - self._start).abs(), self._n_segments
        is_stuck = rows & ((n > 1) & (since <= 4 * LAST_BIT * scale) | (n > MAX_RESETS))
        if is_stuck.any():
            row = int(is_stuck.nonzero()[0])
            raise EventError(
                f"event {int(self._ended_by[row])} of sample {row} chatters: {n} resets up to t={time[row]:.17g}, the "
                f"last {since[row]:.3g} after the one before it. Such a solution does not go on in time. Let the reset "
                "move the state away from the surface, or end the solve by a terminal event when the resets follow too "
                "fast."
            )

    def _after_resets(self, rows: Tensor, time: Tensor, y: Parts) -> Parts:
        """The states from which the samples ``rows`` go on: all resets at that time act, in order."""
        y0 = self._arguments.y0
        rank = max(part.dim() for part in self._y0)
        for i, (event, found) in enumerate(zip(self._arguments.events, self._events, strict=True)):
            t, _ = found[-1]
            if event.reset is None or t.shape[1] == 0:
                continue
            last = ((~t.isnan()).sum(1) - 1).clamp(min=0)
            here = rows & (t.detach().gather(1, last.unsqueeze(1))[:, 0] == time.detach())
            if here.any():
                new = after_reset(event, i, time.view(-1, *(1,) * (rank - 1)), like(y0, y), y0)
                pairs = zip(leaves_of(new), y, strict=True)
                y = tuple(torch.where(_beside(here, old), changed, old) for changed, old in pairs)
        return y

    def _segment(self, rows: Tensor, start: Tensor, y: Parts) -> Arguments:
        """The solve from ``start`` on, in the time since then; samples other than ``rows`` have no step."""
        arguments, times = self._arguments, self._times
        n_left = torch.where(rows, self._n_wanted - self._n_reached, 0)
        position = torch.arange(int(n_left.max()), device="cpu").expand(self._n, -1)
        is_time = position < n_left.unsqueeze(1)
        index = (self._n_reached.unsqueeze(1) + position).clamp(max=times.shape[1] - 1)
        sign = torch.where((times.detach()[:, :1] > times.detach()).any(1), -1.0, 1.0).double().unsqueeze(1)
        since = times.gather(1, index) - start.unsqueeze(1)
        # A requested time may be that of the event up to rounding; then it lies just behind it.
        least = sign * LAST_BIT * start.detach().abs().clamp(min=1.0).unsqueeze(1) * (position + 1)
        since = torch.where(sign * since < sign * least, least, since).masked_fill(~is_time, torch.nan)
        callback, at = arguments.callback, start.detach().clone()
        return replace(
            arguments,
            func=Since(arguments.func),
            y0=like(arguments.y0, y),
            t=torch.cat([torch.zeros(self._n, 1, dtype=torch.float64, device="cpu"), since], 1),
            args=(start, *arguments.args),
            options=options_since(arguments.options),
            events=tuple(replace(event, fn=At(event.fn, start)) for event in arguments.events),
            callback=None if callback is None else lambda step: callback(moved(step, at)),
        )

    def joined(self, times: Tensor) -> Solution:
        """All segments as one solution."""
        records = tuple(
            _joined(found, self._arguments.y0, event.terminal)
            for found, event in zip(self._events, self._arguments.events, strict=True)
        )
        steps = tuple(torch.cat(of_row) for of_row in self._steps)
        is_complete = bool((self._n_reached == self._n_wanted).all())
        solution = Solution(times, like(self._arguments.y0, self._y), steps, self._stats, is_complete)
        return replace(solution, events=records, ended_by=self._ended_by)


def _joined(found: Sequence[tuple[Tensor, Parts]], y0: State, is_terminal: bool) -> EventRecord:
    """One record of an event in all segments: the occurrences of each sample in order, then NaN."""
    t = torch.cat([t for t, _ in found], 1)
    y = tuple(torch.cat(parts, 1) for parts in zip(*(y for _, y in found), strict=True))
    is_none = t.detach().isnan()
    order = is_none.long().argsort(dim=1, stable=True)[:, : int((~is_none).sum(1).max())]
    if is_terminal and order.shape[1] == 0:
        order = torch.zeros(len(t), 1, dtype=torch.int64, device="cpu")
    everyone = torch.arange(len(t), device="cpu").unsqueeze(1)
    t, y = t[everyone, order], tuple(part[everyone.to(part.device), order.to(part.device)] for part in y)
    return EventRecord(t[:, 0], like(y0, (part[:, 0] for part in y))) if is_terminal else EventRecord(t, like(y0, y))


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """A mask over the first dimensions of ``x`` that broadcasts to it."""
    return mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim())).to(x.device)


def _n_reached(parts: Parts) -> Tensor:
    """Number of outputs that each sample has; missing ones are NaN."""
    return (~parts[0].detach().isnan().reshape(*parts[0].shape[:2], -1).all(2)).sum(0).cpu()


def to_batch_event(arguments: Arguments, event_fn: Callable[[Tensor, Any], Tensor]) -> Any:
    """``to_event`` for independent samples: times (batch,), and the states at the starts and there.

    Raises:
        EventError: a sample has no event before the last of its times.
        Those of ``solve_batch_with_events``.
    """
    times, _ = checked_sample_times(arguments.t)
    if times.shape[-1] < 2 or (times.ndim == 2 and (counts_of(times) < 2).any()):
        raise TimeError("event_fn needs a second time in t, which gives the direction and the end of the search.")
    event = Event(event_fn, terminal=True)
    solution = solve_batch_with_events(replace(arguments, t=_ends(arguments.t), events=(event,)))
    assert isinstance(solution.ended_by, Tensor)
    without = (solution.ended_by < 0).nonzero().flatten().tolist()
    if without:
        others = f" (and of {len(without) - 1} more)" if len(without) > 1 else ""
        raise EventError(f"event_fn changed no sign for sample {without[0]}{others} up to its last time. {NO_SIGN}")
    (found,) = solution.events
    return found.t, map_leaves(lambda y, at_event: torch.stack([y[0], at_event]), solution.y, found.y)


def _ends(given: Any) -> Tensor:
    """The first and the last time; of each sample if they differ."""
    t = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.float64, device="cpu")
    if t.dim() == 1:
        return torch.cat([t[:1], t[-1:].detach()])
    last = (~t.isnan()).sum(1, keepdim=True) - 1
    return torch.cat([t[:, :1], t.detach().gather(1, last)], 1)
