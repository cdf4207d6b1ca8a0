"""Arguments that the kernels refuse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from operands import Operands, kernels
from torch import Tensor

from aca_ext import _C


class TestExtensionRefuses:
    """A call on raw addresses can be checked for its counts, names and bounds only."""

    X = torch.zeros(8, dtype=torch.float64)

    @staticmethod
    def target(backend: str = "cpu", dtype: str = "float64", threads: int = 1) -> _C.Target:
        return _C.Target(backend, dtype, threads, 0, 0, 0)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"dtype": "float16"},
            {"dtype": ""},
            {"backend": "tpu"},
            {"backend": ""},
            {"threads": 0},
            {"threads": -1},
        ],
        ids=str,
    )
    def test_targets(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"no kernels for dtype|no backend|threads"):
            self.target(**wrong)  # type: ignore[arg-type]

    @pytest.mark.skipif(_C.HAS_CUDA, reason="the build has CUDA kernels")
    def test_a_backend_that_was_not_built(self) -> None:
        with pytest.raises(ValueError, match="cuda"):
            self.target(backend="cuda")

    @pytest.mark.parametrize(("n_x", "n_w"), [(0, 0), (17, 17), (2, 3), (3, 2), (1, 0)])
    def test_weighted_sum_counts(self, n_x: int, n_w: int) -> None:
        out = torch.full((8,), 7.0, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"1 to 16 entries|differ in length"):
            _C.weighted_sum(self.target(), 8, out.data_ptr(), 0, 1.0, [self.X.data_ptr()] * n_x, (1.0,) * n_w)
        assert out.tolist() == [7.0] * 8

    @pytest.mark.parametrize(("n_x", "n_b", "n_e"), [(0, 0, 0), (17, 17, 17), (2, 3, 2), (2, 2, 3), (2, 2, 1)])
    def test_solution_and_error_counts(self, n_x: int, n_b: int, n_e: int) -> None:
        y1, error = torch.zeros(2, 8, dtype=torch.float64)
        x = self.X.data_ptr()
        with pytest.raises(ValueError, match=r"1 to 16 entries|differ in length"):
            _C.solution_and_error(
                self.target(),
                8,
                y1.data_ptr(),
                error.data_ptr(),
                x,
                1.0,
                [x] * n_x,
                (1.0,) * n_b,
                (1.0,) * n_e,
            )

    @pytest.mark.parametrize(
        ("n", "x", "w", "error"),
        [
            (-1, [0], (1.0,), ValueError),
            (0, {0}, (1.0,), TypeError),
            (0, [0], iter([1.0]), TypeError),
            (0, [0], ("one",), TypeError),
            (0, ["address"], (1.0,), TypeError),
            (0, [-8], (1.0,), OverflowError),
            (0.5, [0], (1.0,), TypeError),
        ],
        ids=[
            "negative size",
            "set",
            "iterator",
            "text as weight",
            "text as address",
            "negative address",
            "fraction",
        ],
    )
    def test_operands(self, n: int, x: list[int], w: tuple[float, ...], error: type[Exception]) -> None:
        with pytest.raises(error):
            _C.weighted_sum(self.target(), n, 0, 0, 1.0, x, w)

    @pytest.mark.parametrize(
        "bounds",
        [
            pytest.param([0, 4, 3], id="decreasing"),
            pytest.param((0, 5, 8, 7), id="decreasing at the end"),
            pytest.param([4, 0], id="backward"),
            pytest.param([-1, 4], id="negative"),
            pytest.param([], id="none"),
            pytest.param([0] * 66, id="65 segments"),
        ],
    )
    def test_bounds(self, bounds: Sequence[int]) -> None:
        out = torch.full((70,), 7.0, dtype=torch.float64)
        with pytest.raises(ValueError, match="bounds"):
            self.ratio(bounds, out)
        assert out.tolist() == [7.0] * 70

    @pytest.mark.parametrize(("count", "length"), [(-1, 2), (2, -1)])
    def test_rows(self, count: int, length: int) -> None:
        with pytest.raises(ValueError, match="must not be negative"):
            _C.weighted_sum_rows(_C.Target("cpu", "float64", 1, 0, 0, 0), count, length, 0, 0, 0, [0], (1.0,))

    def test_one_tolerance_per_element_without_the_other(self) -> None:
        out = torch.zeros(1, dtype=torch.float64)
        for each in ((self.X.data_ptr(), 0), (0, self.X.data_ptr())):
            with pytest.raises(ValueError, match="both or neither"):
                self.ratio([0, 8], out, each)

    @pytest.mark.parametrize("count", [0, 17])
    def test_scalar_counts(self, count: int) -> None:
        with pytest.raises(ValueError, match="1 to 16"):
            _C.write_scalars(self.target(), self.X.data_ptr(), [0.0] * count)

    def ratio(self, bounds: Sequence[int], out: Tensor, each: tuple[int, int] = (0, 0)) -> None:
        x = self.X.data_ptr()
        _C.squared_error_ratio(self.target(), bounds, out.data_ptr(), x, 0, 0.0, x, x, 1.0, 1.0, *each)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [3, 16, 32])
@pytest.mark.parametrize("extra", [-1, 1])
def test_weights_of_another_count_are_refused(count: int, extra: int) -> None:
    x = Operands(5).many(count)
    with pytest.raises(ValueError, match=r"differ in length|1 to 16"):
        kernels(x[0]).weighted_sum(None, 1.0, x, (1.0,) * (count + extra))
