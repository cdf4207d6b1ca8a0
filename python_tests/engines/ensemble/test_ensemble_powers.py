"""The lanes' own powers of error ratios against those of the mathematical library."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from aca_ext.engines.compiled import engine as compiled_engine
from aca_ext.engines.compiled import library_cache
from aca_ext.engines.ensemble import build

pytestmark = pytest.mark.skipif(compiled_engine._TORCH < compiled_engine._OLDEST_TORCH, reason="refused on this torch")

_SOURCE = """
typedef double T;
#include "ensemble/powers.h"
extern "C" __attribute__((visibility("default"))) void powers(long n, const double* x, double exponent, double* y) {
    for (long i = 0; i < n; ++i) {
        aca::Reals all{};
        all.each[0] = x[i];
        all.parts[0] = aca::power_of(all.parts[0], exponent);
        y[i] = all.each[0];
    }
}
"""


@pytest.fixture(scope="module", params=["vectors", "one lane"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    source = _SOURCE if request.param == "vectors" else f"#define ACA_ONE_LANE\n{_SOURCE}"

    def compile_to(to: Path) -> None:
        library_cache.run_compiler(
            [*build._command(), "-shared", str(library_cache.source_file(to)), "-o", str(to)], source, to
        )

    return library_cache.library([source, *build._command(), build.state_of_headers()], compile_to)


def powers(library: ctypes.CDLL, x: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    y = np.empty_like(x)
    library.powers(ctypes.c_long(len(x)), ctypes.c_void_p(x.ctypes.data), ctypes.c_double(exponent),
                   ctypes.c_void_p(y.ctypes.data))  # fmt: skip
    return y


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8])
def test_powers_are_exact_but_for_rounding(library: ctypes.CDLL, order: int) -> None:
    logarithms = np.random.default_rng(0).uniform(-60, 20, 10_000)
    x = np.concatenate([np.exp(logarithms), 2.0 ** np.arange(-1000, 1001), np.nextafter(1.0, [0.0, 2.0])])
    expected = np.array([math.pow(each, -1 / order) for each in x])
    found = powers(library, x, -1 / order)
    np.testing.assert_allclose(found, expected, rtol=4e-15)  # where there is no fma; else 4e-16
    usual = slice(len(logarithms))  # these fit into single precision, to which the controller rounds them
    np.testing.assert_array_equal(found[usual].astype(np.float32), expected[usual].astype(np.float32))


def test_extreme_ratios_exceed_all_limits(library: ctypes.CDLL) -> None:
    x = np.array([0.0, 5e-324, 1e-308, 1e-302, 1e302, 1.7e308])
    found = powers(library, x, -0.2)
    assert (found[:4] > 1e60).all()
    assert (found[4:] < 1e-60).all()
