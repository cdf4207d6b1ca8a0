"""The checks of the emulated kernels fail if csrc has a fault: fences, barriers, counters, ends of loops."""

from __future__ import annotations

import faulthandler
import os
import signal
import warnings
from collections.abc import Callable
from functools import partial

import pytest
from emulated_checks import check_error_ratio, check_rows, check_weighted_sum
from emulated_control import check_decision, check_finished_step, check_restored_step
from emulation import Emulation
from planted_faults import FAULTS

ORDERS = 5  # of the threads; most faults are seen in any of them

Check = Callable[[Emulation], None]
_long_sum = partial(check_error_ratio, dtype="float64", bounds=[0, 4 * 512 + 1])
_short_sums = partial(check_error_ratio, dtype="float64", bounds=[0, 40], rows=3)
_long_rows = partial(check_error_ratio, dtype="float32", bounds=[0, 1100], rows=5)
_sum = partial(check_weighted_sum, dtype="float32", n=2 * 4 * 256 + 1029, count=2, with_base=True)

CHECKS: dict[str, Check] = {
    "fence before the count": _long_sum,
    "fence after the count": _long_sum,
    "barrier before the warps' sums are written": _long_rows,
    "barrier after the warps' sums are written": _long_sum,
    "barrier before the last block is known": _long_sum,
    "count of blocks not reset": _long_sum,
    "count of blocks not atomic": _long_sum,
    "last elements not written": _sum,
    "last elements not summed": _long_sum,
    "one pack too many": _sum,
    "step size of the next row": partial(check_rows, dtype="float32", rows=3, length=7, count=2),
    "barrier that one thread leaves out": _long_sum,
    "second pack of a thread left out": _sum,
    "half of a warp not summed": _long_sum,
    "a decision before the block is read": check_decision,
    "a block written before the decision": check_decision,
    "rows summed with one element too many": _short_sums,
    "checkpoint not stored": check_finished_step,
    "first slope not kept": check_finished_step,
    "cotangents of outputs not set to zero first": check_restored_step,
}


def test_every_fault_has_a_check() -> None:
    assert CHECKS.keys() == FAULTS.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_is_found(faulty_build: Emulation, fault: str) -> None:
    check = CHECKS[fault]
    faulty_build.begin(seed=1)
    check(faulty_build)  # which passes without the fault
    found = [_is_found(faulty_build, check, FAULTS[fault], seed) for seed in range(ORDERS)]
    assert sum(found) >= ORDERS - 1


def _is_found(cuda: Emulation, check: Check, fault: int, seed: int) -> bool:
    """Runs a check in a child process, as a fault may crash it or make it endless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which the child does not use
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        signal.alarm(20)
        code = 2
        try:
            code = 0 if _fails(cuda, check, fault, seed) else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0


def _fails(cuda: Emulation, check: Check, fault: int, seed: int) -> bool:
    cuda.begin(seed, fault)
    try:
        check(cuda)
    except AssertionError:
        return True
    return bool(cuda.findings())
