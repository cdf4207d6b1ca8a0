"""Validation of requested times that each sample of a batch has for itself.

Series of different lengths share one array: NaN pads the end of the shorter ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import TimeError
from aca_ext.problem.times import as_float64, times_of

Array = NDArray[np.float64]
Index = NDArray[np.int64]


def distinct_rows(times: Array) -> Array:
    """One row where all samples share it in memory, else all rows."""
    return times[:1] if times.strides[0] == 0 else times


def counts_of(times: Array) -> Index:
    """Number of times of each sample, without the padding."""
    counts: Index = (~np.isnan(distinct_rows(times))).sum(1)
    return counts if len(counts) == len(times) else np.broadcast_to(counts, len(times))


def last_times_of(times: Array) -> Array:
    """The last time of each sample."""
    counts = counts_of(times)
    if (counts == times.shape[1]).all():
        return times[:, -1]  # a view, which shows if all samples have the same times
    return times[np.arange(len(times)), counts - 1]


def checked_sample_times(given: Any) -> tuple[Array, Any]:
    """All times as a float64 array, (T,) or (batch, T), and the times of the sample with most times as given.

    Raises:
        TimeError: the times of a sample are not accepted; the message names the sample.
    """
    try:
        times = as_float64(given)
    except TimeError:
        times = np.zeros(0)
    if times.ndim != 2 or (isinstance(given, Tensor) and (given.is_complex() or given.dtype == torch.bool)):
        return times, given  # problem_of validates them, and its message fits
    if len(times) == 0:
        raise TimeError(f"t has shape {times.shape}; give (batch, T) times, or (T,) times for all samples.")
    counts, position = counts_of(times), np.arange(times.shape[1])
    is_time = position < counts[:, None]
    gaps, is_gap = np.diff(times, axis=1), is_time[:, 1:]
    is_sorted = ((gaps > 0) | ~is_gap).all(1) | ((gaps < 0) | ~is_gap).all(1)
    wrong = (counts == 0) | ~is_sorted | (np.isfinite(times) != is_time).any(1)
    if wrong.any():
        _refuse(times, int(wrong.argmax()), int(wrong.sum()) - 1)
    longest = int(counts.argmax())
    own = (given if isinstance(given, (Tensor, tuple, list)) else times)[longest]
    return times, own[: counts[longest]]


def _refuse(times: Array, sample: int, others: int) -> None:
    """Raises the TimeError for the times of ``sample``."""
    own, count = times[sample], int(counts_of(times[sample : sample + 1])[0])
    reason = ""
    if count == 0:
        reason = "all of them are NaN. Give at least the initial time of each sample."
    elif np.isnan(own[:count]).any():
        i = int(np.isnan(own).argmax())
        reason = f"t[{i}] is NaN, and a time follows. NaN may only pad the end; move it behind the last time."
    else:
        try:
            times_of(own[:count])
        except TimeError as error:
            reason = str(error)
    and_more = f" (and of {others} more)" if others else ""
    raise TimeError(f"the times of sample {sample}{and_more}, t[{sample}], are wrong: {reason}")


def times_of_samples(times: Array, n_rows: int) -> Array:
    """The times as an array (n_rows, T).

    Raises:
        TimeError: they are (batch, T) for another number of samples.
    """
    if times.ndim == 1:
        return np.broadcast_to(times, (n_rows, len(times)))
    if len(times) != n_rows:
        raise TimeError(
            f"t has shape {times.shape}, but y0 is a batch of {n_rows}; give t of shape ({n_rows}, T), or (T,) for all "
            "samples."
        )
    return times
