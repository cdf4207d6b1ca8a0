"""Every kind of tensor in torch as every input: the result equals that of plain tensors, or is an error, no crash."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import aca_ext
from aca_ext.errors import AcaError, ArgumentTypeError, ArgumentValueError, TimeError

T = [0.0, 0.3, 1.0]
LOOSE = {"rtol": 1e-2, "atol": 1e-2}
BATCHES: dict[str, dict[str, Any]] = {"common": {}, "independent": {"options": {"batch": "independent"}}}


class OnlyFunctions(Tensor):
    """A subclass that overrides torch functions only, and whose elements are in memory as usual."""


def zeros(x: Tensor) -> Tensor:
    return torch._efficientzerotensor(tuple(x.shape), dtype=x.dtype, device=x.device)


def resized(x: Tensor, n_bytes: int) -> Tensor:
    x = x.detach().clone()
    x.untyped_storage().resize_(n_bytes)
    return x


def freed_behind(x: Tensor) -> Tensor:
    """A view with an offset into its freed storage, so that its address is not null."""
    view = from_end(x)
    view.untyped_storage().resize_(0)
    return view


def overlapping(x: Tensor) -> Tensor:
    return torch.as_strided(x.detach().flatten().clone(), x.shape, (0,) * x.dim())


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(x.detach())


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint8)


def masked(x: Tensor) -> Tensor:
    return torch.masked.masked_tensor(x.detach().clone(), torch.ones_like(x, dtype=torch.bool))


def mkldnn(x: Tensor) -> Tensor:
    return x.detach().float().to_mkldnn()


def from_end(x: Tensor) -> Tensor:
    """A view that ends where its storage ends."""
    return torch.cat([torch.full_like(x, 7.0), x])[len(x) :]


# Kinds with the same values in another form.
EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "negative bit": lambda x: torch._neg_view(-x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.clone(),
    "strided": lambda x: torch.stack([x, -x], -1)[..., 0],
    "end of a storage": from_end,
    "expanded": lambda x: x[:1].expand_as(x),
    "overlapping": overlapping,
    "subclass that overrides functions": lambda x: x.detach().as_subclass(OnlyFunctions),
    "parameter": lambda x: nn.Parameter(x.detach(), requires_grad=False),
    "buffer": lambda x: nn.Buffer(x.detach()),
    "inference": inference,
    "shared memory": lambda x: x.detach().clone().share_memory_(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "numpy, read only": lambda x: torch.frombuffer(x.detach().numpy().tobytes(), dtype=x.dtype).view(x.shape),
    "dlpack": lambda x: torch.from_dlpack(x.detach().numpy().copy()),
    "view of a leaf": lambda x: x.detach().clone().requires_grad_(x.is_floating_point()).view(-1).view(x.shape),
    "zeros without memory": zeros,
}
# Kinds without values, or whose values mean something else.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": fake,
    "functional": lambda x: torch._to_functional_tensor(x.detach()),
    "meta": lambda x: x.detach().to("meta"),
    "freed storage": lambda x: resized(x, 0),
    "end of a freed storage": lambda x: freed_behind(x),
    "shortened storage": lambda x: resized(x, x.element_size()),
    "wrapper subclass": lambda x: TwoTensor(x.detach().clone(), x.detach().clone()),
    "masked": masked,
    "nested": lambda x: torch.nested.nested_tensor([x.detach(), x.detach()]),
    "nested, jagged": lambda x: torch.nested.nested_tensor([x.detach(), x.detach()], layout=torch.jagged),
    "sparse COO": lambda x: x.detach().to_sparse(),
    "sparse CSR": lambda x: x.detach().reshape(len(x), -1).to_sparse_csr(),
    "mkldnn": mkldnn,
    "quantized": quantized,
    "empty": lambda x: x.detach()[:0],
    "0-d": lambda x: x.detach().sum(),
    "float16": lambda x: x.detach().half(),
    "bfloat16": lambda x: x.detach().bfloat16(),
    "float32": lambda x: x.detach().float(),
    "float8": lambda x: x.detach().to(torch.float8_e4m3fn),
    "int64": lambda x: x.detach().long(),
    "bool": lambda x: x.detach().bool(),
    "complex128": lambda x: torch.complex(x.detach(), x.detach()),
    "complex128, conjugated": lambda x: torch.complex(x.detach(), x.detach()).conj(),
}
KINDS = {**EQUAL, **OTHERS}
# Kinds that are valid states of another precision or shape.
STATES = {"empty", "0-d", "float16", "bfloat16", "float32", "complex128", "complex128, conjugated"}
# Kinds that an input accepts although they do not have the state's dtype or shape.
CONVERTED = {
    "as_y0": STATES - {"0-d"},
    "as_arg": OTHERS.keys() - {"meta"},
    "as_t": {"float16", "bfloat16", "float32"},
    "as_tolerance": {"0-d", "float16", "bfloat16", "float32", "float8"},
}


class Given(torch.autograd.Function):
    """Multiplies by a half; its gradient is a tensor of some kind."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.make = make
        return 0.5 * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.make(0.5 * g), None


class Returned(torch.autograd.Function):
    """Multiplies by minus a half; its result is a tensor of some kind."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        return make(-0.5 * y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -0.5 * g, None


def plainly(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function whose result has the values of ``make``'s, as a plain tensor of the argument's dtype."""

    def copy(x: Tensor) -> Tensor:
        made = make(x).detach()
        if made.layout is not torch.strided:
            made = made.to_dense()
        return (
            torch.zeros_like(x)
            if make is zeros
            else torch.empty_like(x[: len(made)] if made.dim() else made).copy_(made).to(x)
        )

    return copy


