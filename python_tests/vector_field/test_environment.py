"""Changes of state that func reads between the passes: the gradient is that of the forward pass, or an error.

Most changes here alter the derivative of func but none of its values, so that comparing values would not find them.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from torch import Tensor, nn

import aca_ext
from aca_ext.errors import KeptTensorWarning, ReplayError

DTYPE = torch.float64
TIMES = [0.0, 0.3, 1.0]
POLICIES: dict[str, dict[str, Any]] = {
    "every state": {},
    "one state": {"checkpoints": 1},
    "offloaded": {"checkpoints": "cpu"},
    "fixed": {"method": "rk4", "options": {"step_size": 0.2}},
    "independent": {"options": {"batch": "independent"}},
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> dict[str, Any]:
    return POLICIES[request.param]


class Silent(nn.Module):
    """A field whose last layer has zero weights, so that the layers before it affect derivatives but no values."""

    def __init__(self, holder: str = "attribute") -> None:
        super().__init__()
        self.out = nn.Linear(3, 3, dtype=DTYPE)
        nn.init.zeros_(self.out.weight)
        self.kind = holder
        self.control = torch.tensor([1.0, 2.0, -0.5], dtype=DTYPE)
        self.register_buffer("gain", torch.tensor([1.0, 2.0, -0.5], dtype=DTYPE))
        self.entry = {"u": self.control}
        self.listed = [self.control]
        self.queue = deque([self.control])
        self.slotted = Slotted(self.control)
        self.scale, self.is_detached, self.calls = 1.0, False, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        u = {
            "attribute": self.control,
            "buffer": self.gain,
            "dict": self.entry["u"],
            "list": self.listed[0],
            "deque": self.queue[0],
            "slot": self.slotted.control,
            "number": self.scale * torch.ones(3, dtype=DTYPE),
            "flag": torch.ones(3, dtype=DTYPE) + (y.detach() if self.is_detached else y),
            "presence": torch.ones(3, dtype=DTYPE) * (2.0 if "extra" in self.entry else 1.0),
            "mode": torch.ones(3, dtype=DTYPE) * (2.0 if self.out.training else 1.0),
            "global": CONTROL,
            "class": self.shared * torch.ones(3, dtype=DTYPE),
        }[self.kind]
        return -0.5 * y + self.out(torch.tanh(y + u))

    shared = 1.0


@dataclass
class Slotted:
    control: Tensor
    __slots__ = ("control",)


CONTROL = torch.tensor([1.0, 2.0, -0.5], dtype=DTYPE)
OTHER = torch.tensor([-3.0, 0.5, 0.1], dtype=DTYPE)


def _set_global(f: Silent) -> None:
    globals()["CONTROL"] = OTHER


CHANGES: dict[str, Callable[[Silent], Any]] = {
    "attribute": lambda f: setattr(f, "control", OTHER),
    "buffer": lambda f: setattr(f, "gain", OTHER),
    "dict": lambda f: f.entry.update(u=OTHER),
    "list": lambda f: f.listed.__setitem__(0, OTHER),
    "deque": lambda f: (f.queue.clear(), f.queue.append(OTHER)),
    "slot": lambda f: setattr(f.slotted, "control", OTHER),
    "number": lambda f: setattr(f, "scale", 3.0),
    "flag": lambda f: setattr(f, "is_detached", True),
    "presence": lambda f: f.entry.update(extra=True),
    "mode": lambda f: f.out.eval(),
    "global": _set_global,
    "class": lambda f: setattr(Silent, "shared", 3.0),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CONTROL", CONTROL)
    monkeypatch.setattr(Silent, "shared", 1.0)


def _gradients(
    func: Silent, change: Callable[[Silent], Any] | None, create_graph: bool = False, **settings: Any
) -> tuple[Tensor, ...]:
    y0 = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
    y = aca_ext.odeint(func, y0, TIMES, rtol=1e-5, atol=1e-7, **settings)
    if change is not None:
        change(func)
    inputs = [y0, *func.parameters()]
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=create_graph)
    if not create_graph:
        return first
    second = torch.autograd.grad(first[1].square().sum(), inputs, allow_unused=True)
    return *first, *[torch.zeros(()) if g is None else g for g in second]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("holder", CHANGES)
def test_a_change_of_derivatives_alone(holder: str, create_graph: bool, policy: dict[str, Any]) -> None:
    torch.manual_seed(0)
    func = Silent(holder)
    expected = _gradients(copy.deepcopy(func), None, create_graph, **policy)
    found = _gradients(func, CHANGES[holder], create_graph, **policy)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-14


@pytest.mark.parametrize("holder", CHANGES)
def test_afterwards_the_change_is_there(holder: str) -> None:
    func = Silent(holder)
    _gradients(func, None)
    names = [name for name, _ in func.named_buffers()], list(func.__dict__), list(func._parameters)
    changed = copy.deepcopy(func)
    _gradients(func, CHANGES[holder])
    CHANGES[holder](changed)
    y = torch.ones(3, dtype=DTYPE)
    nn.init.ones_(func.out.weight), nn.init.ones_(changed.out.weight)
    assert torch.equal(func(torch.zeros(()), y), changed(torch.zeros(()), y))
    assert names == ([name for name, _ in func.named_buffers()], list(func.__dict__), list(func._parameters))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_tensor_that_was_written_to_is_an_error_where_func_reads_it(
    create_graph: bool, policy: dict[str, Any]
) -> None:
    for holder, name in (("attribute", "control"), ("buffer", "gain")):
        with pytest.raises(ReplayError, match=r"shape \(3,\).*was written to between"):
            _gradients(Silent(holder), lambda f, name=name: getattr(f, name).mul_(2.0), create_graph, **policy)
    _gradients(Silent("number"), lambda f: f.gain.mul_(2.0), create_graph, **policy)


def test_parameters_unfrozen_between_the_passes_are_constants(policy: dict[str, Any]) -> None:
    func = Silent()
    nn.init.ones_(func.out.weight)
    func.out.requires_grad_(False)
    y0 = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
    found = []
    for settings in (policy, {**policy, "gradient": "direct", "checkpoints": None}):
        y = aca_ext.odeint(func, y0, TIMES, rtol=1e-5, atol=1e-7, **settings)
        func.out.requires_grad_(True)
        (g,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [y0, func.out.weight], allow_unused=True))
        func.out.requires_grad_(False)
    assert [g for _, g in found] == [None, None]
    assert relative_error(found[0][0], found[1][0]) <= 1e-12


@pytest.mark.parametrize("change", ["added", "removed"])
def test_a_hook_of_a_module_that_comes_or_goes_between_the_passes(change: str, policy: dict[str, Any]) -> None:
    func = nn.Linear(3, 3, dtype=DTYPE)
    slope = lambda t, y: torch.tanh(func(y))  # noqa: E731
    y0 = torch.linspace(-1, 1, 6, dtype=DTYPE).view(2, 3)
    first = func.register_forward_hook(lambda module, given, result: result + 1)
    second = func.register_forward_hook(lambda module, given, result: 2 * result)
    expected = aca_ext.odeint(slope, y0, TIMES, **{**policy, "checkpoints": None}, gradient="direct")
    y = aca_ext.odeint(slope, y0, TIMES, **policy)
    if change == "added":
        hooks = [first, second, func.register_forward_hook(lambda module, given, result: result.exp())]
    else:
        first.remove()
        hooks = [second]
    after = list(func._forward_hooks.items())
    (grad,) = torch.autograd.grad(y[-1].sum(), func.weight)
    assert list(func._forward_hooks.items()) == after
    assert [hook.id for hook in hooks] == list(func._forward_hooks)
    (of_direct,) = torch.autograd.grad(expected[-1].sum(), func.weight)
    assert relative_error(grad, of_direct) < 1e-12


def test_controls_swapped_in_a_loop_of_solves(policy: dict[str, Any]) -> None:
    controls = [torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5])]
    found = []
    for settings in (policy, {**policy, "gradient": "direct", "checkpoints": None}):
        w, z = torch.tensor([0.7, -0.4], requires_grad=True), torch.tensor([[0.5, 1.0]])
        for k in range(2):
            u = controls[k]
            z = aca_ext.odeint(lambda t, y: torch.tanh(w * y) * u, z, [k, k + 1.0], **settings)[-1]  # noqa: B023
        found.append(torch.autograd.grad(z.sum(), w)[0])
    assert relative_error(*found) <= 1e-5


class Counted(Silent):
    """A field that counts and records its evaluations in several places."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.counts = {"calls": 0}
        self.noise: Tensor | None = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(float(t))
        self.counts["calls"] += 1
        if self.noise is None:
            self.noise = torch.randn(y.shape, dtype=y.dtype)
        return super().forward(t, y) + 0.1 * self.noise


