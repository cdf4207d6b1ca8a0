"""README: its examples run, and its tables list exactly the solvers, gradients, errors and options that exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import aca_ext
from aca_ext import errors
from aca_ext.numerics.adams import DEFAULT_MAX_ITERS, Adams
from aca_ext.numerics.methods import ALIASES

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """Cells of the rows in the section's tables, without the headings."""
    lines = re.findall(r"^\| `.*", section(title).partition("|---")[2], re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(example, names)  # safe: README is part of this repository
    ys = names["ys"]
    assert isinstance(ys, torch.Tensor)
    assert ys.shape == (5, 128, 2)
    assert all(p.grad is not None for p in names["func"].parameters())
    assert names["longer"].y.shape == (7, 128, 2)
    assert "n_f_evals" in capsys.readouterr().out


def test_solvers_are_those_there_are() -> None:
    named = {}
    for names, order, evaluations, steps, dense in rows("Solvers"):
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


def test_gradients_and_errors_are_those_there_are() -> None:
    assert [re.findall(r'"(\w+)"', row[0])[0] for row in rows("Gradient methods")] == list(aca_ext.GRADIENTS)
    named = {name for row in rows("Errors") for name in re.findall(r"`(\w+)`", row[0])}
    bases = {"AcaError", "SolveError", "NotCompiledError"}
    raised = {name for name in errors.__all__ if not issubclass(getattr(errors, name), Warning)}
    assert named == raised - bases


def test_options_and_files_are_there() -> None:
    options = section("Solvers").partition("`options`")[2].partition(";")[0]
    assert {"first_step", "norm"} <= set(re.findall(r"\w+", options))
    for name in re.findall(r"\w+", options):
        assert name in str(inspect.getdoc(aca_ext.odeint))
    for path in re.findall(r"^(?:csrc|aca_ext|python_tests|benchmarks)/\S*", section("Files"), re.MULTILINE):
        assert list(Path(__file__).resolve().parent.parent.glob(path.rstrip("/")))
