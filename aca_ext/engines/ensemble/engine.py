"""engine="compiled": independent samples, and implicit methods, in SIMD lanes; other solves as ``CompiledEngine`` does.

This file is imported with the package; run.py, which brings in torch's compiler, with the first solve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from aca_ext.engines.base import Request
from aca_ext.engines.compiled.engine import (
    AUTOCAST,
    CompiledEngine,
    by_programs,
    obstacle_to_compiling,
    obstacle_to_programs,
    programs_of_common_steps,
    solve_by,
)
from aca_ext.errors import CompileError
from aca_ext.gradients.base import Result
from aca_ext.numerics.implicit import ImplicitTableau
from aca_ext.numerics.tableau import Tableau
from aca_ext.problem.problem import Problem
from aca_ext.progress import samples_bar

_MOST_COMPONENTS = 32  # of a sample whose linear systems lanes solve: their time grows with the cube


class EnsembleEngine(CompiledEngine):
    """Engine of compiled code.

    Args:
        takes_gpu: independent samples on a GPU are solved in threads there. This is experimental: it has not run on
            one.
    """

    def __init__(self, takes_gpu: bool = False) -> None:
        self._takes_gpu = takes_gpu

    def obstacle(self, request: Request) -> str | None:
        problem = request.problem
        takes_implicit = problem.y0.is_cpu and is_for_lanes(problem)
        return obstacle_to_compiling(problem, self._takes_gpu and request.is_batch, takes_implicit)

    def solve(self, request: Request) -> Result:
        """The solve by compiled lanes or programs if they can hold it, else by compiled evaluations of func.

        Raises:
            CompileError: no engine can solve with this func.
            NotInstalledError: a progress bar is asked for, and tqdm is missing.
        """
        if not _takes_lanes(request):
            return super().solve(request)
        if is_on_gpu(request.problem):
            return _solve_on_gpu(request)
        return solve_by(lambda: _lanes(request), request, _obstacle_to_lanes(request))


def solve_as_before(request: Request) -> Result:
    """``EnsembleEngine.solve`` for settings with which compiled code has solved, so that they are no obstacle to it."""
    programs = (lambda: _lanes(request)) if _takes_lanes(request) else programs_of_common_steps
    return solve_by(programs, request, AUTOCAST if torch.is_autocast_enabled("cpu") else None)


def _takes_lanes(request: Request) -> bool:
    return request.is_batch or request.problem.newton is not None


def is_for_lanes(problem: Problem) -> bool:
    """Tells whether lanes have the method of a problem, which may be implicit."""
    tableau = problem.tableau
    if not isinstance(tableau, ImplicitTableau):
        return isinstance(tableau, Tableau)
    return tableau.adaptive and tableau.fsal and tableau.diagonal is not None


def is_on_gpu(problem: Problem) -> bool:
    return problem.y0.is_cuda


def _solve_on_gpu(request: Request) -> Result:
    obstacle = _obstacle_to_lanes(request)
    if obstacle is None and request.checkpoints is not None:
        obstacle = "They keep all steps, and checkpoints are given."
    if obstacle is not None:
        raise CompileError(
            f'engine="compiled" solves independent samples on a GPU in compiled threads alone, which cannot take this '
            f'solve. {obstacle} Use engine="eager".'
        )
    result = by_programs(_lanes(request), request)
    result.stats.compiled = "solve"
    return result


def _obstacle_to_lanes(request: Request) -> str | None:
    others = request._replace(progress=False, checkpoints=None) if request.is_batch else request  # which lanes have
    obstacle = obstacle_to_programs(others, takes_batches=True)
    return _obstacle_to_implicit_lanes(request) if obstacle is None else obstacle


def _obstacle_to_implicit_lanes(request: Request) -> str | None:
    problem = request.problem
    newton, y0 = problem.newton, problem.y0
    if newton is None:
        return None
    if not problem.adaptive:
        return f"The steps run in Python because those of {problem.tableau.name!r} are fixed."
    if request.checkpoints is not None:
        return f"Method {problem.tableau.name!r} has no checkpoints in lanes, where steps share Jacobians."
    if callable(newton.jacobian) or newton.jacobian == "krylov":
        given = "a function" if callable(newton.jacobian) else "'krylov'"
        return f"The steps run in Python because option jacobian is {given}; lanes make the Jacobian of func."
    size = y0[:1].numel() if request.is_batch else y0.numel()
    if size > _MOST_COMPONENTS:
        what = "A sample" if request.is_batch else "The state"
        return f"{what} has {size} components; implicit methods run in lanes for at most {_MOST_COMPONENTS}."
    return None


def _lanes(request: Request) -> Callable[..., Result]:
    """The solver of lanes, with a bar if one is asked for."""
    if not request.is_batch:
        return _solve_single()

    def solve(*problem: Any) -> Result:
        with samples_bar(len(request.problem.y0)) if request.progress else nullcontext() as finished:
            return _solve()(*problem, checkpoints=request.checkpoints, finished=finished)

    return solve


@cache
def _solve() -> Callable[..., Result]:
    from aca_ext.engines.ensemble.run import solve  # brings in the compiler, which takes seconds

    return solve


@cache
def _solve_single() -> Callable[..., Result]:
    from aca_ext.engines.ensemble.single import solve

    return solve
