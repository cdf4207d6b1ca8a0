"""Step-size controller on plain numbers: growth, shrinkage, limits, and the first step by Hairer's rule."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aca_ext.numerics.controller import Controller

ratios = st.floats(1e-12, 1.0)
orders = st.integers(1, 8)


class TestGrow:
    @pytest.mark.parametrize(
        ("order", "ratio", "factor"), [(5, 0.9**5 / 2**5, 2.0), (3, 0.9**3 / 1.5**3, 1.5), (1, 0.45, 2.0)]
    )
    def test_makes_the_next_error_the_tolerance_with_a_margin(self, order: int, ratio: float, factor: float) -> None:
        assert Controller(order).grow(0.25, [ratio]) == pytest.approx(0.25 * factor, rel=1e-7)

    def test_at_most_by_ifactor(self) -> None:
        assert Controller(5).grow(0.5, [1e-30]) == 5.0
        assert Controller(5, ifactor=3.0).grow(0.5, [1e-30]) == 1.5

    def test_does_not_shrink_after_an_accepted_step(self) -> None:
        assert Controller(5).grow(0.5, [1.0]) == 0.5
        assert Controller(5).grow(0.5, [0.99]) == 0.5

    def test_safety(self) -> None:
        assert Controller(2, safety=0.5).grow(1.0, [0.01]) == pytest.approx(0.5 / 0.01**0.5, rel=1e-7)

    @pytest.mark.parametrize("memory", [{}, {"pcoeff": 0.3}, {"pcoeff": 0.3, "dcoeff": 0.1}])
    def test_without_error_grows_by_ifactor(self, memory: dict[str, float]) -> None:
        controller = Controller(5, **memory)
        assert controller.grow(0.5, [0.0]) == 5.0
        assert controller.grow(0.5, [0.0, 0.5, 0.5]) == 5.0

    def test_stays_within_the_limits(self) -> None:
        controller = Controller(5, min_step=0.1, max_step=0.6)
        assert controller.grow(0.5, [1e-30]) == 0.6
        assert controller.grow(0.01, [1.0]) == 0.1

    @given(h=st.floats(1e-6, 1e6), ratio=ratios, order=orders)
    def test_factor_lies_between_1_and_ifactor(self, h: float, ratio: float, order: int) -> None:
        assert h <= Controller(order).grow(h, [ratio]) <= 10 * h

    @given(one=ratios, other=ratios, order=orders)
    def test_a_smaller_error_never_gives_a_smaller_step(self, one: float, other: float, order: int) -> None:
        controller = Controller(order)
        assert controller.grow(1.0, [min(one, other)]) >= controller.grow(1.0, [max(one, other)])


class TestPid:
    PID = Controller(4, safety=0.9, pcoeff=0.2, icoeff=0.7, dcoeff=0.1)

    def test_exponents_of_the_last_three_errors(self) -> None:
        e0, e1, e2 = 0.3, 0.2, 0.6
        factor = 0.9 * e0 ** (-(0.2 + 0.7 + 0.1) / 4) * e1 ** ((0.2 + 2 * 0.1) / 4) * e2 ** (-0.1 / 4)
        assert 1.0 < factor < 10.0
        assert self.PID.grow(0.5, [e0, e1, e2]) == pytest.approx(0.5 * factor, rel=1e-7)

    def test_uses_the_errors_there_are(self) -> None:
        assert self.PID.grow(1.0, [0.3]) == pytest.approx(0.9 * 0.3 ** (-1.0 / 4), rel=1e-7)
        assert self.PID.grow(1.0, [0.3, 0.2]) == pytest.approx(0.9 * 0.3**-0.25 * 0.2**0.1, rel=1e-7)

    def test_pi_leaves_out_the_third(self) -> None:
        controller = Controller(5, pcoeff=0.4, icoeff=0.3)
        expected = 0.9 * 0.5 ** (-0.7 / 5) * 0.1 ** (0.4 / 5)
        assert controller.grow(1.0, [0.5, 0.1, 0.0]) == pytest.approx(expected, rel=1e-7)

    def test_may_shrink_but_not_below_dfactor(self) -> None:
        controller = Controller(1, pcoeff=1.0, icoeff=1.0)
        assert controller.grow(1.0, [1.0, 0.5]) == pytest.approx(0.9 * 0.5, rel=1e-7)
        assert controller.grow(1.0, [1.0, 1e-9]) == 0.2

    def test_only_p_and_d_need_a_memory(self) -> None:
        assert not Controller(5, icoeff=0.3).has_memory
        assert Controller(5, pcoeff=0.1).has_memory
        assert Controller(5, dcoeff=-0.1).has_memory

    def test_a_perfect_step_two_steps_ago_is_no_division_by_zero(self) -> None:
        assert math.isfinite(self.PID.grow(1.0, [0.5, 0.5, 0.0]))


class TestShrink:
    @pytest.mark.parametrize(("order", "ratio"), [(5, 2.0), (3, 10.0), (2, 1.5), (1, 4.0)])
    def test_by_the_order_of_the_error(self, order: int, ratio: float) -> None:
        assert Controller(order).shrink(0.5, ratio) == pytest.approx(0.5 * 0.9 * ratio ** (-1 / order), rel=1e-7)

    def test_at_most_by_dfactor(self) -> None:
        assert Controller(5).shrink(0.5, 1e30) == 0.1
        assert Controller(5, dfactor=0.5).shrink(0.5, 1e30) == 0.25

    @pytest.mark.parametrize("ratio", [math.nan, math.inf])
    def test_by_dfactor_where_the_error_tells_nothing(self, ratio: float) -> None:
        assert Controller(5, dfactor=0.3).shrink(0.5, ratio) == 0.5 * 0.3

    def test_does_not_depend_on_the_pid_coefficients(self) -> None:
        assert TestPid.PID.shrink(1.0, 3.0) == Controller(4).shrink(1.0, 3.0)

    @given(h=st.floats(1e-6, 1e6), ratio=st.floats(1.0, allow_infinity=True, exclude_min=True), order=orders)
    def test_always_shrinks(self, h: float, ratio: float, order: int) -> None:
        assert 0.2 * h <= Controller(order).shrink(h, ratio) <= 0.9 * h


class TestInitial:
    @staticmethod
    def never(h: float) -> float:
        raise AssertionError("the slope was evaluated")

    def test_by_hand(self) -> None:
        # d0 = 2, d1 = 4: h0 = 0.01·2/4 = 0.005; d2 = 0.1/0.005 = 20; h1 = (0.01/20)^(1/5) = 0.2187, at most 100·h0.
        asked: list[float] = []

        def change_of_slope(h: float) -> float:
            asked.append(h)
            return 0.1

        assert Controller(5).initial(10.0, 2.0, 4.0, change_of_slope) == pytest.approx(0.0005**0.2, rel=1e-7)
        assert asked == [0.005]

    def test_takes_the_slope_where_it_changes_less(self) -> None:
        expected = (0.01 / 4.0) ** (1 / 3)
        assert Controller(3).initial(10.0, 2.0, 4.0, lambda h: 0.0) == pytest.approx(expected, rel=1e-7)

    def test_at_most_100_times_the_first_guess(self) -> None:
        assert Controller(5).initial(10.0, 1e-3, 1.0, lambda h: 0.0) == pytest.approx(1e-3, rel=1e-7)

    @pytest.mark.parametrize(("norm_y", "norm_f"), [(0.0, 1.0), (1.0, 0.0), (9e-6, 1.0), (1.0, 9e-6)])
    def test_starts_from_1e_6_where_state_or_slope_vanish(self, norm_y: float, norm_f: float) -> None:
        asked: list[float] = []

        def change_of_slope(h: float) -> float:
            asked.append(h)
            return 1e-6

        assert Controller(5).initial(10.0, norm_y, norm_f, change_of_slope) == pytest.approx(1e-4, rel=1e-7)
        assert asked == [1e-6]

    def test_where_nothing_moves(self) -> None:
        assert Controller(5).initial(10.0, 0.0, 0.0, lambda h: 0.0) == 1e-6
        assert Controller(5).initial(10.0, 1.0, 0.0, lambda h: 0.0) == 1e-6

    def test_not_beyond_the_interval(self) -> None:
        asked: list[float] = []

        def change_of_slope(h: float) -> float:
            asked.append(h)
            return 0.0

        assert Controller(5).initial(1e-3, 1.0, 1e-3, change_of_slope) == 1e-3
        assert asked == [1e-3]

    @pytest.mark.parametrize("change", [math.nan, math.inf])
    def test_starts_small_where_the_euler_step_leaves_the_domain(self, change: float) -> None:
        assert Controller(5).initial(10.0, 2.0, 4.0, lambda h: change) == 0.005

    def test_within_the_limits(self) -> None:
        assert Controller(5, max_step=0.01).initial(10.0, 2.0, 4.0, lambda h: 0.1) == 0.01
        assert Controller(5, min_step=0.5).initial(10.0, 2.0, 4.0, lambda h: 0.1) == 0.5

    def test_first_step_is_taken_as_it_is(self) -> None:
        assert Controller(5, first_step=0.125).initial(10.0, 2.0, 4.0, self.never) == 0.125


def test_limit() -> None:
    controller = Controller(5, min_step=0.1, max_step=0.6)
    assert [controller.limit(h) for h in (0.01, 0.1, 0.3, 0.6, 7.0)] == [0.1, 0.1, 0.3, 0.6, 0.6]
    assert Controller(5).limit(1e300) == 1e300
