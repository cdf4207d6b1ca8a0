"""Bad input and failed solves: the class of the error, and a message that says what was given and what is allowed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from problems import Mlp, decay, sample
from torch import Tensor

import aca_ext
from aca_ext import errors

T = torch.tensor([0.0, 1.0], dtype=torch.float64)
NAN, INF = math.nan, math.inf


def call(func: Any = decay, y0: Any = None, t: Any = T, **settings: Any) -> aca_ext.Solution:
    return aca_ext.solve(func, torch.ones(3) if y0 is None else y0, t, **settings)


BUILTIN = {
    errors.ArgumentTypeError: TypeError,
    errors.ArgumentValueError: ValueError,
    errors.UnknownNameError: ValueError,
    errors.OptionError: ValueError,
    errors.TimeError: ValueError,
    errors.ToleranceError: ValueError,
    errors.SlopeError: (TypeError, ValueError),
    errors.EventError: ValueError,
    errors.ReplayError: RuntimeError,
    errors.CompileError: RuntimeError,
    errors.GraphError: RuntimeError,
    errors.SolveError: RuntimeError,
    errors.NonFiniteError: RuntimeError,
    errors.StepSizeError: RuntimeError,
    errors.StepLimitError: RuntimeError,
    errors.NotInstalledError: ImportError,
    errors.NotCompiledError: ImportError,
}


def test_every_error_has_its_builtin_base() -> None:
    classes = {x for x in vars(errors).values() if inspect.isclass(x) and issubclass(x, Exception)}
    warned = {x for x in classes if issubclass(x, UserWarning)}
    own = classes - warned - {errors.AcaError}
    assert own == set(BUILTIN)
    assert {x.__name__ for x in classes} == set(errors.__all__)
    for kind, bases in BUILTIN.items():
        for base in bases if isinstance(bases, tuple) else (bases,):
            assert issubclass(kind, base)
        assert issubclass(kind, errors.AcaError) or kind is errors.NotCompiledError
        assert kind.__doc__


# Mistakes by name: the arguments, the class of the error, and words that the message must contain.
ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "func is no callable": ({"func": 3}, errors.ArgumentTypeError, ["func", "int", "callable"]),
    "y0 is an integer tensor": (
        {"y0": torch.ones(3, dtype=torch.int64)},
        errors.ArgumentTypeError,
        ["y0", "int64", "float32", "float64", "complex64", "complex128"],
    ),
    "y0 is boolean": ({"y0": torch.ones(3, dtype=torch.bool)}, errors.ArgumentTypeError, ["y0", "bool", "float32"]),
    "y0 is a number": ({"y0": 1.0}, errors.ArgumentTypeError, ["y0", "float", "tensor"]),
    "y0 is a list": ({"y0": [1.0]}, errors.ArgumentTypeError, ["y0[0]", "float", "as_tensor"]),
    "y0 is an array": ({"y0": torch.ones(3).numpy()}, errors.ArgumentTypeError, ["y0", "ndarray", "tensor"]),
    "y0 is sparse": ({"y0": torch.eye(3).to_sparse()}, errors.ArgumentTypeError, ["y0", "sparse", "to_dense"]),
    "y0 is an empty tuple": ({"y0": ()}, errors.ArgumentValueError, ["y0", "empty", "at least one"]),
    "a component is no tensor": ({"y0": (torch.ones(3), 1.0)}, errors.ArgumentTypeError, ["y0[1]", "float", "tensor"]),
    "a component is an integer": (
        {"y0": (torch.ones(3), torch.ones(2, dtype=torch.int32))},
        errors.ArgumentTypeError,
        ["y0[1]", "int32"],
    ),
    "components of two dtypes": (
        {"y0": (torch.ones(3), torch.ones(3, dtype=torch.float64))},
        errors.ArgumentTypeError,
        ["y0[1]", "float64", "float32", "share"],
    ),
    "components on two devices": (
        {"y0": (torch.ones(3), torch.ones(3, device="meta"))},
        errors.ArgumentTypeError,
        ["y0[1]", "meta", "cpu", "share"],
    ),
    "t is empty": ({"t": torch.tensor([])}, errors.TimeError, ["t", "empty", "at least"]),
    "t is a number": ({"t": 1.0}, errors.TimeError, ["t", "float", "1-d"]),
    "t is a 0-d tensor": ({"t": torch.tensor(1.0)}, errors.TimeError, ["t", "()", "1-d"]),
    "t is a matrix": ({"t": torch.ones(2, 2)}, errors.TimeError, ["t", "(2, 2)", "1-d"]),
    "t is text": ({"t": ["a", "b"]}, errors.TimeError, ["t", "1-d"]),
    "t is None": ({"t": None}, errors.TimeError, ["t", "NoneType", "1-d"]),
    "t is a list that would lose a gradient": (
        {"t": [0.0, torch.tensor(1.0, requires_grad=True)]},
        errors.TimeError,
        ["t", "list", "grad", "torch.stack"],
    ),
    "t is complex": ({"t": torch.tensor([0j, 1 + 0j])}, errors.TimeError, ["t", "complex64", "real"]),
    "t is boolean": ({"t": torch.tensor([False, True])}, errors.TimeError, ["t", "bool", "real"]),
    "t holds NaN": ({"t": torch.tensor([0.0, NAN])}, errors.TimeError, ["t[1]", "nan", "finite"]),
    "t holds infinity": ({"t": torch.tensor([0.0, 1.0, INF])}, errors.TimeError, ["t[2]", "inf", "finite"]),
    "the only time is NaN": ({"t": torch.tensor([NAN])}, errors.TimeError, ["t[0]", "nan", "finite"]),
    "t repeats": ({"t": torch.tensor([0.0, 1.0, 1.0])}, errors.TimeError, ["t[1]", "t[2]", "1.0", "repeat"]),
    "t is one point twice": ({"t": torch.tensor([2.0, 2.0])}, errors.TimeError, ["t[0]", "t[1]", "repeat"]),
    "t turns down": (
        {"t": torch.tensor([0.0, 2.0, 1.0])},
        errors.TimeError,
        ["t[1]", "2.0", "t[2]", "1.0", "increase", "decrease"],
    ),
    "t turns up": ({"t": torch.tensor([2.0, 0.0, 1.0])}, errors.TimeError, ["t[1]", "t[2]", "sorted"]),
    "rtol is negative": ({"rtol": -1e-3}, errors.ToleranceError, ["rtol", "-0.001", "at least 0"]),
    "atol is negative": ({"atol": -1e-3}, errors.ToleranceError, ["atol", "-0.001", "at least 0"]),
    "rtol is NaN": ({"rtol": NAN}, errors.ToleranceError, ["rtol", "nan", "finite"]),
    "atol is infinite": ({"atol": INF}, errors.ToleranceError, ["atol", "inf", "finite"]),
    "tolerances are zero": ({"rtol": 0, "atol": 0.0}, errors.ToleranceError, ["rtol", "atol", "zero", "positive"]),
    "tensor tolerances are zero": (
        {"rtol": torch.zeros(3), "atol": torch.zeros(3)},
        errors.ToleranceError,
        ["rtol", "atol", "zero"],
    ),
    "tolerances below the rounding of the state": (
        {"y0": torch.ones(3, dtype=torch.bfloat16)},
        errors.ToleranceError,
        ["1e-07", "bfloat16", "0.0078125", "float32"],
    ),
    "rtol is text": ({"rtol": "1e-3"}, errors.ToleranceError, ["rtol", "str", "number"]),
    "rtol is None": ({"rtol": None}, errors.ToleranceError, ["rtol", "NoneType", "number"]),
    "atol does not broadcast": ({"atol": torch.ones(4)}, errors.ToleranceError, ["atol", "(4,)", "(3,)", "broadcast"]),
    "atol has an axis too many": ({"atol": torch.ones(2, 3)}, errors.ToleranceError, ["atol", "(2, 3)", "broadcast"]),
    "an entry of rtol is negative": ({"rtol": torch.tensor([1.0, -1.0, 1.0])}, errors.ToleranceError, ["rtol", "neg"]),
    "an entry of atol is NaN": ({"atol": torch.tensor([1.0, NAN, 1.0])}, errors.ToleranceError, ["atol", "finite"]),
    "rtol is complex": ({"rtol": torch.ones(3) * 1j}, errors.ToleranceError, ["rtol"]),
    "two tolerances for three components": (
        {"y0": (torch.ones(1), torch.ones(1), torch.ones(1)), "rtol": (1e-3, 1e-3)},
        errors.ToleranceError,
        ["rtol", "2", "3", "each"],
    ),
    "a tuple of tolerances for a tensor": ({"rtol": (1e-3, 1e-3, 1e-3)}, errors.ToleranceError, ["rtol", "tuple"]),
    "unknown method": ({"method": "dopri6"}, errors.UnknownNameError, ["method", "dopri6", "dopri5", "mean"]),
    "method is no name": ({"method": 5}, errors.UnknownNameError, ["method", "5", "dopri5"]),
    "unknown gradient": ({"gradient": "adjont"}, errors.UnknownNameError, ["gradient", "'adjoint'?", "aca", "direct"]),
    "gradient is None": ({"gradient": None}, errors.UnknownNameError, ["gradient", "None", "aca"]),
    "unknown option": ({"options": {"maxstep": 1}}, errors.UnknownNameError, ["maxstep", "'max_step'?", "step_t"]),
    "adaptive option of a fixed method": (
        {"method": "rk4", "options": {"first_step": 0.1}},
        errors.UnknownNameError,
        ["first_step", "rk4", "step_size"],
    ),
    "adaptive option of fixed steps": (
        {"options": {"max_step": 0.1, "step_size": 0.1}},
        errors.UnknownNameError,
        ["max_step", "step_size", "fixed"],
    ),
    "unknown option of a fixed method": (
        {"method": "rk4", "options": {"stepsize": 0.1}},
        errors.UnknownNameError,
        ["stepsize", "'step_size'?"],
    ),
    "step_size and a grid": (
        {"options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}},
        errors.OptionError,
        ["step_size", "grid_constructor", "one"],
    ),
    "step_size is zero": ({"options": {"step_size": 0.0}}, errors.OptionError, ["step_size", "0.0", "positive"]),
    "step_size is text": ({"options": {"step_size": "x"}}, errors.OptionError, ["step_size", "'x'", "positive"]),
    "the grid is no function": ({"options": {"grid_constructor": [0, 1]}}, errors.OptionError, ["grid_constructor"]),
    "the grid is no grid": (
        {"options": {"grid_constructor": lambda f, y, t: torch.tensor([0.0, 1.0, 0.5])}},
        errors.OptionError,
        ["grid_constructor", "sorted"],
    ),
    "the grid ends early": (
        {"options": {"grid_constructor": lambda f, y, t: torch.tensor([0.0, 0.5])}},
        errors.OptionError,
        ["grid_constructor", "0.5", "1.0"],
    ),
    "the grid runs backwards": (
        {"options": {"grid_constructor": lambda f, y, t: torch.tensor([1.0, 0.0])}},
        errors.OptionError,
        ["grid_constructor", "1.0", "0.0"],
    ),
    "first_step is negative": ({"options": {"first_step": -1}}, errors.OptionError, ["first_step", "-1", "positive"]),
    "first_step is NaN": ({"options": {"first_step": NAN}}, errors.OptionError, ["first_step", "nan"]),
    "first_step is text": ({"options": {"first_step": "a"}}, errors.OptionError, ["first_step", "'a'", "number"]),
    "min_step is negative": ({"options": {"min_step": -1}}, errors.OptionError, ["min_step", "-1", "at least 0"]),
    "max_step is zero": ({"options": {"max_step": 0}}, errors.OptionError, ["max_step", "0", "positive"]),
    "min_step above max_step": (
        {"options": {"min_step": 1.0, "max_step": 0.1}},
        errors.OptionError,
        ["min_step", "max_step", "1.0", "0.1"],
    ),
    "max_num_steps is zero": ({"options": {"max_num_steps": 0}}, errors.OptionError, ["max_num_steps", "0", "1"]),
    "max_num_steps is no integer": ({"options": {"max_num_steps": 2.5}}, errors.OptionError, ["2.5", "integer"]),
    "max_num_steps is NaN": ({"options": {"max_num_steps": NAN}}, errors.OptionError, ["max_num_steps", "nan"]),
    "safety is zero": ({"options": {"safety": 0.0}}, errors.OptionError, ["safety", "0.0", "(0, 1]"]),
    "ifactor shrinks": ({"options": {"ifactor": 0.5}}, errors.OptionError, ["ifactor", "0.5", "at least 1"]),
    "dfactor grows": ({"options": {"dfactor": 2.0}}, errors.OptionError, ["dfactor", "2.0", "(0, 1)"]),
    "icoeff is text": ({"options": {"icoeff": "x"}}, errors.OptionError, ["icoeff", "'x'", "number"]),
    "pcoeff is infinite": ({"options": {"pcoeff": INF}}, errors.OptionError, ["pcoeff", "inf", "finite"]),
    "norm is no function": ({"options": {"norm": 2}}, errors.OptionError, ["norm", "int", "function"]),
    "step_t holds NaN": ({"options": {"step_t": [NAN]}}, errors.OptionError, ["step_t", "nan", "finite"]),
    "step_t is text": ({"options": {"step_t": "x"}}, errors.OptionError, ["step_t"]),
    "jump_t is text": ({"options": {"jump_t": ["x"]}}, errors.OptionError, ["jump_t"]),
    "options are no mapping": ({"options": [1]}, errors.ArgumentTypeError, ["options", "list", "dict"]),
    "args is a tensor": ({"args": torch.ones(3)}, errors.ArgumentTypeError, ["args", "Tensor", "tuple"]),
    "args is a number": ({"args": 3}, errors.ArgumentTypeError, ["args", "int", "tuple"]),
    "an arg hides a tensor that requires grad": (
        {"args": ({"a": [torch.ones(1, requires_grad=True)]},)},
        errors.ArgumentValueError,
        ["args[0]", "dict", "grad"],
    ),
    "params holds no tensor": ({"params": [3]}, errors.ArgumentTypeError, ["params[0]", "int", "tensor"]),
    "params is no sequence": ({"params": 3}, errors.ArgumentTypeError, ["params", "int", "tensor"]),
    "params twice": ({"params": [], "adjoint_params": []}, errors.ArgumentValueError, ["params", "adjoint_params"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_argument(case: str) -> None:
    settings, kind, words = ARGUMENTS[case]
    with pytest.raises(kind) as raised:
        call(**settings)
    assert type(raised.value) is kind
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("returned", [torch.ones(3), "x", None, -1.0, torch.tensor(-1.0), 1j, True])
def test_a_norm_returns_one_number_of_at_least_0(returned: Any) -> None:
    with pytest.raises(errors.OptionError, match="norm returned"):
        call(options={"norm": lambda ratio: returned})


@pytest.mark.parametrize("number", [numpy.float32, numpy.float64, lambda x: torch.tensor(x, requires_grad=True)])
def test_numbers_may_be_numpys_or_in_a_tensor(number: Callable[[float], Any]) -> None:
    expected = call(rtol=0.25, atol=0.5, options={"first_step": 0.25, "max_num_steps": 64.0})
    options = {"first_step": number(0.25), "max_num_steps": number(64.0)}
    found = call(rtol=number(0.25), atol=number(0.5), options=options)
    assert torch.equal(found.y, expected.y)
    steps = call(options={"step_size": number(0.25)}).steps
    assert steps.tolist() == [[0.0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1.0]]
    for unlimited in (numpy.int64(1000), 2**31 - 1, 10**30, INF):
        assert call(options={"max_num_steps": unlimited}).stats.n_steps > 0


def test_any_sequence_of_numbers_is_t() -> None:
    assert torch.equal(call(t=range(3)).y, call(t=torch.arange(3)).y)
    assert aca_ext.NeuralODE(decay, t=range(3)).t == (0.0, 1.0, 2.0)
    for t in (5, [0.0, 0.0], [0.0, torch.tensor(1.0, requires_grad=True)]):
        with pytest.raises(errors.TimeError):
            aca_ext.NeuralODE(decay, t=t)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_argument_leaves_func_uncalled(case: str) -> None:
    settings = dict(ARGUMENTS[case][0])
    if "func" in settings:
        return
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return -y

    with pytest.raises(errors.AcaError):
        call(func, **settings)
    assert not calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_t_may_be_on_cuda() -> None:
    assert torch.equal(call(t=T.cuda()).y, call(t=T).y)
    y0 = torch.ones(3, device="cuda")
    assert torch.equal(call(y0=y0, t=T.cuda()).y, call(y0=y0, t=T).y)


# Results of func for a float32 state of shape (3,), and words that the message must contain.
SLOPES: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "nothing": (lambda t, y: None, ["NoneType", "tensor"]),
    "a number": (lambda t, y: 1.0, ["float", "tensor"]),
    "an array": (lambda t, y: y.numpy(), ["ndarray", "tensor"]),
    "a tuple": (lambda t, y: (y,), ["tuple", "y0 is a tensor"]),
    "a list": (lambda t, y: [y], ["list", "y0 is a tensor"]),
    "a scalar": (lambda t, y: y.sum(), ["()", "(3,)"]),
    "one element": (lambda t, y: y[:1], ["(1,)", "(3,)"]),
    "a column": (lambda t, y: y[:, None], ["(3, 1)", "(3,)"]),
    "a row": (lambda t, y: y[None], ["(1, 3)", "(3,)"]),
    "too many": (lambda t, y: torch.cat([y, y]), ["(6,)", "(3,)"]),
    "float64": (lambda t, y: y.double(), ["float64", "float32"]),
    "bfloat16": (lambda t, y: y.bfloat16(), ["bfloat16", "float32", "autocast"]),
    "integers": (lambda t, y: torch.ones(3, dtype=torch.int64), ["int64", "float32"]),
    "complex numbers": (lambda t, y: torch.complex(y, y), ["complex64", "float32"]),
    "another device": (lambda t, y: torch.ones(3, device="meta"), ["meta", "cpu"]),
    "a sparse tensor": (lambda t, y: y.to_sparse(), ["sparse", "to_dense"]),
}


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("case", SLOPES)
def test_bad_slope(case: str, gradient: str) -> None:
    func, words = SLOPES[case]
    for y0 in (torch.ones(3), torch.ones(3, requires_grad=gradient != "aca")):
        slope = (lambda t, y: func(t, y.detach())) if case == "an array" else func
        with pytest.raises(errors.SlopeError) as raised:
            call(slope, y0, gradient=gradient)
        for word in ("func", *words):
            assert word in str(raised.value)


def test_bad_slope_later() -> None:
    for case, (func, words) in SLOPES.items():
        with pytest.raises(errors.SlopeError) as raised:
            call(lambda t, y, func=func: -y if t < 0.5 else func(t, y))
        for word in words:
            assert word in str(raised.value), case


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda y: y[0], ["Tensor", "tuple of 2"]),
        (lambda y: (y[0],), ["1 component", "2"]),
        (lambda y: (*y, y[0]), ["3 component", "2"]),
        (lambda y: (y[1], y[0]), ["component 0", "(2,)", "(3,)"]),
        (lambda y: (y[0], y[1].double()), ["component 1", "float64", "float32"]),
        (lambda y: (y[0], None), ["component 1", "NoneType"]),
        (lambda y: {"a": y[0], "b": y[1]}, ["dict", "tuple of 2"]),
    ],
)
def test_bad_slope_of_a_tuple_state(returned: Callable[[Any], Any], words: list[str]) -> None:
    with pytest.raises(errors.SlopeError) as raised:
        call(lambda t, y: returned(y), (torch.ones(3), torch.ones(2)))
    for word in words:
        assert word in str(raised.value)


def test_bad_slope_of_a_complex_state() -> None:
    y0 = torch.ones(2, dtype=torch.complex128)
    for returned, words in ((torch.ones(2), ["float32", "complex128"]), (torch.ones(2, 2), ["(2, 2)", "(2,)"])):
        with pytest.raises(errors.SlopeError) as raised:
            call(lambda t, y, returned=returned: returned, y0)
        for word in words:
            assert word in str(raised.value)


class OfStateAlone(torch.nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return -y


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize(
    ("func", "args", "words"),
    [
        (lambda y: -y, (), ["(y)", "func(t, y, *args)", "too many"]),
        (lambda: None, (), ["()", "too many"]),
        (lambda t, y, u: -y, (), ["(t, y, u)", "missing", "'u'"]),
        (lambda t, y: -y, (1.0,), ["(t, y)", "1 of args", "too many"]),
        (OfStateAlone(), (), ["(y", "too many"]),
    ],
)
def test_wrong_arity(func: Any, args: tuple[float, ...], words: list[str], gradient: str) -> None:
    for t in (T, T.clone().requires_grad_()):
        with pytest.raises(errors.ArgumentTypeError) as raised:
            call(func, torch.ones(3, requires_grad=True), t, args=args, gradient=gradient)
        for word in words:
            assert word in str(raised.value)


def test_a_type_error_inside_func_is_pythons_own() -> None:
    with pytest.raises(TypeError, match="unsupported operand") as raised:
        call(lambda t, y: y + None)
    assert type(raised.value) is TypeError


def check_failure(error: errors.SolveError) -> None:
    """Asserts that the error says where the solve stopped, in attributes and in its message."""
    assert math.isfinite(error.t)
    assert error.n_f_evals >= 1
    assert error.n_accepted >= 0
    assert error.n_rejected >= 0
    message = str(error)
    for word in (
        f"t={error.t:.17g}",
        f"h={error.h:.6g}",
        f"error ratio={error.error_ratio:.6g}",
        f"{error.n_accepted} steps accepted",
        f"{error.n_rejected} rejected",
        f"{error.n_f_evals} evaluations",
    ):
        assert word in message


ADAPTIVE = [name for name, tableau in aca_ext.METHODS.items() if tableau.adaptive]


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}])
def test_non_finite_slope_at_the_start(bad: float, gradient: str, options: dict[str, float]) -> None:
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return y * torch.tensor([1.0, bad, 1.0], dtype=y.dtype)

    with pytest.raises(errors.NonFiniteError, match="func returned NaN or infinity") as raised:
        call(func, y0, torch.tensor([2.0, 3.0]), gradient=gradient, options=options)
    check_failure(raised.value)
    assert raised.value.t == 2.0
    assert raised.value.n_accepted == 0
    assert len(calls) == raised.value.n_f_evals < 20


@pytest.mark.parametrize("bad", [NAN, INF])
def test_non_finite_state_at_the_start(bad: float) -> None:
    with pytest.raises(
        errors.NonFiniteError, match=rf"y0 holds {'NaN' if bad != bad else 'infinity'} \(1 of 2"
    ) as raised:
        call(decay, torch.tensor([1.0, bad]))
    check_failure(raised.value)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_non_finite_slope_met_later(bad: float, method: str, gradient: str) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y if t < 0.6 else y * bad

    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(errors.NonFiniteError, match=r"(?s)0\.(59999|6)") as raised:
        call(func, y0, method=method, gradient=gradient, rtol=1e-3, atol=1e-3)
    check_failure(raised.value)
    assert raised.value.t == pytest.approx(0.6, abs=1e-6)
    assert raised.value.n_rejected > 0
    assert raised.value.n_accepted > 0
    assert raised.value.n_f_evals < 10_000


def test_nan_of_a_step_too_long_is_only_a_rejected_step() -> None:
    """A trial takes the square root of a negative number, although the solution stays positive."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -torch.sqrt(y)

    sol = call(func, torch.ones(1).double(), torch.tensor([0.0, 1.9]).double(), options={"first_step": 10.0})
    assert sol.stats.n_rejected > 0
    assert sol.y[-1].item() == pytest.approx((1 - 1.9 / 2) ** 2, rel=1e-4)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("power", [2, 3])
