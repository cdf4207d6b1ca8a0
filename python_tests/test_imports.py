"""Import rules of the package and include rules of its C++ sources, checked by parsing the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "aca_ext", ROOT / "csrc"

# The wings of the package from the ground up: a module imports from its own wing and from those before it.
ORDER = (
    "errors",
    "progress",
    "user_warnings",
    "numerics",
    "problem",
    "kernels",
    "vector_field",
    "solver",
    "gradients",
    "solution",
    "known_steps",
    "engines",
    "odeint",
    "neural_ode",
    "flows",
    "torchdiffeq",
    "controls",
    "tensor_memory",
    "examples",
    "demo",
    "__main__",
)
MOST_MODULES_IN_ROOT = 12
# Further modules that a module must not import, even indirectly.
UNREACHABLE = {
    "aca_ext.errors": ("torch", "numpy"),
    "aca_ext.progress": ("torch", "numpy"),
    "aca_ext.numerics": ("torch",),
    "aca_ext.numerics.controller": ("numpy",),
    "aca_ext.numerics.tableau": ("numpy",),
    "aca_ext.numerics.methods": ("numpy",),
    "aca_ext.numerics.implicit_tableaus": ("numpy",),
    "aca_ext.numerics.stiffness": ("numpy",),
    "aca_ext.numerics.switching": ("numpy",),
    "aca_ext.solver": ("aca_ext.vector_field.replay",),
    "aca_ext.solver.checkpoints": ("aca_ext.solver.loop", "aca_ext.problem.problem"),
    "aca_ext.solver.reversed_states": ("aca_ext.solver.loop", "aca_ext.problem.problem"),
    "aca_ext.solver.runge_kutta": ("aca_ext.solver.loop", "aca_ext.problem.problem", "aca_ext.numerics.controller"),
    "aca_ext.engines.compiled": ("aca_ext.engines.cuda_graph",),
    "aca_ext.engines.cuda_graph": ("aca_ext.engines.compiled", "aca_ext.engines.ensemble"),
    "aca_ext.engines.ensemble": ("aca_ext.engines.cuda_graph",),
}
# Modules that import the compiled extension.
IMPORT_THE_EXTENSION = [
    "aca_ext.engines.cuda_graph.control_block",
    "aca_ext.kernels.extension",
    "aca_ext.kernels.fused",
    "aca_ext.kernels.small_systems",
]
# Patterns of includes, and of the only files in csrc that may have them.
INCLUDES = {
    r"(torch|ATen|c10)\b.*|Python\.h": r"(?!)",
    r"pybind11/.*": r"python/.*",
    r"(cuda|cu_|cub/|cooperative_groups|device_|thrust/|nv|mma)(?!_graph/).*|sm_\d+.*": r".*\.cuh?",
}

Imports = dict[str, set[str]]


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(source: str, module: str, is_package: bool, modules: set[str]) -> Iterator[str]:
    """Full names of all imports anywhere in a module; a name imported from a package counts if it is a module."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            inner = [f"{origin}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else origin for name in inner)


def imports_of(package: Path) -> Imports:
    paths = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    modules = {*paths, f"{package.name}._C"}
    return {
        module: set(imported_by(path.read_text(), module, path.name == "__init__.py", modules))
        for module, path in paths.items()
    }


def is_within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def reached_from(module: str, imports: Imports) -> set[str]:
    """All modules that ``module`` imports, directly or indirectly, without its package's __init__."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        new = imports.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def cycle_in(imports: Imports) -> list[str] | None:
    internal = {module: {name for name in names if name in imports} for module, names in imports.items()}
    try:
        TopologicalSorter(internal).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def wrong_includes(path: Path, sources: Path) -> list[str]:
    return [
        include
        for include in includes_of(path)
        for pattern, files in INCLUDES.items()
        if re.fullmatch(pattern, include) and not re.fullmatch(files, path.relative_to(sources).as_posix())
    ]


def wing_of(module: str) -> str:
    return module.split(".")[1]


def upward_imports(imports: Imports, order: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (module, imported module) whose imported module belongs to a later wing."""
    inner = {m: {n for n in names if n in imports and "." in n} for m, names in imports.items() if "." in m}
    return [(m, n) for m, names in inner.items() for n in names if order.index(wing_of(n)) > order.index(wing_of(m))]


IMPORTS = imports_of(PACKAGE)
SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())


