"""A func compiled for lanes, checked against func itself before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.undisturbed import unchanged, undisturbed
from aca_ext.engines.compiled.verification import inputs_by_kind, sums_by_input
from aca_ext.engines.ensemble.library import Library
from aca_ext.engines.ensemble.source import source_of
from aca_ext.engines.ensemble.thread_library import ThreadLibrary
from aca_ext.engines.ensemble.tracing import trace
from aca_ext.errors import AcaError, CompileError
from aca_ext.gradients.base import Task
from aca_ext.problem.batch import BatchProblem
from aca_ext.vector_field.field import AutocastState
from aca_ext.vector_field.replay import Replay

# Relative to the largest element: what rounding may do in code that is arranged differently.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-11}
_SAFETY = 100.0  # by how much compiled code may exceed the effect of rounding the state


class Plan:
    """The library for a graph of func, a method, and a layout of the state.

    Attributes:
        gather: of func's inputs, returns what belongs to each sample, (batch, p), and what is shared, (w,).
    """

    def __init__(self, captured: Captured, problem: BatchProblem, t: Tensor) -> None:
        y0 = problem.y0.detach()
        try:
            with undisturbed():
                traced = trace(captured, t, y0, problem.packing)
        except AcaError:
            raise
        except Exception as error:
            raise CompileError(
                f'func cannot be traced for one sample. Use engine="eager". The cause: {type(error).__name__}: {error}'
            ) from error
        self.gather = traced.gather
        n_learnt = traced.lane.inputs.n_shared if traced.is_learnt[1] else 0
        lanes = lanes_of(y0.device)
        source = source_of(traced, problem.tableau, problem.tolerance.segments, y0.dtype, lanes)
        self.library: Library | ThreadLibrary = (
            Library(source, n_learnt) if lanes == "vectors" else ThreadLibrary(source, n_learnt, y0.device)
        )
        self._is_checked = {False: False, True: False}

    def check(self, task_of: Callable[[], Task], inputs: Sequence[Tensor], with_gradient: bool) -> None:
        """Raises CompileError where the library's func, or its gradient, is not that of func."""
        if self._is_checked[with_gradient]:
            return
        task = task_of()
        with unchanged(task.problem.func, task.problem.args):
            for distance in (0.0, 0.1):
                self._check_at(task, inputs, distance, with_gradient)
        self._is_checked[with_gradient] = True

    def _check_at(self, task: Task, inputs: Sequence[Tensor], distance: float, with_gradient: bool) -> None:
        """Compares at the start, or at a distance from it, relative to the size of the state."""
        problem = task.problem
        assert isinstance(problem, BatchProblem)
        random = torch.Generator(device="cpu").manual_seed(0)
        y0 = _finite(problem.y0.detach())
        noise, g = (
            torch.randn(y0.shape, generator=random, dtype=y0.dtype, device="cpu").to(y0.device) for _ in range(2)
        )
        size = float(y0.square().mean().sqrt()) if y0.numel() else 0.0
        y = y0 + distance * (size or 1.0) * noise
        t = problem.start_time(y0) + distance * problem.length
        try:
            expected = _of_func(task, t, y, g, inputs, with_gradient)
        except AcaError:
            raise
        except Exception:
            if distance == 0:
                raise
            return  # func need not take any state
        found = self._of_library(t, y, g, inputs, with_gradient)
        moved = _of_func(task, t, y * (1 + torch.finfo(y.dtype).eps), g, inputs, with_gradient)
        for x, of_func, other in zip(found, expected, moved, strict=True):
            allowed = _ROUNDING[y.dtype] * _largest(of_func) + _SAFETY * _largest(of_func - other)
            is_close = ((x - of_func).abs() <= allowed) | (x == of_func) | (~x.isfinite() & ~of_func.isfinite())
            if not bool(is_close.all()):
                raise CompileError(
                    "the code made of func does not compute what func does. Either func does not return the same for "
                    'the same time and state, or it is mistaken for something else. Use engine="eager".'
                )

    def _of_library(
        self, t: Tensor, y: Tensor, g: Tensor, inputs: Sequence[Tensor], with_gradient: bool
    ) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() if x.requires_grad else x for x in inputs]
            p, w = self.gather(leaves)
        rows = y.reshape(len(y), -1).contiguous()
        operands = (t.reshape(-1).contiguous(), rows, p.detach(), w.detach(), g.reshape(rows.shape).contiguous())
        k, gy, gp, gw = self.library.evaluate(*operands)
        if not with_gradient:
            return [k.view(y.shape)]
        pairs = [(p, gp), (w, gw.to(y.dtype))]
        wanted = [x for x in leaves if x.requires_grad]
        outputs = [(x, grad) for x, grad in pairs if x.requires_grad]
        grads: Sequence[Any] = [None] * len(wanted)
        if outputs and wanted:
            grads = torch.autograd.grad([x for x, _ in outputs], wanted, [x for _, x in outputs], allow_unused=True)
        return [k.view(y.shape), gy.view(y.shape), *_filled(grads, wanted)]


def lanes_of(device: torch.device) -> str:
    """The lanes of a device: vectors of numbers, or on a GPU threads."""
    return "threads" if device.type == "cuda" else "vectors"


def _of_func(
    task: Task, t: Tensor, y: Tensor, g: Tensor, inputs: Sequence[Tensor], with_gradient: bool
) -> list[Tensor]:
    """func's slope, and where asked for the cotangents of y and of its inputs that require grad.

    They end at the inputs: the history and the hooks of these belong to the graph outside of the solve.
    """
    t, y = t.detach().requires_grad_(), y.detach().requires_grad_()
    if not with_gradient:
        with torch.enable_grad():
            return [task.field(t, y).detach()]
    of_params, of_args = inputs_by_kind(task.field.args, inputs)
    params, args = [inputs[i] for i in of_params], [x for x, _ in of_args]
    replay = Replay(task.field, params, args, AutocastState(y.device.type))
    with replay.repeating():
        k = replay(t, y)
        g_y = replay.pull_back(y, k, g) if k.requires_grad else None
    grads = sums_by_input(of_params, of_args, replay.grads)
    wanted = [(grads.get(i), x) for i, x in enumerate(inputs) if x.requires_grad]
    return [k.detach(), *_filled([g_y, *(grad for grad, _ in wanted)], [y, *(x for _, x in wanted)])]


def _finite(y: Tensor) -> Tensor:
    """``y`` with a finite row in place of those that are not: sums over samples that are NaN would show no mistake."""
    is_finite = y.isfinite().reshape(len(y), -1).all(1)
    if bool(is_finite.all()) or not bool(is_finite.any()):
        return y
    return torch.where(is_finite.view(-1, *(1,) * (y.dim() - 1)), y, y[is_finite][0])


def _filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients as dense tensors, zeros in place of None."""
    return [torch.zeros_like(x) if grad is None else grad.to_dense() for grad, x in zip(grads, like, strict=True)]


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
