"""Verification of compiled programs: they must agree with the step and its transpose of the eager engine.

A program is used only after it has agreed with evaluations of func itself at several states, times and step sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.compiled.backend import copy_of
from aca_ext.engines.compiled.inductor import Program, run_program
from aca_ext.engines.compiled.step_graphs import Layout
from aca_ext.errors import CompileError
from aca_ext.gradients.base import Task
from aca_ext.kernels.fused import TorchOperations
from aca_ext.kernels.reference import squared_error_ratios
from aca_ext.solver.runge_kutta import step, step_vjp
from aca_ext.vector_field.field import AutocastState
from aca_ext.vector_field.replay import Replay

# Allowed differences relative to the largest element: compiled code rounds in another order.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-11}
_ROUNDING_OF_OTHERS = 8.0  # in units of the dtype's spacing
_SAFETY = 100.0  # factor on the effect of rounding the state, if func amplifies rounding


class MismatchError(CompileError):
    """A compiled program whose result differs from that of func."""


@dataclass(frozen=True)
class Point:
    """Stage times, state and step size at which a program is verified."""

    times: list[float]  # of the stages
    y: Tensor
    h: float


@dataclass(frozen=True)
class Trial:
    """A transposed step of the eager engine, to verify a program that is compiled later.

    Attributes:
        cotangents: cotangent of the step's end; for outputs inside the step also the sum of their cotangents and
            their contribution to the cotangent of each slope.
        expected: cotangent of the step's start, and gradients of func's inputs.
        moved: ``expected`` from a state that differs in its last bits.
    """

    point: Point
    inputs: list[Tensor]
    cotangents: list[Tensor]
    expected: list[Tensor]
    moved: list[Tensor]


@dataclass(frozen=True)
class Verification:
    """Comparison of programs with func.

    Attributes:
        task: task whose field evaluates func.
        inputs: tensors on which func depends besides time and state.
        wants_gradient: for each input, True if it requires grad.
    """

    task: Task
    layout: Layout
    inputs: Sequence[Tensor]
    wants_gradient: Sequence[bool]

    def forward(self, slope: Program, whole_step: Program) -> None:
        """Raises CompileError if the first slope or a step of the programs differs from that of func."""
        for point in self._points():
            expected, found = [self._field(point.times[0], point.y)], self._slope(slope, point)
            check_close("slope", expected, found, point, lambda p: [self._field(p.times[0], p.y)])
            check_close("step", self._step(point), self._compiled_step(whole_step, point), point, self._step)

    def trials(self, *, inside: bool) -> list[Trial]:
        """Transposed steps of func in its present state."""
        found: list[Trial] = []
        for point in self._points():
            cotangents = self._cotangents(point, inside)
            expected, moved = (self._transposed(p, cotangents) for p in (point, _moved(point)))
            found.append(Trial(point, [copy_of(x) for x in self.inputs], cotangents, expected, moved))
        return found

    def _points(self) -> Iterator[Point]:
        problem, y0 = self.task.problem, self.layout.like.detach()
        t0, t1 = problem.times[0], problem.times[-1]
        random = torch.Generator(device="cpu").manual_seed(0)
        size = float(y0.square().mean().sqrt()) if y0.numel() else 0.0
        noise = torch.empty_like(y0).copy_(torch.randn(y0.shape, generator=random, dtype=y0.dtype, device="cpu"))
        for t, distance in ((t0, 0.0), (t0 + 0.37 * (t1 - t0), 0.1), (t0 + 0.1 * (t1 - t0), 0.001)):
            y = y0 + distance * (size or 1.0) * noise
            try:
                k = self._field(t, y)
            except CompileError:
                raise
            except Exception:
                if distance == 0:
                    raise
                continue  # func may be undefined at other states
            if not torch.isfinite(k).all():
                continue
            slope = float(k.abs().max()) if k.numel() else 0.0
            h = min(0.1 * abs(t1 - t0), 0.1 * (size or 1.0) / slope if slope else math.inf)
            h = math.copysign(h, t1 - t0)
            yield Point([t + c * h for c in self.layout.scheme.c], y, h)
            if distance == 0.1:
                return  # two points are enough

    def _field(self, t: float | Tensor, y: Tensor) -> Tensor:
        """Evaluates func as in the trace: with a time and a state that require grad."""
        time = torch.as_tensor(t, dtype=y.dtype, device="cpu").detach().requires_grad_()
        with torch.enable_grad():
            return self.task.field(time, y.detach().requires_grad_()).detach()

    def _slope(self, program: Program, p: Point) -> list[Tensor]:
        k = torch.empty_like(p.y)
        run_program(program, [_scalars(p), p.y, k, *self.inputs])
        return [k]

    def _step(self, p: Point) -> list[Tensor]:
        layout, scheme, y = self.layout, self.layout.scheme, p.y
        with torch.no_grad():
            ops = TorchOperations(layout.like, layout.tolerance)
            trial = step(self._field, ops, scheme, p.times, y, p.h)
            results = [trial.y1, *trial.k[1:]]
            if trial.partial_error is None:
                return results
            k_last = trial.k[-1] if scheme.error_last != 0 else None
            rtol, atol = layout.tolerance_tensors or (1.0, 1.0)
            segments, w = layout.tolerance.segments, scheme.error_last * p.h
            sums = squared_error_ratios(trial.partial_error, k_last, w, y, trial.y1, rtol, atol, segments)
            return [*results, self._error(sums, trial.k, p.h)]

    def _error(self, sums: Tensor, k: Sequence[Tensor], h: float) -> Tensor:
        """Norm of the error estimate plus a multiple of the slopes, since the estimate alone may be pure rounding."""
        largest = max((float(x.abs().max()) for x in k if x.numel()), default=0.0)
        return (sums / max(1, k[0].numel())).sqrt() + abs(h) * largest

    def _compiled_step(self, program: Program, p: Point) -> list[Tensor]:
        layout, y = self.layout, p.y
        k = [torch.empty_like(y) for _ in range(layout.stages)]
        y1, sums = torch.empty_like(y), torch.zeros(len(layout.tolerance.sizes), dtype=torch.float64, device="cpu")
        k[0].copy_(self._field(p.times[0], y))
        run_program(program, [_scalars(p), y, k[0], y1, sums, *k[1:], *layout.tolerance_tensors, *self.inputs])
        return [y1, *k[1:], *([] if layout.scheme.error is None else [self._error(sums, k, p.h)])]

    def _cotangents(self, p: Point, inside: bool) -> list[Tensor]:
        """Random cotangents, as in ``Trial.cotangents``."""
        random = torch.Generator(device="cpu").manual_seed(1)
        count = 2 + self.layout.stages if inside else 1
        like = p.y
        return [
            torch.empty_like(like).copy_(torch.randn(like.shape, generator=random, dtype=like.dtype, device="cpu"))
            for _ in range(count)
        ]

    def _transposed(self, p: Point, cotangents: Sequence[Tensor]) -> list[Tensor]:
        layout, field = self.layout, self.task.field
        of_params, of_args = inputs_by_kind(field.args, self.inputs)
        params = [self.inputs[i] for i in of_params]
        args = [x for x, _ in of_args]
        replay = Replay(field, params, args, AutocastState("cpu"))
        g, *inside = cotangents
        ops = TorchOperations(layout.like, layout.tolerance)
        with replay.repeating():
            g_y = step_vjp(
                _Traced(replay), ops, layout.scheme, p.times, p.y, p.h, [(layout.scheme.solution, g)],
                inside=(inside[0], inside[1:]) if inside else None,
            )  # fmt: skip
        grads = sums_by_input(of_params, of_args, replay.grads)
        wanted = [i for i, w in enumerate(self.wants_gradient) if w]
        return [g_y, *(grads[i].detach() if i in grads else torch.zeros_like(self.inputs[i]) for i in wanted)]


def check_transpose(program: Program, layout: Layout, wants_gradient: Sequence[bool], trials: Sequence[Trial]) -> None:
    """Raises CompileError if the gradients of the program differ from those of the trials."""
    for trial in trials:
        y, (g, *inside) = trial.point.y, trial.cotangents
        g_y = torch.empty_like(y)
        grads = [torch.zeros_like(x) for x, w in zip(trial.inputs, wants_gradient, strict=True) if w]
        run_program(program, [_scalars(trial.point), y, g, g_y, *inside, *grads, *trial.inputs])
        check_close("gradient", trial.expected, [g_y, *grads], trial.point, partial(_moved_results, trial))


def _moved_results(trial: Trial, _: Point) -> Sequence[Tensor]:
    return trial.moved


def _scalars(p: Point) -> Tensor:
    return torch.tensor([*p.times, p.h, 1.0, 1.0], dtype=p.y.dtype, device="cpu")


def _moved(p: Point) -> Point:
    """The point with a state that differs in its last bits."""
    signs = torch.where(torch.arange(p.y.numel(), device="cpu") % 2 == 0, 1.0, -1.0).to(p.y.dtype)
    y = p.y * (1 + 2 * torch.finfo(p.y.dtype).eps * signs.reshape(p.y.shape))
    return Point(p.times, torch.empty_like(p.y).copy_(y), p.h)


def check_close(
    what: str,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    point: Point,
    evaluate: Callable[[Point], Sequence[Tensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """Raises MismatchError if the results differ by more than rounding in func explains.

    ``dtype`` is that of func's coarsest arithmetic, by default that of the state. Gradients of coarser inputs are
    rounded to their dtype.
    """
    rounding = _rounding_of(dtype or point.y.dtype)
    if not all(torch.isfinite(x).all() for x in expected):
        return
    sizes = [_largest(x) for x in expected]
    # A gradient that is zero up to rounding is measured relative to the largest one.
    floors = [max(size, 0.01 * max(sizes)) for size in sizes]
    allowed = [max(rounding, _rounding_of(x.dtype)) * floor for x, floor in zip(expected, floors, strict=True)]
    if _are_close(found, expected, allowed):
        return
    # func may amplify rounding: measure the effect of a state that differs in its last bits.
    effects = [_largest(x - y) for x, y in zip(expected, evaluate(_moved(point)), strict=True)]
    if not _are_close(found, expected, [a + _SAFETY * e for a, e in zip(allowed, effects, strict=True)]):
        raise MismatchError(
            f"the {what} that torch's compiler made of func differs from that of func. Either func returns different "
            'values for the same time and state, or the compiler translates it wrongly. Use engine="eager".'
        )


def _rounding_of(dtype: torch.dtype) -> float:
    return _ROUNDING.get(dtype, _ROUNDING_OF_OTHERS * torch.finfo(dtype).eps)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


class _Traced:
    """A replay whose times require grad, as in the trace."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self.pull_back, self.fastest = replay.pull_back, self

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self._replay(t.detach().requires_grad_(), y)


