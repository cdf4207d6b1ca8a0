"""The control block of a solve in device memory, and the operations of a step that read times and step size from it.

``csrc/control/control_block.h`` defines the block. Between two steps one thread of the device updates it by a decision,
so the host launches steps without knowing how far the solve has come. Besides ``aca_ext.kernels``, this is the only
module that imports ``_C``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aca_ext import _C
from aca_ext.kernels.extension import controller_for
from aca_ext.kernels.fused import RowKernels, target_for
from aca_ext.kernels.layout import empty_rows
from aca_ext.problem.problem import Problem
from aca_ext.problem.tolerance import Tolerance
from aca_ext.solver.runge_kutta import Scheme

STEP_ENTRY = _C.STEP_ENTRY_DOUBLES  # doubles in the record of a step; the last is the bits of an int64


class ControlBlock:
    """The control block of a plan, with the memory to which it always points."""

    def __init__(self, like: Tensor, scheme: Scheme, tolerance: Tolerance) -> None:
        device = like.device
        self.like, self.scheme = like, scheme
        self._memory = torch.zeros(_C.CONTROL_BYTES, dtype=torch.uint8, device=device)
        self.workspace = torch.zeros(_C.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.sums = torch.zeros(2, max(1, len(tolerance.sizes)), dtype=torch.float64, device=device)
        self._sizes = torch.tensor(tolerance.sizes or [0], dtype=torch.float64, device=device)
        self._stage_times = torch.zeros(len(scheme.c), dtype=like.dtype, device=device)
        self.minus_one = torch.full((1,), -1.0, dtype=torch.float64, device=device)

    @property
    def address(self) -> int:
        return self._memory.data_ptr()

    @property
    def h(self) -> Tensor:
        """Signed step size of the next trial, float64."""
        return self._number(_C.H_TRIAL)

    @property
    def slope_weight(self) -> Tensor:
        """Weight of the slope at the end of the trial in its error estimate, float64."""
        return self._number(_C.SLOPE_WEIGHT)

    def _number(self, offset: int) -> Tensor:
        return self._memory[offset : offset + 8].view(torch.float64)

    @property
    def stage_times(self) -> Sequence[Tensor]:
        return self._stage_times.unbind(0)

    def write(self, control: _C.Control) -> None:
        _C.write_control(target_for(self.like), self.address, control)

    def decide(self, decision: str) -> None:
        """Launches a decision about the block on the current stream."""
        _C.decide(target_for(self.like), self.address, decision)

    def read(self) -> _C.Control:
        """A copy of the block on the host; waits for the device."""
        return _C.Control(self._memory.cpu().numpy().tobytes())

    def control(self, problem: Problem, solve: SolveMemory, tolerance: Tolerance) -> _C.Control:
        """The contents of the block at the start of a solve."""
        controller, scheme, times = problem.controller, self.scheme, problem.times
        first_step = 0.0 if controller is None else controller.first_step or 0.0
        dtype = str(self.like.dtype).removeprefix("torch.")
        control = _C.Control(
            dtype, controller_for(controller), first_step, controller is not None, problem.max_num_steps
        )
        control.set_times(
            times[0], times[-1], solve.times.data_ptr(), len(solve.times), solve.stops.data_ptr(), len(solve.stops)
        )
        dense = scheme.tableau.dense_coefficients if solve.weights is not None else ()
        control.set_tableau(scheme.c, dense)
        control.fsal = scheme.fsal
        control.error_last = scheme.error_last
        control.segments = len(tolerance.sizes)
        control.row_bytes = self.like.numel() * self.like.element_size()
        control.sizes, control.sums = self._sizes.data_ptr(), self.sums.data_ptr()
        control.stage_times = self._stage_times.data_ptr()
        control.weights = 0 if solve.weights is None else solve.weights.data_ptr()
        control.outputs = solve.ys.data_ptr()
        return control


class DeviceTimes:
    """Requested times and times at which a step must end, on the device; ``of`` has both as Python numbers."""

    def __init__(self, times: tuple[float, ...], stops: tuple[float, ...], device: torch.device) -> None:
        self.of = times, stops
        both = torch.tensor([*times, *stops], dtype=torch.float64, device="cpu").to(device, non_blocking=True)
        self.times, self.stops = both[: len(times)], both[len(times) :]


class SolveMemory:
    """Memory that one solve writes: outputs, records of accepted steps, and the states at their starts.

    Attributes:
        ys: outputs, one row for each time.
        keeps_states: True if the states are kept for a backward pass.
        blocks: the states; each block has as many rows as all blocks before it together.
        steps: records of the accepted steps, one row for each.
        control: host copy of the control block, as last written or read.
        n_steps, n_accepted: numbers of trial steps and of accepted steps, valid after the solve.
        turn: number of this use of the plan's memory.
    """

    control: _C.Control
    turn: int

    def __init__(self, times: DeviceTimes, y0: Tensor, *, keeps_states: bool, n_states: int, has_weights: bool) -> None:
        device, count = y0.device, len(times.of[0])
        self.times, self.stops = times.times, times.stops
        self.ys = empty_rows(count, y0)
        self.weights = None
        if has_weights:
            self.weights = torch.empty(count, _C.MAX_TERMS, dtype=torch.float64, device=device)
        self._y0, self.keeps_states, self._first = y0, keeps_states, n_states
        self.blocks: list[Tensor] = []
        self.n_steps = self.n_accepted = 0
        self.steps = torch.empty(0, STEP_ENTRY, dtype=torch.float64, device=device)

    def room_in(self, control: _C.Control) -> None:
        """Writes the addresses and sizes of this memory to ``control``, at the start of a solve."""
        if not len(self.steps):
            return self.grow(control)
        for block in self.blocks:
            control.add_block(block.data_ptr(), len(block))
        control.n_states = len(self.steps) + 1
        control.steps = self.steps.data_ptr()
        return None

    def grow(self, control: _C.Control) -> None:
        """Doubles the room for states and steps, and updates ``control``."""
        more = max(self._first, control.n_states)
        if self.keeps_states:
            self.blocks.append(empty_rows(more, self._y0))
            control.add_block(self.blocks[-1].data_ptr(), more)
        else:
            control.n_states += more
        steps = torch.empty(control.n_states - 1, STEP_ENTRY, dtype=torch.float64, device=self._y0.device)
        steps[: len(self.steps)] = self.steps
        self.steps = steps
        control.steps = steps.data_ptr()

    def hand_over_states(self) -> list[Tensor]:
        """Returns the filled parts of the blocks and drops the references to them; the caller keeps them."""
        blocks, self.blocks = self.blocks, []
        handed, left = list[Tensor](), self.n_accepted + 1
        for block in blocks:
            if left > 0:
                handed.append(block[:left])
            left -= len(block)
        return handed

    def take_states(self, blocks: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the states, laid out as rows, and updates ``control``: saved-tensor hooks may have moved them."""
        blocks = [self.laid_out(block) for block in blocks]
        self.control.n_blocks = 0
        for block in blocks:
            self.control.add_block(block.data_ptr(), len(block))
        return blocks

    def hand_over_outputs(self) -> Tensor:
        """Returns the outputs and drops the reference to them, since their autograd graph refers to this object."""
        ys = self.ys
        del self.ys
        return ys

    def laid_out(self, rows: Tensor) -> Tensor:
        """``rows``, copied only if their layout differs from that of the outputs."""
        like = self._y0
        if rows.stride() == (like.numel(), *like.stride()) and not rows.is_neg():
            return rows
        return empty_rows(len(rows), like).copy_(rows)


