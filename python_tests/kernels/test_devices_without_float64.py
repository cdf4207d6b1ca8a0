"""Solves for a device that has neither kernels nor float64, such as MPS: the CPU stands in for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aca_ext
from aca_ext.kernels import fused, pool, reference

BATCH, WIDTH = 11, 13  # sizes that no tensor of times or statistics has


class _NoFloat64(TorchDispatchMode):
    """Raises where an operation makes a float64 tensor with as many rows or columns as the state."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == torch.float64 and {BATCH, WIDTH, BATCH * WIDTH} & set(x.shape):
                raise TypeError(f"{func} makes a float64 tensor of shape {tuple(x.shape)}, which the device lacks.")
        return result


@pytest.fixture
def device_without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reference, "_WITHOUT_FLOAT64", frozenset({"cpu"}))
    for module in (fused, pool):
        monkeypatch.setattr(module, "has_kernels", lambda like: False)
    with _NoFloat64():
        yield


def _solved(**arguments: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    w = torch.randn(WIDTH, WIDTH).requires_grad_()
    y = aca_ext.odeint(
        lambda t, y: torch.tanh(y @ w) - t * y, torch.ones(BATCH, WIDTH), torch.tensor([0.0, 0.4, 1.0]), **arguments
    )
    (grad,) = torch.autograd.grad(y[-1].square().sum(), w)
    return y.detach(), grad


@pytest.mark.usefixtures("device_without_float64")
def test_the_stand_in_notices_float64() -> None:
    with pytest.raises(TypeError, match="which the device lacks"):
        torch.ones(BATCH, WIDTH).double()


ARGUMENTS = [
    {},
    {"gradient": "direct"},
    {"gradient": "naive"},
    {"gradient": "adjoint"},
    {"method": "rk4", "options": {"step_size": 0.1}},
    {"method": "kvaerno3"},
    {"checkpoints": 2},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_as_with_kernels(arguments: dict[str, Any], request: pytest.FixtureRequest) -> None:
    expected = _solved(**arguments)
    request.getfixturevalue("device_without_float64")
    y, grad = _solved(**arguments)
    torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected[1], rtol=1e-3, atol=1e-4)
