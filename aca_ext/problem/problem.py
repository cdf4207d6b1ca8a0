"""Description of a solve: its validated arguments in one frozen object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from aca_ext.numerics.controller import Controller
from aca_ext.problem.events import Event
from aca_ext.problem.moving_nodes import NodesFollow
from aca_ext.problem.newton import NewtonOptions
from aca_ext.problem.resumption import SolverState
from aca_ext.problem.state import Packing, State
from aca_ext.problem.tolerance import Tolerance
from aca_ext.progress import Callback

_P = TypeVar("_P", bound="Problem")


class Settings:
    """Identity shared by problems that differ only in func, args and the values of y0; a key for caches.

    Attributes:
        has_program: a compiled program has solved such a problem.
    """

    has_program = False


@dataclass(frozen=True)
class Problem:
    """Description of a solve, with validated arguments.

    Attributes:
        y0: packed initial state: one dense real tensor, with its autograd graph.
        packing: conversion between the user's state and the packed one.
        times: requested times, strictly monotonic; the first is the start.
        controller: controller of adaptive steps; None for fixed steps.
        grid: nodes of fixed steps, which include ``times`` unless ``interp`` is given; None for adaptive steps.
        nodes_follow: how nodes between requested times move with these, for the gradient of t.
        stops: times inside the solve at which an adaptive step must end (options step_t and jump_t), sorted.
        jumps: the stops at which func jumps (option jump_t); the slope is evaluated again there. Of a perturbed
            fixed grid, all of its nodes.
        max_num_steps: limit on the trial steps of an adaptive solve.
        stops_at_limit: at that limit, the solve returns what it reached instead of raising.
        callback_stops: the solve returns what it reached if ``on_step`` returns True.
        resumed: state of the solver from which a resumed solve continues, else None.
        accepts_min_step: a step of ``min_step`` is accepted whatever its error.
        interp: interpolation between the nodes of a fixed grid, "linear" or "cubic".
        newton: options of an implicit method; None for an explicit one.
        resolution: relative rounding of the times as they were given.
        on_step: called after every trial step.
        events: conditions whose sign changes the solve locates.
        settings: shared by problems that differ only in func, args and the values of y0.
    """

    func: Callable[..., State]
    args: tuple[Any, ...]
    y0: Tensor
    packing: Packing
    times: tuple[float, ...]
    tableau: Any
    tolerance: Tolerance
    controller: Controller | None
    grid: tuple[float, ...] | None
    stops: tuple[float, ...]
    jumps: frozenset[float]
    max_num_steps: int
    stops_at_limit: bool = False
    callback_stops: bool = False
    accepts_min_step: bool = False
    interp: str | None = None
    nodes_follow: NodesFollow = NodesFollow.TIMES
    newton: NewtonOptions | None = None
    resolution: float = 0.0
    resumed: SolverState | None = None
    on_step: Callback | None = None
    events: tuple[Event, ...] = ()
    settings: Settings = field(default_factory=Settings)

    @property
    def adaptive(self) -> bool:
        return self.controller is not None

    @property
    def may_stop(self) -> bool:
        """True if the solve may end before its last time, with the state there as a further output."""
        return self.stops_at_limit or self.callback_stops

    @property
    def step_ends(self) -> tuple[float, ...]:
        """Times at which a step must end: the nodes of the grid or the stops; the last one ends the solve."""
        return (*self.stops, self.times[-1]) if self.grid is None else self.grid[1:]

    @property
    def known_times(self) -> Any:
        """The requested times; of independent samples an array, (batch, T)."""
        return self.times

    @property
    def length(self) -> float:
        """Length of the solve in time; of independent samples the mean."""
        return abs(self.times[-1] - self.times[0])

    @property
    def span(self) -> tuple[float, float]:
        """First and last time; of independent samples those of the sample with the worst resolution of times."""
        return self.times[0], self.times[-1]

    def start_time(self, like: Tensor) -> Tensor:
        """The first time as a tensor, as func receives it."""
        start = torch.full((), self.times[0], dtype=like.dtype, device=like.device)
        if self.grid is None or self.times[0] not in self.jumps:
            return start
        return torch.nextafter(start, torch.full_like(start, self.times[-1]))

    def spread_times(self, t: Tensor) -> Tensor:
        """The times ``t`` as func receives them, stacked along the first dimension; differentiable.

        Padded times are replaced by the first time, where func exists.
        """
        return t.to(self.y0)

    def padding(self) -> Tensor | None:
        """A mask over the stacked times that is True for padded times; None if there are none."""
        return None

    def of(self: _P, func: Callable[..., State], args: tuple[Any, ...], y0: Tensor) -> _P:
        """The same problem with another func, other args, and a y0 of the same layout."""
        other = object.__new__(type(self))  # takes a third of the time of dataclasses.replace
        vars(other).update(vars(self), func=func, args=args, y0=y0)
        return other