def test_finite_time_blow_up(method: str, power: int) -> None:
    """y' = y^p from 1 is infinite at t = 1/(p-1)."""
    tolerance = {"adaptive_heun": 1e-2, "fehlberg2": 1e-5}.get(method, 1e-4)
    with pytest.raises(errors.SolveError) as raised:
        call(lambda t, y: y**power, torch.ones(1).double(), torch.tensor([0.0, 3.0]), method=method,
             rtol=tolerance, atol=tolerance)  # fmt: skip
    assert isinstance(raised.value, (errors.NonFiniteError, errors.StepSizeError))
    check_failure(raised.value)
    assert raised.value.t == pytest.approx(1 / (power - 1), abs=0.1)
    assert raised.value.n_accepted > 0


@pytest.mark.parametrize("method", aca_ext.METHODS)
def test_blow_up_on_a_fixed_grid_is_an_error(method: str) -> None:
    with pytest.raises(errors.NonFiniteError) as raised:
        call(lambda t, y: y**3, 10 * torch.ones(1), torch.tensor([0.0, 50.0]), method=method,
             options={"step_size": 0.1})  # fmt: skip
    check_failure(raised.value)


@pytest.mark.parametrize("method", aca_ext.METHODS)
def test_non_finite_slope_on_a_fixed_grid(method: str) -> None:
    with pytest.raises(errors.NonFiniteError):
        call(lambda t, y: y * NAN, method=method, options={"step_size": 0.5})


