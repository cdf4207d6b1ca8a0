"""The C++ of a library for one func and one method: generated code around the headers of csrc/ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aca_ext.engines.ensemble.statements import pull_text, slope_text
from aca_ext.engines.ensemble.tracing import Traced
from aca_ext.errors import CompileError
from aca_ext.numerics.tableau import Tableau

_INLINE_BELOW = 400  # lines; longer functions are compiled once and called
_MAX_LINES, _MAX_NUMBERS = 20_000, 8192  # compilers take minutes for more, and the numbers lie on the stack
_HEADERS = {"vectors": "ensemble/library.h", "threads": "ensemble/threads.cuh"}
_TYPES = {torch.float32: "float", torch.float64: "double"}


def source_of(
    traced: Traced, tableau: Tableau, segments: Sequence[int], dtype: torch.dtype, lanes: str = "vectors"
) -> str:
    """One file of C++, or of CUDA too where ``lanes`` are "threads".

    Args:
        segments: bounds of the components of the state within a sample.
    """
    return "\n".join([
        f"typedef {_TYPES[dtype]} T;",
        f'#include "{_HEADERS[lanes]}"',
        "namespace aca {",
        *_field(traced, segments),
        *_method(tableau),
        "}",
        "ACA_LIBRARY(aca::Field, aca::Method)",
        "",
    ])  # fmt: skip


def _field(traced: Traced, segments: Sequence[int]) -> list[str]:
    lane, inputs = traced.lane, traced.lane.inputs
    of_sample, of_shared = traced.is_learnt
    slope = slope_text(lane.code, lane.slopes)
    pull = pull_text(lane.code, lane.slopes, of_sample, of_shared)
    n_numbers = sum(statement.out.size for statement in lane.code.statements) + len(lane.slopes)
    if len(pull) > _MAX_LINES or n_numbers > _MAX_NUMBERS:
        raise CompileError(
            f"func takes {len(pull)} lines of code and {n_numbers} numbers for one sample; at most {_MAX_LINES} and "
            f'{_MAX_NUMBERS} are compiled to lanes. Use engine="eager", whose overhead is small next to such a func.'
        )
    numbers = {
        "n": len(lane.slopes),
        "n_by_sample": inputs.n_by_sample,
        "n_shared": inputs.n_shared,
        "n_learnt": inputs.n_shared if of_shared else 0,
        "segments": len(segments) - 1,
    }
    operands = "V t, const V* __restrict y, const V* __restrict p, const T* __restrict w"
    return [
        "struct Field {",
        *(f"static constexpr int {name} = {value};" for name, value in numbers.items()),
        f"static constexpr int bounds[] = {{{', '.join(map(str, segments))}}};",
        f"static {_qualifier(slope)} void slope({operands}, V* __restrict k) {{",
        *slope,
        "}",
        f"static {_qualifier(pull)} void pull({operands}, const V* __restrict g, V* __restrict gy, V* __restrict gp, "
        "V* __restrict gw) {",
        *pull,
        "}",
        "};",
    ]


def _qualifier(lines: Sequence[str]) -> str:
    return "ACA_HD" if len(lines) < _INLINE_BELOW else "ACA_HD_CALLED"


def _method(tableau: Tableau) -> list[str]:
    s = tableau.stages
    assert tableau.error is not None
    dense = tableau.dense_coefficients
    degree = max(map(len, dense))
    return [
        "struct Method {",
        f"static constexpr int stages = {s}, degree = {degree};",
        f"static constexpr bool fsal = {str(tableau.fsal).lower()};",
        f"static constexpr double c[] = {_row(tableau.c)};",
        f"static constexpr double b[] = {_row(tableau.b)};",
        f"static constexpr double error[] = {_row(tableau.error)};",
        f"static constexpr double a[][{s}] = {{{', '.join(_row(row) for row in tableau.a)}}};",
        # The highest power first, stages that dense output never uses with zeros.
        f"static constexpr double dense[][{degree}] = {{{', '.join(_row(row or [0.0] * degree) for row in dense)}}};",
        "};",
    ]


def _row(values: Sequence[object]) -> str:
    return "{" + ", ".join(repr(float(x)) for x in values) + "}"  # type: ignore[arg-type]
