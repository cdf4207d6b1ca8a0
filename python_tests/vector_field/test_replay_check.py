"""Comparison of replayed steps with the forward pass: a func that changed in between is an error, rounding is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

from aca_ext import odeint
from aca_ext.errors import ReplayError
from aca_ext.vector_field import replay_check

POLICIES: dict[str, dict[str, Any]] = {
    "every state": {},
    "one state": {"checkpoints": 1},
    "three states": {"checkpoints": 3},
    "offloaded": {"checkpoints": "cpu"},
    "independent": {"options": {"batch": "independent"}},
}
TIMES = [0.0, 0.3, 1.0]


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> dict[str, Any]:
    return POLICIES[request.param]


@pytest.fixture(params=[False, True], ids=["at once", "deferred"])
def deferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs the comparisons at once, as on the CPU, or deferred, as on a GPU, where the host does not wait for them."""
    if request.param:
        monkeypatch.setattr(replay_check, "is_deferred", lambda device: True)
    return bool(request.param)


class Driven(nn.Module):
    """A func that reads a control besides its arguments, in one of several forms."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -0.4, 0.2], dtype=dtype))
        self.register_buffer("gain", torch.ones(3, dtype=dtype))
        self.control = torch.tensor([1.0, 2.0, -0.5], dtype=dtype)
        self.sign = np.ones(())  # writes to a NumPy array go unnoticed
        self.calls = 0
        self.counts = self.draws = False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        k = float(self.sign) * torch.tanh(self.w * y + self.control) * self.gain
        if self.counts:
            k = k * (1 + 0.01 * self.calls)
        if self.draws:
            k = k * float(np.random.default_rng().random())
        return k * (2 if self.training else 1)


def _turn(f: Driven) -> None:
    f.sign[...] = -1.0


CHANGES: dict[str, Callable[[Driven], Any]] = {
    "a NumPy array": _turn,
    "a control through .data": lambda f: f.control.data.mul_(-1),
    "a buffer through .data": lambda f: f.gain.data.copy_(torch.tensor([2.0, 0.5, 1.0])),
    "a parameter through .data": lambda f: f.w.data.mul_(0.5),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("deferred")
def test_a_change_between_the_passes_is_found(change: str, create_graph: bool, policy: dict[str, Any]) -> None:
    func, y0 = Driven(), torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    y = odeint(func, y0, TIMES, rtol=1e-4, atol=1e-6, **policy)
    CHANGES[change](func)
    with pytest.raises(ReplayError, match=r"args=\(\.\.\.\).*gradient=\"direct\""):
        torch.autograd.grad(y[-1].sum(), y0, create_graph=create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("what", ["counts", "draws"])
@pytest.mark.usefixtures("deferred")
def test_what_differs_from_one_evaluation_to_the_next(what: str, create_graph: bool, policy: dict[str, Any]) -> None:
    func = Driven()
    setattr(func, what, True)
    y0 = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    y = odeint(func, y0, TIMES, rtol=1e-1, atol=1e-1, **policy)
    with pytest.raises(ReplayError):
        torch.autograd.grad(y[-1].sum(), y0, create_graph=create_graph)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.usefixtures("deferred")
def test_what_stays_is_no_error(create_graph: bool, policy: dict[str, Any]) -> None:
    found = []
    for settings in (policy, {**policy, "gradient": "direct", "checkpoints": None}):
        func, y0 = Driven(), torch.full((4, 3), 0.3, dtype=torch.float64, requires_grad=True)
        y = odeint(func, y0, TIMES, rtol=1e-4, atol=1e-6, **settings)
        found.append(torch.autograd.grad(y.square().sum(), [y0, func.w], create_graph=create_graph))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.usefixtures("deferred")
def test_the_error_names_the_step() -> None:
    func = Driven()
    y0 = torch.ones(2, 3, dtype=torch.float64)
    y = odeint(func, y0, [0.0, 1.0], method="rk4", options={"step_size": 0.25})
    _turn(func)
    with pytest.raises(ReplayError, match=r"step 4 of 4 \(t=0\.75, h=0\.25\)"):
        y.sum().backward()


@pytest.mark.usefixtures("deferred")
def test_the_error_names_the_sample() -> None:
    scale = torch.ones(3, 1, dtype=torch.float64)
    y0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    y = odeint(lambda t, y: -y * scale, y0, TIMES, options={"batch": "independent"})
    scale.data[1] = 2.0
    with pytest.raises(ReplayError, match=r"step of sample 1 \(t="):
        y.sum().backward()


@pytest.mark.parametrize("policy", [{"checkpoints": 1}, {"checkpoints": 3}, {}], ids=str)
def test_a_second_backward_pass_is_compared_too(policy: dict[str, Any]) -> None:
    func, y0 = Driven(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = odeint(func, y0, TIMES, options={"step_size": 0.1}, **policy)
    (first,) = torch.autograd.grad(y.sum(), y0, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), y0, retain_graph=True)
    assert torch.equal(first, second)
    _turn(func)
    with pytest.raises(ReplayError):
        torch.autograd.grad(y.sum(), y0, retain_graph=True)
    with pytest.raises(ReplayError):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.usefixtures("deferred")
class TestTolerance:
    def test_a_small_change_is_found(
        self, dtype: torch.dtype, change: float, create_graph: bool, policy: dict[str, Any]
    ) -> None:
        func, y0 = Driven(dtype), torch.ones(4, 3, dtype=dtype, requires_grad=True)
        y = odeint(func, y0, TIMES, rtol=1e-3, atol=1e-3, **policy)
        func.sign[...] += change
        with pytest.raises(ReplayError):
            torch.autograd.grad(y.sum(), y0, create_graph=create_graph)

    def test_rounding_passes(
        self, dtype: torch.dtype, change: float, create_graph: bool, policy: dict[str, Any]
    ) -> None:
        """Noise in the last bits, as in kernels that add in no fixed order."""
        noise, eps = np.random.default_rng(0), torch.finfo(dtype).eps
        w = torch.tensor(0.7, dtype=dtype, requires_grad=True)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.sin(w * y) * torch.from_numpy(1 + 4 * eps * noise.standard_normal(y.shape)).to(dtype)

        y0 = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        y = odeint(func, y0, TIMES, rtol=1e-4, atol=1e-4, **policy)
        torch.autograd.grad(y.sum(), [y0, w], create_graph=create_graph)

    def test_a_small_component_does_not_hide_behind_a_large_one(
        self, dtype: torch.dtype, change: float, create_graph: bool, policy: dict[str, Any]
    ) -> None:
        gain = torch.ones((), dtype=dtype)
        large, small = torch.full((4, 2), 1e6, dtype=dtype), torch.full((4, 3), 1e-3, dtype=dtype, requires_grad=True)
        y = odeint(lambda t, y: (-y[0], gain * y[1]), (large, small), TIMES, rtol=1e-4, atol=1e-6, **policy)
        gain += change
        with pytest.raises(ReplayError):
            torch.autograd.grad(y[1].sum(), small, create_graph=create_graph)


@pytest.mark.usefixtures("deferred")
def test_another_kernel_where_gradients_are_recorded() -> None:
    """In evaluation mode and without gradients, a transformer layer uses a fused kernel with other rounding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return 3 * layer(y)

    y0 = torch.randn(5, 7, 16)
    with torch.no_grad():
        fast = func(torch.zeros(()), y0)
    assert not torch.equal(fast, func(torch.zeros(()), y0))
    for settings in ({}, {"checkpoints": 2}, {"options": {"batch": "independent"}}):
        y = odeint(func, y0, TIMES, rtol=1e-3, atol=1e-3, **settings)
        y.sum().backward()


