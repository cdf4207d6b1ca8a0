"""States that are trees in every engine, inside transforms and recordings, replayed, dense and controlled.

Each equals the same solve of a flat tuple, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operands import on_cuda
from problems import sample
from torch import Tensor, nn

import aca_ext
from aca_ext.engines.compiled import graph_check
from aca_ext.errors import SlopeError
from aca_ext.problem.trees import leaves_of, like, map_leaves, structure_of

# Forward mode of PyTorch compiles decompositions by torch.jit, which warns that it is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@dataclasses.dataclass
class Body:
    place: Tensor
    speed: Tensor


torch.export.register_dataclass(Body)


class Flat(nn.Module):
    """Field of a tuple (place, speed, mass), each (batch, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(sample(2, 2, seed=1))

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        place, speed, mass = y
        return speed @ self.weight, -place * t, (mass - place).sin()


class Tree(Flat):
    """The same field of a dict that holds a list and a dataclass; its slope has the keys in another order."""

    def forward(self, t: Tensor, y: Any) -> Any:
        body = y["bodies"][0]
        place, speed, mass = super().forward(t, (body.place, body.speed, y["mass"]))
        return {"mass": mass, "bodies": [Body(place, speed)]}


def tree(place: Tensor, speed: Tensor, mass: Tensor) -> Any:
    return {"bodies": [Body(place, speed)], "mass": mass}


def leaves(requires_grad: bool = True) -> tuple[Tensor, ...]:
    return tuple(sample(3, 2, seed=seed).requires_grad_(requires_grad) for seed in range(3))


def size(y: Any) -> Tensor:
    parts = [part.square().sum() for part in leaves_of(y)]
    return torch.stack(parts).sum()


def assert_same(run: Callable[[nn.Module, Any], Any]) -> None:
    """``run`` of the tree equals that of the tuple, in values and gradients."""
    results = []
    for func, make in ((Tree(), tree), (Flat(), lambda *parts: parts)):
        given = leaves()
        y = run(func, make(*given))
        assert structure_of(y) == structure_of(make(*given))
        grads = torch.autograd.grad(size(y), (*given, *func.parameters()))
        results.append([*leaves_of(y), *grads])
    assert len(results[0]) == 7
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"engine": "eager"},
    "auto": {"engine": "auto"},
    "compiled": {"engine": "compiled"},
    "fixed compiled": {"engine": "compiled", "method": "rk4", "options": {"step_size": 0.1}},
    "evaluations": {"engine": "compiled", "gradient": "direct"},
    "lanes": {"engine": "compiled", "options": {"batch": "independent"}},
    "independent": {"options": {"batch": "independent"}},
    "few checkpoints": {"checkpoints": 2},
}


class TestEngines:
    @pytest.mark.parametrize("kind", ENGINES)
    def test_equals_the_tuple(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph_check, "is_worthwhile", lambda *_: True)  # or evaluations would not be compiled

        def run(func: nn.Module, y0: Any) -> Any:
            solutions = [aca_ext.solve(func, y0, T, **CLOSE | ENGINES[kind]) for _ in range(4 if kind == "auto" else 1)]
            return solutions[-1].y

        assert_same(run)

    @on_cuda
    def test_cuda_equals_the_tuple(self) -> None:
        func, y0 = Tree().cuda(), map_leaves(lambda x: x.detach().cuda(), tree(*leaves()))
        y = aca_ext.odeint(func, y0, T, engine="graph", **CLOSE)
        expected = aca_ext.odeint(Flat().cuda(), tuple(leaves_of(y0)), T, engine="graph", **CLOSE)
        assert all(map(torch.equal, leaves_of(y), leaves_of(expected)))

    def test_new_structures_are_traced_anew(self) -> None:
        def func(t: Tensor, y: Any) -> Any:
            return like(y, [-x for x in leaves_of(y)])

        x = sample(2)
        for y0 in ({"a": x}, {"b": x}, [x], {"a": [x]}):
            y = aca_ext.odeint(func, y0, T, engine="compiled", **CLOSE)
            assert structure_of(y) == structure_of(y0)

    @pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
    def test_compiled_refuses_another_structure(self, options: dict[str, Any]) -> None:
        with pytest.raises(SlopeError, match=r"func's output\['a'\] is of type list; the state has a tensor there"):
            aca_ext.odeint(lambda t, y: {"a": [-y["a"]]}, {"a": sample(2, 2)}, T, engine="compiled", options=options)


