// Kernel operations, the same for every backend: their operands and contracts. Unless a contract says otherwise, the
// arrays of a call have one layout and the target's dtype. Sizes may be zero.
#pragma once
#include <cstdint>

#include "kernels/types.h"

namespace aca {

struct Control;       // control/control_block.h
enum class Decision;  // control/control_block.h

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
    // The first two operations with one step size per row (a sample).
    void (*weighted_sum_rows)(const Target&, const Samples&, uintptr_t out, uintptr_t base, const Sum&);
    void (*solution_and_error_rows)(const Target&, const Samples&, uintptr_t y1, uintptr_t error, uintptr_t y,
                                    const Sum&, const double* error_weight);
    // out[row·segments + s] (double) = the sum over elements bounds[s] ≤ i < bounds[s+1] of a row, with the w of that
    // row.
    void (*squared_error_ratio_rows)(const Target&, const Samples&, int segments, const int64_t* bounds, uintptr_t out,
                                     const ErrorRatio&);
    // out[i] = value[i], i < n ≤ kMaxTerms.
    void (*write_scalars)(const Target&, int n, uintptr_t out, const double* value);
    // Copies `from` to the control block at `to`, in the memory of the device.
    void (*write_control)(const Target&, uintptr_t to, const Control& from);
    // Makes one decision about the control block at `control`.
    void (*decide)(const Target&, uintptr_t control, Decision);
    // If the step was accepted: writes the outputs that it reached, stores its solution y1 as a checkpoint, copies y1
    // to y and, unless k_first is 0, the last slope to k_first.
    void (*finish_step)(const Target&, int64_t n, const DecidedStep&, uintptr_t y1, uintptr_t k_first);
    // Copies the state that the step started from to y. Adds the cotangents of outputs at its end to g. Writes the sum
    // of the cotangents of outputs inside it to `inside`, and their weighted sums to each k; with `inside` 0 there are
    // none.
    void (*restore_step)(const Target&, int64_t n, const DecidedStep&, uintptr_t g, uintptr_t inside);
};

// A target and its backend, passed as one object.
struct BoundTarget {
    Target target;
    const Backend* backend;
};

const Backend& cpu_backend();  // for the best instruction set that this processor has
const char* cpu_instruction_set();
const Backend& cuda_backend();  // defined in CUDA builds only
int cuda_device_count();        // 0 without a GPU or driver

}  // namespace aca
