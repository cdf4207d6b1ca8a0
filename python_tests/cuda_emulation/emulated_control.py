"""The control block and the operations of a step in emulated device memory, and checks of the latter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from emulation import EmulatedExtension, Emulation, Target
from test_control import Driven, problem_with
from torch import Tensor

from aca_ext.engines.cuda_graph import control_block
from aca_ext.engines.cuda_graph.control_block import ControlledKernels
from aca_ext.kernels import fused
from aca_ext.numerics.controller import Controller

N = 300  # elements of a state, more than a thread block has threads
TIMES = [0.0, 0.02, 0.05, 0.1, 1.0]  # an output at the start, two inside the first step of 0.1, one at its end


class _DeviceTorch:
    """``torch`` for the module of the control block, whose tensors it allocates in emulated memory."""

    def __init__(self, cuda: Emulation, torch_writes: bool) -> None:
        self._cuda, self._torch_writes = cuda, torch_writes

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: int, **settings: Any) -> Tensor:
        return on_device(self._cuda, torch.zeros(*size, **settings))

    def full(self, size: Sequence[int], value: float, **settings: Any) -> Tensor:
        return on_device(self._cuda, torch.full(size, value, **settings))

    def tensor(self, values: Any, **settings: Any) -> Tensor:
        return on_device(self._cuda, torch.tensor(values, **settings))

    def empty(self, *size: int, **settings: Any) -> Tensor:
        return on_device(self._cuda, torch.empty(*size, **settings), is_written=self._torch_writes)


def on_device(cuda: Emulation, x: Tensor, offset: int = 0, *, is_written: bool = True) -> Tensor:
    """A copy of ``x`` in emulated device memory, or unwritten memory of its layout; ``offset`` as in ``buffer``."""
    return torch.from_numpy(cuda.buffer(x.numpy(), offset, is_written=is_written))


@contextmanager
def emulated_blocks(cuda: Emulation, stream: int = 0, *, offset: int = 0, torch_writes: bool = False) -> Iterator[None]:
    """Context in which control blocks live in emulated memory, and the operations on them run in the emulation.

    Outputs and checkpoints begin ``offset`` elements after an aligned address. With ``torch_writes``, reads of
    unwritten memory are not found, since torch's own writes are not seen.
    """

    def target_for(like: Tensor, workspace: Tensor | None = None) -> Target:
        address = None if workspace is None else workspace.data_ptr()
        return cuda.target(str(like.dtype).removeprefix("torch."), stream, address)

    def empty_rows(count: int, like: Tensor) -> Tensor:
        rows = on_device(cuda, torch.empty(count * like.numel(), dtype=like.dtype), offset, is_written=torch_writes)
        return rows.as_strided((count, *like.shape), (like.numel(), *like.stride()))

    extension = EmulatedExtension(cuda)
    with (
        patch.object(control_block, "_C", extension),
        patch.object(fused, "_C", extension),
        patch.object(control_block, "torch", _DeviceTorch(cuda, torch_writes)),
        patch.object(control_block, "target_for", target_for),
        patch.object(control_block, "empty_rows", empty_rows),
    ):
        yield


def driven_on(cuda: Emulation, dtype: str = "float64", n: int = N) -> Driven:
    """A control block before the first trial step of 0.1, which reaches three outputs."""
    problem = problem_with(Controller(5, first_step=0.1), TIMES, [], dtype=dtype)
    problem = replace(problem, y0=torch.ones(n, dtype=problem.y0.dtype))
    driven = Driven(problem, "cpu")
    driven.first(1.0, 1.0, 1.0)
    return driven


def check_decision(cuda: Emulation) -> None:
    """Checks that the step is accepted and the weights of its outputs are those of the tableau."""
    with emulated_blocks(cuda):
        driven = driven_on(cuda)
        control = driven.tried(0.5)
        assert cuda.findings() == []
    assert (control.n_accepted, control.t) == (1, 0.1)
    weights = driven.memory.weights
    assert weights is not None
    for i in (1, 2):
        expected = driven.problem.tableau.dense_weights(TIMES[i] / 0.1)
        assert weights[i, : len(expected)].tolist() == expected


def check_finished_step(cuda: Emulation, dtype: str = "float64", n: int = N, offset: int = 0) -> list[Tensor]:
    """Checks the outputs, the checkpoint, the state and the first slope after an accepted step; returns the outputs."""
    with emulated_blocks(cuda, offset=offset):
        driven = driven_on(cuda, dtype, n)
        y, y1, k_first, *k = _random(cuda, dtype, n, 10)
        start = y.clone()
        driven.tried(0.5)
        ControlledKernels(driven.block, driven.problem.tolerance).finish(y, k, y1, k_first)
        assert cuda.findings() == []
    for i in (1, 2):
        w = driven.problem.tableau.dense_weights(TIMES[i] / 0.1)
        expected = start + 0.1 * sum(w_j * k_j for w_j, k_j in zip(w, k, strict=False))
        assert torch.allclose(driven.memory.ys[i], expected, rtol=1e-5, atol=1e-5)
    for copy in (driven.memory.ys[3], driven.memory.blocks[0][1], y):
        assert torch.equal(copy, y1)
    assert torch.equal(k_first, k[-1])
    return [driven.memory.ys[i].clone() for i in (1, 2)]


def check_steps_without_outputs(cuda: Emulation, dtype: str, n: int, offset: int = 0) -> None:
    """Checks a rejected step, which writes nothing, and an accepted one that reaches no output and reads no y."""
    with emulated_blocks(cuda, offset=offset):
        driven = driven_on(cuda, dtype, n)
        driven.tried(0.5)
        finish = ControlledKernels(driven.block, driven.problem.tolerance).finish
        y, y1, k_first, *k = _random(cuda, dtype, n, 10)
        before = y.clone(), k_first.clone()
        driven.tried(50.0)
        finish(y, k, y1, k_first)
        assert torch.equal(y, before[0])
        assert torch.equal(k_first, before[1])
        assert driven.tried(0.5).n_accepted == 2
        y = on_device(cuda, torch.empty_like(y), is_written=False)
        finish(y, k, y1, k_first)
        assert cuda.findings() == []
    assert torch.equal(y, y1)
    assert torch.equal(driven.memory.blocks[0][2], y1)
    assert torch.equal(k_first, k[-1])


def check_restored_step(cuda: Emulation, dtype: str = "float64", n: int = N, offset: int = 0) -> list[Tensor]:
    """Checks the state of a step that is transposed, and the cotangents of its outputs; returns the latter."""
    with emulated_blocks(cuda, offset=offset):
        driven = driven_on(cuda, dtype, n)
        y, y1, grads, g, inside, *slopes = _random(cuda, dtype, n, 12)
        driven.memory.blocks[0][0] = y1
        cuda.mark_written(driven.memory.blocks[0][0].numpy())
        control = driven.tried(0.5)
        grad_ys = on_device(cuda, torch.stack([i * grads for i in range(len(TIMES))]), offset)
        control.grad_outputs, control.step = grad_ys.data_ptr(), 1
        driven.block.write(control)
        driven.decide("transpose")
        before = g.clone()
        ControlledKernels(driven.block, driven.problem.tolerance).restore(y, g, (inside, slopes))
        assert cuda.findings() == []
    assert torch.equal(y, y1)
    assert torch.equal(g, before + 3 * grads)
    assert torch.equal(inside, grads + 2 * grads)
    ones, twos = (driven.problem.tableau.dense_weights(TIMES[i] / 0.1) for i in (1, 2))
    for slope, one, two in zip(slopes, ones, twos, strict=False):
        assert torch.allclose(slope, one * grads + two * 2 * grads, rtol=1e-5, atol=1e-5)
    return [g.clone(), inside.clone(), *(slope.clone() for slope in slopes)]


def _random(cuda: Emulation, dtype: str, n: int, count: int) -> list[Tensor]:
    random = np.random.default_rng(0)
    return [torch.from_numpy(cuda.buffer(random.standard_normal(n).astype(dtype))) for _ in range(count)]
