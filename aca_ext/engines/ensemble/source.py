"""The C++ of a library for one func and one method: generated code around the headers of csrc/ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsFloat

import torch

from aca_ext.engines.ensemble.statements import jacobian_text, pull_text, slope_text
from aca_ext.engines.ensemble.tracing import Traced
from aca_ext.errors import CompileError
from aca_ext.numerics.implicit import ImplicitTableau
from aca_ext.numerics.tableau import Tableau
from aca_ext.numerics.weights import Weights
from aca_ext.solver.implicit.scheme import implicit_scheme_of

_INLINE_BELOW = 400  # lines; longer functions are compiled once and called
_MAX_LINES, _MAX_NUMBERS = 20_000, 8192  # compilers take minutes for more, and the numbers lie on the stack
_HEADERS = {"vectors": "ensemble/library.h", "threads": "ensemble/threads.cuh"}
_OPERANDS = "V t, const V* __restrict y, const V* __restrict p, const T* __restrict w"
_Row = Sequence[SupportsFloat]
_TYPES = {torch.float32: "float", torch.float64: "double"}


def source_of(
    traced: Traced,
    tableau: Tableau | ImplicitTableau,
    segments: Sequence[int],
    dtype: torch.dtype,
    lanes: str = "vectors",
) -> str:
    """One file of C++, or of CUDA too where ``lanes`` are "threads".

    Args:
        segments: bounds of the components of the state within a sample.

    Raises:
        CompileError: func is too large.
    """
    is_implicit = isinstance(tableau, ImplicitTableau)
    return "\n".join([
        f"typedef {_TYPES[dtype]} T;",
        f'#include "{_HEADERS[lanes]}"',
        "namespace aca {",
        *_field(traced, segments, is_implicit),
        *(_implicit_method(tableau) if isinstance(tableau, ImplicitTableau) else _explicit_method(tableau)),
        "}",
        "ACA_LIBRARY(aca::Field, aca::Method)",
        "",
    ])  # fmt: skip


def _field(traced: Traced, segments: Sequence[int], is_implicit: bool) -> list[str]:
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
    return [
        "struct Field {",
        *(f"static constexpr int {name} = {value};" for name, value in numbers.items()),
        f"static constexpr bool has_jacobian = {str(is_implicit).lower()};",
        f"static constexpr int bounds[] = {{{', '.join(map(str, segments))}}};",
        f"static {_qualifier(slope)} void slope({_OPERANDS}, V* __restrict k) {{",
        *slope,
        "}",
        f"static {_qualifier(pull)} void pull({_OPERANDS}, const V* __restrict g, V* __restrict gy, V* __restrict gp, "
        "V* __restrict gw) {",
        *pull,
        "}",
        *(_jacobian(traced) if is_implicit else []),
        "};",
    ]


def _jacobian(traced: Traced) -> list[str]:
    lines = jacobian_text(traced.lane.code, traced.lane.slopes)
    if len(lines) > _MAX_LINES:
        raise CompileError(
            f"the Jacobian of func takes {len(lines)} lines of code for one sample; at most {_MAX_LINES} are compiled "
            'to lanes. Use engine="eager".'
        )
    return [f"static {_qualifier(lines)} void jacobian({_OPERANDS}, V* __restrict d) {{", *lines, "}"]


def _qualifier(lines: Sequence[str]) -> str:
    return "ACA_HD" if len(lines) < _INLINE_BELOW else "ACA_HD_CALLED"


def _explicit_method(tableau: Tableau) -> list[str]:
    assert tableau.error is not None
    return [
        "struct Method {",
        *_weights(tableau, tableau.fsal, tableau.c, tableau.b, tableau.error, tableau.a),
        "static constexpr bool is_implicit = false;",
        "template <typename> using Iterations = NoNewton;",
        "template <typename> using Replay = NoNewton;",
        "};",
    ]


def _implicit_method(tableau: ImplicitTableau) -> list[str]:
    """A method whose first stage is explicit and whose others have the same diagonal element."""
    scheme = implicit_scheme_of(tableau, estimate_error=True)
    assert scheme.error is not None
    assert tableau.diagonal is not None
    return [
        "struct Method {",
        *_weights(tableau, scheme.fsal, scheme.c, scheme.solution, scheme.error, scheme.a),
        "static constexpr bool is_implicit = true;",
        f"static constexpr bool filter_error = {str(tableau.error_filter is not None).lower()};",
        f"static constexpr double gamma = {float(tableau.diagonal)!r};",
        # Weights of the states of all stages, of the end of the step, and of its start.
        *_by_stage("predictors", len(scheme.a) + 2, [w for group in scheme.groups for w in group.predictors]),
        *_by_stage("starts", len(scheme.a), [w for group in scheme.groups for w in group.starts]),
        "template <typename F> using Iterations = Newton<F, Method>;",
        "template <typename F> using Replay = ImplicitReplay<F, Method>;",
        "};",
    ]


def _by_stage(name: str, size: int, weights: Sequence[Sequence[tuple[int, float]]]) -> list[str]:
    """A matrix of weights, whose first row is that of the explicit stage, which has none."""
    rows = [[0.0] * size for _ in (0, *weights)]
    for row, of_stage in zip(rows[1:], weights, strict=True):
        for number, weight in of_stage:
            row[number] = weight
    return [f"static constexpr double {name}[][{size}] = {{{', '.join(map(_row, rows))}}};"]


def _weights(tableau: Weights, fsal: bool, c: _Row, b: _Row, error: _Row, a: Sequence[_Row]) -> list[str]:
    s, dense = tableau.stages, tableau.dense_coefficients
    degree = max(map(len, dense))
    return [
        f"static constexpr int stages = {s}, degree = {degree};",
        f"static constexpr bool fsal = {str(fsal).lower()};",
        f"static constexpr double c[] = {_row(c)};",
        f"static constexpr double b[] = {_row(b)};",
        f"static constexpr double error[] = {_row(error)};",
        f"static constexpr double a[][{s}] = {{{', '.join(_row(row) for row in a)}}};",
        # The highest power first, stages that dense output never uses with zeros.
        f"static constexpr double dense[][{degree}] = {{{', '.join(_row(row or [0.0] * degree) for row in dense)}}};",
    ]


def _row(values: _Row) -> str:
    return "{" + ", ".join(repr(float(x)) for x in values) + "}"
