"""Steps and times of implicit solves against SciPy's Radau and diffrax's Kvaerno5."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Table
from benchmarks.stiff_problems import StiffProblem

REFERENCE_TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
JIT, NO_JIT = "diffrax Kvaerno5, jit", "diffrax Kvaerno5, no jit"
COLUMNS = {
    "method": ("solver", ""),
    "tolerance": ("tolerance", ".0e"),
    "error": ("error", ".1e"),
    "steps": ("steps", "d"),
    "steps of Radau": ("reference_steps", ".0f"),
    "ratio": ("step_ratio", ".2f"),
    "ms / no jit": ("of_no_jit", ".2f"),
    "ms / jit": ("of_jit", ".2f"),
}


def at_equal_error(problem: StiffProblem, rows: Sequence[dict[str, Any]], radau: Iterable[tuple[float, int]]) -> Table:
    """Own solves against the steps of Radau at the same error, and against the times of diffrax at the same tolerance.

    Args:
        rows: of the table of all solvers.
        radau: errors and steps at several tolerances.
    """
    table = Table(f"{problem.name}: own methods against SciPy's Radau at equal error, and against diffrax", COLUMNS)
    curve = list(radau)
    times = {(row["solver"], row["tolerance"]): row["ms"] for row in rows}
    for row in rows:
        if not row["solver"].startswith("aca_ext"):
            continue
        found = {key: row[key] for key in ("solver", "tolerance", "error", "steps")}
        steps = steps_at(curve, row["error"])
        if steps is not None:
            found |= {"reference_steps": steps, "step_ratio": row["steps"] / steps}
        for key, peer in (("of_no_jit", NO_JIT), ("of_jit", JIT)):
            if (peer, row["tolerance"]) in times:
                found[key] = row["ms"] / times[peer, row["tolerance"]]
        table.rows.append(found)
    return table


def steps_at(curve: Iterable[tuple[float, int]], error: float) -> float | None:
    """The steps at an error, interpolated between the two points around it on logarithmic axes; None outside."""
    points = sorted((np.log(e), np.log(n)) for e, n in curve if e > 0)
    x = np.log(error) if error > 0 else np.nan
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    return float(np.exp(np.interp(x, *zip(*points, strict=True))))
