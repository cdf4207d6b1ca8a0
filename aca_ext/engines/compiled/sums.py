"""Calls of kernels for the sums of a step, which sums.h computes: weighted sums of slopes, and the error by segment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from aca_ext.engines.compiled.cpp_source import C_TYPES, Call

_THREADS_FROM = 1 << 15  # elements, as for the kernels of the extension

Sum = tuple[Tensor, Tensor | None, Sequence[float]]  # receives the sum; base, with 0 for None; weights


def weighted_sums(sums: Sequence[Sum], h: Tensor | float, x: Sequence[Tensor]) -> Call:
    """The call that computes base + h·Σ_j w[j]·x[j] for each sum; all tensors have one layout without gaps."""
    kind, n = C_TYPES[sums[0][0].dtype], sums[0][0].numel()
    names = [f"x_{j}" for j in range(len(x))]
    operands = [(f"const {kind}*", name, x_j) for name, x_j in zip(names, x, strict=True)]
    lines = [f"const V v_{j} = aca::load<V>(x_{j} + i);" for j in range(len(x))]
    if isinstance(h, Tensor):
        operands.append((f"const {kind}*", "h", h))
    for i, (out, base, weights) in enumerate(sums):
        terms = [f"v_{j} * {kind}({w!r})" for j, w in enumerate(weights)]
        step = "*h" if isinstance(h, Tensor) else f"{kind}({h!r})"
        parts = [f"({' + '.join(terms)}) * {step}"] if terms else []
        if base is not None:
            operands.append((f"const {kind}*", f"base_{i}", base))
            parts.insert(0, f"aca::load<V>(base_{i} + i)")
        operands.append((f"{kind}*", f"out_{i}", out))
        lines.append(f"aca::store<V>(out_{i} + i, {' + '.join(parts)});")
    threads = torch.get_num_threads() if n >= _THREADS_FROM else 1
    return _call(operands, [f"aca::for_each_element<{kind}, 0, {n}, {threads}>({_body(lines)});"])


def error_sums(
    sums: Tensor,
    partial: Tensor,
    k: Tensor | None,
    w: float,
    h: Tensor,
    ends: tuple[Tensor, Tensor],
    tolerances: tuple[Tensor, Tensor],
    segments: Sequence[int],
) -> Call:
    """The call for ``reference.squared_error_ratios`` with the weight w·h of k; tolerances are 0-d or per element."""
    kind = C_TYPES[partial.dtype]
    named = {"partial": partial, "h": h, "y0": ends[0], "y1": ends[1], "rtol": tolerances[0], "atol": tolerances[1]}
    if k is not None:
        named["k"] = k
    operands = [(f"const {kind}*", name, x) for name, x in named.items()]
    rtol, atol = ("*" + name if named[name].dim() == 0 else f"aca::load<V>({name} + i)" for name in ("rtol", "atol"))
    lines = [
        *(f"const V {name}_i = aca::load<V>({name} + i);" for name in ("y0", "y1")),
        "const V size_0 = aca::magnitude(y0_i), size_1 = aca::magnitude(y1_i);",
        f"const V allowed = {rtol} * (size_0 > size_1 ? size_0 : size_1) + {atol};",
        "const V error = aca::load<V>(partial + i)" + ("" if k is None else " + aca::load<V>(k + i) * weight") + ";",
        "const V ratio = error == 0 ? V{} : error / allowed;",
        "return V(ratio + (y1_i - y1_i));  // NaN if y1 is not finite",
    ]
    statements = [] if k is None else [f"const {kind} weight = {kind}({w!r}) * *h;"]
    statements.append(f"const auto ratio = {_body(lines)};")
    for i, (start, end) in enumerate(pairwise(segments)):
        statements.append(f"sums[{i}] = aca::sum_of_squares<{kind}, {start}, {end}>(ratio);")
    return _call([*operands, ("double*", "sums", sums)], statements)


def _body(lines: Sequence[str]) -> str:
    return "[&]<typename V>(long i) {\n        " + "\n        ".join(lines) + "\n    }"


def _call(operands: Sequence[tuple[str, str, Tensor]], statements: Sequence[str]) -> Call:
    parameters = ", ".join(f"{kind} {name}" for kind, name, _ in operands)
    source = f'extern "C" void kernel({parameters}) {{\n    ' + "\n    ".join(statements) + "\n}\n"
    return Call(source, tuple(kind for kind, _, _ in operands), tuple(x for _, _, x in operands))
