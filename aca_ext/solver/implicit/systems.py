"""Linear systems of implicit stages: Jacobians of func, the matrix of Newton's method, and its transpose.

The stages i of one group are solved together. With J_i the Jacobian at stage i, the matrix has the blocks

    K_ij = δ_ij·I - h·a_ij·J_i

Newton's method solves K·x = r. The transpose of a step solves Kᵀ·λ = r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from aca_ext.errors import ArgumentValueError
from aca_ext.kernels.operations import TorchOperations
from aca_ext.kernels.reference import Number
from aca_ext.solver.implicit.rows import combined, in_dtype_of
from aca_ext.vector_field.slope_function import SlopeFunction

Rows = Sequence[Sequence[float]]

# torch.autograd.grad without its validation of the arguments; see ``vector_field.replay``.
_run_backward: Callable[..., tuple[Any, ...]] = torch.autograd.Variable._execution_engine.run_backward

_FEW = 2  # up to so many columns, a loop takes less time than torch's batched backward pass


class System(Protocol):
    """The matrix K of a group of stages; vectors are lists of states, one per stage."""

    def solve(self, r: Sequence[Tensor], transposed: bool = False) -> list[Tensor]: ...

    def correct(self, slopes: Sequence[Tensor], z: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """An iteration of Newton's method: z + K⁻¹·(h·Σ_j a_ij·slope_j - z), and its change of z."""


class Jacobian(Protocol):
    """A way to linearise func.

    Attributes:
        is_exact: the linearisation is the derivative of func, up to rounding. One that the user computes may not be.
        outlives_graph: the linearisation at a graph can be used after a backward pass has freed that graph.
    """

    is_exact: bool
    outlives_graph: bool

    def at(self, t: Tensor, y: Tensor) -> Any:
        """The linearisation at (t, y)."""

    def of_graph(self, t: Tensor, y: Tensor, k: Tensor) -> Any:
        """The linearisation at (t, y) from the autograd graph of ``k`` = f(t, y), which is kept."""

    def system(self, linearisations: Sequence[Any], a: Rows, h: Number) -> System:
        """The system of a group of stages; h is a number, or a tensor with one for each block."""

    def norm(self, linearisation: Any, scale: Tensor) -> float:
        """The norm of a linearisation for states in units of ``scale``; infinite if it is not known."""