def test_a_half_precision_model_under_a_float32_state() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval().bfloat16().requires_grad_(False)
    y0 = torch.randn(5, 7, 16, requires_grad=True)
    y = odeint(lambda t, y: layer(y.bfloat16()).float(), y0, TIMES, method="rk4", options={"step_size": 0.2})
    y.sum().backward()


def test_samples_that_depend_on_one_another_later() -> None:
    y0 = torch.tensor([[1.0], [5.0], [0.2]], dtype=torch.float64, requires_grad=True)
    options = {"batch": "independent", "first_step": 1.0}  # some samples reject this step
    # Not from the first slope on, which would be refused at once.
    y = odeint(lambda t, y: -y * torch.where(t > 0, y.mean(), 1.0) - torch.sin(y * 5) * y, y0, TIMES, options=options)
    with pytest.raises(ReplayError, match="samples depend on one another"):
        y.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_start_that_is_edited_before_the_backward_pass(create_graph: bool, policy: dict[str, Any]) -> None:
    found = []
    for edit in (False, True):
        func, y0 = Driven(), torch.full((4, 3), 0.3, dtype=torch.float64)
        y = odeint(func, y0, TIMES, rtol=1e-4, atol=1e-6, **policy)
        if edit:
            y0.mul_(2.0)
        found.append(torch.autograd.grad(y.square().sum(), func.w, create_graph=create_graph)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["encoder", "attention", "GRU", "convolution"])
