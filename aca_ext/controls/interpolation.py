"""``Interpolation``: a path through data as a function of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.controls.missing import filled_forward
from aca_ext.controls.pieces import KINDS, derivative, polynomial
from aca_ext.errors import ArgumentTypeError, ArgumentValueError, TimeError
from aca_ext.kernels.reference import widest_dtype
from aca_ext.problem.arguments import lookup
from aca_ext.problem.times import times_of


class Interpolation(nn.Module):
    """A batch of paths X(t) through the values x at the times t.

    Values may be missing, and then are NaN, each channel of each path for itself. They are filled in from the others of
    their channel, as torchcde does: before the first observation the path equals it, behind the last one too, and a
    channel without observations is zero. The steps of ``cdeint`` end at the knots without being told to.

    Args:
        t: (L,) strictly increasing times, L ≥ 2, numbers or a tensor, in the unit that func uses.
        x: (..., L, channels) values of a real floating dtype.
        kind: interpolation between the times.

            * "linear" (default): straight lines, also across missing values.
            * "cubic": the natural cubic spline through the values that are not missing. Two continuous derivatives;
              every value has an effect at every time.
            * "hermite": cubic pieces; the derivative at a knot is that of the line before it. Missing values are on
              straight lines. Continuous derivative, and no effect of values beyond the next observation.
            * "constant": each value, also in place of missing ones, until the next. At a knot its own.

    The path is differentiable with respect to t and x to any order, but not where it jumps; the gradient of a missing
    value is zero. Evaluation does not synchronise with a GPU; the constructor does so once if t is on it. Beyond its
    ends a path continues its first and its last piece. As a module it moves with ``.to()``; its tensors are data and in
    no state dict. An infinite value makes pieces of NaN; this is not checked, which would synchronise.

    Raises:
        ArgumentTypeError: x is no real floating tensor.
        ArgumentValueError: the shapes of t and x do not fit.
        TimeError: t is not strictly increasing and finite.
        UnknownNameError: ``kind`` is none of these.

    Sources: natural splines as in torchcde; Hermite splines in Morrill et al., Neural controlled differential equations
    for online prediction tasks, 2021.
    """

    _t: Tensor
    _coefficients: Tensor

    def __init__(self, t: Tensor | Sequence[float], x: Tensor, kind: str = "linear") -> None:
        super().__init__()
        self.kind = lookup("kind of interpolation", kind, KINDS)
        _check_values(x)
        self._knots = _checked_knots(t, x)
        if not isinstance(t, Tensor) or not t.is_floating_point():
            t = torch.tensor(self._knots, dtype=torch.float64, device="cpu")
        t = t.to(x.device)
        dtype = torch.promote_types(t.dtype, x.dtype)  # differences of coarse times would be wrong
        pieces = KINDS[kind](t.to(dtype), x.to(dtype).transpose(-1, -2))
        self.register_buffer("_t", t, persistent=False)
        coefficients = torch.stack(pieces).transpose(-1, -2).to(x.dtype)
        self.register_buffer("_coefficients", coefficients, persistent=False)

    @classmethod
    def rectilinear(cls, x: Tensor, time_channel: int = 0) -> Interpolation:
        """The linear path that needs no future value, torchcde's rectilinear interpolation, for online predictions.

        From one observation to the next, first the time alone moves, while the other channels keep their values; then
        these move. The path has the knots 0, 1, ..., 2L - 2, and is x[i] at 2i. Missing values keep the last observation
        of their channel, and before the first one they are equal to that, which is a future value.

        Args:
            x: (..., L, channels) values, L ≥ 2; one channel is the time, which must not be missing.
            time_channel: number of that channel.

        Raises:
            ArgumentTypeError: x is no real floating tensor, or time_channel no integer.
            ArgumentValueError: x has another shape, or no such channel.

        Source: Morrill et al., Neural controlled differential equations for online prediction tasks, 2021.
        """
        _check_values(x)
        channels = x.shape[-1]
        if not isinstance(time_channel, int) or isinstance(time_channel, bool):
            raise ArgumentTypeError(f"time_channel is of type {type(time_channel).__name__}; give the number, an int.")
        if not -channels <= time_channel < channels:
            raise ArgumentValueError(
                f"time_channel is {time_channel}, but x has {channels} channels. Give one of them."
            )
        twice = filled_forward(x.transpose(-1, -2)).transpose(-1, -2).repeat_interleave(2, -2)
        is_time = torch.arange(channels, device=x.device) == time_channel % channels
        knots = torch.arange(2 * x.shape[-2] - 1, dtype=torch.float64, device="cpu")
        return cls(knots, torch.where(is_time, twice[..., 1:, :], twice[..., :-1, :]), "linear")

    @property
    def grid_points(self) -> Tensor:
        """(L,) the times t, the knots of the path."""
        return self._t

    @property
    def interval(self) -> Tensor:
        """(2,) the first and the last time."""
        return torch.stack([self._t[0], self._t[-1]])

    @property
    def solver_options(self) -> dict[str, Any]:
        """Entries of ``options`` with which adaptive steps end at the knots: ``jump_t`` or ``step_t``.

        They suit a func that uses the derivative, and for "constant" one that uses the value. The times are numbers on
        the host, as options are. A solve gives knots that require grad no gradient for moving a jump of func.
        """
        return {"jump_t" if self.jumps else "step_t": self._knots}

    @property
    def jumps(self) -> bool:
        """True if the derivative, for "constant" the value, is discontinuous at the knots.

        For "hermite" also with knots that require grad: the derivative is continuous, but not its gradient there.
        """
        return self.kind in ("linear", "constant") or (self.kind == "hermite" and self._t.requires_grad)

    @property
    def pieces_of_samples(self) -> Tensor:
        """(batch, powers, ..., pieces, channels): coefficients with the first batch dimension first."""
        return self._coefficients.movedim(0, 1)

    def evaluate(self, t: Tensor | float) -> Tensor:
        """The values at times t of any shape: (..., \\*t.shape, channels), in the dtype of x."""
        return polynomial(*self._at(t))

    def derivative(self, t: Tensor | float) -> Tensor:
        """The derivative at times t of any shape: (..., \\*t.shape, channels), in the dtype of x.

        At a knot where it jumps, that of the piece before; at the first knot, of the piece behind.
        """
        coefficients, u = self._at(t)
        return polynomial(derivative(coefficients), u)

    def _at(self, t: Tensor | float) -> tuple[Sequence[Tensor], Tensor]:
        """The coefficients of the pieces at t, (..., times, channels), and the times since their knots."""
        if not isinstance(t, Tensor) or not t.is_floating_point():
            t = torch.as_tensor(t, dtype=widest_dtype(self._t.device), device=self._t.device)
        times = t.to(self._t.device).reshape(-1)
        piece = self._piece(times)
        shape = (*self._coefficients.shape[:-2], *t.shape, self._coefficients.shape[-1])
        coefficients = self._coefficients.index_select(-2, piece).reshape(shape).unbind()
        u = times - self._t.index_select(0, piece)
        return coefficients, u.to(self._coefficients.dtype).reshape(*t.shape, 1)

    def _piece(self, times: Tensor) -> Tensor:
        """The index of the piece that each of the times lies in."""
        dtype = torch.promote_types(times.dtype, self._t.dtype)
        is_constant = self.kind == "constant"  # whose last value is a piece of its own
        starts = self._t[1:] if is_constant else self._t[1:-1]
        times, starts = times.detach().to(dtype).unsqueeze(-1), starts.detach().to(dtype)
        return (times >= starts if is_constant else times > starts).sum(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Interpolation:
        super()._apply(fn, recurse)
        # The knots on the host are rounded as those of the path are.
        self._knots = tuple(torch.tensor(self._knots, dtype=torch.float64, device="cpu").to(self._t.dtype).tolist())
        return self

    def extra_repr(self) -> str:
        *batch, _, channels = self._coefficients.shape[1:]
        shape = (*batch, len(self._knots), channels)
        return f"t={self._knots[0]:.6g} to {self._knots[-1]:.6g}, x of shape {shape}, kind={self.kind!r}"


def _check_values(x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = f"of dtype {x.dtype}" if isinstance(x, Tensor) else f"of type {type(x).__name__}"
        raise ArgumentTypeError(f"x is {given}; give a tensor of real floating numbers, with NaN for missing values.")
    if x.dim() < 2 or x.shape[-2] < 2:
        raise ArgumentValueError(
            f"x has shape {tuple(x.shape)}; give (..., L, channels): values at L ≥ 2 times. A single channel is x[:, "
            "None]."
        )


def _checked_knots(t: Any, x: Tensor) -> tuple[float, ...]:
    knots = times_of(t)
    if len(knots) != x.shape[-2]:
        raise ArgumentValueError(
            f"t has {len(knots)} times, but x, of shape {tuple(x.shape)}, has values at {x.shape[-2]}, along its last "
            "dimension but one; give x as (..., L, channels) for t (L,)."
        )
    if knots[0] > knots[-1]:
        raise TimeError("the times t of a path decrease; give increasing ones, t.flip(0) and x.flip(-2).")
    return knots
