"""C++ source of compiled programs: calls of the kernels and matrix products of a traced graph, in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from aca_ext.engines.compiled.library_cache import torch_library
from aca_ext.errors import CompileError

C_TYPES = {torch.float32: "float", torch.float64: "double"}
_ALIGNMENT = 64
_MAX_CONSTANT_BYTES = 1 << 16
_KERNEL = {True: "static void", False: "__attribute__((noinline)) static void"}  # by whether it may be inlined
_END_OF_HEADERS = "}  // namespace aca"  # of sums.h, the last one


@dataclass(frozen=True)
class Call:
    """A call of a kernel with this C++ source and these argument types; source "" is the matrix product c = a @ b."""

    source: str
    types: tuple[str, ...]
    operands: tuple[Tensor, ...]

    @property
    def read_only(self) -> list[bool]:
        return [kind.startswith("const") for kind in self.types] if self.source else [True, True, False]


class Source:
    """C++ source of one or more programs."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[str, bool], str] = {}  # by source, and whether it may be inlined
        self._constants: list[str] = []
        self._programs: list[str] = []
        self._count = 0

    def add(self, calls: Sequence[Call], inputs: Sequence[Tensor], constant: int, *, inlines: bool) -> None:
        """Adds a program whose last ``constant`` inputs do not change between runs, and which may inline kernels."""
        places, workspace_bytes, constants = _places(calls, inputs)
        for storage in constants:
            name = f"constant_{len(self._constants)}"
            values = ", ".join(map(str, bytes(storage.tolist())))
            self._constants.append(f"alignas({_ALIGNMENT}) static unsigned char {name}[] = {{{values}}};")
            places[storage.data_ptr()] = f"(char*){name}"
        lasting = {x.untyped_storage().data_ptr() for x in inputs[len(inputs) - constant :]}
        products = _Products(self._count, lasting)
        body: list[str] = []
        for call in calls:
            at = [
                f"{places[x.untyped_storage().data_ptr()]} + {x.storage_offset() * x.element_size()}"
                for x in call.operands
            ]
            if call.source:
                name = self._kernels.setdefault((call.source, inlines), f"kernel_{len(self._kernels)}")
                operands = ", ".join(f"({kind})({place})" for kind, place in zip(call.types, at, strict=True))
                body.append(f"{name}({operands});")
            else:
                body.append(products.call(call.operands, at))
        i = self._count
        self._programs += [
            _number(f"workspace_bytes_{i}", workspace_bytes),
            products.text() + _function(f"program_{i}(char** in, char* workspace, char* prepared)", body),
        ]
        self._count += 1

    def text(self) -> str:
        kernels: list[str] = []
        headers: dict[str, None] = {}
        for (source, inlines), name in self._kernels.items():
            lines = source.splitlines()
            headers.update((line, None) for line in lines if line.startswith("#include"))
            code = "\n".join(line for line in lines if not line.startswith("#include"))
            kernels.append(re.sub(r'extern "C"\s+void\s+kernel\(', f"{_KERNEL[inlines]} {name}(", code))
        count = _number("programs", self._count)
        own = ["#define ACA_BLAS"] if _has_blas() else []
        own += [_header(name) for name in ("registers.h", "matmul.h", "sums.h")]
        return "\n".join([*headers, *own, *self._constants, *kernels, *self._programs, count, ""])


_TORCH_HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>"
# Each kernel has these lines, for divisions of integers, which need torch's header.
_DIVISION_CHECK = re.compile(r"^.*\binductor_cpu_(throw_if_)?integer_div_error.*\n", re.MULTILINE)


def with_own_vectors(source: str) -> str:
    """The source with vectors.h in place of torch's header, which the compiler reads for two seconds.

    It does not compile if a kernel needs more than vectors.h has.
    """
    head, _, code = source.partition(_TORCH_HEADER)
    code = _DIVISION_CHECK.sub("", code)
    kernels = code.rpartition(_END_OF_HEADERS)[2]
    standard = ["#include <cmath>", "#include <limits>"] if "std::" in kernels else []
    standard += ["#include <omp.h>"] if "omp_" in kernels else []
    return "\n".join([head, *standard, _header("vectors.h"), code])


@cache
def _has_blas() -> bool:
    """Looks for matrix products with the names of BLAS among what torch's library exports."""
    try:
        found = torch_library()
    except OSError:
        return False
    return hasattr(found, "sgemm_") and hasattr(found, "dgemm_")


def _header(name: str) -> str:
    """The text of a header, without those of ours that it includes."""
    text = Path(__file__).with_name(name).read_text()
    return re.sub(r'^#pragma once|^#include ".*', "", text, flags=re.MULTILINE)


