"""Times at which steps of independent samples must end: options ``step_t`` and ``jump_t``, for all samples or each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aca_ext.errors import OptionError
from aca_ext.problem.admission import check_readable
from aca_ext.problem.options import refuse_learnt_times

STOP_OPTIONS = ("step_t", "jump_t")

_Times = NDArray[np.float64]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Stops:
    """Times inside the solve of each sample at which a step must end, and its last time.

    Attributes:
        times: (1, S) for all samples or (batch, S), in the order of the solve; NaN before the first where a sample has
            fewer than S.
        is_jump: of the same shape, True where func jumps.
    """

    times: _Times
    is_jump: _Mask


def stops_of(options: Mapping[str, Any], starts: _Times, ends: _Times) -> Stops | None:
    """The stops of samples that run from ``starts`` to ``ends``, each (batch,); None if no option gives any.

    Raises:
        OptionError: the times of an option are not finite, or are not those of as many samples.
    """
    for name in STOP_OPTIONS:
        refuse_learnt_times(name, options.get(name))
    found = {
        name: _rows("option " + name, options[name], len(starts)) for name in STOP_OPTIONS if _is_in(options, name)
    }
    if not found:
        return None
    is_one_row = all(len(x) == 1 for x in found.values()) and starts.strides[0] == ends.strides[0] == 0
    n_rows = min(1, len(starts)) if is_one_row else len(starts)
    starts, ends = starts[:n_rows, None], ends[:n_rows, None]
    times = np.concatenate([np.broadcast_to(x, (n_rows, x.shape[1])) for x in found.values()], 1)
    is_jump = np.concatenate([np.full((n_rows, x.shape[1]), name == "jump_t") for name, x in found.items()], 1)
    is_inside = (np.minimum(starts, ends) < times) & (times < np.maximum(starts, ends))
    sign = np.where(ends < starts, -1.0, 1.0)
    order, is_jump = _in_order(np.where(is_inside, sign * times, -np.inf), is_jump)
    # Of equal times the last one counts, which is a jump if one of them is.
    is_double = np.zeros_like(is_jump)
    is_double[:, :-1] = order[:, :-1] == order[:, 1:]
    order, is_jump = _in_order(np.where(is_double, -np.inf, order), is_jump)
    stops = np.where(order == -np.inf, np.nan, sign * order)
    return Stops(np.concatenate([stops, ends], 1), np.concatenate([is_jump, np.zeros_like(ends, dtype=bool)], 1))


def _is_in(options: Mapping[str, Any], name: str) -> bool:
    return options.get(name) is not None


def _in_order(keys: _Times, flags: _Mask) -> tuple[_Times, _Mask]:
    order = np.argsort(keys, axis=1, kind="stable")
    return np.take_along_axis(keys, order, 1), np.take_along_axis(flags, order, 1)


def _rows(what: str, given: object, batch: int) -> _Times:
    """The times of an option as (1, S), or as (batch, S) with NaN where a sample has fewer."""
    check_readable(what, given, OptionError)
    try:
        times = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{what} is no sequence of times ({error}); give a tensor (S,) or (batch, S).") from None
    if times.ndim > 2 or (times.ndim == 2 and len(times) != batch):
        raise OptionError(
            f"{what} has shape {times.shape}; give times (S,) for all samples, or (batch, S) with a row for each of "
            f"the {batch} samples."
        )
    wrong = np.isinf(times) if times.ndim == 2 else ~np.isfinite(times)
    if wrong.any():
        raise OptionError(
            f"{what} holds {times[wrong][0]}; times must be finite, but for NaN in a tensor (batch, S) where a sample "
            "has fewer times than others."
        )
    return times.reshape(batch if times.ndim == 2 else 1, -1)
