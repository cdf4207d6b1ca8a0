"""``aca_ext.torchdiffeq.odeint_adjoint`` beside torchdiffeq's, and SciPy's solvers in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import CoupledMlp, Mlp, sample
from torch import Tensor, nn

import aca_ext.torchdiffeq as ours
from aca_ext.errors import ArgumentValueError, NonFiniteError, SolveError

theirs = pytest.importorskip("torchdiffeq")
T = torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)


class WithUnused(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 5, dtype=torch.float64)


def gradients(of: Any, func: nn.Module, *, t: Tensor = T, is_tuple: bool = False, **how: Any) -> list[Tensor]:
    """Gradients of y0, t and the parameters of a loss on all states."""
    y0 = [sample(4, 3).requires_grad_(), sample(3, seed=1).requires_grad_()][: 1 + is_tuple]
    t = t.clone().requires_grad_()
    ys = of.odeint_adjoint(func, tuple(y0) if is_tuple else y0[0], t, **{"rtol": 1e-9, "atol": 1e-9, **how})
    loss = sum(part.square().sum() for part in (ys if is_tuple else [ys]))
    loss.backward()
    found = [x.grad for x in (*y0, t, *func.parameters())]
    assert all(grad is not None for grad in found)
    return found


def assert_same_gradients(func: type[nn.Module], tolerance: float = 1e-6, **how: Any) -> None:
    is_fixed = how.get("method") in ("euler", "rk4")
    for one, other in zip(gradients(ours, func(), **how), gradients(theirs, func(), **how), strict=True):
        if is_fixed and one.shape == how.get("t", T).shape:
            continue  # torchdiffeq integrates the gradient of t[0] with the same coarse steps; ours is -a·f
        if other.abs().max() == 0:
            assert one.abs().max() == 0
        else:
            assert relative_error(one, other) <= tolerance


class TestGradients:
    @pytest.mark.parametrize("t", [T, T.flip(0)])
    @pytest.mark.parametrize("is_tuple", [False, True])
    def test_of_adaptive_steps(self, t: Tensor, is_tuple: bool) -> None:
        assert_same_gradients(CoupledMlp if is_tuple else Mlp, t=t, is_tuple=is_tuple)

    @pytest.mark.parametrize("method", ["euler", "rk4"])
    def test_of_fixed_steps(self, method: str) -> None:
        assert_same_gradients(Mlp, 1e-10, method=method, options={"step_size": 0.125})

    def test_unused_parameters_get_zeros(self) -> None:
        assert_same_gradients(WithUnused)

    def test_only_the_given_params_get_gradients(self) -> None:
        for of in (ours, theirs):
            func, y0 = Mlp(), sample(4, 3).requires_grad_()
            first = next(func.parameters())
            of.odeint_adjoint(func, y0, T, adjoint_params=[first]).sum().backward()
            assert first.grad is not None
            assert [p.grad for p in func.parameters()][1:] == [None] * 3

    def test_without_params(self) -> None:
        found = []
        for of in (ours, theirs):
            y0 = sample(4, 3).requires_grad_()
            of.odeint_adjoint(lambda t, y: -y, y0, T, adjoint_params=()).sum().backward()
            found.append(y0.grad)
        assert relative_error(*found) <= 1e-6

    def test_a_captured_tensor_of_a_module_gets_its_gradient(self) -> None:
        context = torch.ones(3, dtype=torch.float64, requires_grad=True)

        class Net(Mlp):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                return super().forward(t, y) * context

        ours.odeint_adjoint(Net(), sample(4, 3), T).sum().backward()
        assert context.grad is not None

    @pytest.mark.parametrize("of", [ours, theirs], ids=["ours", "theirs"])
    def test_arguments_that_are_missing(self, of: Any) -> None:
        with pytest.raises(ValueError, match="adjoint_params"):
            of.odeint_adjoint(lambda t, y: -y, sample(4, 3), T)
        with pytest.raises(ValueError, match="adjoint_options"):
            of.odeint_adjoint(Mlp(), sample(4, 3), T, options={"min_step": 0}, adjoint_method="rk4")

    def test_list_tolerances(self) -> None:
        def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return -y[0], y[1]

        y0 = (sample(4, 3).requires_grad_(), torch.zeros(4, dtype=torch.float64))
        ys = ours.odeint_adjoint(func, y0, T, rtol=[1e-7, 1e20], atol=[1e-7, 1e20], adjoint_params=())
        ys[0][-1].sum().backward()
        assert y0[0].grad is not None
        assert relative_error(y0[0].grad, torch.full((4, 3), -1.5, dtype=torch.float64).exp()) <= 1e-5


class TestBackwardSolve:
    def test_norm_receives_the_parts(self) -> None:
        shapes: list[set[Any]] = []
        for of in (ours, theirs):
            shapes.append(set())

            def norm(parts: tuple[Tensor, ...]) -> Tensor:
                shapes[-1].add(tuple(part.shape for part in parts))
                return max(part.abs().max() for part in parts if part.numel())

            gradients(of, CoupledMlp(), is_tuple=True, adjoint_options={"norm": norm})
        assert shapes[0] == shapes[1]
        assert len(shapes[0]) == 1

    def test_norm_of_the_state_is_used_backward(self) -> None:
        seen = []

        def norm(y: Tensor) -> Tensor:
            seen.append(y.shape)
            return y.abs().max()

        func, y0 = Mlp(), sample(4, 3).requires_grad_()
        ys = ours.odeint_adjoint(func, y0, T, options={"norm": norm})
        seen.clear()
        ys.sum().backward()
        assert set(seen) == {(4, 3)}

    @pytest.mark.parametrize("norm", ["seminorm", None])
    def test_seminorm(self, norm: str | None) -> None:
        assert_same_gradients(Mlp, adjoint_options={} if norm is None else {"norm": norm})

    def test_grid_constructor_is_called_again(self) -> None:
        seen: list[list[float]] = []

        def grid(func: Any, y0: Any, t: Tensor) -> Tensor:
            seen.append(t.tolist())
            return torch.linspace(t[0], t[-1], 5, dtype=torch.float64)

        y0 = sample(4, 3).requires_grad_()
        how = {"method": "euler", "options": {"grid_constructor": grid}}
        ours.odeint_adjoint(Mlp(), y0, T, **how).sum().backward()
        assert seen == [[0.0, 0.5, 1.5], [1.5, 0.5], [0.5, 0.0]]
        assert_same_gradients(Mlp, 1e-10, t=T[:2], **how)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_callbacks(self, method: str) -> None:
        counts = []
        for of in (ours, theirs):
            func, calls = Mlp(), []
            func.callback_step_adjoint = lambda t0, y0, dt, calls=calls: calls.append(("step", float(t0), len(y0)))
            if method == "dopri5":
                func.callback_accept_step_adjoint = lambda t0, y0, dt, calls=calls: calls.append("accept")
                func.callback_reject_step_adjoint = lambda t0, y0, dt, calls=calls: calls.append("reject")
            options = {"step_size": 0.1} if method == "rk4" else None
            ys = of.odeint_adjoint(func, sample(4, 3), T[:2], method=method, options=options)
            assert calls == []
            ys.sum().backward()
            counts.append(calls)
        if method == "rk4":
            assert len(counts[0]) == len(counts[1]) == 5
            for one, other in zip(*counts, strict=True):
                assert one[2] == other[2] == 3 + 4
                assert one[1] == pytest.approx(other[1])
        else:
            steps = [call for call in counts[0] if not isinstance(call, str)]
            assert len(counts[0]) == 2 * len(steps) > 0

    def test_perturb(self) -> None:
        seen: list[float] = []

        class Net(Mlp):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                seen.append(float(t))
                return super().forward(t, y)

        y0 = sample(4, 3).requires_grad_()
        options = {"step_size": 0.5, "perturb": True}
        ours.odeint_adjoint(Net(), y0, T[:2], method="rk4", options=options).sum().backward()
        assert len(seen) >= 8
        assert not {0.0, 0.5} & set(seen)


class TestScipy:
    @pytest.mark.parametrize("solver", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
    @pytest.mark.parametrize("t", [T, T.flip(0)])
    def test_values(self, solver: str, t: Tensor) -> None:
        pytest.importorskip("scipy")
        how = {"method": "scipy_solver", "options": {"solver": solver}}
        func, y0 = CoupledMlp(), (sample(4, 3), sample(3, seed=1))
        torch.testing.assert_close(ours.odeint(func, y0, t, **how), ours.odeint(func, y0, t), rtol=1e-3, atol=1e-3)
        if t[1] > t[0] and solver == "LSODA":  # torchdiffeq gives all of them min_step, of which the others warn
            torch.testing.assert_close(ours.odeint(func, y0, t, **how), theirs.odeint(func, y0, t, **how))

    def test_complex_states(self) -> None:
        pytest.importorskip("scipy")
        y0 = torch.ones(2, dtype=torch.complex128)
        y = ours.odeint(lambda t, y: 1j * y, y0, T, method="scipy_solver")
        torch.testing.assert_close(y, torch.exp(1j * T)[:, None].expand(3, 2), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "how",
        [
            {"method": "scipy_solver"},
            {"method": "scipy_solver", "options": {"solver": "RK45"}, "adjoint_options": {"solver": "LSODA"}},
            {"method": "scipy_solver", "adjoint_method": "dopri5"},
            {"adjoint_method": "scipy_solver"},
        ],
    )
    def test_adjoint(self, how: dict[str, Any]) -> None:
        pytest.importorskip("scipy")
        for one, other in zip(gradients(ours, WithUnused(), **how), gradients(ours, WithUnused()), strict=True):
            assert relative_error(one, other) <= 1e-4 or other.abs().max() == one.abs().max() == 0

    def test_warnings_and_errors(self) -> None:
        pytest.importorskip("scipy")
        func = Mlp()
        func.callback_step = print
        with pytest.warns(UserWarning, match="callback_step"):
            ours.odeint(func, sample(4, 3), T, method="scipy_solver")
        with pytest.raises(ArgumentValueError, match="events"):
            ours.odeint(Mlp(), sample(4, 3), T[:2], method="scipy_solver", event_fn=lambda t, y: t - 0.1)
        one = torch.ones(1, dtype=torch.float64)
        with pytest.raises((SolveError, NonFiniteError)):
            ours.odeint(lambda t, y: y * y, one, T, method="scipy_solver", options={"solver": "RK45"})
