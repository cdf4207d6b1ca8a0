"""Cost of a training step of a convolutional neural ODE on a GPU, in time and memory.

A block as in NODE18: two 3×3 convolutions of 64 channels with normalisation and ReLU, 32×32 images in batches of 128,
channels_last; f under autocast to bfloat16, in the backward pass as well; tolerance 1e-2. With bosh3 all solvers
evaluate f equally often. With adaptive_heun, torchdiffeq evaluates f once per step instead of twice: it takes the first
slope of a step from the end of the previous Euler step, not from the end of the previous step. ``allocated`` is the
peak memory of tensors, ``reserved`` the memory that PyTorch held for them, captured CUDA graphs included; both are
counted beyond the memory in use before. ``/ graph`` is time over the graph engine's, ``gradient apart`` the relative
distance from the eager engine's gradient.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import Parts, Settings, Table, first_line, interleave

TOLERANCE = 1e-2
METHODS = ("adaptive_heun", "bosh3")
EAGER, GRAPH = "aca_ext eager", "aca_ext graph"
COLUMNS = {
    "solver": ("solver", ""),
    "f evals": ("n_f_evals", "d"),
    "ms": ("ms", ".2f"),
    "/ graph": ("over_graph", ".2f"),
    "allocated MB": ("allocated_mb", ".0f"),
    "reserved MB": ("reserved_mb", ".0f"),
    "gradient apart": ("gradient_apart", ".1e"),
}
Pass = Callable[[], tuple[Tensor, ...]]


class Block(nn.Module):
    """relu ∘ norm ∘ conv twice, without the last relu. Returns the state's dtype: not every solver converts to it."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
            layers += [nn.GroupNorm(8, channels) if norm == "group norm" else nn.BatchNorm2d(channels), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        with torch.autocast(y.device.type, dtype=torch.bfloat16):
            return self.net(y).to(y.dtype)


def run(settings: Settings) -> Parts:
    for method in METHODS:
        for norm in ("batch norm in eval", "group norm"):
            yield from _measure(method, norm, settings)


def _measure(method: str, norm: str, settings: Settings) -> Parts:
    batch, channels, size = (2, 8, 8) if settings.quick else (128, 64, 32)
    torch.manual_seed(0)
    func = Block(channels, norm).to(settings.device, memory_format=torch.channels_last).eval()
    y0 = torch.randn(batch, channels, size, size, device=settings.device)
    y0 = y0.contiguous(memory_format=torch.channels_last).requires_grad_()
    # Loads the libraries that f needs, so that their memory is not charged to the first solver.
    torch.autograd.grad(func(y0.new_zeros(()), y0).sum(), [y0, *func.parameters()])
    passes: dict[str, Pass] = {}
    memory: dict[str, dict[str, float]] = {}
    for name, odeint in SOLVERS.items():
        t = torch.tensor([0.0, 1.0], device="cpu" if "aca_ext" in name else settings.device)
        call = partial(_forward_backward, odeint, method, func, y0, t)
        try:
            memory[name] = _memory(call, settings.device)
        except Exception as error:
            yield f"{name} is left out: {type(error).__name__}: {first_line(error)}"
        else:
            passes[name] = call
    if not passes:
        return
    timings = interleave(passes, settings, threads=torch.get_num_threads(), seconds=4)
    table = Table(f"{method}, {norm}: {batch} images of {channels} channels, {size}×{size}", COLUMNS)
    expected = _gradient(passes[EAGER]) if EAGER in passes else None
    for name, call in passes.items():
        func.calls = 0
        found = _gradient(call)
        table.rows.append(
            {
                "solver": name,
                "n_f_evals": None if "graph" in name else func.calls,
                "ms": 1e3 * timings.median(name),
                "over_graph": timings.ratio(name, GRAPH) if GRAPH in passes else None,
                "gradient_apart": None if expected is None else float((found - expected).norm() / expected.norm()),
                "rounds": len(timings.samples[name]),
                **memory[name],
            }
        )
    yield table


def _torchdiffeq(name: str, *args: Any, **settings: Any) -> Tensor:
    import torchdiffeq

    return getattr(torchdiffeq, name)(*args, **settings)


SOLVERS: dict[str, Callable[..., Any]] = {
    EAGER: aca_ext.odeint,
    "torchdiffeq odeint": partial(_torchdiffeq, "odeint"),
    "torchdiffeq odeint_adjoint": partial(_torchdiffeq, "odeint_adjoint"),
    GRAPH: partial(aca_ext.odeint, engine="graph"),  # last: its captures keep memory
}


def _forward_backward(
    odeint: Callable[..., Any], method: str, func: Block, y0: Tensor, t: Tensor
) -> tuple[Tensor, ...]:
    y = odeint(func, y0, t, rtol=TOLERANCE, atol=TOLERANCE, method=method)[-1]
    return torch.autograd.grad(y.square().mean(), [y0, *func.parameters()])


def _gradient(call: Pass) -> Tensor:
    return torch.cat([g.flatten() for g in call()])


def _memory(call: Pass, device: str) -> dict[str, float]:
    """Peak memory of one pass after a first one; empty on devices on which PyTorch does not count it."""
    if device != "cuda":
        call()
        return {}
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    call()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        f"{what}_mb": (peak - b) / 1e6 for what, peak, b in zip(("allocated", "reserved"), peaks, before, strict=True)
    }
