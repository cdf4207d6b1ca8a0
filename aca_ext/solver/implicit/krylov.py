"""Jacobians that are never formed: products with vectors, and GMRES for the linear systems of the stages.

The products come from an autograd graph of func: one backward pass for the transpose, and two nested ones for the
Jacobian itself, so that func needs no forward-mode derivatives.

Source: Saad & Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aca_ext.errors import ReplayError
from aca_ext.kernels.reference import Number
from aca_ext.solver.implicit.preconditioner import LinearMap, MakePreconditioner
from aca_ext.solver.implicit.systems import Rows, StageSystem, System, outside_inference, pulled_back, recording
from aca_ext.vector_field.slope_function import SlopeFunction

_RESTART, _MOST_RESTARTS = 40, 25
_IN_ITERATIONS = 1e-4  # accuracy of a system in Newton's method, whose next iteration removes the rest
_MOST_ERROR = 2**16  # of a transposed solve, in units of rounding
_NOT_SOLVED = (
    "GMRES solved the transposed stage equations up to a residual of {:.3g} only, so the gradient would be wrong. Give "
    'option preconditioner, or a better one, or use option jacobian="dense".'
)


class Linearisation:
    """Products of a vector with the Jacobian in a graph of ``k`` = f(t, y), and with its transpose."""

    def __init__(self, t: Tensor, y: Tensor, k: Tensor) -> None:
        self.t, self._y, self._k = t, y, k
        self._cotangent: Tensor | None = None
        self._pulled: Tensor | None = None

    @property
    def y(self) -> Tensor:
        return self._y.detach()

    def transposed_product(self, v: Tensor) -> Tensor:
        if not self._k.requires_grad:
            return torch.zeros_like(v)
        return pulled_back(self._k, self._y, v)

    def product(self, v: Tensor) -> Tensor:
        if not self._k.requires_grad:
            return torch.zeros_like(v)
        if self._pulled is None:
            with recording():
                self._cotangent = torch.zeros_like(self._k, requires_grad=True)
                (self._pulled,) = torch.autograd.grad(
                    self._k, self._y, self._cotangent, create_graph=True, allow_unused=True, materialize_grads=True
                )
        assert self._cotangent is not None
        if not self._pulled.requires_grad:
            return torch.zeros_like(v)
        return pulled_back(self._pulled, self._cotangent, v)


class Krylov:
    """The Jacobian by its products alone."""

    is_exact = True
    outlives_graph = False

    def __init__(self, f: SlopeFunction, preconditioner: MakePreconditioner | None = None) -> None:
        self._f, self._preconditioner = f, preconditioner

    def at(self, t: Tensor, y: Tensor) -> Linearisation:
        with recording():
            t, leaf = outside_inference(t), outside_inference(y.detach()).requires_grad_()
            return Linearisation(t, leaf, self._f(t, leaf))

    def of_graph(self, t: Tensor, y: Tensor, k: Tensor) -> Linearisation:
        return Linearisation(t, y, k)

    def system(self, linearisations: Sequence[Linearisation], a: Rows, h: Number) -> System:
        return _KrylovSystem(linearisations, a, h, self._preconditioner)

    def norm(self, linearisation: Linearisation, scale: Tensor) -> float:
        return math.inf


class _KrylovSystem(StageSystem):
    """The system solved by GMRES, preconditioned from the right, so that its residual is that of the system."""

    def __init__(
        self, linearisations: Sequence[Linearisation], a: Rows, h: Number, preconditioner: MakePreconditioner | None
    ) -> None:
        super().__init__(a, h)
        self._linearisations = linearisations
        self._preconditioners: list[LinearMap] | None = None
        if preconditioner is not None:
            stages = enumerate(linearisations)
            self._preconditioners = [preconditioner(at.t, at.y, h * a[i][i]) for i, at in stages]

    def solve(self, r: Sequence[Tensor], transposed: bool = False) -> list[Tensor]:
        eps = torch.finfo(r[0].dtype).eps
        found, error = self._solved(r, 4 * eps, transposed)
        if transposed and not error <= _MOST_ERROR * eps:
            raise ReplayError(_NOT_SOLVED.format(error))
        return found

    def correct(self, slopes: Sequence[Tensor], z: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        change, _ = self._solved(self._residual(slopes, z), _IN_ITERATIONS, transposed=False)
        return [old + d for old, d in zip(z, change, strict=True)], change

    def _solved(self, r: Sequence[Tensor], tolerance: float, transposed: bool) -> tuple[list[Tensor], float]:
        like, stages = r[0], len(r)
        apply = self._transposed if transposed else self._image

        def parts_of(x: Tensor) -> list[Tensor]:
            return [part.view_as(like) for part in x.view(stages, -1)]

        def times_matrix(x: Tensor) -> Tensor:
            return _joined(apply(self._preconditioned(parts_of(x), transposed)))

        found, error = gmres(times_matrix, _joined(r), tolerance)
        return self._preconditioned(parts_of(found), transposed), error

    def _preconditioned(self, x: list[Tensor], transposed: bool) -> list[Tensor]:
        """The product with the preconditioners of the stages, or with their transposes."""
        if self._preconditioners is None:
            return x
        pairs = zip(self._preconditioners, x, strict=True)
        return [p.transposed_product(part) if transposed else p.product(part) for p, part in pairs]

    def _image(self, x: Sequence[Tensor]) -> list[Tensor]:
        image: list[Tensor] = []
        for x_i, row, jacobian in zip(x, self._a, self._linearisations, strict=True):
            total = sum((w * x_j for w, x_j in zip(row, x, strict=True) if w != 0), torch.zeros_like(x_i))
            image.append(x_i - self._h * jacobian.product(total))
        return image

    def _transposed(self, x: Sequence[Tensor]) -> list[Tensor]:
        v = [jacobian.transposed_product(x_j) for x_j, jacobian in zip(x, self._linearisations, strict=True)]
        image: list[Tensor] = []
        for i, x_i in enumerate(x):
            total = sum((self._a[j][i] * v_j for j, v_j in enumerate(v)), torch.zeros_like(x_i))
            image.append(x_i - self._h * total)
        return image


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def gmres(times_matrix: Callable[[Tensor], Tensor], r: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The solution x of A·x = r with a residual of ``tolerance`` times that of x = 0, or as small as it gets.

    Also returns the residual in units of |r| or |A|·|x|, whichever is larger.
    """
    x, residual = torch.zeros_like(r), r
    start = size = float(torch.linalg.vector_norm(r))
    if not math.isfinite(start):
        return torch.full_like(r, math.nan), math.nan
    before, largest = math.inf, 0.0
    for _ in range(_MOST_RESTARTS):
        if not tolerance * start < size < 0.5 * before:
            break
        before = size
        change, norm = _cycle(times_matrix, residual, size, tolerance * start)
        x, largest = x + change, max(largest, norm)
        residual = r - times_matrix(x)
        size = float(torch.linalg.vector_norm(residual))
    unit = max(start, largest * float(torch.linalg.vector_norm(x)))
    return x, size if unit == 0 else size / unit


