"""Per-function cache of captured plans, and the layout of a solve, which is part of the key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from aca_ext.engines.cuda_graph import captures
from aca_ext.engines.cuda_graph.control_block import SolveMemory
from aca_ext.engines.cuda_graph.plan import Plan
from aca_ext.problem.problem import Problem
from aca_ext.vector_field.function_cache import PerOwner

_MAX_PLANS = 8  # per func; beyond it, the least recently used plan is dropped


class Plans:
    """The plans of one owner of func, in order of use, the last used at the end."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[Hashable, ...], Plan] = OrderedDict()
        self._lock = threading.Lock()

    def started_early(self, problem: Problem, layout: Hashable) -> tuple[Plan | None, SolveMemory | None]:
        """Starts a solve by the plan last used for this ``layout``; returns the plan and the memory of the solve.

        While the device runs it, the host traces func to check that the plan is still valid. This takes about as long
        as the solve, and the plan is nearly always valid. If it is not, the result is ignored.
        """
        with self._lock:
            plan = next((plan for (*_, of), plan in reversed(self._plans.items()) if of == layout), None)
        if plan is None or not plan.can_start_early():
            return None, None
        with plan.in_order(), torch.no_grad():
            return plan, plan.start(problem, problem.y0.detach())

    def find(self, key: tuple[Hashable, ...], make: Callable[[], Plan]) -> tuple[Plan, bool]:
        """The plan for ``key``, and True if it was made now."""
        with self._lock:
            is_new = key not in self._plans
            if is_new:
                self._plans[key] = make()
                while len(self._plans) > _MAX_PLANS:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(key)
            return self._plans[key], is_new


_by_owner = PerOwner(Plans)


def plans_of(func: object) -> Plans:
    """The plans of func's owner, which is a module or the code of a function."""
    return _by_owner.of(func)


def layout_of(problem: Problem) -> Hashable:
    """Values that a capture contains as constants, besides func: layouts of arguments, method, tolerances, settings."""
    y0, tolerance, controller = problem.y0, problem.tolerance, problem.controller
    return (
        (y0.shape, y0.stride(), y0.dtype, y0.device),
        _stream_of(y0),
        tuple((x.shape, x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else None for x in problem.args),
        problem.packing,
        problem.tableau,
        controller is None or controller.first_step is None,
        (problem.adaptive, len(problem.times) > 2),
        (tolerance.rtol, tolerance.atol),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        captures.DEVICE_LOOPS,
        _precision(),
    )


def _stream_of(y0: Tensor) -> int:
    """The current stream, from which a plan gets its memory; freed memory is reused safely only on that stream."""
    return int(torch.cuda.current_stream(y0.device).cuda_stream) if y0.is_cuda else 0


def _precision() -> Hashable:
    """Settings of torch that select the kernels of an operation."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    chosen = (torch.are_deterministic_algorithms_enabled(), cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    if hasattr(cudnn, "conv"):
        return *chosen, matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    return *chosen, matmul.allow_tf32, cudnn.allow_tf32
