"""Objects that func holds: parameters first used late in a solve, generators, modes, caches and kept tensors."""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autograd_reference import relative_error
from problems import Mlp, leaf, sample
from torch import Tensor, nn
from torch.nn.utils import parametrize

import aca_ext
from aca_ext import errors
from aca_ext.vector_field.holdings import Holdings

pytestmark = pytest.mark.filterwarnings("ignore::aca_ext.errors.BatchStatisticsWarning")

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
STEPS = {"step_size": 0.2}
MODES: dict[str, dict[str, Any]] = {
    "adaptive": {"rtol": 1e-6, "atol": 1e-6},
    "fixed": {"method": "rk4", "options": STEPS},
    "thinned": {"method": "rk4", "options": STEPS, "checkpoints": 1},
    "independent": {"rtol": 1e-6, "atol": 1e-6, "options": {"batch": "independent"}},
}
Build = Callable[[], tuple[Callable[..., Any], list[Tensor]]]  # a func, and the leaves that it depends on

RATES = [leaf(3), leaf(3)]


def check_against_direct(build: Build, create_graph: bool = False, **settings: Any) -> None:
    """Asserts that values and gradients equal those of ``gradient="direct"``, None for unused leaves included."""
    found = []
    for gradient in ("aca", "direct"):
        torch.manual_seed(1)
        func, wanted = build()
        y0 = sample(2, 3).requires_grad_()
        if gradient == "direct":
            settings = {name: value for name, value in settings.items() if name != "checkpoints"}
        y = aca_ext.odeint(func, y0, T, gradient=gradient, **settings)
        loss = y.square().sum()
        grads = torch.autograd.grad(loss, [y0, *wanted], create_graph=create_graph, allow_unused=True)
        if create_graph:
            total = sum(g.square().sum() for g in grads if g is not None)
            grads = (*grads, *torch.autograd.grad(total, [y0, *wanted], allow_unused=True))
        found.append((y.detach(), *grads))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert relative_error(one, other) <= 1e-11


def is_late(t: Tensor) -> bool:
    return bool(t.reshape(-1)[0] > 0.3)


def by_closure() -> Any:
    a, b = leaf(3), leaf(3) * 0.5
    b = b.detach().requires_grad_()
    return (lambda t, y: torch.tanh(y * (b if is_late(t) else a))), [a, b]


def by_default() -> Any:
    rates = leaf(3), leaf(3)
    return (lambda t, y, rates=rates: torch.tanh(y * rates[is_late(t)])), list(rates)


def by_keyword_default() -> Any:
    rates = {False: leaf(3), True: leaf(3)}

    def func(t: Tensor, y: Tensor, *, rates: Any = rates) -> Tensor:
        return torch.tanh(y * rates[is_late(t)])

    return func, list(rates.values())


def by_partial() -> Any:
    rates = [leaf(3), leaf(3)]

    def func(rates: list[Tensor], t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y * rates[is_late(t)])

    return functools.partial(func, rates), rates


def by_global() -> Any:
    return (lambda t, y: torch.tanh(y * RATES[is_late(t)])), RATES


def rate_of_global(t: Tensor) -> Tensor:
    return RATES[1] if is_late(t) else RATES[0]


def by_global_of_a_called_function() -> Any:
    return (lambda t, y: torch.tanh(y * rate_of_global(t))), RATES


def by_nested_function() -> Any:
    rates = [leaf(3), leaf(3)]

    def outer() -> Any:
        def inner(t: Tensor) -> Tensor:
            return rates[is_late(t)]

        return inner

    rate = outer()
    return (lambda t, y: torch.tanh(y * rate(t))), rates


@dataclass
class Rates:
    early: Tensor = field(default_factory=lambda: leaf(3))
    late: Tensor = field(default_factory=lambda: leaf(3))

    def at(self, t: Tensor) -> Tensor:
        return self.late if is_late(t) else self.early


def by_dataclass() -> Any:
    rates = Rates()
    return (lambda t, y: torch.tanh(y * rates.at(t))), [rates.early, rates.late]


