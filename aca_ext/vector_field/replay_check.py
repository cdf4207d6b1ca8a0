"""Comparison of replayed steps with the states of the forward pass, to detect a func that has changed in between.

A replay repeats the forward pass bit for bit as long as func does the same. Two kinds of kernels leave rounding errors:
those that sum in no fixed order, and those that torch uses only while an autograd graph is recorded. A deviation counts
as rounding if, for the largest element of each component of the state and with eps the spacing of the state's dtype,

    |y1 - y_next| ≤ eps·max(16·|y|, 64·|h|·|k|)

The slopes k are allowed more, since each is the result of a whole network. The state has an allowance of its own: its
last bit, and the cancellation of large terms inside func, do not shrink with the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aca_ext.errors import ReplayError

Array = NDArray[np.float64]

# Allowances relative to the state and to the slopes, in units of eps.
_FINE = 16.0, 64.0
# For dtypes of few bits. Kernels accumulate their sums in float32, so only stored results are rounded to the dtype.
_COARSE, _COARSE_FROM = (2.0, 8.0), 2.0**-10
# Factor by which a deviation may grow in one step, in a replay that does not restart from the forward pass's states.
_GROWTH = 4.0


class ReplayedStep(NamedTuple):
    """A replayed step that is to be compared.

    ``distance`` counts the steps since the replay last started from a state of the forward pass. In a batch of
    independent samples, ``rows`` are the samples that made the step, and ``t`` and ``h`` are arrays with one entry for
    each of them.
    """

    number: int
    t: Any
    h: Any
    distance: int = 1
    rows: NDArray[np.int64] | None = None


class ReplayCheck:
    """Compares the steps of one replay with the forward pass.

    On the CPU a difference raises at once. On other devices a comparison would make the host wait, so ``finish``
    evaluates all of them together.

    Args:
        like: a tensor with shape, dtype and device of the state.
        segments: offsets of the components of the state, and its end; for independent samples, within one sample.
        n_steps: number of steps that the forward pass accepted.
        autocast_dtype: dtype of torch.autocast in the forward pass, None if it was off.
        held: tensors that func computes with besides the state; their dtypes may be coarser than the state's.
        by_row: the first dimension of the state counts independent samples.
        restarts: each step is replayed from a state of the forward pass.
    """

    def __init__(
        self,
        like: Tensor,
        segments: Sequence[int],
        n_steps: int,
        autocast_dtype: torch.dtype | None,
        held: Sequence[Tensor] = (),
        *,
        by_row: bool = False,
        restarts: bool = True,
    ) -> None:
        self._segments = [(lo, hi) for lo, hi in pairwise(segments) if hi > lo]
        self._is_whole, self._by_row, self._restarts = len(segments) == 2, by_row, restarts
        self._n_steps = n_steps
        self._is_empty, self._is_cuda = like.numel() == 0, like.is_cuda
        self._like, self._autocast_dtype, self._held = like, autocast_dtype, held
        self._is_deferred = is_deferred(like.device)
        self._pending: list[tuple[ReplayedStep, Tensor]] = []
        self._before: Array | float = 0.0  # deviation of the state at the start of the step

    def compare(self, step: ReplayedStep, y: Tensor, y_next: Tensor, y1: Tensor, k: Sequence[Tensor]) -> None:
        """Compares the end ``y1`` of a replayed step from ``y`` with slopes ``k`` with that of the forward pass.

        Raises:
            ReplayError: they differ by more than rounding.
        """
        if self._is_empty:
            return
        if not self._is_deferred and torch.equal(y1, y_next):
            self._before = 0.0
            return
        with torch.no_grad():
            # NaN, or the same infinity, in both passes is no difference.
            difference = (y1 - y_next).nan_to_num_(0.0, math.inf, -math.inf)
            sizes = self.sizes([difference, y1, y_next, y, *k])
        if self._is_deferred:
            self._pending.append((step, sizes))
        else:
            self._judge(step, sizes.double().numpy())

    def finish(self) -> None:
        """Evaluates the comparisons that were deferred; raises ReplayError as ``compare`` does."""
        pending, self._pending = self._pending, []
        # During a capture of the user's, the host cannot read results, and func is the one that was captured.
        if not pending or (self._is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        together = torch.cat([sizes for _, sizes in pending]).cpu().double().numpy()
        ends = np.cumsum([len(sizes) for _, sizes in pending])
        for (step, _), sizes in zip(pending, np.split(together, ends[:-1]), strict=True):
            self._judge(step, sizes)

    def sizes(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest magnitude in each component, (tensors, components, rows)."""
        if self._by_row:
            flat = [x.reshape(len(x), -1) for x in tensors]
            parts = [torch.linalg.vector_norm(x[:, lo:hi], math.inf, 1) for x in flat for lo, hi in self._segments]
        else:
            if not self._is_whole:
                tensors = [x.reshape(-1)[lo:hi] for x in tensors for lo, hi in self._segments]
            parts = list(torch._foreach_norm(list(tensors), math.inf))  # all in one launch
        return torch.stack(parts).view(-1, len(self._segments), len(tensors[0]) if self._by_row else 1)

    def _judge(self, step: ReplayedStep, sizes: Array) -> None:
        deviation, y1, y_next, *_ = sizes
        only_one_is_nan = np.isnan(y1) != np.isnan(y_next)
        scale = np.where(np.isfinite(sizes), sizes, 0.0)
        h = np.zeros(sizes.shape[-1])
        rows = slice(None) if step.rows is None else step.rows
        h[rows] = np.abs(step.h)
        of_state, of_slopes = scale[1:4].max(0), scale[4:].max(0)
        share_of_state, share_of_slopes = rounding(self._like, self._autocast_dtype, self._held)
        allowed = step.distance * np.maximum(share_of_state * of_state, share_of_slopes * h * of_slopes)
        if not self._restarts:
            allowed = allowed + _GROWTH ** min(step.distance, 100) * self._before
            self._before = deviation
        is_wrong = np.zeros(deviation.shape, dtype=np.bool_)
        is_wrong[:, rows] = (only_one_is_nan | (deviation > allowed))[:, rows]
        if is_wrong.any():
            component, row = (int(i) for i in np.unravel_index(is_wrong.argmax(), is_wrong.shape))
            raise self._error(step, row, float(deviation[component, row]), float(allowed[component, row]))

    def _error(self, step: ReplayedStep, row: int, deviation: float, allowed: float) -> ReplayError:
        if step.rows is None:
            what, t, h = f"step {step.number + 1} of {self._n_steps}", step.t, step.h
            also = ""
        else:
            i = int(np.flatnonzero(step.rows == row)[0])
            what, t, h = f"a step of sample {row}", float(step.t[i]), float(step.h[i])
            also = ", or makes samples depend on one another"
        earlier = f", or one of the {step.distance - 1} before it," if step.distance > 1 else ""
        return ReplayError(
            f"Replaying {what}{earlier} (t={t:.17g}, h={h:.6g}) did not repeat the forward pass: its end deviates by "
            f"{deviation:.3g}, rounding explains {allowed:.3g}, and the gradient would be wrong. {causes(also)}"
        )


