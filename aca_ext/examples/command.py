"""``aca-ext examples``: lists the examples and runs one."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import time
from pathlib import Path

from aca_ext.examples.result import Result

EXAMPLES = (
    "spiral", "latent_ode", "cnf", "flow_matching", "hamiltonian", "lotka_volterra", "bouncing_ball",
    "stiff_chemistry", "sir", "image_classifier", "ten_thousand", "long_solve",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``aca-ext examples`` to its command-line parser."""
    names = f"example to run, one of {', '.join(EXAMPLES)}; without a name they are listed"
    parser.add_argument("name", nargs="?", choices=EXAMPLES, metavar="NAME", help=names)
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG to write; default NAME.png")
    parser.add_argument("--quick", action="store_true", help="a small size, for a test that takes seconds")


def run(arguments: argparse.Namespace) -> int:
    """Lists the examples, or runs the one that is named; returns the exit status."""
    if arguments.name is None:
        print(listing())
        return 0
    output = arguments.output or Path(f"{arguments.name}.png")
    try:
        module = importlib.import_module(f"aca_ext.examples.{arguments.name}")
    except ImportError as missing:
        return report_missing(f"The example {arguments.name}", missing)
    if not can_be_written(output):
        return 1
    start = time.perf_counter()
    try:
        result: Result = module.run(arguments.quick)
    except ModuleNotFoundError as missing:
        return report_missing(f"The example {arguments.name}", missing)
    for name, number in result.numbers.items():
        print(f"{name}: {number:.6g}")
    result.figure.savefig(output, dpi=80, format="png")
    print(f"{time.perf_counter() - start:.1f} s. Picture written to {output}")
    return 0


def listing() -> str:
    """One line for each example: its name, and the first line of its docstring."""
    width = max(map(len, EXAMPLES))
    lines = [f"{name:{width}}  {description(name)}" for name in EXAMPLES]
    return "\n".join([*lines, "", "Run one: aca-ext examples NAME --output FILE.png"])


def description(name: str) -> str:
    """The first line of an example's docstring, read from its source, so that nothing is imported."""
    source = (Path(__file__).parent / f"{name}.py").read_text()
    return str(ast.get_docstring(ast.parse(source))).partition("\n")[0]


def report_missing(what: str, missing: ImportError) -> int:
    """Says which package is missing and how to install it; returns the exit status."""
    package = str(missing.name).partition(".")[0]
    print(
        f"{what} needs the package {package}, which is not installed. Run pip install 'aca_ext[demo]', or "
        "pip install '.[demo]' in the source folder.",
        file=sys.stderr,
    )
    return 1


def can_be_written(output: Path) -> bool:
    """Tells whether a picture can be written there, and reports why not, before the work and not after it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("ab").close()
    except OSError as error:
        print(f"--output {output} cannot be written: {error}", file=sys.stderr)
        return False
    return True
