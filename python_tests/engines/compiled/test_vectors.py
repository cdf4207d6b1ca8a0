"""The vectors of vectors.h give the bits of torch's, and torch's header is used for what vectors.h lacks."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import sympy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from aca_ext.engines.compiled import inductor
from aca_ext.engines.compiled.lowerings import decompositions
from aca_ext.engines.compiled.shortcuts import shortcuts, templates_compiled_when_used
from aca_ext.engines.compiled.undisturbed import undisturbed

WITH_OWN_VECTORS = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="vectors.h is for AVX2 and AVX-512"
)
SIZE = 37  # two full vectors of floats and a part of one


def many(x: Tensor) -> Tensor:
    functions = (torch.exp, torch.expm1, torch.sin, torch.cos, torch.tan, torch.tanh, torch.atan, torch.asinh)
    total = sum(f(x) for f in functions) + torch.floor(x) * torch.ceil(x)
    a = x.abs()
    total = total + torch.log(a) + torch.log1p(a) + torch.log2(a) + torch.log10(a) + torch.sqrt(a) + torch.rsqrt(a)
    return total + torch.asin(x / 8) - torch.acos(x / 8) * torch.atanh(x / 8) + a**1.3 + torch.atan2(x, a + 1)


def compared(x: Tensor) -> Tensor:
    return torch.where(x > 0.2, torch.maximum(x, -x * x), torch.minimum(x, x * x)) + torch.clamp(x, -0.5, 0.5)


def reduced(x: Tensor) -> Tensor:
    return x * x.square().sum() + (x.double() * x.double()).sum().to(x.dtype)


def beyond(x: Tensor) -> Tensor:
    return torch.erfinv(x / 8)


def source_of(func: Callable[[Tensor], Tensor], x: Tensor) -> str:
    def program(x: Tensor, y: Tensor) -> tuple[()]:
        y.copy_(func(x))
        return ()

    inputs = [x, torch.empty_like(x)]
    with undisturbed(), torch.no_grad():
        traced = make_fx(torch.func.functionalize(program), decomposition_table=decompositions())(*inputs)
        return inductor._source([inductor.whole_program(traced, inputs, 0)])


def result(source: str, to: Path, x: Tensor) -> Tensor:
    with undisturbed():
        inductor._compile(source, to)
    y = torch.empty_like(x)
    inductor.run_program(inductor._program(ctypes.CDLL(str(to)), 0), [x, y])
    return y


def states(dtype: torch.dtype) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each source given to the compiler, True if it includes torch's header."""
    has_header: list[bool] = []
    run_compiler = inductor.run_compiler

    def run(command: list[str], source: str, to: Path) -> None:
        if source:  # not the empty library
            has_header.append("cpp_prefix.h" in source)
        run_compiler(command, source, to)

    monkeypatch.setattr(inductor, "run_compiler", run)
    return has_header


@WITH_OWN_VECTORS
class TestOwnVectors:
    @pytest.mark.parametrize(
        ("func", "dtype"),
        [
            (many, torch.float32),
            (many, torch.float64),
            (compared, torch.float32),
            (compared, torch.float64),
            (reduced, torch.float64),
        ],
    )
    def test_give_the_bits_of_torchs(
        self,
        func: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        compiled: list[bool],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        x = states(dtype)
        source = source_of(func, x)
        own = result(source, tmp_path / "own.so", x)
        monkeypatch.setattr(inductor, "_WITH_OWN_VECTORS", set())
        of_torch = result(source, tmp_path / "torch.so", x)
        assert compiled == [False, True]
        assert own.isfinite().all()
        assert torch.equal(own, of_torch)

    def test_pass_nan_on(self, compiled: list[bool], tmp_path: Path) -> None:
        x = states(torch.float32)
        x[[3, 36]] = torch.nan
        y = result(source_of(lambda x: torch.maximum(x, -x) + torch.minimum(x, -x), x), tmp_path / "own.so", x)
        assert compiled == [False]
        assert torch.equal(y.isnan(), x.isnan())

    def test_lack_functions_for_which_torchs_header_is_read(self, compiled: list[bool], tmp_path: Path) -> None:
        x = states(torch.float64)
        y = result(source_of(beyond, x), tmp_path / "new.so", x)
        assert compiled == [False, True]
        assert torch.allclose(y, beyond(x), rtol=1e-12)


class TestShortcuts:
    def test_expand_plain_sums_as_sympy_does(self) -> None:
        a, b = sympy.symbols("a b", integer=True)
        with shortcuts():
            assert sympy.simplify(32 * (a + 1) + b - (32 * a + b)) == 32
            assert sympy.simplify(sympy.sin(a) ** 2 + sympy.cos(a) ** 2) == 1  # not plain: by sympy itself

    def test_map_lone_variables_as_torch_does(self) -> None:
        trees = ["name", ("a", ["b", {"c": "d"}]), 3, None]
        expected = [_pytree.tree_map(lambda x: (x, 1), tree) for tree in trees]
        with shortcuts():
            assert [_pytree.tree_map(lambda x: (x, 1), tree) for tree in trees] == expected
            assert _pytree.tree_map(lambda x, y: x + y, ["a"], ["b"]) == ["ab"]

    def test_end_with_the_context(self) -> None:
        originals = sympy.simplify, _pytree.tree_map
        with shortcuts():
            assert sympy.simplify is not originals[0]
            assert _pytree.tree_map is not originals[1]
        assert (sympy.simplify, _pytree.tree_map) == originals

    def test_compile_templates_at_their_first_use(self) -> None:
        from torch._inductor.codegen.common import KernelTemplate

        original = KernelTemplate._template_from_string
        with templates_compiled_when_used():
            template = KernelTemplate._template_from_string("{{a}} and {{b}}")
            KernelTemplate._template_from_string("{% wrong")  # no error, since it is not used
        assert KernelTemplate._template_from_string is original
        assert template.render(a=1, b=2) == original("{{a}} and {{b}}").render(a=1, b=2) == "1 and 2"
        assert template


class TestUndisturbed:
    def test_puts_garbage_collection_off(self) -> None:
        assert gc.isenabled()
        with undisturbed():
            assert not gc.isenabled()
        assert gc.isenabled()
        gc.disable()
        try:
            with undisturbed():
                pass
            assert not gc.isenabled()
        finally:
            gc.enable()
