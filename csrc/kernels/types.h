// Types of the kernels' operands: where an operation runs and the memory that it works on.
#pragma once
#include <cstdint>

namespace aca {

constexpr int kMaxTerms = 16;      // of one weighted sum
constexpr int kMaxPartials = 512;  // partial sums of one reduction
constexpr int kMaxDegree = 8;      // of dense output
constexpr int kMaxBlocks = 48;     // of checkpoints; each block is as large as all before it together
constexpr int64_t kWorkspaceBytes = kMaxPartials * sizeof(double) + 64;

enum class DType { f32, f64 };

// Dtype of an operation and the place where it runs. The CPU uses `threads`, a GPU the members after it.
struct Target {
    DType dtype;
    int threads;
    int device;
    uintptr_t stream;
    uintptr_t workspace;  // kWorkspaceBytes, zero before the first use, owned by one stream at a time
};

// Σ_j w[j]·x[j]
struct Sum {
    int count;
    uintptr_t x[kMaxTerms];
    double w[kMaxTerms];
};

// Each element's share of the error norm: (partial + w·k) / (atol + rtol·max(|y0|, |y1|)).
struct ErrorRatio {
    uintptr_t partial;
    uintptr_t k;  // 0: none
    double w;
    uintptr_t y0, y1;
    double rtol, atol;               // used if the next two are 0
    uintptr_t rtol_each, atol_each;  // one tolerance per element; both or neither
};

// A batch of independent samples: `count` rows of `length` neighbouring elements.
struct Samples {
    int64_t count, length;
    uintptr_t each;  // double, one per row: its step size, or its weight of k in an error ratio
};

// Buffers of the step that the control block at `control` has just decided on.
struct DecidedStep {
    uintptr_t control;
    uintptr_t y;  // the state that it started from
    int stages;
    uintptr_t k[kMaxTerms];  // slopes; in the backward pass, the sums of their cotangents
};

}  // namespace aca
