"""Controlled differential equations: solutions, steps, gradients, engines, arguments, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

import aca_ext
from aca_ext import Interpolation, cdeint, errors
from aca_ext.controls import cdeint as module

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

SPLINES = ("linear", "cubic", "hermite")
HIDDEN, CHANNELS, BATCH = 4, 3, 5
T = torch.tensor([0.0, 0.2, 0.35, 0.6, 0.8, 1.0], dtype=torch.float64)
EXACT: dict[str, Any] = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-13}  # dopri5 takes ten times as many steps


class Field(nn.Module):
    def __init__(self, hidden: int = HIDDEN, channels: int = CHANNELS) -> None:
        super().__init__()
        self.shape = hidden, channels
        self.net = nn.Sequential(nn.Linear(hidden, hidden * channels), nn.Tanh()).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z).unflatten(-1, self.shape)


class Product(Field):
    """The same field as a product with dX/dt."""

    def prod(self, t: Tensor, z: Tensor, speed: Tensor) -> Tensor:
        return (self(t, z) @ speed.unsqueeze(-1)).squeeze(-1)


def data(missing: float = 0.0) -> Tensor:
    x = torch.randn(BATCH, len(T), CHANNELS, dtype=torch.float64)
    x[torch.rand(x.shape) < missing] = float("nan")
    return x


def start() -> Tensor:
    return torch.randn(BATCH, HIDDEN, dtype=torch.float64)


@pytest.fixture
def solutions(monkeypatch: pytest.MonkeyPatch) -> list[aca_ext.Solution]:
    """The solutions behind the calls of cdeint, filled in by each."""
    found: list[aca_ext.Solution] = []

    def solve(*args: Any, **settings: Any) -> Any:
        found.append(aca_ext.solve(*args, **settings))
        return found[-1].y

    monkeypatch.setattr(module, "odeint", solve)
    return found


class TestSolution:
    @pytest.mark.parametrize("kind", SPLINES)
    def test_of_a_linear_equation(self, kind: str) -> None:
        """dz = dX has the solution z0 + X(t) - X(0); dz = z dX has z0·exp(X(t) - X(0))."""
        x = data(missing=0.3)[..., :1]
        path, z0 = Interpolation(T, x, kind), start()
        t = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)
        change = path.evaluate(t) - path.evaluate(t[:1])
        added = cdeint(path, lambda t, z: torch.ones_like(z).unsqueeze(-1), z0, t, rtol=1e-9, atol=1e-9)
        assert added.shape == (BATCH, 7, HIDDEN)
        assert relative_error(added, z0.unsqueeze(-2) + change) <= 1e-8
        grown = cdeint(path, lambda t, z: z.unsqueeze(-1), z0, t, rtol=1e-9, atol=1e-9)
        assert relative_error(grown, z0.unsqueeze(-2) * change.exp()) <= 1e-7

    def test_with_prod_is_the_same(self) -> None:
        field = Product()
        path, z0 = Interpolation(T, data(), "cubic"), start()
        found = cdeint(path, field, z0, T)
        assert torch.equal(found, cdeint(path, lambda t, z: field(t, z), z0, T))

    def test_of_tuples(self) -> None:
        paths = (
            Interpolation(T, data()),
            Interpolation([0.0, 0.5, 1.0], torch.randn(3, 1, dtype=torch.float64), "cubic"),
        )
        z0 = start(), torch.randn(2, dtype=torch.float64)
        one, other = Field(), Field(2, 1)
        found = cdeint(paths, lambda t, z: (one(t, z[0]), other(t, z[1])), z0, T[[0, -1]], rtol=1e-9, atol=1e-10)
        assert relative_error(found[0], cdeint(paths[0], one, z0[0], T[[0, -1]], rtol=1e-9, atol=1e-10)) <= 1e-8
        assert relative_error(found[1], cdeint(paths[1], other, z0[1], T[[0, -1]], rtol=1e-9, atol=1e-10)) <= 1e-8

    def test_backward_in_time(self) -> None:
        path, field, z0 = Interpolation(T, data()), Field(), start()
        end = cdeint(path, field, z0, T[[0, -1]], rtol=1e-10, atol=1e-10)[:, -1]
        assert relative_error(cdeint(path, field, end, T[[-1, 0]], rtol=1e-10, atol=1e-10)[:, -1], z0) <= 1e-8


class TestSteps:
    @pytest.mark.parametrize("kind", SPLINES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_end_at_the_knots(self, solutions: list[Any], kind: str, dtype: torch.dtype) -> None:
        path = Interpolation(T, data().to(dtype), kind)
        cdeint(path, Field().to(dtype), start().to(dtype), path.interval)
        assert set(T.tolist()) <= set(solutions[0].steps[:, 0].tolist()) | {1.0}

    def test_on_lines_are_never_rejected_for_a_jump(self, solutions: list[Any]) -> None:
        """dz = dX on a linear path has constant slopes, so that a step per piece is exact: none sees another piece."""
        path = Interpolation(T, data().sum(-1, keepdim=True).float())
        cdeint(
            path,
            lambda t, z: torch.ones_like(z).unsqueeze(-1),
            start().float(),
            path.interval,
            options={"first_step": 1},
        )
        stats = solutions[0].stats
        assert (stats.n_accepted, stats.n_rejected) == (len(T) - 1, 0)

    @pytest.mark.parametrize("options", [{"jump_t": None}, {"step_t": None}])
    def test_pass_the_knots_on_request(self, solutions: list[Any], options: dict[str, Any]) -> None:
        path = Interpolation(T, data(), "cubic")
        cdeint(path, Field(), start(), path.interval, options=options)
        assert not set(T[1:-1].tolist()) & set(solutions[0].steps[:, 0].tolist())

    def test_of_fixed_size_see_each_piece_alone(self) -> None:
        """A step of rk4 on each line is exact for dz = dX."""
        x = torch.randn(BATCH, 5, 1, dtype=torch.float64)
        path, z0 = Interpolation(torch.arange(5.0, dtype=torch.float64), x), start()
        found = cdeint(path, lambda t, z: torch.ones_like(z).unsqueeze(-1), z0, path.grid_points, method="rk4")
        assert relative_error(found, z0.unsqueeze(-2) + x - x[:, :1]) <= 1e-14


class TestGradients:
    @pytest.mark.parametrize("kind", SPLINES)
    @pytest.mark.parametrize("settings", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=["dopri5", "rk4"])
    def test_of_aca_are_those_of_the_graph(self, kind: str, settings: dict[str, Any]) -> None:
        field, z0, x = Field(), start().requires_grad_(), data(missing=0.2).requires_grad_()
        wanted = [z0, x, *field.parameters()]
        weight = torch.randn(BATCH, 3, HIDDEN, dtype=torch.float64)
        found = []
        for adjoint in (True, False):
            path = Interpolation(T, x, kind)
            z = cdeint(path, field, z0, T[[0, 2, 5]], adjoint=adjoint, **settings)
            found.append(torch.autograd.grad((z * weight).sum(), wanted))
        for one, other in zip(*found, strict=True):
            assert float(one.abs().max()) > 1e-3
            assert relative_error(one, other) <= 1e-12

    @pytest.mark.parametrize("kind", SPLINES)
    def test_of_the_data_are_finite_differences(self, kind: str) -> None:
        field, z0, x = Field(), start(), data()

        def end(x: Tensor) -> Tensor:
            return cdeint(Interpolation(T, x, kind), field, z0, T[[0, -1]], **EXACT)[:, -1].square().sum()

        x.requires_grad_()
        (grad,) = torch.autograd.grad(end(x), x)
        direction = torch.randn_like(x)
        with torch.no_grad():
            difference = (end(x + 1e-5 * direction) - end(x - 1e-5 * direction)) / 2e-5
        assert abs(float((grad * direction).sum() - difference)) <= 1e-7 * float(difference.abs())

    @pytest.mark.parametrize("kind", ["cubic", "hermite"])
    def test_of_the_knots_are_finite_differences(self, kind: str) -> None:
        field, z0, x = Field(), start(), data()

        def end(t: Tensor) -> Tensor:
            return cdeint(Interpolation(t, x, kind), field, z0, T[[0, -1]], **EXACT)[:, -1].square().sum()

        t = T.clone().requires_grad_()
        (grad,) = torch.autograd.grad(end(t), t)
        direction = torch.tensor([0.0, 1.0, -0.5, 0.3, 0.7, 0.0], dtype=torch.float64)
        with torch.no_grad():
            difference = (end(T + 1e-5 * direction) - end(T - 1e-5 * direction)) / 2e-5
        assert abs(float((grad * direction).sum() - difference)) <= 1e-6 * float(difference.abs())

    def test_through_a_path_that_is_a_solution(self) -> None:
        field, other, x = Field(), Field(2, HIDDEN), data().requires_grad_()
        found = []
        for adjoint in (True, False):
            first = cdeint(Interpolation(T, x), field, torch.ones(BATCH, HIDDEN, dtype=torch.float64), T, adjoint)
            second = cdeint(
                Interpolation(T, first, "cubic"), other, torch.ones(BATCH, 2, dtype=torch.float64), T, adjoint
            )
            found.append(torch.autograd.grad(second[:, -1].sum(), [x, *field.parameters(), *other.parameters()]))
        assert all(relative_error(one, two) <= 1e-12 for one, two in zip(*found, strict=True))

    @pytest.mark.parametrize("kind", [*SPLINES, "constant"])
    def test_through_values_of_a_path_in_odeint(self, kind: str) -> None:
        z0, x = start(), data(missing=0.2)[..., :1].requires_grad_()
        found = []
        for gradient in ("aca", "direct"):
            path = Interpolation(T, x, kind)
            z = aca_ext.odeint(
                lambda t, z, path=path: (z * path.evaluate(t)).sin(),
                z0,
                path.interval,
                options=path.solver_options,
                gradient=gradient,
            )
            found.append(torch.autograd.grad(z[-1].square().sum(), x)[0])
        assert float(found[0].abs().max()) > 1e-3
        assert relative_error(*found) <= 1e-12

    @pytest.mark.parametrize("adjoint_params", [None, ()])
    def test_of_the_drop_in(self, adjoint_params: Any) -> None:
        """The continuous adjoint, close to the exact gradient at tight tolerance; without those left out."""
        field, z0, x = Field(), start().requires_grad_(), data().requires_grad_()
        wanted = [z0] if adjoint_params == () else [z0, x, *field.parameters()]
        settings = {"rtol": 1e-9, "atol": 1e-11}
        exact = cdeint(Interpolation(T, x, "cubic"), field, z0, T[[0, -1]], **settings)
        settings["adjoint_params"] = adjoint_params
        approximate = cdeint(Interpolation(T, x, "cubic"), field, z0, T[[0, -1]], backend="torchdiffeq", **settings)
        grads = [torch.autograd.grad(z[:, -1].sum(), wanted) for z in (exact, approximate)]
        errors = [relative_error(one, other) for one, other in zip(*grads, strict=True)]
        assert 1e-14 < max(errors) <= 1e-6


def test_a_neural_cde_learns() -> None:
    """The sign of the area that a path encloses with its chord, from a tenth of its points missing."""
    x = torch.randn(64, 8, 2).cumsum(1)
    time = torch.linspace(0.0, 1.0, 8)
    middle, step = (x[:, 1:] + x[:, :-1]) / 2 - x[:, :1], x.diff(dim=1)
    area = (middle[..., 0] * step[..., 1] - middle[..., 1] * step[..., 0]).sum(1)
    x[torch.rand(x.shape) < 0.1] = float("nan")
    path = Interpolation(time, torch.cat([time.expand(64, 8).unsqueeze(-1), x], dim=-1), "hermite")
    field, readout, initial = Field(8, 3).float(), nn.Linear(8, 1), nn.Linear(3, 8)
    optimizer = torch.optim.Adam([*field.parameters(), *readout.parameters(), *initial.parameters()], lr=0.03)
    losses = []
    for _ in range(25):
        z = cdeint(path, field, initial(path.evaluate(0.0)), path.interval, rtol=1e-2, atol=1e-3)
        loss = nn.functional.binary_cross_entropy_with_logits(readout(z[:, -1])[:, 0], (area > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


class TestEngines:
    def test_compiled_is_the_same(self, solutions: list[Any]) -> None:
        """One program of the whole solve, which a second path uses again."""
        field = Field()
        for i in range(2):
            z0, x = start().requires_grad_(), data(missing=0.1).requires_grad_()
            wanted = [z0, x, *field.parameters()]
            found = []
            for engine in ("compiled", "eager"):
                z = cdeint(Interpolation(T, x, "cubic"), field, z0, T[[0, -1]], engine=engine)
                found.append((z, *torch.autograd.grad(z[:, -1].square().sum(), wanted)))
            assert all(relative_error(one, other) <= 1e-11 for one, other in zip(*found, strict=True))
            assert solutions[2 * i].stats.compiled == "solve"
        assert solutions[2].stats.compile_seconds == 0

    @pytest.mark.parametrize("engine", ["eager", "compiled"])
    def test_independent_samples_take_the_steps_of_each_alone(self, solutions: list[Any], engine: str) -> None:
        t = T[:4] / T[3]
        z0, x, weight = start().requires_grad_(), data()[:, :4, :2].detach().requires_grad_(), Field(HIDDEN, 2)
        wanted = [z0, x, *weight.parameters()]
        options = {"batch": "independent"}
        z = cdeint(Interpolation(t, x, "hermite"), weight, z0, t[[0, -1]], options=options, engine=engine)
        stop = {} if engine == "compiled" else {"options": {"step_t": None}}
        alone = [cdeint(Interpolation(t, x[i], "hermite"), weight, z0[i], t[[0, -1]], **stop) for i in range(BATCH)]
        assert solutions[0].stats.n_accepted.tolist() == [solution.stats.n_accepted for solution in solutions[1:]]
        assert relative_error(z, torch.stack(alone)) <= 1e-11
        grads = [torch.autograd.grad(z[..., -1, :].square().sum(), wanted) for z in (z, torch.stack(alone))]
        assert all(relative_error(one, other) <= 1e-10 for one, other in zip(*grads, strict=True))

    def test_inside_torch_func(self) -> None:
        path, field = Interpolation(T, data(), "cubic"), Field()
        z0 = start()
        settings = {"rtol": 1e-9, "atol": 1e-11}
        grad = torch.func.grad(lambda z0: cdeint(path, field, z0, T[[0, -1]], **settings)[:, -1].sum())(z0)
        z0.requires_grad_()
        (expected,) = torch.autograd.grad(cdeint(path, field, z0, T[[0, -1]], **settings)[:, -1].sum(), z0)
        assert relative_error(grad, expected) <= 1e-7


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"X": torch.ones(3)}, errors.ArgumentTypeError, "no method derivative"),
            ({"X": Interpolation(T, torch.ones(6, 3), "constant")}, errors.ArgumentValueError, "X.solver_options"),
            (
                {"X": Interpolation(T.clone().requires_grad_(), torch.ones(6, 3))},
                errors.ArgumentValueError,
                "the knots of X require grad",
            ),
            ({"backend": "torchsde"}, errors.ArgumentValueError, "there are 'aca_ext', 'torchdiffeq'"),
            ({"func": lambda t, z: z}, errors.SlopeError, r"the result of func has shape \(5, 4\), which does not fit"),
            ({"func": lambda t, z: z.unsqueeze(-1)}, errors.SlopeError, r"with 1 channels last, but the control has 3"),
            ({"func": lambda t, z: [z]}, errors.SlopeError, "the result of func is of type list"),
            ({"z0": torch.ones(2, 4, dtype=torch.float64)}, errors.SlopeError, "derivative of the control has shape"),
            ({"z0": torch.ones(5, 4)}, errors.SlopeError, "the derivative of the control is of dtype torch.float64"),
            ({"z0": (start(), start())}, errors.SlopeError, "the derivative of the control a Tensor"),
            (
                {"X": Interpolation(T, torch.ones(6, 3)), "options": {"batch": "independent"}},
                errors.OptionError,
                "X has no samples",
            ),
            (
                {"X": Interpolation(T, torch.ones(2, 6, 3)), "options": {"batch": "independent"}},
                errors.OptionError,
                "X has 2 samples",
            ),
            (
                {"X": [Interpolation(T, torch.ones(2, 6, 3))] * 2, "options": {"batch": "independent"}},
                errors.OptionError,
                "independent samples need",
            ),
            ({"event_fn": lambda t, z: z.sum()}, errors.ArgumentValueError, "event_fn has no place"),
            ({"output_fn": lambda t, z: z.sum()}, errors.ArgumentValueError, "output_fn has no place"),
            ({"method": 5}, errors.UnknownNameError, "5"),
            ({"rtol": -1.0}, errors.ToleranceError, "rtol"),
            ({"method": "dopri"}, errors.UnknownNameError, "dopri"),
        ],
    )
    def test_say_what_is_wrong(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        given = {"X": Interpolation(T, data()), "func": Field(), "z0": start(), "t": T} | change
        with pytest.raises(error, match=message):
            cdeint(**given)

    def test_of_prod(self) -> None:
        field = Product()
        field.prod = lambda t, z, speed: speed  # type: ignore[method-assign]
        with pytest.raises(errors.SlopeError, match=r"func.prod has shape \(5, 3\), which does not fit z"):
            cdeint(Interpolation(T, data()), field, start(), T)