class Slotted:
    __slots__ = ("early", "late")

    def __init__(self) -> None:
        self.early, self.late = leaf(3), leaf(3)

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y * (self.late if is_late(t) else self.early))


def by_bound_method_and_slots() -> Any:
    physics = Slotted()
    return physics.slope, [physics.early, physics.late]


class Physics:
    def __init__(self) -> None:
        self.inside = {"rates": deque([(leaf(3),), (leaf(3),)])}

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y * self.inside["rates"][is_late(t)][0])


def by_callable_object_and_containers() -> Any:
    physics = Physics()
    return physics, [entry[0] for entry in physics.inside["rates"]]


def by_namespace() -> Any:
    rates = SimpleNamespace(early=leaf(3), late=leaf(3))
    return (lambda t, y: torch.tanh(y * (rates.late if is_late(t) else rates.early))), [rates.early, rates.late]


class OfClass:
    early, late = leaf(3), leaf(3)


def by_class_attribute() -> Any:
    return (lambda t, y: torch.tanh(y * (OfClass.late if is_late(t) else OfClass.early))), [OfClass.early, OfClass.late]


def by_module_list() -> Any:
    nets = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(3))
    return (lambda t, y: torch.tanh(nets[is_late(t)](y))), list(nets.parameters())


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)]  # no ModuleList
        self.scales = [leaf(3), leaf(3)]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layers[is_late(t)](y) * self.scales[is_late(t)])


def by_unregistered_lists_of_a_module() -> Any:
    func = Unregistered()
    return func, [*func.scales, *(p for layer in func.layers for p in layer.parameters())]


def by_contexts_computed_before() -> Any:
    w = leaf(3)
    contexts = [torch.exp(w), torch.sin(w), torch.cos(w)]  # the last is never used
    return (lambda t, y: torch.tanh(y * contexts[is_late(t)])), [w]


def by_branch_on_the_state() -> Any:
    a, b = leaf(3), leaf(3)
    return (lambda t, y: torch.tanh(y * (b if y.sum() > 1.5 else a))), [a, b]


PLACES = [
    by_closure, by_default, by_keyword_default, by_partial, by_global, by_global_of_a_called_function,
    by_nested_function, by_dataclass, by_bound_method_and_slots, by_callable_object_and_containers, by_namespace,
    by_class_attribute, by_module_list, by_unregistered_lists_of_a_module, by_contexts_computed_before,
    by_branch_on_the_state,
]  # fmt: skip


