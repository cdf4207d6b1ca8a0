"""Cached programs of a func (``Plan``), and data shared by solves that use them (``Specification``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from aca_ext.engines.compiled.backend import Captured
from aca_ext.engines.compiled.composed_steps import ComposedSteps
from aca_ext.engines.compiled.fingerprint import fingerprint
from aca_ext.engines.compiled.inductor import Program, Recipe, compile_programs, forget_programs
from aca_ext.engines.compiled.step_graphs import Layout, WholeSteps
from aca_ext.engines.compiled.undisturbed import unchanged, undisturbed
from aca_ext.engines.compiled.verification import MismatchError, Trial, Verification, check_transpose
from aca_ext.errors import AcaError, CompileError
from aca_ext.gradients.base import Task
from aca_ext.kernels.fused import KernelOperations, operations_for
from aca_ext.problem.problem import Problem
from aca_ext.solver.runge_kutta import scheme_of
from aca_ext.solver.stats import Stats

_TRANSPOSE = {False: "end only", True: "inside"}  # names of the transposed steps, by whether outputs lie inside them


_LARGEST_COMPOSED = 1 << 15  # elements


class Steps(Protocol):
    """A way of compiling a step."""

    def slope(self) -> Recipe: ...

    def step(self) -> Recipe: ...

    def transpose(self, *, inside: bool) -> Recipe: ...


class Run(Protocol):
    """The solve that needs programs; ``used`` are the tensors on which func depends besides time and state."""

    problem: Problem
    stats: Stats
    used: list[Tensor]
    task: Callable[[], Task]
    wants_backward: bool


class Plan:
    """Programs for one traced graph of func and one layout, compiled and verified at their first use."""

    def __init__(self, captured: Captured, layout: Layout) -> None:
        self._captured, self._layout = captured, layout
        self._programs: dict[str, list[Program]] = {}
        self._unverified: dict[str, list[Program]] = {}
        self._known_by: list[tuple[str, ...]] = []  # names on disk of the programs
        self._trials: dict[bool, list[Trial]] | None = None

    def forward(self, run: Run) -> tuple[Program, Program]:
        """The programs of the first slope and of a step."""

        def check(programs: list[Program]) -> None:
            with unchanged(run.problem.func, run.problem.args):
                self._verification(run).forward(*programs)

        if run.wants_backward and "forward" not in self._programs:
            self._compile_with_backward(run)
        slope, step = self._compiled("forward", run.stats, _forward, check)
        return slope, step

    def _compile_with_backward(self, run: Run) -> None:
        """Compiles a step and its transposes together, since the compiler reads torch's headers once for all."""
        start, problem = time.perf_counter(), run.problem
        kinds = (False, True) if problem.adaptive and len(problem.times) > 2 else (False,)

        def recipes(steps: Steps) -> list[Recipe]:
            return [*_forward(steps), *(steps.transpose(inside=inside) for inside in kinds)]

        try:
            slope, step, *transposed = self._compile(f"forward, {len(kinds)} transposes", recipes)
        except CompileError:
            return  # alone, the step may compile, or say why not
        finally:
            run.stats.compile_seconds += time.perf_counter() - start
        self._unverified = {"forward": [slope, step]}
        self._unverified.update({_TRANSPOSE[inside]: [one] for inside, one in zip(kinds, transposed, strict=True)})

    def expect_gradients(self, run: Run) -> None:
        """Computes gradients of func to verify the transposed programs; by the backward pass func may have changed."""
        if self._trials is None:
            with torch.no_grad(), unchanged(run.problem.func, run.problem.args):
                verification = self._verification(run)
                self._trials = {inside: verification.trials(inside=inside) for inside in (False, True)}

    def transpose(self, stats: Stats, *, inside: bool) -> Program:
        """The program of a transposed step, with or without outputs inside it."""

        def check(programs: list[Program]) -> None:
            assert self._trials is not None
            check_transpose(programs[0], self._layout, self._captured.wants_gradient, self._trials[inside])
            self._trials[inside] = []

        return self._compiled(_TRANSPOSE[inside], stats, lambda steps: [steps.transpose(inside=inside)], check)[0]

    def _verification(self, run: Run) -> Verification:
        return Verification(run.task(), self._layout, run.used, self._captured.wants_gradient)

    def _compiled(
        self,
        name: str,
        stats: Stats,
        recipes: Callable[[Steps], list[Recipe]],
        check: Callable[[list[Program]], None],
    ) -> list[Program]:
        if name not in self._programs:
            start = time.perf_counter()
            programs = self._unverified.pop(name, None) or self._compile(name, recipes)
            try:
                check(programs)
            except MismatchError:
                for known_by in self._known_by:
                    forget_programs(known_by)
                raise
            self._programs[name] = programs
            stats.compile_seconds += time.perf_counter() - start
        return self._programs[name]

    def _compile(self, name: str, recipes: Callable[[Steps], list[Recipe]]) -> list[Program]:
        found = fingerprint(self._captured, self._layout)
        known_by = None if found is None else (name, *found)
        if known_by is not None:
            self._known_by.append(known_by)
        *others, last = ways_of_compiling(self._captured, self._layout)
        for steps in others:
            try:
                return _compiled_by(steps, known_by, recipes)
            except CompileError:
                pass
        return _compiled_by(last, known_by, recipes)


