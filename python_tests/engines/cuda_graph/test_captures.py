"""Rules of captures that need no GPU: a second try, and locks that a backward pass does not wait for without end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aca_ext.engines.cuda_graph import captures
from aca_ext.errors import GraphError
from aca_ext.kernels.layout import aligned_length

INVALIDATED = "CUDA error: operation failed due to a previous error during capture"


class _NumberedError(RuntimeError):
    error_code = 900


def failing(errors: list[RuntimeError]) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def capture() -> str:
        calls.append(1)
        if errors:
            raise errors.pop(0)
        return "graph"

    return capture, calls


class TestASecondTry:
    @pytest.mark.parametrize("error", [RuntimeError(INVALIDATED), _NumberedError("in other words")])
    def test_follows_a_capture_that_was_invalidated(self, error: RuntimeError) -> None:
        capture, calls = failing([error])
        assert captures.twice_if_invalidated(capture) == "graph"
        assert len(calls) == 2

    def test_is_the_last(self) -> None:
        capture, calls = failing([RuntimeError(INVALIDATED) for _ in range(3)])
        with pytest.raises(RuntimeError, match="previous error"):
            captures.twice_if_invalidated(capture)
        assert len(calls) == 2

    def test_does_not_follow_other_errors(self) -> None:
        capture, calls = failing([RuntimeError("func failed")])
        with pytest.raises(RuntimeError, match="func failed"):
            captures.twice_if_invalidated(capture)
        assert len(calls) == 1


class _Locks(torch.autograd.Function):
    """Takes a lock in its backward pass, as a capture there does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lock: Any) -> Tensor:
        ctx.lock = lock
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with captures.held(ctx.lock):
            return g, None


class TestLocks:
    def test_a_backward_pass_does_not_wait_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(captures, "_PATIENCE", 0.05)
        lock, x = threading.RLock(), torch.ones(2, requires_grad=True)
        taken, done = threading.Event(), threading.Event()

        def hold() -> None:
            with lock:
                taken.set()
                done.wait(30)

        other = threading.Thread(target=hold)
        other.start()
        taken.wait(30)
        try:
            with pytest.raises(GraphError, match="capture in another thread"):
                _Locks.apply(x, lock).sum().backward()
        finally:
            done.set()
            other.join()
        _Locks.apply(x, lock).sum().backward()
        assert x.grad is not None

    def test_outside_of_it_the_wait_is_as_long_as_it_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(captures, "_PATIENCE", 0.0)
        lock, found = threading.RLock(), []

        def use() -> None:
            with captures.held(lock):
                found.append("held")

        with lock:
            other = threading.Thread(target=use)
            other.start()
            other.join(0.2)
            assert not found
        other.join(30)
        assert found == ["held"]


@pytest.mark.parametrize(("device_type", "expected"), [("cpu", 16), ("cuda", 64)])
def test_rows_are_aligned_like_allocations(device_type: str, expected: int) -> None:
    assert aligned_length(5, 4, device_type) == expected
    assert aligned_length(expected, 4, device_type) == expected
    assert aligned_length(expected + 1, 8, device_type) * 8 % (64 if device_type == "cpu" else 256) == 0
