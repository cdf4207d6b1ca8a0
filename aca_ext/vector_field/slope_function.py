"""Interfaces of the vector field that a Runge-Kutta step calls: f alone, and f with its transpose."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SlopeFunction(Protocol):
    """f with its checks: a time as 0-d tensor and a packed state to a packed slope."""

    def __call__(self, t: Tensor, y: Tensor) -> Tensor: ...


class ReplayFunction(SlopeFunction, Protocol):
    """f for the transpose: its slopes have graphs, and it pulls a cotangent back through one."""

    @property
    def fastest(self) -> SlopeFunction: ...

    def pull_back(self, y: Tensor, k: Tensor, grad_k: Tensor) -> Tensor | None: ...
