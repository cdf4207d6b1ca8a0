"""Parts that the transposes of explicit and implicit steps have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.solver.implicit.rows import is_all, larger, largest

# Compares the end of a replayed step and its slopes with those of the forward pass.
Compare = Callable[[Tensor, Sequence[Tensor]], None]
# Sums over outputs inside a step, with weights w and cotangents g: Σ g, and for each stage i Σ w[i]·g.
Inside = tuple[Tensor, Sequence[Tensor]]

_NEAR = 100.0  # distance of a replayed step from the forward pass, in units of the tolerance of Newton's method
_ROUNDING = 2.0**14  # the same for a step that is computed until rounding, which stiffness magnifies


def compare_implicit_end(
    ops: TorchOperations,
    compare: Compare | None,
    y: Tensor,
    y_next: Tensor | None,
    y1: Tensor,
    k: Sequence[Tensor],
    tolerance: float | None = None,
) -> None:
    """Calls ``compare`` if the end ``y1`` of a replayed implicit step is not near that of the forward pass.

    ``tolerance`` is the error of Newton's method in the forward pass; None if the step was computed until rounding.
    """
    if compare is None or y_next is None:
        return
    if not _is_near(ops, y, y_next, y1, tolerance):
        compare(y1, k)


def repeated_implicit_end(
    ops: TorchOperations,
    compare: Compare,
    y: Tensor,
    y_next: Tensor,
    y1: Tensor,
    k: Sequence[Tensor],
    tolerance: float | None = None,
) -> Tensor:
    """The end of a step in the forward pass, with the graph of ``y1``, the end of the repeated step.

    The next step then starts where it did in the forward pass, so that the error of the iterations does not add up.
    """
    with torch.no_grad():
        compare_implicit_end(ops, compare, y.detach(), y_next, y1.detach(), k, tolerance)
    return y_next + (y1 - y1.detach())


def _is_near(ops: TorchOperations, y: Tensor, y_next: Tensor, y1: Tensor, tolerance: float | None) -> bool:
    difference = ops.admit(y1 - y_next)
    if tolerance is not None:
        # Newton's method iterates to the tolerance, or to rounding where that is more.
        wanted = larger(tolerance, 10 * torch.finfo(y.dtype).eps * ops.error_norm(y, None, 0.0, y, y))
        return is_all(ops.error_norm(difference, None, 0.0, y, y_next) <= _NEAR * wanted)
    allowed = _ROUNDING * torch.finfo(y.dtype).eps * largest((y, y_next), ops)
    return bool((difference.abs() <= allowed).all())


def cotangent_of_slope(
    ops: TorchOperations,
    a: Sequence[Sequence[float]],
    i: int,
    h: Number,
    outputs: Sequence[tuple[Sequence[float], Tensor]],
    pulled: dict[int, Tensor],
    inside: Inside | None,
) -> Tensor | None:
    """The cotangent of slope i from the outputs and from later stages; None if nothing depends on it."""
    terms = [(w[i], g) for w, g in outputs if w[i] != 0]
    terms += [] if inside is None else [(1.0, inside[1][i])]
    terms += [(a[j][i], v) for j, v in pulled.items() if a[j][i] != 0]
    if not terms:
        return None
    return ops.weighted_sum(None, h, [x for _, x in terms], tuple(w for w, _ in terms))


def cotangent_of_start(
    ops: TorchOperations,
    outputs: Sequence[tuple[Sequence[float], Tensor]],
    pulled: Iterable[Tensor],
    inside: Inside | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The cotangent of the state at the start of a step: the sum of those of its outputs and of its stages.

    ``out`` receives it, and may be the cotangent of the first output.
    """
    g, *rest = [*(g for _, g in outputs), *([] if inside is None else [inside[0]]), *pulled]
    if rest:
        return ops.weighted_sum(g, 1.0, rest, (1.0,) * len(rest), out)
    return g if out is None or out is g else out.copy_(g)
