"""Paths through data: values, missing values, derivatives, gradients, errors."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from aca_ext import Interpolation, errors
from aca_ext.controls.tridiagonal import solve_tridiagonal

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

KINDS = ("linear", "cubic", "hermite", "constant")
NAN = float("nan")
T = torch.tensor([-1.0, 0.5, 0.75, 2.0, 2.25, 4.0, 4.5, 5.0], dtype=torch.float64)
L = len(T)
INNER = torch.tensor([-0.3, 0.6, 1.1, 1.9, 2.1, 3.0, 4.2, 4.9], dtype=torch.float64)


def values(*batch: int, missing: float = 0.0) -> Tensor:
    x = torch.randn(*batch, L, 3, dtype=torch.float64)
    x[torch.rand(x.shape) < missing] = NAN
    return x


def is_close(one: Tensor, other: Any, tolerance: float = 1e-12) -> bool:
    other = torch.as_tensor(other, dtype=one.dtype)
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance)


class TestValues:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
    def test_go_through_the_data(self, kind: str, batch: tuple[int, ...]) -> None:
        x = values(*batch)
        assert is_close(Interpolation(T, x, kind).evaluate(T), x)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
    def test_have_the_shape_of_the_times(self, kind: str, shape: tuple[int, ...]) -> None:
        path = Interpolation(T, values(2, 5), kind)
        t = torch.rand(shape, dtype=torch.float64) * 5 - 0.5
        for found in (path.evaluate, path.derivative):
            assert found(t).shape == (2, 5, *shape, 3)
            each = torch.stack([found(one) for one in t.reshape(-1)], dim=-2).reshape(2, 5, *shape, 3)
            assert torch.equal(found(t), each)

    def test_linear_is_that_of_numpy(self) -> None:
        np = pytest.importorskip("numpy")
        x = values()
        expected = np.stack([np.interp(INNER, T, x[:, i]) for i in range(3)], axis=-1)
        assert is_close(Interpolation(T, x).evaluate(INNER), expected)

    @pytest.mark.parametrize("order", [0, 1])
    def test_cubic_is_that_of_scipy(self, order: int) -> None:
        scipy = pytest.importorskip("scipy.interpolate")
        x = values(4)
        path = Interpolation(T, x, "cubic")
        expected = scipy.CubicSpline(T, x, axis=1, bc_type="natural")(INNER, order)
        assert is_close((path.evaluate, path.derivative)[order](INNER), expected)

    def test_cubic_of_a_long_path_is_that_of_scipy(self) -> None:
        scipy = pytest.importorskip("scipy.interpolate")
        t = torch.rand(1000, dtype=torch.float64).add(1e-3).cumsum(0)
        x = torch.randn(1000, 1, dtype=torch.float64)
        t_inner = (t[1:] + t[:-1]) / 2
        expected = torch.tensor(scipy.CubicSpline(t, x, bc_type="natural")(t_inner))
        # Times 1e-3 apart divide by 1e-6, which the differences of values do not bear to the last digit.
        assert is_close(Interpolation(t, x, "cubic").evaluate(t_inner), expected, 1e-10 * float(expected.abs().max()))

    def test_hermite_has_the_slopes_of_the_lines_before(self) -> None:
        scipy = pytest.importorskip("scipy.interpolate")
        x = values()
        slopes = x.diff(dim=0) / T.diff()[:, None]
        expected = scipy.CubicHermiteSpline(T, x, torch.cat([slopes[:1], slopes]), axis=0)(INNER)
        assert is_close(Interpolation(T, x, "hermite").evaluate(INNER), expected)

    def test_hermite_does_not_see_values_beyond_the_next(self) -> None:
        x = values()
        changed = x.clone()
        changed[5:] += 1.0
        before = T[4] - 1e-3
        assert torch.equal(
            Interpolation(T, x, "hermite").evaluate(before), Interpolation(T, changed, "hermite").evaluate(before)
        )

    def test_constant_changes_at_the_knots(self) -> None:
        x = values()
        path = Interpolation(T, x, "constant")
        assert torch.equal(path.evaluate(T + 0.1), x)
        assert torch.equal(path.evaluate(T[1:] - 1e-9), x[:-1])
        assert torch.equal(path.derivative(INNER), torch.zeros(8, 3, dtype=torch.float64))

    @pytest.mark.parametrize("kind", ["linear", "cubic", "hermite"])
    def test_two_values_make_a_line_that_goes_on(self, kind: str) -> None:
        x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
        path = Interpolation([0.0, 1.0], x, kind)
        t = torch.linspace(-1.0, 2.0, 7, dtype=torch.float64)
        assert is_close(path.evaluate(t)[:, 0], 1 + 2 * t)
        assert is_close(path.derivative(t), torch.full((7, 1), 2.0))

    def test_times_finer_than_the_values(self) -> None:
        start = 1.7e9
        t = start + torch.arange(4, dtype=torch.float64) / 64
        path = Interpolation(t, torch.tensor([[0.0], [1.0], [2.0], [3.0]]), "cubic")
        assert path.evaluate(t[2]).dtype is torch.float32
        assert is_close(path.evaluate(t[2] + 1 / 128), torch.tensor([2.5]), 1e-6)
        assert is_close(path.derivative(t[1]), torch.tensor([64.0]), 1e-3)


class TestMissingValues:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_each_channel_are_left_out(self, kind: str) -> None:
        """Against a path of each channel through its observations alone, constant at the ends."""
        x = values(20, missing=0.4)
        path = Interpolation(T, x, kind).evaluate(INNER)
        for row, found in zip(x.transpose(1, 2).flatten(0, 1), path.transpose(1, 2).flatten(0, 1), strict=True):
            known = (~row.isnan()).nonzero().flatten()
            if len(known) == 0:
                assert torch.equal(found, torch.zeros(len(INNER), dtype=torch.float64))
                continue
            row = row.clone()
            row[: known[0]], row[known[-1] :] = row[known[0]], row[known[-1]]
            kept = ~row.isnan()
            times, row = T[kept], row[kept][:, None]
            if kind == "hermite":  # whose missing values are on lines first
                times, row = T, Interpolation(times, row).evaluate(T)
            assert is_close(Interpolation(times, row, kind).evaluate(INNER)[:, 0], found)

    @pytest.mark.parametrize("kind", KINDS)
    def test_get_zero_as_gradient(self, kind: str) -> None:
        x = values(5, missing=0.5).requires_grad_()
        (grad,) = torch.autograd.grad(Interpolation(T, x, kind).evaluate(INNER).sum(), x)
        assert bool((grad[x.isnan()] == 0).all())
        assert bool(grad.isfinite().all())
        assert bool((grad[~x.isnan()] != 0).any())


class TestRectilinear:
    X = torch.tensor([[0.0, 5.0, 1.0], [0.5, NAN, 2.0], [2.0, 7.0, NAN]], dtype=torch.float64)

    def test_moves_the_time_first(self) -> None:
        """The knots are those of torchcde's linear_interpolation_coeffs(x, rectilinear=0)."""
        path = Interpolation.rectilinear(self.X)
        expected = [[0.0, 5, 1], [0.5, 5, 1], [0.5, 5, 2], [2.0, 5, 2], [2.0, 7, 2]]
        assert path.grid_points.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert path.evaluate(path.grid_points).tolist() == expected
        assert path.evaluate(0.5).tolist() == [0.25, 5.0, 1.0]
        assert path.derivative(1.5).tolist() == [0.0, 0.0, 1.0]

    def test_needs_no_future_value(self) -> None:
        x = values(4)
        other = torch.cat([x[:, :5], values(4)[:, 5:]], 1)
        times = torch.linspace(0, 8, 17)
        one, another = (Interpolation.rectilinear(x, -1).evaluate(times) for x in (x, other))
        assert torch.equal(one, another)

    def test_gradients(self) -> None:
        x = values(2).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: Interpolation.rectilinear(x, 1).evaluate(torch.tensor([0.3, 3.7], dtype=torch.float64)), x
        )

    @pytest.mark.parametrize(
        ("channel", "error", "message"),
        [
            (3, errors.ArgumentValueError, "time_channel is 3, but x has 3 channels"),
            (-4, errors.ArgumentValueError, "time_channel is -4"),
            (1.0, errors.ArgumentTypeError, "time_channel is of type float"),
        ],
    )
    def test_refuses_other_channels(self, channel: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Interpolation.rectilinear(self.X, channel)


class TestDerivatives:
    @pytest.mark.parametrize("kind", KINDS)
    def test_are_those_of_the_values(self, kind: str) -> None:
        path = Interpolation(T, values(2, missing=0.2), kind)
        h = 1e-6
        difference = (path.evaluate(INNER + h) - path.evaluate(INNER - h)) / (2 * h)
        assert is_close(path.derivative(INNER), difference, 1e-7)

    @pytest.mark.parametrize("kind", ["linear", "cubic", "hermite"])
    def test_by_autograd(self, kind: str) -> None:
        path = Interpolation(T, values(), kind)
        t = INNER.clone().requires_grad_()
        for channel in range(3):
            (grad,) = torch.autograd.grad(path.evaluate(t)[:, channel].sum(), t)
            assert is_close(path.derivative(INNER)[:, channel], grad)

    @pytest.mark.parametrize("kind", KINDS)
    def test_of_values_and_knots(self, kind: str) -> None:
        x, t = values(missing=0.2).requires_grad_(), T.clone().requires_grad_()
        known = ~x.detach().isnan()

        def of(observed: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            path = Interpolation(t, torch.full_like(x, NAN).masked_scatter(known, observed), kind)
            return path.evaluate(INNER), path.derivative(INNER)

        observed = x.detach()[known].requires_grad_()
        assert torch.autograd.gradcheck(of, (observed, t))
        if kind != "constant":
            assert torch.autograd.gradgradcheck(of, (observed, t))

    def test_at_a_knot_are_those_of_the_piece_before(self) -> None:
        x = values()
        slopes = x.diff(dim=0) / T.diff()[:, None]
        assert torch.equal(Interpolation(T, x).derivative(T[1:]), slopes)


class TestModule:
    def test_names_its_times(self) -> None:
        path = Interpolation(T, values(2))
        assert torch.equal(path.grid_points, T)
        assert torch.equal(path.interval, T[[0, -1]])
        assert "x of shape (2, 8, 3), kind='linear'" in repr(path)

    @pytest.mark.parametrize(
        ("kind", "option"), [("linear", "jump_t"), ("constant", "jump_t"), ("cubic", "step_t"), ("hermite", "step_t")]
    )
    def test_tells_solvers_its_knots(self, kind: str, option: str) -> None:
        assert Interpolation(T, values(), kind).solver_options == {option: tuple(T.tolist())}

    def test_rounds_its_knots_with_its_tensors(self) -> None:
        t = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)
        path = Interpolation(t, torch.rand(4, 1, dtype=torch.float64)).float()
        assert path.grid_points.dtype is torch.float32
        assert path.solver_options["jump_t"] == tuple(t.float().tolist())
        assert path.evaluate(0.5).dtype is torch.float32

    def test_has_no_state_and_can_be_pickled(self) -> None:
        path = Interpolation(T, values(), "cubic")
        assert not path.state_dict()
        assert not list(path.parameters())
        copy = pickle.loads(pickle.dumps(path))
        assert torch.equal(copy.evaluate(INNER), path.evaluate(INNER))

    def test_in_vmap_and_jacfwd(self) -> None:
        x = values(4)
        t = torch.tensor(1.1, dtype=torch.float64)
        in_vmap = torch.func.vmap(lambda one: Interpolation(T, one, "cubic").evaluate(t))(x)
        assert is_close(in_vmap, Interpolation(T, x, "cubic").evaluate(t))
        path = Interpolation(T, x, "cubic")
        assert is_close(torch.func.jacfwd(path.evaluate)(t), path.derivative(t))

    def test_compiles_in_one_graph(self) -> None:
        path = Interpolation(T, values(2), "hermite")
        graph = torch.compile(path.derivative, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(INNER[0]), path.derivative(INNER[0]))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((T, [[1.0]]), errors.ArgumentTypeError, "x is of type list"),
            ((T, torch.ones(L, 2, dtype=torch.int64)), errors.ArgumentTypeError, "x is of dtype torch.int64"),
            ((T, torch.ones(L, 2, dtype=torch.complex64)), errors.ArgumentTypeError, "x is of dtype torch.complex64"),
            ((T, torch.ones(L)), errors.ArgumentValueError, r"x has shape \(8,\)"),
            ((T[:1], torch.ones(1, 2)), errors.ArgumentValueError, r"L ≥ 2"),
            ((T, torch.ones(2, 3)), errors.ArgumentValueError, "t has 8 times, but x"),
            ((T.flip(0), torch.ones(L, 2)), errors.TimeError, "decrease"),
            (([0.0, 0.0], torch.ones(2, 2)), errors.TimeError, "t"),
            (([0.0, NAN], torch.ones(2, 2)), errors.TimeError, "t"),
            ((T, torch.ones(L, 2), "cubics"), errors.UnknownNameError, "Did you mean 'cubic'"),
        ],
    )
    def test_say_what_is_wrong(self, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Interpolation(*arguments)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_tridiagonal_systems(n: int) -> None:
    lower, upper, right = torch.randn(3, 5, n, dtype=torch.float64).unbind()
    diagonal = lower.abs() + upper.abs() + 1
    lower[:, 0], upper[:, -1] = 0.0, 0.0
    matrix = torch.diag_embed(diagonal)
    if n > 1:
        matrix += torch.diag_embed(lower[:, 1:], -1) + torch.diag_embed(upper[:, :-1], 1)
    assert is_close(solve_tridiagonal(lower, diagonal, upper, right), torch.linalg.solve(matrix, right))
