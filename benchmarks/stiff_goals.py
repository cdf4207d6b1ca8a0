"""The goals of the implicit methods, each with the worst value over problems and tolerances."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.harness import Table

COLUMNS = {
    "goal": ("goal", ""),
    "method": ("solver", ""),
    "at most": ("limit", ".1f"),
    "worst": ("worst", ".2f"),
    "at": ("at", ""),
    "met": ("met", ""),
}
# Keys in the rows of ``stiff_comparison.COLUMNS`` and in those of all solvers, with their limits.
_ERROR = "error at the end, in tolerances", "in_tolerances", 10.0
_STEPS = "steps / steps of SciPy's Radau at equal error", "step_ratio", 1.5
_EAGER = "time / diffrax's Kvaerno5 without jit", "of_no_jit", 1.0
_COMPILED = "time / diffrax's Kvaerno5 under jit", "of_jit", 1.5
_GOALS = {
    "aca_ext kvaerno5": (_ERROR, _STEPS, _EAGER),
    "aca_ext radau5": (_ERROR, _STEPS, _EAGER),
    "aca_ext rodas5p": (_ERROR, _STEPS),
    "aca_ext kvaerno3": (_ERROR, _STEPS),
    "aca_ext trbdf2": (_ERROR, _STEPS),
    "aca_ext kvaerno5, compiled": (_ERROR, _COMPILED),
}
_OF_BATCH = "aca_ext kvaerno5, lanes, 1e-06", "diffrax Kvaerno5, vmap, jit, 1e-06"
_BATCH_LIMIT = 0.5


def goals(by_problem: dict[str, Sequence[dict[str, Any]]], of_batch: Sequence[dict[str, Any]]) -> Table:
    """A row for each goal that was measured.

    Args:
        by_problem: rows of the tables of all solvers, and of those of the comparison, by the name of the problem.
        of_batch: rows of the table of the batch.
    """
    table = Table("Goals, with the worst value over all problems and tolerances", COLUMNS)
    for solver, wanted in _GOALS.items():
        for goal, key, limit in wanted:
            found = list(_values(by_problem, solver, key))
            if found:
                worst, at = max(found)
                n_met = sum(value <= limit for value, _ in found)
                row = {"goal": goal, "solver": solver.removeprefix("aca_ext "), "limit": limit, "worst": worst}
                table.rows.append(row | {"at": at, "met": f"{n_met} of {len(found)}"})
    seconds = {row["solver"]: row["seconds"] for row in of_batch}
    if all(name in seconds for name in _OF_BATCH):
        ratio = seconds[_OF_BATCH[0]] / seconds[_OF_BATCH[1]]
        row = {"goal": "time of a batch / diffrax under vmap and jit", "solver": "kvaerno5, lanes"}
        met = f"{int(ratio <= _BATCH_LIMIT)} of 1"
        table.rows.append(row | {"limit": _BATCH_LIMIT, "worst": ratio, "at": "Robertson, 1e-06", "met": met})
    return table


def _values(by_problem: dict[str, Sequence[dict[str, Any]]], solver: str, key: str) -> Iterator[tuple[float, str]]:
    for problem, rows in by_problem.items():
        for row in rows:
            if row["solver"] == solver and row.get(key) is not None:
                yield row[key], f"{problem}, {row['tolerance']:.0e}"
