"""States that are trees: their structure, their paths in error messages, and solves equal to those of a flat tuple."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import aca_ext
from aca_ext.errors import AcaError, ArgumentTypeError, ArgumentValueError, EventError, SlopeError, ToleranceError
from aca_ext.problem.batch import RowPacking
from aca_ext.problem.state import Packing, tensors_in
from aca_ext.problem.trees import labelled_leaves, leaves_like, leaves_of, like, map_leaves, structure_of

T = [0.0, 0.4, 1.0]
MATRIX = torch.tensor([[-0.3, 1.0], [-1.0, -0.2]], dtype=torch.float64)


class Pair(NamedTuple):
    one: Any
    two: Any


@dataclasses.dataclass
class Body:
    place: Tensor
    speed: Tensor


torch.export.register_dataclass(Body)


@dataclasses.dataclass
class Unregistered:
    place: Tensor


def leaves(requires_grad: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 2), (3, 1, 2), (3, 2)]
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(requires_grad) for shape in shapes]


# Trees with three tensors.
TREES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "dict": lambda a, b, c: {"a": a, "b": b, "c": c},
    "list": lambda a, b, c: [a, b, c],
    "nested tuple": lambda a, b, c: (a, (b, c)),
    "dict of list": lambda a, b, c: {"x": [a, b], 2: c},
    "namedtuple in list": lambda a, b, c: [Pair(a, {"k": b}), c],
    "dataclass": lambda a, b, c: {"body": Body(a, b), "other": c},
    "ordered": lambda a, b, c: OrderedDict(z=a, y=OrderedDict(x=b, w=c)),
    "defaultdict": lambda a, b, c: defaultdict(list, {"z": [a], "y": [b, c]}),
    "with empty nodes": lambda a, b, c: {"none": [], "a": a, "b": ((), b), "c": c},
}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def slopes(t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a @ MATRIX.to(a) + c.sin(), -b * t + b.square() * 0.1, (b[:, 0] - c) * 0.7


def flat(t: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return slopes(t, *y)


def field(t: Tensor, y: Any) -> Any:
    """``flat`` for a tree of any structure."""
    return like(y, slopes(t, *leaves_of(y)))


def assert_equal(y: Any, expected: Any) -> None:
    assert len(leaves_of(y)) == len(leaves_of(expected))
    for one, other in zip(leaves_of(y), leaves_of(expected), strict=True):
        assert torch.equal(torch.nan_to_num(one, nan=7.5), torch.nan_to_num(other, nan=7.5))


class TestPacking:
    @each_tree
    @pytest.mark.parametrize("kind", [Packing, RowPacking])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    def test_round_trip(self, tree: Any, kind: type[Packing], dtype: torch.dtype) -> None:
        y = tree(*leaves(dtype=dtype))
        packing = kind.of(y)
        packed = packing.pack(y)
        assert not packed.is_complex()
        again = packing.unpack(packed)
        assert structure_of(again) == structure_of(y)
        assert_equal(again, y)
        rows = packing.unpack_rows(torch.stack([packed, 2 * packed]))
        assert structure_of(rows) == structure_of(y)
        assert_equal(rows, map_leaves(lambda x: torch.stack([x, 2 * x]), y))

    def test_a_flat_tuple_is_no_tree(self) -> None:
        assert Packing.of(tuple(leaves())).tree is None
        assert Packing.of(Pair(*leaves()[:2])).kind is Pair

    def test_packings_of_equal_structure_are_equal_and_hash_alike(self) -> None:
        one, other = (Packing.of({"a": [x], "b": x}) for x in (torch.zeros(2), torch.ones(2)))
        assert one == other
        assert hash(one) == hash(other)
        assert one != Packing.of({"a": torch.zeros(2), "b": torch.zeros(2)})
        assert one != Packing.of((torch.zeros(2), torch.zeros(2)))

    def test_describes_every_leaf(self) -> None:
        words = Packing.of({"pos": [torch.zeros(2), torch.zeros(())], "vel": torch.zeros(1)}).describe()
        assert words == "a tree of 3 tensors of shapes ['pos'][0]: (2,), ['pos'][1]: (), ['vel']: (1,)"

    def test_tensors_in_a_dataclass(self) -> None:
        a, b, _ = leaves()
        assert [id(x) for x in tensors_in([{"k": Body(a, b)}])] == [id(a), id(b)]


class TestPaths:
    def test_of_all_kinds_of_nodes(self) -> None:
        y = {"pos": [1, Body(2, 3)], "n": Pair(4, OrderedDict(z=(5,)))}  # type: ignore[arg-type]
        found = labelled_leaves(y, "y0")
        assert dict(found) == {
            "y0['pos'][0]": 1,
            "y0['pos'][1].place": 2,
            "y0['pos'][1].speed": 3,
            "y0['n'].one": 4,
            "y0['n'].two['z'][0]": 5,
        }

    def test_keys_may_come_in_another_order(self) -> None:
        structure = structure_of({"a": 1, "b": {"c": 2, "d": 3}})
        assert leaves_like(structure, {"b": {"d": 3, "c": 2}, "a": 1}, "x", SlopeError) == [1, 2, 3]


class TestSolves:
    @each_tree
    @pytest.mark.parametrize("gradient", ["aca", "direct", "naive", "adjoint"])
    def test_equals_the_flat_tuple(self, tree: Any, gradient: str) -> None:
        given, expected = leaves(True), leaves(True)
        y = aca_ext.odeint(field, tree(*given), T, gradient=gradient, rtol=1e-5, atol=1e-7)
        of_tuple = aca_ext.odeint(flat, tuple(expected), T, gradient=gradient, rtol=1e-5, atol=1e-7)
        assert structure_of(y) == structure_of(tree(*given))
        assert_equal(y, of_tuple)
        for result in (y, of_tuple):
            sum(part.square().sum() for part in leaves_of(result)).backward()  # type: ignore[union-attr]
        for one, other in zip(given, expected, strict=True):
            assert one.grad is not None
            assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]

    @each_tree
    def test_independent_samples(self, tree: Any) -> None:
        given, expected = leaves(True), leaves(True)
        options = {"batch": "independent"}
        times = torch.tensor([T, [0.0, 0.5, 2.0], [0.1, 0.2, 0.3]])

        def rows(t: Tensor, y: Any) -> Any:
            a, b, c = leaves_of(y)
            return like(y, (a @ MATRIX + c, -b * t, (b[:, 0] - c)))

        solution = aca_ext.solve(rows, tree(*given), times, options=options)
        of_tuple = aca_ext.solve(rows, tuple(expected), times, options=options)
        assert structure_of(solution.y) == structure_of(tree(*given))
        assert_equal(solution.y, of_tuple.y)
        grads = [
            torch.autograd.grad(sum(x.sin().sum() for x in leaves_of(s.y)), x)  # type: ignore[arg-type]
            for s, x in ((solution, given), (of_tuple, expected))
        ]
        assert all(map(torch.equal, *grads))

    @pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "rk4", "implicit_adams"])
    def test_methods(self, method: str) -> None:
        options = {"step_size": 0.02} if method in ("rk4", "implicit_adams") else None
        tree = TREES["dict of list"]
        y = aca_ext.odeint(field, tree(*leaves()), T, method=method, options=options)
        assert_equal(y, aca_ext.odeint(flat, tuple(leaves()), T, method=method, options=options))

    def test_one_leaf_equals_the_tensor(self) -> None:
        y0, other = (torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True) for _ in range(2))
        y = aca_ext.odeint(lambda t, y: {"x": y["x"] @ MATRIX}, {"x": y0}, T)
        plain = aca_ext.odeint(lambda t, y: y @ MATRIX, other, T)
        assert torch.equal(y["x"], plain)
        y["x"].sum().backward()
        plain.sum().backward()  # type: ignore[union-attr]
        assert y0.grad is not None
        assert torch.equal(y0.grad, other.grad)  # type: ignore[arg-type]

    def test_func_may_return_keys_in_another_order(self) -> None:
        def swapped(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"v": -y["x"], "x": y["v"]}

        y = aca_ext.odeint(swapped, {"x": torch.tensor(0.0), "v": torch.tensor(1.0)}, [0.0, 1.0], rtol=1e-6)
        assert y["x"][-1].item() == pytest.approx(torch.tensor(1.0).sin().item(), abs=1e-4)
        assert y["v"][-1].item() == pytest.approx(torch.tensor(1.0).cos().item(), abs=1e-4)

    def test_second_derivatives(self) -> None:
        y0 = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)

        def end(y: Tensor) -> Tensor:
            found = aca_ext.odeint(lambda t, y: {"a": [y["a"][0].sin()]}, {"a": [y]}, T, rtol=1e-9, atol=1e-9)
            return found["a"][0][-1].square().sum()

        assert torch.autograd.gradgradcheck(end, y0)

    def test_neural_ode(self) -> None:
        layer = aca_ext.NeuralODE(field, (0.0, 1.0))
        y = layer(TREES["dataclass"](*leaves()))
        assert isinstance(y["body"], Body)
        assert_equal(y, aca_ext.NeuralODE(flat, (0.0, 1.0))(tuple(leaves())))

    def test_solution_shows_its_structure_and_resumes(self) -> None:
        y0, how = TREES["dataclass"](*leaves()), {"on_step_limit": "stop", "max_num_steps": 3}
        solution = aca_ext.solve(field, y0, [0.0, 0.4, 5.0], options=how)
        assert "['body'].place: (1, 3, 2) torch.float64" in repr(solution).replace("float64", "torch.float64")
        assert isinstance(solution.y_reached["body"], Body)
        while not solution.is_complete:
            solution = solution.resume()
        assert_equal(solution.y, aca_ext.odeint(field, y0, [0.0, 0.4, 5.0]))


class TestArguments:
    def test_tolerances_of_the_same_structure(self) -> None:
        y0 = TREES["dict of list"](*leaves())
        rtol = {2: 1e-3, "x": [1e-4, torch.full((2,), 1e-5)]}
        y = aca_ext.odeint(field, y0, T, rtol=rtol, atol={"x": (1e-6, 1e-7), 2: 1e-8})
        expected = aca_ext.odeint(
            flat, tuple(leaves()), T, rtol=(1e-4, torch.full((2,), 1e-5), 1e-3), atol=(1e-6, 1e-7, 1e-8)
        )
        assert_equal(y, expected)

    def test_norm_gets_the_tree(self) -> None:
        seen = []

        def norm(error: dict[Any, Any]) -> Tensor:
            seen.append(structure_of(error))
            return error["x"][0].abs().max()

        y0 = TREES["dict of list"](*leaves())
        y = aca_ext.odeint(field, y0, T, options={"norm": norm})
        assert set(seen) == {structure_of(y0)}
        expected = aca_ext.odeint(flat, tuple(leaves()), T, options={"norm": lambda e: e[0].abs().max()})
        assert_equal(y, expected)

    def test_callback_gets_the_tree(self) -> None:
        steps: list[Any] = []
        y0 = TREES["dataclass"](*leaves())
        aca_ext.odeint(field, y0, T, callback=lambda step: steps.append(step.y))
        assert steps
        assert all(structure_of(y) == structure_of(y0) for y in steps)

    def test_jacobian_and_grid_get_the_tree(self) -> None:
        def jacobian(t: Tensor, y: dict[str, Tensor]) -> Tensor:
            return -y["x"].new_ones(1, 1)

        def grid(func: Any, y0: dict[str, Tensor], t: Tensor) -> Tensor:
            return torch.linspace(0.0, float(y0["x"]), 5)

        y0 = {"x": torch.tensor(1.0)}
        for how in ({"method": "kvaerno5", "options": {"jacobian": jacobian}}, {"options": {"grid_constructor": grid}}):
            y = aca_ext.odeint(lambda t, y: {"x": -y["x"]}, y0, [0.0, 1.0], **how)  # type: ignore[arg-type]
            assert y["x"][-1].item() == pytest.approx(torch.tensor(-1.0).exp().item(), abs=1e-3)


class TestEvents:
    @pytest.mark.parametrize("batch", [None, "independent"])
    def test_resets_and_ends(self, batch: str | None) -> None:
        def fall(t: Tensor, y: Any) -> Any:
            _, v = leaves_of(y)
            return like(y, (v, -torch.ones_like(v)))

        def bounce(t: Tensor, y: Any) -> Any:
            x, v = leaves_of(y)
            return like(y, (x * 0, -0.8 * v))

        def solve(y0: Any) -> aca_ext.Solution:
            events = [
                aca_ext.Event(lambda t, y: leaves_of(y)[0], direction=-1, reset=bounce),
                aca_ext.Event(lambda t, y: (t - 3.0) + 0 * leaves_of(y)[0], terminal=True),
            ]
            return aca_ext.solve(fall, y0, [0.0, 1.0, 5.0], events=events, options={"batch": batch})

        x, v = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        if batch is None:
            x, v = x[:1], v[:1]
        solution, expected = solve({"x": [x], "v": v}), solve((x, v))
        assert_equal(solution.y, expected.y)
        for one, other in zip(solution.events, expected.events, strict=True):
            assert len(one.t) > 0
            assert_equal(one.t, other.t)
            assert list(one.y) == ["x", "v"]
            assert_equal(one.y, other.y)

    def test_event_fn(self) -> None:
        y0 = {"x": torch.tensor(0.5)}
        t, y = aca_ext.odeint(  # type: ignore[misc]
            lambda t, y: {"x": -torch.ones_like(y["x"])}, y0, [0.0, 1.0], event_fn=lambda t, y: y["x"]
        )
        assert t.item() == pytest.approx(0.5)
        assert y["x"].tolist() == pytest.approx([0.5, 0.0], abs=1e-6)

    @pytest.mark.parametrize(
        ("y0", "new", "words"),
        [
            ({"x": torch.ones(1)}, {"y": torch.ones(1)}, r"event 0 has no 'x'"),
            ({"x": torch.ones(1)}, torch.ones(1), "event 0 returned shape"),
            ({"x": torch.ones(1)}, {"x": torch.ones(2)}, r"event 0 returned .*\(2,\).*the state has .*\(1,\)"),
            ((torch.ones(1),), [torch.ones(1)], "event 0 returned a tree"),
            ({"x": torch.ones(1)}, {}, "no state"),
        ],
        ids=["keys", "tensor", "shape", "list for a tuple", "empty"],
    )
    def test_a_reset_to_another_structure(self, y0: Any, new: Any, words: str) -> None:
        event = aca_ext.Event(lambda t, y: t - 0.5, reset=lambda t, y: new)
        with pytest.raises(EventError, match=words):
            aca_ext.solve(lambda t, y: map_leaves(torch.neg, y), y0, [0.0, 1.0], events=[event])


GOOD: dict[str, Any] = {"pos": [torch.zeros(2), torch.ones(2)], "n": Pair(torch.zeros(1), torch.zeros(1))}


class TestErrors:
    @pytest.mark.parametrize(
        ("y0", "error", "words"),
        [
            ({}, ArgumentValueError, "y0 is an empty dict"),
            ({"a": [], "b": ()}, ArgumentValueError, "y0 is an empty dict"),
            ([], ArgumentValueError, "y0 is an empty list"),
            ((), ArgumentValueError, "y0 is an empty tuple"),
            ({"a": torch.zeros(1), "b": [None]}, ArgumentTypeError, r"y0\['b'\]\[0\] is of type NoneType"),
            ({"a": torch.zeros(1), "b": (1.0,)}, ArgumentTypeError, r"y0\['b'\]\[0\] is of type float.*as_tensor"),
            ([Unregistered(torch.zeros(1))], ArgumentTypeError, r"y0\[0\] is of type Unregis.*register_dataclass"),
            (Unregistered(torch.zeros(1)), ArgumentTypeError, r"y0 is of type Unregistered.*register_dataclass"),
            ({"a": torch.zeros(1), "b": torch.zeros(1).double()}, ArgumentTypeError, r"y0\['b'\] is .*y0\['a'\]"),
            ({"a": {"b": torch.zeros(1, dtype=torch.int64)}}, ArgumentTypeError, r"y0\['a'\]\['b'\] has dtype"),
            ({1.0, 2.0}, ArgumentTypeError, "y0 is of type set"),
        ],
        ids=lambda value: "" if not isinstance(value, str) else value,
    )
    def test_of_y0(self, y0: Any, error: type[AcaError], words: str) -> None:
        with pytest.raises(error, match=words):
            aca_ext.odeint(lambda t, y: y, y0, T)

    @pytest.mark.parametrize(
        ("k", "words"),
        [
            (torch.zeros(2), "func's output is of type Tensor; the state has a dict there"),
            ({"pos": GOOD["pos"]}, "func's output has no 'n'"),
            ({**GOOD, "e": torch.zeros(1)}, "func's output has 'e', which the state does not have"),
            ({**GOOD, "pos": torch.zeros(2)}, r"func's output\['pos'\] is of type Tensor; the state has a list"),
            ({**GOOD, "pos": [torch.zeros(2)]}, r"func's output\['pos'\] has 1 parts; the state has 2"),
            ({**GOOD, "pos": [torch.zeros(2), [torch.zeros(2)]]}, r"func's output\['pos'\]\[1\] is of type list"),
            ({**GOOD, "n": (torch.zeros(1),) * 2}, r"func's output\['n'\] is of type tuple; the state has a Pair"),
            ({**GOOD, "n": Pair(torch.zeros(1), torch.zeros(3))}, r"func's output\['n'\]\.two has shape \(3,\)"),
            ({**GOOD, "n": Pair(torch.zeros(1), 1.0)}, r"func's output\['n'\]\.two is of type float"),
        ],
        ids=["tensor", "missing", "extra", "leaf for node", "length", "node for leaf", "tuple", "shape", "number"],
    )
    @pytest.mark.parametrize("engine", ["eager", "auto"])
    def test_of_another_structure_of_the_slope(self, k: Any, words: str, engine: str) -> None:
        with pytest.raises(SlopeError, match=words):
            aca_ext.odeint(lambda t, y: k, GOOD, T, engine=engine)

    def test_a_namedtuple_of_other_fields(self) -> None:
        class Swapped(NamedTuple):
            two: Tensor
            one: Tensor

        with pytest.raises(SlopeError, match=r"namedtuple of .*'two', 'one'.*y0 has .*'one', 'two'"):
            aca_ext.odeint(lambda t, y: Swapped(*y), Pair(torch.zeros(1), torch.zeros(1)), T)

    @pytest.mark.parametrize(
        ("rtol", "words"),
        [
            ({"pos": 1e-3, "n": 1e-3}, r"rtol\['pos'\] is of type float; the state has a list"),
            ({"pos": [1e-3, 1e-3]}, "rtol has no 'n'"),
            ({"pos": [1e-3, -1.0], "n": Pair(1.0, 1.0)}, r"rtol\['pos'\]\[1\] is -1; it must be"),
            ((1e-3, 1e-3), "rtol is of type tuple; the state has a dict"),
        ],
        ids=["prefix", "missing", "negative", "tuple"],
    )
    def test_of_tolerances(self, rtol: Any, words: str) -> None:
        with pytest.raises(ToleranceError, match=words):
            aca_ext.odeint(lambda t, y: y, GOOD, T, rtol=rtol)

    def test_a_tuple_state_takes_no_dict_of_tolerances(self) -> None:
        with pytest.raises(ToleranceError, match="rtol is of type dict; y0 is a tuple"):
            aca_ext.odeint(lambda t, y: y, (torch.zeros(1),), T, rtol={"a": 1.0})