def _places(calls: Sequence[Call], inputs: Sequence[Tensor]) -> tuple[dict[int, str], int, list[torch.UntypedStorage]]:
    """The place of each storage, the bytes of the workspace, and the constants: storages read but never written.

    A place is an input or a part of the workspace. Storages share a part if they are not in use at the same time.
    """
    places = {x.untyped_storage().data_ptr(): f"in[{i}]" for i, x in enumerate(inputs)}
    uses: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    constants: dict[int, torch.UntypedStorage] = {}
    for n, call in enumerate(calls):
        # A kernel may read its output through a second operand, which is then not a constant.
        written = {
            x.untyped_storage().data_ptr()
            for x, is_read_only in zip(call.operands, call.read_only, strict=True)
            if not is_read_only
        }
        for x in call.operands:
            memory = x.untyped_storage()
            address = memory.data_ptr()
            if address in places or address in constants:
                continue
            if address not in uses and address not in written:
                constants[address] = memory
                continue
            uses.setdefault(address, []).append(n)
            sizes[address] = -(-memory.nbytes() // _ALIGNMENT) * _ALIGNMENT
    if sum(memory.nbytes() for memory in constants.values()) > _MAX_CONSTANT_BYTES:
        raise CompileError('func makes large constant tensors. Make them once, outside of func, or use engine="eager".')
    taken: list[tuple[int, int, int, int]] = []  # first use, last use, start, end
    for address, used in sorted(uses.items(), key=lambda item: -sizes[item[0]]):
        start = 0
        for _, _, low, high in sorted((t for t in taken if t[0] <= used[-1] and used[0] <= t[1]), key=lambda t: t[2]):
            if start + sizes[address] <= low:
                break
            start = max(start, high)
        taken.append((used[0], used[-1], start, start + sizes[address]))
        places[address] = f"workspace + {start}"
    return places, max((end for *_, end in taken), default=0), list(constants.values())


class _Products:
    """Matrix products of a program; lasting operands are copied once, in advance, to a faster layout."""

    def __init__(self, program: int, lasting: set[int]) -> None:
        self._program, self._lasting = program, lasting
        self._prepared: dict[tuple[str, ...], str] = {}  # place of a prepared copy, by product and operands
        self._declarations: list[str] = []
        self._prepare: list[str] = []

    def call(self, operands: Sequence[Tensor], at: Sequence[str]) -> str:
        """Source of c = a @ b; with three dimensions, of each pair of matrices."""
        a, b, _ = operands
        kind = C_TYPES[a.dtype]
        (m, k), n = a.shape[-2:], b.shape[-1]
        strides = ", ".join(str(s) for x in operands for s in x.stride()[-2:])
        lasts = [a.dim() == 2 and x.untyped_storage().data_ptr() in self._lasting for x in (a, b)]
        product = f"aca::Product<{kind}, {m}, {n}, {k}, {strides}, {str(lasts[0]).lower()}, {str(lasts[1]).lower()}>"
        if a.dim() == 2:
            types = (f"const {kind}*", f"const {kind}*", f"{kind}*")
            *factors, result = (f"({pointer})({place})" for pointer, place in zip(types, at, strict=True))
            prepared = self._place(
                product, [x if is_lasting else "nullptr" for x, is_lasting in zip(factors, lasts, strict=True)]
            )
            return f"{product}::run({', '.join(factors)}, {result}, {prepared});"
        steps = [x.stride(0) * x.element_size() for x in operands]
        moved = [f"{place} + i * {step}" for place, step in zip(at, steps, strict=True)]
        call = f"(const {kind}*)({moved[0]}), (const {kind}*)({moved[1]}), ({kind}*)({moved[2]}), nullptr"
        return f"for (long i = 0; i < {a.shape[0]}; ++i) {product}::run({call});"

    def _place(self, product: str, lasting: Sequence[str]) -> str:
        """Place of the prepared copy of the lasting operands; it has no bytes if the product copies none."""
        key = (product, *lasting)
        if key not in self._prepared:
            n = len(self._prepared)
            start = f"end_{self._program}_{n - 1}" if n else "0"
            self._declarations.append(
                f"static constexpr long end_{self._program}_{n} = {start} + {product}::prepared_bytes;"
            )
            place = self._prepared[key] = f"prepared + {start}"
            self._prepare.append(f"{product}::prepare({', '.join(lasting)}, {place});")
        return self._prepared[key]

    def text(self) -> str:
        """Source of the constant with the size of the prepared memory, and of the function that fills it."""
        n, i = len(self._prepared), self._program
        size = _number(f"prepared_bytes_{i}", f"end_{i}_{n - 1}" if n else 0)
        lines = [*self._declarations, size]
        return "\n".join(lines) + "\n" + _function(f"prepare_{i}(char** in, char* prepared)", self._prepare)


def _number(name: str, value: object) -> str:
    """Source of a constant that Python reads from the library."""
    return f'extern "C" const long {name} = {value};'


def _function(head: str, body: Sequence[str]) -> str:
    lines = "\n    ".join(body)
    return f'extern "C" void {head}\n{{\n    {lines}\n}}\n'