def test_modules_in_evaluation_mode(kind: str) -> None:
    torch.manual_seed(1)
    if kind == "encoder":
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 3).eval()
        func: Any = lambda t, y: encoder(y)  # noqa: E731
    elif kind == "attention":
        attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
        func = lambda t, y: attention(y, y, y, need_weights=False)[0]  # noqa: E731
    elif kind == "GRU":
        gru = nn.GRU(16, 16, batch_first=True).eval()
        func = lambda t, y: gru(y)[0]  # noqa: E731
    else:
        convolution = nn.Conv1d(7, 7, 3, padding=1).eval()
        func = lambda t, y: torch.tanh(convolution(y))  # noqa: E731
    y0 = torch.randn(32, 7, 16, requires_grad=True)
    odeint(func, y0, TIMES, rtol=1e-4, atol=1e-4)[-1].sum().backward()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("y1", "y_next", "is_wrong"),
    [
        ([1.0, NAN, INF, 2.0], [1.0, NAN, INF, 2.0], False),
        ([1.0, NAN, INF, 2.0], [1.5, NAN, INF, 2.0], True),
        ([1.0, 3.0, INF, 2.0], [1.0, NAN, INF, 2.0], True),
        ([1.0, 3.0, INF, 2.0], [1.0, 3.0, -INF, 2.0], True),
        ([1.0, 3.0, INF, 2.0], [1.0, 3.0, 1.0, 2.0], True),
        ([0.0, 3.0, 1.0, 2.0], [-0.0, 3.0, 1.0, 2.0], False),
    ],
)
@pytest.mark.usefixtures("deferred")
def test_nan_and_infinity(y1: list[float], y_next: list[float], is_wrong: bool, by_row: bool) -> None:
    """NaN or an equal infinity in both passes is no difference, since a fixed grid on a GPU may end in either."""
    end, expected = (torch.tensor([x]) for x in (y1, y_next))
    check = replay_check.ReplayCheck(end, [0, 4], 1, None, by_row=by_row)
    rows = {"t": np.zeros(1), "h": np.ones(1), "rows": np.array([0])} if by_row else {"t": 0.0, "h": 1.0}
    step, start = replay_check.ReplayedStep(0, **rows), torch.tensor([[1.0, NAN, 1.0, 1.0]])
    with pytest.raises(ReplayError) if is_wrong else nullcontext():
        check.compare(step, start, expected, end, [start])
        check.finish()


