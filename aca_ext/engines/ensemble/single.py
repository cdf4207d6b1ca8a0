"""A single problem with an implicit method in a compiled lane: a batch of one sample that func sees without a batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from aca_ext.engines.base import Request
from aca_ext.engines.compiled.repeated import CHANGED_FUNC, gradients_with_graph
from aca_ext.engines.ensemble.library import Keep
from aca_ext.engines.ensemble.run import Run
from aca_ext.errors import CompileError, ReplayError, SolveError
from aca_ext.gradients.base import Result, Task
from aca_ext.gradients.passes import Gradients, with_graph
from aca_ext.problem.batch import BatchProblem, RowPacking
from aca_ext.problem.problem import Problem, Settings
from aca_ext.problem.state import Packing, State, as_real
from aca_ext.problem.stops import Stops
from aca_ext.solver.checkpoints import AcceptedStep, StepRecord
from aca_ext.solver.failures import failure_of
from aca_ext.solver.stats import Stats
from aca_ext.solver.step_plan import outputs_by_step


def solve(problem: Problem, params: Sequence[Tensor] | None, task: Callable[[], Task]) -> Result:
    """Solves ``problem`` with gradient="aca" on a compiled lane; ``task`` makes a task for second derivatives.

    Raises:
        CompileError: func cannot be compiled, or this kind of solve is not supported.
        SolveError: the solve did not reach its end.
    """
    if len(problem.times) == 1 or problem.y0.numel() == 0:  # nothing to solve
        ys = torch.stack([problem.y0] * len(problem.times))
        return Result(ys, StepRecord(), Stats(backend="compiled"))
    run = _SingleRun(problem, params, task)
    ys = run.outputs()
    return Result(ys, run, run.counts)


class SinglePacking(RowPacking):
    """Conversion between a user's state without a batch dimension and a tensor with one row."""

    @property
    def n_rows(self) -> int:
        return 1

    _size = staticmethod(Packing._size)

    @property
    def is_trivial(self) -> bool:
        return False

    @property
    def time_shape(self) -> tuple[int, ...]:
        return ()

    def pack(self, y: State) -> Tensor:
        return super().pack(y) if self.is_tuple else as_real(y).unsqueeze(0)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return Packing.join(self, parts).unsqueeze(0)

    def unpack(self, y: Tensor) -> State:
        return Packing.unpack(self, y[0])

    def unpack_rows(self, ys: Tensor) -> State:
        return Packing.unpack_rows(self, ys[:, 0])


class _SingleRun(Run):
    """One solve: its only sample, and its counts.

    Attributes:
        counts: ``stats`` of the only sample.
    """

    def __init__(self, problem: Problem, params: Sequence[Tensor] | None, task: Callable[[], Task]) -> None:
        self._single, self._task_of_single = problem, task
        self.counts = Stats(backend="compiled")
        batch = _batch_of(problem)
        super().__init__(batch, params, Request(batch, params=params).task, 0)
        self.counts.compile_seconds = self.stats.compile_seconds

    def _gathered(self, used: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # The history and the hooks of func's inputs belong to the graph outside of the solve.
        cut = [x.detach().requires_grad_() if x.requires_grad else x for x in used]
        self._leaves = [x for x in cut if x.requires_grad]
        return super()._gathered(cut)

    def outputs(self) -> Tensor:
        """The states at the requested times, with an autograd graph to y0 and what func depends on."""
        y0 = self._single.y0
        self._learnt = [x for x in self._used if x.requires_grad]
        if not (torch.is_grad_enabled() and (self._learnt or y0.requires_grad)):
            return self.forward(Keep.NOTHING, None).squeeze(1)
        ys = self.forward(Keep.STATES, None).squeeze(1)
        return with_graph(ys, self, [self.states()], y0, self._learnt)

    def _count(self) -> Any:
        failures, counts = super()._count(), self.counts
        counts.n_steps, counts.n_accepted = self._counted[0, :2].tolist()
        counts.n_rejected = counts.n_steps - counts.n_accepted
        for name in ("n_f_evals", "n_jacobians", "n_factorizations", "n_newton_iterations"):
            setattr(counts, name, getattr(self.stats, name))
        return failures

    def _failure(self, row: int, others: int) -> SolveError:
        kind, message, numbers = self._fault(row)
        return failure_of(self._single, kind, message, **numbers)

    def bounds(self) -> Tensor:  # type: ignore[override]
        return super().bounds()[0]

    def gradients(self, grad_ys: Tensor, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradients:
        grad_y0, *grads = self.backward(grad_ys.unsqueeze(1), self.p.detach(), self.w.detach())
        self.counts.n_f_evals_backward = self.stats.n_f_evals_backward
        found: Sequence[Tensor | None] = [None] * len(inputs)
        pairs = [(x, g) for x, g in zip((self.p, self.w), grads, strict=True) if x.requires_grad]
        if pairs:
            read, of_read = zip(*pairs, strict=True)
            found = torch.autograd.grad(read, self._leaves, of_read, retain_graph=True, allow_unused=True)
        return [grad_y0[0], *found]

    def differentiable_gradients(
        self, grad_ys: Tensor, y0: Tensor | None, states: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Gradients:
        """Computes the gradients by the eager engine, over the same accepted steps."""
        self._check_func()
        record = StepRecord(self._steps_with_outputs())
        held = {0: self.y0[0], len(record.steps): self._ends[0]}
        task = self._task_of_single()
        return gradients_with_graph(task, record, self.counts, self._learnt, grad_ys, y0, held, inputs)

    def _steps_with_outputs(self) -> list[AcceptedStep]:
        steps = [(t, t_next - t, t_next) for t, t_next in self.bounds().tolist()]
        due = outputs_by_step(steps, self._single.times)
        return [AcceptedStep(*step, outputs) for step, outputs in zip(steps, due, strict=True)]

    def _check_func(self) -> None:
        """Raises ReplayError if func, or a number that it reads, has changed since the forward pass."""
        try:
            plan, used, _ = self._find()
        except CompileError:
            raise ReplayError(CHANGED_FUNC) from None
        with torch.no_grad():
            is_same = plan is self._plan and all(map(torch.equal, plan.gather(used), (self.p, self.w)))
        if not is_same:
            raise ReplayError(CHANGED_FUNC)


def _batch_of(problem: Problem) -> BatchProblem:
    """The problem as a batch of one sample."""
    kept = _kept.get(problem.settings)
    if kept is None or kept.times is not problem.times:
        kept = _kept[problem.settings] = _new_batch(problem)
    return kept.of(problem.func, problem.args, problem.y0.unsqueeze(0))


# Without func, args and y0.
_kept: weakref.WeakKeyDictionary[Settings, BatchProblem] = weakref.WeakKeyDictionary()


def _new_batch(problem: Problem) -> BatchProblem:
    packing, stops = problem.packing, problem.stops
    given = {field.name: getattr(problem, field.name) for field in fields(Problem)}
    given |= {"func": _nothing, "args": (), "y0": torch.empty(0, device="cpu"), "settings": Settings()}
    given["packing"] = SinglePacking(
        packing.shapes, packing.is_tuple, packing.is_complex, packing.kind, packing.tree, packing.paths
    )
    of_rows = np.array([problem.times])
    ends = np.array([[*stops, problem.times[-1]]])
    is_jump = np.array([[t in problem.jumps for t in stops] + [False]])
    return BatchProblem(**given, times_of_rows=of_rows, stops_of_rows=Stops(ends, is_jump) if stops else None)


def _nothing(*_: Any) -> NoReturn:
    raise AssertionError("func of a cached problem was called; replace it with Problem.of")
