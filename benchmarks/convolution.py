"""What does a training step of a convolutional neural ODE cost on a GPU, in time and memory?

A block as in NODE18: two 3×3 convolutions of 64 channels with normalisation and ReLU, 32×32 images in batches of 128,
channels_last; f under autocast to bfloat16, in the backward pass as well; adaptive_heun at tolerance 1e-2.
``allocated`` is the most that tensors took at once, ``reserved`` what PyTorch held for them, captured graphs included;
both beyond what there was before. ``/ graph`` is time over that of the graph engine.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import aca_ext
from benchmarks.harness import Result, Settings, Table, interleave

TOLERANCE = 1e-2
METHOD = "adaptive_heun"
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
    """relu ∘ norm ∘ conv twice; the result in the state's dtype, which not every solver converts to."""

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


def run(settings: Settings) -> Result:
    notes: list[str] = []
    return Result([_table(norm, settings, notes) for norm in ("batch norm in eval", "group norm")], notes)


def _table(norm: str, settings: Settings, notes: list[str]) -> Table:
    batch, channels, size = (2, 8, 8) if settings.quick else (128, 64, 32)
    torch.manual_seed(0)
    func = Block(channels, norm).to(settings.device, memory_format=torch.channels_last).eval()
    y0 = torch.randn(batch, channels, size, size, device=settings.device)
    y0 = y0.contiguous(memory_format=torch.channels_last).requires_grad_()
    passes: dict[str, Pass] = {}
    memory: dict[str, dict[str, float]] = {}
    for name, solve in _solvers(notes).items():
        t = torch.tensor([0.0, 1.0], device="cpu" if "aca_ext" in name else settings.device)
        call = partial(_forward_backward, solve, func, y0, t)
        try:
            memory[name] = _memory(call, settings.device)
        except Exception as error:
            notes.append(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
        else:
            passes[name] = call
    timings = interleave(passes, settings, threads=torch.get_num_threads(), seconds=6)
    table = Table(f"{norm}: {batch} images of {channels} channels, {size}×{size}", COLUMNS)
    expected = torch.cat([g.flatten() for g in passes["aca_ext eager"]()])
    for name, call in passes.items():
        func.calls = 0
        found = torch.cat([g.flatten() for g in call()])
        table.rows.append(
            {
                "solver": name,
                "n_f_evals": None if "graph" in name else func.calls,
                "ms": 1e3 * timings.median(name),
                "over_graph": timings.ratio(name, "aca_ext graph") if "aca_ext graph" in passes else None,
                "gradient_apart": float((found - expected).norm() / expected.norm()),
                "rounds": len(timings.samples[name]),
                **memory[name],
            }
        )
    return table


def _solvers(notes: list[str]) -> dict[str, Callable[..., Any]]:
    solvers: dict[str, Callable[..., Any]] = {"aca_ext eager": aca_ext.odeint}
    try:
        import torchdiffeq
    except ImportError:
        notes.append("torchdiffeq is skipped: it cannot be imported.")
    else:
        solvers["torchdiffeq odeint"] = torchdiffeq.odeint
        solvers["torchdiffeq odeint_adjoint"] = torchdiffeq.odeint_adjoint
    return solvers | {"aca_ext graph": partial(aca_ext.odeint, engine="graph")}  # last: its captures keep memory


def _forward_backward(solve: Callable[..., Any], func: Block, y0: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    y = solve(func, y0, t, rtol=TOLERANCE, atol=TOLERANCE, method=METHOD)[-1]
    return torch.autograd.grad(y.square().mean(), [y0, *func.parameters()])


def _memory(call: Pass, device: str) -> dict[str, float]:
    """Of one pass that is not the first; nothing where PyTorch does not count."""
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
