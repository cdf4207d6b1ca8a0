"""Counts of a solve: ``Stats``, and ``BatchStats`` for independent samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from aca_ext.errors import SolveError

_OF_NEWTON = ("n_jacobians", "n_factorizations", "n_newton_iterations")
_OF_ENGINES = ("compile_seconds", "compiled", "engine", "reason")


@dataclass(repr=False)
class Stats:
    """Counts of one solve.

    Attributes:
        n_f_evals: evaluations of func in the forward pass. With engine="graph", evaluations in steps that were launched
            ahead and not needed, and in the test for a changed func, are not counted.
        n_steps: trial steps, n_accepted + n_rejected.
        n_accepted: trial steps that became part of the solution.
        n_rejected: trial steps whose error was too large.
        backend: implementation of the arithmetic: "cpu" or "cuda" (fused kernels), "reference" (plain PyTorch),
            "compiled" or "graph" (the engine of that name).
        n_f_evals_backward: evaluations of func in the backward pass, but for those of its checks; None until it has
            run.
        compile_seconds: seconds that engine="compiled" spent on tracing and compiling, or engine="graph" on capturing;
            0 if an earlier solve of this process did both. With code from the cache on disk, only tracing remains.
        compiled: with engine="compiled" or "auto", the part that ran in compiled code: "solve" (all of it),
            "evaluations" (func and its derivative, between the steps of the eager engine), or "" (nothing).
        engine: with engine="auto", the engine that ran, "eager" or "compiled"; else "".
        reason: with engine="compiled" or "auto", the reason why it was not the whole solve; else "".
        n_jacobians: Jacobians of func that the forward pass of an implicit method evaluated.
        n_factorizations: matrices that it factorised.
        n_newton_iterations: iterations of Newton's method; each evaluates func once, for one stage.
        n_accepted_of: with method="auto", accepted steps of each of its methods, by name; else empty.
    """

    n_f_evals: int = 0
    n_steps: int = 0
    n_accepted: int = 0
    n_rejected: int = 0
    backend: str = ""
    n_f_evals_backward: int | None = None
    compile_seconds: float = 0.0
    compiled: str = ""
    engine: str = ""
    reason: str = ""
    n_jacobians: int = 0
    n_factorizations: int = 0
    n_newton_iterations: int = 0
    n_accepted_of: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Shows what every solve has, and of the rest what this one has."""
        always = ("n_f_evals", "n_steps", "n_accepted", "n_rejected", "backend", "n_f_evals_backward")
        parts = [f"{name}={getattr(self, name)!r}" for name in always]
        return f"Stats({', '.join([*parts, *_shown(self, *_OF_ENGINES, *_OF_NEWTON, 'n_accepted_of')])})"


def _shown(stats: object, *names: str) -> list[str]:
    values = {name: getattr(stats, name) for name in names}
    shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items() if value}
    return [f"{name}={value!r}" for name, value in shown.items()]


def sum_of(one: Any, other: Any) -> Stats:
    """The counts of two parts of a solve; ``n_f_evals_backward`` is None."""
    counts = ("n_f_evals", "n_steps", "n_accepted", "n_rejected", "compile_seconds")
    of_newton = ("n_jacobians", "n_factorizations", "n_newton_iterations")
    counted = {name: getattr(one, name) + getattr(other, name) for name in (*counts, *of_newton)}
    same = {name: getattr(other, name) for name in ("backend", "engine", "compiled", "reason")}
    names = {**one.n_accepted_of, **other.n_accepted_of}
    of_methods = {name: one.n_accepted_of.get(name, 0) + other.n_accepted_of.get(name, 0) for name in names}
    return Stats(**counted, **same, n_accepted_of=of_methods)


@dataclass(repr=False)
class BatchStats:
    """Counts of a solve with independent samples (option ``batch="independent"``).

    Attributes:
        n_f_evals: calls of func in the forward pass; each evaluates the whole batch, or with option ``compact`` a part.
        n_f_rows: evaluations of single samples; without ``compact``, n_f_evals times the batch size.
        n_steps: (batch,) int64 on the CPU; trial steps of each sample, the same as in a solve of that sample alone.
        n_accepted: (batch,) int64 on the CPU; trial steps that became part of the solution.
        n_rejected: (batch,) int64 on the CPU; trial steps whose error was too large, n_steps - n_accepted.
        backend: implementation of the arithmetic: "cpu" or "cuda" (fused kernels), or "reference" (plain PyTorch).
        n_f_evals_backward: calls of func in the backward pass; None until it has run.
        failures: errors of the samples that failed, with option ``on_failure="nan"``.
        compile_seconds: seconds that engine="compiled" spent on tracing and compiling.
        compiled, engine, reason: as in ``Stats``.
        n_jacobians, n_factorizations, n_newton_iterations: as in ``Stats``, of an implicit method; sums over the
            samples of the numbers that each needs, while the work is done for the whole batch at once.

    engine="compiled" evaluates single samples, no more often than each needs: ``n_f_rows`` is the sum of these
    evaluations, and ``n_f_evals`` and ``n_f_evals_backward`` are the most that one sample took.
    """

    n_steps: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    n_f_evals: int = 0
    n_f_rows: int = 0
    backend: str = ""
    n_f_evals_backward: int | None = None
    failures: Sequence[SolveError] = ()
    compile_seconds: float = 0.0
    compiled: str = ""
    engine: str = ""
    reason: str = ""
    n_jacobians: int = 0
    n_factorizations: int = 0
    n_newton_iterations: int = 0

    def followed_by(self, rest: BatchStats) -> BatchStats:
        """The sums over two parts of a solve; ``n_f_evals_backward`` is None."""
        names = ("n_steps", "n_accepted", "n_rejected", "n_f_evals", "n_f_rows", "compile_seconds", *_OF_NEWTON)
        same = {name: getattr(rest, name) for name in ("backend", "compiled", "engine", "reason")}
        return BatchStats(**{name: getattr(self, name) + getattr(rest, name) for name in names}, **same)

    def __repr__(self) -> str:
        """Shows each per-sample count as its range over the batch."""
        parts = [f"n_f_evals={self.n_f_evals}", f"n_f_rows={self.n_f_rows}"]
        for name in ("n_steps", "n_accepted", "n_rejected"):
            count = getattr(self, name)
            parts.append(f"{name}={int(count.min())}..{int(count.max())}" if len(count) else f"{name}=none")
        parts += [f"backend={self.backend!r}", f"n_f_evals_backward={self.n_f_evals_backward}"]
        parts += _shown(self, *_OF_NEWTON, *_OF_ENGINES)
        if self.failures:
            parts.append(f"failures of samples {', '.join(str(error.sample) for error in self.failures[:10])}")
        return f"BatchStats of {len(self.n_steps)} samples({', '.join(parts)})"