def test_diverged_weights() -> None:
    net = Mlp()
    with torch.no_grad():
        net.net[0].weight.fill_(NAN)
    for gradient in aca_ext.GRADIENTS:
        with pytest.raises(errors.NonFiniteError, match="look at func"):
            call(net, sample(2, 3), gradient=gradient)
    with torch.no_grad():
        net.net[0].weight.fill_(1e200)
        net.net[2].weight.fill_(1e308)
    with pytest.raises(errors.SolveError):
        call(lambda t, y: net(t, y) * 1e10, sample(2, 3))


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
def test_stiff_with_min_step(gradient: str) -> None:
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(errors.StepSizeError, match="stiff") as raised:
        call(lambda t, y: -1e6 * (y - torch.cos(t)), y0, rtol=1e-6, atol=1e-6, gradient=gradient,
             options={"min_step": 1e-3, "first_step": 0.1})  # fmt: skip
    check_failure(raised.value)
    assert math.isfinite(raised.value.error_ratio)
    assert raised.value.error_ratio > 1
    assert raised.value.h < 1e-3
    assert not isinstance(raised.value, errors.NonFiniteError)


@pytest.mark.parametrize("gradient", ["aca", "naive"])
def test_a_tolerance_of_zero_that_cannot_be_met(gradient: str) -> None:
    tolerance = torch.tensor([0.0, 1e-3])
    with pytest.raises(errors.StepSizeError, match="both zero in an element") as raised:
        call(decay, torch.ones(2, requires_grad=True), rtol=tolerance, atol=tolerance, gradient=gradient)
    check_failure(raised.value)
    still = call(lambda t, y: -y * torch.tensor([0.0, 1.0]), torch.ones(2), rtol=tolerance, atol=tolerance)
    assert still.y[-1, 0] == 1.0