class ControlledKernels(RowKernels):
    """The kernels on a whole state, for a step whose times and step size are in a control block.

    Pass ``ControlBlock.h`` as h; a kernel reads it when it runs. The workspace belongs to the block, which outlives any
    capture of these kernels.
    """

    def __init__(self, block: ControlBlock, tolerance: Tolerance) -> None:
        super().__init__(block.like.unsqueeze(0), tolerance)
        self.like, self.stride = block.like, block.like.stride()
        self.block = block
        self._on = target_for(block.like, block.workspace)

    def scalars(self, values: Sequence[Any]) -> Sequence[Tensor]:
        """The times of the stages from the block; ``values`` are ignored."""
        return self.block.stage_times

    def write_norm(self, partial: Tensor, k: Tensor | None, w: Tensor, y0: Tensor, y1: Tensor, which: int = 0) -> None:
        """Writes the sums of an error norm to ``block.sums[which]``, which decisions read."""
        segments, limit = self.tolerance.segments, _C.MAX_SEGMENTS
        for first in range(0, len(segments) - 1, limit):
            _C.squared_error_ratio_rows(
                self._on,
                1,
                segments[first : first + limit + 1],
                w.data_ptr(),
                self.block.sums[which].data_ptr() + 8 * first,
                partial.data_ptr(),
                0 if k is None else k.data_ptr(),
                y0.data_ptr(),
                y1.data_ptr(),
                *self._tolerances,
            )

    def decide(self, decision: str) -> None:
        """Launches a decision about the block: "start", "euler", "first", "next", "resume" or "transpose"."""
        _C.decide(self._on, self.block.address, decision)

    def finish(self, y: Tensor, k: Sequence[Tensor], y1: Tensor, k_first: Tensor | None) -> None:
        """If the trial was accepted, writes its outputs and checkpoint, and ``y`` and ``k_first`` of the next step."""
        addresses = [k_i.data_ptr() for k_i in k]
        first = 0 if k_first is None else k_first.data_ptr()
        _C.finish_step(self._on, self._n, self.block.address, y.data_ptr(), addresses, y1.data_ptr(), first)

    def restore(self, y: Tensor, g: Tensor, inside: tuple[Tensor, Sequence[Tensor]] | None) -> None:
        """Loads the state at the start of a step into ``y``.

        The cotangents of outputs at the end of the step are added to ``g``, those of all others go to ``inside``.
        """
        total, slopes = (0, []) if inside is None else (inside[0].data_ptr(), [x.data_ptr() for x in inside[1]])
        _C.restore_step(self._on, self._n, self.block.address, y.data_ptr(), slopes, g.data_ptr(), total)


def supports_device_loops() -> bool:
    """Tells whether this build and this driver support loops of CUDA graphs on the device (CUDA 12.4 and newer)."""
    return _C.HAS_CUDA and _C.LoopGraph.is_supported()


def device_loop(device: int, first: int, body: int, control: int) -> _C.LoopGraph:
    """One launch of the CUDA graph ``first`` (0 for none), then of ``body`` until the control block ends the loop."""
    return _C.LoopGraph(device, first, body, control)


def obstacle_to_loop(graph: int) -> str:
    """Reason why a loop on the device cannot contain this CUDA graph; "" if it can."""
    return _C.obstacle_to_loop(graph)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no one else gets, unlike those of torch's pool, which hands out each of its 32 again and again."""
    return torch.cuda.ExternalStream(_C.new_stream(device.index or 0), device)


def restart_capture(stream: torch.cuda.Stream) -> None:
    """Replaces a failed capture on ``stream`` by a new one, which can be ended normally."""
    _C.restart_capture(stream.device_index, stream.cuda_stream)
