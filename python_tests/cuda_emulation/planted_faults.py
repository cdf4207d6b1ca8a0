"""Faults planted into a copy of csrc, each switched on by its number, so that one build serves all of them."""

from __future__ import annotations

from emulated_build import Patch

_CUDA, _CONTROL, _FUNCTORS = "kernels/cuda.cu", "kernels/control_cuda.cu", "kernels/functors.h"


def _without(number: int, path: str, statement: str, before: str = "", after: str = "") -> Patch:
    """Leaves out a statement, which its neighbourhood tells from others like it."""
    return path, before + statement + after, f"{before}if (!emulation::has_fault({number})) {statement}{after}"


FAULTS = {
    "fence before the count": 1,
    "fence after the count": 2,
    "barrier before the warps' sums are written": 3,
    "barrier after the warps' sums are written": 4,
    "barrier before the last block is known": 5,
    "count of blocks not reset": 6,
    "count of blocks not atomic": 7,
    "last elements not written": 8,
    "last elements not summed": 9,
    "one pack too many": 10,
    "step size of the next row": 11,
    "barrier that one thread leaves out": 12,
    "second pack of a thread left out": 13,
    "half of a warp not summed": 14,
    "a decision before the block is read": 15,
    "a block written before the decision": 16,
    "rows summed with one element too many": 17,
    "checkpoint not stored": 18,
    "first slope not kept": 19,
    "cotangents of outputs not set to zero first": 20,
}

PATCHES: list[Patch] = [
    (
        "kernels/ops_impl.h",
        "if constexpr (N < kMaxTerms)",
        "if constexpr (N < 3)",
    ),  # compiles in a fraction of the time
    # Few blocks, so that the loops of their threads go around more than once.
    (_CUDA, "for_each_kernel<V><<<grid(n / V + 1, kMaxBlocks)", "for_each_kernel<V><<<grid(n / V + 1, 2)"),
    (_CUDA, "grid(rows.count * kLanes, 1 << 20)", "grid(rows.count * kLanes, 2)"),
    _without(1, _CUDA, "__threadfence();", before="partial[blockIdx.x] = value;\n        "),
    (_CUDA, "if (last) __threadfence();", "if (last && !emulation::has_fault(2)) __threadfence();"),
    _without(3, _CUDA, "__syncthreads();", after="\n    if (threadIdx.x % 32 == 0)"),
    _without(4, _CUDA, "__syncthreads();", after="\n    double total = 0;"),
    (
        _CUDA,
        "__syncthreads();\n    if (!last) return;",
        "if (!emulation::has_fault(5) && !(emulation::has_fault(12) && threadIdx.x == 7)) __syncthreads();\n"
        "    if (!last) return;",
    ),
    _without(6, _CUDA, "*finished = 0;"),
    (
        _CUDA,
        "last = atomicAdd(finished, 1u) == gridDim.x - 1;",
        "last = (emulation::has_fault(7) ? (*finished)++ : atomicAdd(finished, 1u)) == gridDim.x - 1;",
    ),
    (_CUDA, "if (V > 1 && tail < n) f.", "if (V > 1 && tail < n - emulation::has_fault(8)) f."),
    (_CUDA, "double value = V > 1 && tail < n ?", "double value = V > 1 && tail < n - emulation::has_fault(9) ?"),
    (
        _CUDA,
        "for (int64_t p = thread; p < packs; p += stride) f.",
        "for (int64_t p = thread; p < packs + emulation::has_fault(10);"
        " p += emulation::has_fault(13) ? packs : stride) f.",
    ),
    (_CUDA, "f.of_row(each[p / packs_per_row])", "f.of_row(each[(p + emulation::has_fault(11)) / packs_per_row])"),
    (
        _CUDA,
        "__shared__ double warp_sum[kThreads / 32];\n    for (int offset = 16;",
        "__shared__ double warp_sum[kThreads / 32];\n    for (int offset = emulation::has_fault(14) ? 8 : 16;",
    ),
    _without(15, _CONTROL, "__syncthreads();", after="\n    if (threadIdx.x == 0)"),
    _without(
        16, _CONTROL, "__syncthreads();", after="\n    for (int i = threadIdx.x; i < kWords; i += kThreads) there"
    ),
    (
        _CUDA,
        "for (int64_t i = lane; i < n; i += Lanes) value",
        "for (int64_t i = lane; i < n + emulation::has_fault(17); i += Lanes) value",
    ),
    _without(18, _FUNCTORS, "if (slot) store<V>(control::at<T>(slot), i, end);"),
    _without(19, _FUNCTORS, "if (k_first) store<V>(k_first, i, load<V>(k[stages - 1], i));"),
    _without(20, _FUNCTORS, "store<V>(slope[j], i, sum);"),
]
