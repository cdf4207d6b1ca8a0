// Operations of the extension, independent of the backend: every operation, its operands and its contract.
// Addresses point to memory laid out alike, of the target's dtype; sizes are int64 and may be zero.
#pragma once
#include <cstdint>

namespace aca {

constexpr int kMaxTerms = 16;
constexpr int kMaxPartials = 1024;  // partial sums of one reduction, a function of the size alone
constexpr int kMaxDegree = 8;       // of dense output
constexpr int kMaxBlocks = 48;      // of states, each as large as all before it
constexpr int64_t kWorkspaceBytes = kMaxPartials * sizeof(double) + 64;

enum class DType { f32, f64 };

// Place and mode of an operation. The CPU uses `threads`; a GPU uses the rest.
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
    double rtol, atol;               // used where the next two are 0
    uintptr_t rtol_each, atol_each;  // one tolerance per element; both or neither
};

// A batch of independent samples: `count` rows of `length` neighbouring elements, each with a number of its own.
struct Samples {
    int64_t count, length;
    uintptr_t each;  // double, one for each row: its step size, or its weight of k in an error ratio
};

// A step just decided on, whose control block is at `control`.
struct DecidedStep {
    uintptr_t control;
    uintptr_t y;  // the state that it started from
    int stages;
    uintptr_t k[kMaxTerms];  // slopes, or for the backward pass where their cotangents are added up
};

struct Control;       // control.h
enum class Decision;  // control.h

// The operations of one backend.
struct Backend {
    const char* name;
    // out = base + h·sum; without base (0), out = h·sum.
    void (*weighted_sum)(const Target&, int64_t n, uintptr_t out, uintptr_t base, double h, const Sum&);
    // y1 = y + h·sum and error = h·Σ_j error_weight[j]·x[j].
    void (*solution_and_error)(const Target&, int64_t n, uintptr_t y1, uintptr_t error, uintptr_t y, double h,
                               const Sum&, const double* error_weight);
    // out[s] (double) = sum over elements bounds[s] ≤ i < bounds[s+1] of the squared ratio. Bitwise repeatable.
    void (*squared_error_ratio)(const Target&, int segments, const int64_t* bounds, uintptr_t out, const ErrorRatio&);
    // The first two with the step size of each row.
    void (*weighted_sum_rows)(const Target&, const Samples&, uintptr_t out, uintptr_t base, const Sum&);
    void (*solution_and_error_rows)(const Target&, const Samples&, uintptr_t y1, uintptr_t error, uintptr_t y,
                                    const Sum&, const double* error_weight);
    // out[row·segments + s] (double) = the sum over elements bounds[s] ≤ i < bounds[s+1] of each row, with w of the
    // row.
    void (*squared_error_ratio_rows)(const Target&, const Samples&, int segments, const int64_t* bounds, uintptr_t out,
                                     const ErrorRatio&);
    // out[i] = value[i], i < n ≤ kMaxTerms.
    void (*write_scalars)(const Target&, int n, uintptr_t out, const double* value);
    // The control block at `to`, in the memory of the device, becomes `from`; and one decision about it there.
    void (*write_control)(const Target&, uintptr_t to, const Control& from);
    void (*decide)(const Target&, uintptr_t control, Decision);
    // If the step was accepted: writes the outputs that it reached, keeps its solution y1, and puts it and, where
    // k_first is not 0, the last slope, at y and k_first.
    void (*finish_step)(const Target&, int64_t n, const DecidedStep&, uintptr_t y1, uintptr_t k_first);
    // The state that a step started from, from where it was kept, to y; the cotangents of outputs at its end added to
    // g, and of those inside it, where `inside` is not 0, to `inside` and by their weights to each k.
    void (*restore_step)(const Target&, int64_t n, const DecidedStep&, uintptr_t g, uintptr_t inside);
};

// A target together with its backend, so that a call names both by one object.
struct BoundTarget {
    Target target;
    const Backend* backend;
};

const Backend& cpu_backend();  // for the best instruction set this processor has
const char* cpu_instruction_set();
const Backend& cuda_backend();  // defined in CUDA builds only
int cuda_device_count();        // 0 without a GPU or driver

}  // namespace aca