@contextmanager
def recording() -> Iterator[None]:
    """Context in which autograd records func, whatever the mode of the solve."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def outside_inference(x: Tensor) -> Tensor:
    """``x`` itself, or a copy that autograd can record if it was made in inference mode."""
    return x.clone() if x.is_inference() else x


def pulled_back(k: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """The product of ``v`` with the transposed derivative of ``k`` by ``y``; their graph is kept."""
    how: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(k, y, v, **how)[0].detach()


class Rowwise:
    """Products of several cotangents with a Jacobian, in one batched backward pass if func allows it."""

    def __init__(self) -> None:
        self._is_batched = True  # until torch's batched backward pass refuses func

    def __call__(self, y: Tensor, k: Tensor, cotangents: Tensor) -> Tensor:
        if len(cotangents) == 0:
            return cotangents.new_zeros(0, *y.shape)
        if self._is_batched and len(cotangents) > _FEW:
            how: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
            try:
                rows = torch.autograd.grad(k, y, cotangents, **how)[0]
                return y.new_zeros(len(cotangents), *y.shape) if rows is None else rows.detach()
            except RuntimeError:  # an operation has no batched form, or a function of the user's is in the graph
                self._is_batched = False
        found = [_run_backward((k,), (g,), True, False, (y,), True, False)[0] for g in cotangents.unbind()]
        return torch.stack([torch.zeros_like(y) if row is None else row for row in found]).detach()


def units(m: int, count: int, like: Tensor) -> Tensor:
    """For each of the m elements of a block the state that is 1 there in all blocks, (m, \\*shape of ``like``)."""
    unit = torch.eye(m, dtype=like.dtype, device=like.device).unsqueeze(1).expand(m, count, m)
    return unit.reshape(m, *like.shape)


class Blocks:
    """Jacobians as matrices: one of the whole state, or one per sample along its first dimension.

    A linearisation is a tensor (blocks, m, m), where m is the number of elements in a block.
    """

    is_exact = True
    outlives_graph = True

    def __init__(self, f: SlopeFunction, ops: TorchOperations, count: int) -> None:
        self._f, self._ops, self._count = f, ops, count
        self._rows = Rowwise()
        self._units: Tensor | None = None

    def at(self, t: Tensor, y: Tensor) -> Tensor:
        with recording():
            t, leaf = outside_inference(t), outside_inference(y.detach()).requires_grad_()
            return self.of_graph(t, leaf, self._f(t, leaf))

    def of_graph(self, t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        m = k.numel() // max(self._count, 1)
        if not k.requires_grad:
            return torch.zeros(self._count, m, m, dtype=k.dtype, device=k.device)
        if self._units is None:
            self._units = units(m, self._count, k)
        rows = self._rows(y, k, self._units)
        return rows.reshape(m, self._count, m).transpose(0, 1)

    def system(self, linearisations: Sequence[Tensor], a: Rows, h: Number) -> System:
        return self._ops.small_system(linearisations, a, h) or BlockSystem(linearisations, a, h)

    def norm(self, linearisation: Tensor, scale: Tensor) -> float:
        units = scale.reshape(linearisation.shape[:2])
        rows = (linearisation.abs() @ units.unsqueeze(-1)).squeeze(-1) / units
        return float(rows.max()) if rows.numel() else 0.0


class GivenMatrix(Blocks):
    """The Jacobian by a function of the user's."""

    is_exact = False

    def __init__(
        self, f: SlopeFunction, ops: TorchOperations, count: int, function: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(f, ops, count)
        self._function = function

    def at(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self._function(t, y.detach())

    def of_graph(self, t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return self.at(t, y)


class StageSystem:
    """Base of the systems of a group of stages with the coefficients ``a`` and the step size ``h``."""

    def __init__(self, a: Rows, h: Number) -> None:
        self._a, self._h = a, h

    def solve(self, r: Sequence[Tensor], transposed: bool = False) -> list[Tensor]:
        raise NotImplementedError

    def correct(self, slopes: Sequence[Tensor], z: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        change = self.solve(self._residual(slopes, z))
        return [old + d for old, d in zip(z, change, strict=True)], change

    def _residual(self, slopes: Sequence[Tensor], z: Sequence[Tensor]) -> list[Tensor]:
        """h·Σ_j a_ij·slope_j - z_i for each stage."""
        return [new - old for new, old in zip(combined(self._h, self._a, slopes), z, strict=True)]


class BlockSystem(StageSystem):
    """LU factors of the matrices K, one for each block of the state."""

    def __init__(self, jacobians: Sequence[Tensor], a: Rows, h: Number) -> None:
        super().__init__(a, h)
        stages, (count, m, _), dtype = len(a), jacobians[0].shape, jacobians[0].dtype
        eye = torch.eye(m, dtype=dtype, device=jacobians[0].device)
        h = h.view(-1, 1, 1) if isinstance(h, Tensor) else h

        def block(i: int, j: int) -> Tensor:
            scaled = in_dtype_of(eye, h * a[i][j]) * jacobians[i]
            return eye - scaled if i == j else -scaled

        rows = [_joined([block(i, j) for j in range(stages)], dim=2) for i in range(stages)]
        self._shape = stages, count, m
        # Not lu_factor, which raises for a singular matrix; the infinity that it gives here is a failed iteration.
        self._factors, self._pivots, _ = torch.linalg.lu_factor_ex(_joined(rows, dim=1))

    def solve(self, r: Sequence[Tensor], transposed: bool = False) -> list[Tensor]:
        stages, count, m = self._shape
        columns = _joined([x.reshape(count, m, 1) for x in r], dim=1)
        x = torch.linalg.lu_solve(self._factors, self._pivots, columns, adjoint=transposed)
        return [part.reshape(r[0].shape) for part in (x.reshape(count, stages, m).unbind(1) if stages > 1 else (x,))]


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(tuple(parts), dim=dim) if len(parts) > 1 else parts[0]


class Solution(torch.autograd.Function):
    """K⁻¹·r, or K⁻ᵀ·r, for a constant K; differentiable with respect to r.

    Corrections with a constant K make two orders of derivatives right, so the second ones refuse to have a graph.
    """

    @staticmethod
    def forward(ctx: Any, system: System, transposed: bool, *r: Tensor) -> tuple[Tensor, ...]:
        ctx.system, ctx.transposed = system, transposed
        return tuple(system.solve(r, transposed))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        found = Solution.apply(ctx.system, not ctx.transposed, *grads)
        return None, None, *(_TwiceDifferentiable.apply(g) for g in found)


class _TwiceDifferentiable(torch.autograd.Function):
    """A part of a gradient, whose own derivatives have no graph: implicit steps are differentiated twice at most."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        if torch.is_grad_enabled() and g is not None:
            raise ArgumentValueError(
                "create_graph=True was given for second derivatives through an implicit method, whose third "
                "derivatives would be wrong. Leave it out, or use an explicit method."
            )
        return g
