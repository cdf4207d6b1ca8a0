"""Timing of several callables in turn, and their results as tables on the screen and as JSON."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import aca_ext

PACKAGES = ("aca_ext", "torchdiffeq", "torchode", "TorchDiffEqPack", "diffrax", "jax", "scipy")
SHORTEST_SAMPLE = 2e-3  # seconds; shorter callables are repeated within one sample
FEWEST_ROUNDS, MOST_ROUNDS = 3, 100


@dataclass(frozen=True)
class Settings:
    """The request on the command line."""

    device: str = "cpu"
    quick: bool = False


@dataclass
class Table:
    """Rows of raw numbers and their format: ``columns`` maps a heading to (key in the row, format)."""

    title: str
    columns: Mapping[str, tuple[str, str]]
    rows: list[dict[str, Any]] = field(default_factory=list)


# Yielded by a benchmark: each table once it is measured, and a sentence on everything that it leaves out.
Parts = Iterator[Table | str]


@dataclass
class Result:
    """Tables that a benchmark has yielded; ``is_complete`` once it has reached its end."""

    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_complete: bool = False


class Timings:
    """Seconds per call of each case, one sample per round."""

    def __init__(self, samples: dict[str, list[float]]) -> None:
        self.samples = samples

    def median(self, name: str) -> float:
        return median(self.samples[name])

    def best(self, name: str) -> float:
        return min(self.samples[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of the time of ``name`` over the time of ``base`` in the same round."""
        return median(a / b for a, b in zip(self.samples[name], self.samples[base], strict=True))


def interleave(
    cases: Mapping[str, Callable[[], object]], settings: Settings, *, threads: int = 1, seconds: float = 10.0
) -> Timings:
    """Times the cases in turn, in rounds, for about ``seconds``, so that a slow phase of the machine hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    with torch_threads(threads):
        repeats, round_seconds = dict.fromkeys(cases, 1), 0.0
        for name, call in cases.items():
            call()  # the first call may compile
            if settings.quick:
                samples[name].append(_time(call, 1, settings.device))
                continue
            while (sample := repeats[name] * _time(call, repeats[name], settings.device)) < SHORTEST_SAMPLE:
                repeats[name] *= 2
            round_seconds += sample
        if settings.quick:
            return Timings(samples)
        rounds = min(max(int(seconds / round_seconds), FEWEST_ROUNDS), MOST_ROUNDS)
        for _ in range(rounds):
            for name, call in cases.items():
                samples[name].append(_time(call, repeats[name], settings.device))
    return Timings(samples)


def _time(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds per call, including the work that it queued on the device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def first_line(error: BaseException) -> str:
    """First line of the error's message, at most 300 characters."""
    return next(iter(str(error).splitlines()), "")[:300]


def new_figure(width: float = 8.0, height: float = 4.0) -> Any:
    """An empty matplotlib figure, size in inches, for which no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def print_table(table: Table) -> None:
    lines = [list(table.columns)]
    for row in table.rows:
        lines.append(["-" if row.get(key) is None else format(row[key], spec) for key, spec in table.columns.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{table.title}")
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells), flush=True)


def write_json(folder: Path, name: str, question: str, settings: Settings, result: Result) -> Path:
    record = {
        "benchmark": name,
        "question": question,
        "settings": asdict(settings),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(settings.device),
        "versions": versions(),
        "complete": result.is_complete,
        "notes": result.notes,
        "tables": [{"title": table.title, "rows": table.rows} for table in result.tables],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def machine(device: str) -> dict[str, Any]:
    machine = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instruction set": aca_ext.config()["cpu kernels"].partition(",")[0],
        "device": device,
    }
    if device == "cuda":
        machine["gpu"], machine["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
    return machine


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