def test_records_of_func_go_on() -> None:
    """A user counts the evaluations of the backward pass by setting the counter to zero between the passes."""
    func = Counted()
    y0 = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
    y = aca_ext.odeint(func, y0, TIMES, method="rk4", options={"step_size": 0.2})
    n, func.calls, func.times, func.counts = func.calls, 0, [], {"calls": 0}
    y.sum().backward()
    assert func.calls == len(func.times) == func.counts["calls"] > 0
    assert n > 0


def test_noise_that_func_draws_once_for_each_solve() -> None:
    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(0)
        func = Counted()
        y = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
        y0 = y
        for _ in range(2):
            func.noise = None
            y = aca_ext.odeint(func, y, TIMES, method="rk4", options={"step_size": 0.2}, gradient=gradient)[-1]
        kept = func.noise = torch.randn(4, 3, dtype=DTYPE)
        found.append(torch.autograd.grad(y.square().sum(), [y0, *func.parameters()]))
        assert func.noise is kept
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


class Late(nn.Module):
    """A field that keeps a tensor from evaluations in the second half of a solve."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.3, dtype=DTYPE))
        self.kind = kind
        self.cache: Any = None
        self.penalty: Any = 0.0
        self.history: list[Tensor] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if float(t) > 0.5:
            if self.kind == "cache":
                if self.cache is None:
                    self.cache = torch.exp(self.p)
                return -self.cache * y
            if self.kind == "penalty":
                self.penalty = self.penalty + self.p**2
            if self.kind == "history":
                self.history.append(self.p * y)
        return -self.p * y


def _late(kind: str, gradient: str, **settings: Any) -> tuple[Late, Tensor, Tensor]:
    func, y0 = Late(kind), torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
    options = {"options": {"step_size": 0.2}, **settings}
    return func, y0, aca_ext.odeint(func, y0, TIMES, method="rk4", gradient=gradient, **options)


@pytest.mark.filterwarnings("ignore::aca_ext.errors.KeptTensorWarning")
def test_a_cache_that_is_filled_in_the_middle_of_a_solve() -> None:
    found = []
    for gradient in ("aca", "direct"):
        func, y0, y = _late("cache", gradient)
        found.append(torch.autograd.grad(y.square().sum(), [y0, func.p]))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("kind", ["penalty", "history"])
def test_what_is_kept_from_the_middle_of_a_solve_has_no_gradient(kind: str) -> None:
    with pytest.warns(KeptTensorWarning, match=kind if kind == "penalty" else "list"):
        func, _, y = _late(kind, "aca")
    kept = func.penalty if kind == "penalty" else torch.stack(func.history).sum()
    with pytest.raises(ReplayError, match='gradient="direct"'):
        (y.sum() + kept).backward()


@pytest.mark.parametrize("form", ["tensor", "tuple", "solution", "closure"])
def test_solutions_that_func_holds_do_not_keep_one_another(form: str) -> None:
    class Holding(Silent):
        last: Any = None

    func, alive = Holding(), []
    for _ in range(3):
        y0 = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
        solution = aca_ext.solve(func, y0, TIMES)
        y = solution.y
        func.last = {"tensor": y, "tuple": (y,), "solution": solution, "closure": lambda y=y: y}[form]
        del y, solution
        alive.append(weakref.ref(y0))
        del y0
    gc.collect()
    assert [ref() is not None for ref in alive] == [False, False, True]


@pytest.mark.parametrize("form", ["object", "dict made at the start"])
@pytest.mark.filterwarnings("ignore::aca_ext.errors.KeptTensorWarning")
def test_a_cache_in_an_object_that_is_made_in_the_solve(form: str) -> None:
    class Caching(Late):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            if form != "object" and float(t) == 0:
                self.cache = {}
            if float(t) <= 0.5:
                return -y
            if form == "object":
                self.cache = self.cache or SimpleNamespace(x=torch.exp(self.p))
                return -self.cache.x * y
            if "x" not in self.cache:
                self.cache["x"] = torch.exp(self.p)
            return -self.cache["x"] * y

    found = []
    for gradient in ("aca", "direct"):
        func, y0 = Caching("none"), torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
        y = aca_ext.odeint(func, y0, TIMES, method="rk4", options={"step_size": 0.2}, gradient=gradient)
        found.append(torch.autograd.grad(y.square().sum(), [y0, func.p]))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("is_late", [False, True])
def test_a_layer_that_func_builds_at_first_use_learns(is_late: bool) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net: nn.Module | None = None

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            if is_late and float(t) < 0.5:
                return -y
            if self.net is None:
                torch.manual_seed(0)
                self.net = nn.Linear(3, 3, dtype=DTYPE)
            return torch.tanh(self.net(y))

    found = []
    for gradient in ("aca", "direct"):
        func, y0 = Lazy(), torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
        y = aca_ext.odeint(func, y0, TIMES, method="rk4", options={"step_size": 0.2}, gradient=gradient)
        y.square().sum().backward()
        found.append([y0.grad, *(p.grad for p in func.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("form", ["tuple", "list", "number", "object"])
def test_values_that_func_draws_once_for_each_solve(form: str) -> None:
    class Noisy(Silent):
        kept: Any = None

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            if self.kept is None:
                u = torch.randn(3, dtype=DTYPE)
                self.kept = {"tuple": (u,), "list": [u], "number": float(u[0]), "object": SimpleNamespace(u=u)}[form]
            kept = self.kept
            u = kept if form == "number" else kept.u if form == "object" else kept[0]
            return -0.5 * y + self.out(torch.tanh(y + u))

    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(0)
        func = Noisy()
        y = torch.full((4, 3), 0.3, dtype=DTYPE)
        for _ in range(2):
            func.kept = None
            y = aca_ext.odeint(func, y, TIMES, method="rk4", options={"step_size": 0.2}, gradient=gradient)[-1]
        found.append(torch.autograd.grad(y.square().sum(), list(func.parameters())))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_two_backward_passes_in_two_threads() -> None:
    """Each replay restores the present contents, and not those that the other thread has put back meanwhile."""
    func = Silent("attribute")
    expected = _gradients(copy.deepcopy(func), None)
    for _ in range(5):
        solves = []
        for _ in range(2):
            func.control = CONTROL
            y0 = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
            solves.append((y0, aca_ext.odeint(func, y0, TIMES, rtol=1e-5, atol=1e-7)))
        func.control = OTHER
        found: list[Any] = [None, None]

        def pull_back(i: int, y0: Tensor, y: Tensor, found: list[Any] = found) -> None:
            found[i] = torch.autograd.grad(y.square().sum(), [y0, *func.parameters()])

        threads = [threading.Thread(target=pull_back, args=(i, *solve)) for i, solve in enumerate(solves)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert func.control is OTHER
        for gradients in found:
            for one, other in zip(gradients, expected, strict=True):
                assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("n_modules", [3, 600])
def test_training_modes_of_models_of_any_size(n_modules: int) -> None:
    """The limit on the entries of containers that are recorded leaves out no module."""
    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(0)
        middle = [nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(n_modules // 3)]
        net = nn.Sequential(nn.Dropout(0.3), *middle, nn.Linear(3, 3, dtype=DTYPE), nn.Dropout(0.3))
        y0 = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
        y = aca_ext.odeint(lambda t, y, net=net: net(torch.tanh(y)), y0, [0.0, 1.0], method="rk4", gradient=gradient)
        net.eval()
        found.append(torch.autograd.grad(y.square().sum(), [y0, *net.parameters()]))
        assert not any(module.training for module in net.modules())
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_a_lazy_module_takes_its_shape_in_the_first_evaluation() -> None:
    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(0)
        net, y0 = nn.LazyLinear(3, dtype=DTYPE), torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
        y = aca_ext.odeint(lambda t, y, net=net: torch.tanh(net(y)), y0, [0.0, 1.0], method="rk4", gradient=gradient)
        y.square().sum().backward()
        assert type(net) is nn.Linear
        found.append([y0.grad, *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-12


def test_a_failing_replay_restores_everything() -> None:
    func = Silent("list")
    y0 = torch.full((4, 3), 0.3, dtype=DTYPE, requires_grad=True)
    y = aca_ext.odeint(func, y0, TIMES)
    func.listed[:] = []
    func.control, func.scale = OTHER, 5.0

    def fails(t: Tensor, y: Tensor) -> Tensor:
        func.listed.clear()
        raise KeyError("of func")

    func.forward = fails  # type: ignore[method-assign]
    func.entry["new"] = 1
    y.sum().backward()  # what func reads is put back, its forward too
    assert func.forward is fails
    assert (func.control is OTHER, func.scale, func.listed, "new" in func.entry) == (True, 5.0, [], True)


class Hostile:
    """Objects that fail, or do not end, when anybody but their owner looks at them."""

    class Endless(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            while True:
                yield 1.0

    class Liar(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 1000

    class Unequal:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        def __hash__(self) -> int:
            return 1

    class Closed:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError


def _objects() -> dict[str, Any]:
    tensor, endless, cyclic = torch.ones(3, requires_grad=True), Hostile.Endless([1]), [1]
    cyclic.append(cyclic)  # type: ignore[arg-type]
    gone = weakref.proxy(Hostile.Unequal())
    return {
        "a proxy of a tensor": (tensor, weakref.proxy(tensor)),
        "a proxy of nothing": gone,
        "an endless list": endless,
        "a list that lies": Hostile.Liar([1]),
        "a list in itself": cyclic,
        "a set of objects that cannot be compared": {Hostile.Unequal()},
        "a dict of such": {Hostile.Unequal(): 1},
        "an object without attributes": Hostile.Closed(),
    }


@pytest.mark.parametrize("name", _objects())
def test_objects_that_cannot_be_looked_at(name: str) -> None:
    held = _objects()[name]

    def func(t: Tensor, y: Tensor, held: Any = held) -> Tensor:
        return -y

    y0 = torch.ones(3, requires_grad=True)
    y = aca_ext.odeint(func, y0, [0.0, 1.0])
    y[-1].sum().backward()
    assert relative_error(y0.grad, torch.full((3,), 0.36787944)) <= 1e-5
