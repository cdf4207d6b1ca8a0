"""Data of the experiments on the hopper: rollouts of the physics engine, windows of them, and the points shown."""

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.common import MissingError, Settings, bar

CACHE = Path(__file__).resolve().parents[2] / "build" / "hopper"
DATA_SEED = 123
N_POINTS, WINDOW, N_DIMS = 200, 100, 14
PERCENT = (10, 20, 50)


@dataclass(frozen=True)
class Batch:
    """Windows (n, 100, 14), and the sorted indices (n, n_shown) of their points that are shown."""

    x: Tensor
    shown: Tensor


def times(points: Tensor) -> Tensor:
    """Times of a rollout's points; a whole rollout takes 1."""
    return points / N_POINTS


def shown_points(n: int, percent: int, random: torch.Generator) -> Tensor:
    """Sorted indices (n, percent) of the shown points of n windows."""
    return torch.rand(n, WINDOW, generator=random).argsort(1)[:, : WINDOW * percent // 100].sort(1).values


def batch_of(x: Tensor, percent: int, seed: int) -> Batch:
    return Batch(x, shown_points(len(x), percent, torch.Generator().manual_seed(seed + 1)).to(x.device))


def windows(rollouts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """100 successive points of each rollout, from a random one on, normalized; split into training (4/5) and test."""
    flat = rollouts.flatten(0, 1)
    x = (rollouts - flat.amin(0)) / flat.amax(0)
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(N_POINTS - WINDOW + 1, (len(x), 1), generator=random)
    at = (first + torch.arange(WINDOW)).to(x.device)
    x = x.gather(1, at[..., None].expand(-1, -1, N_DIMS))
    n_train = len(x) * 4 // 5
    return x[:n_train], x[n_train:]


def load(settings: Settings, n: int) -> tuple[Tensor, str]:
    """The first ``n`` rollouts (n, 200, 14) and their SHA-256, read from a file, or simulated if there is none.

    Raises:
        MissingError: the physics engine is not installed, or the file is damaged.
    """
    path = (settings.data or CACHE) / f"hopper_{n}.npz"
    if not path.exists():
        rollouts = simulate(n)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial.npz")
        np.savez(partial_path, rollouts=rollouts, sha256=hashlib.sha256(rollouts.tobytes()).hexdigest())
        os.replace(partial_path, path)
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            rollouts, checksum = file["rollouts"], str(file["sha256"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise MissingError(f"{path} cannot be read ({error}). Delete it; the next run makes a new one.") from error
    if rollouts.shape != (n, N_POINTS, N_DIMS) or hashlib.sha256(rollouts.tobytes()).hexdigest() != checksum:
        raise MissingError(f"{path} is damaged: its checksum differs. Delete it; the next run makes a new one.")
    return torch.from_numpy(rollouts), checksum


def simulate(n: int) -> np.ndarray:
    """``n`` rollouts (n, 200, 14) float32 of dm_control's hopper, without control, from the published random states."""
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn
    try:
        from dm_control import suite
    except ImportError as error:
        raise MissingError(
            f"The physics engine is missing ({error}). Install it: pip install '.[paper]' in the repository's root."
        ) from error
    physics = suite.load("hopper", "stand").physics
    random = np.random.RandomState(DATA_SEED)
    rollouts = np.empty((n, N_POINTS, N_DIMS), np.float32)
    with bar(n, "hopper's rollouts") as ticks:
        for rollout in rollouts:
            with physics.reset_context():
                physics.data.qpos[:2] = random.uniform(0, 0.5, 2)
                physics.data.qpos[2:] = random.uniform(-2, 2, 5)
                physics.data.qvel[:] = random.uniform(-5, 5, 7)
            for state in rollout:
                state[:] = np.concatenate([physics.data.qpos, physics.data.qvel])
                physics.step()
            ticks.update()
    return rollouts
