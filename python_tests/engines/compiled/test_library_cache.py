"""The cache of compiled libraries on disk: found again by other processes, never stale, never damaged."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from aca_ext import odeint, solve
from aca_ext.engines.compiled import inductor, library_cache
from aca_ext.engines.compiled.fingerprint import UnknownError, text_of
from aca_ext.errors import CompileError

SETTINGS: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8, "method": "bosh3", "engine": "compiled"}
TIMES = [0.0, 1.0]
SECOND_PROCESS = """
import aca_ext, torch
torch.set_num_threads(1)
from aca_ext.engines.compiled import inductor
def refuse(*_):
    raise AssertionError("compiled again")
inductor._source = refuse
y0 = torch.ones(3).double().requires_grad_()
y = aca_ext.odeint(lambda t, y: torch.sin(y) * 0.625 - t, y0, [0.0, 1.0],
                   rtol=1e-6, atol=1e-8, method="bosh3", engine="compiled")
print(y[-1].tolist(), torch.autograd.grad(y[-1].sum(), y0)[0].tolist())
"""


class Numbers:
    """Builds libraries with one number inside, and counts them."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, number: int) -> int:
        found = library_cache.library([str(number)], lambda to: self._build(number, to))
        return found.number()

    def _build(self, number: int, to: Path) -> None:
        self.built += 1
        command = ["g++", "-shared", "-fPIC", str(library_cache.source_file(to)), "-o", str(to)]
        library_cache.run_compiler(command, f'extern "C" int number() {{ return {number}; }}', to)


