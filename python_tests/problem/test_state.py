"""Tuple and complex states packed into one dense real tensor and back, and states that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from aca_ext.errors import AcaError, ArgumentTypeError, ArgumentValueError
from aca_ext.problem.state import Packing, State, dense, tensors_in

REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def channels_last(dtype: torch.dtype = torch.float64) -> Tensor:
    return random(2, 3, 5, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)


STATES: dict[str, State] = {
    "tensor": random(3, 4),
    "float32": random(3, dtype=torch.float32),
    "0-d": random(),
    "empty": random(0, 3),
    "channels last": channels_last(),
    "transposed": random(3, 4).t(),
    "complex": random(3, 4, dtype=torch.complex128),
    "complex64": random(3, dtype=torch.complex64),
    "complex 0-d": random(dtype=torch.complex128),
    "complex empty": random(2, 0, dtype=torch.complex128),
    "complex transposed": random(3, 4, dtype=torch.complex128).t(),
    "complex conjugate": random(3, 4, dtype=torch.complex128).conj(),
    "complex expanded": random(3, 1, dtype=torch.complex128).expand(3, 4),
    "tuple": (random(3, 4), random(5)),
    "tuple of one": (random(3, 4),),
    "tuple with 0-d": (random(), random(2), random()),
    "tuple with empty": (random(0), random(2, 3), random(4, 0)),
    "tuple of empty": (random(0), random(0, 2)),
    "tuple of layouts": (channels_last(), random(3, 4).t(), random(2, 1).expand(2, 5)),
    "tuple of complex": (random(3, dtype=torch.complex128), random(dtype=torch.complex128)),
    "tuple of complex views": (random(2, 3, dtype=torch.complex128).t(), random(4, dtype=torch.complex128).conj()),
}
each_state = pytest.mark.parametrize("y", STATES.values(), ids=STATES)


def tensors(y: State) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y


def assert_same(one: State, other: State) -> None:
    assert isinstance(one, tuple) == isinstance(other, tuple)
    assert len(tensors(one)) == len(tensors(other))
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


@each_state
class TestEveryState:
    def test_round_trip(self, y: State) -> None:
        packing = Packing.of(y)
        assert_same(packing.unpack(packing.pack(y)), y)
        assert_same(packing.unpack(dense(packing.pack(y))), y)

    def test_is_packed_into_one_real_tensor_of_the_same_precision(self, y: State) -> None:
        packing = Packing.of(y)
        packed = packing.pack(y)
        assert packed.dtype == tensors(y)[0].real.dtype
        assert packed.numel() == packing.segments[-1] == sum(packing.sizes)
        assert packed.numel() == sum(part.numel() * (2 if part.is_complex() else 1) for part in tensors(y))
        assert len(packing.segments) == len(tensors(y)) + 1

    def test_rows(self, y: State) -> None:
        packing = Packing.of(y)
        packed = dense(packing.pack(y))
        rows = packing.unpack_rows(torch.stack([packed, 2 * packed, 3 * packed]))
        for part, part_of_y in zip(tensors(rows), tensors(y), strict=True):
            assert torch.equal(part, torch.stack([part_of_y, 2 * part_of_y, 3 * part_of_y]))
        assert isinstance(rows, tuple) == isinstance(y, tuple)

    def test_unpacking_copies_nothing(self, y: State) -> None:
        packing = Packing.of(y)
        packed = dense(packing.pack(y))
        storage = packed.untyped_storage().data_ptr()
        assert all(part.untyped_storage().data_ptr() == storage for part in tensors(packing.unpack(packed)))

    def test_dense_leaves_no_gaps(self, y: State) -> None:
        packed = Packing.of(y).pack(y)
        result = dense(packed)
        assert torch.equal(result, packed)
        assert result.stride() == torch.empty_like(result).stride()
        assert (
            result.numel() == 0
            or 1 + sum((size - 1) * stride for size, stride in zip(result.shape, result.stride(), strict=True))
            == result.numel()
        )


class TestOneTensor:
    @pytest.mark.parametrize("y", [random(3), random(), random(0, 2), channels_last()], ids=lambda y: str(y.dim()))
    def test_real_ones_are_taken_as_they_are(self, y: Tensor) -> None:
        packing = Packing.of(y)
        assert packing.is_trivial
        assert packing.pack(y) is y
        assert packing.unpack(y) is y
        assert dense(y) is y

    def test_complex_ones_are_viewed(self) -> None:
        y = random(3, 4, dtype=torch.complex128)
        packing = Packing.of(y)
        packed = packing.pack(y)
        assert not packing.is_trivial
        assert packed.shape == (3, 4, 2)
        assert packed.data_ptr() == y.data_ptr()
        assert packed[1, 2].tolist() == [y[1, 2].real.item(), y[1, 2].imag.item()]

    def test_one_of_a_tuple_is_not_trivial(self) -> None:
        assert not Packing.of((random(3),)).is_trivial


class TestTuples:
    def test_are_concatenated_in_order(self) -> None:
        y = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5.0), torch.zeros(0), torch.tensor([6.0]))
        packing = Packing.of(y)
        assert packing.pack(y).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert packing.segments == [0, 4, 5, 5, 6]
        assert packing.sizes == [4, 1, 0, 1]

    def test_elements_of_complex_ones_count_twice(self) -> None:
        packing = Packing.of((torch.zeros(2, dtype=torch.complex64), torch.zeros((), dtype=torch.complex64)))
        assert packing.segments == [0, 4, 6]

    def test_named_tuples_are_tuples(self) -> None:
        class Pendulum(NamedTuple):
            angle: Tensor
            speed: Tensor

        y = Pendulum(random(2), random(3))
        packing = Packing.of(y)
        assert packing.is_tuple
        assert_same(packing.unpack(packing.pack(y)), tuple(y))


class TestGradients:
    @pytest.mark.parametrize(
        "y",
        [
            (random(2, 2), random(), random(3)),
            (random(2, dtype=torch.complex128), random(1, 2, dtype=torch.complex128)),
            random(2, 2, dtype=torch.complex128),
        ],
        ids=["tuple", "complex tuple", "complex"],
    )
    def test_pass_through_both_ways(self, y: State) -> None:
        packing = Packing.of(y)
        inputs = tuple(part.clone().requires_grad_() for part in tensors(y))

        def pack(*parts: Tensor) -> Tensor:
            return packing.pack(parts if packing.is_tuple else parts[0]) ** 2

        def unpack(packed: Tensor) -> tuple[Tensor, ...]:
            return tuple(part**2 for part in tensors(packing.unpack(packed)))

        assert gradcheck(pack, inputs)
        assert gradcheck(unpack, packing.pack(y).clone().requires_grad_())


class TestDense:
    @pytest.mark.parametrize(
        "y", [random(3, 4).t(), random(2, 3, 4).permute(2, 0, 1), channels_last()], ids=["2-d", "3-d", "4-d"]
    )
    def test_permutations_stay(self, y: Tensor) -> None:
        assert dense(y) is y

    @pytest.mark.parametrize(
        "view",
        [
            lambda y: y[:, :1].expand(4, 6),
            lambda y: y[0, 0].expand(4),
            lambda y: y[:, ::2],
            lambda y: y[::2],
            lambda y: y[1:, 1:3],
            lambda y: torch._neg_view(y),
            lambda y: torch.view_as_complex(y.view(4, 3, 2)).conj().imag,
        ],
        ids=["expanded", "expanded 0-d", "columns", "rows", "block", "negative bit", "imaginary part of a conjugate"],
    )
    def test_others_are_copied(self, view: Callable[[Tensor], Tensor]) -> None:
        y = view(random(4, 6))
        result = dense(y)
        assert result.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()
        assert result.untyped_storage().nbytes() == y.numel() * y.element_size()
        assert not result.is_neg()
        assert torch.equal(result, y)

    def test_an_expanded_channels_last_state_stays_channels_last(self) -> None:
        y = channels_last()[:, :, ::2]
        assert dense(y).is_contiguous(memory_format=torch.channels_last)

    def test_copies_are_differentiable(self) -> None:
        y = random(4, 6).requires_grad_()
        assert gradcheck(lambda y: dense(y[:, ::2]) ** 2, y)


class TestErrors:
    @pytest.mark.parametrize(
        ("y", "error", "words"),
        [
            (1.0, ArgumentTypeError, "float"),
            (None, ArgumentTypeError, "NoneType"),
            ((), ArgumentValueError, "empty tuple"),
            ((torch.zeros(2), 1.0), ArgumentTypeError, r"y0\[1\] is of type float"),
            (torch.zeros(2, dtype=torch.int64), ArgumentTypeError, r"y0 has dtype torch.int64.*y0\.float\(\)"),
            (torch.zeros(2, dtype=torch.bool), ArgumentTypeError, r"torch\.bool"),
            ((torch.zeros(2), torch.zeros(2, dtype=torch.int32)), ArgumentTypeError, r"y0\[1\] has dtype"),
            ((torch.zeros(2), torch.zeros(2).double()), ArgumentTypeError, r"float64.*float32.*share"),
            ((torch.zeros(2), torch.zeros(2, dtype=torch.complex64)), ArgumentTypeError, "complex64.*share"),
            ((torch.zeros(2), torch.zeros(2, device="meta")), ArgumentTypeError, "meta.*cpu.*share"),
            (torch.eye(2).to_sparse(), ArgumentTypeError, r"layout.*to_dense\(\)"),
        ],
        ids=lambda value: "" if not isinstance(value, str) else value,
    )
    def test_say_what_is_wrong(self, y: object, error: type[AcaError], words: str) -> None:
        with pytest.raises(error, match=words):
            Packing.of(y)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *REAL, *COMPLEX])
    def test_every_floating_dtype_is_a_state(self, dtype: torch.dtype) -> None:
        assert Packing.of(torch.zeros(2, dtype=dtype)).is_complex == (dtype in COMPLEX)


class TestDescribe:
    @pytest.mark.parametrize(
        ("y", "words"),
        [
            (torch.zeros(2, 3), "shape (2, 3)"),
            (torch.zeros(2, 3, dtype=torch.complex64), "shape (2, 3)"),
            ((torch.zeros(2), torch.zeros(())), "a tuple of 2 tensors of shapes [(2,), ()]"),
            ((torch.zeros(2, dtype=torch.complex64),), "a tuple of 1 complex tensors of shapes [(2,)]"),
        ],
        ids=["tensor", "complex", "tuple", "complex tuple"],
    )
    def test_shapes_are_the_users(self, y: State, words: str) -> None:
        assert Packing.of(y).describe() == words


shapes = st.lists(st.integers(0, 4), max_size=4)


@settings(deadline=None)
@given(
    shapes=st.lists(shapes, min_size=1, max_size=5),
    dtype=st.sampled_from([*REAL, *COMPLEX]),
    is_tuple=st.booleans(),
    data=st.data(),
)
def test_any_state_survives_the_round_trip(
    shapes: list[list[int]], dtype: torch.dtype, is_tuple: bool, data: st.DataObject
) -> None:
    parts = []
    for shape in shapes:
        order = data.draw(st.permutations(range(len(shape))))
        step = data.draw(st.integers(1, 2))
        part = random(*(shape[d] * step for d in order), dtype=dtype)
        part = part[tuple(slice(None, None, step) for _ in order)]
        parts.append(part.permute(sorted(range(len(order)), key=order.__getitem__)))
    y: State = tuple(parts) if is_tuple else parts[0]
    packing = Packing.of(y)
    packed = dense(packing.pack(y))
    assert_same(packing.unpack(packed), y)
    assert_same(packing.unpack_rows(packed.unsqueeze(0)), tuple(p[None] for p in parts) if is_tuple else parts[0][None])


def test_tensors_in_a_value_of_any_depth() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    found = list(tensors_in([a, ("x", {"k": b, "l": [1, None, c]}), a]))
    assert [id(x) for x in found] == [id(x) for x in (a, b, c, a)]
    assert list(tensors_in(3)) == []
