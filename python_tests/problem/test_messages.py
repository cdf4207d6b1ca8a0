"""Mistakes of newcomers: names from other libraries, swapped arguments, states and times of other types."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from autograd_reference import relative_error
from problems import LOOSE, Mlp, decay, oscillate, rotated, sample
from torch import Tensor, nn

import aca_ext
from aca_ext import errors

NAN = float("nan")
INDEPENDENT = {"batch": "independent"}
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {},
    "direct": {"gradient": "direct"},
    "naive": {"gradient": "naive"},
    "adjoint": {"gradient": "adjoint"},
    "fixed": {"method": "rk4"},
    "independent": {"options": INDEPENDENT},
    "compiled": {"engine": "compiled"},
}


class TestNames:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("RK45", "dopri5"), ("rk45", "dopri5"), ("ode45", "dopri5"), ("Dopri5", "dopri5"), ("RK23", "bosh3"),
            ("DOP853", "dopri8"), ("Tsit5", "tsit5"), ("Bosh3", "bosh3"), ("Euler", "euler"), ("heun", "heun2"),
            ("rk4-classic", "rk4_classic"), ("Adams", "implicit_adams"), ("dopry5", "dopri5"),
        ],
    )  # fmt: skip
    def test_of_methods(self, name: str, meant: str) -> None:
        with pytest.raises(errors.UnknownNameError, match=f"Did you mean '{meant}'"):
            aca_ext.odeint(decay, torch.ones(1), [0.0, 1.0], method=name)

    @pytest.mark.parametrize("name", ["BDF", "LSODA", "Radau"])
    def test_of_implicit_methods(self, name: str) -> None:
        with pytest.raises(errors.UnknownNameError, match="kvaerno5 is the usual choice"):
            aca_ext.odeint(decay, torch.ones(1), [0.0, 1.0], method=name)

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("max_steps", "max_num_steps"), ("maxiter", "max_num_steps"), ("mxstep", "max_num_steps"),
            ("dt", "step_size"), ("h", "step_size"), ("stepsize", "step_size"), ("dt0", "first_step"),
            ("dtmax", "max_step"), ("min_dt", "min_step"), ("tstops", "step_t"), ("MAX_STEP", "max_step"),
        ],
    )  # fmt: skip
    def test_of_options(self, name: str, meant: str) -> None:
        with pytest.raises(errors.UnknownNameError, match=f"Did you mean '{meant}'"):
            aca_ext.odeint(decay, torch.ones(1), [0.0, 1.0], options={name: 1})
        with pytest.raises(errors.UnknownNameError, match=f"'{meant}': "):
            aca_ext.NeuralODE(decay, **{name: 1})

    def test_of_arguments(self) -> None:
        with pytest.raises(errors.UnknownNameError, match="argument of its own"):
            aca_ext.odeint(decay, torch.ones(1), [0.0, 1.0], options={"rtol": 1e-3})
        for name, meant in {"solver": "method", "sensitivity": "gradient", "reltol": "rtol", "rtoll": "rtol"}.items():
            with pytest.raises(errors.UnknownNameError, match=f"Did you mean '{meant}'"):
                aca_ext.NeuralODE(decay, **{name: 1})


class Swapped(nn.Module):
    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return -y

    method = forward


class CallableSwapped:
    def __call__(self, state: Tensor, time: Tensor) -> Tensor:
        return -state


SWAPPED: dict[str, Callable[[], Any]] = {
    "function": lambda: lambda y, t: torch.cos(t) - y,
    "with args": lambda: lambda x, t, rate: -rate * x,
    "module": Swapped,
    "bound method": lambda: Swapped().method,
    "callable object": CallableSwapped,
    "partial": lambda: functools.partial(lambda z, t, k: -k * z, k=2.0),
}


class TestOrderOfArguments:
    @pytest.mark.parametrize("name", SWAPPED)
    @pytest.mark.parametrize("engine", ["eager", "independent", "fixed", "compiled"])
    def test_time_last_is_refused(self, name: str, engine: str) -> None:
        with pytest.raises(errors.ArgumentTypeError, match=r"time first.*lambda t, y: func\(y, t\)"):
            aca_ext.odeint(SWAPPED[name](), torch.ones(2, 1), [0.0, 1.0], **ENGINES[engine])

    @pytest.mark.parametrize(
        "func",
        [
            lambda t, y: -y,
            lambda x, y: -y,
            lambda _, t: -t,
            lambda tau, h: -h,
            functools.partial(lambda k, t, y: -k * y, 2.0),
            lambda *both: -both[1],
        ],
    )
    def test_other_names_are_no_matter(self, func: Any) -> None:
        assert aca_ext.odeint(func, torch.ones(2), [0.0, 1.0]).shape == (2, 2)

    def test_a_slope_of_the_time_alone(self) -> None:
        with pytest.raises(errors.SlopeError, match="time first"):
            aca_ext.odeint(lambda a, b: -a, torch.ones(2), [0.0, 1.0])


class TestWhoIsToBlame:
    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize(("bad", "kind"), [(NAN, "NaN"), (float("inf"), "infinity")])
    def test_y0_that_is_not_finite(self, bad: float, kind: str, engine: str) -> None:
        for shape in ((3,), (3, 2)):
            y0 = torch.ones(shape)
            y0[1] = bad
            with pytest.raises(errors.NonFiniteError, match=f"y0 holds {kind}") as raised:
                aca_ext.odeint(decay, y0.requires_grad_(), [0.0, 1.0], **ENGINES[engine])
            assert raised.value.sample == (1 if engine == "independent" else None)

    @pytest.mark.parametrize("engine", ["eager", "independent"])
    def test_func_of_a_finite_y0(self, engine: str) -> None:
        with pytest.raises(errors.NonFiniteError, match="func returned NaN"):
            aca_ext.odeint(lambda t, y: y * NAN, torch.ones(3), [0.0, 1.0], **ENGINES[engine])

    @pytest.mark.parametrize("engine", ["eager", "direct", "fixed", "independent"])
    def test_a_complex_slope_asks_for_a_complex_state(self, engine: str) -> None:
        with pytest.raises(errors.SlopeError, match=r"Make y0 complex, for example y0\.to\(torch\.complex64\)"):
            aca_ext.odeint(lambda t, y: 1j * y, torch.ones(3, 1), [0.0, 1.0], **ENGINES[engine])


class Phase(NamedTuple):
    x: Tensor
    v: Tensor


class Series:
    """Stand-in for a filtered pandas Series, whose index does not start at 0."""

    def __init__(self, values: list[float]) -> None:
        self.values = {7 + 2 * i: value for i, value in enumerate(values)}

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: int) -> float:
        return self.values[key]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(list(self.values.values()), dtype=dtype)


class TestStatesAndTimes:
    @pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
    @pytest.mark.parametrize("options", [{}, INDEPENDENT, {"on_step_limit": "stop", "max_num_steps": 2}])
    def test_namedtuples_stay_what_they_are(self, options: dict[str, Any], gradient: str) -> None:
        if options and gradient in ("naive", "adjoint"):
            pytest.skip("not with these options")

        def func(t: Tensor, y: Phase) -> Phase:
            assert type(y) is Phase
            return Phase(y.v, -y.x)

        y0 = Phase(sample(2, 1).requires_grad_(), sample(2, 1, seed=1))
        call = {"gradient": gradient, "rtol": 1e-6, "atol": 1e-6}
        sol = aca_ext.solve(func, y0, [0.0, 0.5, 1.0], options=options, **call)
        while not sol.is_complete:
            sol = sol.resume()
        assert type(sol.y) is Phase
        plain = aca_ext.solve(lambda t, y: (y[1], -y[0]), tuple(y0), [0.0, 0.5, 1.0],
                              options=options if options == INDEPENDENT else {}, **call)  # fmt: skip
        assert torch.equal(sol.y.x, plain.y[0])
        grads = [torch.autograd.grad(y[-1].sum(), y0.x)[0] for y in (sol.y.x, plain.y[0])]
        assert relative_error(*grads) <= 1e-12
        if not options:
            assert type(aca_ext.NeuralODE(func)(y0)) is Phase

    @pytest.mark.parametrize("dtype", [d for d in vars(torch).values() if str(d).startswith("torch.float8")])
    def test_float8(self, dtype: torch.dtype) -> None:
        with pytest.raises(errors.ArgumentTypeError, match=r"float8.*y0\.float\(\)"):
            aca_ext.odeint(decay, torch.ones(2).to(dtype), [0.0, 1.0])

    @pytest.mark.parametrize(
        ("y0", "advice"),
        [
            ([[1.0, 2.0]], r"y0\[0\]\[0\] is of type float.*as_tensor"),
            ({"x": np.ones(2)}, r"y0\['x'\] is of type ndarray.*as_tensor"),
            (1.0, "as_tensor"),
            (np.ones(2), "as_ten"),
        ],
    )
    def test_what_is_no_state(self, y0: Any, advice: str) -> None:
        with pytest.raises(errors.ArgumentTypeError, match=advice):
            aca_ext.odeint(decay, y0, [0.0, 1.0])

    @pytest.mark.parametrize("options", [{}, INDEPENDENT])
    def test_series_with_an_index_of_their_own(self, options: dict[str, Any]) -> None:
        expected = aca_ext.odeint(decay, torch.ones(2, 1), [0.0, 0.5, 1.0], options=options)
        assert torch.equal(aca_ext.odeint(decay, torch.ones(2, 1), Series([0.0, 0.5, 1.0]), options=options), expected)

    @pytest.mark.parametrize(
        "t", [np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"), [0, 1j], ["0", "1"], np.array([0, 1j])]
    )
    def test_times_that_are_no_numbers(self, t: Any) -> None:
        with pytest.raises(errors.TimeError, match="t is no sequence of numbers"):
            aca_ext.odeint(decay, torch.ones(2), t)


class TestIndependentSamples:
    @pytest.mark.parametrize(
        "func",
        [
            lambda t, y: -y if t > 0.5 else y,
            lambda t, y: -y * float(t),
            lambda t, y: -y * t.item(),
            lambda t, y: [-y, y][int(t)],
        ],
    )
    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    def test_one_number_for_all_times_is_explained(self, func: Any, gradient: str) -> None:
        y0 = torch.ones(2, 1, requires_grad=True)
        with pytest.raises(errors.SlopeError, match=r"\(batch, 1, \.\.\., 1\).*torch\.where"):
            aca_ext.odeint(func, y0, [0.0, 1.0], gradient=gradient, options=INDEPENDENT)

    @pytest.mark.parametrize(
        ("t", "match"),
        [
            ([[0.0, 1.0], [1.0, 1.0]], r"sample 1, t\[1\].*must not repeat"),
            ([[0.0, 1.0, 0.5], [0.0, 1.0, 2.0]], r"sample 0, t\[0\].*not sorted"),
            ([[0.0, 1.0], [0.0, float("inf")]], r"sample 1, .*must be finite"),
            ([[0.0, 0.0], [1.0, 1.0]], r"sample 0 \(and of 1 more\)"),
        ],
    )
    @pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
    def test_errors_of_times_name_the_sample(self, t: Any, match: str, kind: Any) -> None:
        with pytest.raises(errors.TimeError, match=match):
            aca_ext.odeint(decay, torch.ones(2, 1), kind(t), options=INDEPENDENT)


class TestEarlyStops:
    @pytest.mark.parametrize("make", [
        lambda options: aca_ext.odeint(decay, torch.ones(1), [0.0, 50.0], options=options),
        lambda options: aca_ext.NeuralODE(decay, options=options),
    ])  # fmt: skip
    def test_are_refused_where_nobody_would_see_them(self, make: Any) -> None:
        with pytest.raises(errors.OptionError, match=r"aca_ext\.solve.*resume"):
            make({"max_num_steps": 10, "on_step_limit": "stop"})
        make({"on_step_limit": "raise"})

    @pytest.mark.parametrize("gradient", ["aca", "direct"])
    def test_going_on_beyond_the_end_reaches_the_further_times(self, gradient: str) -> None:
        options = {"max_num_steps": 3, "on_step_limit": "stop"}
        y0 = rotated(0.0).requires_grad_()
        solution = aca_ext.solve(oscillate, y0, [0.0, 1.0], gradient=gradient, options=options)
        while not solution.is_complete:
            solution = solution.resume()
        longer = solution.resume([2.0, 3.0])
        assert longer.is_complete
        assert longer.t.tolist() == [0.0, 1.0, 2.0, 3.0]
        torch.testing.assert_close(longer.y[-1], rotated(3.0), rtol=1e-6, atol=1e-6)
        whole = aca_ext.solve(oscillate, y0, [0.0, 1.0, 2.0, 3.0], gradient=gradient, options={"step_t": [1.0]})
        grads = [torch.autograd.grad(s.y[-1].sum(), y0)[0] for s in (longer, whole)]
        assert relative_error(*grads) <= 1e-12
        assert not solution.resume([2.0, 3.0], max_num_steps=1).is_complete


class TestPrinted:
    @pytest.mark.parametrize("call", [{}, {"options": INDEPENDENT}, {"options": {"on_step_limit": "stop"}}])
    def test_solutions_are_short(self, call: dict[str, Any]) -> None:
        sol = aca_ext.solve(decay, torch.ones(100, 2), torch.linspace(0, 1, 50), **call)
        text = repr(sol)
        assert len(text) < 400
        assert "(50, 100, 2) float32" in text
        assert "n_f_evals=" in text

    def test_counts_of_samples_are_ranges(self) -> None:
        y0 = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        stats = aca_ext.solve(lambda t, y: y.flip(1) * 9, y0, [0.0, 1.0], options=INDEPENDENT, **LOOSE).stats
        low, high = int(stats.n_steps.min()), int(stats.n_steps.max())
        assert low < high
        assert f"n_steps={low}..{high}" in repr(stats)
        assert len(repr(stats)) < 250

    def test_tuples_and_solves_without_a_step(self) -> None:
        assert "(2, 3) float64" in repr(aca_ext.solve(lambda t, y: y, (sample(3), sample(2, 2)), [0.0, 1.0]))
        assert "n_steps=0" in repr(aca_ext.solve(decay, torch.ones(1), [0.0]))
        assert "0 samples" in repr(aca_ext.solve(decay, torch.ones(0, 2), [0.0, 1.0], options=INDEPENDENT))

    def test_methods_are_listed(self) -> None:
        text = repr(aca_ext.METHODS)
        assert len(text) < 300
        assert all(name in text for name in aca_ext.METHODS)
        assert "order 5(4)" in repr(aca_ext.METHODS["dopri5"])

    def test_names_of_the_package_are_the_public_ones(self) -> None:
        assert dir(aca_ext) == sorted(aca_ext.__all__)
        for module in ("aca_ext.kernels.fused", "aca_ext.gradients.aca", "aca_ext.problem.times"):
            assert importlib.import_module(module).__name__ == module


def test_gradients_of_complex_states_by_real_parameters() -> None:
    """In the adjoint's augmented state, an odd number of real elements precedes a complex parameter."""
    found = []
    for gradient in ("adjoint", "aca", "direct"):
        real, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, [0.1, 0.2, 0.3]))
        rotation = torch.tensor(0.3 + 0.2j, dtype=torch.complex128, requires_grad=True)
        single = torch.tensor([0.2, 0.1j], dtype=torch.complex64, requires_grad=True)
        y0 = torch.complex(sample(3), sample(3, seed=1)).requires_grad_()
        wanted = (real, rotation, bias, single, y0)

        def func(t: Tensor, y: Tensor, wanted: tuple[Tensor, ...] = wanted) -> Tensor:
            real, rotation, bias, single, _ = wanted
            return real * 1j * y + rotation * y + bias * single.sum() * t

        y = aca_ext.odeint(func, y0, [0.0, 0.5, 1.0], gradient=gradient, params=wanted[:-1], rtol=1e-9, atol=1e-9)
        found.append(torch.autograd.grad(torch.view_as_real(y).square().sum(), wanted))
    for adjoint, aca, direct in zip(*found, strict=True):
        assert relative_error(torch.view_as_real(aca) if aca.is_complex() else aca,
                              torch.view_as_real(direct) if direct.is_complex() else direct) <= 1e-6  # fmt: skip
        torch.testing.assert_close(adjoint, direct, rtol=1e-5, atol=1e-6)


def test_a_module_with_a_forward_of_its_own_instance() -> None:
    module = Mlp()
    module.forward = lambda t, y: -y
    assert aca_ext.odeint(module, sample(2, 3), [0.0, 1.0]).shape == (2, 2, 3)
