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

from aca_ext.kernels.reference import Number
from aca_ext.solver.implicit.systems import Rows, StageSystem, System, outside_inference, recording
from aca_ext.vector_field.slope_function import SlopeFunction

_RESTART, _MOST_RESTARTS = 40, 25


class Linearisation:
    """Products of a vector with the Jacobian in a graph of ``k`` = f(t, y), and with its transpose."""

    def __init__(self, y: Tensor, k: Tensor) -> None:
        self._y, self._k = y, k
        self._cotangent: Tensor | None = None
        self._pulled: Tensor | None = None

    def transposed_product(self, v: Tensor) -> Tensor:
        if not self._k.requires_grad:
            return torch.zeros_like(v)
        return _pull_back(self._k, self._y, v)

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
        return _pull_back(self._pulled, self._cotangent, v)


def _pull_back(k: Tensor, y: Tensor, v: Tensor) -> Tensor:
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(k, y, v, **how)[0].detach()


class Krylov:
    """The Jacobian by its products alone."""

    is_exact = True

    def __init__(self, f: SlopeFunction) -> None:
        self._f = f

    def at(self, t: Tensor, y: Tensor) -> Linearisation:
        with recording():
            leaf = outside_inference(y.detach()).requires_grad_()
            return Linearisation(leaf, self._f(outside_inference(t), leaf))

    def of_graph(self, t: Tensor, y: Tensor, k: Tensor) -> Linearisation:
        return Linearisation(y, k)

    def system(self, linearisations: Sequence[Linearisation], a: Rows, h: Number) -> System:
        return _KrylovSystem(linearisations, a, h)

    def norm(self, linearisation: Linearisation, scale: Tensor) -> float:
        return math.inf


class _KrylovSystem(StageSystem):
    def __init__(self, linearisations: Sequence[Linearisation], a: Rows, h: Number) -> None:
        super().__init__(a, h)
        self._linearisations = linearisations

    def solve(self, r: Sequence[Tensor], transposed: bool = False) -> list[Tensor]:
        like, stages = r[0], len(r)

        def times_matrix(x: Tensor) -> Tensor:
            parts = [part.view_as(like) for part in x.view(stages, -1)]
            image = self._transposed(parts) if transposed else self._image(parts)
            return torch.cat([part.reshape(-1) for part in image])

        found = gmres(times_matrix, torch.cat([x.reshape(-1) for x in r]), 4 * torch.finfo(like.dtype).eps)
        return [part.view_as(like) for part in found.view(stages, -1)]

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


def gmres(times_matrix: Callable[[Tensor], Tensor], r: Tensor, tolerance: float) -> Tensor:
    """The solution x of A·x = r with a residual of ``tolerance`` times that of x = 0, or as small as it gets."""
    x, residual = torch.zeros_like(r), r
    goal = tolerance * float(torch.linalg.vector_norm(r))
    before = float("inf")
    for _ in range(_MOST_RESTARTS):
        size = float(torch.linalg.vector_norm(residual))
        if not goal < size < 0.5 * before:
            break
        before = size
        x = x + _cycle(times_matrix, residual, size, goal)
        residual = r - times_matrix(x)
    return x


def _cycle(times_matrix: Callable[[Tensor], Tensor], r: Tensor, size: float, goal: float) -> Tensor:
    """The best correction in the Krylov space of ``r``, by Arnoldi's method with repeated orthogonalisation."""
    basis = r.new_empty(_RESTART + 1, r.numel())
    basis[0] = r / size
    h = torch.zeros(_RESTART + 1, _RESTART, dtype=torch.float64, device="cpu")
    e = torch.zeros(_RESTART + 1, 1, dtype=torch.float64, device="cpu")
    e[0] = size
    for j in range(min(_RESTART, r.numel())):
        w = times_matrix(basis[j])
        for _ in range(2):
            products = basis[: j + 1] @ w
            w = w - products @ basis[: j + 1]
            h[: j + 1, j] += products.to(h)
        length = torch.linalg.vector_norm(w)
        h[j + 1, j] = float(length)
        weights = torch.linalg.lstsq(h[: j + 2, : j + 1], e[: j + 2]).solution
        left = float(torch.linalg.vector_norm(h[: j + 2, : j + 1] @ weights - e[: j + 2]))
        if left <= goal or float(length) <= 1e-14 * float(h.abs().max()):
            break
        basis[j + 1] = w / length
    return weights[:, 0].to(r) @ basis[: j + 1]
