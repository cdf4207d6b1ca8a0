"""``.ci/gpu``, the check on a GPU machine: its results if it is killed, its limits, and the tests that it selects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / ".ci"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU timeout ends the parts")

# A check of two parts that print, of which the second goes on for long.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(CI)!r})
from pathlib import Path
from timed_parts import Check, Part
check = Check(Path(sys.argv[1]), 300)
check.facts["gpu"] = "none"
check.run(Part("one", ["echo", "first"], 10))
check.run(Part("two", ["sh", "-c", "echo second; exec sleep 100"], 200))
check.run(Part("three", ["echo", "third"], 10))
sys.exit(check.finish())
"""


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    sys.path.insert(0, str(CI))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    import timed_parts

    yield timed_parts
    sys.path.remove(str(CI))
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def summary_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def outcomes_in(out: Path) -> dict[str, str]:
    return {part["part"]: part["outcome"] for part in summary_in(out)["parts"]}


class TestKilled:
    @pytest.fixture
    def running(self, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The check of ``PROGRAM`` at the moment when its second part has printed a line."""
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path], stdout=subprocess.PIPE)
        log, until = tmp_path / "log.txt", time.monotonic() + 30
        while not (log.exists() and "[two] second" in log.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        yield process
        process.kill()
        process.communicate()

    def test_leaves_the_results_so_far(self, running: subprocess.Popen[bytes], tmp_path: Path) -> None:
        running.kill()
        running.wait()
        assert outcomes_in(tmp_path) == {"one": "passed"}
        assert summary_in(tmp_path)["status"] == "running"
        assert summary_in(tmp_path)["gpu"] == "none"
        assert (tmp_path / "log.txt").read_text().splitlines() == ["[one] first", "[two] second"]

    def test_terminated_ends_its_parts(self, running: subprocess.Popen[bytes], tmp_path: Path) -> None:
        running.terminate()
        printed, _ = running.communicate(timeout=20)
        assert running.returncode == 1
        assert summary_in(tmp_path)["status"] == "stopped"
        one, two, three = outcomes_in(tmp_path).values()
        assert (one, three) == ("passed", "not run: the check was stopped")
        assert two != "passed"
        assert [line.split()[2] for line in printed.decode().splitlines()] == ["one", "two", "three"]


class TestParts:
    def test_that_fail(self, parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        check = parts.Check(tmp_path, 60)
        assert check.run(parts.Part("good", ["echo", "== 3 passed =="], 5, proofs=[" passed"]))
        assert not check.run(parts.Part("bad", ["sh", "-c", "echo ERROR: no room; exit 3"], 5))
        assert not check.run(parts.Part("empty", ["echo", "2 skipped"], 5, proofs=[" passed"]))
        assert not check.run(parts.Part("refuted", ["echo", "aca_ext graph is left out"], 5, refutation="aca_ext.* is"))
        assert outcomes_in(tmp_path) == {
            "good": "passed",
            "bad": "failed, exit 3",
            "empty": "failed: no 'passed' in its output",
            "refuted": "failed: aca_ext graph is left out",
        }
        assert summary_in(tmp_path)["parts"][0]["result"] == "3 passed"
        assert "    ERROR: no room" in capsys.readouterr().out
        assert check.finish() == 1
        assert summary_in(tmp_path)["status"] == "failed"

    def test_side_by_side_get_their_environment(self, parts: Any, tmp_path: Path) -> None:
        check = parts.Check(tmp_path, 60)
        # Each waits for the file of the other.
        command = ["sh", "-c", f"cd {tmp_path}; touch $A; until [ -e $B ]; do sleep 0.05; done"]
        pair = [parts.Part(a, command, 20, {"A": a, "B": b}) for a, b in ("xy", "yx")]
        assert check.run(*pair, at_once=2)
        assert check.finish() == 0
        assert summary_in(tmp_path)["status"] == "passed"

    def test_over_their_limit(self, parts: Any, tmp_path: Path) -> None:
        check, start = parts.Check(tmp_path, 60), time.monotonic()
        assert not check.run(parts.Part("long", ["sh", "-c", "echo begun; sleep 50"], 1))
        assert time.monotonic() - start < 20
        assert outcomes_in(tmp_path) == {"long": "stopped: out of time"}
        assert (tmp_path / "log.txt").read_text() == "[long] begun\n"

    def test_before_the_deadline(self, parts: Any, tmp_path: Path) -> None:
        check, start = parts.Check(tmp_path, 6.5), time.monotonic()
        assert not check.run(parts.Part("long", ["sleep", "50"], 50))
        assert not check.run(parts.Part("late", ["true"], 50))
        assert time.monotonic() - start < 20
        assert outcomes_in(tmp_path) == {"long": "stopped: out of time", "late": "not run: no time was left"}


class Listed:
    """Stands in for a ``Check``: lists the parts, and lets some fail."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.run_parts, self.left_out = failing, list[Any](), list[Any]()

    def run(self, *parts: Any, at_once: int = 1) -> bool:
        self.run_parts += parts
        return not any(part.name in self.failing for part in parts)

    def leave_out(self, reason: str, *parts: Any) -> None:
        self.left_out += parts


@pytest.fixture(scope="module")
def gpu(parts: Any) -> Any:
    """The script as a module."""
    loader = SourceFileLoader("gpu_check", str(CI / "gpu"))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class TestPlan:
    def test_ends_if_the_first_tests_fail(self, gpu: Any, tmp_path: Path) -> None:
        kernels, ahead, loop = gpu.smoke()
        check = Listed(ahead.name)
        gpu.run_all(check, tmp_path)
        assert check.run_parts == [kernels, ahead]
        check = Listed(loop.name)
        gpu.run_all(check, tmp_path)
        assert check.left_out == gpu.loops()
        assert len(check.run_parts) > 12

    def test_selects_tests_and_benchmarks_that_exist(self, gpu: Any, tmp_path: Path) -> None:
        from _pytest.mark.expression import Expression

        from benchmarks.__main__ import BENCHMARKS

        check = Listed()
        gpu.run_all(check, tmp_path)
        commands = [part.command for part in check.run_parts]
        assert {
            command[command.index("--only") + 1] for command in commands if "--only" in command
        } <= BENCHMARKS.keys()
        selections = [([x for x in c if x.endswith(".py")], c[c.index("-k") + 1]) for c in commands if "-k" in c]
        assert len(selections) > 12
        files = sorted({file for of, _ in selections for file in of})
        listed = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *files],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        ids = [line for line in listed.stdout.splitlines() if "::" in line]
        for of, selected in selections:
            expression = Expression.compile(selected)
            names = [x.rpartition("/")[2].lower() for x in ids if x.partition("::")[0] in of]
            assert any(expression.evaluate(lambda word, name=name: word.lower() in name) for name in names), selected