def test_tolerance_below_rounding() -> None:
    """The error estimate is rounding noise, which a smaller step does not lower; the message says what helps."""
    with pytest.raises(errors.SolveError, match="loosen rtol or atol") as raised:
        call(decay, rtol=1e-14, atol=1e-14, options={"max_num_steps": 2000})
    check_failure(raised.value)


@pytest.mark.parametrize("gradient", aca_ext.GRADIENTS)
@pytest.mark.parametrize("limit", [1, 2, 7])
def test_step_limit(limit: int, gradient: str) -> None:
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(errors.StepLimitError, match=rf"{limit} trial steps.*max_num_steps") as raised:
        call(decay, y0, torch.tensor([0.0, 50.0]), gradient=gradient, options={"max_num_steps": limit})
    check_failure(raised.value)
    assert raised.value.n_accepted + raised.value.n_rejected == limit
    assert 0 <= raised.value.t < 50


def test_step_limit_of_one_is_enough_for_one_step() -> None:
    sol = call(decay, rtol=1.0, atol=1.0, options={"max_num_steps": 1, "first_step": 1.0})
    assert sol.stats.n_steps == 1


@pytest.mark.filterwarnings("ignore::aca_ext.errors.TimeResolutionWarning")
def test_time_too_short_for_floats() -> None:
    """Two neighbouring floats as times give one step."""
    t = torch.tensor([1.0, math.nextafter(1.0, 2.0)], dtype=torch.float64)
    sol = call(decay, t=t)
    assert sol.steps.tolist() == [t.tolist()]