class TestLibrary:
    def test_is_built_once(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        numbers = Numbers()
        assert [numbers(1), numbers(1), numbers(2)] == [1, 1, 2]
        assert numbers.built == 2
        monkeypatch.setattr(library_cache, "_libraries", {})  # as in another process
        assert [numbers(1), numbers(2)] == [1, 2]
        assert numbers.built == 2
        assert len(list(empty_cache.iterdir())) == 2  # nothing else is left there

    @pytest.mark.parametrize("damage", [lambda x: x[:-1000], lambda x: b"", lambda x: x[:5000] + b"?" + x[5001:]])
    def test_is_built_again_if_its_file_is_damaged(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
    ) -> None:
        numbers = Numbers()
        numbers(3)
        (path,) = empty_cache.iterdir()
        content = path.read_bytes()
        path.unlink()  # the loaded library keeps the old file
        path.write_bytes(damage(content))
        monkeypatch.setattr(library_cache, "_libraries", {})
        assert numbers(3) == 3
        assert numbers.built == 2
        assert library_cache._is_intact(path)

    def test_may_be_built_by_several_processes_at_once(self, empty_cache: Path) -> None:
        empty_cache.mkdir()
        path, together = empty_cache / "one.so", threading.Barrier(4)

        def build(to: Path) -> None:
            Numbers()._build(4, to)
            together.wait(60)  # all have compiled, none has moved its file yet

        threads = [threading.Thread(target=library_cache._built, args=(path, build)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert library_cache._is_intact(path)
        assert library_cache._loaded(path).number() == 4
        assert list(empty_cache.iterdir()) == [path]

    def test_is_built_again_after_it_was_forgotten(self, empty_cache: Path) -> None:
        numbers = Numbers()
        numbers(5)
        library_cache.forget(["5"])
        assert list(empty_cache.iterdir()) == []
        library_cache.forget(["5"])  # nothing is left to delete
        assert (numbers(5), numbers.built) == (5, 2)

    def test_leaves_no_entry_if_the_compiler_fails(self, empty_cache: Path) -> None:
        def build(to: Path) -> None:
            library_cache.run_compiler(["g++", str(library_cache.source_file(to)), "-o", str(to)], "no C++", to)

        with pytest.raises(CompileError, match=r"g\+\+ failed"):
            library_cache.library(["x"], build)
        assert list(empty_cache.iterdir()) == []
        with pytest.raises(CompileError, match="needs a C\\+\\+ compiler"):
            library_cache.library(["x"], lambda to: library_cache.run_compiler(["no_such_compiler"], "", to))

    def test_one_that_cannot_be_loaded_is_a_compile_error(self, empty_cache: Path) -> None:
        def build(to: Path) -> None:
            to.write_bytes(b"no library")

        with pytest.raises(CompileError, match=library_cache.VARIABLE):
            library_cache.library(["x"], build)


class TestFolder:
    def test_follows_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in (library_cache.VARIABLE, "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert library_cache.folder() == tmp_path / ".cache" / "aca_ext"
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", library_cache._default_of_inductor())  # as Inductor sets it
        assert library_cache.folder() == tmp_path / ".cache" / "aca_ext"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert library_cache.folder() == tmp_path / "xdg" / "aca_ext"
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
        assert library_cache.folder() == tmp_path / "inductor" / "aca_ext"
        monkeypatch.setenv(library_cache.VARIABLE, str(tmp_path / "own"))
        assert library_cache.folder() == tmp_path / "own"
        assert (tmp_path / "own").is_dir()

    def test_is_private_to_the_process_if_it_cannot_be_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(library_cache.VARIABLE, str(tmp_path / "file" / "cache"))
        found = library_cache.folder()
        assert found.is_dir()
        assert tmp_path not in found.parents


def graph_of(*operations: tuple[Any, tuple[Any, ...]], constant: Tensor | None = None) -> fx.GraphModule:
    """A graph of operations, each applied to the result of the one before it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    root = nn.Module()
    root.constant = constant
    for function, operands in operations:
        more = (graph.get_attr("constant"),) if constant is not None else ()
        x = graph.call_function(function, (x, *operands, *more))
    graph.output((x,))
    return fx.GraphModule(root, graph)


class TestText:
    def test_tells_graphs_apart(self) -> None:
        import operator

        graphs = [
            graph_of((torch.sin, ())),
            graph_of((torch.cos, ())),
            graph_of((operator.getitem, ((0, 1),))),
            graph_of((operator.getitem, ([0, 1],))),
            graph_of((operator.getitem, (slice(0, 1),))),
            graph_of((torch.mul, (2,))),
            graph_of((torch.mul, (2.0,))),
            graph_of((torch.mul, (0.0,))),
            graph_of((torch.mul, (-0.0,))),
            graph_of((torch.mul, (True,))),
            graph_of((torch.ops.aten.sin.default, ())),
            graph_of((torch.mul, ()), constant=torch.tensor(1.0)),
            graph_of((torch.mul, ()), constant=torch.tensor(1.5)),
            graph_of((torch.mul, ()), constant=torch.tensor(1.0).double()),
            graph_of((torch.mul, ()), constant=torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
            graph_of((torch.mul, ()), constant=torch.tensor([[1.0, 3.0], [2.0, 4.0]]).t()),
        ]
        assert len({text_of(graph) for graph in graphs}) == len(graphs)

    def test_does_not_depend_on_names(self) -> None:
        one, other = graph_of((torch.sin, ())), graph_of((torch.sin, ()))
        for node in other.graph.nodes:
            node.name = f"other_{node.name}"
        assert text_of(one) == text_of(other)

    def test_refuses_what_it_does_not_determine(self) -> None:
        def own(x: Tensor) -> Tensor:
            return x

        own_in_disguise = own
        own_in_disguise.__module__ = "torch"
        graphs = [
            graph_of((own, ())),
            graph_of((own_in_disguise, ())),
            graph_of((torch.ops.c10d.barrier, ())),
            graph_of((torch.mul, (Fraction(1, 2),))),
            graph_of((torch.mul, ()), constant=nn.Parameter(torch.ones(2))),
        ]
        for graph in graphs:
            with pytest.raises(UnknownError):
                text_of(graph)


class TestInstructions:
    def test_are_tested_only_if_the_best_do_not_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import cpu_vec_isa

        original = cpu_vec_isa.valid_vec_isa_list
        tested: list[bool] = []

        def compile_for(source: str, to: Path) -> None:
            tested.append(cpu_vec_isa.valid_vec_isa_list is original)
            if not tested[-1]:
                raise CompileError("unknown instructions")

        monkeypatch.setattr(inductor, "_compile", compile_for)
        inductor._build(lambda: (), tmp_path / "new.so")
        assert tested == [platform.machine() not in ("x86_64", "AMD64"), True]
        assert cpu_vec_isa.valid_vec_isa_list is original

    @pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have no tests")
    @pytest.mark.parametrize("capability", [None, "avx2", "default"])
    def test_untested_ones_hold_floats_as_tested_ones_do(
        self, capability: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torch._inductor.cpu_vec_isa import VecISA, pick_vec_isa

        if capability is not None:
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        tested = pick_vec_isa()
        with monkeypatch.context() as patch, inductor._untested_instructions():
            patch.setattr(VecISA, "check_build", lambda self, code: pytest.fail("a test"))
            found = pick_vec_isa()
            assert bool(found) == bool(tested)
        assert found.bit_width() == tested.bit_width()

    def test_are_those_of_tests_if_the_library_cannot_be_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources: list[str] = []
        monkeypatch.setattr(inductor, "_compile", lambda source, to: sources.append(source))
        inductor._build(lambda: (), tmp_path / "new.so")  # there is no such file
        assert len(sources) == 2


class TestPrograms:
    """Solves with programs from the cache."""

    def test_another_process_finds_them(self, empty_cache: Path) -> None:
        y0 = torch.ones(3, dtype=torch.float64).requires_grad_()
        y = odeint(lambda t, y: torch.sin(y) * 0.625 - t, y0, TIMES, **SETTINGS)
        (grad,) = torch.autograd.grad(y[-1].sum(), y0)
        assert len(list(empty_cache.iterdir())) == 1  # the step and its transpose are one library
        done = subprocess.run(
            [sys.executable, "-c", SECOND_PROCESS], capture_output=True, text=True, check=False, env=os.environ.copy()
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{y[-1].tolist()} {grad.tolist()}"

    @pytest.mark.usefixtures("no_evaluations")
    def test_are_those_of_the_same_graph_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known_by: dict[tuple[str, ...], int] = {}  # numbers of names
        last: tuple[str, ...] = ()

        def not_compiled(parts: Sequence[str], build: object) -> None:
            nonlocal last
            last = tuple(parts)
            known_by.setdefault(last, len(known_by))
            raise CompileError("not compiled")

        monkeypatch.setattr(inductor, "library", not_compiled)

        def name(factor: float = 2.0, size: int = 2, dtype: torch.dtype = torch.float64, **settings: Any) -> int:
            """The number of the programs' name."""

            class Scaled(nn.Module):
                def forward(self, t: Tensor, y: Tensor) -> Tensor:
                    return -factor * y

            solution = solve(Scaled(), torch.ones(size, dtype=dtype), TIMES, **SETTINGS | settings)
            assert "not compiled" in solution.stats.reason
            return known_by[last]

        names = [
            name(), name(3.0), name(size=3), name(dtype=torch.float32), name(method="dopri5"),
            name(options={"step_size": 0.1}), name(rtol=torch.ones(2)),
        ]  # fmt: skip
        assert names == [*range(7)]
        assert name() == name(rtol=1e-3, options={"max_num_steps": 7}) == 0
        torch.set_num_threads(2)
        try:
            assert name() == len(known_by) - 1
        finally:
            torch.set_num_threads(1)
