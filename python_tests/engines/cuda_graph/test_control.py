"""The control block alone: its decisions equal those of the host's loop, bit for bit, on every device."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import on_cuda

from aca_ext import _C, METHODS
from aca_ext.engines.cuda_graph.control_block import ControlBlock, DeviceTimes, SolveMemory
from aca_ext.numerics.controller import Controller
from aca_ext.numerics.step_control import StepControl
from aca_ext.problem.arguments import ProblemArguments
from aca_ext.problem.problem import Problem
from aca_ext.problem.validation import problem_of
from aca_ext.solver.runge_kutta import scheme_of, stage_times

DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


def slope(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


class Driven:
    """A control block that gets its error ratios from the test instead of from steps."""

    def __init__(self, problem: Problem, device: str, *, n_states: int = 4, keeps_states: bool = True) -> None:
        self.problem = problem
        like = problem.y0.to(device)
        self.scheme = scheme_of(problem.tableau, problem.adaptive)
        self.block = ControlBlock(like, self.scheme, problem.tolerance)
        times = DeviceTimes(problem.times, (*problem.stops, problem.times[-1]), like.device)
        has_weights = len(problem.times) > 2
        self.memory = SolveMemory(times, like, keeps_states=keeps_states, n_states=n_states, has_weights=has_weights)
        control = self.block.control(problem, self.memory, problem.tolerance)
        self.memory.room_in(control)
        self.block.write(control)

    def decide(self, decision: str) -> _C.Control:
        self.block.decide(decision)
        return self.block.read()

    def first(self, norm_y: float, norm_f: float, norm_change: float) -> _C.Control:
        self._put(norm_f)
        self._put(norm_y, which=1)
        self.block.decide("euler")
        self._put(norm_change)
        return self.decide("first")

    def tried(self, ratio: float) -> _C.Control:
        """The control block after a trial with this error ratio; grows the checkpoint memory if it is full."""
        self._put(ratio)
        control = self.decide("next")
        if control.status == "no_room":
            self.memory.grow(control)
            self.block.write(control)
            control = self.decide("resume")
        return control

    def _put(self, ratio: float, which: int = 0) -> None:
        self.block.sums[which].fill_(sum_of(ratio, self.problem))

    @property
    def h_trial(self) -> float:
        return self.block.h.item()

    @property
    def stage_times(self) -> list[float]:
        return [t.item() for t in self.block.stage_times]


def sum_of(ratio: float, problem: Problem) -> float:
    return ratio * ratio * problem.tolerance.sizes[0]


def seen(ratio: float, problem: Problem) -> float:
    """The ratio recovered from its sum of squares, after rounding."""
    return math.sqrt(sum_of(ratio, problem) / problem.tolerance.sizes[0]) if ratio == ratio else ratio


class Host:
    """The step control of the loop on the host, with the steps that it accepted."""

    def __init__(self, problem: Problem, h: float) -> None:
        self.problem = problem
        self.control = StepControl(problem.controller, problem.max_num_steps, problem.times, problem.step_ends)
        self.control.h = h
        self.steps: list[tuple[float, float, float]] = []
        self.control.propose()

    def tried(self, ratio: float) -> None:
        control = self.control
        step = control.t, control.h_trial, control.t_next
        control.judge(ratio)
        if control.is_accepted:
            self.steps.append(step)
        if control.status == "running":
            control.propose()


def problem_with(
    controller: Controller, times: list[float], stops: list[float], method: str = "dopri5", dtype: str = "float64"
) -> Problem:
    y0 = torch.ones(5, dtype=getattr(torch, dtype))
    options = {"step_t": stops} if stops else None
    given = ProblemArguments(slope, y0, times, rtol=1e-3, atol=1e-3, method=method, options=options)
    return replace(problem_of(given), controller=controller)


def assert_same_walk(driven: Driven, host: Host, ratios: list[float]) -> None:
    """Asserts that both take the same decisions on each ratio: status, times, step sizes and records."""
    problem = host.problem
    for ratio in ratios:
        here = host.control
        if here.status != "running":
            break
        assert driven.h_trial == here.h_trial
        host_times = stage_times(driven.scheme, here.t, here.h_trial, here.t_next, frozenset(), problem.y0.dtype)
        assert driven.stage_times == torch.tensor(host_times, dtype=problem.y0.dtype).tolist()
        control = driven.tried(ratio)
        host.tried(seen(ratio, problem))
        assert (control.status, control.t, control.h) == (here.status, here.t, here.h)
        assert control.n_accepted == len(host.steps)
    entries = driven.memory.steps[: len(host.steps)].cpu()
    assert [tuple(entry) for entry in entries[:, :3].tolist()] == host.steps
    ends = entries[:, 3].contiguous().view(torch.int64).tolist()
    begin = 1
    for (t, _, t_next), end in zip(host.steps, ends, strict=True):
        assert end == 1 + sum(host.control.sign * time <= host.control.sign * t_next for time in problem.times[1:])
        for i in range(begin, end):
            if problem.times[i] == t_next or driven.memory.weights is None:
                continue
            weights = problem.tableau.dense_weights((problem.times[i] - t) / (t_next - t))
            assert driven.memory.weights[i, : len(weights)].tolist() == weights
        begin = end


def random_controller(random_: random.Random) -> Controller:
    pid = random_.choice([(0.0, 1.0, 0.0), (0.3, 0.4, 0.0), (0.2, 0.7, 0.1)])
    return Controller(
        order=random_.randint(1, 8),
        safety=random_.uniform(0.5, 1.0),
        ifactor=random_.uniform(1.0, 20.0),
        dfactor=random_.uniform(0.05, 0.9),
        pcoeff=pid[0],
        icoeff=pid[1],
        dcoeff=pid[2],
        min_step=random_.choice([0.0, 1e-3]),
        max_step=random_.choice([math.inf, 0.3]),
        first_step=10.0 ** random_.uniform(-3, 0),
    )


def random_ratio(random_: random.Random) -> float:
    return random_.choice(
        [0.0, 1.0, random_.uniform(0.0, 1.0), random_.uniform(0.5, 3.0), 10.0 ** random_.uniform(-9, 4)]
    )


controllers = st.builds(random_controller, st.randoms(use_true_random=False))
error_ratios = st.one_of(st.sampled_from([0.0, 1.0, math.inf, math.nan]), st.floats(1e-9, 1.0), st.floats(0.5, 1e4))
gaps = st.lists(st.floats(1e-3, 2.0), min_size=1, max_size=12)


class TestDecisions:
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        controller=controllers,
        gaps=gaps,
        start=st.floats(-3.0, 3.0),
        sign=st.sampled_from([1.0, -1.0]),
        stops=st.lists(st.floats(0.01, 0.99), max_size=4),
        ratios=st.lists(error_ratios, min_size=1, max_size=60),
        dtype=st.sampled_from(["float32", "float64"]),
        method=st.sampled_from(["bosh3", "dopri5", "tsit5", "dopri8"]),
    )
    def test_are_those_of_the_loop_on_the_host(
        self,
        controller: Controller,
        gaps: list[float],
        start: float,
        sign: float,
        stops: list[float],
        ratios: list[float],
        dtype: str,
        method: str,
    ) -> None:
        times = [start]
        for gap in gaps:
            times.append(times[-1] + sign * gap)
        step_t = [start + share * (times[-1] - start) for share in stops]
        problem = problem_with(controller, times, step_t, method, dtype)
        assert controller.first_step is not None
        driven, host = Driven(problem, "cpu"), Host(problem, controller.first_step)
        assert driven.first(1.0, 1.0, 1.0).status == host.control.status
        assert_same_walk(driven, host, ratios)

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        controller=controllers,
        norms=st.tuples(*[st.one_of(st.just(0.0), st.floats(1e-7, 1e7))] * 3),
        length=st.floats(1e-3, 1e3),
    )
    def test_the_first_step(self, controller: Controller, norms: tuple[float, float, float], length: float) -> None:
        controller = replace(controller, first_step=None)
        problem = problem_with(controller, [0.0, length], [])
        norm_y, norm_f, norm_change = (seen(norm, problem) for norm in norms)
        expected = controller.initial(length, norm_y, norm_f, lambda h: norm_change)
        assert Driven(problem, "cpu").first(*norms).h == expected

    def test_a_step_limit(self) -> None:
        problem = replace(problem_with(Controller(5, first_step=0.1), [0.0, 10.0], []), max_num_steps=3)
        driven = Driven(problem, "cpu")
        driven.first(1.0, 1.0, 1.0)
        assert [driven.tried(1.0).status for _ in range(3)] == ["running", "running", "step_limit"]

    def test_nothing_moves_after_the_end(self) -> None:
        driven = Driven(problem_with(Controller(5, first_step=1.0), [0.0, 1.0], []), "cpu")
        driven.first(1.0, 1.0, 1.0)
        end = driven.tried(0.5)
        assert end.status == "done"
        after = driven.tried(0.5)
        assert (after.status, after.t, after.n_steps, after.n_accepted) == ("done", 1.0, 1, 1)
        assert not after.is_unfinished


@pytest.mark.parametrize("device", DEVICES)
class TestRoom:
    @pytest.mark.parametrize("keeps_states", [True, False])
    def test_grows_and_keeps_what_was_there(self, device: str, keeps_states: bool) -> None:
        problem = problem_with(Controller(5, first_step=0.01, max_step=0.01), [0.0, 1.0], [])
        driven = Driven(problem, device, n_states=2, keeps_states=keeps_states)
        driven.first(1.0, 1.0, 1.0)
        ends = []
        while driven.block.read().status == "running":
            ends.append(driven.tried(0.5).t)
        assert len(ends) == 100
        assert driven.memory.steps[:100, 2].tolist() == ends
        assert [len(block) for block in driven.memory.blocks] == ([2, 2, 4, 8, 16, 32, 64] if keeps_states else [])
        assert len(driven.memory.steps) == 127

    def test_steps_are_transposed_last_to_first(self, device: str) -> None:
        problem = problem_with(Controller(5, first_step=0.1), [0.0, 0.35, 1.0], [0.5])
        driven = Driven(problem, device, n_states=2)
        driven.first(1.0, 1.0, 1.0)
        while (control := driven.block.read()).status == "running":
            driven.tried(0.9)
        entries = driven.memory.steps[: control.n_accepted].cpu()
        control.step = control.n_accepted
        driven.block.write(control)
        for t, h, _, _ in reversed(entries.tolist()):
            left = driven.decide("transpose")
            assert driven.h_trial == h
            assert driven.stage_times[0] == t
            assert left.is_unfinished == (t != 0.0)


def assert_decides_as_the_host(seed: int, dtype: str, device: str) -> None:
    """Compares the decisions of a random controller, on random ratios, with those of the host."""
    random_ = random.Random(seed)
    controller = random_controller(random_)
    sign = random_.choice([1.0, -1.0])
    times = [0.0, *(sign * x for x in sorted(random_.uniform(0.01, 5.0) for _ in range(7)))]
    stops = sorted(sign * random_.uniform(0.02, 0.98) * abs(times[-1]) for _ in range(2))
    method = random_.choice([name for name, m in METHODS.items() if m.adaptive and m.dense is not None])
    problem = problem_with(controller, times, stops, method, dtype)
    assert controller.first_step is not None
    driven, host = Driven(problem, device), Host(problem, controller.first_step)
    driven.first(1.0, 1.0, 1.0)
    assert_same_walk(driven, host, [random_ratio(random_) for _ in range(60)])


@on_cuda
class TestCuda:
    """Tests on a GPU. Their names contain "cuda", by which .ci/gpu selects them."""

    @pytest.mark.parametrize("seed", range(40))
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_cuda_decides_as_the_host(self, seed: int, dtype: str) -> None:
        assert_decides_as_the_host(seed, dtype, "cuda")

    @pytest.mark.parametrize("seed", range(40))
    def test_cuda_finds_the_first_step_of_the_host(self, seed: int) -> None:
        random_ = random.Random(seed)
        problem = problem_with(replace(random_controller(random_), first_step=None), [0.0, 3.0], [])
        norms = [10.0 ** random_.uniform(-7, 7) for _ in range(3)]
        found = [Driven(problem, device).first(*norms).h for device in ("cpu", "cuda")]
        assert found[0] == found[1]