def ways_of_compiling(captured: Captured, layout: Layout) -> list[Steps]:
    """The ways of compiling a step, best one first.

    In large states, one graph of all stages pays, since its kernels read them less often.
    """
    whole, composed = WholeSteps(captured, layout), ComposedSteps(captured, layout)
    return [composed, whole] if layout.like.numel() <= _LARGEST_COMPOSED else [whole]


def _forward(steps: Steps) -> list[Recipe]:
    return [steps.slope(), steps.step()]


def _compiled_by(
    steps: Steps, known_by: tuple[str, ...] | None, recipes: Callable[[Steps], list[Recipe]]
) -> list[Program]:
    try:
        with undisturbed():
            return compile_programs(known_by, lambda: recipes(steps))
    except AcaError:
        raise
    except Exception as error:
        raise CompileError(
            f'torch\'s compiler failed on func. Use engine="eager". Its error: {type(error).__name__}: {error}'
        ) from error


class Specification:
    """Times, tolerances, step control and memory sizes, shared by repeated solves with the same settings."""

    def __init__(self, run: Run, plan: Plan) -> None:
        problem = run.problem
        self.plan, y0 = plan, problem.y0.detach()
        ops = operations_for(y0, problem.tolerance)
        assert isinstance(ops, KernelOperations)
        self._ops = ops  # keeps tensors of tolerances alive, whose addresses the loop has
        self.loop = ops.compiled_specification(problem, *plan.forward(run))
        self.forward_bytes = self.loop.forward_bytes
        self.rows_shape, self.rows_stride = (len(problem.times), *y0.shape), (y0.numel(), *y0.stride())
        # The backward pass evaluates each step up to the last stage that an output needs.
        solution = scheme_of(problem.tableau, problem.adaptive).solution
        self._evals = 1 + max(i for i, w in enumerate(solution) if w != 0), len(solution)
        self._backward: dict[tuple[bool, bool], tuple[Program | None, Program | None, int]] = {}

    def backward(self, stats: Stats, n_end_only: int, n_inside: int) -> tuple[Program | None, Program | None, int]:
        """Programs for steps without and with outputs inside (None for no such step), and the bytes of their memory."""
        key = n_end_only > 0, n_inside > 0
        if key not in self._backward:
            end_only = self.plan.transpose(stats, inside=False) if key[0] else None
            inside = self.plan.transpose(stats, inside=True) if key[1] else None
            self._backward[key] = end_only, inside, self.loop.backward_bytes(end_only, inside)
        stats.n_f_evals_backward = n_end_only * self._evals[0] + n_inside * self._evals[1]
        return self._backward[key]
