"""README and docs/: their examples run, and their tables list exactly the names, options and errors that exist."""

from __future__ import annotations

import builtins
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import aca_ext
from aca_ext import errors
from aca_ext.engines import ENGINES
from aca_ext.numerics.adams import DEFAULT_MAX_ITERS, MAX_ORDER, Adams
from aca_ext.numerics.controller import Controller
from aca_ext.numerics.implicit_tableaus import ROSENBROCK_METHODS
from aca_ext.numerics.methods import ALIASES
from aca_ext.problem.options import DEFAULT_MAX_NUM_STEPS, option_names

# From torch's own formulas for forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def examples(page: str) -> list[str]:
    """The Python blocks of a page, except those that include a file."""
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    return [block for block in blocks if "--8<--" not in block]


def section(page: str, title: str) -> str:
    found = PAGES[page].partition(f"\n## {title}\n")[2]
    assert found, f"{page} has no section {title}"
    return re.split(r"^## ", found, maxsplit=1, flags=re.MULTILINE)[0]


def rows(page: str, title: str) -> list[list[str]]:
    """Cells of the rows in the section's tables, without the headings."""
    lines = re.findall(r"^\| `.*", section(page, title).partition("|---")[2], re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def first_names(page: str, title: str) -> list[str]:
    return [re.findall(r'`"?(\w+)"?`', row[0])[0] for row in rows(page, title)]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_examples_run(page: str) -> None:
    names: dict[str, Any] = {}
    for i, example in enumerate(examples(page)):
        exec(compile(example, f"{page}, block {i}", "exec"), names)  # safe: the page is part of this repository


def test_first_model_has_gradients() -> None:
    names: dict[str, Any] = {}
    for example in examples("index.md"):
        exec(example, names)
    assert names["ys"].shape == (5, 128, 2)
    assert all(p.grad is not None for p in names["func"].parameters())


def test_methods_are_those_there_are() -> None:
    named = {}
    for names, order, evaluations, steps, dense in rows("choosing.md", "Methods"):
        main, *others = re.findall(r"`(\w+)`", names)
        assert {alias for alias in others if alias in ALIASES} == {a for a, of in ALIASES.items() if of == main}
        for name in (main, *(other for other in others if other not in ALIASES)):
            named[name] = (order, evaluations, steps == "adaptive", dense)
    assert list(named) == list(aca_ext.METHODS)
    for name, (order, evaluations, is_adaptive, dense) in named.items():
        method = aca_ext.METHODS[name]
        embedded = f"({method.embedded_order})" if method.adaptive else ""
        assert order == f"{method.order}{embedded}"
        of_adams = f"2 to {1 + DEFAULT_MAX_ITERS}" if name == "implicit_adams" else "1"
        assert evaluations == (of_adams if isinstance(method, Adams) else str(method.stages - method.fsal))
        assert is_adaptive == method.adaptive
        assert dense == (f"order {method.dense_order}" if method.dense is not None and method.adaptive else "")


def test_implicit_methods_are_those_there_are() -> None:
    named = {}
    for line in re.findall(r"^\| `.*", PAGES["stiff.md"].partition("|---")[2], re.MULTILINE):
        names, orders, steps = (cell.strip() for cell in line.strip("|").split(" | ")[:3])
        methods = re.findall(r"`(\w+)`", names)
        all_orders = orders.split(", ") if "," in orders else [orders] * len(methods)
        named |= {name: (order, steps) for name, order in zip(methods, all_orders, strict=True)}
    there = {**aca_ext.IMPLICIT_METHODS, **ROSENBROCK_METHODS}
    assert set(named) == set(there)
    for name, (order, steps) in named.items():
        method = there[name]
        embedded = f"({method.embedded_order})" if method.adaptive else ""
        assert order == f"{method.order}{embedded}"
        assert steps == ("adaptive" if method.adaptive else "fixed")


def test_gradients_engines_and_errors_are_those_there_are() -> None:
    assert first_names("choosing.md", "Gradient methods") == list(aca_ext.GRADIENTS)
    assert set(first_names("choosing.md", "Engines")) == set(ENGINES)
    bases = {"AcaError", "SolveError"}
    kinds = {name: getattr(errors, name) for name in errors.__all__ if name not in bases}
    warnings = {name for name, kind in kinds.items() if issubclass(kind, Warning)}
    assert set(first_names("errors.md", "Warnings")) == warnings
    assert set(first_names("errors.md", "Errors")) == set(kinds) - warnings
    for name, also, *_ in rows("errors.md", "Errors"):
        for base in also.split(", "):
            assert issubclass(kinds[name.strip("`")], getattr(builtins, base))


def test_arguments_and_options_are_those_there_are() -> None:
    named = {row[0].strip("`"): row[1].strip("`") for row in rows("options.md", "Arguments")}
    keywords = {name: p for name, p in inspect.signature(aca_ext.odeint).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(named) == set(keywords)
    for name in ("rtol", "atol", "dense", "progress"):
        assert str(float(named[name]) if "tol" in name else named[name]) == str(keywords[name].default)
    titles = re.findall(r"^## (Options .*)$", PAGES["options.md"], re.MULTILINE)
    listed = [name for title in titles for name in first_names("options.md", title)]
    assert sorted(listed) == sorted(option_names())


def test_defaults_of_options_are_those_there_are() -> None:
    named = {row[0].strip("`"): row[1] for row in rows("options.md", "Options of adaptive steps")}
    for field in fields(Controller):
        if field.name in named and field.name not in ("first_step", "max_step"):
            assert float(named[field.name]) == field.default
    assert int(named["max_num_steps"].replace(" ", "")) == DEFAULT_MAX_NUM_STEPS
    of_adams = {row[0].strip("`"): int(row[1]) for row in rows("options.md", "Options of the methods of Adams")}
    assert of_adams == {"max_order": MAX_ORDER, "max_iters": DEFAULT_MAX_ITERS}


def test_reference_has_every_public_name() -> None:
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", PAGES["reference.md"], re.MULTILINE)}
    public = {name for name in aca_ext.__all__ if callable(getattr(aca_ext, name))}
    assert public | set(aca_ext.flows.__all__) <= documented


def test_files_are_there() -> None:
    paths = re.findall(r"^(?:csrc|aca_ext|python_tests|benchmarks|docs)/\S*", PAGES["contributing.md"], re.MULTILINE)
    assert len(paths) > 10
    for path in paths:
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 180
    links = re.findall(r"\]\((?!https:)([^)#]+)(?:#([^)]*))?\)", readme)
    assert len(links) > 10
    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text() if path.endswith(".md") else "", re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