def _cycle(times_matrix: Callable[[Tensor], Tensor], r: Tensor, size: float, goal: float) -> tuple[Tensor, float]:
    """The best correction in the Krylov space of ``r``, by Arnoldi's method with repeated orthogonalisation.

    Rotations make the coefficients triangular, column by column. Also returns the norm of the matrix in that space.
    """
    basis = r.new_empty(_RESTART + 1, r.numel())
    basis[0] = r / size
    columns: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    e, squares = [size], 0.0
    for j in range(min(_RESTART, r.numel())):
        w, column = times_matrix(basis[j]), [0.0] * (j + 1)
        for _ in range(2):
            products = basis[: j + 1] @ w
            w = w - products @ basis[: j + 1]
            column = [x + p for x, p in zip(column, products.tolist(), strict=True)]
        length = float(torch.linalg.vector_norm(w))
        squares += sum(x * x for x in column) + length * length
        for i, (cos, sin) in enumerate(rotations):
            column[i : i + 2] = cos * column[i] + sin * column[i + 1], cos * column[i + 1] - sin * column[i]
        diagonal = math.hypot(column[j], length)
        rotations.append((column[j] / diagonal, length / diagonal) if diagonal else (1.0, 0.0))
        column[j] = diagonal
        columns.append(column)
        e[j:] = rotations[j][0] * e[j], -rotations[j][1] * e[j]
        if abs(e[-1]) <= goal or length <= 1e-14 * math.sqrt(squares):
            break
        basis[j + 1] = w / length
    weights = _triangular_solution(columns, e)
    return torch.tensor(weights, dtype=r.dtype, device=r.device) @ basis[: len(weights)], math.sqrt(squares)


def _triangular_solution(columns: Sequence[Sequence[float]], e: Sequence[float]) -> list[float]:
    """Solution of R·x = e, with the columns of the upper triangle R; 0 in elements that R does not determine."""
    x = list(e[: len(columns)])
    for j in reversed(range(len(columns))):
        x[j] = x[j] / columns[j][j] if columns[j][j] else 0.0
        for i in range(j):
            x[i] -= columns[j][i] * x[j]
    return x
