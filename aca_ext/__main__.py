"""The command line: ``aca-ext demo``, ``aca-ext examples`` and ``aca-ext config``, also as ``python -m aca_ext``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from aca_ext import demo, show_config
from aca_ext.examples import command as examples


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status; ``argv`` defaults to that of the process."""
    parser = argparse.ArgumentParser(prog="aca-ext", description="Neural ODEs in PyTorch with exact gradients.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of_demo = commands.add_parser(
        "demo",
        help="train a neural ODE on handwritten digits with three gradient methods and compare them",
        description="Trains a neural-ODE image classifier on scikit-learn's handwritten digits with each gradient "
        "method in turn, prints a table and writes a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_arguments(of_demo)
    of_examples = commands.add_parser(
        "examples",
        help="list the examples, or run one and draw its picture",
        description="Lists the examples. With a name, runs that one, prints what it found and writes a picture.",
    )
    examples.add_arguments(of_examples)
    commands.add_parser("config", help="print versions, backends, instruction set and threads")
    arguments = parser.parse_args(argv)
    if arguments.command == "config":
        show_config()
        return 0
    return (demo if arguments.command == "demo" else examples).run(arguments)


if __name__ == "__main__":
    sys.exit(main())
