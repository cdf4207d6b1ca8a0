"""A batch of independent samples: validated arguments, and the state packed with one row per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError, OptionError
from aca_ext.numerics.switching import Switching
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.newton import newton_options_of_samples
from aca_ext.problem.options import is_compact, is_nan_on_failure
from aca_ext.problem.problem import Problem
from aca_ext.problem.sample_times import (
    Array,
    Index,
    checked_sample_times,
    counts_of,
    distinct_rows,
    last_times_of,
    times_of_samples,
)
from aca_ext.problem.state import Packing, State, as_real
from aca_ext.problem.stops import STOP_OPTIONS, Stops, stops_of
from aca_ext.problem.tolerance import Tolerance
from aca_ext.problem.validation import checked_problem, remembered

_UNAVAILABLE = ("norm", "on_step_limit", "on_min_step")


def is_independent(options: object) -> bool:
    """Tells whether option ``batch`` is "independent".

    Raises:
        OptionError: it is none of "independent", "common" and None.
    """
    batch = options.get("batch") if isinstance(options, Mapping) else None
    if batch not in (None, "common", "independent"):
        raise OptionError(
            f'option batch is {batch!r}; give "common" (one step size for the whole state, the default) or '
            '"independent" (each sample, along the first dimension, has its own steps).'
        )
    return batch == "independent"


class RowPacking(Packing):
    """Conversion between a user's state and one real tensor with a row per sample.

    A row holds the flattened components of a tuple or another tree one after the other.
    """

    @property
    def n_rows(self) -> int:
        return self.shapes[0][0]

    @classmethod
    def of_problem(cls, problem: Problem) -> RowPacking:
        """The packing by rows of a state that ``problem`` packs as a whole."""
        flat = problem.packing
        return cls(flat.shapes, flat.is_tuple, flat.is_complex, flat.kind, flat.tree, flat.paths)

    @staticmethod
    def _size(shape: torch.Size) -> int:
        return shape[1:].numel()  # of one sample

    @property
    def time_shape(self) -> tuple[int, ...]:
        """Shape (batch, 1, ..., 1) of the times that func receives; it broadcasts to every component."""
        rank = max(len(shape) for shape in self.shapes) - self.is_complex
        return (self.n_rows, *(1,) * (rank - 1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        if not self.is_tuple:
            return super().join(parts)
        return torch.cat([as_real(part).reshape(self.n_rows, -1) for part in parts], 1)

    def unpack(self, y: Tensor) -> State:
        if not self.is_tuple:
            return super().unpack(y)
        parts = (part.reshape(shape) for part, shape in zip(y.split(self.sizes, 1), self.shapes, strict=True))
        return self.as_given(torch.view_as_complex(p) if self.is_complex else p for p in parts)

    def unpack_rows(self, ys: Tensor) -> State:
        if not self.is_tuple:
            return super().unpack_rows(ys)
        parts = [p.reshape(len(ys), *s) for p, s in zip(ys.split(self.sizes, 2), self.shapes, strict=True)]
        return self.as_given(torch.view_as_complex(p) if self.is_complex else p for p in parts)


@dataclass(frozen=True, kw_only=True)
class BatchProblem(Problem):
    """``Problem`` for a batch of independent samples.

    Attributes:
        times_of_rows: (batch, T) float64, requested times of each sample, padded with NaN; ``times`` are those of the
            sample with most times.
        nan_on_failure: a sample that fails becomes NaN, and the others go on.
        is_compact: func no longer sees samples that have ended, once they are half of those that it sees.
        stops_of_rows: times at which steps must end (options step_t and jump_t); None if there are none but the ends.
        counts: number of requested times of each sample.
        last_times: last requested time of each sample.
    """

    packing: RowPacking
    times_of_rows: Array
    nan_on_failure: bool = False
    stops_of_rows: Stops | None = None
    is_compact: bool = False
    counts: Index = field(init=False)
    last_times: Array = field(init=False)

    def __post_init__(self) -> None:
        vars(self).update(counts=counts_of(self.times_of_rows), last_times=last_times_of(self.times_of_rows))

    @property
    def is_ragged(self) -> bool:
        """True if some samples have fewer times than others."""
        return bool((self.counts < self.times_of_rows.shape[1]).any())

    @property
    def known_times(self) -> Array:
        return self.times_of_rows

    @property
    def length(self) -> float:
        return float(np.abs(self.last_times - self.times_of_rows[:, 0]).mean()) if len(self.counts) else 0.0

    @property
    def span(self) -> tuple[float, float]:
        times = distinct_rows(self.times_of_rows)
        ends = np.stack([times[:, 0], last_times_of(times)], 1)[counts_of(times) > 1]
        if len(ends) == 0:
            return super().span
        worst = np.argmin(np.abs(ends[:, 1] - ends[:, 0]) / np.maximum(np.abs(ends).max(1), 1e-300))
        return float(ends[worst, 0]), float(ends[worst, 1])

    def start_time(self, like: Tensor) -> Tensor:
        starts = self.times_of_rows[:, 0]
        if len(starts) and starts.strides[0] == 0:  # the same time for all
            return torch.full(self._row_shape, float(starts[0]), dtype=like.dtype, device=like.device)
        return torch.from_numpy(starts.copy()).to(like).view(self._row_shape)

    def spread_times(self, t: Tensor) -> Tensor:
        of_rows = t.to(self.y0).expand(self.times_of_rows.shape)
        times = of_rows.T.reshape(-1, *self._row_shape)
        padding = self.padding()
        return times if padding is None else torch.where(padding, times[:1].detach(), times)

    def padding(self) -> Tensor | None:
        if not self.is_ragged:
            return None
        is_padding = torch.from_numpy(np.isnan(self.times_of_rows.T).copy()).to(self.y0.device)
        return is_padding.view(-1, *self._row_shape)

    @property
    def _row_shape(self) -> tuple[int, ...]:
        return (len(self.y0), *(1,) * (self.y0.dim() - 1))


def batch_problem_of(given: ProblemArguments) -> BatchProblem:
    """``problem_of`` with option ``batch="independent"``."""
    return remembered(_checked_batch_problem, given)


def _checked_batch_problem(given: ProblemArguments) -> BatchProblem:
    assert given.options is not None  # they hold option batch
    options = given.options
    for name in _UNAVAILABLE:
        if options.get(name) is not None:
            raise OptionError(f'option {name} is not available with batch="independent"; remove one of the two.')
    t, longest = checked_sample_times(given.t)
    others = {name: value for name, value in options.items() if name not in STOP_OPTIONS}
    problem = checked_problem(replace(given, t=longest, options=others))
    if isinstance(problem.tableau, Switching):
        raise OptionError(
            f'option batch="independent" takes one method, and {problem.tableau.name!r} changes it. Choose an explicit '
            "one, or leave the option out: the samples then share their steps."
        )
    if problem.controller is None:
        raise OptionError(
            'option batch="independent" needs adaptive steps, but this solve has fixed steps, which are the same for '
            "every sample anyway. Remove the option, or use an adaptive method without "
            "step_size, grid_constructor and n_steps."
        )
    packing = RowPacking.of_problem(problem)
    n_rows = _n_rows(packing)
    packed = packing.pack(given.y0)
    parts = {field.name: getattr(problem, field.name) for field in fields(Problem)}
    parts |= {"packing": packing, "y0": _with_neighbours(packed), "tolerance": _tolerance(problem, packing)}
    if problem.newton is not None:
        parts["newton"] = newton_options_of_samples(problem.newton, options.get("jacobian"), packed)
    parts["times_of_rows"] = of_rows = times_of_samples(t, n_rows)
    return BatchProblem(
        **parts,
        nan_on_failure=is_nan_on_failure(options.get("on_failure")),
        is_compact=is_compact(options),
        stops_of_rows=stops_of(options, of_rows[:, 0], last_times_of(of_rows)),
    )


def _n_rows(packing: RowPacking) -> int:
    for shape in packing.shapes:
        if len(shape) - packing.is_complex < 1:
            raise ArgumentValueError(
                f'option batch="independent" needs a state whose first dimension is the batch; y0 is '
                f"{packing.describe()}. Use y0.unsqueeze(0) for a batch of one."
            )
        if shape[0] != packing.n_rows:
            raise ArgumentValueError(
                f'option batch="independent" needs components whose first dimensions are equal; y0 is '
                f"{packing.describe()}."
            )
    return packing.n_rows


def _with_neighbours(packed: Tensor) -> Tensor:
    """``packed`` if each sample fills one block of memory and the blocks follow one another, else such a copy."""
    if packed.numel() == 0 or (packed.stride(0) == packed[0].numel() and not packed.is_neg()):
        row = packed[0] if len(packed) else packed
        if torch.empty_like(row, device="meta").stride() == row.stride():
            return packed
    return packed.clone(memory_format=torch.contiguous_format)


def _tolerance(problem: Problem, packing: RowPacking) -> Tolerance:
    """The tolerances of the problem, with tensors reordered like the packed samples."""

    def by_row(value: float | Tensor) -> float | Tensor:
        if not packing.is_tuple or not isinstance(value, Tensor):
            return value
        return packing.pack(problem.packing.unpack(value.contiguous()))

    given = problem.tolerance
    return Tolerance(by_row(given.rtol), by_row(given.atol), packing.segments)
