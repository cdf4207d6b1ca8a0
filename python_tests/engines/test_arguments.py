"""The arguments of ``odeint`` and ``solve`` as their users see them: signature, types, and errors of calls."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import aca_ext
from aca_ext.engines.arguments import Arguments
from aca_ext.problem.state import State

PUBLIC: dict[str, Any] = {"odeint": aca_ext.odeint, "solve": aca_ext.solve}


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def call(function: Callable[..., Any], *more: Any, **settings: Any) -> Any:
    return function(decay, torch.ones(2), [0.0, 1.0], *more, **settings)


@pytest.mark.parametrize("name", PUBLIC)
class TestSignature:
    def test_lists_each_argument(self, name: str) -> None:
        parameters = inspect.signature(PUBLIC[name]).parameters
        arguments = [argument.name for argument in fields(Arguments)]
        assert list(parameters) == [*arguments, *(["event_fn"] if name == "odeint" else [])]
        kinds = [parameter.kind for parameter in parameters.values()]
        assert kinds[:3] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3
        assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY}
        assert parameters["rtol"].default == 1e-7
        assert parameters["gradient"].default == "aca"

    def test_has_types(self, name: str) -> None:
        hints = typing.get_type_hints(PUBLIC[name])
        assert list(hints) == [*inspect.signature(PUBLIC[name]).parameters, "return"]
        assert hints["rtol"] == float | Tensor
        assert hints["return"] == (aca_ext.Solution if name == "solve" else State)

    def test_has_its_own_name_and_text(self, name: str) -> None:
        function = PUBLIC[name]
        assert function.__name__ == name
        assert function.__module__ == "aca_ext.odeint"
        assert "func(t, y" in (aca_ext.odeint.__doc__ or "")
        assert "Solution" in (aca_ext.solve.__doc__ or "")


@pytest.mark.parametrize("name", PUBLIC)
class TestCalls:
    def test_of_all_arguments_by_name(self, name: str) -> None:
        given = PUBLIC[name](t=[0.0, 1.0], y0=torch.ones(2), func=decay)
        result = call(PUBLIC[name])
        one, other = (given, result) if isinstance(given, Tensor) else (given.y, result.y)
        assert torch.equal(one, other)

    def test_with_an_unknown_argument(self, name: str) -> None:
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'rtoll'"):
            call(PUBLIC[name], rtoll=1e-3)

    @pytest.mark.parametrize(
        ("wrong", "meant"),
        [
            ({"step_size": 0.1}, "options={'step_size': ...}"),
            ({"batch": "independent"}, "options={'batch': ...}"),
            ({"norm": max}, "options={'norm': ...}"),
            ({"maxsteps": 9}, "options={'max_num_steps': ...}"),
            ({"tol": 1e-3}, "rtol"),
            ({"solver": "rk4"}, "method"),
        ],
    )
    def test_with_an_unknown_argument_names_the_one_that_is_meant(
        self, name: str, wrong: dict[str, Any], meant: str
    ) -> None:
        with pytest.raises(aca_ext.errors.ArgumentTypeError, match=rf"; did you mean {re.escape(meant)}\?$"):
            call(PUBLIC[name], **wrong)
        with pytest.raises(aca_ext.errors.ArgumentTypeError, match=r"argument 'xyzzyq'$"):
            call(PUBLIC[name], xyzzyq=1)

    def test_with_too_many_positions(self, name: str) -> None:
        with pytest.raises(TypeError, match=rf"^{name}\(\) takes 3 positional arguments but 4 were given$"):
            call(PUBLIC[name], 1e-3)
        with pytest.raises(TypeError, match=r"takes 3 positional arguments but 5 positional arguments \(and 1 keyword"):
            call(PUBLIC[name], 1e-3, 1e-3, method="rk4")

    def test_with_too_few(self, name: str) -> None:
        with pytest.raises(TypeError, match=rf"^{name}\(\) missing 1 required positional argument: 't'$"):
            PUBLIC[name](decay, torch.ones(2))

    def test_with_one_given_twice(self, name: str) -> None:
        with pytest.raises(TypeError, match=rf"^{name}\(\) got multiple values for argument 't'$"):
            call(PUBLIC[name], t=[0.0])

    def test_a_type_error_of_func_is_its_own(self, name: str) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            raise TypeError("Arguments.__init__() takes 4 positional arguments")

        with pytest.raises(TypeError, match=r"^Arguments.__init__\(\) takes 4 positional arguments$"):
            PUBLIC[name](func, torch.ones(2), [0.0, 1.0])


def test_params_of_a_solve_that_resumes_may_be_an_iterator() -> None:
    found = list[Tensor]()
    for make in (iter, list):
        w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        options = {"max_num_steps": 3, "on_step_limit": "stop"}
        y0 = torch.ones(2, dtype=torch.float64)
        part = aca_ext.solve(lambda t, y, w=w: -w * y, y0, [0.0, 5.0], params=make([w]), options=options)
        assert not part.is_complete
        while not part.is_complete:
            part = part.resume()
        found += torch.autograd.grad(part.y[-1].sum(), w)
    assert torch.equal(*found)
    assert found[0].abs().max() > 0
