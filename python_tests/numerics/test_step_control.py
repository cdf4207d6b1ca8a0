"""Step control: its decisions, which Python, C++ and batches of many solves make alike, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aca_ext.kernels.extension import STATUSES, batch_control_for, step_control_for
from aca_ext.numerics.controller import Controller
from aca_ext.numerics.step_control import StepControl

KINDS: list[Any] = [StepControl, step_control_for]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["Python", "C++"])
NO_LIMIT = 10**6


@st.composite
def controllers(draw: st.DrawFn) -> Controller:
    return Controller(
        order=draw(st.integers(1, 8)),
        safety=draw(st.floats(0.1, 1.0)),
        pcoeff=draw(st.sampled_from([0.0, 0.4, -0.2])),
        icoeff=draw(st.sampled_from([1.0, 0.3])),
        dcoeff=draw(st.sampled_from([0.0, 0.1])),
        min_step=draw(st.sampled_from([0.0, 1e-3])),
        max_step=draw(st.sampled_from([math.inf, 0.5])),
    )


error_ratios = st.one_of(st.floats(0, 1.0), st.floats(1.0, 1e9), st.sampled_from([0.0, 1e-320, math.inf, math.nan]))


def fixed(kind: Any, times: Sequence[float], nodes: Sequence[float]) -> Any:
    return kind(None, NO_LIMIT, times, nodes[1:])


def reached(control: Any) -> list[tuple[int, float]]:
    """Outputs that one more trial without error reaches, and their positions in that step."""
    control.propose()
    control.judge(0.0)
    return [(i, control.position(i)) for i in range(*control.due)]


@each_kind
class TestOutputs:
    def test_theta_is_the_position_in_the_step(self, kind: Any) -> None:
        control = fixed(kind, [0.0, 0.25, 0.5, 2.0, 3.0], [0.0, 1.0, 1.5, 2.5, 3.0])
        assert [reached(control) for _ in range(4)] == [[(1, 0.25), (2, 0.5)], [], [(3, 0.5)], [(4, 1.0)]]
        assert control.status == "done"

    def test_decreasing(self, kind: Any) -> None:
        control = fixed(kind, [3.0, 2.0, 0.5, 0.25, -1.0], [3.0, 2.5, 1.5, 0.25, -1.0])
        assert [reached(control) for _ in range(4)] == [[], [(1, 0.5)], [(2, 0.8), (3, 1.0)], [(4, 1.0)]]

    def test_a_single_time_is_done_at_once(self, kind: Any) -> None:
        assert kind(None, NO_LIMIT, [7.0], []).status == "done"

    def test_theta_is_exactly_1_at_the_end(self, kind: Any) -> None:
        t_next = 0.1 + 3 * 0.1
        assert reached(fixed(kind, [0.1, t_next], [0.1, t_next])) == [(1, 1.0)]

    @given(
        times=st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=12, unique=True),
        cuts=st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), max_size=12),
        decreasing=st.booleans(),
    )
    def test_every_time_comes_once_in_order_and_inside_its_step(
        self, kind: Any, times: list[float], cuts: list[float], decreasing: bool
    ) -> None:
        times = sorted(times, reverse=decreasing)
        low, high = min(times), max(times)
        nodes = sorted({low, high, *(c for c in cuts if low < c < high)}, reverse=decreasing)
        control, seen = fixed(kind, times, nodes), []
        for t, t_next in pairwise(nodes):
            for i, theta in reached(control):
                seen.append(i)
                assert 0 < theta <= 1
                assert theta == 1 or times[i] != t_next
                assert t + theta * (t_next - t) == pytest.approx(times[i], rel=1e-9, abs=1e-9)
        assert seen == list(range(1, len(times)))


@each_kind
class TestSteps:
    def test_a_step_that_all_but_reaches_a_stop_ends_there(self, kind: Any) -> None:
        control = kind(Controller(5), NO_LIMIT, [0.0, 1.0], [0.3, 1.0])
        control.h = 0.3 * (1 - 1e-14)
        control.propose()
        assert (control.t_next, control.h_trial) == (0.3, 0.3)

    def test_a_step_cut_short_does_not_shrink_the_next_one(self, kind: Any) -> None:
        control = kind(Controller(5), NO_LIMIT, [0.0, 9.0], [0.01, 9.0])
        control.h = 2.0
        reached(control)
        assert (control.t, control.h) == (0.01, 2.0)

    def test_the_step_limit(self, kind: Any) -> None:
        control = kind(Controller(5), 2, [0.0, 9.0], [9.0])
        control.h = 1.0
        for ratio in (0.5, 7.0):
            control.propose()
            control.judge(ratio)
        control.propose()
        assert (control.status, control.n_steps, control.n_accepted, control.ratio) == ("step_limit", 2, 1, 0.5)

    def test_a_step_that_does_not_move_time(self, kind: Any) -> None:
        control = kind(Controller(5), NO_LIMIT, [1.0, 9.0], [9.0])
        control.h = 1e-17
        control.propose()
        assert control.status == "step_size"

    def test_an_error_that_is_not_finite_asks_for_a_look(self, kind: Any) -> None:
        control = kind(Controller(5, min_step=0.1), NO_LIMIT, [0.0, 9.0], [9.0])
        control.h = 1.0
        control.propose()
        control.judge(math.nan)
        assert (control.status, control.is_accepted, control.can_shrink) == ("not_finite", False, True)
        assert control.h == 0.2
        control.resume()
        assert control.status == "running"

    def test_a_rejected_step_below_the_limit(self, kind: Any) -> None:
        control = kind(Controller(5, min_step=0.5), NO_LIMIT, [0.0, 9.0], [9.0])
        control.h = 0.6
        control.propose()
        control.judge(100.0)
        assert (control.status, control.h) == ("running", 0.5)
        control.propose()
        control.judge(100.0)
        assert control.status == "step_size"


STATE = ("status", "t", "h", "ratio", "h_trial", "t_next", "n_steps", "n_accepted")


class TestSameDecisions:
    @settings(max_examples=200, deadline=None)
    @given(
        controller=controllers(),
        gaps=st.lists(st.floats(1e-3, 2.0), min_size=1, max_size=6),
        cuts=st.lists(st.floats(0.01, 0.99), max_size=3),
        start=st.floats(-3.0, 3.0),
        sign=st.sampled_from([1.0, -1.0]),
        h=st.floats(1e-6, 10.0),
        ratios=st.lists(error_ratios, min_size=1, max_size=40),
    )
    def test_python_and_cpp(
        self,
        controller: Controller,
        gaps: list[float],
        cuts: list[float],
        start: float,
        sign: float,
        h: float,
        ratios: list[float],
    ) -> None:
        times = [start]
        for gap in gaps:
            times.append(times[-1] + sign * gap)
        inner = {start + cut * (times[-1] - start) for cut in cuts} - {start, times[-1]}
        stops = [*sorted(inner, reverse=sign < 0), times[-1]]
        one, other = (kind(controller, 30, times, stops) for kind in KINDS)
        one.h = other.h = h
        for ratio in ratios:
            for control in (one, other):
                control.propose()
            assert_same(one, other)
            if one.status != "running":
                break
            for control in (one, other):
                control.judge(ratio)
            assert_same(one, other)
            if one.is_accepted:
                assert one.due == other.due
                assert [one.position(i) for i in range(*one.due)] == [other.position(i) for i in range(*other.due)]
            if one.status == "done":
                break

    @settings(max_examples=100, deadline=None)
    @given(controller=controllers(), data=st.data())
    def test_one_solve_and_many(self, controller: Controller, data: st.DataObject) -> None:
        count, n_trials = 4, 6
        numbers = lambda of, n: data.draw(st.lists(of, min_size=n, max_size=n))  # noqa: E731
        ends = np.array(numbers(st.one_of(st.floats(0.1, 9.0), st.floats(-9.0, -0.1)), count))
        times = np.stack([np.zeros(count), 0.4 * ends, ends], 1)
        norm_y, norm_f, change = (np.array(numbers(st.floats(0, 1e9), count)) for _ in range(3))
        batch = batch_control_for(controller, 4, times)
        batch.propose_euler_steps(norm_y, norm_f)
        batch.choose_first_steps(change)
        singles = [StepControl(controller, 4, row.tolist(), row[2:].tolist()) for row in times]
        for i, single in enumerate(singles):
            single.h = controller.initial(abs(ends[i]), norm_y[i], norm_f[i], lambda h, i=i: float(change[i]))
        for _ in range(n_trials):
            batch.propose()
            ratios = numbers(error_ratios, count)
            for i, single in enumerate(singles):
                if single.status != "running":
                    assert (batch.h_trial[i], batch.t_next[i]) == (0.0, single.t)
                    continue
                single.propose()
                assert (STATUSES[batch.status[i]], batch.t_next[i], batch.h_trial[i]) == (
                    single.status,
                    single.t_next,
                    single.h_trial,
                )
                if single.status == "running":
                    single.judge(ratios[i])
            batch.judge(np.array(ratios))
            for i, single in enumerate(singles):
                if single.n_steps:
                    assert (STATUSES[batch.status[i]], batch.t[i], batch.h[i]) == (single.status, single.t, single.h)
                if batch.is_accepted[i]:
                    assert (batch.first_due[i], batch.end_due[i]) == single.due


def assert_same(one: Any, other: Any) -> None:
    for name in STATE:
        a, b = getattr(one, name), getattr(other, name)
        assert a == b or (a != a and b != b), name