def inputs_by_kind(args: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[list[int], list[tuple[Tensor, int | None]]]:
    """Indices of inputs that require grad and are not args; args that require grad, with their indices or None."""
    index = {id(x): i for i, x in enumerate(inputs)}
    of_args = [(x, index.get(id(x))) for x in args if isinstance(x, Tensor) and x.requires_grad]
    taken = {i for _, i in of_args}
    return [i for i, x in enumerate(inputs) if x.requires_grad and i not in taken], of_args


def sums_by_input(
    of_params: Sequence[int], of_args: Sequence[tuple[Tensor, int | None]], grads: Sequence[Tensor | None]
) -> dict[int, Tensor]:
    """Gradients by index of input, from those of ``inputs_by_kind``; a tensor given as several args has one of each."""
    found: dict[int, Tensor] = {}
    for i, grad in zip([*of_params, *(i for _, i in of_args)], grads, strict=True):
        if i is not None and grad is not None:
            found[i] = found[i] + grad if i in found else grad
    return found


def _are_close(found: Sequence[Tensor], expected: Sequence[Tensor], allowed: Sequence[float]) -> bool:
    # <= is False for NaN, so a NaN in ``found`` is a mismatch.
    return all(
        bool(((x - y).abs() <= tolerance).all()) for x, y, tolerance in zip(found, expected, allowed, strict=True)
    )
