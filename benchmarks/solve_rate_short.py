"""Steps per second on a GPU of two workloads, next to torchdiffeq: the first figures of a short session with a GPU.

A part of ``solve_rate``, which explains the columns; it compiles nothing in jax and loops on no device.
"""

from benchmarks import solve_rate
from benchmarks.harness import Parts, Settings
from benchmarks.workloads import W1, W3

WORKLOADS = (W1, W3)


def run(settings: Settings) -> Parts:
    yield from solve_rate.rates(WORKLOADS, ("torchdiffeq",), settings, captured={})