def start() -> Tensor:
    return torch.tensor([[1.0, 0.5, -0.25], [0.75, 2.0, 1.5]], dtype=torch.float64)


def as_y0(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    return aca_ext.odeint(lambda t, y: -0.5 * y, make(start()), T, **LOOSE, **settings)


def as_slope(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    return aca_ext.odeint(lambda t, y: make(-0.5 * y.detach()), start(), T, **LOOSE, **settings)


def as_slope_with_gradient(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    y0 = start().requires_grad_()
    y = aca_ext.odeint(lambda t, y: Returned.apply(y, make), y0, T, **LOOSE, **settings)
    return torch.autograd.grad(y.sum(), y0)[0]


def as_slope_of_a_tuple(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    y0 = (start(), start()[:, :1])
    return aca_ext.odeint(lambda t, y: (make(-0.5 * y[0]), -y[1]), y0, T, **LOOSE, **settings)[0]


def as_arg(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    x, y0 = make(start()), start().requires_grad_()
    y = aca_ext.odeint(lambda t, y, x: -0.5 * y * y, y0, T, args=(x,), **LOOSE, **settings)
    return torch.autograd.grad(y.sum(), y0)[0]


def as_gradient(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    y0 = start().requires_grad_()
    y = aca_ext.odeint(lambda t, y: -0.5 * y * y, y0, T, **LOOSE, **settings)
    return torch.autograd.grad(Given.apply(y, make).sum(), y0)[0]


def as_result_of_backward(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    y0 = start().requires_grad_()
    y = aca_ext.odeint(lambda t, y: Given.apply(y, make), y0, T, **LOOSE, **settings)
    return torch.autograd.grad(y.sum(), y0)[0]


def as_t(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    t = make(torch.tensor(T, dtype=torch.float64))
    return aca_ext.odeint(lambda t, y: -0.5 * y, start(), t, **LOOSE, **settings)


def as_tolerance(make: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> Tensor:
    atol = make(torch.full((2, 3), 1e-6, dtype=torch.float64))
    return aca_ext.odeint(lambda t, y: -0.5 * y, start(), T, rtol=1e-3, atol=atol, **settings)


POSITIONS = {
    position.__name__: position
    for position in (
        as_y0, as_slope, as_slope_with_gradient, as_slope_of_a_tuple, as_arg, as_gradient, as_result_of_backward, as_t,
        as_tolerance,
    )
}  # fmt: skip


@pytest.fixture(autouse=True)
def _without_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", EQUAL)
def test_the_same_values_in_another_form(kind: str, position: str, batch: str) -> None:
    run, settings = POSITIONS[position], BATCHES[batch]
    if position == "as_t" and kind in ("expanded", "overlapping", "zeros without memory"):
        with pytest.raises(TimeError, match=r"not repeat|strictly"):
            run(EQUAL[kind], settings)
        return
    if (position, batch) == ("as_result_of_backward", "independent") and kind in ("expanded", "overlapping"):
        with pytest.raises(ArgumentValueError, match="depend on one another"):  # as the gradients are made equal
            run(EQUAL[kind], settings)
        return
    assert relative_error(run(EQUAL[kind], settings), run(plainly(EQUAL[kind]), settings)) <= 1e-14


# Positions that torch's autograd checks before a solve does, and the errors that it raises.
BEHIND_AUTOGRAD = ("as_gradient", "as_result_of_backward")
AUTOGRAD_ERRORS = (RuntimeError, TypeError, NotImplementedError)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_refused_or_right(kind: str, position: str, batch: str) -> None:
    run, settings = POSITIONS[position], BATCHES[batch]
    if "storage" in kind and (position, batch) == ("as_result_of_backward", "independent"):
        pytest.skip("torch's own autograd adds it up, and reads it, before anything else could look")
    try:
        found = run(OTHERS[kind], settings)
    except AcaError:
        if kind in CONVERTED.get(position, ()):
            raise
        return
    except AUTOGRAD_ERRORS:
        assert position in BEHIND_AUTOGRAD
        return
    if position == "as_y0":
        assert kind in STATES
        assert relative_error(found[-1], math.exp(-0.5) * OTHERS[kind](start())) <= 2e-2
    else:
        twin = EQUAL["plain"] if position == "as_arg" else plainly(OTHERS[kind])  # such an arg is not used
        assert relative_error(found, run(twin, settings)) <= 1e-14


def test_every_kind_is_what_it_says() -> None:
    x = start()
    assert torch._is_zerotensor(EQUAL["zeros without memory"](x))
    assert EQUAL["negative bit"](x).is_neg()
    assert OTHERS["freed storage"](x).untyped_storage().nbytes() == 0
    assert OTHERS["end of a freed storage"](x).data_ptr() not in (0, None)
    assert type(OTHERS["fake"](x)).__name__ == "FakeTensor"
    assert torch._is_functional_tensor(OTHERS["functional"](x))


@pytest.mark.parametrize("kind", sorted(OTHERS.keys() - STATES - {"float8"}))
def test_a_state_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^y0 "):
        as_y0(OTHERS[kind], {})


def test_a_real_state_while_fake_tensors_are_made() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises((AcaError, RuntimeError)):
        aca_ext.odeint(lambda t, y: -y, start(), T)