class TestTransforms:
    @pytest.mark.parametrize("options", [{}, {"batch": "independent"}, {"step_size": 0.2}])
    def test_grad(self, options: dict[str, Any]) -> None:
        def loss(make: Callable[..., Any], func: nn.Module) -> Callable[..., Tensor]:
            return lambda *parts: size(aca_ext.odeint(func, make(*parts), T, options=options, **CLOSE))

        given = leaves(False)
        found, expected = (
            torch.func.grad(loss(make, func), (0, 1, 2))(*given)
            for make, func in ((tree, Tree()), (lambda *parts: parts, Flat()))
        )
        assert all(map(torch.equal, found, expected))

    def test_vmap_and_jvp_of_a_dict(self) -> None:
        func = Tree()

        def end(y0: Any) -> Any:
            return map_leaves(lambda x: x[-1], aca_ext.odeint(func, y0, T, **CLOSE))

        y0 = tree(*leaves(False))
        mapped = torch.func.vmap(end)(y0)
        for i in range(3):
            alone = end(map_leaves(lambda x, i=i: x[i], y0))
            for one, other in zip(leaves_of(mapped), leaves_of(alone), strict=True):
                assert torch.allclose(one[i], other, rtol=1e-12, atol=1e-12)
        values, tangents = torch.func.jvp(end, (y0,), (map_leaves(torch.ones_like, y0),))
        assert structure_of(tangents) == structure_of(values) == structure_of(y0)


class TestRecordings:
    def test_export(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = aca_ext.NeuralODE(Tree(), method="rk4", options={"step_size": 0.25})

            def forward(self, y: Any) -> Any:
                return self.layer(y)

        model, y0 = Model(), tree(*leaves(False))
        exported = torch.export.export(model, (y0,)).module()
        for one, other in zip(leaves_of(exported(y0)), leaves_of(model(y0)), strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


class TestKnownSteps:
    @pytest.mark.parametrize("options", [{}, {"batch": "independent"}])
    def test_replay(self, options: dict[str, Any]) -> None:
        def run(func: nn.Module, y0: Any) -> Any:
            solution = aca_ext.solve(func, y0, T, options=options, **CLOSE)
            return aca_ext.replay(func, solution, y0)

        assert_same(run)

    @pytest.mark.filterwarnings("default")  # TorchDynamo warns of builtin functions
    @pytest.mark.parametrize("make", [tree, lambda *parts: parts], ids=["tree", "tuple"])
    def test_replay_is_compiled_as_one_graph(self, make: Callable[..., Any]) -> None:
        func = Tree() if make is tree else Flat()
        y0 = make(*leaves(False))
        solution = aca_ext.solve(func, y0, T, **CLOSE)
        compiled = torch.compile(lambda y, s: aca_ext.replay(func, s, y), backend="eager", fullgraph=True)
        for one, other in zip(leaves_of(compiled(y0, solution)), leaves_of(solution.y), strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)

    def test_dense(self) -> None:
        def run(func: nn.Module, y0: Any) -> Any:
            solution: Any = aca_ext.solve(func, y0, T, dense=True, **CLOSE)
            at = torch.tensor([[0.1, 0.5], [0.7, 0.9]])
            assert structure_of(solution.derivative(at)) == structure_of(y0)
            return solution(at)

        assert_same(run)

    def test_output_fn_gets_the_tree(self) -> None:
        y0 = tree(*leaves())

        def place(t: Tensor, y: Any) -> Any:
            return {"place": y["bodies"][0].place, "norm": [y["mass"].square().sum()]}

        solution = aca_ext.solve(Tree(), y0, T, output_fn=place, **CLOSE)
        y = aca_ext.odeint(Tree(), y0, T, **CLOSE)
        assert torch.allclose(solution.y["place"], y["bodies"][0].place, rtol=1e-10)
        assert torch.allclose(solution.y["norm"][0], y["mass"].square().sum((1, 2)), rtol=1e-10)
        assert "['place']: (3, 3, 2)" in repr(solution)


class TestControls:
    def test_paths_of_the_same_structure(self) -> None:
        knots = torch.linspace(0, 1, 5, dtype=torch.float64)
        x = aca_ext.Interpolation(knots, sample(3, 5, 2), kind="cubic")
        weight = sample(2, 2, 2, seed=4)

        def matrices(t: Tensor, z: Any) -> Any:
            return map_leaves(lambda part: torch.einsum("bh,hcd->bcd", part, weight).tanh(), z)

        y0 = [{"a": sample(3, 2)}, sample(3, 2, seed=2)]
        y = aca_ext.cdeint([{"a": x}, x], matrices, y0, T)
        expected = aca_ext.cdeint((x, x), matrices, tuple(leaves_of(y0)), T)
        assert structure_of(y) == structure_of(y0)
        assert all(map(torch.equal, leaves_of(y), leaves_of(expected)))
        with pytest.raises(SlopeError, match=r"the result of func\[1\] is of type dict; the state has a tensor"):
            aca_ext.cdeint([{"a": x}, x], lambda t, z: [{"a": matrices(t, z[0])["a"]}, {}], y0, T)
