"""Parts of a check, each with a time limit of its own, all before one deadline.

Results are on disk before the next part begins, so that a check that is killed at any moment leaves them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KILL_AFTER = 5  # seconds from the interrupt of a part to its end by force
_LONGEST_LOG = 1 << 20  # characters of one part
_TELLING = re.compile(r"FAILED|ERROR|E  |Fatal|Timeout|\w*Error: ")
_MOST_TELLING = 10
_OUTCOMES = {0: "passed", 124: "stopped: out of time", 137: "killed: out of time"}


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        limit: seconds until it is interrupted.
        proofs: texts without which its output shows no success.
        refutation: pattern of a line that shows a failure, whatever the exit status.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    proofs: Sequence[str] = ()
    refutation: str = ""


class Check:
    """A run of parts; ``out`` receives ``summary.json`` with their results and ``log.txt`` with their output.

    ``summary.json`` is rewritten at the end of each part, ``log.txt`` grows line by line.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.facts: dict[str, Any] = {}
        self._start, self._deadline = time.monotonic(), time.monotonic() + seconds
        self._summary, self._log = out / "summary.json", out / "log.txt"
        self._log.write_text("")
        self._results: list[dict[str, Any]] = []
        self._running = set[subprocess.Popen[str]]()
        self._lock, self._is_stopped, self.has_failed = threading.RLock(), False, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._write("running")

    def run(self, *parts: Part, at_once: int = 1) -> bool:
        """Runs the parts, up to ``at_once`` side by side; tells whether all have passed."""
        with ThreadPoolExecutor(at_once) as threads:
            return all(list(threads.map(self._run, parts)))

    def leave_out(self, reason: str, *parts: Part) -> None:
        for part in parts:
            self._note(part, None, 0.0, f"not run: {reason}", "")

    def finish(self) -> int:
        """Writes the final status; returns the exit status of the check."""
        self._write("stopped" if self._is_stopped else "failed" if self.has_failed else "passed")
        return int(self.has_failed or self._is_stopped)

    def _run(self, part: Part) -> bool:
        start = time.monotonic()
        limit = min(part.limit, self._deadline - start - _KILL_AFTER)
        with self._lock:  # so that no part begins after the others were stopped
            if limit < 1 or self._is_stopped:
                self.has_failed = True
                self.leave_out("the check was stopped" if self._is_stopped else "no time was left", part)
                return False
            process = self._started(part, limit)
        with process:
            lines = self._read(part, process)
        code = process.returncode
        with self._lock:
            self._running.discard(process)
        proofs = {text: next((line for line in reversed(lines) if text in line), None) for text in part.proofs}
        missing = [text for text, line in proofs.items() if line is None]
        refuting = [line for line in lines if part.refutation and re.match(part.refutation, line)]
        outcome = _OUTCOMES.get(code, f"failed, exit {code}")
        if code == 0 and (missing or refuting):
            outcome = f"failed: {refuting[0]}" if refuting else f"failed: no {missing[0].strip()!r} in its output"
        proving = [line.strip("= ") for line in proofs.values() if line is not None] or lines[-1:]
        self._note(part, code, time.monotonic() - start, outcome, "; ".join(proving))
        if outcome != "passed":
            self.has_failed = True
            for line in [line for line in lines if _TELLING.match(line)][:_MOST_TELLING]:
                print(f"    {line[:200]}", flush=True)
        return outcome == "passed"

    def _started(self, part: Part, limit: float) -> subprocess.Popen[str]:
        # GNU timeout also interrupts the processes that the command started.
        timeout = ["timeout", "--signal=INT", f"--kill-after={_KILL_AFTER}", f"{limit:.0f}"]
        process = subprocess.Popen(
            [*timeout, *part.command],
            env=os.environ | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._running.add(process)
        return process

    def _read(self, part: Part, process: subprocess.Popen[str]) -> list[str]:
        assert process.stdout is not None
        lines, left = list[str](), _LONGEST_LOG
        for line in process.stdout:
            lines.append(line.rstrip())
            left -= len(line)
            if left > 0:
                with self._lock, self._log.open("a") as log:
                    log.write(f"[{part.name}] {lines[-1]}\n")
        return [line for line in lines if line]

    def _note(self, part: Part, code: int | None, seconds: float, outcome: str, result: str) -> None:
        end = {
            "part": part.name,
            "exit": code,
            "seconds": round(seconds, 1),
            "outcome": outcome,
            "result": result[:200],
        }
        with self._lock:
            self._results.append(end)
            self._write("running")
            elapsed = time.monotonic() - self._start
            print(f"{elapsed:4.0f} s  {part.name:32} {seconds:4.0f} s  {outcome}  {result[:200]}", flush=True)

    def _write(self, status: str) -> None:
        """Replaces the summary as a whole, so that a kill leaves the old one or the new one."""
        with self._lock:
            seconds = round(time.monotonic() - self._start, 1)
            summary = {"status": status, "seconds": seconds, **self.facts, "parts": self._results}
            new = self._summary.with_suffix(".new")
            new.write_text(json.dumps(summary, indent=1) + "\n")
            new.replace(self._summary)

    def _stop(self, number: int, frame: Any) -> None:
        self._is_stopped = True
        for process in list(self._running):
            process.terminate()  # which GNU timeout passes on