def test_a_failed_backward_solve_says_so() -> None:
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    y = aca_ext.odeint(decay, y0, T, gradient="adjoint", adjoint_options={"max_num_steps": 1})
    with pytest.raises(errors.StepLimitError, match="max_num_steps"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"adjoint_rtol": -1.0}, errors.ToleranceError),
        ({"adjoint_atol": NAN}, errors.ToleranceError),
        ({"adjoint_method": "dopri6"}, errors.UnknownNameError),
        ({"adjoint_options": {"maxstep": 1.0}}, errors.UnknownNameError),
    ],
)
def test_bad_settings_of_the_adjoint(settings: dict[str, Any], kind: type[Exception]) -> None:
    y0 = torch.ones(3, requires_grad=True)
    with pytest.raises(kind, match=next(iter(settings.values())) if kind is errors.UnknownNameError and
                       isinstance(next(iter(settings.values())), str) else "."):  # fmt: skip
        aca_ext.odeint(decay, y0, T, gradient="adjoint", **settings)[-1].sum().backward()


@pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
def test_a_tolerance_below_rounding_is_named_before_other_causes(options: dict[str, Any]) -> None:
    options = {"max_num_steps": 20, **options}
    y0 = torch.ones(2, 2)

    def message(dtype: torch.dtype, **tolerances: Any) -> str:
        with pytest.raises(errors.StepLimitError) as raised:
            aca_ext.odeint(lambda t, y: torch.cos(20 * t) * y, y0.to(dtype), [0.0, 90.0], options=options, **tolerances)
        return str(raised.value)

    assert "stopped: rtol=1e-12 asks for more than float32 resolves" in message(torch.float32, rtol=1e-12, atol=1e-12)
    assert "or use float64. Also, the 20 trial" in message(torch.float32, rtol=torch.tensor([1e-12, 1e-3]), atol=1e-12)
    for tolerances in ({}, {"rtol": 1e-12, "atol": 1e-4}):  # the defaults; a tolerance that atol bounds
        assert "stopped: the 20 trial steps" in message(torch.float32, **tolerances)
    assert "stopped: the 20 trial steps" in message(torch.float64, rtol=1e-12, atol=1e-12)


def test_a_step_that_is_too_small_because_the_solution_grows_without_bound() -> None:
    y0 = torch.ones(2, dtype=torch.float64)
    with pytest.raises(errors.StepSizeError, match=r"has grown from 1 to .*perhaps infinite near t=1\.") as raised:
        aca_ext.odeint(lambda t, y: y * y, y0, [0.0, 2.0])
    assert "lower min_step" not in str(raised.value)
    with pytest.raises(errors.StepSizeError, match="lower min_step") as raised:
        aca_ext.odeint(lambda t, y: y * y, y0, [0.0, 2.0], options={"min_step": 1e-3})
    assert "has grown" not in str(raised.value)
