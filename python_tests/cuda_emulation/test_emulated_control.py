"""Decisions about a control block, and the ends of steps, by csrc's CUDA kernels in the emulation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from emulated_control import (
    N,
    check_decision,
    check_finished_step,
    check_restored_step,
    check_steps_without_outputs,
    emulated_blocks,
)
from emulation import Emulation
from test_control import (
    Driven,
    assert_decides_as_the_host,
    problem_with,
    random_controller,
)

from aca_ext.numerics.controller import Controller

both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture
def emulated(cuda: Emulation) -> Iterator[None]:
    with emulated_blocks(cuda):
        yield


@pytest.mark.usefixtures("emulated")
class TestDecisions:
    @pytest.mark.parametrize("seed", range(10))
    @both_dtypes
    def test_are_those_of_the_host(self, seed: int, dtype: str) -> None:
        assert_decides_as_the_host(seed, dtype, "cpu")

    @pytest.mark.parametrize("seed", range(10))
    def test_find_the_first_step_of_the_host(self, seed: int) -> None:
        random_ = random.Random(seed)
        controller = replace(random_controller(random_), first_step=None)
        norms = [10.0 ** random_.uniform(-7, 7) for _ in range(3)]
        expected = controller.initial(3.0, norms[0], norms[1], lambda h: norms[2])
        found = Driven(problem_with(controller, [0.0, 3.0], []), "cpu").first(*norms).h
        assert found == pytest.approx(expected, rel=1e-6)  # the norms pass through their squares

    def test_go_on_after_more_room_was_made(self) -> None:
        problem = problem_with(Controller(5, first_step=0.01, max_step=0.01), [0.0, 1.0], [])
        driven = Driven(problem, "cpu", n_states=2)
        driven.first(1.0, 1.0, 1.0)
        ends = []
        while driven.block.read().status == "running":
            ends.append(driven.tried(0.5).t)
        assert len(ends) == 100
        assert driven.memory.steps[:100, 2].tolist() == ends


@both_dtypes
class TestEndsOfSteps:
    @pytest.mark.parametrize("n", [1, 3, N, N + 1])  # all but N are no multiple of a pack
    def test_of_any_size(self, cuda: Emulation, dtype: str, n: int) -> None:
        check_finished_step(cuda, dtype, n)
        check_steps_without_outputs(cuda, dtype, n)
        check_restored_step(cuda, dtype, n)

    def test_in_packs_and_in_elements_are_equal(self, cuda: Emulation, dtype: str) -> None:
        """Outputs and checkpoints at a misaligned address cannot be written in packs."""
        check_steps_without_outputs(cuda, dtype, N, offset=1)
        for check in (check_finished_step, check_restored_step):
            for one, other in zip(check(cuda, dtype), check(cuda, dtype, offset=1), strict=True):
                assert torch.equal(one, other)


def test_weights_of_outputs(cuda: Emulation) -> None:
    check_decision(cuda)