def test_hooks_that_change_the_layout_of_saved_tensors() -> None:
    convolution = nn.Conv2d(3, 3, 3, padding=1).double()
    y0 = torch.randn(2, 3, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for pack in (lambda x: x, lambda x: x.detach().clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = odeint(lambda t, y: torch.tanh(convolution(y)), y0, TIMES, rtol=1e-4, atol=1e-4)
        found.append(torch.autograd.grad(y.sum(), y0)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex128])
def test_other_dtypes(dtype: torch.dtype) -> None:
    gain = torch.ones(3, dtype=dtype)
    y0 = torch.tensor([0.5, 1.0, 2.0], dtype=dtype, requires_grad=True)
    y = odeint(lambda t, y: -y * gain, y0, TIMES, method="rk4", options={"step_size": 0.1})
    torch.autograd.grad(y[-1].abs().sum(), y0, retain_graph=True)
    gain.mul_(1.5)
    with pytest.raises(ReplayError):
        torch.autograd.grad(y[-1].abs().sum(), y0)


def test_a_gradient_of_the_first_output_alone_needs_no_step() -> None:
    func, y0 = Driven(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = odeint(func, y0, TIMES, options={"step_size": 0.1})
    (g,) = torch.autograd.grad(y[0].sum(), y0)
    assert torch.equal(g, torch.ones_like(g))


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast(enabled: bool) -> None:
    layer, gain = nn.Linear(3, 3), np.ones(())
    y0 = torch.ones(4, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        y = odeint(lambda t, y: float(gain) * layer(y).float(), y0, TIMES, options={"step_size": 0.2})
    torch.autograd.grad(y.sum(), y0, retain_graph=True)
    gain[...] = 1.5
    with pytest.raises(ReplayError):
        torch.autograd.grad(y.sum(), y0)


class TestCostOfSecondDerivatives:
    """Each solve is replayed once per derivative; inputs whose gradient is not requested cause no further replay."""

    @pytest.mark.parametrize("options", [{}, {"batch": "independent"}], ids=["common", "independent"])
    def test_solves_in_a_row(self, options: dict[str, Any]) -> None:
        def evaluations(n: int) -> int:
            calls = 0
            a, y = torch.tensor(-0.6, requires_grad=True), torch.ones(2, dtype=torch.float64)

            def func(t: Tensor, z: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return a * z

            for _ in range(n):
                y = odeint(func, y, [0.0, 1 / n], options=dict(options))[-1]
            (first,) = torch.autograd.grad(y.sum(), a, create_graph=True)
            (second,) = torch.autograd.grad(first, a, create_graph=True)
            (third,) = torch.autograd.grad(second, a)
            for found in (first, second, third):  # of 2·exp(a)
                assert found.item() == pytest.approx(2 * 0.548812, rel=1e-4)
            return calls

        assert evaluations(12) <= 5 * evaluations(3)

    def test_a_solve_inside_another(self) -> None:
        def found(n_steps: int, gradient: str) -> tuple[list[Tensor], int]:
            calls = 0
            a = torch.tensor(-0.6, dtype=torch.float64, requires_grad=True)

            def inner(t: Tensor, z: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return a * z

            def outer(t: Tensor, y: Tensor) -> Tensor:
                return odeint(inner, y, [0.0, 0.1], method="rk4", gradient=gradient)[-1] * a

            y0, grid = torch.ones(2, dtype=torch.float64), {"step_size": 1 / n_steps}
            y = odeint(outer, y0, [0.0, 1.0], method="midpoint", options=grid, gradient=gradient)[-1]
            (first,) = torch.autograd.grad(y.sum(), a, create_graph=True)
            (second,) = torch.autograd.grad(first, a, create_graph=True)
            return [first.detach(), second.detach(), *torch.autograd.grad(second, a)], calls

        few, many = found(2, "aca"), found(6, "aca")
        assert many[1] <= 4 * few[1]
        for one, other in zip(many[0], found(6, "direct")[0], strict=True):
            assert relative_error(one, other) <= 1e-12
