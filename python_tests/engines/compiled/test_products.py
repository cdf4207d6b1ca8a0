"""Matrix products and sums of compiled programs, with vectors of each size that the processor has."""

from __future__ import annotations

import ctypes
import itertools
import math
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aca_ext.engines.compiled import inductor, sums
from aca_ext.engines.compiled.cpp_source import Call, Source
from aca_ext.engines.compiled.library_cache import run_compiler, source_file

# Rows, columns and terms around the sizes of blocks and vectors, and for the BLAS of torch.
SIZES = [(1, 1, 1), (1, 50, 2), (1, 2, 50), (5, 3, 37), (6, 16, 4), (7, 33, 9), (8, 32, 8), (13, 17, 6), (20, 4, 64)]
SIZES += [(1, 1030, 1040), (70, 130, 140), (1030, 2, 1040)]
LENGTHS = [1, 2, 3, 5, 8, 13, 16, 37]


@pytest.fixture(params=["x86-64", "x86-64-v3", "native"])  # vectors of 16 bytes, of 32, and the longest
def instructions(request: pytest.FixtureRequest) -> str:
    if request.param != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these are instruction sets of x86-64")
    if request.param == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")
    return str(request.param)


def matrix(rows: int, columns: int, dtype: torch.dtype, *, is_transposed: bool) -> Tensor:
    made = torch.randn(columns, rows, dtype=dtype).T if is_transposed else torch.randn(rows, columns, dtype=dtype)
    assert made.is_contiguous() is not is_transposed or 1 in made.shape
    return made


def run(calls: list[Call], inputs: list[Tensor], constant: int, instructions: str, to: Path) -> None:
    """Runs the calls, whose operands are ``inputs``, the last of them ``constant`` ones."""
    source = Source()
    source.add(calls, inputs, constant, inlines=False)
    flags = ["-std=c++20", "-O2", f"-march={instructions}", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-w"]
    torchs = ["-Wl,--no-as-needed", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    run_compiler(["g++", *flags, str(source_file(to)), "-o", str(to), *torchs], source.text(), to)
    inductor.run_program(inductor._program(ctypes.CDLL(str(to)), 0), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lasts", [False, True])
def test_products_of_every_layout_and_size(dtype: torch.dtype, lasts: bool, instructions: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    products = []
    for (m, n, k), of_a, of_b, of_c in itertools.product(SIZES, *[(False, True)] * 3):
        a, b = matrix(m, k, dtype, is_transposed=of_a), matrix(k, n, dtype, is_transposed=of_b)
        products.append((a, b, matrix(m, n, dtype, is_transposed=of_c)))
    inputs = [c for *_, c in products] + [x for a, b, _ in products for x in (a, b)]
    run([Call("", (), p) for p in products], inputs, 2 * len(products) * lasts, instructions, tmp_path / "new.so")
    for a, b, c in products:
        exact = a.double() @ b.double()
        scale = a.double().abs() @ b.double().abs()
        assert ((c - exact).abs() <= 4 * math.sqrt(a.shape[1]) * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_states_of_every_length(dtype: torch.dtype, instructions: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    h, rtol, atol = (torch.tensor(x, dtype=dtype) for x in (0.3, 1e-3, 1e-5))
    calls, expected, inputs = [], [], [h, rtol, atol]
    for n in LENGTHS:
        base, x_0, x_1, y_0, y_1 = (torch.randn(n, dtype=dtype) for _ in range(5))
        stage, segments = torch.empty_like(base), [0, n // 2, n]
        squares = torch.empty(2, dtype=torch.float64)
        calls.append(sums.weighted_sums([(stage, base, (0.7, -1.3))], h, [x_0, x_1]))
        calls.append(sums.error_sums(squares, x_0, x_1, 0.4, h, (y_0, y_1), (rtol, atol), segments))
        expected.append((stage, base + h * (0.7 * x_0 - 1.3 * x_1)))
        ratios = (x_0 + 0.4 * h * x_1) / (atol + rtol * torch.maximum(y_0.abs(), y_1.abs()))
        parts = [ratios[: n // 2], ratios[n // 2 :]]
        expected.append((squares, torch.stack([part.double().square().sum() for part in parts])))
        inputs += [base, x_0, x_1, y_0, y_1, stage, squares]
    run(calls, inputs, 0, instructions, tmp_path / "new.so")
    for found, right in expected:
        torch.testing.assert_close(found, right, rtol=50 * torch.finfo(dtype).eps, atol=50 * torch.finfo(dtype).eps)