def causes(also: str = "") -> str:
    """Likely causes of a replay that differs, and their remedies; ``also`` is a further cause."""
    return (
        "func is no longer what it was. Likely causes: memory that it reads was overwritten since (a tensor in place "
        "or through .data, a NumPy array); it draws random numbers from NumPy or from a generator that is not "
        f"torch's; it keeps something from one evaluation to the next{also}. Pass values that change by args=(...), or "
        'call backward before the change, or use gradient="direct", which does not replay.'
    )


def rounding(like: Tensor, autocast_dtype: torch.dtype | None, held: Sequence[Tensor]) -> tuple[float, float]:
    """Largest deviation that counts as rounding, relative to the state, and to the step size times the slopes."""
    dtypes = {like.dtype, *(x.dtype for x in held if x.is_floating_point() and x.dtype.itemsize >= 2)}
    if autocast_dtype is not None:
        dtypes.add(autocast_dtype)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if like.is_cuda and like.dtype == torch.float32 and _uses_tf32():
        eps = max(eps, 2.0**-10)
    of_state, of_slopes = _COARSE if eps >= _COARSE_FROM else _FINE
    return of_state * eps, of_slopes * eps


def is_deferred(device: torch.device) -> bool:
    """Tells whether reading a number from ``device`` makes the host wait."""
    return device.type != "cpu"


def _uses_tf32() -> bool:
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(torch.backends.cudnn, "conv"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


class CapturedCheck:
    """Comparison of steps that were captured as a CUDA graph: the largest deviation stays on the device.

    ``add`` is captured with the step. It therefore makes no tensor from Python numbers and cannot name a step. NaN
    counts as no deviation.

    Args:
        n_slopes: number of slopes in one step.
    """

    def __init__(
        self,
        like: Tensor,
        segments: Sequence[int],
        n_slopes: int,
        autocast_dtype: torch.dtype | None,
        held: Sequence[Tensor],
    ) -> None:
        self._check = ReplayCheck(like, segments, 0, autocast_dtype)
        self._is_empty = like.numel() == 0
        of_state, of_slopes = rounding(like, autocast_dtype, held)
        # Factors of the difference, the three states and the slopes: one constant, one per unit of |h|.
        shares = [[1.0, *[of_state] * 3, *[0.0] * n_slopes], [0.0] * 4 + [of_slopes] * n_slopes]
        self._shares = torch.tensor(shares, dtype=torch.float64, device=like.device).unsqueeze(-1)
        self._worst = torch.zeros((), dtype=torch.float64, device=like.device)

    def begin(self) -> None:
        self._worst.zero_()

    def add(self, h: Tensor, y: Tensor, y_next: Tensor, y1: Tensor, k: Sequence[Tensor]) -> None:
        if self._is_empty:
            return
        with torch.no_grad():
            sizes = self._check.sizes([y1 - y_next, y1, y_next, y, *k]).squeeze(-1)
            sizes = sizes * torch.addcmul(self._shares[0], self._shares[1], h.abs())
            ratio = (sizes[0] / sizes[1:].amax(0)).nan_to_num(0.0, math.inf)
            torch.maximum(self._worst, ratio.amax(), out=self._worst)

    def finish(self) -> None:
        """Waits for the device; raises ReplayError where a step deviated by more than rounding."""
        worst = self._worst.item()
        if worst > 1:
            raise ReplayError(
                "Replaying the steps did not repeat the forward pass: the end of one deviates "
                f"{worst:.3g} times as far as rounding explains, and the gradient would be wrong. {causes()}"
            )
