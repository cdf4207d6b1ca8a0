"""Statements as C++: forward one after the other, and transposed from last to first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from aca_ext.engines.ensemble.code import (
    Array,
    Code,
    Contraction,
    Element,
    Gather,
    Largest,
    Map,
    Number,
    Run,
    Statement,
)


def slope_text(code: Code, slopes: Sequence[Number]) -> list[str]:
    """Lines that compute the statements and write the slopes to k."""
    lines = [line for statement in code.statements for line in _forward(statement)]
    return lines + [f"k[{i}] = {_number(x)};" for i, x in enumerate(slopes)]


def pull_text(code: Code, slopes: Sequence[Number], wants_p: bool, wants_w: bool) -> list[str]:
    """Lines that set gy to the cotangent of y for that of the slopes, g, and add to the cotangents gp and gw."""
    lines = [line for statement in code.statements for line in _forward(statement)]
    transposed = _Transposed(code, wants_p, wants_w)
    for i, x in enumerate(slopes):
        transposed.add(_single(x), f"g[{i}]")
    for statement in reversed(code.statements):
        transposed.pull(statement)
    transposed.complete(code.y)
    return lines + transposed.lines


def jacobian_text(code: Code, slopes: Sequence[Number]) -> list[str]:
    """Lines that set row i of d to the derivatives of slope i with respect to y."""
    lines = [line for statement in code.statements for line in _forward(statement)]
    for i, x in enumerate(slopes):
        transposed = _Transposed(code, wants_p=False, wants_w=False)
        transposed.add(_single(x), "K(1)")
        for statement in reversed(code.statements):
            transposed.pull(statement)
        transposed.complete(code.y)
        lines += ["{", f"V* const gy = d + {i * code.y.size};", *transposed.lines, "}"]
    return lines


def _forward(statement: Statement) -> list[str]:
    out = statement.out
    kind = "M" if out.is_mask else "V"
    if isinstance(statement, Map):
        if out.size == 1:
            return [f"const {kind} {out.name} = {_applied(statement, '')};"]
        loop = f"ACA_LOOP for (int i = 0; i < {out.size}; ++i)"
        return [f"{kind} {out.name}[{out.size}];", f"{loop} {out.name}[i] = {_applied(statement, 'i')};"]
    if isinstance(statement, Contraction):
        b = _Vector(statement.b)
        call = f"contract<{out.size}, {statement.count}>({_pointer(out)}, {_strided(statement.a)}, {b.text})"
        return [f"V {out.name}[{out.size}];", *b.before, f"{call};"]
    if isinstance(statement, Gather):
        return [f"{kind} {out.name}[{out.size}];",
                *(f"{out.name}[{i}] = {_number(x)};" for i, x in enumerate(statement.elements))]  # fmt: skip
    name = "maximum" if statement.sign > 0 else "minimum"
    text = _number(statement.elements[0])
    for x in statement.elements[1:]:
        text = f"{name}({text}, {_number(x)})"
    return [f"const V {out.name} = {text};"]


def _applied(statement: Map, i: str) -> str:
    return statement.operation.text.format(*(_operand(run, i) for run in statement.operands))


def _operand(run: Run, i: str, j: str = "") -> str:
    """Element i, or (i, j), of an operand."""
    if run.array is None:
        return _constant(run.constant)
    return _element(run.array, _index(run, i, j))


def _index(run: Run, i: str, j: str = "") -> str:
    terms = [str(run.start)] if run.start or not (run.step or run.inner) else []
    terms += [name if step == 1 else f"{name} * {step}" for name, step in ((i, run.step), (j, run.inner)) if step]
    return " + ".join(terms)


def _element(array: Array, index: str) -> str:
    if array.is_variable or array.name == "t":
        return array.name
    text = f"{array.name}[{index}]"
    return f"K({text})" if array.is_shared else text


def _number(x: Number) -> str:
    return _element(x.array, str(x.index)) if isinstance(x, Element) else _constant(x)


def _constant(x: Number) -> str:
    if isinstance(x, bool):
        return "always()" if x else "never()"
    assert isinstance(x, float)
    if math.isnan(x):
        return "K(kNaN)"
    if math.isinf(x):
        return "K(kInfinity)" if x > 0 else "K(-kInfinity)"
    return f"K({x!r})"


def _pointer(array: Array, start: int = 0) -> str:
    name = f"&{array.name}" if array.is_variable else array.name
    return f"{name} + {start}" if start else name


def _strided(run: Run) -> str:
    """A matrix as pointer and steps."""
    assert run.array is not None
    return f"{_pointer(run.array, run.start)}, {run.step}, {run.inner}"


@dataclass
class _Vector:
    """An operand as pointer and step, with what makes a constant one."""

    run: Run
    before: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        if self.run.array is None:
            return f"Constant{{{_constant(self.run.constant)}}}, 0"
        return f"{_pointer(self.run.array, self.run.start)}, {self.run.step}"


def _single(x: Number) -> Run:
    return Run(x.array, x.index) if isinstance(x, Element) else Run(None, constant=x)


class _Transposed:
    """The statements from last to first, each adding to the cotangents of its operands."""

    def __init__(self, code: Code, wants_p: bool, wants_w: bool) -> None:
        self.lines: list[str] = []
        self._ignored = {id(code.t)} | (set() if wants_p else {id(code.p)}) | (set() if wants_w else {id(code.w)})
        self._summed = {id(code.p), id(code.w)}  # over all stages of all steps: there is a value to add to
        self._written: dict[int, set[int]] = {id(code.y): set()}

    def add(self, run: Run, text: str, count: int = 1) -> None:
        """Adds a cotangent, element by element where ``count`` is above 1, to that of an operand."""
        array = run.array
        if array is None or not self._wants(array):
            return
        name = self._declared(array)
        if count == 1:
            self._set(array, {run.start}, f"{name}{'' if array.is_variable else f'[{run.start}]'}", text)
            return
        touched = {run.start + i * run.step for i in range(count)}
        if len(touched) < count:  # one element for all
            self._complete(array, touched)
        place = f"{name}{'' if array.is_variable else f'[{_index(run, chr(105))}]'}"
        self._set(array, touched, place, text, f"ACA_LOOP for (int i = 0; i < {count}; ++i) ")

    def pull(self, statement: Statement) -> None:
        out = statement.out
        if out.is_mask or not self._written.get(id(out)):
            return
        self._complete(out, set(range(out.size)))
        if isinstance(statement, Map):
            self._pull_map(statement)
        elif isinstance(statement, Contraction):
            self._pull_contraction(statement)
        elif isinstance(statement, Gather):
            for i, x in enumerate(statement.elements):
                self.add(_single(x), f"d_{out.name}[{i}]")
        else:
            self._pull_largest(statement)

    def complete(self, array: Array) -> None:
        """Sets the cotangents that nothing was added to to zero."""
        self._complete(array, set(range(array.size)))

    def _pull_map(self, statement: Map) -> None:
        out, operation = statement.out, statement.operation
        i = "" if out.size == 1 else "i"
        operands = [_operand(run, i) for run in statement.operands]
        result, g = (out.name, f"d_{out.name}") if out.size == 1 else (f"{out.name}[i]", f"d_{out.name}[i]")
        for run, pullback in zip(statement.operands, operation.pullbacks, strict=True):
            if pullback is not None:
                self.add(run, pullback.format(*operands, r=result, g=g), out.size)

    def _pull_contraction(self, statement: Contraction) -> None:
        out, a, b, count = statement.out, statement.a, statement.b, statement.count
        g, vector = f"{'&' if out.is_variable else ''}d_{out.name}", _Vector(b)
        if b.array is not None and self._wants(b.array):
            name = self._declared(b.array)
            self._complete(b.array, {b.start + j * b.step for j in range(count)})
            pointer = f"{'&' if b.array.is_variable else ''}{name} + {b.start}"
            transposed = f"{_pointer(a.array, a.start)}, {a.inner}, {a.step}" if a.array is not None else ""
            self.lines.append(f"contract_add<{count}, {out.size}>({pointer}, {b.step}, {transposed}, {g}, 1);")
        if a.array is not None and self._wants(a.array):
            name = self._declared(a.array)
            rows, columns = range(out.size), range(count)
            self._complete(a.array, {a.start + i * a.step + j * a.inner for i in rows for j in columns})
            pointer = f"{'&' if a.array.is_variable else ''}{name} + {a.start}"
            shape = f"{out.size}, {count}"
            self.lines.append(f"outer_add<{shape}>({pointer}, {a.step}, {a.inner}, {g}, 1, {vector.text});")

    def _pull_largest(self, statement: Largest) -> None:
        out = statement.out
        ties = [f"select({_number(x)} == {out.name}, K(1), K(0))" for x in statement.elements]
        self.lines.append(f"const V share_{out.name} = d_{out.name} / ({' + '.join(ties)});")
        for x in statement.elements:
            self.add(_single(x), f"select({_number(x)} == {out.name}, share_{out.name}, K(0))")

    def _wants(self, array: Array) -> bool:
        return not array.is_mask and id(array) not in self._ignored

    def _declared(self, array: Array) -> str:
        """The cotangent of an array in C++."""
        name = f"g{array.name}" if array.is_input else f"d_{array.name}"
        if id(array) not in self._written and id(array) not in self._summed:
            self._written[id(array)] = set()
            self.lines.append(f"V {name}{'' if array.is_variable else f'[{array.size}]'};")
        return name

    def _set(self, array: Array, touched: set[int], place: str, text: str, loop: str = "") -> None:
        if id(array) in self._summed:
            self.lines.append(f"{loop}{place} += {text};")
            return
        written = self._written[id(array)]
        if touched & written:
            self._complete(array, touched)
            self.lines.append(f"{loop}{place} += {text};")
        else:
            self.lines.append(f"{loop}{place} = {text};")
            written |= touched

    def _complete(self, array: Array, touched: set[int]) -> None:
        if id(array) in self._summed:
            return
        name = self._declared(array)
        left = sorted(touched - self._written[id(array)])
        self._written[id(array)] |= touched
        if len(left) == array.size > 1:
            self.lines.append(f"ACA_LOOP for (int i = 0; i < {array.size}; ++i) {name}[i] = K(0);")
            return
        self.lines += [f"{name}{'' if array.is_variable else f'[{i}]'} = K(0);" for i in left]
