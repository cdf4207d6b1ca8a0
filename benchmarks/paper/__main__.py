"""Runs one experiment of the ACA paper, or all; prints its tables and writes JSON and PNG to the results folder."""

import argparse
import importlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    from benchmarks.paper.common import SCALES, MissingError, Settings, print_table, write_json
    from benchmarks.paper.page import write as write_page
except ModuleNotFoundError as missing:
    sys.exit(f"The experiments need {missing.name}: pip install '.[paper]'")

NAMES = ("toy", "reverse", "cost", "three_body", "three_body_unknown", "hopper", "image", "hopper_schedule")
LONG = ("three_body_unknown", "image", "hopper_schedule")  # hours; part of "all" with --quick alone


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument(
        "name",
        metavar="NAME",
        choices=(*NAMES, "all", "page"),
        help=f"{', '.join(NAMES)}; all (without {', '.join(LONG)} unless --quick); or page, which writes docs/paper.md",
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="under a minute; its numbers mean nothing")
    scale.add_argument("--full", action="store_true", help="the paper's setting, for a GPU")
    parser.add_argument("--output", type=Path, default=Settings.output, help="folder of the results")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with your data sets")
    parser.add_argument("--fresh", action="store_true", help="ignore the progress of an interrupted run")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="then report on what is finished; another run continues"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="work on the units whose name contains TEXT")
    args = parser.parse_args(argv)
    if (args.only or math.isfinite(args.minutes)) and args.name not in LONG:
        parser.error(f"--only and --minutes are for {', '.join(LONG)}; {args.name} runs as a whole.")
    if args.name == "page":
        write_page(args.output)
        return 0

    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device {args.device}: {error}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device here.")
    settings = Settings(
        scale=SCALES[0] if args.quick else SCALES[2] if args.full else SCALES[1],
        output=args.output,
        device=device,
        seed=args.seed,
        data=args.data,
        fresh=args.fresh,
        until=time.monotonic() + 60 * args.minutes,
        only=args.only,
    )
    every = [name for name in NAMES if args.quick or name not in LONG]
    missing = [name for name in (every if args.name == "all" else (args.name,)) if not _run(name, settings)]
    return 1 if missing else 0


def _run(name: str, settings: Settings) -> bool:
    try:
        module = importlib.import_module(f"benchmarks.paper.{name}")
    except ModuleNotFoundError as missing:
        print(f"skipped: {name} needs {missing.name}: pip install '.[paper]'\n", file=sys.stderr)
        return False
    print(f"== {name}: {module.__doc__.splitlines()[0]}", flush=True)
    start = time.perf_counter()
    try:
        report = module.run(settings)
    except MissingError as error:
        print(f"skipped: {error}\n", file=sys.stderr)
        return False
    for table in report.tables:
        print_table(table)
    paths = [write_json(settings, report), *report.figures]
    print(f"\n{time.perf_counter() - start:.0f} s, written to {', '.join(map(str, paths))}\n", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