class TestParametersUsedLate:
    @pytest.mark.parametrize("build", PLACES)
    def test_wherever_they_are(self, build: Build) -> None:
        check_against_direct(build, method="rk4", options=STEPS)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("create_graph", [False, True])
    @pytest.mark.parametrize("build", [by_closure, by_module_list, by_contexts_computed_before])
    def test_however_solved(self, build: Build, mode: str, create_graph: bool) -> None:
        check_against_direct(build, create_graph, **MODES[mode])

    def test_the_adjoint_reaches_them(self) -> None:
        func, (a, b) = by_closure()
        y = aca_ext.odeint(func, sample(2, 3), T, gradient="adjoint")
        found = torch.autograd.grad(y.square().sum(), [a, b])
        y = aca_ext.odeint(func, sample(2, 3), T, gradient="direct")
        for one, other in zip(found, torch.autograd.grad(y.square().sum(), [a, b]), strict=True):
            assert relative_error(one, other) <= 1e-3

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("create_graph", [False, True])
    def test_one_out_of_reach_is_an_error(self, mode: str, create_graph: bool) -> None:
        a, hidden = leaf(3), leaf(3)

        class Far:
            pass

        def generator() -> Iterator[Tensor]:
            while True:
                yield hidden

        source = generator()  # the search for tensors does not look into the frames of generators
        func = lambda t, y: torch.tanh(y * (next(source) if is_late(t) else a))  # noqa: E731
        y0 = sample(2, 3).requires_grad_()
        y = aca_ext.odeint(func, y0, T, **MODES[mode])
        with pytest.raises(errors.ReplayError, match=r"shape \(3,\) and torch.float64.*params=\[\.\.\.\]"):
            torch.autograd.grad(y[-1].sum(), y0, create_graph=create_graph)
        y = aca_ext.odeint(func, y0, T, params=[a, hidden], **MODES[mode])
        assert all(g.any() for g in torch.autograd.grad(y[-1].sum(), [a, hidden], create_graph=create_graph))

    def test_a_leaf_made_inside_an_evaluation_is_none(self) -> None:
        class Field(Mlp):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                with torch.enable_grad():
                    self.z = y.detach().requires_grad_()  # kept in an attribute, as in continuous flows
                    energy = super().forward(t, self.z).square().sum()
                    return torch.autograd.grad(energy, self.z, create_graph=True)[0] * -0.1

        def build() -> Any:
            func = Field()
            return func, [func.net[0].weight]

        check_against_direct(build, method="rk4", options=STEPS)

    def test_others_may_change_what_is_not_used(self) -> None:
        a = leaf(3)
        trainer = SimpleNamespace(rate=a, other=nn.Linear(3, 3))
        y = aca_ext.odeint(lambda t, y: torch.tanh(trainer.rate * y), sample(2, 3), T)
        with torch.no_grad():
            trainer.other.weight.add_(1.0)  # stands for the step of another optimizer
        assert torch.autograd.grad(y.sum(), a)[0].any()

    def test_a_history_whose_graphs_are_used_up_does_no_harm(self) -> None:
        a = leaf(3)
        trainer = SimpleNamespace(rate=a, losses=[])
        for _ in range(3):
            y = aca_ext.odeint(lambda t, y: torch.tanh(trainer.rate * y), sample(2, 3), T)
            trainer.losses.append(y.square().sum())
            trainer.losses[-1].backward()
        assert a.grad is not None

    def test_a_loss_that_is_kept_does_not_keep_those_before_it(self) -> None:
        net, trainer = Mlp(), SimpleNamespace(loss=None)
        graphs = []
        for _ in range(3):
            y = aca_ext.odeint(lambda t, y: net(t, y) * (1.0 if trainer else 0.0), sample(2, 3), T)
            trainer.loss = y.square().sum()
            graphs.append(weakref.ref(trainer.loss))
            trainer.loss.backward()
        del y
        assert [graph() is None for graph in graphs] == [True, True, False]

    def test_a_context_computed_before_that_alone_requires_grad(self) -> None:
        w = leaf(3)
        contexts = [torch.ones(3, dtype=torch.float64), torch.exp(w)]
        y = aca_ext.odeint(lambda t, y: torch.tanh(y * contexts[is_late(t)]), sample(2, 3), T)
        assert torch.autograd.grad(y.sum(), w)[0].any()

    def test_unused_parameters_have_no_gradient(self) -> None:
        nets = nn.ModuleList(nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
        aca_ext.odeint(lambda t, y: nets[0](y), sample(2, 3), T)[-1].sum().backward()
        assert all(p.grad is None for p in nets[1].parameters())

    def test_a_hook_on_one_of_them_sees_its_whole_gradient(self) -> None:
        func, (_, b) = by_closure()
        seen: list[Tensor] = []
        b.register_hook(seen.append)
        y = aca_ext.odeint(func, sample(2, 3), T, method="rk4", options=STEPS)
        grad = torch.autograd.grad(y.sum(), b)[0]
        assert len(seen) == 1
        assert torch.equal(seen[0], grad)

    def test_the_walk_is_bounded(self) -> None:
        numbers = list(range(100_000))
        rate = leaf(3)
        loop: list[Any] = [rate]
        loop.append(loop)
        found = Holdings((lambda t, y: y * rate + numbers[0] + len(loop),))
        assert [x is rate for x in found.tensors] == [True]


class TestRandomNumbers:
    @pytest.mark.parametrize("where", ["closure", "attribute", "args"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"method": "rk4", "options": STEPS},
            {"method": "rk4", "options": STEPS, "checkpoints": 1},
            {"rtol": 2e-4, "atol": 2e-4, "options": {"first_step": 1.0, "min_step": 0.05}},
            {"method": "euler", "options": STEPS},
        ],
    )
    @pytest.mark.parametrize("create_graph", [False, True])
    def test_of_a_generator_of_its_own(self, where: str, settings: dict[str, Any], create_graph: bool) -> None:
        found = []
        for gradient in ("aca", "direct"):
            generator = torch.Generator().manual_seed(5)
            w, holder = leaf(3), SimpleNamespace(noise=generator)
            given = settings if gradient == "aca" else {k: v for k, v in settings.items() if k != "checkpoints"}

            def func(t: Tensor, y: Tensor, *args: Any, where: str = where, h: Any = holder, w: Tensor = w) -> Tensor:
                noise = args[0] if args else h.noise
                return torch.tanh(w * y) + 0.01 * y * torch.randn(3, generator=noise, dtype=torch.float64)

            args = (generator,) if where == "args" else ()
            y = aca_ext.odeint(func, sample(2, 3), T, gradient=gradient, args=args, **given)
            before = generator.get_state()
            (grad,) = torch.autograd.grad(y.square().sum(), w, create_graph=create_graph)
            assert torch.equal(generator.get_state(), before)
            found.append((y.detach(), grad))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_independent_batches_say_so(self) -> None:
        generator, w = torch.Generator().manual_seed(5), leaf(3)
        func = lambda t, y: w * y * torch.rand(3, generator=generator, dtype=torch.float64)  # noqa: E731
        with pytest.raises(errors.ArgumentValueError, match="draws random numbers"):
            aca_ext.odeint(func, sample(2, 3), T, options={"batch": "independent"})

    @pytest.mark.parametrize("method", sorted(aca_ext.METHODS))
    def test_dropout_with_every_method(self, method: str) -> None:
        def build() -> Any:
            net = Mlp()
            return (lambda t, y: nn.functional.dropout(net(t, y), 0.3)), list(net.parameters())

        check_against_direct(build, method=method, options={"step_size": 0.5})
        if aca_ext.METHODS[method].adaptive:
            check_against_direct(build, method=method, rtol=1.0, atol=1.0, options={"min_step": 0.1})


