"""The command line: runs all benchmarks or one, prints their tables, writes a JSON file and draws a picture."""

import argparse
import time
import traceback
from pathlib import Path

import torch

from benchmarks import (
    breakdown,
    checkpoints,
    compile_time,
    convolution,
    dropin,
    ensemble,
    equal_accuracy,
    flows,
    independent,
    kernels,
    lanes,
    lanes_memory,
    large_state,
    memory,
    sampling,
    solve_rate,
    solve_rate_short,
    state_size,
    step_throughput,
    stiff,
)
from benchmarks.harness import Result, Settings, Table, first_line, print_table, write_json

# Benchmarks that run on a device by default; ``--only`` runs any of them on either device.
BY_DEVICE = {
    "cpu": (
        step_throughput,
        equal_accuracy,
        sampling,
        dropin,
        state_size,
        large_state,
        memory,
        checkpoints,
        independent,
        flows,
        lanes,
        lanes_memory,
        compile_time,
        stiff,
        kernels,
    ),
    "cuda": (solve_rate, kernels, breakdown, convolution, ensemble),
}
BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module
    for modules in (*BY_DEVICE.values(), (solve_rate_short,))
    for module in modules
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS, help="run this one")
    parser.add_argument("--list", action="store_true", help="print each name and question, run nothing")
    parser.add_argument("--quick", action="store_true", help="a short run; its numbers mean nothing")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    args = parser.parse_args()

    if args.list:
        for name, module in BENCHMARKS.items():
            print(f"{name:16} {question_of(module)}")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here.")
    settings = Settings(device=args.device, quick=args.quick)
    failed = []
    for module in [BENCHMARKS[args.only]] if args.only else BY_DEVICE[args.device]:
        try:
            _run(module, settings, args.output)
        except Exception:  # the other benchmarks still run
            traceback.print_exc()
            failed.append(name_of(module))
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}\n")


def _run(module, settings: Settings, output: Path) -> None:
    name, result = name_of(module), Result()
    print(f"== {name}: {question_of(module)}", flush=True)
    start = time.perf_counter()
    try:
        for part in module.run(settings):
            _take(part, result)
            write_json(output, name, question_of(module), settings, result)  # kept even if the run is stopped here
        result.is_complete = True
    except BaseException as error:
        result.notes.append(f"Not complete: {type(error).__name__}: {first_line(error)}")
        raise
    finally:
        paths = [write_json(output, name, question_of(module), settings, result)]
    if hasattr(module, "draw"):
        paths.append(output / f"{name}.png")
        module.draw(result).savefig(paths[-1], dpi=150)
    print(f"\n{time.perf_counter() - start:.0f} s, written to {', '.join(map(str, paths))}\n", flush=True)


def _take(part: Table | str, result: Result) -> None:
    if isinstance(part, Table):
        print_table(part)
        result.tables.append(part)
    elif part not in result.notes:
        print(part, flush=True)
        result.notes.append(part)


def name_of(module) -> str:
    return module.__name__.rpartition(".")[2]


def question_of(module) -> str:
    return module.__doc__.split("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    main()