class TestPackage:
    def test_was_found(self) -> None:
        assert {"aca_ext", "aca_ext.kernels.fused", "aca_ext.gradients.aca"} <= set(IMPORTS)
        assert IMPORTS["aca_ext.kernels.fused"] >= {"torch", "aca_ext._C", "aca_ext.kernels.reference"}

    def test_rules_name_what_exists(self) -> None:
        assert set(UNREACHABLE) <= set(IMPORTS)
        assert {wing_of(module) for module in IMPORTS if "." in module} == set(ORDER)

    def test_imports_go_down(self) -> None:
        assert upward_imports(IMPORTS, ORDER) == []

    def test_root_holds_few_modules(self) -> None:
        assert len(list(PACKAGE.glob("*.py"))) <= MOST_MODULES_IN_ROOT

    def test_few_modules_import_the_extension(self) -> None:
        assert [module for module, names in IMPORTS.items() if "aca_ext._C" in names] == IMPORT_THE_EXTENSION

    def test_the_package_alone_looks_for_the_extension_by_name(self) -> None:
        names = {
            module_name(path, PACKAGE)
            for path in PACKAGE.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and node.value in ("_C", "._C", "aca_ext._C")
        }
        assert names <= {"aca_ext"}

    @pytest.mark.parametrize("part", UNREACHABLE)
    def test_does_not_reach_what_it_must_not(self, part: str) -> None:
        for module in (name for name in IMPORTS if is_within(name, part)):
            reached = reached_from(module, IMPORTS)
            assert not {name for name in reached for forbidden in UNREACHABLE[part] if is_within(name, forbidden)}

    def test_has_no_cycles(self) -> None:
        assert cycle_in(IMPORTS) is None

    def test_modules_import_one_another_not_the_package(self) -> None:
        importers = {module for module, names in IMPORTS.items() if "aca_ext" in names}
        assert {name for name in importers if wing_of(name) != "examples"} <= {"aca_ext.__main__"}

    def test_examples_import_only_public_names(self) -> None:
        examples = {module for module in IMPORTS if is_within(module, "aca_ext.examples")}
        inner = {name for module in examples for name in IMPORTS[module] if is_within(name, "aca_ext")}
        assert inner - examples <= {"aca_ext", "aca_ext.flows", "aca_ext.odeint"}  # names that are modules, too


class TestSources:
    def test_were_found(self) -> None:
        assert {"bindings.cpp", "ops.h", "cuda.cu"} <= {path.name for path in SOURCES}
        assert "pybind11/pybind11.h" in includes_of(CSRC / "python" / "bindings.cpp")

    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
    def test_include_only_what_they_may(self, path: Path) -> None:
        assert wrong_includes(path, CSRC) == []

    @pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
    def test_name_no_torch(self, path: Path) -> None:
        assert not re.search(r"\b(at|c10|torch)::", path.read_text())


class TestRulesCanFail:
    """The rules applied to a package that breaks them."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        package = tmp_path / "pkg"
        (package / "sub").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "sub" / "__init__.py").write_text("from pkg.sub import two\n")
        (package / "one.py").write_text("def f():\n    from pkg import _C, two\n    import torch.nn\n")
        (package / "two.py").write_text("if True:\n    from .three import x\n")
        (package / "three.py").write_text("from . import one\n")
        (package / "sub" / "two.py").write_text("from ..three import x\nfrom .. import one as other\n")
        return package

    def test_finds_imports_of_every_form(self, package: Path) -> None:
        assert imports_of(package) == {
            "pkg": set(),
            "pkg.one": {"pkg._C", "pkg.two", "torch.nn"},
            "pkg.two": {"pkg.three"},
            "pkg.three": {"pkg.one"},
            "pkg.sub": {"pkg.sub.two"},
            "pkg.sub.two": {"pkg.three", "pkg.one"},
        }

    def test_follows_imports(self, package: Path) -> None:
        assert reached_from("pkg.sub", imports_of(package)) >= {"pkg.sub.two", "pkg.three", "torch.nn"}

    def test_finds_cycles(self, package: Path) -> None:
        cycle = cycle_in(imports_of(package))
        assert cycle is not None
        assert set(cycle) == {"pkg.one", "pkg.two", "pkg.three"}
        (package / "three.py").write_text("")
        assert cycle_in(imports_of(package)) is None

    def test_finds_imports_that_go_up(self, package: Path) -> None:
        imports = imports_of(package)
        assert ("pkg.one", "pkg.two") in upward_imports(imports, ("sub", "one", "three", "two"))
        assert upward_imports({"pkg": set(), "pkg.two": {"pkg.one"}, "pkg.one": set()}, ("one", "two")) == []

    @pytest.mark.parametrize(
        ("name", "include", "is_wrong"),
        [
            ("kernels/ops.h", "<torch/extension.h>", True),
            ("python/bindings.cpp", "<ATen/ATen.h>", True),
            ("kernels/cuda.cu", '"c10/cuda/CUDAStream.h"', True),
            ("python/bindings.cpp", "<pybind11/stl.h>", False),
            ("kernels/cpu.cpp", "<pybind11/stl.h>", True),
            ("kernels/cuda.cu", "<cuda_runtime.h>", False),
            ("cuda_graph/loop_graph.cu", "<cub/cub.cuh>", False),
            ("python/bindings.cpp", "<cuda_runtime.h>", True),
            ("kernels/ops.h", "<cuda.h>", True),
            ("kernels/ops.h", "<cstdint>", False),
            ("python/control_bindings.h", '"cuda_graph/loop_graph.h"', False),
            ("kernels/cuda.cu", '"ops_impl.h"', False),
        ],
    )
    def test_finds_includes(self, tmp_path: Path, name: str, include: str, is_wrong: bool) -> None:
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(f"// a file\n  # include {include}\n")
        assert bool(wrong_includes(path, tmp_path)) == is_wrong