class TestTrainingMode:
    @pytest.mark.parametrize("is_function", [False, True])
    @pytest.mark.parametrize("first", [True, False])
    def test_is_that_of_the_forward_pass(self, first: bool, is_function: bool) -> None:
        found = []
        for gradient in ("aca", "direct"):
            torch.manual_seed(3)
            net = nn.Sequential(
                nn.Linear(3, 3, dtype=torch.float64), nn.Dropout(0.5), nn.BatchNorm1d(3, dtype=torch.float64).eval()
            )
            net[1].train(first)
            func = (lambda t, y, net=net: torch.tanh(net(y))) if is_function else WithTime(net)
            y = aca_ext.odeint(func, sample(4, 3), T, method="rk4", options=STEPS, gradient=gradient)
            net.train(not first)
            modes = [module.training for module in net.modules()]
            found.append(torch.autograd.grad(y.square().sum(), list(net.parameters())))
            assert [module.training for module in net.modules()] == modes
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_of_a_batchnorm_frozen_meanwhile(self) -> None:
        found = []
        for gradient in ("aca", "direct"):
            torch.manual_seed(3)
            net = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64))
            y = aca_ext.odeint(WithTime(net), sample(4, 3), T, method="rk4", options=STEPS, gradient=gradient)
            net.eval()
            found.append(torch.autograd.grad(y.square().sum(), [net[0].weight, *net[1].parameters()]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-9


class WithTime(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y))


class Skew(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.T


class LazyScale(Mlp):
    """Computes exp(log_scale) once and caches it."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(sample(3))
        self.scale: Tensor | None = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.exp(self.log_scale)
        return super().forward(t, y) * self.scale


class TestCaches:
    @pytest.mark.parametrize("mode", MODES)
    def test_a_scale_made_once(self, mode: str) -> None:
        def build() -> Any:
            func = LazyScale()
            return func, list(func.parameters())

        check_against_direct(build, **MODES[mode])

    def test_a_scale_made_once_in_a_closure(self) -> None:
        def build() -> Any:
            log_scale, cache = leaf(3), {}

            def func(t: Tensor, y: Tensor) -> Tensor:
                if "scale" not in cache:
                    cache["scale"] = torch.exp(log_scale)
                return torch.tanh(y * cache["scale"])

            return func, [log_scale]

        check_against_direct(build, method="rk4", options=STEPS)

    @pytest.mark.parametrize("is_outside", [False, True])
    def test_parametrizations(self, is_outside: bool) -> None:
        found = []
        for gradient in ("aca", "direct"):
            torch.manual_seed(0)
            layer = nn.Linear(3, 3, dtype=torch.float64)
            parametrize.register_parametrization(layer, "weight", Skew())
            with parametrize.cached():
                y = aca_ext.odeint(WithTime(layer), sample(2, 3), T, gradient=gradient)
                original = layer.parametrizations.weight.original
                if not is_outside:
                    found.append(torch.autograd.grad(y.sum(), original)[0])
            if is_outside:
                found.append(torch.autograd.grad(y.sum(), original)[0])
        assert relative_error(*found) <= 1e-12

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_a_cache_that_cannot_be_followed_is_an_error(self, create_graph: bool) -> None:
        class Forgetful(Mlp):
            def __init__(self) -> None:
                super().__init__()
                self.log_scale, self.scale = nn.Parameter(sample(3)), None

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                scale = torch.exp(self.log_scale) if self.scale is None else self.scale
                self.scale = scale.detach().clone() if self.scale is None else self.scale
                return super().forward(t, y) * scale

        func = Forgetful()
        y = aca_ext.odeint(func, sample(2, 3), T)
        with pytest.raises(errors.ReplayError, match="log_scale"):
            torch.autograd.grad(y.sum(), list(func.parameters()), create_graph=create_graph)

    def test_dead_and_detached_uses_are_no_error(self) -> None:
        class Honest(Mlp):
            def __init__(self) -> None:
                super().__init__()
                self.dead, self.constant = nn.Parameter(sample(3)), nn.Parameter(sample(3))

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                _ = y * self.dead
                return super().forward(t, y) * self.constant.detach()

        def build() -> Any:
            func = Honest()
            return func, list(func.parameters())

        check_against_direct(build, method="rk4", options=STEPS)


class Penalised(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.penalty: Any = 0.0
        self.history: list[Any] = []
        self.calls = torch.zeros(())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k = super().forward(t, y)
        self.calls = self.calls + 1
        self.penalty = self.penalty + k.square().mean()
        self.history.append(k)
        return k


class TestWhatIsKept:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("what", ["penalty", "history"])
    def test_its_gradient_is_an_error(self, what: str, mode: str) -> None:
        func = Penalised()
        with pytest.warns(errors.KeptTensorWarning, match="penalty") as warned:
            y = aca_ext.odeint(func, sample(2, 3), T, **MODES[mode])
        assert warned[0].filename == __file__
        extra = func.penalty if what == "penalty" else sum(k.sum() for k in func.history)
        assert extra.detach().isfinite()
        with pytest.raises(errors.ReplayError, match='gradient="direct"'):
            torch.autograd.grad(y[-1].sum() + extra, func.net[0].weight)

    @pytest.mark.filterwarnings("ignore::aca_ext.errors.KeptTensorWarning")
    def test_its_values_are_those_of_direct_and_it_can_be_copied(self) -> None:
        kept = []
        for gradient in ("aca", "direct"):
            func = Penalised()
            y = aca_ext.odeint(func, sample(2, 3), T, gradient=gradient, method="rk4", options=STEPS)
            kept.append((func.penalty.detach(), *[k.detach() for k in func.history]))
            y[-1].sum().backward()
            assert torch.equal(func.penalty, kept[-1][0])
            assert len(func.history) == len(kept[-1]) - 1
            assert not func.calls.requires_grad
            if gradient == "aca":
                other = copy.deepcopy(func)
                assert torch.equal(other.penalty, func.penalty)
                func.load_state_dict(other.state_dict())
        for one, other in zip(*kept, strict=True):
            assert torch.equal(one, other)

    def test_detached_records_and_counters_are_left_alone(self) -> None:
        class Recording(Mlp):
            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                k = super().forward(t, y)
                self.last, self.norm = k.detach(), float(k.detach().norm())
                return k

        func = Recording()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            aca_ext.odeint(func, sample(2, 3), T)[-1].sum().backward()
        assert not func.last.requires_grad

    def test_a_weight_made_of_parameters_in_each_evaluation_keeps_its_graph(self) -> None:
        found = []
        for gradient in ("aca", "direct"):
            torch.manual_seed(0)
            layer = nn.Linear(3, 3, dtype=torch.float64)
            g = nn.Parameter(torch.ones(3, 1, dtype=torch.float64) * 1.5)

            class Normed(nn.Module):
                def __init__(self, layer: nn.Module, g: nn.Parameter) -> None:
                    super().__init__()
                    self.layer, self.g = layer, g

                def forward(self, t: Tensor, y: Tensor) -> Tensor:
                    v = self.layer.weight
                    self.w = self.g * v / v.norm(dim=1, keepdim=True)
                    return torch.tanh(y @ self.w.T)

            func = Normed(layer, g)
            y = aca_ext.odeint(func, sample(2, 3), T, gradient=gradient)
            found.append(torch.autograd.grad(y[-1].sum() + func.w.square().sum(), [layer.weight, g]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_a_first_slope_that_is_used_again_is_an_error(self) -> None:
        class First(Mlp):
            first: Tensor | None = None

            def forward(self, t: Tensor, y: Tensor) -> Tensor:
                k = super().forward(t, y)
                if self.first is None:
                    self.first = k
                return k - 0.1 * self.first

        func = First()
        with pytest.warns(errors.KeptTensorWarning, match="first"):
            y = aca_ext.odeint(func, sample(2, 3).requires_grad_(), T)
        with pytest.raises(errors.ReplayError, match="of another evaluation"):
            y[-1].sum().backward()


def energy(y: Tensor, w: Tensor) -> Tensor:
    return (torch.tanh(y * w).square() + 0.1 * y.square()).sum()


def by_grad(w: Tensor, create_graph: bool) -> Callable[..., Tensor]:
    return lambda t, y: -torch.autograd.grad(energy(y, w), y, create_graph=create_graph)[0]


def divergence(w: Tensor) -> Callable[..., Any]:
    def func(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, _ = state
        dy = torch.tanh(y * w)
        return dy, -torch.autograd.grad(dy.sum(), y, create_graph=True)[0].sum(-1, keepdim=True)

    return func


class TestAutogradInside:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("inner", [False, True])
    @pytest.mark.parametrize("has_y0", [False, True])
    def test_grad_needs_no_enable_grad(self, mode: str, inner: bool, has_y0: bool) -> None:
        w, y0 = leaf(3), sample(2, 3).requires_grad_(has_y0)

        def explicit(t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                y = y if y.requires_grad else y.detach().requires_grad_()
                return -torch.autograd.grad(energy(y, w), y, create_graph=inner)[0]

        wanted = [y0] if not inner else ([y0, w] if has_y0 else [w])
        if not inner and not has_y0:
            return
        settings = {k: v for k, v in MODES[mode].items() if k != "checkpoints"}
        y = aca_ext.odeint(by_grad(w, inner), y0, T, **MODES[mode])
        expected = aca_ext.odeint(explicit, y0, T, gradient="direct", **settings)
        assert torch.equal(y, expected)
        found = torch.autograd.grad(y.square().sum(), wanted)
        for one, other in zip(found, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_divergence_of_a_flow(self) -> None:
        found = []
        for gradient in ("aca", "direct"):
            w, y0 = leaf(3), sample(2, 3).requires_grad_()
            y, p = aca_ext.odeint(
                divergence(w), (y0, torch.zeros(2, 1, dtype=torch.float64)), T, gradient=gradient, rtol=1e-6, atol=1e-6
            )
            found.append(torch.autograd.grad(y.square().sum() + p.square().sum(), [y0, w]))
        for one, other in zip(*found, strict=True):
            assert relative_error(one, other) <= 1e-12

    def test_second_derivatives(self) -> None:
        check_against_direct(
            lambda: (lambda w: (by_grad(w, True), [w]))(leaf(3)), create_graph=True, method="rk4", options=STEPS
        )

    def test_backward(self) -> None:
        def func(t: Tensor, y: Tensor) -> Tensor:
            y = y.detach().requires_grad_()
            y.square().sum().backward()
            assert y.grad is not None
            return -0.5 * y.grad

        with torch.enable_grad():
            y = aca_ext.odeint(func, sample(2, 3).requires_grad_(), T)
        assert torch.allclose(y[-1], sample(2, 3) * torch.exp(-T[-1]), rtol=1e-6)

    def test_functional(self) -> None:
        w = leaf(3)

        def build() -> Any:
            jacobian = torch.autograd.functional.jacobian
            return (lambda t, y: torch.tanh(w * y) + 0.1 * jacobian(lambda x: x.square().sum(), y)), [w]

        check_against_direct(build, method="rk4", options=STEPS)

    def test_evaluations_are_counted(self) -> None:
        calls = 0

        def func(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return -torch.autograd.grad(y.square().sum() / 2, y, create_graph=True)[0]

        solution = aca_ext.solve(func, sample(2, 3).requires_grad_(), T)
        assert solution.stats.n_f_evals == calls

    def test_without_gradients_torch_says_so(self) -> None:
        with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
            aca_ext.odeint(by_grad(leaf(3), False), sample(2, 3), T)

    def test_a_func_that_writes_into_a_buffer(self) -> None:
        buffer = torch.empty(2, 3, dtype=torch.float64)
        y = aca_ext.odeint(lambda t, y: torch.neg(y, out=buffer).clone(), sample(2, 3), T)
        assert torch.allclose(y[-1], sample(2, 3) * torch.exp(-T[-1]), rtol=1e-6)


def test_leaves_made_inside_an_evaluation_are_nobodys_parameters() -> None:
    """A derivative in time inside func, taken at a time tensor that func makes and that requires grad."""

    def build() -> Any:
        w = leaf(3)

        def func(t: Tensor, y: Tensor) -> Tensor:
            s = t.detach().requires_grad_()
            with torch.enable_grad():
                (rate,) = torch.autograd.grad(torch.sin(w * s).sum(), s, create_graph=True)
            return -y * w + rate

        return func, [w]

    for settings in MODES.values():
        check_against_direct(build, **settings)


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_parameters_frozen_before_the_backward_pass(settings: dict[str, Any]) -> None:
    net, y0 = Mlp(), leaf(2, 3)
    y = aca_ext.odeint(lambda t, y: net(t, y), y0, T, **settings)
    net.requires_grad_(False)
    (grad,) = torch.autograd.grad(y.square().sum(), y0)
    net.requires_grad_(True)
    expected = aca_ext.odeint(lambda t, y: net(t, y), y0, T, **settings)
    assert relative_error(grad, torch.autograd.grad(expected.square().sum(), y0)[0]) <= 1e-12


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
def test_a_reentrant_checkpoint_inside_func() -> None:
    net, y0 = Mlp(), leaf(2, 3)
    func = lambda t, y: torch.utils.checkpoint.checkpoint(lambda y: net(t, y), y, use_reentrant=True)  # noqa: E731
    y = aca_ext.odeint(func, y0, T, method="rk4", options=STEPS)
    with pytest.raises(errors.ReplayError, match="use_reentrant=False"):
        y.sum().backward()
