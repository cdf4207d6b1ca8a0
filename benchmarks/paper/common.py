"""Parts shared by the experiments: settings, tables, resumable progress, figures, and reports as text and JSON."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness

T = TypeVar("T")
SCALES = ("quick", "default", "full")
PACKAGES = ("numpy", "scipy", "scikit-learn", "matplotlib", "dm_control", "mujoco", "mlxtend")


class MissingError(Exception):
    """A missing requirement of an experiment, an extra or a data set; the message says how to get it."""


@dataclass(frozen=True)
class Settings:
    """The request on the command line.

    Attributes:
        scale: "quick" (for tests; its numbers mean nothing), "default" (two cores) or "full" (the paper's setting).
        output: folder of the results.
        seed: of every random number; an experiment with several runs derives theirs from it.
        data: folder with the user's data sets.
        fresh: ignores the progress of an interrupted run.
        until: time.monotonic() after which an experiment that can report on unfinished work starts no more of it.
        only: text that names the units of work to do, of an experiment that can report on a part of them.
    """

    scale: str = "default"
    output: Path = Path(__file__).resolve().parent.parent / "results"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    data: Path | None = None
    fresh: bool = False
    until: float = math.inf
    only: str = ""

    def goes_on_with(self, unit: str) -> bool:
        """True if there is time left, and ``unit`` is to be worked on."""
        return time.monotonic() < self.until and self.only in unit

    def pick(self, quick: T, default: T, full: T) -> T:
        """The value for this scale."""
        return dict(zip(SCALES, (quick, default, full), strict=True))[self.scale]

    def file(self, name: str, ending: str) -> Path:
        """Path of a result. It contains the scale, so that a quick run does not overwrite a longer one's results."""
        scale = "" if self.scale == "default" else f"_{self.scale}"
        return self.output / f"paper_{name}{scale}.{ending}"


@dataclass(frozen=True)
class Table:
    """Rows of strings and numbers (None: an empty cell); ``note`` is printed below."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str = ""


@dataclass
class Report:
    """Result of an experiment: tables to print and store, paths of its figures, and further values to store."""

    name: str
    tables: list[Table] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def check_any_finished(results: Any) -> None:
    """Refuses to report on nothing, which would overwrite the results of an earlier run.

    Raises:
        MissingError: ``results`` is empty.
    """
    if not results:
        raise MissingError("no unit of work is finished. Give it more --minutes, or an --only that names one.")


class Progress:
    """Results of finished units of work by name, stored in a file so that an interrupted experiment can continue.

    Values are numbers, strings, tensors, and dicts, lists or tuples of them (state_dicts too). The file is deleted when
    the experiment is complete; one from a run with another fingerprint, seed or device is ignored.
    """

    def __init__(self, settings: Settings, name: str, fingerprint: Mapping[str, Any]) -> None:
        self.path = settings.output / f"paper_{name}_{settings.scale}.progress.pt"
        given = plain({**fingerprint, "seed": settings.seed, "device": str(settings.device)})
        self._fingerprint = json.dumps(given, sort_keys=True)
        self._units: dict[str, Any] = {}
        if self.path.exists() and not settings.fresh:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            if saved["fingerprint"] == self._fingerprint:
                self._units = saved["units"]
                print(f"continuing from {self.path}", file=sys.stderr)

    def get(self, key: Any) -> Any | None:
        return self._units.get(str(key))

    def put(self, key: Any, value: Any) -> None:
        self._units[str(key)] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({"fingerprint": self._fingerprint, "units": self._units}, partial)
        os.replace(partial, self.path)

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


def bar(total: int, description: str) -> tqdm:
    """A progress bar on stderr; a context manager with ``update(n)``."""
    return tqdm(total=total, desc=description, file=sys.stderr, dynamic_ncols=True)


def save_figure(settings: Settings, figure: Figure, name: str) -> Path:
    path = settings.file(name, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def three_gradients() -> tuple[str, ...]:
    """The methods that the paper compares."""
    return ("aca", "adjoint", "naive")


def print_table(table: Table) -> None:
    lines = [list(table.columns)] + [[cell(x) for x in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{table.title}")
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    if table.note:
        print(table.note)


def cell(x: Any) -> str:
    """Text of a table's cell; floats with four significant digits."""
    if x is None:
        return "-"
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def write_json(settings: Settings, report: Report) -> Path:
    record = {
        "experiment": report.name,
        "scale": settings.scale,
        "seed": settings.seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": harness.commit(),
        "machine": harness.machine(settings.device.type),
        "versions": {**harness.versions(), **versions()},
        "tables": [asdict(table) for table in report.tables],
        "values": report.values,
    }
    path = settings.file(report.name, "json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(record), indent=1) + "\n")
    return path


def plain(x: Any) -> Any:
    """Converts ``x`` to the types of JSON; infinities and NaN, which JSON lacks, become text."""
    if isinstance(x, Tensor):
        return plain(x.tolist())
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, Sequence) and not isinstance(x, str):
        return [plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x if isinstance(x, (str, int, float, bool, type(None))) else str(x)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
