"""Worker process of the training runs in test_distributed.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

STEPS = 3
SAMPLES = 8


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(t)


def model_of(kind: str) -> nn.Module:
    """A layer, a solve and a layer, with the same weights in every process."""
    from aca_ext import NeuralODE

    torch.manual_seed(5)
    settings = {
        "fixed": {"method": "rk4", "options": {"step_size": 0.25}},
        "independent": {"rtol": 1e-4, "atol": 1e-5, "options": {"batch": "independent"}},
        "thinned": {"method": "rk4", "options": {"step_size": 0.25}, "checkpoints": 2},
    }[kind]
    return nn.Sequential(nn.Linear(3, 3), NeuralODE(Slope(), (0.0, 1.0), **settings), nn.Linear(3, 2)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)


def train(model: nn.Module, x: Tensor, target: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def wrapped_by(wrapping: str, model: nn.Module, world: int) -> nn.Module:
    import torch.distributed as dist

    if wrapping == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrapping == "ddp inside":
        model[1].func = nn.parallel.DistributedDataParallel(model[1].func)
        return model
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    if wrapping == "fsdp by layer":
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
    if wrapping == "fsdp inside":
        fully_shard(model[1].func, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(wrapping: str, kind: str, rank: int, world: int) -> dict[str, object]:
    """Result of this process after training on its share of the batch, or the error that prevented it."""
    model = model_of(kind)
    fired: list[int] = []
    if wrapping == "ddp":
        for p in model.parameters():
            p.register_hook(lambda g: fired.append(1))
    share = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    x, target = batch()
    try:
        train(wrapped_by(wrapping, model, world), x[share], target[share])
    except (ImportError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    state = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {"state": {name: p.detach() for name, p in state.items()}, "fired": len(fired)}


def main(rank: int, world: int, folder: Path, cases: list[str]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = {}
    for case in cases:
        wrapping, kind = case.split("/")
        results[case] = trained(wrapping, kind, rank, world)
        dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank, world, folder, *cases = sys.argv[1:]
    main(int(rank), int(world), Path(folder), cases)
