"""``with_divergence``: a field together with the change of log-density, and penalties, along its solutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aca_ext.errors import ArgumentTypeError, ArgumentValueError
from aca_ext.flows.products import products
from aca_ext.flows.samples import check_samples, checked_rates, samples_like, vectors_of
from aca_ext.problem.arguments import lookup
from aca_ext.problem.signature import refuse_swapped
from aca_ext.problem.state import State
from aca_ext.problem.trees import leaves_of
from aca_ext.vector_field.holdings import Holdings
from aca_ext.vector_field.module_buffers import modules_of

KINDS = ("exact", "hutchinson")
NOISES = ("rademacher", "gaussian")
MODES = ("reverse", "forward")
PENALTIES = ("kinetic_energy", "jacobian_norm")


def with_divergence(
    func: Callable[..., State],
    kind: str = "exact",
    *,
    probes: int | None = None,
    noise: str = "rademacher",
    generator: torch.Generator | None = None,
    penalties: Sequence[str] = (),
    batch_dims: int = 1,
    mode: str | None = None,
) -> DivergenceField:
    """Augments dy/dt = func(t, y, \\*args) by the log-density of y, whose rate of change is -div func.

    The result is a module to solve with: its state is ``field.start(y)``, a tuple of y, the change of log-density since
    the start, and one more tensor for each penalty.

    Args:
        func: callable or nn.Module (t, y, \\*args) that returns dy/dt, like y, a tensor or a tree of tensors, of which
            each sample is one vector. Samples of a batch must not depend on one another, which is checked for batch
            normalisation alone. Training takes second derivatives of its operations.
        kind: "exact": the trace of the Jacobian, by one product for each element of a sample. "hutchinson": the mean of
            eᵀJe over random vectors e, which are drawn once for each solve. The estimate is unbiased.
        probes: number of random vectors of "hutchinson"; default 1.
        noise: their distribution: "rademacher" (±1, the smallest variance) or "gaussian".
        generator: random generator that draws them, on the device of y; default PyTorch's.
        penalties: names of further components: "kinetic_energy", with rate ‖f‖², and "jacobian_norm", with rate ‖J‖²
            (Frobenius; estimated by the same random vectors with "hutchinson"). They are 0 at the start.
        batch_dims: number of leading dimensions of y that count samples; the others are one sample. Default 1. Use 0
            inside torch.vmap.
        mode: "reverse" or "forward" derivatives of func. Default: reverse, and forward inside transforms of torch.func
            and in inference mode. Not for transforms of torch.func inside torch.compile.

    Raises:
        ArgumentTypeError, ArgumentValueError, UnknownNameError: an argument is not accepted.
    """
    if not callable(func) or isinstance(func, DivergenceField):
        raise ArgumentTypeError(f"func is of type {type(func).__name__}; give a function (t, y) that returns dy/dt.")
    refuse_swapped(func)
    lookup("kind of divergence", kind, KINDS)
    if kind == "exact" and (probes is not None or generator is not None):
        raise ArgumentValueError('probes and generator belong to kind="hutchinson"; kind="exact" draws nothing.')
    if isinstance(penalties, str):
        raise ArgumentTypeError(f"penalties is the string {penalties!r}; give a tuple of names, ({penalties!r},).")
    return DivergenceField(
        func,
        kind,
        _count("probes", 1 if probes is None else probes, least=1),
        lookup("noise", noise, NOISES),
        generator,
        tuple(lookup("penalty", name, PENALTIES) for name in penalties),
        _count("batch_dims", batch_dims, least=0),
        None if mode is None else lookup("mode", mode, MODES),
    )


class DivergenceField(nn.Module):
    """Result of ``with_divergence``, which documents the attributes; a module that owns func if that is a module."""

    def __init__(
        self,
        func: Callable[..., State],
        kind: str,
        probes: int,
        noise: str,
        generator: torch.Generator | None,
        penalties: tuple[str, ...],
        batch_dims: int,
        mode: str | None,
    ) -> None:
        super().__init__()
        self.func = func
        self.kind, self.probes, self.noise, self.generator = kind, probes, noise, generator
        self.penalties, self.batch_dims, self.mode = penalties, batch_dims, mode

    @property
    def enables_grad_itself(self) -> bool:
        """Tells the solver that calls of autograd inside need no graph from outside."""
        return self.mode != "forward"

    @property
    def shares_cache_with(self) -> Callable[..., State]:
        """The func whose compiled code serves this field too, so that ``log_prob(func, ...)`` compiles once.

        Guards tell the code of one field from that of another. A partial, for example, has no entry of its own.
        """
        has_entry = isinstance(self.func, nn.Module) or hasattr(self.func, "__code__")
        return self.func if has_entry else self

    def start(self, y: State) -> tuple[Any, ...]:
        """The initial state (y, change of log-density, \\*penalties); all but y are zeros of the batch's shape.

        Raises:
            ArgumentTypeError, ArgumentValueError: y is no real tensor, or tree of such, with a dimension for each of
                ``batch_dims``, or func normalises over the batch.
        """
        check_samples(y, self.batch_dims)
        _refuse_batch_normalisation(self.func)
        first = leaves_of(y)[0]
        zeros = first.new_zeros(first.shape[: self.batch_dims])
        return y, zeros, *(zeros.clone() for _ in self.penalties)

    def draw_probes(self, y: State) -> Tensor:
        """Random vectors for one solve from ``y``: (\\*batch, probes, \\*sample), the first of the solve's ``args``.

        A sample that is a tree is a vector of all its elements.

        Raises:
            ArgumentTypeError, ArgumentValueError: y is no state, kind is "exact", or the generator has another device.
        """
        check_samples(y, self.batch_dims)
        if self.kind == "exact":
            raise ArgumentValueError('kind="exact" has no probes. Solve without them.')
        y = vectors_of(y, self.batch_dims)
        if self.generator is not None and self.generator.device.type != y.device.type:
            raise ArgumentValueError(
                f"the generator is on {self.generator.device} and y is on {y.device}. Make it there, "
                f"torch.Generator({y.device.type!r})."
            )
        shape = (*y.shape[: self.batch_dims], self.probes, *y.shape[self.batch_dims :])
        like: dict[str, Any] = {"generator": self.generator, "dtype": y.dtype, "device": y.device}
        return torch.randn(shape, **like) if self.noise == "gaussian" else torch.randint(0, 2, shape, **like) * 2 - 1

    def forward(self, t: Tensor, state: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        """The rates of all components; for "hutchinson" the first of args are the probes.

        Raises:
            ArgumentValueError: the probes are missing, or do not fit y.
            SlopeError: func returned something that is not like y.
        """
        n = self.batch_dims
        y = vectors_of(state[0], n)
        if self.kind == "exact":
            vectors, scale = _basis(y, n), 1.0
        else:
            probes, *others = args or (None,)
            _check_probes(probes, y, n)
            vectors, scale, args = probes.movedim(n, 0), 1 / probes.shape[n], tuple(others)

        def func(x: Tensor) -> Tensor:
            samples = samples_like(state[0], x, n)
            return vectors_of(checked_rates(self.func(t, samples, *args), samples), n)

        k, found = products(func, y, vectors, self.mode)

        def per_sample(x: Tensor) -> Tensor:
            return x.sum((0, *range(n + 1, x.dim())))  # the first dimension is that of the vectors

        rates = {
            "kinetic_energy": lambda: per_sample(k.square().unsqueeze(0)),
            "jacobian_norm": lambda: per_sample(found.square()) * scale,
        }
        change = -scale * per_sample(vectors * found)
        return samples_like(state[0], k, n), change, *(rates[name]() for name in self.penalties)

    def extra_repr(self) -> str:
        probes = f", probes={self.probes}, noise={self.noise!r}" if self.kind == "hutchinson" else ""
        return f"kind={self.kind!r}{probes}, penalties={self.penalties!r}, batch_dims={self.batch_dims}"


def state_norm(error: tuple[State, ...]) -> Tensor:
    """The RMS norm of the first component alone: ``options={"norm": state_norm}`` leaves the log-density out."""
    return torch.cat([part.reshape(-1) for part in leaves_of(error[0])]).square().mean().sqrt()


def _refuse_batch_normalisation(func: Callable[..., Any]) -> None:
    """Raises if samples depend on one another by batch statistics, since then none has a density of its own."""
    for module in modules_of(func) if isinstance(func, nn.Module) else Holdings((func,)).modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ArgumentValueError(
                f"func holds a {type(module).__name__} that uses batch statistics: samples depend on one another and "
                "have no density of their own. Call func.eval() if it has running statistics, or use another layer."
            )


def _count(name: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentValueError(f"{name} is {value!r}; give an integer of at least {least}.")
    return value


def _basis(y: Tensor, batch_dims: int) -> Tensor:
    """The unit vectors of a sample, (elements, \\*y.shape)."""
    sample = y.shape[batch_dims:]
    size = math.prod(sample)
    eye = torch.eye(size, dtype=y.dtype, device=y.device)
    return eye.view(size, *(1 for _ in range(batch_dims)), *sample).expand(size, *y.shape)


def _check_probes(probes: object, y: Tensor, batch_dims: int) -> None:
    if not isinstance(probes, Tensor):
        raise ArgumentValueError(
            'kind="hutchinson" needs random vectors, the same in the whole solve. Give args=(field.draw_probes(y0), '
            "*args), or use flows.log_prob, which draws them."
        )
    shape = (*probes.shape[:batch_dims], *probes.shape[batch_dims + 1 :])
    if shape != tuple(y.shape) or probes.shape[batch_dims] == 0:
        raise ArgumentValueError(
            f"the probes have shape {tuple(probes.shape)} and y has {tuple(y.shape)}. Draw them for this y, "
            "field.draw_probes(y), and give them as the first of args."
        )
